"""Gates: a variant passes if it is within its limits, error included."""

import math

import pytest

from pipeline.config.catalog import VARIANTS
from pipeline.config.schema import Config
from pipeline.evaluation.cluster_errors import quantile
from pipeline.evaluation.gates import ONE_CLUSTER, corrections, describe_missed, judge, limits
from pipeline.evaluation.model_result import Estimate, Quality
from pipeline.workflow.stages import measure_variant, quantize
from pipeline.workflow.workspace import Workspace


def configured(**quantize) -> Config:
    tree = {"name": "m", "model": {"source": "user/model"}, "data": None, "quantize": quantize}
    return Config.model_validate(tree)


def quality(rise: float, stderr: float, freedom: float = 1000, **more: Estimate) -> dict[str, Quality]:
    known = {"kl": Estimate(0.04, 0.001), "agreement": Estimate(0.93, 0.01)} | more
    return {"general": Quality(freedom=freedom, tokens=1000, rise=Estimate(rise, stderr), **known)}


@pytest.mark.parametrize(
    ("variant", "rise"),
    [
        ("int8", 0.02), ("int8-dynamic", 0.02), ("int4", 0.05), ("gguf-q8_0", 0.02), ("gguf-q4_0", 0.05),
        ("gguf-q5_1", 0.05), ("gguf-q6_k", 0.05), ("gguf-q4_k_m", 0.05), ("gguf-f16", 0.01), ("gguf-bf16", 0.01),
    ],
)  # fmt: skip
def test_perplexity_is_limited_by_default_by_the_kind_of_variant_and_nothing_else_is(variant, rise):
    assert limits(configured(variants=[variant], quality="fast").quantize, variant) == {"rise": rise}


def test_a_calibrated_variant_has_the_same_limit_for_its_divergence():
    calibrated = configured(variants=["int8", "int4"], gate={"rise": 0.03}, quality="calibrated").quantize
    assert limits(calibrated, "int4") == {"rise": 0.03, "kl": 0.03}
    assert limits(calibrated, "int8") == {"rise": 0.03}  # rounded to nearest, without calibration text
    aimed = configured(variants=[{"name": "int4", "target": {"rise": 0.02}}], gate={"kl": 0.1}).quantize
    assert limits(aimed, "int4") == {"rise": 0.02, "kl": 0.1}


def test_every_variant_has_a_limit():
    assert all(0 < variant.rise < 0.1 for variant in VARIANTS.values())


def test_a_few_tokens_that_all_agree_do_not_show_that_all_others_would():
    agreed = {"agreement": Estimate(1.0, 0.0)}
    assert judge(quality(0.0, 0.0, **agreed), {"disagreement": 0.005}).passed
    assert not judge(quality(0.0, 0.0, **agreed), {"disagreement": 0.001}).passed


def test_a_limit_of_one_variant_is_over_that_of_all_and_that_over_the_catalogs():
    variants = ["int8", {"name": "int4", "gate": {"kl": 0.3, "disagreement": 0.2}}]
    given = configured(variants=variants, gate={"rise": 0.03, "kl": 0.1}).quantize
    assert limits(given, "int8") == {"rise": 0.03, "kl": 0.1}
    assert limits(given, "int4") == {"rise": 0.03, "kl": 0.3, "disagreement": 0.2}


def test_the_value_has_to_be_below_the_limit_by_its_error():
    allowed = {"rise": 0.05}
    assert judge(quality(0.04, 0.0049), allowed).passed
    assert not judge(quality(0.04, 0.0051), allowed).passed
    assert not judge(quality(0.051, 0.0), allowed).passed
    assert judge(quality(-0.2, 0.1), allowed).passed


def test_few_degrees_of_freedom_widen_the_error():
    error = 0.01 / quantile(2, 7)
    assert judge(quality(0.039, error, freedom=7), {"rise": 0.05}).passed
    assert judge(quality(0.039, 0.0049, freedom=500), {"rise": 0.05}).passed
    assert not judge(quality(0.039, 0.0049, freedom=7), {"rise": 0.05}).passed


def test_several_ways_to_make_a_variant_widen_the_error():
    assert judge(quality(0.039, 0.0052), {"rise": 0.05}, corrections(1, True)).passed
    as_asked = judge(quality(0.039, 0.0052), {"rise": 0.05}, corrections(11, True))
    assert not as_asked.passed and as_asked.corrected_for == 2
    assert not judge(quality(0.039, 0.0045), {"rise": 0.05}, corrections(11, False)).passed
    assert judge(quality(0.039, 0.0035), {"rise": 0.05}, corrections(11, False)).passed


def test_text_of_one_document_shows_nothing_and_the_line_says_what_to_do():
    alone = quality(-0.2, math.nan, freedom=0.0, kl=Estimate(0.0, math.nan), agreement=Estimate(1.0, math.nan))
    verdict = judge(alone, {"rise": 0.05, "kl": 0.1, "disagreement": 0.1})
    assert [check.passed for check in verdict.checks] == [False] * 3
    assert describe_missed(verdict) == ONE_CLUSTER["general"]
    several = {"held_out": quality(0.121, 0.013)["general"], **alone}
    assert describe_missed(judge(several, {"rise": 0.05})) == (
        f"perplexity rises by 12.1 ± 1.3 % on held-out text, and the limit is 5 %; {ONE_CLUSTER['general']}"
    )


def test_every_text_and_every_limit_counts():
    held_out, general = quality(0.01, 0.001)["general"], quality(0.2, 0.001)["general"]
    verdict = judge({"held_out": held_out, "general": general}, {"rise": 0.05})
    assert [(c.text, c.passed) for c in verdict.checks] == [("held_out", True), ("general", False)]
    assert not judge(quality(0.01, 0.001), {"rise": 0.05, "kl": 0.03}).passed
    assert not judge(quality(0.01, 0.001), {"rise": 0.05, "disagreement": 0.08}).passed
    assert judge(quality(0.01, 0.001), {"rise": 0.05, "kl": 0.05, "disagreement": 0.1}).passed


def test_missed_gate_gives_one_line_with_figure_and_limit():
    line = describe_missed(judge(quality(0.121, 0.013), {"rise": 0.05, "kl": 0.03, "disagreement": 0.05}))
    assert line == (
        "perplexity rises by 12.1 ± 1.3 % on general text, and the limit is 5 %; "
        "KL divergence is 0.0400 ± 0.0010 nats a token on general text, and the limit is 0.03; "
        "the first choice differs at 7.0 ± 1.0 % of tokens on general text, and the limit is 5 %"
    )


def test_large_error_advises_more_tokens():
    line = describe_missed(judge(quality(0.042, 0.009), {"rise": 0.05}))
    assert line == (
        "perplexity rises by 4.20 ± 0.90 % on general text, which with its error may be more than the limit of 5 %; "
        "more tokens (evaluate.max_tokens) may show that it passes"
    )


def test_limit_changes_only_the_verdict(tmp_path):
    def depends(**given):
        config = configured(variants=[{"name": "int4", **given}])
        with Workspace.claim(tmp_path / "m", config) as workspace:
            return [stage.depends(config, workspace, ("int4",)) for stage in (quantize, measure_variant)]

    (made, judged), (made_so, judged_so) = depends(), depends(gate={"rise": 0.2})
    assert made == made_so and judged != judged_so


def test_without_measuring_there_is_no_gate(tmp_path):
    config = Config.model_validate(configured(variants=["int4"]).model_dump() | {"data": None, "evaluate": None})
    with Workspace.claim(tmp_path / "m", config) as workspace:
        assert "gate" not in measure_variant.depends(config, workspace, ("int4",))
