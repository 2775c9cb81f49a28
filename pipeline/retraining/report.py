"""What came of a retraining, in Markdown for the page that a CI shows, and as plain data for machines."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.evaluation.results import Comparison
from pipeline.evaluation.student_t import quantile
from pipeline.retraining.decision import Decision

GITHUB = "GITHUB_STEP_SUMMARY"
TITLES = {"published": "Published", "not_better": "Not better, so nothing was published", "skipped": "Skipped"}


def markdown(decision: Decision) -> str:
    """Return the decision, its reason and the result's address in Markdown."""
    lines = [f"## Retraining {decision.repo}: {TITLES[decision.outcome]}", "", f"{_sentence(decision.reason)}", ""]
    if decision.url:
        lines += [f"[{decision.url}]({decision.url})", ""]
    if decision.comparison:
        lines += _table(decision.comparison, decision.margin)
    if decision.changes:
        lines += ["What changed since the live model:", "", *(f"- `{change}`" for change in decision.changes), ""]
    return "\n".join(lines)


def markdown_of_failure(subject: str, line: str) -> str:
    """That it failed, and why; the subject is the repository, or the configuration that names none."""
    return f"## Retraining {subject}: Failed\n\n{_sentence(line)}\n"


def plain(decision: Decision) -> dict:
    """The decision as JSON has it."""
    figures = decision.comparison and decision.comparison.to_json()
    more = {"exit_code": decision.exit_code, "summary": markdown(decision)}
    return asdict(decision) | {"comparison": figures} | more


@dataclass(frozen=True)
class Summary:
    """Where a summary goes: to a file that was asked for, and to the one that GitHub names.

    Attributes:
        files: each by how people know it.
    """

    files: dict[str, Path]

    @classmethod
    def open(cls, file: Path | None) -> Summary:
        """The files, which can be written.

        Raises:
            ConfigError: where one cannot.
        """
        summary = cls({n: Path(p) for n, p in (("--summary", file), (GITHUB, os.environ.get(GITHUB))) if p})
        if problems := summary.append(""):
            raise ConfigError(problems[0])
        return summary

    def append(self, text: str) -> list[str]:
        """Add to each file; what went wrong, in a line each, for the decision stands all the same."""
        problems = []
        for name, path in self.files.items():
            try:
                with open(path, "a", encoding="utf-8") as out:
                    out.write(text)
            except OSError as error:
                problems.append(f"{name} {path}: cannot be written ({error.strerror})")
        return problems


def _table(comparison: Comparison, margin: float) -> list[str]:
    in_nats = comparison.unit == "nats per token"
    rows = [
        f"| | {comparison.unit} |" + (" perplexity |" if in_nats else ""),
        "|---|---:|" + ("---:|" if in_nats else ""),
    ]
    for name, loss in (("new", comparison.new), ("live", comparison.live)):
        row = f"| {name} | {loss.value:.4f} ± {loss.stderr:.4f} |"
        if in_nats:
            perplexity = math.exp(loss.value)
            row += f" {perplexity:.3f} ± {perplexity * loss.stderr:.3f} |"
        rows.append(row)
    gap = comparison.difference
    rows.append(f"| new - live | {gap.value:+.4f} ± {gap.stderr:.4f} |" + (" |" * in_nats))
    how = (
        f"Loss on {comparison.tokens} tokens of {comparison.examples} held-out examples with "
        f"{comparison.prompts} different prompts, paired by {comparison.paired_by}; ± one standard error of a "
        f"sample of prompts. {_sentence(comparison.note)} Live is commit `{comparison.compared_with.commit[:12]}`. "
        f"The rule: better if lower by more than {quantile(margin, comparison.prompts):.2f} standard errors of the "
        f"difference ({margin:g} of many prompts)."
    )
    if comparison.paired_by == "prompt":
        how += " The models have different tokens, so bits per byte of what was to be learned are compared."
    return [*rows, "", how, ""]


def _sentence(line: str) -> str:
    return line[:1].upper() + line[1:] + ("" if line.endswith(".") else ".")
