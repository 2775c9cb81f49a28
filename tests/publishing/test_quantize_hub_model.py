"""Tasks of `quantize_standalone`: their options, and what is refused before any work."""

from __future__ import annotations

import json

import pytest

from pipeline.errors import ConfigError, HubError, ModelError, StageFailed, UserError
from pipeline.evaluation.gates import limits
from pipeline.publishing.published_model import read_published
from pipeline.tracking.trackers.spaces import keep_in, space_at
from pipeline.workflow.hub_variants import configure, quantize
from pipeline.workflow.variant_tasks import asked_variants, read_task, read_tasks
from tests.support.hub.store import Repository

WEIGHTS = {"model.safetensors": b"weights"}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def task(model: str = "ada/model", repo: str | None = "ada/model", **options):
    return read_task({"model": model, "repo": repo, **options}, "options")


def model(hub, repo: str = "ada/model", config: dict | None = LLAMA, files: dict = WEIGHTS) -> str:
    told = {} if config is None else {"config.json": json.dumps(config).encode()}
    return hub.put(repo, {**told, **files})


def variants(config) -> dict:
    return {spec.name: spec.group_size for spec in config.quantize.variants}


@pytest.mark.parametrize(
    "asked, found",
    [
        ({}, {"int8": None}),
        ({"quant_types": ["int4_weight_only"]}, {"int4": 128}),
        ({"quant_types": ["both"], "group_size": 32}, {"int8": None, "int4": 32}),
        ({"quant_types": ["int8", "q8_0"]}, {"int8": None, "gguf-q8_0": 32}),
        ({"quant_types": ["int4", "int8"]}, {"int8": None, "int4": 128}),
        ({"quant_types": ["int4", "gguf-f16"]}, {"int4": 128, "gguf-f16": None}),
    ],
)
def test_default_group_size_goes_only_to_grouped_variants(hub, asked, found):
    model(hub)
    assert list(variants(configure(task(**asked), None)).items()) == list(found.items())


def test_options_become_the_configuration_of_one_private_commit(hub, tmp_path):
    model(hub)
    given = {"device": "cpu", "calibration": "text.txt", "experiment_name": "second", "revision": "main"}
    config = configure(task(**given, repo="ada/other"), None, space="ada/board")
    assert (config.evaluate.device, config.evaluate.general, config.name) == ("cpu", "text.txt", "second")
    assert (config.publish.private, config.publish.commits, config.track.space) == (True, "single", "ada/board")
    assert (config.model.source, config.publish.repo) == ("ada/model", "ada/other")
    assert not configure(task(repo="ada/other", private=False), None).publish.private
    assert config.quantize.on_gate_failure == "withhold" and config.quantize.gate.rise is None
    lenient = configure(task(repo="ada/other", max_rise=0.1, max_kl=0.2, on_gate_failure="warn"), None).quantize
    assert (lenient.gate.rise, lenient.gate.kl, lenient.on_gate_failure) == (0.1, 0.2, "warn")
    kept = configure(task(save_only=True, low_disk=True), None)
    assert kept.publish.repo is None and kept.evaluate is None and kept.model.low_disk


def test_calibration_options_become_the_configuration(hub):
    model(hub)
    asked = {"repo": "ada/other", "quant_types": ["both"], "calibration": "measured.txt"}
    fast = configure(task(**asked), None).quantize
    assert (fast.quality, fast.calibration.sources, fast.targeted) == ("fast", (), ())
    made = configure(task(**asked, calibration_text="notes.txt"), None)
    assert (made.quantize.quality, made.quantize.calibration.sources) == ("calibrated", ("notes.txt",))
    assert (made.quantize.spec("int4").rounding, made.evaluate.general) == ("gptq", "measured.txt")
    several = {"calibration_text": ["notes.txt", "ada/rows"], "calibration_tokens": 4096, "quality": "distilled"}
    made = configure(task(**asked, **several, target="size_mb=500"), None).quantize
    assert (made.quality, made.calibration.sources) == ("distilled", ("notes.txt", "ada/rows"))
    assert (made.calibration.tokens, made.targeted, made.distilled) == (4096, ("int4",), ("int4",))
    assert made.calibrated == ("int8", "int4") and made.spec("int8").rounding == "gptq"  # eight bits gain a little, too
    quick = configure(task(**asked, calibration_text="n.txt", quality="fast", target={"rise": 0.03}), None).quantize
    assert (quick.quality, quick.spec("int4").target.asked) == ("fast", {"rise": 0.03})


