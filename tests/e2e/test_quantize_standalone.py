"""`scripts/quantize_standalone.py`: variants added beside a model that is on the Hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.publishing.cards.own_text import END, START
from tests.support import REPOSITORY
from tests.support.hub import LoopbackHub
from tests.support.runs import TOKEN, Place
from tests.support.texts import general_text

SCRIPT = str(REPOSITORY / "scripts" / "quantize_standalone.py")
# As people write them: a byte order mark, Windows line breaks, comments and quotes in the metadata, an open end.
CARD = (
    "\ufeff---\r\nlicense: apache-2.0   # ours\r\ntags: ['b',  \"a\"]\r\nmodel-index: []\r\n---\r\n\r\n"
    "# My model\r\n\r\n"
    "Trained by hand.  \r\n\r\n```python\r\n# load it\r\n```\r\n\r\n## Limits\r\n\r\nMany"
).encode()


def standalone(place: Place, *arguments: str, check: int | None = 0, env: dict | None = None):
    """Run the script to its end; `check` is the exit code that it must have."""
    command = [sys.executable, SCRIPT, *arguments]
    if "--max-kl" not in arguments:
        command += ["--on-gate-failure", "warn"]
    env = {**{k: v for k, v in place.env.items() if k != "PYTHONPATH"}, **(env or {})}
    done = subprocess.run(command, cwd=place.folder, env=env, capture_output=True, text=True, timeout=600)
    if check is not None:
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def upload(hub: LoopbackHub, repo: str, folder: Path, **more: bytes) -> str:
    return hub.put(repo, {p.name: p.read_bytes() for p in folder.iterdir()} | more)


def outside(card: bytes) -> bytes:
    """A card without our section."""
    before, section, after = card.partition(START.encode())
    assert section and after.count(END.encode()) == 1
    return before + after.partition(END.encode())[2]


def sent(hub: LoopbackHub, since: int) -> list[str]:
    """Requests that brought something to the Hub."""
    return [f"{r.method} {r.path}" for r in hub.requests[since:] if r.method not in ("GET", "HEAD")]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """A Hub with a model of ada's that has a card of her own, and a text to measure on."""
    folder = tmp_path_factory.mktemp("standalone")
    (folder / "general.txt").write_text(general_text())
    with LoopbackHub(folder / "hub", {TOKEN: {"name": "ada", "role": "write"}}) as hub:
        upload(hub, "ada/model", tiny_model("llama"), **{"README.md": CARD, "notes.txt": b"mine"})
        yield Place(folder, hub)


@pytest.fixture(scope="module")
def added(place):
    """Both variants added to the model's own repository; the files that were there before."""
    before = place.hub.commit_files("ada/model", "main")
    done = standalone(place, "ada/model", "ada/model", "--quant-type", "both", "--calibration", "general.txt")
    return place, before, done


def test_variants_go_beside_the_model_and_every_file_that_was_there_stays(added):
    place, before, _ = added
    after = place.hub.commit_files("ada/model", "main")
    assert {name for name in before if after.get(name) != before[name]} == {"README.md"}
    new = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert new == {"int8", "int4", "tunepress.json"}
    assert len(place.hub.commits("ada/model")) == 3  # the Hub's own, the upload, and one of ours


def test_existing_card_is_kept_and_gains_one_section(added):
    card = added[0].hub.read("ada/model", "README.md")
    assert outside(card).startswith(CARD) and not outside(card)[len(CARD) :].strip()
    section = card[len(CARD) :].decode()
    assert "\r\n| " in section and "int8/" in section and "int4/" in section and "general text" in section
    headings = [line for line in section.splitlines() if line.startswith("#")]
    assert headings[0] == "## Quantized variants" and not [h for h in headings[1:] if not h.startswith("###")]
    assert "not in this repository" not in section and "base model" not in section and "Base model" not in section


def test_each_variant_says_that_its_source_is_at_the_root(added):
    card = added[0].hub.read("ada/model", "int4/README.md").decode()
    assert "[the full model in this repository](../README.md)" in card
    assert "base_model: ada/model" in card and "license: apache-2.0" in card


def test_added_variants_load_with_transformers_and_pipeline_load(added):
    code = (
        "import os, sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "root = AutoModelForCausalLM.from_pretrained('ada/model')\n"
        "one = AutoModelForCausalLM.from_pretrained('ada/model', subfolder='int8')\n"
        "print(type(one.model.layers[0].mlp.up_proj.weight).__name__)\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from pipeline import load\n"
        "for variant in ('int8', 'int4'):\n"
        "    model, tokenizer = load('ada/model', variant=variant, device='cpu')\n"
        "    print(model.generate(**tokenizer('Hello', return_tensors='pt'), max_new_tokens=3).shape)"
    )
    said = added[0].python(code).split("\n")
    assert said[0] == "Int8Tensor" and said[1] == said[2] == "torch.Size([1, 8])"


def test_sizes_that_do_not_divide_are_recorded(added):
    lineage = json.loads(added[0].hub.read("ada/model", "tunepress.json"))
    assert lineage["results"]["int4"]["variant"]["group_size"] == 128
    assert lineage["results"]["int8"]["variant"]["group_size"] is None
    assert lineage["results"]["int4"]["weights"]["group_sizes"]
    assert lineage["base"]["revision"] == added[0].hub.commits("ada/model")[1]


