"""Metrics: every figure equals an independent computation of its definition."""

import math

import pytest
import torch
from torch.nn import functional

from pipeline.data.encode import Encoded
from pipeline.errors import ModelError
from pipeline.evaluation import metrics
from pipeline.evaluation.metrics import Scores
from pipeline.evaluation.model_result import Estimate
from pipeline.inference import output_head
from pipeline.inference.output_head import HeadNames
from tests.support.architectures import build
from tests.support.models import random_text

LENGTHS = (40, 7, 23, 2, 64, 23)


def from_stock(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(scope="module")
def model(tiny_model):
    return from_stock(tiny_model("llama"))


@pytest.fixture(scope="module")
def other(tiny_model):
    return from_stock(tiny_model("llama", initializer_range=0.12))


def counted_logits(model, sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own logits (T, V) at every counted token, one sequence after the other, and the tokens (T,)."""
    logits, targets = [], []
    with torch.no_grad():
        for sequence in sequences:
            out = model(torch.tensor([sequence.input_ids])).logits[0, :-1].float()
            labels = torch.tensor(sequence.labels[1:])
            logits.append(out[labels != -100])
            targets.append(labels[labels != -100])
    return torch.cat(logits), torch.cat(targets)


head = output_head.head_of


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_perplexity_is_exp_of_the_mean_cross_entropy(any_model, dtype, tolerance):
    model = from_stock(any_model, dtype)
    scores = metrics.score(model, random_text())
    expected = functional.cross_entropy(*counted_logits(model, random_text()))
    assert metrics.perplexity(scores).value == pytest.approx(math.exp(expected), rel=tolerance)


def test_tokens_that_do_not_count_and_first_tokens_are_left_out(model):
    scores = metrics.score(model, random_text())
    assert len(scores.nll) == sum(label != -100 for s in random_text() for label in s.labels[1:])
    assert scores.cluster.unique().tolist() == list(range(len(LENGTHS)))
    assert scores.hidden.shape == (len(scores.nll), 160)
    counts = [sum(label != -100 for label in s.labels) for s in random_text()]
    assert torch.bincount(scores.cluster).tolist() == counts


def test_a_label_on_the_first_token_changes_nothing(model):
    sequences = random_text()
    with_first = [Encoded(s.input_ids, [s.input_ids[0], *s.labels[1:]]) for s in sequences]
    assert torch.equal(metrics.score(model, sequences).nll, metrics.score(model, with_first).nll)


@pytest.mark.parametrize("budget", [1, 50, 10_000])
def test_padding_and_batching_change_nothing(model, monkeypatch, budget):
    alone = [metrics.score(model, [sequence]) for sequence in random_text()]
    monkeypatch.setattr(metrics, "BATCH_TOKENS", budget)
    together = metrics.score(model, random_text())
    assert torch.allclose(together.nll, torch.cat([s.nll for s in alone]), atol=1e-4)
    assert torch.equal(together.choice, torch.cat([s.choice for s in alone]))
    assert torch.allclose(together.hidden, torch.cat([s.hidden for s in alone]), atol=1e-4)


def test_batches_hold_every_sequence_once_and_no_more_than_they_may(monkeypatch):
    monkeypatch.setattr(metrics, "BATCH_TOKENS", 50)
    batches = metrics._batches(random_text())
    assert sorted(i for batch in batches for i in batch) == list(range(len(LENGTHS)))
    assert all(len(b) == 1 or len(b) * max(LENGTHS[i] for i in b) <= 50 for b in batches)
    assert len(batches) < len(LENGTHS)


def test_logits_are_computed_in_pieces_without_a_trace(model, other, monkeypatch):
    def figures():
        a, b = metrics.score(model, random_text()), metrics.score(other, random_text())
        return a.nll, metrics.divergence(a, head(model), b, head(other)).kl.value

    (nll, kl) = figures()
    monkeypatch.setattr(output_head, "LOGIT_ELEMENTS", 272 * 3)
    assert torch.allclose(figures()[0], nll, atol=1e-5) and figures()[1] == pytest.approx(kl, rel=1e-5)


def test_error_depends_on_the_number_of_clusters_and_not_of_tokens():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    one, many = (metrics.mean(values.repeat(n), torch.arange(50 * n)) for n in (1, 16))
    assert many.stderr == pytest.approx(one.stderr / 4, rel=0.02)
    longer = metrics.mean(values.repeat_interleave(100), torch.arange(50).repeat_interleave(100))
    assert longer.stderr == pytest.approx(one.stderr)


def test_single_cluster_has_no_error():
    estimate = metrics.mean(torch.rand(30), torch.zeros(30, dtype=torch.long))
    assert math.isnan(estimate.stderr) and 0 < estimate.value < 1


def test_the_error_of_perplexity_is_that_of_the_loss_times_perplexity(model):
    scores = metrics.score(model, random_text())
    loss, perplexity = metrics.mean(scores.nll, scores.cluster), metrics.perplexity(scores)
    assert perplexity.stderr == pytest.approx(perplexity.value * loss.stderr) and loss.stderr > 0


def test_a_model_does_not_diverge_from_itself(model):
    scores = metrics.score(model, random_text())
    found = metrics.divergence(scores, head(model), scores, head(model))
    assert found.kl == Estimate(0, 0) and found.agreement == Estimate(1, 0)


def test_divergence_is_that_of_the_full_distributions_from_the_reference(model, other):
    reference, scores = metrics.score(model, random_text()), metrics.score(other, random_text())
    found = metrics.divergence(scores, head(other), reference, head(model))
    p, q = (counted_logits(m, random_text())[0].log_softmax(-1) for m in (model, other))
    expected = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert found.kl.value == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found.kl.stderr == pytest.approx(metrics.mean(expected, scores.cluster).stderr, rel=1e-3)
    backwards = functional.kl_div(p, q, log_target=True, reduction="none").sum(-1).mean()
    assert abs(float(backwards) - float(expected.mean())) > 1e-3 * float(expected.mean())
    same = (p.argmax(-1) == q.argmax(-1)).float()
    assert found.agreement.value == pytest.approx(float(same.mean()))


def test_scores_of_other_tokens_are_not_compared(model):
    a, b = metrics.score(model, random_text()), metrics.score(model, random_text(LENGTHS[:-1]))
    with pytest.raises(ModelError, match="not scored on the same tokens"):
        metrics.divergence(a, head(model), b, head(model))


def scores_of(nll: torch.Tensor, cluster: torch.Tensor) -> Scores:
    return Scores(nll, torch.zeros(len(nll), dtype=torch.long), cluster, torch.zeros(len(nll), 1))


def test_the_rise_is_the_ratio_of_the_perplexities(model, other):
    reference, scores = metrics.score(model, random_text()), metrics.score(other, random_text())
    ratio = metrics.perplexity(scores).value / metrics.perplexity(reference).value
    assert metrics.rise(scores, reference).value == pytest.approx(ratio - 1, rel=1e-5)


def test_rise_is_paired_per_token():
    generator = torch.Generator().manual_seed(0)
    hard, sequence = torch.rand(200, generator=generator) * 10, torch.arange(40).repeat_interleave(5)
    steady = metrics.rise(scores_of(hard + 0.01, sequence), scores_of(hard, sequence))
    assert steady.value == pytest.approx(math.exp(0.01) - 1, rel=1e-3) and steady.stderr < 1e-6
    noise = torch.randn(200, generator=generator) * 0.1
    noisy = metrics.rise(scores_of(hard + noise, sequence), scores_of(hard, sequence))
    difference = metrics.mean(noise, sequence)
    assert noisy.stderr == pytest.approx(math.exp(difference.value) * difference.stderr, rel=1e-3)


def test_scores_survive_the_disk(model, tmp_path):
    scores = metrics.score(model, random_text())
    scores.save(tmp_path / "deep" / "scores.safetensors", HeadNames("lm_head.weight"))
    back = Scores.load(tmp_path / "deep" / "scores.safetensors")
    for part in ("nll", "choice", "cluster", "hidden"):
        assert torch.equal(getattr(back, part), getattr(scores, part))


def test_progress_counts_tokens_to_the_end(model):
    seen = []
    metrics.score(model, random_text(), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (sum(LENGTHS), sum(LENGTHS)) and seen == sorted(seen)


@pytest.mark.parametrize(
    "sequences", [[], [Encoded([1, 2, 3], [-100] * 3)], [Encoded([1], [1])]], ids=["none", "no label", "one token"]
)
def test_a_text_without_a_token_that_counts_is_refused(model, sequences):
    with pytest.raises(ModelError, match="no token that counts"):
        metrics.score(model, sequences)


@pytest.mark.parametrize(
    "kind, changes, settings, bias",
    [
        ("gemma2", {"final_logit_softcapping": 0.5}, (1.0, 0.5), False),
        ("recurrent_gemma", {"logits_soft_cap": 0.2}, (1.0, 0.2), False),
        ("granite", {"logits_scaling": 4.0}, (0.25, None), False),
        ("minicpm3", {"dim_model_base": 16}, (0.25, None), False),
        ("hyperclovax", {"logits_scaling": 0.25}, (0.25, None), False),
        ("cohere", {"logit_scale": 0.25}, (0.25, None), False),
        ("phi", {}, (1.0, None), True),
        ("gptj", {}, (1.0, None), True),
    ],
)
def test_bias_scale_and_bound_of_the_logits_are_part_of_every_figure(tmp_path, kind, changes, settings, bias):
    a, b = build(kind, **changes), build(kind, seed=1, **changes)
    assert output_head.logit_settings(a.config) == pytest.approx(settings)
    names = output_head.head_names(a)
    assert bool(names.bias) == bias
    reference, scores = metrics.score(a, random_text()), metrics.score(b, random_text())
    logits, targets = counted_logits(a, random_text())
    assert metrics.mean(reference.nll, reference.cluster).value == pytest.approx(
        float(functional.cross_entropy(logits, targets)), rel=1e-5
    )
    p, q = logits.log_softmax(-1), counted_logits(b, random_text())[0].log_softmax(-1)
    expected = pytest.approx(float(functional.kl_div(q, p, log_target=True, reduction="batchmean")), rel=1e-3)
    assert metrics.divergence(scores, head(b), reference, head(a)).kl.value == expected
    a.save_pretrained(tmp_path)  # the same from the files of the reference
    reference.save(tmp_path / "scores.safetensors", names)
    assert Scores.saved_head(tmp_path / "scores.safetensors") == names
    assert metrics.divergence(scores, head(b), reference, names.read(tmp_path)).kl.value == expected


@pytest.mark.parametrize("change", ["scale", "head"])
def test_logits_that_are_computed_in_another_way_are_refused_by_the_models_name(monkeypatch, change):
    model = build("cohere", logit_scale=0.25)
    if change == "scale":  # as in an architecture that has another name for it
        monkeypatch.setattr(output_head, "_MULTIPLIERS", ())
    else:
        model.lm_head.register_forward_hook(lambda layer, given, logits: logits.abs())
    with pytest.raises(ModelError, match="^cohere: its logits are more than its last hidden states times a matrix"):
        metrics.score(model, random_text())


def test_a_broken_model_is_refused_and_not_measured(tiny_model):
    model = from_stock(tiny_model("llama"))
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ModelError, match="logits are not finite"):
        metrics.score(model, random_text())


def test_a_model_under_an_adapter_is_scored_with_the_adapter(tiny_model):
    from peft import LoraConfig, get_peft_model

    plain = metrics.score(from_stock(tiny_model("qwen3")), random_text())
    model = get_peft_model(
        from_stock(tiny_model("qwen3")), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    assert torch.allclose(metrics.score(model, random_text()).nll, plain.nll, atol=1e-5)  # B is still zero
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    scores = metrics.score(model.eval(), random_text())
    expected = functional.cross_entropy(*counted_logits(model, random_text()))
    assert metrics.mean(scores.nll, scores.cluster).value == pytest.approx(float(expected), rel=1e-5)
    assert not torch.allclose(scores.nll, plain.nll, atol=1e-2)


@pytest.mark.parametrize(
    "architecture, name",
    [("llama", "lm_head.weight")] + [(a, "model.embed_tokens.weight") for a in ("qwen3", "smollm3", "gemma3_text")],
)
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
def test_the_output_matrix_is_found_in_the_checkpoint(tiny_model, architecture, name, adapter):
    from peft import LoraConfig, get_peft_model

    from pipeline.models.checkpoint import Checkpoint

    folder = tiny_model(architecture)
    model = from_stock(folder, torch.bfloat16)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert output_head.head_names(model) == HeadNames(name)
    assert torch.equal(Checkpoint(folder).read(name), model.get_output_embeddings().weight)
