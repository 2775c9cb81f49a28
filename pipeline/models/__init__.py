"""Base models: find, check and open them safely; read and write their checkpoints."""
