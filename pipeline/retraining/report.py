"""Report of a retraining: Markdown for the page of a CI run, and plain data for programs."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.evaluation.results import Comparison
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
        lines += ["Changed since the published model:", "", *(f"- `{change}`" for change in decision.changes), ""]
    return "\n".join(lines)


def markdown_of_failure(subject: str, line: str) -> str:
    """Return the report of a failure; the subject is the repository, or the configuration if it names none."""
    return f"## Retraining {subject}: Failed\n\n{_sentence(line)}\n"


def plain(decision: Decision) -> dict:
    """Return the decision as plain data for JSON."""
    figures = decision.comparison and decision.comparison.to_json()
    more = {"exit_code": decision.exit_code, "summary": markdown(decision)}
    return asdict(decision) | {"comparison": figures} | more


@dataclass(frozen=True)
class Summary:
    """The files that a summary is appended to: one from the command line, and one that GitHub names.

    Attributes:
        files: paths by the option or variable that names them.
    """

    files: dict[str, Path]

    @classmethod
    def open(cls, file: Path | None) -> Summary:
        """Return the summary after a check that its files can be written.

        Raises:
            ConfigError: if one cannot be written.
        """
        summary = cls({n: Path(p) for n, p in (("--summary", file), (GITHUB, os.environ.get(GITHUB))) if p})
        if problems := summary.append(""):
            raise ConfigError(problems[0])
        return summary

    def append(self, text: str) -> list[str]:
        """Append to each file, and return one line for each problem, because a problem does not change the decision."""
        problems = []
        for name, path in self.files.items():
            try:
                with open(path, "a", encoding="utf-8") as out:
                    out.write(text)
            except OSError as error:
                problems.append(f"{name} {path}: cannot be written ({error.strerror})")
        return problems


def _table(comparison: Comparison, margin: float) -> list[str]:
    new, live, gap, prompts = comparison.new, comparison.live, comparison.difference, comparison.prompts
    assert new and live and gap and prompts and comparison.compared_with, "two models were compared"
    commit = comparison.compared_with.commit or ""
    in_nats = comparison.unit == "nats per token"
    rows = [
        f"| | {comparison.unit} |" + (" perplexity |" if in_nats else ""),
        "|---|---:|" + ("---:|" if in_nats else ""),
    ]
    for name, loss in (("new", new), ("published", live)):
        row = f"| {name} | {loss.value:.4f} ± {loss.stderr:.4f} |"
        if in_nats:
            perplexity = math.exp(loss.value)
            row += f" {perplexity:.3f} ± {perplexity * loss.stderr:.3f} |"
        rows.append(row)
    rows.append(f"| new - published | {gap.value:+.4f} ± {gap.stderr:.4f} |" + (" |" * in_nats))
    how = (
        f"Loss on {comparison.tokens} tokens of {comparison.examples} held-out examples with "
        f"{prompts} different prompts, paired by {comparison.paired_by}; ± one standard error of a "
        f"sample of prompts. {_sentence(comparison.note or '')} The published model is commit `{commit[:12]}`. "
        f"The rule: better if lower by more than {comparison.quantile(margin):.2f} standard errors of the "
        f"difference ({margin:g} of many prompts of equal length)."
    )
    if comparison.paired_by == "prompt":
        how += " The models have different tokens, so bits per byte of what was to be learned are compared."
    return [*rows, "", how, ""]


def _sentence(line: str) -> str:
    return line[:1].upper() + line[1:] + ("" if line.endswith(".") else ".")
