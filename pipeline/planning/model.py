"""The sizes of a model, from file headers and the Hub's metadata."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config.catalog import EIGHT_BITS
from pipeline.config.schema import PACKAGE_SOURCE, Lora, Model, VariantSpec
from pipeline.errors import CheckpointError, ModelError
from pipeline.models.chat_templates import DEFAULT, FILE, chat_templates
from pipeline.models.checkpoint_files import ADAPTER_FILES, checkpoint_names, companions, read_config, weight_names
from pipeline.models.context import context_length
from pipeline.models.experts import gates
from pipeline.models.layer_layouts import TIED_HEAD, layout
from pipeline.models.packaged_gguf import find_packaged
from pipeline.models.safe_loading import check_config, parse_settings, refuse_missing
from pipeline.models.sources import check_source, is_local
from pipeline.models.tokenizer_settings import SETTINGS_FILES
from pipeline.planning.headers import Tensor, gguf_header, safetensors_header
from pipeline.planning.hub_files import Repository
from pipeline.quantization.formats import stored_bytes
from pipeline.training.lora_targets import is_target

TABLES = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|lm_head|embed_out)\.weight$")
GGUF_MODEL_TYPES = {"gemma3": "gemma3_text"}  # architectures that transformers names differently
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Sizes:
    """A base model by the sizes of its parts, in bytes.

    Attributes:
        kind: `hub`, `folder`, or `package` for a GGUF inside a Python package.
        tensors: all stored tensors, by name.
        file_bytes: the files of weights.
        fetched_bytes: all files to download from the Hub; 0 for a local model.
        here_bytes: the part of them that is in the Hub's cache.
        other_bytes: tokenizer and license, which are copied with the model.
        shard_bytes: the largest file of weights.
        chat_template: the template of ordinary conversations, if the model has one.
        config: content of `config.json`; for a package only the model type and the context.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    file_bytes: int
    fetched_bytes: int = 0
    here_bytes: int = 0
    other_bytes: int = 0
    shard_bytes: int = 0
    revision: str | None = None
    chat_template: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_type(self) -> str | None:
        """Return the model type that transformers uses."""
        return self.config.get("model_type")

    @property
    def context(self) -> int | None:
        """Return the most tokens that the model reads at once; None for a model without a limit."""
        return context_length(self.config)

    @cached_property
    def tables(self) -> dict[str, tuple[int, int]]:
        """Return the shapes (V, H) of the embedding and of the output head, if that is stored."""
        return {n: t.shape for n, t in self.tensors.items() if TABLES.search(n) and len(t.shape) == 2}

    @cached_property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Return the shapes (N, K) of the weights that are quantized and get adapters."""
        others = self.tables.keys() | gates(self.tensors)
        return {n: t.shape for n, t in self.tensors.items() if len(t.shape) == 2 and n not in others}

    @cached_property
    def parameters(self) -> int:
        """Return the number of stored values."""
        return sum(t.numel for t in self.tensors.values())

    @cached_property
    def linear_parameters(self) -> int:
        """Return the parameters of all linear layers."""
        return sum(rows * width for rows, width in self.linear.values())

    @property
    def bf16_bytes(self) -> int:
        """Return the bytes of the model in bf16."""
        return 2 * self.parameters

    @cached_property
    def layers(self) -> int:
        """Return the number of decoder layers."""
        return len({match[1] for name in self.linear if (match := _LAYER.search(name))}) or 1

    @cached_property
    def vocabulary(self) -> int:
        """Return the number of tokens in the vocabulary."""
        return max((rows for rows, _ in self.tables.values()), default=1)

    @cached_property
    def hidden(self) -> int:
        """Return the width of the hidden states."""
        return max((width for _, width in self.tables.values()), default=1)

    @cached_property
    def intermediate(self) -> int:
        """Return the inner width of a layer's feed-forward part."""
        return max((max(shape) for shape in self.linear.values()), default=self.hidden)

    @cached_property
    def attention(self) -> int:
        """Return the width of all attention heads together."""
        return next((rows for name, (rows, _) in self.linear.items() if name.endswith("q_proj.weight")), self.hidden)

    @cached_property
    def keys(self) -> int:
        """Return the width of all key heads together, which is that of the value heads."""
        return next((rows for name, (rows, _) in self.linear.items() if name.endswith("k_proj.weight")), self.attention)

    @cached_property
    def widest(self) -> int:
        """Return the parameters of the largest linear layer."""
        return max((rows * width for rows, width in self.linear.values()), default=1)

    def trained(self, lora: Lora) -> dict[str, tuple[int, int]]:
        """Return the shapes of the layers that get an adapter."""
        return {name: shape for name, shape in self.linear.items() if is_target(lora.target_modules, name)}

    def stored_bytes(self, spec: VariantSpec, merged: bool) -> int:
        """Return the bytes of a variant's weights, by its format's arithmetic, or those of its target.

        Before the choice for a `rise`, its layers are taken to have four bits, and its tables eight.

        Args:
            merged: True if it is made from a merged model, which is in bf16; False for the base as stored.
        """
        if spec.target and spec.target.size_mb:
            return int(1e6 * spec.target.size_mb)
        tensors = {name: (t.shape, 2 if merged else t.item_bytes) for name, t in self.tensors.items()}
        if spec.target and spec.target.bits:
            matrices = {**self.linear, **self.tables}
            others = sum(item * math.prod(shape) for name, (shape, item) in tensors.items() if name not in matrices)
            return int(others + spec.target.bits / 8 * sum(rows * width for rows, width in matrices.values()))
        if spec.target and spec.embeddings is None:
            spec = spec.model_copy(update={"embeddings": EIGHT_BITS})
        return stored_bytes(spec, tensors, self.linear, self.tables)


