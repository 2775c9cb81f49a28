"""The question about the model: a shipped recipe, a repository on the Hub, or a folder."""

from __future__ import annotations

from pathlib import Path

import yaml

from pipeline.cli.wizard.draft import Draft
from pipeline.cli.wizard.presets import FOR_ITS_DATA
from pipeline.cli.wizard.prompts import Question
from pipeline.cli.wizard.summary import millions
from pipeline.config.loader import shipped_configs
from pipeline.planning.devices import may_have_gpu
from pipeline.planning.model import read_sizes
from pipeline.system.text_format import size

DEFAULT = "demo"


def _about(draft: Draft) -> str:
    return (
        f"The base model: a recipe ({', '.join(shipped_configs())}), a model on the Hub such as USER/MODEL, "
        "or a folder."
    )


def _take(draft: Draft, answer: str) -> None:
    recipe = answer if answer in shipped_configs() and not Path(answer).is_dir() else None
    tree = recipe_tree(recipe) if recipe else {"model": {"source": answer}}
    before = draft.tree, draft.sizes, draft.recipe
    draft.tree, draft.recipe = tree, recipe
    try:
        draft.sizes = read_sizes(draft.config().model)
        draft.fitting({})
    except Exception:
        draft.tree, draft.sizes, draft.recipe = before
        raise
    _tell(draft)


def recipe_tree(recipe: str, own_data: bool = True) -> dict:
    """Return the settings of a shipped recipe; without the data and their settings if `own_data` is False."""
    tree = yaml.safe_load(shipped_configs()[recipe].read_text(encoding="utf-8"))
    del tree["name"]
    if not own_data:
        del tree["data"]
        for section, key in (dotted.split(".") for dotted in FOR_ITS_DATA.get(recipe, ())):
            del tree[section][key]
    return tree


def _tell(draft: Draft) -> None:
    """Print the model, the machine, and how to use a GPU that is not used yet."""
    sizes, machine = draft.model_sizes, draft.machine
    fetched = sizes.fetched_bytes - sizes.here_bytes
    download = f"; {size(fetched)} to download" if fetched else ""
    draft.tell(f"{millions(sizes.parameters)} million parameters, {size(sizes.bf16_bytes)} in bf16{download}")
    has = [f"{size(machine.gpu_bytes)} of GPU memory"] if machine.has_gpu else []
    has += [f"{size(machine.host_bytes or 0)} of memory free", f"{size(machine.disk_free or 0)} of disk free"]
    draft.tell(f"{machine.name}: {', '.join(has)}")
    for advice in gpu_advice():
        draft.tell(advice)


def gpu_advice() -> list[str]:
    """Return how to use an unused GPU of this machine. Torch is imported only if there may be one."""
    from pipeline.planning.doctor import devices, missing_gpu

    if not may_have_gpu():
        return [advice] if (advice := missing_gpu()) else []
    return [device["advice"] for device in devices() if device.get("advice")]


QUESTIONS = (Question("model", "Model", _about, lambda draft: DEFAULT, _take),)
