"""The list of modules that stock loaders skip names the model's own output head."""

import pytest
from transformers import AutoConfig

from pipeline.models.matrices import skipped_modules

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("kind", "head"), [("llama", "lm_head"), ("biogpt", "output_projection"), ("gpt_neox_japanese", "embed_out")]
)
def test_list_of_skipped_modules_names_the_output_head(tmp_path, kind, head):
    AutoConfig.for_model(kind, **SHAPE).save_pretrained(tmp_path)
    assert skipped_modules(tmp_path, ["a"]) == [head, "a"]
    assert skipped_modules(tmp_path, []) is None
