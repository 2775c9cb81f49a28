"""Fine-tune a base model, and merge the adapter into it."""
