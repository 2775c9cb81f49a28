"""The reference of configuration keys in docs/ is the one that the schema gives."""

from __future__ import annotations

from pipeline.config.document import markdown
from pipeline.config.schema import Config
from tests.support import REPOSITORY


def test_configuration_page_is_up_to_date():
    page = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == markdown() + "\n", "write it again: tunepress schema --markdown > docs/configuration.md"


def test_every_key_has_a_description():
    schema = Config.model_json_schema()
    sections = {"": schema, **schema["$defs"]}
    missing = [
        f"{section}.{key}"
        for section, part in sections.items()
        for key, field in part["properties"].items()
        if not field.get("description")
    ]
    assert missing == []