def read_sizes(model: Model) -> Sizes:
    """Return the sizes of a configured model, without writing anything or downloading weights.

    Raises:
        ModelError: if the model does not exist, is not supported, or lacks tensors.
        CheckpointError: if its headers are invalid.
        HubError: if the Hub cannot be reached.
    """
    check_source(model)
    if package := PACKAGE_SOURCE.match(model.source):
        return _packaged(find_packaged(*package.groups()))
    sizes = _in_folder(Path(model.source).expanduser()) if is_local(model.source) else _on_hub(model)
    # Only well-known architectures are checked here. The stages ask transformers about the others.
    if (known := layout(sizes.config)) and TIED_HEAD not in sizes.tensors.keys() - known.tables.keys():
        there = sizes.tensors.keys() | {f"model.{name}" for name in sizes.tensors}
        refuse_missing(model.source, (known.linear | known.tables | known.vectors).keys() - there)
    return sizes


def adapter_sizes(source: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter in a folder or a Hub repository."""
    if is_local(source, "merge.adapter"):
        return _header_of(Path(source).expanduser() / ADAPTER_FILES[1])
    repository = Repository(source, None)
    name = next((n for n in (ADAPTER_FILES[1], f"adapter/{ADAPTER_FILES[1]}") if n in repository.files), None)
    if name is None:
        raise ModelError(f"{source}: no {ADAPTER_FILES[1]} at its root or in adapter/")
    return safetensors_header(name, lambda start, stop: repository.read(name, start, stop))


def _packaged(file: Path) -> Sizes:
    fields, tensors = gguf_header(file)
    size, kind = file.stat().st_size, fields.get("general.architecture")
    context = fields.get(f"{kind}.context_length")
    config = {"model_type": GGUF_MODEL_TYPES.get(str(kind), kind), "max_position_embeddings": context}
    found = fields.get("tokenizer.chat_template")
    template = found if isinstance(found, str) else None
    return Sizes(
        "package", tensors, size, other_bytes=4_000_000, shard_bytes=size, chat_template=template, config=config
    )


def _in_folder(folder: Path) -> Sizes:
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    shards = weight_names(str(folder), files, lambda name: (folder / name).read_bytes())
    tensors = {n: t for name in shards for n, t in _header_of(folder / name).items()}
    sizes = [files[name] for name in shards]
    other = sum(path.stat().st_size for path in companions(folder))
    return Sizes(
        "folder",
        tensors,
        sum(sizes),
        other_bytes=other,
        shard_bytes=max(sizes),
        chat_template=chat_templates(folder).get(DEFAULT),
        config=read_config(folder),
    )


def _header_of(path: Path) -> dict[str, Tensor]:
    def read(start: int, stop: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    try:
        return safetensors_header(str(path), read)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _on_hub(model: Model) -> Sizes:
    repository = Repository(model.source, model.revision)
    files = repository.files
    if "config.json" not in files:
        raise ModelError(f"{model.source}: not a model repository (no config.json)")
    config = parse_settings(f"{model.source}/config.json", repository.read("config.json"))
    check_config(model.source, config)
    shards = weight_names(model.source, files, repository.read)
    wanted = {name: files[name] for name in checkpoint_names(files, shards)}
    tensors = repository.headers(shards)
    sizes = [files[name] for name in shards]
    return Sizes(
        kind="hub",
        tensors=tensors,
        file_bytes=sum(sizes),
        fetched_bytes=sum(wanted.values()),
        here_bytes=sum(size for name, size in wanted.items() if repository.is_here(name)),
        other_bytes=sum(size for name, size in wanted.items() if not name.endswith(".safetensors")),
        shard_bytes=max(sizes),
        revision=repository.revision,
        chat_template=_template_on_hub(repository),
        config=config,
    )


def _template_on_hub(repository: Repository) -> str | None:
    """Return the template of ordinary conversations; None if there is none, or only templates by name."""
    if FILE in repository.files:
        return repository.read(FILE).decode("utf-8", "replace")
    settings = SETTINGS_FILES[0]
    if settings not in repository.files:
        return None
    found = parse_settings(f"{repository.repo}/{settings}", repository.read(settings)).get("chat_template")
    return found if isinstance(found, str) else None
