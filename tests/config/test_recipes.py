"""The shipped recipes: values that fit their models, and comments that state true sizes."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from pipeline.config.loader import load_config, shipped_configs
from pipeline.config.schema import Config
from pipeline.models.matrices import PLAIN_TABLE, embedding_kind, linear_weights
from pipeline.quantization.formats import storage
from tests.support.recipes import MODELS, RECIPES

GATED = ("google/", "meta-llama/")
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # a code, a scale of 8 bits for 64, a scale of those for 256 of them
TRAINED_BYTES = 4 + 4 + 2  # a float32 value and its gradient, two moments of 8 bits

each_recipe = pytest.mark.parametrize("recipe", MODELS)


@cache
def sizes(recipe: str) -> tuple[int, dict[str, tuple[int, int]]]:
    """Parameters of the recipe's model, and the shapes of its linear layers; no weight is made."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(MODELS[recipe][1])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return model.num_parameters(), linear_weights(Path(folder))


def weights(recipe: str) -> tuple[int, int]:
    """Weights in linear layers, and all the others."""
    parameters, shapes = sizes(recipe)
    linear = sum(rows * columns for rows, columns in shapes.values())
    return linear, parameters - linear


def lora_weights(recipe: str) -> int:
    rank = load_config(recipe).train.lora.rank
    return sum(rank * (rows + columns) for rows, columns in sizes(recipe)[1].values())


def text_of(recipe: str) -> str:
    return shipped_configs()[recipe].read_text(encoding="utf-8")


def prose(recipe: str) -> str:
    """The comments, as running text."""
    return " ".join(line.partition("#")[2].strip() for line in text_of(recipe).splitlines())


def test_every_shipped_recipe_has_a_test_model():
    assert set(MODELS) == set(RECIPES) == set(shipped_configs()) - {"demo"}


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_a_recipe_is_valid_and_its_run_has_its_name(name):
    assert load_config(name).name == name


@each_recipe
def test_the_sizes_that_are_checked_against_are_the_models_own(recipe):
    assert sizes(recipe)[0] == MODELS[recipe][0]


@each_recipe
def test_the_int4_group_size_divides_every_width(recipe):
    spec = load_config(recipe).quantize.spec("int4")
    for name, (_, width) in sizes(recipe)[1].items():
        assert storage("torchao").grid(spec, width).group_size == spec.group_size, name
        assert f"{width}" in prose(recipe)


@each_recipe
def test_training_sequences_fit_the_models_positions(recipe):
    limit, asked = MODELS[recipe][1]["max_position_embeddings"], load_config(recipe).train.max_length
    assert asked <= limit and f"{limit}" in prose(recipe)


@each_recipe
def test_lora_targets_exist_and_have_the_stated_size(recipe):
    trained = lora_weights(recipe)
    share = f"{100 * trained / sizes(recipe)[0]:.1f}".removesuffix(".0")
    assert load_config(recipe).train.lora.target_modules == "all-linear"
    assert f"on all linear layers: {trained / 1e6:.1f} M weights, {share} % of the model" in prose(recipe)


@each_recipe
def test_memory_in_recipe_comments_matches_the_sizes(recipe):
    (linear, rest), trained = weights(recipe), lora_weights(recipe)
    parts = [linear * NF4_BYTES / 1e9, rest * 2 / 1e9, trained * TRAINED_BYTES / 1e9]
    said = f"{parts[0]:.2f} + {parts[1]:.2f} + {parts[2]:.2f} = {sum(parts):.1f} GB"
    assert said in prose(recipe) and f"{linear / 1e9:.2f} G weights" in prose(recipe)
    assert f"{rest / 1e9:.2f} G others" in prose(recipe) and f"{trained / 1e6:.1f} M trained" in prose(recipe)


@each_recipe
def test_int4_size_in_recipe_comments_matches_the_sizes(recipe):
    spec, (linear, rest) = load_config(recipe).quantize.spec("int4"), weights(recipe)
    group, table = spec.group_size, 1 if spec.quantizes_embeddings else 2  # bytes
    bits = 4 + 32 / group  # a scale and a zero of 16 bits each for every group
    stored, kept, saved = (f"{x / 1e9:.2f}" for x in (linear * bits / 8, rest * table, linear * 16 / group / 8))
    said = f"{group} stores {bits:g} bits for each weight: {stored} GB, and {kept} GB for "
    assert said in prose(recipe) and f"Groups of {2 * group} would save {saved} GB." in prose(recipe)


@each_recipe
def test_int4_has_embeddings_in_8_bits_if_stock_transformers_loads_them(recipe):
    is_plain = embedding_kind(MODELS[recipe][1]) == PLAIN_TABLE
    assert load_config(recipe).quantize.spec("int4").quantizes_embeddings == is_plain


@each_recipe
def test_every_key_differs_from_its_default_or_has_a_comment(recipe):
    lines = text_of(recipe).splitlines()
    for path, value, line in leaves(yaml.compose(text_of(recipe))):
        commented = "#" in lines[line] or lines[line - 1].lstrip().startswith("#")
        assert commented or value != default_of(path), ".".join(path)


@each_recipe
def test_gated_recipe_model_is_explained(recipe):
    gated = load_config(recipe).model.source.startswith(GATED)
    assert ("Gated: accept" in prose(recipe) and "hf auth login" in prose(recipe)) == gated
    assert ("not gated" in prose(recipe)) != gated


def leaves(node: yaml.Node, path: tuple[str, ...] = ()):
    """(path, value, line) of every value in a mapping of mappings; a list is one value."""
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode):
            yield from leaves(value, (*path, key.value))
        else:
            plain = yaml.safe_load(yaml.serialize(value))
            yield (*path, key.value), plain, value.start_mark.line


def default_of(path: tuple[str, ...]):
    section: Any = Config
    for name in path[:-1]:
        kind = section.model_fields[name].annotation
        section = next(k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel))
    return section.model_fields[path[-1]].default
