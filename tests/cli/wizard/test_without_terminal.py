"""The wizard with piped answers, options and defaults: the same checks, and exit code 2 on an error."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.cli.wizard import QUESTIONS, wizard
from pipeline.cli.wizard.draft import Draft
from pipeline.config.loader import load_config
from pipeline.config.presets import PRESETS
from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.planning.benchmark import save_speeds
from pipeline.planning.devices import this_machine
from tests.support.planning import SPEEDS
from tests.support.runs import TOKEN
from tests.support.wizard import BOBS, FINE, READS, write_rows

STARTED = ("--model", "./model", "--data", "rows.jsonl")


def test_piped_answers_are_taken_line_by_line_and_empty_ones_are_defaults(desk):
    lines = [
        "./model",
        "rows.jsonl",
        "conservative",
        "",
        "5",
        "",
        "",
        "none",
        "local",
        "yes",
        "transformers",
        "both",
        "32",
        "",
        "warn",
        "fast",
        "piped",
    ]
    desk.wizard(answers="\n".join([*lines, "", "no", ""]))
    config = load_config(desk.folder / "piped.yaml")
    assert (config.train.max_steps, config.train.batch_size, config.train.accumulate) == (5, 2, 8)
    assert [(spec.name, spec.group_size) for spec in config.quantize.variants] == [("int8", None), ("int4", 32)]
    assert (config.quantize.on_gate_failure, config.quantize.quality) == ("warn", "fast")


def test_options_and_defaults_make_the_same_file_as_piped_answers(desk):
    piped = desk.wizard("--name", "piped", "--no-run", answers="./model\nrows.jsonl\n" + "\n" * 16)
    given = desk.wizard("--name", "given", "--no-run", "--yes", *STARTED)
    assert "int8, int4 in groups of 64" in piped.stdout and "int8, int4 in groups of 64" in given.stdout
    piped, given = (load_config(desk.folder / f"{name}.yaml") for name in ("piped", "given"))
    assert piped.model_copy(update={"name": "given"}) == given
    assert given == Config.model_validate(
        {
            "name": "given",
            "model": {"source": "./model"},
            "data": {"source": "rows.jsonl"},
            "quantize": {"variants": list(PRESETS["balanced"][1])},
        }
    )


def test_answers_that_end_early_are_told(desk):
    done = desk.wizard(answers="./model\n", check=2)
    assert "Data set: no more answers in the input. Try: one more line, --data, or --yes" in done.stderr
    assert not list(desk.folder.glob("*.yaml"))


@pytest.mark.parametrize(
    ("answers", "line"),
    [
        ({"model": "nothing"}, "not a folder here, and not a Hub id"),
        ({"model": "ada/nothing"}, "ada/nothing: no such model on the Hub"),
        ({"data": "nothing.jsonl"}, "no such file"),
        ({"data": "other.jsonl"}, "no known form: columns found are ask, reply"),
        ({"data": "other.jsonl"}, "name them with --columns"),
        ({"data": "rows.jsonl subset=easy"}, "subset 'easy': is for data sets on the Hub"),
        ({"data": "other.jsonl", "columns": "question=ask,answer=said"}, "--columns: answer is `said`, which is not"),
        ({"data": "builtin:python-docs", "columns": "question=ask"}, "--columns: builtin:python-docs has no columns"),
        ({"data": "builtin:python-docs-pairs"}, "has the form preference, and train.trainer sft takes only"),
        ({"data": "one.jsonl"}, "too small to hold something out"),
        ({"data": "broken.jsonl"}, "broken.jsonl, line 1: not valid JSON"),
        ({"profile": "reckless"}, "Try: standard, conservative, aggressive, extreme"),
        ({"epochs": "many"}, "not a number"),
        ({"max_length": "100000000"}, "longer than the model's context of"),
        ({"max_length": "1"}, "1: too short for a question and an answer"),
        ({"batch_size": "1000000"}, "not enough main memory"),
        ({"repo": "my model"}, "a repository is written USER/NAME"),
        ({"repo": "ada/mine"}, "no Hub token"),
        ({"track": "my space"}, "a repository is written USER/NAME"),
        ({"track": "https://trackio.example.org"}, "TRACKIO_WRITE_TOKEN"),
        ({"quantization": "int9"}, "neither a preset nor a variant"),
        ({"quantization": ","}, "no variant is named. Try: --no-quantize"),
        ({"quantization": ""}, "no variant is named"),
        ({"gguf": ", "}, "no GGUF type is named"),
        ({"group_size": "48"}, "allowed are 32, 64, 128, 256"),
        ({"gguf": "q9"}, "not a GGUF type"),
        ({"gate": "hope"}, "Try: withhold, warn, target"),
        ({"gate": "rise=much"}, "--gate rise=much: not a target. Try: rise=0.03, size_mb=500 or bits=4.8"),
        ({"quality": "calibratd"}, "'calibratd': not a choice. Try: fast, calibrated, distilled"),
        ({"quality": "distilled", "quantization": "int8"}, "--quality: does not apply to the other answers"),
        ({"quality": "fast", "calibration_text": "rows.jsonl"}, "--calibration-text: does not apply to the other"),
        ({"calibration_text": "none.txt"}, "none.txt: cannot be read: No such file or directory. Try: another file"),
        ({"calibration_text": "training,other.md"}, "quantize.calibration.source: training: neither a file nor"),
        ({"quantize": "no", "group_size": "32"}, "--group-size: does not apply to the other answers"),
        ({"private": "no"}, "--public: does not apply to the other answers"),
        ({"private": "yes"}, "--private: does not apply to the other answers"),
        ({"name": "my run"}, "no spaces"),
        ({"file": "mine.txt"}, "ends in .yaml"),
    ],
)
def test_a_wrong_answer_is_refused_and_nothing_is_written(ask, answers, line):
    with pytest.raises(UserError) as refusal:
        ask(**{"model": "./model", "data": "rows.jsonl", **answers})
    assert line in str(refusal.value)
    assert not list(Path().glob("*.yaml"))


def test_columns_may_have_spaces_in_their_names(ask):
    write_rows(Path("spaced.jsonl"), [{"The question": f"What is {n}?", "An answer": "A number."} for n in range(9)])
    data = ask(model="./model", data="spaced.jsonl", columns="question=The question, answer = An answer").data
    assert data.columns == {"question": "The question", "answer": "An answer"}


def test_bad_rows_are_skipped_on_request(ask):
    data = ask(model="./model", data="broken.jsonl on_bad_row=skip").data
    assert (data.source, data.on_bad_row) == ("broken.jsonl", "skip")
    Path("hopeless.jsonl").write_text("{\n" * 20)
    with pytest.raises(UserError, match="line 1: not valid JSON"):
        ask(model="./model", data="hopeless.jsonl on_bad_row=skip")


def test_columns_of_later_rows_are_told(ask, capsys):
    rows = [{"instruction": f"I{n}", "response": "A"} for n in range(40)]
    rows[20] |= {"context": "C", "late": 1}
    write_rows(Path("late.jsonl"), rows)
    ask(model="./model", data="late.jsonl")
    assert "form instruction" in (told := capsys.readouterr().out) and "not used: late" in told
    rows[5] |= {"chosen": "B"}
    write_rows(Path("late.jsonl"), rows)
    with pytest.raises(UserError, match=r"line 6: `chosen` .*set --columns: \{output: chosen\}"):
        ask(model="./model", data="late.jsonl")


def test_columns_that_change_the_meaning_are_ignored_on_request(ask):
    rows = [{"question": f"Q{n}", "answer": "A", "images": [f"{n}.png"], "weight": 2} for n in range(40)]
    write_rows(Path("pictures.jsonl"), rows)
    with pytest.raises(UserError, match="`images` belongs to the row.* write ignore=images behind the data set's name"):
        ask(model="./model", data="pictures.jsonl")
    data = ask(model="./model", data="pictures.jsonl ignore=images,weight on_bad_row=skip").data
    assert (data.ignore, data.on_bad_row) == (["images", "weight"], "skip")


def test_a_file_named_like_a_setting_keeps_its_name_in_what_is_told(ask):
    with pytest.raises(UserError, match=r"data\.jsonl: no such file; name another"):
        ask(model="./model", data="data.jsonl")


@pytest.mark.parametrize("token", ["hf_töken0123456789", "hf_two words0123456789"])
def test_malformed_token_gives_one_line(ask, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match="the Hub token contains invalid characters") as refusal:
        ask(model="./model", data="rows.jsonl", repo="ada/mine")
    assert token not in str(refusal.value)


def test_malformed_token_gives_one_line_when_a_model_is_looked_up(ask, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_töken0123456789")
    with pytest.raises(UserError, match="ada/base: the Hub token contains invalid characters"):
        ask(model="ada/base", data="rows.jsonl")


def test_variants_are_calibrated_on_training_data_unless_another_answer_is_given(ask, capsys):
    Path("notes.txt").write_text("Some notes.")
    asked = {"model": "./model", "data": "rows.jsonl"}
    default = ask(**asked, name="a").quantize
    assert (default.quality, default.calibration.sources) == ("calibrated", ())
    own = ask(**asked, name="b", quality="distilled", calibration_text="notes.txt, general").quantize
    assert (own.quality, own.calibration.sources) == ("distilled", ("notes.txt", "general"))
    told = " ".join(capsys.readouterr().out.split())
    assert "calibrated, on training data and general text" in told and "distilled, on notes.txt, general" in told
    assert ask(**asked, name="c", calibration_text="rows.jsonl").quantize.calibration.sources == ()
    aimed = ask(**asked, name="d", quality="fast", gate="size_mb=500", calibration_text="notes.txt").quantize
    assert (aimed.spec("int4").target.asked, aimed.calibration.sources) == ({"size_mb": 500}, ("notes.txt",))


def test_calibration_text_on_the_hub_is_looked_up(desk, hub):
    hub.put("ada/notes", {"rows.jsonl": b'{"text": "one"}\n' * 9}, repo_type="dataset")
    asked = (*STARTED, "--yes", "--no-run", "--name", "noted")
    done = desk.wizard(*asked, "--calibration-text", "ada/none", check=2)
    assert "ada/none: no such data set on the Hub, or it is private. Try: another file" in done.stderr
    desk.wizard(*asked, "--calibration-text", "ada/notes")
    assert load_config(desk.folder / "noted.yaml").quantize.calibration.sources == ("ada/notes",)


@pytest.mark.usefixtures("ask")
def test_quality_question_tells_the_time_that_each_takes_on_a_measured_machine(monkeypatch, capsys):
    def told() -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n" * 30))
        asked = {"model": "./model", "data": "rows.jsonl", "run": "no", "calibrate": "no"}
        wizard(Console(width=200), asked)
        return [line for line in capsys.readouterr().out.splitlines() if "takes about" in line and "more" in line]

    assert told() == []
    save_speeds(replace(SPEEDS, place=this_machine(Path()).name))
    calibrated, distilled = told()
    assert calibrated.strip().startswith("calibrated: ") and distilled.strip().startswith("distilled: ")


@pytest.mark.parametrize("preset", ["balanced", "high_quality", "edge", "everything"])
def test_embeddings_that_cannot_be_quantized_are_kept(ask, tiny_model, capsys, preset):
    kept = ask(model=str(tiny_model("gemma3_text")), data="rows.jsonl", quantization=preset).quantize.spec("int4")
    assert kept.embeddings == "keep"
    assert "embeddings stay in bf16" in capsys.readouterr().out
    made = ask(model="./model", data="rows.jsonl", quantization=preset).quantize.spec("int4")
    assert (made.embeddings, made.group_size) == ("int8", kept.group_size)


def test_gguf_of_an_unsupported_architecture_is_refused(ask):
    settings = json.loads(Path("model/config.json").read_text())
    settings |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    Path("model/config.json").write_text(json.dumps(settings))
    for answers in ({"gguf": "q4_0"}, {"quantization": "int8,gguf-q8_0"}):
        with pytest.raises(UserError, match="mistral: not written as GGUF; handled are llama"):
            ask(model="./model", data="rows.jsonl", **answers)


def test_a_mixture_of_experts_gets_the_variants_of_a_preset_that_hold_experts(ask, mixture, capsys):
    made = ask(model=str(mixture), data="rows.jsonl", quantization="balanced").quantize.variants
    assert [spec.name for spec in made] == ["int8"]
    assert "left out: int4: stock transformers cannot run experts in 4 bits" in " ".join(
        capsys.readouterr().out.split()
    )
    with pytest.raises(UserError, match="int4: stock transformers cannot run experts in 4 bits"):
        ask(model=str(mixture), data="rows.jsonl", quantization="int8,int4")
    assert ask(model=str(mixture), data="rows.jsonl", quantize="no", name="plain").quantize.variants == []


def test_run_that_does_not_fit_is_not_started_by_default(ask, monkeypatch):
    less = replace(this_machine(Path()), disk_free=1)  # as where others fill the disk while questions are answered
    monkeypatch.setattr("pipeline.planning.plan.this_machine", lambda runs: less)
    answers = {"model": "./model", "data": "rows.jsonl"}
    with pytest.raises(UserError, match=r"model\.yaml: written but not started.*with tunepress run model\.yaml"):
        wizard(Console(), answers, yes=True)
    assert wizard(Console(), {**answers, "run": "yes"}, yes=True).start
    assert not wizard(Console(), {**answers, "run": "no"}, yes=True).start


def test_run_command_in_the_written_file_works(ask, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    ask(model="./model", data="rows.jsonl", file="~/mine.yaml")
    assert f": tunepress run {tmp_path}/mine.yaml\n" in (tmp_path / "mine.yaml").read_text()


def test_a_session_that_is_finished_leaves_no_answers_behind(ask):
    for name in ("wizard-answers-2.yaml", "mine.yaml"):
        Path(name).write_text("model: ./model\ndata: rows.jsonl\nname: resumed\n")
        wizard(Console(), {"run": "no"}, Path(name), yes=True)
    assert not Path("wizard-answers-2.yaml").exists() and Path("mine.yaml").exists()


def test_machine_is_measured_again_only_on_request(ask, monkeypatch):
    measured = []
    monkeypatch.setattr(
        "pipeline.cli.wizard.finish.measure_in_time",
        lambda place, tell: measured.append(place) or replace(SPEEDS, place=place),
    )
    for _ in range(2):
        Path("wizard-answers.yaml").write_text("model: ./model\ndata: rows.jsonl\ncalibrate: yes\n")
        wizard(Console(), {"run": "no"}, Path("wizard-answers.yaml"), yes=True)
    assert len(measured) == 1
    ask(model="./model", data="rows.jsonl", calibrate="yes")
    assert len(measured) == 2


def test_token_must_write_to_repository_and_space(ask, monkeypatch):
    """The token that a Space needs does not take the place of the one that the repository was checked with."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    asked = []
    draft = Draft(Path("runs"), asked.append, secret=lambda what: BOBS)
    draft.tree = {"model": {"source": "./model"}, "publish": {"repo": "ada/mine"}}
    take = next(question.take for question in QUESTIONS if question.name == "track")
    with pytest.raises(UserError, match="ada/mine: the Hub token of bob"):
        take(draft, "bob/board")
    assert os.environ["HF_TOKEN"] == TOKEN and "cannot write to bob/" in asked[0]