@pytest.mark.parametrize(
    "options, said",
    [
        ({"quality": "calibratd"}, "quality: \"calibratd\" is refused: Input should be 'fast', 'calibrated' or 'disti"),
        ({"quality": "calibrated"}, "quality calibrated: needs a text to calibrate on. Try: --calibration-text"),
        (
            {"target": "rise=0.03", "quant_types": ["int4"]},
            "target: needs a text to calibrate on. Try: --calibration-t",
        ),
        ({"quality": "fast", "calibration_text": "a.txt"}, "a.txt: not used with --quality fast. Try: --quality calib"),
        ({"calibration_tokens": 99}, "--calibration-tokens 99: there is no text. Try: --calibration-text"),
        (
            {"calibration_text": "a.txt", "target": "rise"},
            "--target rise: not a target. Try: rise=0.03, size_mb=500 or",
        ),
        ({"calibration_text": "a.txt", "target": "bits=4.8"}, "bits=4.8: int8 cannot have a target. Try: --quant-type"),
        (
            {"calibration_text": "a.txt", "quality": "distilled", "quant_types": ["gguf-f16"]},
            "none of gguf-f16 can be calibrated. Try: quality=fast",
        ),
        (
            {"calibration_text": "a.txt", "low_disk": True, "save_only": True},
            "calibration_text, target: need the whole model",
        ),
    ],
)
def test_calibration_options_that_cannot_work_are_refused_in_one_line(options, said):
    with pytest.raises(ConfigError) as refused:
        task(**options)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_own_repository_is_the_same_model_until_its_files_change(hub):
    """Though every publish moves the head, and its author writes into the card."""
    first = model(hub)
    assert configure(task(), read_published("ada/model")).model.revision == first
    told = {"run": "first", "files": {}, "documents": ["README.md"], "base": {"hub_id": "ada/model", "revision": first}}
    gate = {"passed": True, "limits": {"rise": 0.05}}
    told["results"] = {"int4": {"variant": {"name": "int4", "group_size": 32}, "gate": gate}}
    hub.put("ada/model", {"tunepress.json": json.dumps(told).encode(), "README.md": b"# Mine\n"})
    config = configure(task(), read_published("ada/model"))
    assert (config.model.revision, config.name) == (first, "first")
    assert list(variants(config).items()) == [("int8", None), ("int4", 32)]  # in one order, whichever came first
    assert variants(configure(task(quant_types=["int4"]), read_published("ada/model"))) == {"int4": 128}
    second = hub.put("ada/model", {"model.safetensors": b"other weights"})
    assert configure(task(), read_published("ada/model")).model.revision == second
    hub.put("ada/model", {"tunepress.json": json.dumps(told | {"base": {"hub_id": "ada/model"}}).encode()})
    assert configure(task(), read_published("ada/model")).model.revision == hub.commits("ada/model")[0]


def test_kept_variant_keeps_its_limits(hub):
    first = model(hub)
    told = {"run": "first", "files": {}, "documents": [], "base": {"hub_id": "ada/model", "revision": first}}
    figures = {"variant": {"name": "int4", "group_size": 128}, "gate": {"passed": True, "limits": {"rise": 0.3}}}

    def again(**options):
        told["results"] = {"int4": figures}
        hub.put("ada/model", {"tunepress.json": json.dumps(told).encode()})
        return configure(task(**options), read_published("ada/model")).quantize

    assert limits(again(), "int4") == {"rise": 0.3} and limits(again(), "int8") == {"rise": 0.02}
    assert limits(again(quant_types=["both"]), "int4") == {"rise": 0.05}
    for removing in ({"remove": ["int4"]}, {"replace": True}):
        assert [spec.name for spec in again(**removing).variants] == ["int8"]
    assert again(max_rise=0.3).spec("int4").gate.rise is None  # so that nothing has to be published anew
    figures["gate"] |= {"passed": False, "withheld": False}
    with pytest.raises(ConfigError, match="ada/model: has int4, which misses its gate and was published with a warn"):
        again()
    assert limits(again(on_gate_failure="warn"), "int4") == {"rise": 0.3}