def test_the_real_trackio_has_every_event(added):
    place = added[0]
    code = "import json, trackio\nprint('\\n' + json.dumps([a['title'] for a in trackio.Api().alerts('tunepress')]))"
    titles = json.loads(place.python(code).splitlines()[-1])
    records = [json.loads(line) for line in (place.folder / "runs/model/events.jsonl").read_text().splitlines()]
    assert sorted(titles) == sorted(r["event"] for r in records if "event" in r)
    assert {"quantization_completed", "quantized_model_pushed", "evaluation_completed", "publish_completed"} <= set(
        titles
    )


def test_second_run_sends_nothing(added):
    place = added[0]
    commits, since = place.hub.commits("ada/model"), len(place.hub.requests)
    standalone(place, "ada/model", "ada/model", "--quant-type", "both", "--calibration", "general.txt")
    assert sent(place.hub, since) == [] and place.hub.commits("ada/model") == commits


@pytest.mark.slow
def test_lost_run_folder_is_rebuilt_without_sending_weights_again(added):
    """Also of the variant that is not asked for this time: what the repository has stays a part of the release."""
    place = added[0]
    (place.folder / "runs").rename(place.folder / "runs-lost")
    before, since = place.hub.commit_files("ada/model", "main"), len(place.hub.requests)
    said = standalone(place, "ada/model", "ada/model", "--calibration", "general.txt")
    assert "ada/model has int4 already, which will stay" in said.stdout
    after = place.hub.commit_files("ada/model", "main")
    assert {name for name in after if after[name] != before.get(name)} <= {
        "README.md", "int8/README.md", "int4/README.md", "tunepress.json",
    }  # fmt: skip
    assert after.keys() == before.keys() and not [r for r in place.hub.requests[since:] if r.method == "PUT"]
    assert outside(place.hub.read("ada/model", "README.md")).startswith(CARD)


@pytest.mark.slow
def test_one_failing_model_does_not_stop_the_others_and_no_token_is_written(place):
    """The token comes as an option, and from nowhere else."""
    folder = place.folder / "several"
    folder.mkdir()
    (folder / "models.yaml").write_text(
        "- {model: ada/missing, repo: ada/missing}\n- {model: ada/model, repo: ada/second, experiment_name: eight}\n"
    )
    work = Place(folder, place.hub)
    shutil.copy(place.folder / "general.txt", folder)
    options = ("--public", "--device", "cpu", "--calibration", "general.txt", "--token", TOKEN)
    done = standalone(work, "models.yaml", *options, check=2, env={"HF_TOKEN": ""})
    assert "--token: the process list shows it" in done.stderr
    assert [line.partition(" Try: ")[0] for line in done.stdout.splitlines()[-2:]] == [
        "ada/missing: no such model on the Hub, or it is private.",
        "ada/model: done",
    ]
    assert not place.hub.repo("ada/second").private and "int8/model.safetensors" in place.hub.files("ada/second")
    assert json.loads(place.hub.read("ada/second", "tunepress.json"))["run"] == "eight"
    assert TOKEN not in done.stdout + done.stderr
    secret = TOKEN.encode()
    assert not [path for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert not [name for name in place.hub.files("ada/second") if secret in place.hub.read("ada/second", name)]


@pytest.mark.slow
def test_variant_that_misses_its_limit_is_not_published(place):
    since = len(place.hub.requests)
    asked = ("ada/model", "ada/strict", "--quant-type", "int8", "--calibration", "general.txt", "--max-kl", "1e-9")
    done = standalone(place, *asked, check=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("quantize_standalone: quantize int8: withheld: ")
    assert "KL divergence is " in line and "on general text, and the limit is 1e-09" in line
    assert sent(place.hub, since) == []


@pytest.mark.slow
def test_calibrated_variant_names_its_text_and_is_measured_on_another(place):
    (place.folder / "notes.txt").write_text(" ".join(f"{n} apples and {n * n} pears." for n in range(400)))
    asked = ("ada/model", "ada/careful", "--quant-type", "int4", "--calibration", "general.txt")
    standalone(place, *asked, "--calibration-text", "notes.txt", "--calibration-tokens", "2048")
    made = json.loads(place.hub.read("ada/careful", "tunepress.json"))["results"]["int4"]
    assert (made["weights"]["calibration_text"], made["variant"]["rounding"]) == ("notes.txt", "gptq")
    assert "`notes.txt`" in place.hub.read("ada/careful", "int4/README.md").decode()


def test_save_only_publishes_nothing(place, tiny_model):
    since = len(place.hub.requests)
    options = ("--save-only", "--output", "kept", "--quant-type", "int8", "--low-disk")
    standalone(place, "ada/model", *options)
    assert (place.folder / "kept/int8/model.safetensors").is_file() and sent(place.hub, since) == []


def test_incomplete_python_names_a_complete_one(place):
    done = subprocess.run([sys.executable, "-I", "-S", SCRIPT], cwd=place.folder, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"take {REPOSITORY}/.venv/bin/python, which {REPOSITORY}/launch.sh sets up" in done.stderr


def test_an_empty_token_is_refused_rather_than_taken_for_none(place):
    assert "it is empty" in standalone(place, "ada/model", "ada/model", "--token", "", check=2).stderr


@pytest.mark.usefixtures("cold")
def test_help_tells_every_option_without_importing_torch(place):
    code = f"import sys, runpy\nsys.argv = ['x', '--help']\ntry: runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
    said = place.python(code + "except SystemExit: pass\nassert not {'torch', 'transformers'} & set(sys.modules)")
    for option in (
        "quant-type",
        "device",
        "group-size",
        "token",
        "private",
        "trackio-url",
        "dataset-repo",
        "low-disk",
        "max-rise",
        "quality",
        "calibration-text",
        "calibration-tokens",
        "target",
    ):
        assert f"--{option}" in said
