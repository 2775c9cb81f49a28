"""Which quantized models a model can have, as far as its metadata tells; training looks at the model itself first.

What needs a look at the architecture imports torch, so it is taken only where something may be amiss.
"""

from __future__ import annotations

from pipeline.cli.wizard.draft import Draft
from pipeline.config.catalog import EIGHT_BITS, GROUP_SIZES, TRANSFORMERS
from pipeline.config.schema import Config
from pipeline.errors import ModelError
from pipeline.planning.model import Sizes

EXPERTS = ".experts."  # in the names of weights, some of which are stacked in the model


def check_quantizable(sizes: Sizes) -> None:
    """Is a model one that is quantized at all?

    Raises:
        ModelError: naming the matrices that are none of a linear layer.
    """
    if not any(EXPERTS in name or _is_stack(tensor.shape) for name, tensor in sizes.tensors.items()):
        return
    from pipeline.models.matrices import refuse_other_matrices

    try:
        refuse_other_matrices(sizes.config)
    except ModelError as error:
        raise ModelError(f"{error}; answer no (--no-quantize) to train it without") from None


def check_variants(config: Config, sizes: Sizes) -> None:
    """Can such a model be stored in these formats?

    Raises:
        ModelError: where llama.cpp does not know it.
        MissingExtra: where what writes them is not installed.
    """
    from pipeline.workflow.stages.quantize import check_extras

    check_extras(config)
    for spec in config.quantize.variants:
        if spec.variant.engine != TRANSFORMERS:  # transformers knows every model that can be read here
            from pipeline.quantization.formats import format_of

            format_of(spec).check_architecture(sizes.model_type)


def suited(draft: Draft, variants: list[dict]) -> list[dict]:
    """Return the variants, with embeddings kept if this model's cannot be quantized."""
    if not any(variant.get("embeddings") == EIGHT_BITS for variant in variants):
        return variants
    from pipeline.models.matrices import PLAIN_TABLE, embedding_kind

    if (kind := embedding_kind(draft.model_sizes.config)) == PLAIN_TABLE:
        return variants
    draft.tell(f"embeddings stay as they are, for those of this model ({kind}) cannot be stored in 8 bits")
    return [{key: value for key, value in variant.items() if key != "embeddings"} for variant in variants]


def _is_stack(shape: tuple[int, ...]) -> bool:
    return len(shape) > 2 and min(shape[-2:]) >= min(GROUP_SIZES)
