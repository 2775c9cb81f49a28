"""Whether a variant suits the layers of a model, told by their names and shapes before any work."""

from __future__ import annotations

import pytest

from pipeline.config.schema import VariantSpec
from pipeline.errors import QuantizationError
from pipeline.quantization.fit import check_patterns, misfit

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")


def layers(narrow: str = "", width: int = 200) -> dict[str, tuple[int, int]]:
    """Return the shapes of layers in two blocks: 256 columns, and another width for those of one kind."""
    names = [f"model.layers.{block}.{part}.weight" for block in range(2) for part in (*PARTS, "mlp.down_proj")]
    return {name: (256, width if narrow and name.endswith(f"{narrow}.weight") else 256) for name in names}


def spec_of(name: str, **options) -> VariantSpec:
    return VariantSpec(name=name, **options).resolved()


@pytest.mark.parametrize(
    ("name", "keep", "problem"),
    [
        ("w4a16", ["*.q_proj"], "names model.layers.0.self_attn.q_proj, which vLLM computes as one with"),
        ("bnb-nf4", ["*.gate_proj"], "names model.layers.0.mlp.gate_proj, which vLLM computes as one with"),
        ("gptq", ["*.w2"], "names '*.w2', which no layer to be quantized matches"),
        *((name, ["*"], "leaves no layer to quantize") for name in ("int8", "w4a16", "w8a8", "fp8", "gptq", "bnb-nf4")),
    ],
)
def test_patterns_that_do_not_suit_the_layers_are_refused_with_the_variant(name, keep, problem):
    with pytest.raises(QuantizationError, match=f"^{name}: 'keep' ") as refused:
        check_patterns(spec_of(name, keep=keep), layers())
    assert problem in str(refused.value)


def test_embeddings_alone_can_be_quantized():
    check_patterns(spec_of("int4", keep=["*"], embeddings="int8"), layers())


@pytest.mark.parametrize("name", ["int4", "bnb-nf4", "gptq", "awq", "gguf-q4_0", "gguf-q4_k", "gguf-q6_k"])
def test_the_way_out_of_a_width_that_does_not_fit_is_one_that_works(name):
    rounding = {"rounding": "rtn"} if name == "gguf-q6_k" else {}
    linear = layers("down_proj", width=204)
    reason = misfit(spec_of(name, **rounding), linear)
    assert reason and reason.startswith("model.layers.0.mlp.down_proj.weight: ") and "204" in reason
    assert reason.endswith(" (and 1 more). Try: keep: ['*.down_proj']")
    kept = spec_of(name, keep=["*.down_proj"], **rounding)
    check_patterns(kept, linear)
    assert misfit(kept, linear) is None


@pytest.mark.parametrize("name", ["bnb-nf4", "gptq"])
def test_the_way_out_keeps_layers_that_servers_compute_as_one(name):
    linear = layers("q_proj", width=204)
    reason = misfit(spec_of(name), linear)
    assert reason and reason.endswith("Try: keep: ['*.q_proj', '*.k_proj', '*.v_proj']")
    check_patterns(spec_of(name, keep=["*.q_proj", "*.k_proj", "*.v_proj"]), linear)


def test_if_no_layer_fits_another_variant_is_the_way_out():
    reason = misfit(spec_of("bnb-nf4"), dict.fromkeys(layers(), (200, 200)))
    assert reason and "keep" not in reason and "w4a16" in reason.partition("Try: ")[2]


@pytest.mark.parametrize("name", ["int8", "w4a16", "w8a16", "w8a8", "fp8", "bnb-int8"])
def test_variants_with_a_scale_for_each_row_fit_any_width(name):
    assert misfit(spec_of(name), layers("down_proj", width=204)) is None
