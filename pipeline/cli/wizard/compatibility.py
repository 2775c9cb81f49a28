"""Checks of the variants that a model can have, from its metadata. Training checks the model itself.

Checks of the architecture import torch, so they run only if the metadata show a possible problem.
"""

from __future__ import annotations

from pipeline.cli.wizard.draft import Draft
from pipeline.config.catalog import EIGHT_BITS, GROUP_SIZES, TRANSFORMERS
from pipeline.config.schema import Config, VariantSpec
from pipeline.errors import ModelError
from pipeline.models.experts import EXPERTS
from pipeline.planning.model import Sizes


def check_quantizable(sizes: Sizes) -> None:
    """Raise an error if the model cannot be quantized.

    Raises:
        ModelError: if the model has matrices outside linear layers; the message names them.
    """
    if not any(EXPERTS in name or _is_stack(tensor.shape) for name, tensor in sizes.tensors.items()):
        return
    from pipeline.models.matrices import refuse_other_matrices

    try:
        refuse_other_matrices(sizes.config)
    except ModelError as error:
        raise ModelError(f"{error}; or answer no (--no-quantize) to train without quantized models") from None


def check_variants(config: Config, sizes: Sizes) -> None:
    """Raise an error if the model cannot be stored in these formats.

    Raises:
        ModelError: if llama.cpp does not know the architecture, or a format does not hold mixtures of experts.
        MissingExtra: if a package that writes a format is not installed.
    """
    from pipeline.quantization.experts import check_experts
    from pipeline.quantization.formats import format_of
    from pipeline.workflow.stages.quantize import check_extras

    check_extras(config)
    for spec in config.quantize.variants:
        check_experts(spec, sizes.linear)
        if spec.variant.engine != TRANSFORMERS:  # transformers knows every model that can be read here
            format_of(spec).check_architecture(sizes.model_type)


def suited(draft: Draft, variants: list[dict]) -> list[dict]:
    """Return the variants, with embeddings kept if this model's cannot be quantized."""
    if not any(variant.get("embeddings") == EIGHT_BITS for variant in variants):
        return variants
    from pipeline.models.matrices import PLAIN_TABLE, embedding_kind

    if (kind := embedding_kind(draft.model_sizes.config)) == PLAIN_TABLE:
        return variants
    draft.tell(f"embeddings stay in bf16: those of this model ({kind}) cannot be stored in 8 bits")
    return [{key: value for key, value in variant.items() if key != "embeddings"} for variant in variants]


def holding_experts(draft: Draft, variants: list[dict]) -> list[dict]:
    """Return the variants of a preset or a recipe that hold the experts of this model; the others are told.

    Raises:
        ModelError: if none is left.
    """
    from pipeline.quantization.experts import check_experts

    found, said = [], ""
    for variant in variants:
        try:
            check_experts(VariantSpec.model_validate(variant).resolved(), draft.model_sizes.linear)
            found.append(variant)
        except ModelError as error:
            said = str(error)
            draft.tell(f"left out: {said}")
    if not found:
        raise ModelError(said)
    return found


def _is_stack(shape: tuple[int, ...]) -> bool:
    return len(shape) > 2 and min(shape[-2:]) >= min(GROUP_SIZES)