@pytest.mark.parametrize("policy", ["withhold", "escalate"])
def test_variant_without_limits_is_not_removed_by_another_request(hub, policy):
    first = model(hub)
    told = {"run": "first", "files": {}, "documents": [], "base": {"hub_id": "ada/model", "revision": first}}
    told["results"] = {"int4": {"variant": {"name": "int4", "group_size": 128}}}
    hub.put("ada/model", {"tunepress.json": json.dumps(told).encode()})
    with pytest.raises(ConfigError, match="ada/model: has int4, which was published without being held to limits"):
        configure(task(on_gate_failure=policy), read_published("ada/model"))
    for accepted in ({"on_gate_failure": "warn"}, {"on_gate_failure": policy, "quant_types": ["both"]}):
        assert set(variants(configure(task(**accepted), read_published("ada/model")))) == {"int8", "int4"}


def test_calibrated_variant_is_not_made_again_without_calibration(hub):
    first = model(hub)
    told = {"run": "first", "files": {}, "documents": [], "base": {"hub_id": "ada/model", "revision": first}}
    figures = {"gate": {"passed": True, "limits": {"rise": 0.05}}, "weights": {"calibration_tokens": 32768}}
    told["results"] = {"int4": {"variant": {"name": "int4", "group_size": 128, "rounding": "gptq"}, **figures}}
    hub.put("ada/model", {"tunepress.json": json.dumps(told).encode()})
    with pytest.raises(
        ConfigError, match="has int4, which was calibrated, .* Try: --quality calibrated --calibration-t"
    ):
        configure(task(), read_published("ada/model"))
    again = configure(task(calibration_text="notes.txt"), read_published("ada/model")).quantize
    assert (again.quality, again.spec("int4").rounding) == ("calibrated", "gptq")
    asked = configure(task(quant_types=["both"]), read_published("ada/model")).quantize
    assert asked.spec("int4").rounding == "search"
    removed = configure(task(remove=["int4"]), read_published("ada/model"))
    assert list(variants(removed)) == ["int8"]
    told["results"]["int4"]["weights"] |= {"distilled_steps": 8, "distilled_kl_before": 0.2, "distilled_kl_after": 0.1}
    hub.put("ada/model", {"tunepress.json": json.dumps(told).encode()})
    with pytest.raises(ConfigError, match="has int4, which was distilled, and would be made again with quality calib"):
        configure(task(calibration_text="notes.txt"), read_published("ada/model"))


def test_changed_weights_make_variants_again_and_a_changed_card_does_not(hub):
    first = model(hub)
    config = configure(task(repo="ada/other"), None)
    assert config.model.revision == first
    told = {"run": "other", "files": {}, "documents": [], "base": {"hub_id": "ada/model", "revision": first}}
    hub.put("ada/other", {"tunepress.json": json.dumps(told).encode()})
    hub.put("ada/model", {"README.md": b"# Mine\n"})
    assert configure(task(repo="ada/other"), read_published("ada/other")) == config.model_copy(
        update={"name": "other", "publish": config.publish}
    )
    second = hub.put("ada/model", {"model.safetensors": b"other weights"})
    assert configure(task(repo="ada/other"), read_published("ada/other")).model.revision == second