def test_other_trackers_are_answers_and_ask_for_their_own_key(ask, monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    told, asked = [], []

    def secret(question: str) -> str:
        asked.append(question)
        return "0123456789" * 4

    draft = Draft(Path("runs"), told.append, secret=secret)
    draft.tree = {"model": {"source": "./model"}}
    take = next(question.take for question in QUESTIONS if question.name == "track")
    take(draft, "mlflow")
    assert draft.config().track.uri == "sqlite:///mlflow.db" and not asked
    take(draft, "wandb")
    assert draft.config().track.tracker == "wandb" and asked[0].startswith("Token for Weights & Biases")
    assert "no key" in told[0] and "0123456789" not in str(draft.tree)
    take(draft, "local")
    assert draft.config().track.tracker == "trackio"


def test_the_way_out_is_an_answer_to_the_question_that_is_asked(ask):
    draft = Draft(Path("runs"), lambda line: None, secret=lambda what: "")
    draft.tree = {"model": {"source": "./model"}}
    takes = {question.name: question.take for question in QUESTIONS}
    for name, answer, way in (("repo", "ada/mine", "none"), ("track", "ada/board", "local")):
        with pytest.raises(UserError, match=f"nothing can be sent. Try: answer {way} to keep everything here"):
            takes[name](draft, answer)


def test_wrong_answer_gives_one_line(desk):
    done = desk.wizard("--model", "./model", "--data", "ada/nothing", "--yes", "--no-run", check=2)
    assert "no such data set on the Hub" in done.stderr and done.stderr.count("\n") == 1


def test_figures_that_cannot_be_kept_are_no_reason_to_stop(ask, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.cli.wizard.finish.measure_in_time", lambda place, tell: SPEEDS)
    Path("file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", "file")
    assert ask(model="./model", data="rows.jsonl", calibrate="yes").name == "model"
    assert "so the speeds are not kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("token", "repo", "line"),
    [
        (READS, "ada/mine", "the Hub token can only read"),
        ("hf_nobody0123456789", "ada/mine", "the Hub does not know this token"),
        (TOKEN, "bob/his", "cannot write to bob/"),
        (FINE, "lab/model", "the Hub token has no permission to write here"),
    ],
)
def test_a_token_that_may_not_write_there_is_caught(desk, token, repo, line):
    desk.token = token
    done = desk.wizard(*STARTED, "--repo", repo, "--yes", "--no-run", check=2)
    assert line in done.stderr and token not in done.stderr


def test_changed_step_size_is_reported(ask, capsys):
    train = ask(model="./model", data="rows.jsonl", batch_size="8", name="even").train
    assert (train.batch_size, train.accumulate) == (8, 2) and "an optimizer step has" not in capsys.readouterr().out
    train = ask(model="./model", data="rows.jsonl", batch_size="3", name="odd").train
    assert (train.batch_size, train.accumulate) == (3, 5)
    assert "an optimizer step has 15 sequences now: 16 is no multiple of 3" in capsys.readouterr().out


def test_fine_grained_token_is_checked_per_repository(desk):
    desk.token = FINE
    desk.wizard(*STARTED, "--repo", "ada/mine", "--yes", "--no-run")
    assert load_config(desk.folder / "model.yaml").publish.repo == "ada/mine"
    assert desk.hidden_in(FINE) == []


def test_a_repository_with_another_runs_release_is_caught_at_the_name(desk, hub):
    desk.token = TOKEN
    hub.put("ada/mine", {"tunepress.json": json.dumps({"run": "older", "files": {}, "documents": {}}).encode()})
    done = desk.wizard(*STARTED, "--repo", "ada/mine", "--yes", "--no-run", check=2)
    assert "ada/mine: holds run 'older'" in done.stderr and not list(desk.folder.glob("*.yaml"))


def test_a_second_time_the_same_file_is_kept_and_another_needs_a_word(desk):
    desk.wizard(*STARTED, "--yes", "--no-run")
    desk.wizard(*STARTED, "--yes", "--no-run")
    done = desk.wizard(*STARTED, "--epochs", "2", "--yes", "--no-run", check=2)
    assert "model.yaml: exists with another configuration" in done.stderr
    desk.wizard(*STARTED, "--epochs", "2", "--yes", "--no-run", "--overwrite")
    assert load_config(desk.folder / "model.yaml").train.epochs == 2


def test_a_model_and_a_data_set_on_the_hub_are_looked_at_without_their_weights(desk, hub):
    desk.token = TOKEN
    files = {path.name: path.read_bytes() for path in (desk.folder / "model").iterdir()}
    hub.put("ada/base", files)
    rows = [{"ask": f"What is {n}?", "reply": "A number."} for n in range(20)]
    write_rows(desk.folder / "hub.jsonl", rows)
    content = {"easy.jsonl": (desk.folder / "hub.jsonl").read_bytes(), "README.md": SUBSETS}
    hub.put("ada/rows", content, repo_type="dataset")
    found = "ada/rows subset=easy"
    done = desk.wizard("--model", "ada/base", "--data", "ada/rows", "--yes", "--no-run", check=2)
    assert "has several subsets ('easy', 'hard')" in done.stderr
    done = desk.wizard(
        "--model", "ada/base", "--data", found, "--columns", "question=ask,answer=reply", "--yes", "--no-run"
    )
    assert "ask: What is 0? | reply: A number." in done.stdout
    data = load_config(desk.folder / "base.yaml").data
    assert (data.source, data.subset) == ("ada/rows", "easy")
    whole = [r for r in hub.requests if "model.safetensors" in r.path and r.method == "GET" and r.status == 200]
    assert whole == []


SUBSETS = b"""---
configs:
- config_name: easy
  data_files: easy.jsonl
- config_name: hard
  data_files: hard.jsonl
---
"""


def test_a_recipe_brings_its_own_values(ask):
    config = ask(model="demo")
    recipe = load_config("demo")
    assert (config.train, config.data, config.evaluate) == (recipe.train, recipe.data, recipe.evaluate)


def test_recipe_settings_for_its_own_data_are_dropped_with_other_data(ask):
    config = ask(model="demo", data="rows.jsonl")
    usual = Config(name="usual", model={"source": "ada/base"}, data={"source": "rows.jsonl"})
    assert config.train.max_steps is None and config.train.max_length == usual.train.max_length
    assert config.evaluate.prompts == [] and config.data.limit is None
    assert config.quantize.spec("int4").group_size == 32 and config.train.learning_rate == 3e-4


@pytest.mark.slow  # the way from the last answer to the run is that of the next test
def test_piped_answers_make_a_finished_run(desk):
    lines = ["./model", "rows.jsonl", "", "", "2", "96", "", "", "", "no", "piped", "", "yes"]
    done = desk.wizard(answers="\n".join([*lines, ""]))
    assert "Release" in done.stdout
    assert (desk.folder / "runs" / "piped" / "release" / "model.safetensors").is_file()


@pytest.mark.slow
def test_defaults_alone_make_a_finished_run(desk, hub):
    desk.token = TOKEN
    given = (*STARTED, "--repo", "ada/mine", "--max-steps", "2", "--max-length", "96", "--no-quantize")
    done = desk.wizard(*given, "--yes")
    assert "Release" in done.stdout
    assert {"README.md", "model.safetensors"} <= hub.files("ada/mine").keys()
    assert json.loads((desk.folder / "runs" / "model" / "ledger.json").read_text())["steps"]["publish"]
    assert desk.hidden_in(TOKEN) == [] and TOKEN not in done.stdout


def test_a_configuration_is_no_file_of_answers(desk):
    (desk.folder / "mine.yaml").write_text("name: mine\nmodel: {source: x}\n")
    done = desk.wizard("--resume", "mine.yaml", check=2)
    assert "Try, for a configuration: tunepress run mine.yaml" in done.stderr


@pytest.mark.parametrize("answer", ["target", "escalate"])
def test_failed_gate_can_be_answered_with_a_target_for_int4(ask, answer):
    quantize = ask(model="./model", data="rows.jsonl", quantization="both", gate=answer).quantize
    assert quantize.on_gate_failure == "withhold"
    assert quantize.spec("int4").target.asked == {"rise": 0.05} and quantize.spec("int8").target is None
    with pytest.raises(UserError, match="target: no variant here can have different bits by layer"):
        ask(model="./model", data="rows.jsonl", quantization="int8", gate=answer)


def test_place_proposes_what_its_engines_run_and_names_what_does_not_fit(ask, capsys):
    made = ask(model="./model", data="rows.jsonl", where="serving").quantize.variants
    assert [spec.name for spec in made] == ["w4a16", "w8a8", "fp8"]
    assert "w4a16 does not run in: SGLang on CUDA" in capsys.readouterr().out
    assert ask(model="./model", data="rows.jsonl", where="local", name="files").quantize.variants[0].name == "gguf-q8_0"
    with pytest.raises(UserError, match="Try: transformers, serving, local, everything"):
        ask(model="./model", data="rows.jsonl", where="moon")
