"""A small measured release with cards: a merged model, its adapter, int8 and int4."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import Config
from pipeline.system.files import sha256
from pipeline.tracking.events import Events
from pipeline.verification import Finding, Verdict, Verification, verify
from pipeline.workflow.workspace import Entry, Workspace

BOTH = ("int8", "int4")
TOPICS = "builtin:python-topics"


@dataclass(frozen=True)
class Release:
    """A release in a folder, which a test may damage."""

    folder: Path

    def verify(self, measure: bool = False) -> Verification:
        return verify(str(self.folder), measure=measure)

    def read(self, path: str) -> str:
        return (self.folder / path).read_text(encoding="utf-8")

    def write(self, path: str, content: str | bytes) -> None:
        content = content.encode() if isinstance(content, str) else content
        (self.folder / path).write_bytes(content)

    def replace(self, path: str, old: str, new: str) -> None:
        text = self.read(path)
        assert old in text
        self.write(path, text.replace(old, new, 1))

    def lineage(self) -> dict:
        return json.loads(self.read("tunepress.json"))

    def write_lineage(self, told: object) -> None:
        self.write("tunepress.json", json.dumps(told, indent=2, ensure_ascii=False) + "\n")

    def rewrite_cards(self) -> None:
        """Have the cards say what the lineage says now."""
        from pipeline.verification.check_cards import about_release, rendered
        from pipeline.verification.lineage_claims import read_claims
        from pipeline.verification.location import open_place

        place = open_place(str(self.folder), None, lambda done, total, what: None)
        claims = read_claims(place.lineage())
        for path, card in rendered(about_release(claims, place, chats=True), claims).items():
            self.write(path, card)

    def own(self, path: str) -> None:
        """Put a file's hash and size into the lineage, as somebody would who hides what he did."""
        told, file = self.lineage(), self.folder / path
        told["files"][path] = {"sha256": sha256(file), "size": file.stat().st_size}
        self.write_lineage(told)


def told(verification: Verification, verdict: Verdict = Verdict.wrong) -> list[str]:
    """Findings of one kind, as `check subject: message`."""
    return [line(finding) for finding in verification.findings if finding.verdict is verdict]


def line(finding: Finding) -> str:
    return f"{finding.check} {finding.subject}: {finding.message}"


def make_release(folder: Path, base: Path, variants: Sequence[object] = ("int8", {"name": "int4", "group_size": 32})):
    """The workspace of a run whose stages were done in this process; of its models only the quality is measured."""
    from pipeline.workflow.stages import merge, quantize, render

    _write_adapter(base, folder / "adapter")
    config = Config.model_validate(
        {
            "name": "demo",
            "model": {"source": str(base)},
            "data": None,
            "merge": {"adapter": str(folder / "adapter")},
            "evaluate": {"general": TOPICS, "max_tokens": 512, "prompts": ["Hello?"], "device": "cpu"},
            "quantize": {"variants": list(variants)},
        }
    )
    workspace = Workspace(folder / "demo")
    workspace.folder.mkdir()
    events = Events(workspace.events_path, config.name)
    _do(workspace, "merge", lambda: merge.run(config, workspace, events, ()))
    names = tuple(spec.name for spec in config.quantize.variants)
    quantize.run(config, workspace, events, names)
    workspace.write_measurement("merged", _measured(workspace.release, config))
    for name in names:
        made, target = workspace.quantized / name, workspace.release / VARIANTS[name].folder
        figures = _measured(made, config) | {
            "variant": config.quantize.spec(name).model_dump(),
            "ratio": 0.5,
            "weights": workspace.progress(f"quantize/{name}", "written")["weights"],
        }
        files = workspace.place(made, target, f"quantize/{name}")
        workspace.record(f"quantize/{name}", Entry("", workspace.digests(files)))
        workspace.write_measurement(name, figures)
    _do(workspace, "render", lambda: render.run(config, workspace, events, names))
    return workspace


def _do(workspace: Workspace, key: str, work: Callable) -> None:
    outcome = work()
    workspace.record(key, Entry("", workspace.digests(outcome.outputs), outcome.summary))


def _measured(folder: Path, config: Config) -> dict:
    from pipeline.evaluation import metrics, texts
    from pipeline.inference.load import load
    from pipeline.models.checkpoint_files import stored_bytes

    model, tokenizer = load(folder, device="cpu")
    sequences = texts.general(config, tokenizer, None)
    scores = metrics.score(model, sequences)
    quality = {
        "text": TOPICS,
        "tokens": len(scores.nll),
        "sequences": len(sequences),
        "clusters": int(scores.cluster.unique().numel()),
        "freedom": metrics.freedom(scores.cluster),
        "digest": texts.digest(sequences),
        "perplexity": asdict(metrics.perplexity(scores)),
    }
    about = {"size_bytes": stored_bytes(folder), "device": "cpu", "loader": "pipeline.load"}
    answers = [{"prompt": "Hello?", "answer": "```python\nopen('/tmp/never', 'w')\n```"}]
    return {**about, "quality": {"general": quality}, "speed": {}, "answers": answers}


def _write_adapter(base: Path, folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(folder)
