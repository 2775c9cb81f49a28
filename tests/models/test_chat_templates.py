"""Several chat templates of a model: read and copied as transformers has them."""

import json

import pytest
from transformers import AutoTokenizer

from pipeline.config.schema import Model
from pipeline.models.chat_templates import chat_templates, has_chat_template
from pipeline.models.checkpoint_files import belongs_to_checkpoint, copy_companions
from pipeline.models.sources import fetch

CHAT, TOOLS, OWN = (f"{name}: {{{{ messages[0]['content'] }}}}" for name in ("chat", "tools", "own"))


def in_files(folder, templates) -> None:
    """Write templates as transformers saves them now."""
    for name, text in templates.items():
        path = folder / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def in_a_list(folder, templates) -> None:
    """Write templates as transformers saved them before."""
    path = folder / "tokenizer_config.json"
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": listed}))


@pytest.mark.parametrize("write", [in_files, in_a_list])
@pytest.mark.parametrize(
    "templates",
    [{"chat": CHAT, "tool_use": TOOLS}, {"default": CHAT, "tool_use": TOOLS}, {"default": CHAT}, {"rag": OWN}],
    ids=["no default", "a default", "one", "one with a name"],
)
def test_every_template_arrives_in_a_copy(model_copy, tmp_path, write, templates):
    (model_copy / "chat_template.jinja").unlink()
    write(model_copy, templates)
    assert chat_templates(model_copy) == templates and has_chat_template(model_copy)
    for number in range(2):  # a copy of a copy too
        target = tmp_path / f"copy {number}"
        target.mkdir()
        copy_companions(model_copy, target)
        found = AutoTokenizer.from_pretrained(target).chat_template
        assert ({"default": found} if isinstance(found, str) else found) == templates == chat_templates(target)
        model_copy = target


def test_a_folder_without_a_template_has_none(model_copy):
    (model_copy / "chat_template.jinja").unlink()
    assert chat_templates(model_copy) == {} and not has_chat_template(model_copy)


def test_additional_templates_are_downloaded_and_nothing_else_below_the_root():
    assert belongs_to_checkpoint("additional_chat_templates/tool_use.jinja")
    others = ("additional_chat_templates/x.py", "other/x.jinja", "additional_chat_templates/a/b.jinja", "../x.jinja")
    assert not any(map(belongs_to_checkpoint, others))


def test_templates_of_a_repository_arrive_in_a_copy(hub, model_copy, tmp_path):
    (model_copy / "chat_template.jinja").unlink()
    in_files(model_copy, {"chat": CHAT, "tool_use": TOOLS})
    hub.put("ada/base", {str(p.relative_to(model_copy)): p.read_bytes() for p in model_copy.rglob("*") if p.is_file()})
    folder, _ = fetch(Model(source="ada/base"), tmp_path)
    target = tmp_path / "copy"
    target.mkdir()
    copy_companions(folder, target)
    assert AutoTokenizer.from_pretrained(target).chat_template == {"chat": CHAT, "tool_use": TOOLS}
