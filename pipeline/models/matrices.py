"""The matrices of a model: names and shapes of its linear layers and tables, without reading weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.catalog import GROUP_SIZES
from pipeline.errors import ModelError
from pipeline.models.checkpoint_files import read_config
from pipeline.models.experts import EXPERTS, expert_places, gates
from pipeline.models.layer_layouts import TIED_HEAD, Layout, layout
from pipeline.models.safe_loading import check_code, open_config

PLAIN_TABLE = "Embedding"  # the kind of an embedding that looks rows up and does no more


def linear_weights(folder: Path) -> dict[str, tuple[int, int]]:
    """Return names and shapes (N, K) of the weights of linear layers, without the output head.

    `models.layer_layouts` tells them for well-known architectures; other models are built with transformers, on the
    meta device, which takes seconds to import and no memory for weights.

    Raises:
        ModelError: if transformers cannot build the model.
    """
    if known := model_layout(folder):
        return known.linear
    return linear_layers(skeleton(folder))


def quantizable_weights(folder: Path) -> dict[str, tuple[int, int]]:
    """Return names and shapes (N, K) of the weights that may be quantized: linear layers, and matrices of experts.

    The output head, routers and other gates of experts are not among them. Names are those in the checkpoint.

    Raises:
        ModelError: if transformers cannot build the model.
    """
    if known := model_layout(folder):
        return known.linear
    model = skeleton(folder)
    experts = {name: place.shape for name, place in expert_places(model).items()}
    found = linear_layers(model) | experts
    beside = gates(found) | gates(model.state_dict())
    return {name: shape for name, shape in found.items() if name not in beside}


def gate_modules(folder: Path) -> list[str]:
    """Return the modules of routers and other gates beside experts, by their names in the model and in the checkpoint.

    Servers and libraries may take them for linear layers that are quantized.

    Raises:
        ModelError: if transformers cannot build the model.
    """
    if model_layout(folder):
        return []
    model = skeleton(folder)
    stored = {p.stack.partition(EXPERTS)[0]: name.partition(EXPERTS)[0] for name, p in expert_places(model).items()}
    found: list[str] = []
    for name in sorted(gates(model.state_dict())):
        module = name.removesuffix(".weight")
        block = next(block for block in stored if module.startswith(f"{block}."))
        found += dict.fromkeys((module, stored[block] + module.removeprefix(block)))
    return found


def linear_layers(model: Any) -> dict[str, tuple[int, int]]:
    """Return names and shapes (N, K) of the linear layers of a model of transformers, without the output head."""
    import torch

    head = model.get_output_embeddings()
    return {
        f"{name}.weight": (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def table_weights(folder: Path) -> dict[str, tuple[int, int]]:
    """Return names and shapes (V, H) of the embedding and of an output head that is a weight of its own.

    Raises:
        ModelError: if transformers cannot build the model.
    """
    if known := model_layout(folder):
        return known.tables
    model = skeleton(folder)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = (embedding,) if model.config.get_text_config().tie_word_embeddings else (embedding, head)
    return {f"{n}.weight": tuple(m.weight.shape) for n, m in model.named_modules() if any(m is t for t in tables)}


def head_modules(folder: Path) -> list[str]:
    """Return the name of the output head, a linear layer that `linear_weights` leaves out; nothing without one.

    Raises:
        ModelError: if transformers cannot build the model.
    """
    if model_layout(folder):
        return [TIED_HEAD.removesuffix(".weight")]
    model = skeleton(folder)
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head]


def skipped_modules(folder: Path, modules: list[str]) -> list[str] | None:
    """Return the modules that stock loaders leave as they are, for a `quantization_config`; None for their own list.

    A list there replaces the loader's own, so the output head must stand in it too.

    Args:
        folder: of the full-precision model.
        modules: modules that stay in bf16 beside the output head.

    Raises:
        ModelError: if transformers cannot build the model.
    """
    return [*head_modules(folder), *modules] if modules else None


def embedding_kind(model: Path | Mapping) -> str:
    """Return `PLAIN_TABLE` if the embedding only looks rows up, otherwise the name of its class.

    Args:
        model: a checkpoint's folder, or what its `config.json` says.

    Raises:
        ModelError: if transformers cannot build the model.
    """
    if (known := model_layout(model)) and known.plain_embedding:
        return PLAIN_TABLE
    return type(skeleton(model).get_input_embeddings()).__name__


def refuse_other_matrices(model: Path | Mapping) -> None:
    """Raise an error if a model computes with large matrices outside of linear layers.

    Stacks of experts are no such matrices if `models.experts` knows how a checkpoint stores them. Others are not
    quantized, and a variant would keep most of the model in bf16.

    Args:
        model: a checkpoint's folder, or what its `config.json` says.

    Raises:
        ModelError: naming the first of them.
    """
    if model_layout(model):
        return
    import torch

    known = (torch.nn.Linear, torch.nn.Embedding, torch.nn.modules.conv._ConvNd)
    built = skeleton(model)
    stacks = {place.stack for place in expert_places(built).values()}
    usual = stacks | gates([*stacks, *built.state_dict()])
    for name, module in built.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            is_matrix = parameter.ndim >= 2 and min(parameter.shape[-2:]) >= min(GROUP_SIZES)
            if is_matrix and not isinstance(module, known) and f"{name}.{part}" not in usual:
                raise ModelError(
                    f"{_named(model)}: {name}.{part} {tuple(parameter.shape)} belongs to a {type(module).__name__}, "
                    "not to a linear layer; such models are not quantized"
                )


def model_layout(model: Path | Mapping) -> Layout | None:
    """Return the layout of a well-known architecture, or None if transformers has to build the model."""
    try:
        return layout(read_config(model) if isinstance(model, Path) else model)
    except ModelError:  # transformers says what is wrong with the file
        return None


def skeleton(model: Path | Mapping) -> Any:
    """Return the model without its weights, on the meta device.

    Args:
        model: a checkpoint's folder, or what its `config.json` says.

    Raises:
        ModelError: if transformers cannot build the model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        if isinstance(model, Path):
            config = open_config(model)
        else:
            check_code(_named(model), dict(model))
            config = AutoConfig.for_model(**model)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # a configuration from anywhere makes it raise anything
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        if reason.lower().startswith("padding_idx"):
            reason = "its pad_token_id lies beyond the rows of its embedding. Try: remove that from config.json"
        raise ModelError(f"{_named(model)}: transformers cannot build this model: {reason}") from None


def _named(model: Path | Mapping) -> object:
    return model if isinstance(model, Path) else model.get("model_type")
