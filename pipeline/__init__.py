"""tunepress: fine-tune, merge, quantize and publish a language model, with every number measured."""
