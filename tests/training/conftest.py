"""Fixtures of LoRA adapters."""

import json
import shutil

import pytest
import torch

from tests.support.adapters import ALPHA, RANK, base_model


@pytest.fixture(scope="session")
def trained(tiny_model, tmp_path_factory):
    """`trained(base, use_rslora=True)`: the folder of a LoRA adapter for it, with factors that are not zero."""
    from peft import LoraConfig, get_peft_model

    made = {}

    def make(base, **options):
        key = (base, repr(sorted(options.items())))
        if key not in made:
            torch.manual_seed(1)
            settings = {
                "r": RANK,
                "lora_alpha": ALPHA,
                "target_modules": "all-linear",
                "task_type": "CAUSAL_LM",
                **options,
            }
            model = get_peft_model(base_model(base), LoraConfig(**settings))
            for name, parameter in model.named_parameters():
                if "lora_B" in name or (parameter.requires_grad and "lora_A" not in name):
                    with torch.no_grad():  # factors begin at 0, and what is trained whole begins at the base's own
                        parameter.add_(torch.randn_like(parameter) * 0.05)
            made[key] = tmp_path_factory.mktemp("adapter")
            model.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture
def adapter(tiny_model, trained, tmp_path):
    """An adapter that a test may change, and a function that changes its configuration."""
    folder = shutil.copytree(trained(tiny_model("llama")), tmp_path / "adapter")

    def change(**values):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return folder

    return change
