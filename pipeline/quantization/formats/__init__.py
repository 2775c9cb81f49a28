"""How codes are stored. A format is a package or a module; one line of `_ENTRIES` registers it.

`FORMAT` in its module is an object with everything of `Format`. Its module of sizes tells how many bytes
weights take, by the arithmetic that the format writes with, and imports no torch, so that planning is quick:

    layer_bytes(spec, shape)                the weight (N, K) of a layer that is quantized
    table_bytes(spec, shape)                an embedding, an output head, or a layer in eight bits, if it holds them
    plain_bytes(spec, shape, item_bytes)    a tensor that is not quantized; `item_bytes` each in the source
    is_dequantized_to_run(spec, has_experts)    if it may be so: True if the weights are dequantized to run here
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, ItemsView, Iterable, Iterator, KeysView, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.config.catalog import VARIANTS, fitting_group_size
from pipeline.config.quantize import VariantSpec, matches
from pipeline.models.experts import is_expert

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from pipeline.models.checkpoint import Checkpoint, TensorInfo
    from pipeline.quantization.grid import Grid, GroupQuantized
    from pipeline.quantization.layers import Output, Source

# name -> the module of the format, and the module of its sizes
_ENTRIES = {
    "torchao": (f"{__name__}.torchao.format", f"{__name__}.torchao.sizes"),
    "torchao_float8": (f"{__name__}.torchao.float8", f"{__name__}.torchao.float8_sizes"),
    "tile_packed": (f"{__name__}.tile_packed.format", f"{__name__}.tile_packed.sizes"),
    "bitsandbytes": (f"{__name__}.bitsandbytes.format", f"{__name__}.bitsandbytes.sizes"),
    "gptq": (f"{__name__}.gptq.format", f"{__name__}.gptq.sizes"),
    "awq": (f"{__name__}.awq.format", f"{__name__}.awq.sizes"),
    "gguf": (f"{__name__}.gguf.format", f"{__name__}.gguf.sizes"),
    "pack-quantized": (f"{__name__}.compressed_tensors.packed", f"{__name__}.compressed_tensors.sizes"),
    "naive-quantized": (f"{__name__}.compressed_tensors.unpacked", f"{__name__}.compressed_tensors.sizes"),
    "static-quantized": (f"{__name__}.compressed_tensors.static", f"{__name__}.compressed_tensors.sizes"),
}


class StoredTensors(Protocol):
    """Tensors on disk by name, such as those of a checkpoint, read one by one."""

    def read(self, name: str) -> torch.Tensor:
        """Return the whole tensor."""

    def __getitem__(self, name: str) -> TensorInfo: ...

    def keys(self) -> KeysView[str]:
        """Return the names of the tensors."""

    def items(self) -> ItemsView[str, TensorInfo]:
        """Return the names, dtypes and shapes of the tensors."""

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int: ...


class FileWeights(StoredTensors, Protocol):
    """The tensors of a file by their names in the checkpoint that it was made of, dequantized one by one."""

    path: Path
    dtype: torch.dtype  # what was quantized has this type


class Format(Protocol):
    """A way to store variants. Formats derive from this class and inherit its defaults.

    Attributes:
        TABLE: the grid of embeddings, output heads and layers in eight bits, if it holds them.
        replaces_layers: True if stock transformers puts layers of its own in the place of linear ones, so that a
            model has no tensors of this format.
        assembles: False if only those layers compute with the codes, so that the stock loader is used.
        holds_experts: True if it stores the matrices of experts.
    """

    TABLE: Grid = None  # type: ignore[assignment]  # none in formats that leave such weights as they are
    replaces_layers: bool = False
    assembles: bool = True
    holds_experts: bool = False

    def check(self, spec: VariantSpec, folder: Path) -> None:
        """Raise ModelError or MissingExtra if the model in `folder` cannot be stored so; its weights are not read."""
        return None

    def refuses_experts(self, spec: VariantSpec, names: Collection[str]) -> str | None:
        """Return the reason why a variant cannot be made of a model with these weights of experts; None if it can."""
        if self.holds_experts or all(matches(spec.keep, name) for name in names):
            return None
        return "does not hold experts"

    def check_architecture(self, kind: str | None) -> None:
        """Raise ModelError if models with this `model_type` cannot be stored so."""
        return None

    def grid(self, spec: VariantSpec, width: int) -> Grid | None:
        """Return the grid of a layer with `width` columns; None if the format takes weights directly.

        Raises:
            QuantizationError: if no group size divides the width.
        """

    def to_round(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows (n, K) of a weight in the type in which they are rounded, which decides the type of scales."""
        return rows

    def output(self, spec: VariantSpec, folder: Path, source: Source, others: Iterable[Output]) -> Output:
        """Return the output that writes a variant into `folder`.

        Args:
            others: the outputs of the same pass so far; the new one may be made of them.
        """

    def weights(self, checkpoint: StoredTensors) -> Collection[str]:
        """Return the names of the weights that a checkpoint of safetensors holds in this format."""
        return ()

    def part_names(self, name: str) -> list[str]:
        """Return the names of the tensors that the weight `name` can be stored as."""
        return [name]

    def read(self, checkpoint: StoredTensors, name: str, shape: tuple[int, ...]) -> GroupQuantized:
        """Return the stored weight of a layer of `shape` (N, K).

        Raises:
            CheckpointError: if its stored parts are not those of such a layer.
        """
        raise TypeError(f"{type(self).__name__} stores no codes in safetensors")

    def check_stored(self, checkpoint: StoredTensors, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError if the parts of a weight that only the stock loader reads are not those of a layer."""
        return None

    def stock_bytes(self, checkpoint: Checkpoint, name: str) -> int:
        """Return the bytes of a stored weight as stock transformers holds it while the model runs."""
        return sum(checkpoint[part].nbytes for part in self.part_names(name) if part in checkpoint)

    def unpack(self, weight: torch.Tensor) -> GroupQuantized | None:
        """Return portable codes of a weight that transformers loaded; None for any other tensor."""
        return None

    def tensor(self, weight: GroupQuantized, dtype: torch.dtype) -> torch.Tensor | None:
        """Return a weight as transformers loads it and saves it: the inverse of `unpack`.

        Returns:
            None if it is several tensors.
        """
        return None

    def state(self, name: str, weight: GroupQuantized, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the entries of a state dict for the weight `name`, as files of this format have them."""
        tensor = self.tensor(weight, dtype)
        assert tensor is not None, "a weight of several tensors has a `state` of its own"
        return {name: tensor}

    def rounds_inputs(self, config: Any) -> bool:
        """Return True if layers of this model round their inputs too, so that only the stock loader runs it."""
        return False

    def settle(self, model: PreTrainedModel) -> None:
        """Let the layers of a model that transformers loaded compute with what is stored, on any machine."""
        return None

    def weights_of_file(self, path: Path, names: Iterable[str], dtype: torch.dtype) -> FileWeights:
        """Return the weights of a file that was made of a checkpoint with tensors of these names.

        Raises:
            CheckpointError: if it is damaged, or has other tensors.
            MissingExtra: if the package that reads it is not installed.
        """
        raise TypeError(f"{type(self).__name__} is no format of one file")


def register(name: str, module: str, sizes: str | None = None) -> None:
    """Add a format: the module with its `FORMAT`, and that of its sizes if it is another one."""
    _ENTRIES[name] = (module, sizes or module)


def remove(name: str) -> None:
    """Take a format out of the registry again."""
    del _ENTRIES[name]


def storage(name: str) -> Format:
    """Return the format of that name; its module is imported now."""
    return importlib.import_module(_ENTRIES[name][0]).FORMAT


def format_of(spec: VariantSpec) -> Format:
    """Return the format that a variant is written in."""
    return storage(spec.format)


def format_of_file(path: Path) -> Format:
    """Return the format of a variant that is one file, by its ending."""
    return storage(next(variant.format for variant in VARIANTS.values() if variant.suffix == path.suffix))


def stored_weights(checkpoint: StoredTensors) -> dict[str, Format]:
    """Return the quantized weights that a checkpoint holds: name -> the format of each."""
    return {name: form for form in map(storage, _ENTRIES) for name in form.weights(checkpoint)}


def unpack(weight: torch.Tensor) -> tuple[GroupQuantized, Format] | None:
    """Return portable codes of a weight that transformers loaded, and the format of it; None for other tensors."""
    found = ((form.unpack(weight), form) for form in map(storage, _ENTRIES))
    return next(((codes, form) for codes, form in found if codes is not None), None)


def settle(model: PreTrainedModel) -> None:
    """Let the layers of a model that transformers loaded compute with what is stored, in any format."""
    for form in map(storage, _ENTRIES):
        form.settle(model)


def rounds_inputs(config: Any) -> bool:
    """Return True if layers of a model with this configuration round their inputs, in any format."""
    return any(form.rounds_inputs(config) for form in map(storage, _ENTRIES))


def fitted(spec: VariantSpec, shapes: Mapping[str, tuple[int, ...]]) -> VariantSpec:
    """Return the variant with the group size that all its layers can have, if its format knows one size only.

    That is the largest allowed size that divides the widths of all layers, or one scale a row if none does.

    Args:
        shapes: name -> shape (N, K) of the weights to quantize.
    """
    if not spec.variant.one_group_size or spec.group_size is None:
        return spec
    widths = math.gcd(*(shape[1] for name, shape in shapes.items() if not matches(spec.keep, name)))
    return spec.model_copy(update={"group_size": fitting_group_size(widths, spec.group_size)})


def sizes(spec: VariantSpec) -> Any:
    """Return the module that tells how many bytes weights of a variant take."""
    return importlib.import_module(_ENTRIES[spec.format][1])


def is_dequantized_to_run(spec: VariantSpec, names: Iterable[str]) -> bool:
    """Return True if the weights of a variant are dequantized to run it here.

    Args:
        names: of the weights to quantize.
    """
    tells = getattr(sizes(spec), "is_dequantized_to_run", None)
    return tells is not None and tells(spec, any(map(is_expert, names)))


def stored_bytes(
    spec: VariantSpec,
    tensors: Mapping[str, tuple[tuple[int, ...], float]],
    linear: Collection[str],
    tables: Collection[str],
) -> int:
    """Return the bytes of a variant's weights.

    Args:
        tensors: name -> shape, and bytes of an element in the source.
        linear: names of the weights to quantize.
        tables: names of the embedding and the output head.
    """
    by, count = sizes(spec), 0.0
    spec = fitted(spec, {name: tensors[name][0] for name in linear})
    for name, (shape, item_bytes) in tensors.items():
        if name in linear and not matches(spec.keep, name):
            in_eight = matches(spec.int8, name)
            count += by.table_bytes(spec, shape) if in_eight else by.layer_bytes(spec.for_layer(name), shape)
        elif name in tables and (spec.quantizes_embeddings or spec.quantizer):
            count += by.table_bytes(spec, shape)
        else:
            count += by.plain_bytes(spec, shape, item_bytes)
    return int(count)
