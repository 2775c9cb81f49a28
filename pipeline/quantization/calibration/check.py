"""A check that a model can be run block by block, before anything is computed with the result."""

from __future__ import annotations

import torch

from pipeline.errors import CheckpointError, ModelError
from pipeline.quantization.calibration.blocks import BlockwiseModel

TOKENS = 16


def check_blocks(model: BlockwiseModel) -> None:
    """Raise an error if the blocks one after the other give anything else than the model's own forward pass.

    Some architectures hand more than one tensor on, or change it between two blocks. All weights are read twice, one
    block at a time, and a few tokens are computed.

    Raises:
        ModelError: naming the architecture and the block.
    """
    ids = torch.arange(TOKENS).unsqueeze(0)
    try:
        with model.embedding():
            expected, hidden = model.outputs(ids), model.enter(ids)
        for block, own in enumerate(expected):
            with model.loaded(block):
                hidden = model.run(block, ids, hidden)
            if hidden.shape != own.shape or not _is_close(hidden, own):
                break
        else:
            return
        problem = f"block {block} gets more than the output of the block before it"
    except (ModelError, CheckpointError):
        raise
    except Exception as error:  # an architecture that was never tried can raise anything
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise ModelError(
        f"{model.architecture}: cannot be calibrated block by block ({problem}). Try: quantize.quality=fast"
    )


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return True if two results of the same arithmetic agree; a few channels can be much larger than the others."""
    usual = expected.abs().float().median().item()
    return torch.allclose(found.float(), expected.float(), rtol=0.02, atol=0.02 * usual)
