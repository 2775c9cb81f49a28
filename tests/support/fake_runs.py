"""Finished runs whose models are a few random bytes, and what a Hub received of them."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.system.files import write_bytes
from pipeline.tracking.events import Events, read_events
from pipeline.workflow.stages import Outcome, publish
from pipeline.workflow.workspace import Entry, Workspace
from tests.support import sample
from tests.support.hub import LoopbackHub

REPO = "ada/tiny"
BOTH = ("int8", "int4")
MIRROR = "ada/tiny-int8"
WITH_GGUF = ("int8", *sample.GGUF)
SOURCE_FILES = {"config.json": b"{}", "model.safetensors": b"theirs"}
SOURCE_CARD = b"---\nlicense: mit  # ours\ntags: [b,   'a']\n---\n# My model\n\nTrained by hand."
TERMS = b"Use it well.\n"
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOKENIZER = b'{"model": "bytes"}'


@dataclass
class FakeRun:
    """The workspace of a run whose models are a few random bytes; all else about it is real."""

    workspace: Workspace
    config: Config

    @property
    def release(self) -> Path:
        return self.workspace.release

    def make(self, step: str, files: dict[str, bytes]) -> None:
        """Put files into the release, as the outputs of a step."""
        for path, content in files.items():
            write_bytes(self.release / path, content)
        paths = [self.release / path for path in files]
        self.workspace.record(step, Entry(step, self.workspace.digests(paths)))

    def make_variant(self, name: str) -> None:
        """Let a variant into the release, measured."""
        files = {"config.json": b'{"q": "%s"}' % name.encode(), "tokenizer.json": TOKENIZER}
        files["model.safetensors"] = random.Random(name).randbytes(3000)
        self.make(f"quantize/{name}", {f"{name}/{path}": content for path, content in files.items()})
        self.workspace.write_measurement(name, sample.results()[name])

    def configure(self, **changes) -> None:
        """Change keys of `publish`, or whole sections."""
        sections = {k: changes.pop(k) for k in list(changes) if k in Config.model_fields}
        tree = self.config.model_dump() | sections
        tree["publish"] = {**tree["publish"], **changes}
        self.config = Config.model_validate(tree)

    def publish(self, variants: tuple[str, ...] = BOTH) -> dict:
        """Do the stage in this process and keep the ledger, as a run does; the stage's summary."""
        outcome: Outcome = publish.run(self.config, self.workspace, self.pen(), variants)
        self.workspace.record("publish", Entry("", self.workspace.digests(outcome.outputs), outcome.summary))
        return outcome.summary

    def pen(self) -> Events:
        return Events(self.workspace.events_path, self.config.name, lambda *report: self.progress.append(report))

    def events(self, name: str) -> list[dict]:
        return [e for e in read_events(self.workspace.events_path)[0] if e["event"] == name]

    def __post_init__(self):
        self.progress: list[tuple[int, int, str]] = []


def weights(size: int = 3000) -> bytes:
    return os.urandom(size)


def make_run(folder: Path) -> FakeRun:
    config = sample.config(publish={"repo": REPO})
    run = FakeRun(Workspace(folder), config)
    found = sample.results()
    if "base" in found["training"]:
        found["origin"] = found["training"].pop("base")
    for name, figures in found.items():
        run.workspace.write_measurement(name, figures)
    adapter = {"adapter/adapter_config.json": b"{}", "adapter/adapter_model.safetensors": weights(500)}
    root = {"config.json": b"{}", "tokenizer.json": TOKENIZER, "model.safetensors": weights(5000)}
    run.make("merge", root | adapter)
    for name in BOTH:
        run.make_variant(name)
    return run


def sent_bytes(hub: LoopbackHub, since: int = 0) -> int:
    """Bytes that clients sent to the Hub, in requests of any kind."""
    return sum(request.body_bytes for request in hub.requests[since:])


def uploads(hub: LoopbackHub, since: int = 0) -> list[int]:
    """Sizes of the large files that reached the Hub whole."""
    return [r.body_bytes for r in hub.requests[since:] if r.method == "PUT" and r.status == 200]


def gguf_bytes(folder: Path, content: str) -> bytes:
    """A file with a tokenizer, a chat template, and no tensors."""
    import gguf

    path = folder / "made.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(content)
    writer.add_token_list(["<s>", "[/]"])
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path.read_bytes()
