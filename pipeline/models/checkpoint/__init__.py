"""Sharded safetensors, read by byte ranges and written piece by piece.

Neither side maps a file or holds a shard: a tensor is read whole or in blocks of
rows, and an output's headers are planned before its first byte is written, so that
every piece has its place. Format: https://github.com/huggingface/safetensors#format
"""

from pipeline.models.checkpoint.header import (
    DTYPES,
    INDEX_NAME,
    SHARD_BYTES,
    SINGLE_NAME,
    TensorInfo,
    check_header,
    header_length,
    read_header,
)
from pipeline.models.checkpoint.reader import Checkpoint, shard_files
from pipeline.models.checkpoint.writer import CheckpointWriter

__all__ = [
    "DTYPES",
    "INDEX_NAME",
    "SHARD_BYTES",
    "SINGLE_NAME",
    "Checkpoint",
    "CheckpointWriter",
    "TensorInfo",
    "check_header",
    "header_length",
    "read_header",
    "shard_files",
]
