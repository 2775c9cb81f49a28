"""The last questions: the name of the run, measuring this machine, the configuration file, and the start."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from pipeline.cli.wizard.draft import Draft
from pipeline.cli.wizard.prompts import Question, yes_or_no
from pipeline.cli.wizard.summary import show_summary
from pipeline.config.loader import load_config
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, UserError, WorkspaceError
from pipeline.planning.benchmark import read_speeds, save_speeds
from pipeline.planning.benchmark_process import LIMIT_SECONDS, measure_in_time
from pipeline.system.files import write_text


def _default_name(draft: Draft) -> str:
    source = draft.recipe or draft.config().model.source.rstrip("/")
    if draft.recipe and not draft.is_recipes_data:
        source = f"{source}-{Path(draft.tree['data']['source']).stem}"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).stem if source.endswith(".gguf") else source.split("/")[-1])
    return name.strip("-._")[:60] or "my-run"


def _take_name(draft: Draft, answer: str) -> None:
    config = draft.config({"name": answer})
    if config.publish.repo:
        from pipeline.publishing.commit import check_destination

        check_destination(config.publish.repo, config.name)
    draft.set({"name": answer})


def _take_file(draft: Draft, answer: str) -> None:
    """Write the configuration. Ask before another configuration is replaced."""
    path = Path(answer).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{answer}: not the name of a configuration file. Try: a name that ends in .yaml")
    if not path.parent.is_dir():
        raise ConfigError(f"{answer}: the folder {path.parent} does not exist. Try: mkdir -p {path.parent}")
    config = draft.config()
    if path.exists() and not _says(path, config) and not draft.overwrite:
        _ask_to_replace(draft, path)
    tree = {key: draft.tree[key] for key in Config.model_fields if key in draft.tree}
    body = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    about = f"# Written by the wizard. To start or resume this run: {draft.command('run', path)}\n"
    try:
        write_text(path, about + body)
    except OSError as error:
        raise ConfigError(f"{answer}: cannot be written ({error.strerror})") from None
    draft.written = path
    draft.too_large = not show_summary(draft).fits


def _says(path: Path, config: Config) -> bool:
    """Return True if the file holds the same configuration."""
    try:
        return load_config(path) == config
    except UserError:
        return False


def _ask_to_replace(draft: Draft, path: Path) -> None:
    taken = ConfigError(f"{path}: exists with another configuration. Try: another file name, or --overwrite")
    if draft.confirm is None:
        raise taken
    if not draft.confirm(f"{path} exists with another configuration. Replace it? yes or no [no]: "):
        raise taken


def _to_be_measured(draft: Draft) -> bool:
    """Return True if this machine was not measured before, or an option asks for it."""
    if "calibrate" in draft.given:
        return True
    known = read_speeds()
    return (known is None or known.place != draft.machine.name) and (draft.interactive or draft.is_known("calibrate"))


def _take_calibrate(draft: Draft, answer: str) -> None:
    if not yes_or_no(answer):
        return
    try:
        save_speeds(measure_in_time(draft.machine.name, lambda what: draft.tell(f"measuring: {what}")))
    except WorkspaceError as error:  # the run does not need the speeds
        draft.tell(str(error))


def _take_run(draft: Draft, answer: str) -> None:
    draft.start = yes_or_no(answer)


QUESTIONS = (
    Question(
        "name",
        "Name of the run",
        lambda draft: f"The run's folder is {draft.runs}/NAME; trackers show the same name.",
        _default_name,
        _take_name,
    ),
    Question(
        "calibrate",
        "Measure this machine",
        lambda draft: (
            "Needed once to forecast the duration of runs; takes about twenty seconds, and at most "
            f"{LIMIT_SECONDS:.0f}."
        ),
        lambda draft: "yes" if draft.interactive else "no",
        _take_calibrate,
        _to_be_measured,
        "no-calibrate",
    ),
    Question(
        "file",
        "Configuration file",
        lambda draft: "All answers as YAML: read it, change it, run it again. It contains no token.",
        lambda draft: f"{draft.tree['name']}.yaml",
        _take_file,
    ),
    Question(
        "run",
        "Start now",
        lambda draft: "You can stop the run at any time with Ctrl-C, and resume it later.",
        lambda draft: "no" if draft.too_large else "yes",
        _take_run,
        denies="no-run",
    ),
)
