"""The text that models are calibrated on: a mixture of sources, by default training data and general text.

It is never a text that anything is measured on. On text of one kind alone, a model would lose more on others.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import REPO_ID, Config, Data, MeasuredRun, TrainingRun
from pipeline.data import Example, check_source, load_examples, plain_text
from pipeline.data.sources import BUILTIN, is_builtin, locate, names_a_file
from pipeline.errors import DataError
from pipeline.system.files import fingerprint, sha256
from pipeline.system.redaction import file_name
from pipeline.workflow.stages.inputs import hashes_of, run_texts, text_depends
from pipeline.workflow.stages.training_data import pinned
from pipeline.workflow.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.data.encode import Encoded

GENERAL_TEXT = "general"  # a source: the part of `evaluate.general` that nothing is measured on
CHARACTERS_PER_TOKEN = 16  # more than usual; so much text is tokenized
FEWEST_WINDOWS = 4  # to train on, and to choose the best values on
PIECES = 64  # at most, of a long text at equal distances


def is_needed(config: Config) -> bool:
    """Return True if a variant needs calibration text."""
    return bool(config.quantize.calibrated or config.quantize.targeted)


def check_sources(config: Config) -> None:
    """Raise an error if a source cannot be read, or is measured on, as far as that is known without a model.

    Touches no network: of a data set on the Hub only the name is checked.

    Raises:
        DataError: naming the source.
    """
    for source in config.quantize.calibration.sources if is_needed(config) else ():
        if source == GENERAL_TEXT:
            if not isinstance(config, MeasuredRun):
                raise DataError(
                    f"quantize.calibration.source {source}: nothing is measured, so there is no general text. "
                    "Try: a .txt file, or --measure"
                )
            continue
        with _errors_of_source():
            if _is_plain(source):
                plain_text(source)
            else:
                check_source(Data(source=source))
        if isinstance(config, MeasuredRun) and _is_same_file(source, config.evaluate.general):
            raise DataError(
                f"quantize.calibration.source {source}: is the general text, which is measured on. Try: "
                f"{GENERAL_TEXT}, its part that is not measured"
            )


def look_up(source: str) -> None:
    """Raise DataError if a source is the name of a data set that cannot be read on the Hub."""
    from pipeline.data.hub import peek

    with _errors_of_source():
        if source != GENERAL_TEXT and not is_builtin(source) and locate(source) is None:
            peek(Data(source=source))


@contextlib.contextmanager
def _errors_of_source() -> Iterator[None]:
    """Advise another source in errors, instead of keys of the section `data`."""
    try:
        yield
    except DataError as error:
        problem = re.split(r"; |\. Try: |: correct ", str(error))[0]
        raise DataError(f"quantize.calibration.source: {problem}. Try: another file, data set, or {BUILTIN}") from None


def check(config: Config, workspace: Workspace, model: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Raise an error before long work if the text is too short, or shares text with what is measured on.

    Args:
        model, tokenizer: as in `windows`.

    Raises:
        DataError: naming the key.
    """
    if is_needed(config):
        windows(config, workspace, model, config.quantize.calibration.tokens, tokenizer)
    check_for_distillation(config, workspace, model, tokenizer)


