"""Offloaded models: measured from their files, with the figures they have in memory."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.config.schema import Config
from pipeline.errors import ModelError
from pipeline.evaluation import metrics
from pipeline.evaluation.evaluate import evaluate
from pipeline.inference import output_head
from pipeline.inference.load import load
from pipeline.inference.offload import WEIGHTS_SHARE, fits, is_offloaded
from pipeline.models.checkpoint import SINGLE_NAME, Checkpoint
from pipeline.system.hardware import _free_in_groups, free_bytes
from pipeline.workflow.stages.inputs import run_texts
from pipeline.workflow.workspace import Workspace
from scripts.benchmarks import random_checkpoint
from tests.support.models import LOOKUP_EMBEDDINGS, random_text
from tests.support.texts import general_text

CPU = torch.device("cpu")
IN_LITTLE_MEMORY = """
import sys
import torch, transformers, torchao, accelerate
from pipeline.evaluation import metrics
from pipeline.inference.load import load
from pipeline.system import hardware
from tests.support.models import random_text
before = hardware.peak_memory_bytes()
model, _ = load(sys.argv[1], offload=True)
metrics.score(model, random_text((512,)))
print(before, hardware.peak_memory_bytes())
"""


def same(ours: metrics.Scores, theirs: metrics.Scores) -> bool:
    return all(torch.equal(getattr(ours, part), getattr(theirs, part)) for part in ("nll", "choice", "hidden"))


def test_offloaded_model_scores_bit_for_bit_the_same(any_model):
    there, _ = load(any_model)
    offloaded, _ = load(any_model, offload=True)
    assert is_offloaded(offloaded) and not is_offloaded(there)
    assert torch.equal(output_head.head_matrix(offloaded), output_head.head_matrix(there))
    assert output_head.head_names(offloaded) == output_head.head_names(there)
    assert same(metrics.score(offloaded, random_text()), metrics.score(there, random_text()))
    assert all(parameter.is_meta for parameter in offloaded.parameters())  # nothing stayed behind


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_a_variant_scores_bit_for_bit_as_the_numbers_in_its_files_do(any_model, quantized, dequantized, variant):
    offloaded, _ = load(quantized(any_model, variant), variant, offload=True)
    scores = metrics.score(offloaded, random_text())
    assert same(scores, metrics.score(dequantized(any_model, variant), random_text()))
    packed = metrics.score(load(quantized(any_model, variant), variant)[0], random_text())
    assert metrics.perplexity(scores).value == pytest.approx(metrics.perplexity(packed).value, rel=0.02)


@pytest.mark.parametrize("architecture", LOOKUP_EMBEDDINGS)
def test_a_quantized_table_counts_for_embedding_and_head(tiny_model, quantized, architecture):
    root = quantized(tiny_model(architecture), "int8", embeddings="int8")
    offloaded, packed = (load(root, "int8", offload=offload)[0] for offload in (True, False))
    assert torch.allclose(
        output_head.head_matrix(offloaded).float(), output_head.head_matrix(packed).dequantize(), rtol=0.01
    )
    ours, theirs = (metrics.perplexity(metrics.score(model, random_text())).value for model in (offloaded, packed))
    assert ours == pytest.approx(theirs, rel=0.02)


def test_model_is_offloaded_only_if_it_does_not_fit(any_model):
    size = sum(path.stat().st_size for path in any_model.glob("*.safetensors"))
    assert fits(any_model, CPU, int(size / WEIGHTS_SHARE) + 2) and not fits(
        any_model, CPU, int(size / WEIGHTS_SHARE) - 2
    )
    assert fits(any_model, CPU) and not is_offloaded(load(any_model, offload="auto")[0])


@pytest.mark.parametrize("variant", ["w4a16", "w8a8", "int8"])
def test_weights_that_stock_transformers_dequantizes_count_in_full(tiny_model, quantized, variant):
    root = quantized(tiny_model("llama"), variant)
    of = {folder: Checkpoint(folder).nbytes for folder in (root, root / variant)}
    dequantizes = variant != "int8"
    held = of[root] if dequantizes else of[root / variant]
    for share, expected in ((1.02, True), (0.98, False)):
        free = int(share * held / WEIGHTS_SHARE)
        assert fits(root / variant, CPU, free, stock=True) == expected
        if dequantizes:
            assert fits(root / variant, CPU, free) == (expected or variant == "w4a16")


@pytest.mark.parametrize(
    "kind, part, variant, options",
    [
        ("mixtral", ".experts.", "w4a16", {}),
        ("llama", "_proj.weight", "fp8-weight", {}),
        ("llama", "_proj.weight", "fp8-weight", {"packing": "torchao"}),
    ],
    ids=str,
)
def test_weights_that_the_loader_dequantizes_count_in_full(tiny_model, quantized, kind, part, variant, options):
    root = quantized(tiny_model(kind), variant, **options)
    full, stored = Checkpoint(root), Checkpoint(root / variant).nbytes
    dequantized = sum(info.nbytes for name, info in full.items() if part in name)
    assert stored < dequantized and not fits(root / variant, CPU, int(dequantized / WEIGHTS_SHARE))
    assert fits(root / variant, CPU, int(1.05 * full.nbytes / WEIGHTS_SHARE))


def test_the_limit_of_a_control_group_counts(tmp_path):
    group = tmp_path / "fs/job/step"
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    for folder, limit in ((group, "max"), (group.parent, "5000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("3000\n")
        (folder / "memory.stat").write_text("anon 2000\ninactive_file 400\n")
    assert list(_free_in_groups(tmp_path / "fs", tmp_path / "cgroup")) == [2400]
    (tmp_path / "cgroup").write_text("5:cpu:/job/step\n4:memory:/job/step\n")
    old = tmp_path / "fs/memory/job/step"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("900\n")
    (old / "memory.usage_in_bytes").write_text("1000\n")
    (old / "memory.stat").write_text("total_inactive_file 50\n")
    assert list(_free_in_groups(tmp_path / "fs", tmp_path / "cgroup")) == [0]
    assert free_bytes(CPU) > 0


def test_tensors_under_other_names_cannot_be_offloaded_and_that_is_said(tiny_model, quantized, tmp_path):
    folder = Path(shutil.copytree(quantized(tiny_model("llama"), "int8") / "int8", tmp_path / "renamed"))
    tensors = {name: Checkpoint(folder).read(name) for name in Checkpoint(folder)}
    tensors["model.final.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / SINGLE_NAME, Checkpoint(folder).metadata)
    with pytest.raises(ModelError, match="does not fit into the memory, and cannot be read piece by piece"):
        load(folder, offload=True)


def test_large_output_heads_are_used_piece_by_piece_without_a_trace(tiny_model, monkeypatch):
    model, _ = load(tiny_model("llama"))
    whole = metrics.score(model, random_text())
    monkeypatch.setattr(output_head, "HEAD_ELEMENTS", 160 * 100)
    pieces = metrics.score(model, random_text())
    assert torch.allclose(whole.nll, pieces.nll, atol=1e-5) and torch.equal(whole.choice, pieces.choice)


@pytest.fixture
def measured(tmp_path, tiny_model, quantized):
    """`measured(offload)`: a model and its int4 variant, measured as a run does; (workspace, reference, variant)."""
    root = quantized(tiny_model("llama"), "int4")
    (tmp_path / "general.txt").write_text(general_text())
    evaluated = {"general": str(tmp_path / "general.txt"), "max_tokens": 512, "prompts": ["Hello?"]}
    tree = {"name": "m", "model": {"source": str(root)}, "data": None, "evaluate": evaluated}
    config = Config.model_validate(tree)

    def make(offload):
        with Workspace.claim(tmp_path / str(offload), config) as workspace:
            base = evaluate("base", root, config, run_texts(workspace), print, offload=offload)
            variant = evaluate("int4", root / "int4", config, run_texts(workspace), print, root, offload=offload)
        return base, variant

    return make


@pytest.mark.slow
def test_offloaded_model_has_quality_but_no_speed_or_answers(measured):
    base, variant = measured(True)
    ordinary, packed = measured(False)
    assert base.quality == ordinary.quality
    kl, expected = (found.on("general").kl.value for found in (variant, packed))
    assert kl == pytest.approx(expected, rel=0.1)
    for found in (base, variant):
        assert found.offloaded is True and found.speed == {} and found.answers == ()
    assert ordinary.offloaded is None and ordinary.speed["stock"].runs and ordinary.answers


@pytest.mark.slow
def test_measuring_takes_far_less_memory_than_the_model(tmp_path):
    """1.1 B parameters, 2.2 GB in bf16."""
    folder = random_checkpoint(tmp_path / "model", "1.1b", 3)
    done = subprocess.run([sys.executable, "-c", IN_LITTLE_MEMORY, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.split()[-2:])
    assert peak - before < 0.4 * sum(path.stat().st_size for path in folder.glob("*.safetensors"))
