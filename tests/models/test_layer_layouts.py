"""Layer layouts from `config.json` alone: those of transformers' models, or none."""

import copy
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

from pipeline.config.schema import VariantSpec
from pipeline.errors import ModelError
from pipeline.models import architectures, matrices
from pipeline.models.architectures import ARCHITECTURES
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.checkpoint_files import read_config
from pipeline.models.layer_layouts import layout
from pipeline.models.matrices import PLAIN_TABLE, embedding_kind, linear_weights, refuse_other_matrices, table_weights
from pipeline.quantization.writer import quantize_checkpoint
from tests.support.models import ARCHITECTURES as WRITTEN

SIZES = {
    "vocab_size": 272,
    "hidden_size": 96,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
OWN_HEADS = {"head_dim": 32}
SHARES_THE_WIDTH = "stablelm"  # whose heads have no width of their own
BIASES = {
    **dict.fromkeys(("qwen3", "olmo2", "olmo3", "gemma", "gemma2", "gemma3_text", "cohere2", "glm4"), "attention_bias"),
    **dict.fromkeys(("llama", "smollm3", "granite", "seed_oss", "arcee"), "mlp_bias"),
    "starcoder2": "use_bias",
    "stablelm": "use_qkv_bias",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BY_KIND = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# Whatever a setting may wrongly or rightly be; each setting of each architecture is tried with each of them.
VALUES = (
    None, True, False, 0, 1, 7, 64, 0.0, 0.5, 30.0, -1, float("nan"), 1 << 40, "silu", "gelu_new", "relu2", "float16",
    "x", "hybrid", [], [0, 1], ["sliding_attention", "full_attention"], ["full_attention"], {},
    {"rope_type": "default"}, {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    {"type": "linear", "factor": 2}, {"rope_type": "yarn", "factor": 4.0}, LLAMA3, {**LLAMA3, "factor": "8"}, BY_KIND,
)  # fmt: skip


def config_of(kind: str, **changes) -> dict:
    heads = {} if kind == SHARES_THE_WIDTH else OWN_HEADS
    return {"model_type": kind, **SIZES, **heads, **changes}


def saved(kind: str) -> dict:
    """The same configuration as transformers writes it."""
    from transformers import AutoConfig

    return json.loads(AutoConfig.for_model(**config_of(kind)).to_json_string())


def built(config: dict) -> tuple | None:
    """Linear layers, tables, embedding and vectors of the model that transformers builds; None if it refuses to."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config)))
    except Exception:  # what it makes of a damaged configuration can be anything
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embedding] if model.config.tie_word_embeddings else [embedding, head]
    modules, known = list(model.named_modules()), (torch.nn.Linear, torch.nn.Embedding)
    others = [n for n, m in modules for p in m.parameters(recurse=False) if p.ndim > 1 and not isinstance(m, known)]
    assert not others, f"{others[0]} is a matrix of no linear layer"
    linear = {n: m.weight.shape for n, m in modules if isinstance(m, torch.nn.Linear) and m is not head}
    vectors = {n: tuple(p.shape) for n, p in model.named_parameters() if p.ndim == 1}
    shapes = {n: m.weight.shape for n, m in modules if any(m is t for t in tables)}
    return linear, shapes, type(embedding).__name__, vectors


def assert_same(config: dict) -> None:
    found, expected = layout(copy.deepcopy(config)), built(config)
    assert expected is not None, f"transformers refuses {config}"
    linear, tables, kind, vectors = expected
    assert list(found.linear.items()) == [(f"{name}.weight", tuple(shape)) for name, shape in linear.items()]
    assert list(found.tables.items()) == [(f"{name}.weight", tuple(shape)) for name, shape in tables.items()]
    assert kind == PLAIN_TABLE or not found.plain_embedding
    assert found.vectors == vectors


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_layouts_are_those_of_the_models_that_transformers_builds(kind):
    for changes in (
        {},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 4, "num_hidden_layers": 3, "hidden_size": 128},
        {"dtype": "bfloat16", "architectures": ["X"], "rope_theta": 1e6, "eos_token_id": 2, "use_cache": False},
        saved(kind),
        *([{"head_dim": 48}] if kind != SHARES_THE_WIDTH else []),
        *([{BIASES[kind]: value} for value in (True, False)] if kind in BIASES else []),
    ):
        assert layout(config_of(kind, **changes)) is not None, f"{kind} with {changes} is left to transformers"
        assert_same(config_of(kind, **changes))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_no_setting_with_any_value_makes_a_layout_that_transformers_does_not_have(kind):
    known = config_of(kind)
    names = sorted({name for one in ARCHITECTURES for name in settings_of(one)})
    cases = [{key: value for key, value in known.items() if key != left_out} for left_out in known]
    cases += [{**known, name: value} for name in names for value in VALUES]
    taken = [case for case in cases if layout(copy.deepcopy(case)) is not None]
    assert len(taken) > 20
    for case in taken:
        assert_same(case)


def settings_of(kind: str) -> set[str]:
    return {*architectures.SIZES, *architectures.COMMON, *ARCHITECTURES[kind].settings, "head_dim"} - {"model_type"}


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mixtral"},
        {"model_type": ["llama"]},
        {"per_layer_config": {"0": {"intermediate_size": 64}}},
        {"attn_implementation": "eager"},
        {"auto_map": {"AutoConfig": "evil.Config"}},
        {"hidden_act": "__import__('os')"},
        {"num_hidden_layers": 10**6},
        {"head_dim": 31},
        {"num_attention_heads": 5},
        {"vocab_size": True},
        {"pad_token_id": 272},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ],
)
def test_a_configuration_with_anything_unknown_is_left_to_transformers(changes):
    assert layout(config_of("llama")) is not None
    assert layout(config_of("llama", **changes)) is None


def test_names_and_shapes_of_written_checkpoints_are_those_of_their_layouts(any_model):
    checkpoint, known = Checkpoint(any_model), layout(read_config(any_model))
    assert known is not None
    assert {name: info.shape for name, info in checkpoint.items()} == known.linear | known.tables | known.vectors


@pytest.mark.parametrize("kind", WRITTEN)
def test_all_questions_have_the_same_answers_with_and_without_a_layout(tiny_model, kind, monkeypatch):
    folder = tiny_model(kind)

    def answers() -> tuple:
        refuse_other_matrices(folder)
        return list(linear_weights(folder).items()), list(table_weights(folder).items()), embedding_kind(folder)

    quick = answers()
    monkeypatch.setattr(matrices, "layout", lambda config: None)
    assert quick == answers()


def test_a_damaged_configuration_is_refused_in_one_line_by_transformers(model_copy):
    path = model_copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 7}))
    for ask in (linear_weights, table_weights, embedding_kind, refuse_other_matrices):
        with pytest.raises(ModelError, match="transformers cannot") as caught:
            ask(model_copy)
        assert "\n" not in str(caught.value) and str(model_copy) in str(caught.value)


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"intermediate_size": 224},
            r"mlp.gate_proj.weight' is of .*, and of \(224, 160\) in the model",
        ),
        ({"num_hidden_layers": 3}, r"its checkpoint has no 'model.layers.2.input_layernorm.weight', .* and 10 more"),
        ({"head_dim": 32}, r"self_attn.q_proj.weight' is of .* in its checkpoint, and of \(128, 160\) in the model"),
    ],
)
def test_a_configuration_that_contradicts_the_checkpoint_is_noticed(model_copy, tmp_path, changes, said):
    path = model_copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert layout(read_config(model_copy)) is not None
    spec = VariantSpec(name="int8").resolved()
    with pytest.raises(ModelError, match=said):
        quantize_checkpoint(model_copy, [spec], {"int8": tmp_path / "out"}, linear_weights(model_copy))


MAKE = """
import sys
from pathlib import Path
from pipeline.config.schema import VariantSpec
from pipeline.models.matrices import linear_weights, refuse_other_matrices, table_weights
from pipeline.quantization.writer import quantize_checkpoint

output, *sources = map(Path, sys.argv[1:])
specs = [VariantSpec(name=name).resolved() for name in ("int8", "int4")]
for source in sources:
    refuse_other_matrices(source)
    folders = {spec.name: output / source.name / spec.name for spec in specs}
    quantize_checkpoint(source, specs, folders, linear_weights(source), tables=table_weights(source))
print(sorted({"transformers", "torchao", "huggingface_hub", "tokenizers"} & sys.modules.keys()))
"""


def test_well_known_models_are_quantized_without_the_libraries_that_load_them(tiny_model, tmp_path, cold):
    sources = [tiny_model(kind) for kind in WRITTEN]
    command = [sys.executable, "-c", MAKE, str(tmp_path), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.stdout == "[]\n", done.stderr
    assert all((tmp_path / source.name / "int4" / "model.safetensors").is_file() for source in sources)
