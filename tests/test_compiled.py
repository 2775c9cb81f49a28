"""Compiled decoding writes what the model writes anyway, compiles once, and leaves no trace in what is saved."""

import shutil

import pytest
import torch

from pipeline.checkpoint import Checkpoint
from pipeline.errors import ModelError
from pipeline.loading import load

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")


def written(model, prompt: int, new: int) -> list[int]:
    ids = torch.randint(5, 250, (1, prompt), generator=torch.Generator().manual_seed(prompt))
    out = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[0, prompt:].tolist()


@pytest.mark.parametrize("variant", ["int8", "int4"])
def test_it_writes_the_same_for_prompts_of_any_length_and_compiles_once(
    tiny_model, quantized, tmp_path, capsys, variant
):
    torch._dynamo.reset()  # what other tests compiled does not count
    torch._dynamo.utils.counters.clear()
    root = quantized(tiny_model("llama", "float32"), variant)
    plain, _ = load(root, variant)
    model, _ = load(root, variant, compile=True)
    assert "compiling" in capsys.readouterr().err
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before == 1
    for prompt in (3, 20, 70):
        assert written(model, prompt, 12) == written(plain, prompt, 12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before

    model.save_pretrained(tmp_path)
    stored, saved = Checkpoint(root / variant), Checkpoint(tmp_path)
    assert stored.keys() == saved.keys() and all(torch.equal(stored.read(n), saved.read(n)) for n in stored)
    kept = (tmp_path / "generation_config.json").read_text()
    assert "static" not in kept and "compile" not in kept


def test_without_a_compiler_it_says_what_to_install(tiny_model, quantized, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ModelError, match=r"needs a C\+\+ compiler.*apt install g\+\+"):
        load(quantized(tiny_model("llama"), "int8"), "int8", compile=True)
