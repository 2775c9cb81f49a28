"""What tests share: tiny checkpoints of real architectures, and quiet libraries that cannot reach the Hub."""

from __future__ import annotations

import os
import tempfile

# Before any Hugging Face library is imported: a cache of the tests' own, and an endpoint where nobody
# listens. Tests with a hub on loopback name its address themselves.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="tunepress-tests-")
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # for tiny models a second thread costs more than it brings
os.environ["TUNEPRESS_HUB_WAIT"] = "0.01"  # seconds before a second attempt, here and in what is started from here
for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TUNEPRESS_COMMAND"):
    os.environ.pop(variable, None)

import shutil  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from pipeline.system.libraries import quiet  # noqa: E402
from tests.support.warm import COLD, WarmPython, is_possible  # noqa: E402

quiet()

WARM = "PYTEST_WARM_PYTHON"  # names the program that stands for Python, for workers


def pytest_configure(config):
    """Start the Python that processes are forked from, once for all workers, and name it to what starts processes."""
    is_worker, has_workers = hasattr(config, "workerinput"), getattr(config.option, "numprocesses", None)
    if not is_worker and is_possible():
        warm = WarmPython()
        config.add_cleanup(warm.close)
        os.environ[WARM] = str(warm.program)
    if WARM in os.environ and (is_worker or not has_workers):
        sys.executable = os.environ[WARM]


ARCHITECTURES = ("llama", "qwen3", "smollm3", "gemma3_text")

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Gemma's: a beginning of text before everything, a system message inside the first question, roles that must
# alternate, content trimmed, and an answer that ends in another token than the text.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in (messages[1:] if first else messages) %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ first if loop.first else '' }}{{ m['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_SPECIAL = ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>", "<pad>")
VOCABULARY = 272

# Widths that 128 does not divide, so that every layer's group size has to be found.
_COMMON = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 256,
    "initializer_range": 0.1,
}
_SHAPES = {
    "llama": {
        "hidden_size": 160, "intermediate_size": 192, "num_attention_heads": 4,
        "tie_word_embeddings": False, "attention_bias": True,
    },
    "qwen2": {
        "hidden_size": 96, "intermediate_size": 320, "num_attention_heads": 4, "tie_word_embeddings": False,
    },
    "qwen3": {
        "hidden_size": 96, "intermediate_size": 320, "num_attention_heads": 4, "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "smollm3": {
        "hidden_size": 160, "intermediate_size": 224, "num_attention_heads": 4,
        "tie_word_embeddings": True, "no_rope_layer_interval": 2,
    },
    "gemma3_text": {
        "hidden_size": 96, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True,
        "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
        "eos_token_id": 259, "pad_token_id": 260,
    },
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _scratch_cache():
    """The Hub cache of this run goes when the run ends."""
    yield
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture
def cold(monkeypatch):
    """Let new processes be those of the real Python, which has nothing imported yet."""
    monkeypatch.setattr(sys, "executable", COLD)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Callable[..., Path]:
    """`tiny_model("llama")`: the folder of a random bf16 checkpoint with a tokenizer; made once, not to be changed.

    Keywords change the configuration: `tiny_model("llama", hidden_size=80)`; `dtype` changes the weights' type.
    """
    made: dict[tuple, Path] = {}

    def make(architecture: str, dtype: str = "bfloat16", **changes) -> Path:
        key = (architecture, dtype, repr(sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture)
            write_model(folder, architecture, dtype, **changes)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session", params=ARCHITECTURES)
def any_model(request, tiny_model) -> Path:
    """The tiny checkpoint of each architecture in turn."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def quantized(tmp_path_factory) -> Callable[..., Path]:
    """`quantized(folder, "int4", group_size=32)`: that checkpoint beside its variant, in its own folder; made once.

    Keywords go into the `VariantSpec`; `shard_bytes` makes several shards.
    """
    from pipeline.config.schema import VariantSpec
    from pipeline.models.sources import linear_weights, table_weights
    from pipeline.quantization.writer import quantize_checkpoint

    made: dict[tuple, Path] = {}

    def make(source: Path, variant: str, shard_bytes: int = 10**9, **spec) -> Path:
        key = (source, variant, shard_bytes, repr(sorted(spec.items())))
        if key not in made:
            made[key] = Path(shutil.copytree(source, tmp_path_factory.mktemp("release") / "model"))
            asked = VariantSpec(name=variant, **spec).resolved()
            tables = table_weights(source) if asked.embeddings == "int8" else {}
            folders = {variant: made[key] / variant}
            quantize_checkpoint(
                source, [asked], folders, linear_weights(source), shard_bytes=shard_bytes, tables=tables
            )
        return made[key]

    return make


@pytest.fixture(scope="session")
def dequantized() -> Callable:
    """`dequantized(folder, "int4")`: the model with the numbers that the variant's codes mean, in plain layers."""
    from transformers import AutoModelForCausalLM

    from pipeline.config.schema import VariantSpec
    from pipeline.inference.kernels.float32_mode import quicken_products
    from pipeline.inference.kernels.plain import quicken_linears
    from pipeline.models.sources import linear_weights
    from pipeline.quantization.formats import format_of
    from pipeline.quantization.roundings import rounding

    def make(source: Path, variant: str, keep: tuple[str, ...] = (), **spec):
        asked = VariantSpec(name=variant, **spec).resolved()
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval().requires_grad_(False)
        for name in linear_weights(source):
            if name.removesuffix(".weight") in keep:
                continue
            weight = model.get_parameter(name)
            grid = format_of(asked).grid(asked, weight.shape[1])
            weight.data = rounding(asked.rounding)(weight.data, grid).dequantize(weight.dtype)
        quicken_linears(model)
        quicken_products(model)
        return model

    return make


@pytest.fixture(scope="session")
def mixture(tmp_path_factory) -> Path:
    """A tiny checkpoint of a mixture of experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("mixture")
    config = AutoConfig.for_model(
        "mixtral", vocab_size=272, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def model_copy(tiny_model, tmp_path) -> Path:
    """A tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def write_model(folder: Path, architecture: str, dtype: str = "bfloat16", **changes) -> None:
    """A random checkpoint with a tokenizer, in a folder that is made."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **{**_COMMON, **_SHAPES[architecture], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases begin at 0 and norms at 1, and would hide what goes wrong with them
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    write_tokenizer(folder, architecture)


def write_tokenizer(folder: Path, architecture: str | None = None) -> None:
    """A tokenizer of single bytes, with a chat template: ChatML, or Gemma's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if architecture == "gemma3_text":
        special, template = GEMMA_SPECIAL, GEMMA_TEMPLATE
        named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    else:
        special, template = SPECIAL, CHAT_TEMPLATE
        named = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}
    tokenizer.add_special_tokens(list(special))
    if architecture == "gemma3_text":
        first = ("<bos>", tokenizer.token_to_id("<bos>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[first])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = template
    fast.save_pretrained(folder)
