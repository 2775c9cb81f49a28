"""torchao: tensors of int8 and int4 that stock transformers loads."""
