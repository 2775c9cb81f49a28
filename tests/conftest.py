"""Fixtures for all tests: tiny checkpoints, finished runs, a Hub, and libraries that cannot reach the real Hub."""

from __future__ import annotations

import os
import tempfile

# Before any Hugging Face library is imported: a cache of the tests' own, and an endpoint where nobody
# listens. Tests with a hub on loopback name its address themselves.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="tunepress-tests-")
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # for tiny models a second thread costs more than it brings
os.environ["TUNEPRESS_HUB_WAIT"] = "0.01"  # seconds before a second attempt, here and in what is started from here
for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TUNEPRESS_COMMAND"):
    os.environ.pop(variable, None)

from pipeline.system.libraries import quiet  # noqa: E402

quiet()  # before a Hugging Face library reads whether it may show progress

import shutil  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402
from huggingface_hub import constants  # noqa: E402

from tests.support.fake_runs import FakeRun, make_run  # noqa: E402
from tests.support.hub import LoopbackHub  # noqa: E402
from tests.support.models import ARCHITECTURES, weight_in, write_model  # noqa: E402
from tests.support.runs import OTHER_TOKEN, TOKEN, Place, run_recipe  # noqa: E402
from tests.support.warm import COLD, WarmPython, is_possible  # noqa: E402

WARM = "PYTEST_WARM_PYTHON"  # names the program that stands for Python, for workers


def pytest_configure(config):
    """Start the Python that processes are forked from, once for all workers, and name it to what starts processes."""
    is_worker, has_workers = hasattr(config, "workerinput"), getattr(config.option, "numprocesses", None)
    if not is_worker and is_possible():
        warm = WarmPython()
        config.add_cleanup(warm.close)
        os.environ[WARM] = str(warm.program)
    if WARM in os.environ and (is_worker or not has_workers):
        sys.executable = os.environ[WARM]


@pytest.fixture(scope="session", autouse=True)
def _scratch_cache():
    """The Hub cache of this run goes when the run ends."""
    yield
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture
def cold(monkeypatch):
    """Let new processes be those of the real Python, which has nothing imported yet."""
    monkeypatch.setattr(sys, "executable", COLD)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Callable[..., Path]:
    """`tiny_model("llama")`: the folder of a random bf16 checkpoint with a tokenizer; made once, not to be changed.

    Keywords change the configuration: `tiny_model("llama", hidden_size=80)`; `dtype` changes the weights' type.
    """
    made: dict[tuple, Path] = {}

    def make(architecture: str, dtype: str = "bfloat16", **changes) -> Path:
        key = (architecture, dtype, repr(sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture)
            write_model(folder, architecture, dtype, **changes)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session", params=ARCHITECTURES)
def any_model(request, tiny_model) -> Path:
    """The tiny checkpoint of each architecture in turn."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def quantized(tmp_path_factory) -> Callable[..., Path]:
    """`quantized(folder, "int4", group_size=32)`: that checkpoint beside its variant, in its own folder; made once.

    Keywords go into the `VariantSpec`; `shard_bytes` makes several shards.
    """
    from pipeline.config.schema import VariantSpec
    from pipeline.models.matrices import quantizable_weights, table_weights
    from pipeline.quantization.writer import quantize_checkpoint

    made: dict[tuple, Path] = {}

    def make(source: Path, variant: str, shard_bytes: int = 10**9, **spec) -> Path:
        key = (source, variant, shard_bytes, repr(sorted(spec.items())))
        if key not in made:
            made[key] = Path(shutil.copytree(source, tmp_path_factory.mktemp("release") / "model"))
            asked = VariantSpec(name=variant, **spec).resolved()
            tables = table_weights(source) if asked.embeddings == "int8" else {}
            folders = {variant: made[key] / variant}
            quantize_checkpoint(
                source, [asked], folders, quantizable_weights(source), shard_bytes=shard_bytes, tables=tables
            )
        return made[key]

    return make


@pytest.fixture(scope="session")
def dequantized() -> Callable:
    """`dequantized(folder, "int4")`: the model with the numbers that the variant's codes mean, in plain layers."""
    from transformers import AutoModelForCausalLM

    from pipeline.config.schema import VariantSpec
    from pipeline.inference.kernels.float32_mode import quicken_products
    from pipeline.inference.kernels.plain import quicken_linears
    from pipeline.models.matrices import quantizable_weights
    from pipeline.quantization.formats import format_of
    from pipeline.quantization.roundings import rounding

    def make(source: Path, variant: str, keep: tuple[str, ...] = (), **spec):
        asked = VariantSpec(name=variant, **spec).resolved()
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval().requires_grad_(False)
        for name in quantizable_weights(source):
            if name.removesuffix(".weight") in keep:
                continue
            weight = weight_in(model, name)
            grid = format_of(asked).grid(asked, weight.shape[1])
            weight.copy_(rounding(asked.rounding).round(weight, grid).dequantize(weight.dtype))
        quicken_linears(model)
        quicken_products(model)
        return model

    return make


@pytest.fixture(scope="session")
def mixture(tmp_path_factory) -> Path:
    """A tiny checkpoint of a mixture of experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("mixture")
    config = AutoConfig.for_model(
        "mixtral", vocab_size=272, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def model_copy(tiny_model, tmp_path) -> Path:
    """A tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process talks to as ada."""
    with LoopbackHub(tmp_path / "hub", {TOKEN: {"name": "ada"}, OTHER_TOKEN: {"name": "bob"}}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def finished(tmp_path) -> FakeRun:
    """A fine-tuned run with both variants, not yet published."""
    return make_run(tmp_path / "runs" / "demo")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, tiny_model):
    """`finished_run("qwen3-1.7b")` is a finished run of that recipe without a repository, made once for all workers."""
    ours = tmp_path_factory.getbasetemp()
    shared = ours.parent if "PYTEST_XDIST_WORKER" in os.environ else ours

    def make(recipe: str) -> Place:
        place = Place(shared / f"run-{recipe}")
        with FileLock(f"{place.folder}.lock"):
            if not place.config.is_file():  # which is written last
                shutil.rmtree(place.folder, ignore_errors=True)
                run_recipe(place.folder, recipe, tiny_model)
        return place

    return make


@pytest.fixture(params=["qwen3-1.7b", pytest.param("gemma-3-1b", marks=pytest.mark.slow)])
def each_run(request, finished_run) -> Place:
    """A finished run on each of two architectures in turn; not to be changed."""
    return finished_run(request.param)


@pytest.fixture
def unpublished(finished_run) -> Place:
    """A finished run that is not published; not to be changed."""
    return finished_run("qwen3-1.7b")


@pytest.fixture
def copied(unpublished, tmp_path) -> Place:
    """A finished run that a test may change."""
    return unpublished.copy(tmp_path / "copy")