def check_for_distillation(
    config: Config, workspace: Workspace, model: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raise DataError if scales are to be trained, and the text is too short for that."""
    if config.quantize.distilled:
        found = windows(config, workspace, model, config.quantize.distillation.tokens, tokenizer)
        if len(found) < FEWEST_WINDOWS:
            raise DataError(
                f"quantize.quality distilled: needs {FEWEST_WINDOWS} windows of {len(found[0])} tokens, and the text "
                f"has {len(found)}. Try: more text, or quantize.quality=calibrated"
            )


def _is_plain(source: str) -> bool:
    return source.lower().endswith(".txt")


def _is_same_file(one: str, other: str) -> bool:
    first, second = (Path(source).expanduser() for source in (one, other))
    return first.exists() and second.exists() and first.samefile(second)


def depends(config: Config, workspace: Workspace) -> dict:
    """Return the dependencies of the text as plain data."""
    if sources := config.quantize.calibration.sources:
        found: dict[str, object] = {s: hashes_of(workspace, s) for s in sources if s != GENERAL_TEXT}
        return found | ({GENERAL_TEXT: measured(config, workspace)} if GENERAL_TEXT in sources else {})
    # Training examples that share text with what is measured on are left out.
    return {"train": workspace.state_of("train"), "measured": measured(config, workspace)}


def measured(config: Config, workspace: Workspace) -> dict | None:
    """Return the dependencies of the texts that models are measured on."""
    if not isinstance(config, MeasuredRun):
        return None
    return {"max_tokens": config.evaluate.max_tokens, "general": text_depends(config, workspace)}


def windows(
    config: Config, workspace: Workspace, model: Path, tokens: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[list[int]]:
    """Return windows of tokens of the calibration text, from each source in turn, of at most `tokens` together.

    Args:
        model: the folder of the model that reads them.
        tokenizer: by default that of the model, with the chat template of the run's training.

    Raises:
        DataError: if it is too short, or if a text of its own shares text with what is measured on.
    """
    from pipeline.evaluation import texts
    from pipeline.evaluation.model_result import TEXTS
    from pipeline.models.checkpoint_files import read_config
    from pipeline.models.context import context_length
    from pipeline.models.safe_loading import open_tokenizer
    from pipeline.quantization.calibration.text import WINDOW, check_apart, windows_of, without_shared

    tokenizer = tokenizer or texts.restore_template(open_tokenizer(model), run_texts(workspace))
    context = context_length(read_config(model))
    window = min(WINDOW, context or WINDOW)
    sources = config.quantize.calibration.sources
    if sources:
        found = [_of_source(config, workspace, tokenizer, source, window, tokens, context) for source in sources]
    else:
        assert isinstance(config, TrainingRun), "checked before the run"
        data = pinned(config, workspace)
        examples = load_examples(data, config.train.loss_on).train
        found = [_encoded(config, data, examples, tokenizer, window, tokens)]
        with contextlib.suppress(DataError):  # a short general text is measured as a whole
            found.append(texts.general_unmeasured(config, tokenizer, context, tokens))
        workspace.note("calibrate", mixed=len(found) > 1)
    is_own = [source != GENERAL_TEXT for source in sources] or [False] * len(found)
    if isinstance(config, MeasuredRun):
        for name, others in texts.all_texts(config, run_texts(workspace), tokenizer, context).items():
            check_apart([*chain(*(of for of, own in zip(found, is_own, strict=True) if own))], others, TEXTS[name])
            found = [of if own else without_shared(of, others) for of, own in zip(found, is_own, strict=True)]
    if not sources and min(sum(len(part.input_ids) for part in of) for of in found) < window:
        found = [[*chain(*found)]]  # little training data makes windows together with general text
    cut = partial(windows_of, tokens=tokens, window=window)
    mixed = [window for turn in zip_longest(*map(cut, found)) for window in turn if window is not None]
    return mixed[: max(1, tokens // window)]


def _of_source(
    config: Config,
    workspace: Workspace,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    window: int,
    tokens: int,
    context: int | None,
) -> list[Encoded]:
    from pipeline.data.encode import encode_documents

    if source == GENERAL_TEXT:
        from pipeline.evaluation import texts

        assert isinstance(config, MeasuredRun), "checked before the run"
        return texts.general_unmeasured(config, tokenizer, context, tokens)
    if _is_plain(source):
        pieces = max(1, min(PIECES, tokens // window // len(config.quantize.calibration.sources)))
        try:
            return encode_documents(_spread(plain_text(source), tokens, pieces), tokenizer, window, 2 * tokens)
        except DataError:  # of fewer tokens than any window has
            raise DataError(f"quantize.calibration.source {source}: the text is too short. Try: more text") from None
    known = workspace.progress("calibrate", "revisions")
    data = Data(source=source, revision=known.get(source))
    with _errors_of_source():
        read = load_examples(data, config.train.loss_on)
    if read.revision and source not in known:  # a branch on the Hub stays at its first commit
        workspace.note("calibrate", revisions={**known, source: read.revision})
    return _encoded(config, data, read.train, tokenizer, window, tokens)


def _encoded(
    config: Config,
    data: Data,
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    tokens: int,
) -> list[Encoded]:
    """Return the tokens of as many examples as are needed; their order was shuffled with the seed of the data."""
    from pipeline.data.encode import accepted_examples, encode_examples

    needed, taken = CHARACTERS_PER_TOKEN * tokens, []
    for example in examples:
        taken.append(example)
        needed -= len(str(example))
        if needed < 0:
            break
    if data.on_bad_row == "skip":  # in data that is read again, training has left them out
        taken = [*accepted_examples(taken, tokenizer)]
    return encode_examples(taken, tokenizer, config.train.loss_on, window).examples


def _spread(text: str, tokens: int, count: int) -> list[str]:
    """Return a text, or pieces of it at equal distances that have enough tokens together."""
    length = CHARACTERS_PER_TOKEN * tokens // count
    if len(text) <= count * length or count == 1:
        return [text]
    starts = [number * (len(text) - length) // (count - 1) for number in range(count)]
    return [text[start : start + length].partition("\n")[2] or text[start : start + length] for start in starts]


def about(config: Config, workspace: Workspace) -> dict:
    """Return the sources for cards, and the digest of their content; nothing for the training data.

    Files are named without their folders.
    """
    if not (sources := config.quantize.calibration.sources):
        return {"calibration_mixed": workspace.progress("calibrate", "mixed")}
    revisions = workspace.progress("calibrate", "revisions")
    contents = [
        None if source == GENERAL_TEXT else [*hashes_of(workspace, source).values()] or revisions.get(source)
        for source in sources
    ]
    return {"calibration_text": ", ".join(map(_named, sources)), "calibration_digest": fingerprint(contents)}


def digest_now(config: Config) -> str | None:
    """Return the digest of the present content of all sources; None if there are none, or a file is gone.

    From the Hub only commits are read.
    """
    from pipeline.data.hub import commit_of

    contents: list[object] = []
    for source in config.quantize.calibration.sources:
        path = Path(source).expanduser()
        if source == GENERAL_TEXT or is_builtin(source):
            contents.append(None)
        elif path.is_file():
            contents.append([sha256(path)])
        elif names_a_file(source):
            return None
        else:
            contents.append(commit_of(Data(source=source)))
    return fingerprint(contents) if contents else None


def _named(source: str) -> str:
    if source == GENERAL_TEXT or is_builtin(source):
        return source
    is_on_hub = REPO_ID.match(source) and not names_a_file(source) and not Path(source).expanduser().exists()
    return source if is_on_hub else file_name(source)