def test_a_revision_is_that_of_a_model_on_the_hub(hub, model_copy):
    first = model(hub)
    model(hub, files={"model.safetensors": b"other weights"})
    assert configure(task(repo="ada/other", revision=first), None).model.revision == first
    with pytest.raises(ConfigError, match="--revision v1: only models on the Hub have revisions"):
        configure(task(str(model_copy), revision="v1"), None)


@pytest.mark.parametrize("name", ["int8/notes.txt", "tunepress.json"])
def test_user_files_in_the_way_are_found_before_any_work(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    model(hub)
    hub.put("ada/model", {name: b"mine"})
    with pytest.raises(HubError, match=f"^ada/model: has a {name} that tunepress did not put there"):
        quantize(task())
    assert not (tmp_path / "runs").exists()


def test_user_files_beside_a_variant_are_no_obstacle(hub):
    model(hub)
    files = {"int8/model.safetensors": {"sha256": "", "size": 1}}
    told = {"run": "first", "files": files, "documents": [], "base": {"hub_id": "ada/model"}}
    mine = {"int8/notes.txt": b"mine", "int4/README.md": b"soon"}
    hub.put("ada/model", {"tunepress.json": json.dumps(told).encode(), "int8/model.safetensors": b"x", **mine})
    configure(task(quant_types=["both"]), read_published("ada/model"))


@pytest.mark.parametrize(
    "config, files, said",
    [
        (None, {"README.md": b"soon"}, "no weights at its root"),
        (LLAMA, {"pytorch_model.bin": b"x"}, "pickled weights are not read"),
        (LLAMA, {"README.md": b"soon"}, "no weights at its root"),
        (None, {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "an adapter alone; merge it first"),
        (None, {"model-Q4_0.gguf": b"x"}, "GGUF files alone"),
        (None, {"model_index.json": b"{}", "unet/model.safetensors": b"x"}, "a diffusion pipeline"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, WEIGHTS, r"already quantized \(gptq\)"),
        ({"model_type": "mystery", "auto_map": {"AutoConfig": "code.py"}}, WEIGHTS, "code of its own"),
        ({"model_type": "t5", "is_encoder_decoder": True}, WEIGHTS, "an encoder-decoder"),
        (LLAMA | {"vision_config": {"depth": 2}}, WEIGHTS, r"more than a text model \(vision_config\)"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, WEIGHTS, "a ViTForImageClassification"),
    ],
)
def test_a_repository_of_another_kind_is_refused_without_fetching_its_weights(hub, config, files, said):
    model(hub, config=config, files=files)
    since = len(hub.requests)
    with pytest.raises(ModelError, match=rf"^ada/model: .*{said}"):
        quantize(task())
    assert not [r for r in hub.requests[since:] if "safetensors" in r.path]


def test_missing_gated_or_data_set_repository_is_refused(hub):
    with pytest.raises(ModelError, match="ada/model: no such model on the Hub"):
        quantize(task())
    hub.put("ada/rows", {"rows.jsonl": b"{}"}, repo_type="dataset")
    with pytest.raises(ModelError, match="ada/rows: a data set"):
        quantize(task("ada/rows"))
    model(hub, "bob/closed")
    hub.repo("bob/closed").gated = True
    with pytest.raises(ModelError, match="bob/closed: gated. Try: accept its terms"):
        quantize(task("bob/closed"))
    model(hub)
    with pytest.raises(ModelError, match="no such revision"):
        quantize(task(revision="v9"))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"quant_types": ["int5"]}, "--quant-type int5: allowed are int8, int8-dynamic, int4"),
        ({"quant_types": [""]}, "--quant-type '': names no variant; known are int8"),
        ({"group_size": 0, "quant_types": ["int4"]}, "group_size 0: allowed are 32, 64, 128, 256"),
        ({"group_size": True}, "group_size: true is refused"),
        ({"group_size": 48, "quant_types": ["int4"]}, "group_size 48: allowed are 32, 64, 128, 256"),
        ({"model": "https://huggingface.co/ada/model"}, "not a folder here, and not a Hub id"),
        ({"model": "ada/model@main"}, "not a folder here, and not a Hub id"),
        ({"experiment_name": "my run"}, 'experiment_name: "my run" is refused: a run\'s name'),
        ({"repo": None}, "say where to publish to"),
        ({"low_disk": True}, "needs the whole model; use it with --save-only"),
        ({"low_disk": True, "repo": None, "save_only": True, "max_rise": 0.1}, "with low_disk nothing is measured"),
        ({"repo": "no-slash"}, "a repository is written USER/NAME"),
        ({"dataset_repo": "ada/data"}, "--dataset-repo ada/data: only a Space"),
        ({"dataset_repo": "ada/data", "trackio_url": "http://localhost:7860"}, "--dataset-repo ada/data: only a Space"),
        ({"trackio_url": "localhost:7860"}, "track.server"),
        ({"trackio_url": "https://[bad"}, "https://[bad: not an address"),
        ({"trackio_url": "https://trackio.example.org:port"}, "track.server"),
        ({"trackio_url": "https://huggingface.co/ada"}, "https://huggingface.co/ada: not the page of a Space"),
        ({"revision": ""}, 'revision: "" is refused'),
        ({"output": ""}, 'output: "" is refused'),
        ({"calibration": "missing.txt"}, "missing.txt"),
        ({"device": "tpu"}, "device: \"tpu\" is refused"),
        ({"quant_type": ["int8"]}, "quant_type: unknown key; did you mean 'quant_types'"),
        ({"repo": "bob/model"}, "cannot write to bob/"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused_in_one_line(hub, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    model(hub)
    with pytest.raises(UserError) as refused:
        quantize(task(**options))
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_requested_cuda_is_refused_without_cuda(hub, tmp_path, monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.chdir(tmp_path)
    model(hub)
    with pytest.raises(ModelError, match="device 'cuda': torch finds no CUDA here"):
        quantize(task(device="cuda"))
    assert not (tmp_path / "runs").exists()


def test_a_repository_with_another_model_is_not_mixed_up_with_this_one(hub):
    model(hub)
    model(hub, "ada/other")
    with pytest.raises(HubError, match="ada/other: has a model of its own at its root"):
        quantize(task(repo="ada/other"))
    told = {"run": "other", "files": {}, "documents": [], "base": {"source": "ada/third", "hub_id": "ada/third"}}
    hub.put("ada/variants", {"tunepress.json": json.dumps(told).encode()})
    with pytest.raises(HubError, match="ada/variants: holds variants of ada/third, and this is ada/model"):
        quantize(task(repo="ada/variants"))


@pytest.mark.parametrize(
    "address, space",
    [
        ("https://huggingface.co/spaces/ada/board", "ada/board"),
        ("https://huggingface.co/spaces/ada/board/?project=x", "ada/board"),
        ("https://ada-board.hf.space/", "ada/board"),
        ("https://trackio.example.org/spaces/ada/board", None),
        ("https://ada-board.hf.space/spaces/bob/other", "ada/board"),
        ("http://127.0.0.1:7860", None),
    ],
)
def test_trackio_address_names_a_space_or_a_server(address, space):
    assert space_at(address) == space


def test_hub_resolves_ambiguous_space_addresses(hub):
    space: Repository = hub.store.create("space", "ada/my.board")
    space.host = "https://ada-my-board.hf.space"
    with pytest.raises(UserError, match="Try: https://huggingface.co/spaces/USER/NAME"):
        space_at("https://ada-my-board.hf.space")
    hub.store.create("space", "ada/my-board").host = "https://ada-my-board.hf.space"
    assert space_at("https://ada-my-board.hf.space") == "ada/my-board"


def test_space_gets_its_data_repository_once(hub):
    space = hub.store.create("space", "ada/board")
    space.host = "https://ada-board.hf.space"
    for _ in range(2):
        keep_in("ada/board", "ada/data")
    assert space.variables == {"TRACKIO_DATASET_ID": "ada/data"}
    assert len([r for r in hub.requests if r.method == "POST"]) == 1


def test_refused_run_does_not_change_the_space(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = hub.store.create("space", "ada/board")
    space.host = "http://127.0.0.1:9"
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "damaged/model.safetensors").write_bytes(b"weights")
    told = {"trackio_url": "https://huggingface.co/spaces/ada/board", "dataset_repo": "ada/data"}
    (tmp_path / "runs").write_text("in the way of the runs' folder")
    for refused in ({"repo": "bob/model"}, {"calibration": "missing.txt"}, {}):
        with pytest.raises(UserError):
            quantize(task("./damaged", **{"repo": "ada/new", **told, **refused}))
        assert not space.variables
    (tmp_path / "runs").unlink()
    with pytest.raises(StageFailed):
        quantize(task("./damaged", "ada/new", **told))
    assert space.variables == {"TRACKIO_DATASET_ID": "ada/data"}


def test_a_list_of_models_takes_options_from_the_command_line_and_its_own(tmp_path):
    path = tmp_path / "models.yaml"
    path.write_text("- {model: ada/one, repo: ada/one}\n- {model: ada/two, repo: ada/two, quant_types: [both]}\n")
    one, two = read_tasks(path, {"quant_types": ["int4"], "private": False})
    assert (one.quant_types, two.quant_types, two.private) == (["int4"], ["both"], False)
    path.write_text(
        "- {model: ada/one, repo: ada/one}\n"
        "- {model: ada/two, repo: ada/two, quality: distilled, calibration_text: [a.txt, b.txt], target: {bits: 5}}\n"
    )
    one, two = read_tasks(path, {"quant_types": ["int4"], "calibration_text": ["c.txt"]})
    assert [(of.quality, of.calibration_text) for of in (one, two)] == [
        (None, ["c.txt"]),
        ("distilled", ["a.txt", "b.txt"]),
    ]
    assert two.target.asked == {"bits": 5}


def test_a_list_has_a_repository_for_each_of_its_models(tmp_path):
    path = tmp_path / "models.yaml"
    path.write_text("- {model: ada/one, repo: ada/one}")
    with pytest.raises(ConfigError, match="a repo of its own there; leave out ada/other"):
        read_tasks(path, {"repo": "ada/other"})


@pytest.mark.parametrize(
    "text, said",
    [
        ("model: ada/one", "a list of models is written as"),
        ("[]", "a list of models is written as"),
        ("- {model: ada/one, repo: ada/one, token: hf_abcdefghijkl}", "model 1: token: unknown key"),
        ("- {repo: ada/one}", "model 1: model: missing"),
        ("- {model: a/x, repo: a/x}\n- {model: b/y, repo: b/y, quant_types: [int3]}", "model 2: --quant-type int3"),
        ("- {model: a/x, repo: a/x, quant_types: [int4], group_size: 3}", "model 1: variants"),
        ("- {model: a/x, repo: a/x}\n- {model: b/x, repo: b/x}", "models 1 and 2 would both be made in 'x'"),
    ],
)
def test_a_list_with_a_mistake_is_refused_before_anything_is_begun(tmp_path, text, said):
    path = tmp_path / "models.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_tasks(path, {})
    assert said in str(refused.value) and "hf_abc" not in str(refused.value)


@pytest.mark.parametrize(
    "named, options",
    [
        ("edge", {"int4": {"group_size": 128, "embeddings": "int8"}}),
        ("high_quality", {"int8": {}, "int4": {"group_size": 32, "embeddings": "int8"}}),
        ("gpu_optimized", {"int8": {}, "int4": {"group_size": 128, "packing": "tile_packed"}}),
        ("int4,w4a16", {"int4": {"group_size": 128}, "w4a16": {"group_size": 128}}),
        ("w8a16,gguf-q4_k", {"w8a16": {}, "gguf-q4_k": {}}),
    ],
)
def test_presets_keep_their_options(named, options):
    task = read_task({"model": "ada/base", "save_only": True, "quant_types": [named]}, "options")
    assert asked_variants(task) == {name: {"name": name, **given} for name, given in options.items()}
