"""Escalation of a variant that misses its gate: fallbacks are written, loaded back and measured until one passes.

The figures of each fallback are kept, so a stopped run goes on, and a changed limit measures only new fallbacks.

Each way to make the variant could pass by chance, so the gate allows for all of them (`gates.corrections`). The layers
that get eight bits are chosen on general text that the gate does not measure.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pipeline.config.schema import MeasuredRun, VariantSpec
from pipeline.errors import DataError, UserError
from pipeline.evaluation.escalation import Fallback, fallbacks, with_layers
from pipeline.evaluation.gates import corrections, judge, limits
from pipeline.evaluation.model_result import LayerLoss, ModelResult, StoredWeights, VariantSettings, Verdict
from pipeline.system.files import empty_folder, fingerprint, replace_folder
from pipeline.tracking.events import Events
from pipeline.workflow.stages.inputs import run_texts
from pipeline.workflow.stages.quantize import note_written
from pipeline.workflow.workspace import Workspace


class Escalation:
    """The escalation of one variant: its settings as requested, then its fallbacks.

    Args:
        full: folder of the full-precision model.
        measured_by: fingerprint of the dependencies of the figures, except the settings of the variant.
    """

    def __init__(
        self, config: MeasuredRun, workspace: Workspace, events: Events, name: str, full: Path, measured_by: str
    ) -> None:
        self._config, self._workspace, self._events = config, workspace, events
        self._name, self._full, self._measured_by = name, full, measured_by
        known = workspace.progress(f"quantize/{name}", "tried")
        kept = known["tried"] if known.get("measured_by") == measured_by else {}
        self._known = {key: ModelResult.model_validate(result) for key, result in kept.items()}
        self._cannot_choose = False  # layers to store in eight bits; shown once
        self._made: tuple[VariantSpec, StoredWeights] | None = None  # with files in `_folder`

    def know(self, spec: VariantSpec, result: ModelResult) -> None:
        """Keep the size and the quality of the variant with these settings."""
        self._known[fingerprint(spec.making())] = ModelResult(
            size_bytes=result.size_bytes,
            quality=result.quality,
            variant=VariantSettings(**spec.making()),
            weights=result.weights,
        )
        known = {key: result.to_json() for key, result in self._known.items()}
        self._workspace.note(f"quantize/{self._name}", tried={"measured_by": self._measured_by, "tried": known})

    def run(self) -> tuple[VariantSpec | None, list[ModelResult]]:
        """Try the settings as requested, and then each fallback, the smallest first.

        Returns:
            The first settings that passed, or None; and the results of all tries, with their verdicts.
        """
        chosen, tried = self._first_that_passes()
        if chosen is None or self._made and self._made[0] != chosen:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._made = None
        return chosen, tried

    @functools.cached_property
    def _ways(self) -> list[Fallback]:
        from pipeline.models.matrices import linear_weights, table_weights

        asked = self._config.quantize.spec(self._name)
        return fallbacks(asked, linear_weights(self._full), table_weights(self._full), self._full)

    def _first_that_passes(self) -> tuple[VariantSpec | None, list[ModelResult]]:
        asked = self._config.quantize.spec(self._name)
        tried: list[ModelResult] = []
        if as_asked := self._judged(asked, f"{self._name}, as asked for"):
            if as_asked.verdict.passed:
                return asked, [as_asked]  # as in a run that has tried nothing else yet, even if another way is smaller
            if not all(check.has_error for check in as_asked.verdict.checks):
                return None, [as_asked]  # because no other way could pass on these texts either
        ways = self._ways
        for number, fallback in enumerate(ways, 1):
            spec = self._spec(fallback)
            if spec is None:
                continue
            found = self._judged(spec, f"{self._name}, try {number} of {len(ways)}")
            if found is None:
                continue
            tried.append(found)
            if found.verdict.passed:
                return spec, tried
        return None, tried

    def _judged(self, spec: VariantSpec, label: str) -> ModelResult | None:
        """Return the figures of these settings, with their verdict; measure them if there are none."""
        known = self._known.get(fingerprint(spec.making())) or self._measure(spec, label)
        return known and known.changed(gate=self.judge(spec, known))

    def judge(self, spec: VariantSpec, result: ModelResult) -> Verdict:
        """Return the verdict on the variant with these settings, which allows for all ways that may be tried."""
        is_as_asked = spec.making() == self._config.quantize.spec(self._name).making()
        tries = corrections(len(self._ways), is_as_asked)
        return judge(result.quality, limits(self._config.quantize, self._name), tries)

    def adopt(self, spec: VariantSpec) -> None:
        """Make the variant's files with these settings; the caller must measure them in full."""
        made = self._made if self._made and self._made[0] == spec else self._make(spec, self._name)
        replace_folder(self._folder, self._workspace.quantized / self._name)
        is_as_asked = spec.making() == self._config.quantize.spec(self._name).making()
        instead = None if is_as_asked else spec
        note_written(self._config, self._workspace, self._name, made[1].to_json(), self._full, instead)

    @property
    def _folder(self) -> Path:
        return self._workspace.quantized / f"{self._name}.partial"

    def _spec(self, fallback: Fallback) -> VariantSpec | None:
        """Return the settings of a fallback; None if layers cannot be chosen: too little memory, or no text left."""
        from pipeline.inference.offload import TooLarge

        try:
            return with_layers(fallback, self._layers(fallback.spec)) if fallback.share else fallback.spec
        except (TooLarge, DataError) as error:
            if not self._cannot_choose:
                self._events.show([f"{self._name}: not tried with its most sensitive layers in eight bits: {error}"])
            self._cannot_choose = True
            return None

    def _layers(self, spec: VariantSpec) -> list[LayerLoss]:
        from pipeline.evaluation import sensitivity, texts

        config = texts.apply_plan(self._config, run_texts(self._workspace).plan)
        key, tell = f"quantize/{self._name}", self._tell(f"{self._name}: ")
        known = self._workspace.progress(key, "layers")
        return sensitivity.sensitivity(
            config,
            spec,
            self._full,
            known,
            lambda found: self._workspace.note(key, layers=found),
            tell,
            tokens=sensitivity.TOKENS,
        )

    def _measure(self, spec: VariantSpec, label: str) -> ModelResult | None:
        """Return the figures of these settings; None if the model cannot be made with them."""
        from pipeline.evaluation.evaluate import evaluate

        try:
            _, weights = self._make(spec, label)
        except UserError as error:
            self._events.show([f"{label}: {error}"])
            return None
        arguments = (self._folder, self._config, run_texts(self._workspace), self._events.progress, self._full)
        self.know(spec, evaluate(label, *arguments, in_full=False).changed(weights=weights))
        return self._known[fingerprint(spec.making())]

    def _make(self, spec: VariantSpec, label: str) -> tuple[VariantSpec, StoredWeights]:
        from pipeline.models.matrices import linear_weights, table_weights
        from pipeline.quantization.writer import Variants

        tables = table_weights(self._full) if spec.quantizes_embeddings else {}
        folders, linear = {self._name: empty_folder(self._folder)}, linear_weights(self._full)
        tell = functools.partial(self._events.progress, what=f"{label}: rounding and writing")
        license = self._workspace.read_measurement("origin").get("license")
        variants = Variants(
            [spec], folders, linear, tables, name=self._config.name, license=license, tell=self._events.progress
        )
        made = variants.make_of(self._full, tell)
        for error in variants.failed.values():
            raise error
        self._made = result = spec, StoredWeights(**asdict(made[self._name]))
        return result

    def _tell(self, before: str) -> Callable[[int, int, str], None]:
        return lambda done, total, what: self._events.progress(done, total, before + what)
