"""The published JSON schema: only words that JSON Schema has, and the same answers as the configuration itself."""

from __future__ import annotations

import json

import jsonschema
import pytest
import yaml
from jsonschema import Draft202012Validator

from pipeline.config.document import json_schema
from pipeline.config.loader import shipped_configs
from tests.config.test_refused_configs import BROKEN
from tests.support.configs import SMALLEST

# JSON Schema ignores unknown words. This meta schema refuses them, in every part of a schema.
STRICT = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": "https://example.org/strict",
    "$dynamicAnchor": "meta",
    "$ref": "https://json-schema.org/draft/2020-12/schema",
    "unevaluatedProperties": False,
}


@pytest.fixture(scope="module")
def schema() -> dict:
    return json.loads(json.dumps(json_schema()))


def refused(schema: dict, text: str) -> list[str]:
    tree = yaml.safe_load(SMALLEST) | yaml.safe_load(text)
    return [error.json_path for error in Draft202012Validator(schema).iter_errors(tree)]


def test_the_strict_meta_schema_refuses_unknown_words():
    nested = {"properties": {"seed": {"anyOf": [{"type": "integer", "ge": 0}, {"type": "null"}]}}}
    with pytest.raises(jsonschema.ValidationError, match="'ge' was unexpected"):
        Draft202012Validator(STRICT).validate(nested)


def test_the_schema_has_only_words_of_json_schema(schema):
    assert schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    Draft202012Validator(STRICT).validate(schema)


@pytest.mark.parametrize("name", shipped_configs())
def test_an_editor_accepts_every_shipped_recipe(schema, name):
    assert refused(schema, shipped_configs()[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("written", ["int8", "[int8, INT4_weight_only]", "{name: int4}", "[int8, {name: int4}]", "[]"])
def test_an_editor_accepts_every_way_to_write_variants(schema, written):
    assert refused(schema, f"quantize: {{variants: {written}}}\n") == []


OUT_OF_BOUNDS = [
    *(text for text, said in BROKEN.items() if "greater" in said[-1] or "less" in said[-1]),
    "data: {source: tickets.jsonl, limit: 0}",
    "evaluate: {max_minutes: 0}",
    "quantize: {gate: {disagreement: 2}}",
]


@pytest.mark.parametrize("text", OUT_OF_BOUNDS)
def test_an_editor_refuses_a_number_out_of_its_bounds(schema, text):
    assert len(refused(schema, text)) == 1
