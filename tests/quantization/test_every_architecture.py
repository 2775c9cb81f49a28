"""Every decoder of transformers: in int8 it computes nearly the same in stock transformers and here, or is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.config.schema import VariantSpec
from pipeline.errors import ModelError, QuantizationError
from pipeline.inference.load import load
from pipeline.models.checkpoint_files import read_config
from pipeline.models.experts import is_expert
from pipeline.models.matrices import quantizable_weights, refuse_other_matrices, table_weights
from pipeline.models.safe_loading import check_config
from pipeline.quantization.layers import unfit
from pipeline.quantization.writer import quantize_checkpoint
from tests.support.architectures import build
from tests.support.models import relative_error, write_tokenizer

IDS = torch.tensor([[7, 100, 31, 64, 5, 5, 90, 12, 120, 33]])
NAMED = {  # settings beside those of `build`
    "bamba": {},
    "deepseek_v3": {"first_k_dense_replace": 2},
    "falcon_h1": {},
    "falcon_mamba": {},
    "granite": {},
    "glm4_moe": {"first_k_dense_replace": 1},
    "minicpm3": {},
    "olmo": {},
    "phi": {},
    "recurrent_gemma": {},
}
REFUSED = {  # and the layers that are said
    "falcon": r"transformer\.h\.\*\.self_attention\.query_key_value, ",
    "mamba": r"run backbone\.layers\.\*\.mixer\.dt_proj in int8",
    "rwkv": r"rwkv\.blocks\.\*\.attention\.output, ",
}


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(kind, **changes)`: the folder of a tiny random model in bfloat16 with a tokenizer."""

    def make(kind, **changes):
        build(kind, **changes).to(torch.bfloat16).save_pretrained(tmp_path / kind)
        write_tokenizer(tmp_path / kind)
        return tmp_path / kind

    return make


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def compare(source, **options):
    """Make int8 of a model, and compare the logits of every way to load it with those of the model."""
    spec = VariantSpec.model_validate({"name": "int8", **options}).resolved()
    linear = quantizable_weights(source)
    if said := unfit(spec, linear, source):
        raise ModelError(said)
    made = source.with_name("int8")
    quantize_checkpoint(source, [spec], {"int8": made}, linear, tables=table_weights(source))
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))
    stock = AutoModelForCausalLM.from_pretrained(made, dtype="auto")
    for model in (stock, load(made)[0], load(made, offload=True)[0], load(source, offload=True)[0]):
        assert error(logits(model), expected, any(map(is_expert, linear))) < 0.1


def error(found, expected, has_experts):
    """Return the relative error; with experts that of most tokens, since an undecided router may change its choice."""
    if not has_experts:
        return relative_error(found, expected)
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median()


@pytest.mark.parametrize("kind", NAMED)
def test_int8_computes_nearly_the_same_however_it_is_loaded(checkpoint, kind):
    compare(checkpoint(kind, **NAMED[kind]))


@pytest.mark.parametrize("kind", ["mamba2", "olmo"])  # asks the head for its type; has no norm with weights
def test_int8_embeddings_leave_a_model_that_knows_its_type(checkpoint, kind):
    compare(checkpoint(kind), embeddings="int8")


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("variant", ["int8", "int4", "int8-dynamic"])
def test_weights_that_the_model_uses_outside_of_linear_layers_are_refused_by_name(checkpoint, kind, variant):
    source = checkpoint(kind, **({"time_step_rank": 32} if kind == "mamba" else {}))
    spec = VariantSpec.model_validate({"name": variant}).resolved()
    said = unfit(spec, quantizable_weights(source), source)
    assert said and "\n" not in said
    with pytest.raises(ModelError, match=REFUSED[kind].replace("int8", variant)):
        quantize_checkpoint(source, [spec], {variant: source / "made"}, quantizable_weights(source))
    assert not (source / "made").exists()


def test_layers_that_the_message_names_can_be_kept(checkpoint):
    compare(checkpoint("mamba"), keep=["backbone.layers.*.mixer.dt_proj"])


def test_a_model_that_changes_its_weights_is_not_read_layer_by_layer(checkpoint):
    with pytest.raises(ModelError, match="a rwkv changes its weights while it runs"):
        load(checkpoint("rwkv"), offload=True)


def test_a_buffer_that_nobody_computes_is_refused_by_name(checkpoint, monkeypatch):
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1PreTrainedModel

    source = checkpoint("falcon_h1")
    monkeypatch.setattr(FalconH1PreTrainedModel, "_init_weights", lambda self, module: None)
    with pytest.raises(ModelError, match=r"mamba\.mup_vector: neither stored nor computed by transformers"):
        load(source, offload=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*NAMED} - {*REFUSED}))
def test_every_other_architecture_is_right_or_refused(checkpoint, kind):
    try:
        source = checkpoint(kind)
        logits(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))
    except Exception as error:  # the sizes of `build` are not for every architecture, nor is bfloat16
        pytest.skip(f"no tiny {kind}: {error}")
    try:
        check_config(source, read_config(source))
        refuse_other_matrices(source)
        compare(source)
    except (ModelError, QuantizationError) as error:  # also if only its tensors cannot be read layer by layer
        assert "\n" not in str(error)
