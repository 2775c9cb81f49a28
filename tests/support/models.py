"""Tiny random checkpoints of real architectures, their tokenizers and chat templates, and random text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from pipeline.data.encode import Encoded

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
    "max_position_embeddings": 2048,
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
    "mixtral": {
        "hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "num_local_experts": 4,
        "num_experts_per_tok": 2, "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "hidden_size": 96, "intermediate_size": 320, "moe_intermediate_size": 64, "num_attention_heads": 4,
        "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "qwen2_moe": {
        "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 4,
        "shared_expert_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "olmoe": {
        "hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
        "num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False,
    },
    # Positions that are learned, one vector each: beyond the last one they fail.
    "opt": {
        "hidden_size": 96, "ffn_dim": 160, "word_embed_proj_dim": 96, "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "gpt_neo": {
        "hidden_size": 96, "intermediate_size": 160, "num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "window_size": 16, "max_position_embeddings": 128,
    },
}  # fmt: skip
MIXTURES = ("mixtral", "qwen3_moe")  # of experts
LOOKUP_EMBEDDINGS = [kind for kind in ARCHITECTURES if kind != "gemma3_text"]  # Gemma scales what it looks up
LENGTHS = (40, 7, 23, 2, 64, 23)


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


def weight_in(model: PreTrainedModel, name: str) -> torch.Tensor:
    """Return the weight (N, K) with that name in the checkpoint, as a view of the model's, which may be stacked."""
    from pipeline.models.experts import expert_places

    place = expert_places(model).get(name)
    if place is None:
        return model.get_parameter(name).data
    rows, width = place.shape
    return model.get_parameter(place.stack).data.view(-1, width)[place.first_row : place.first_row + rows]


def random_text(lengths=LENGTHS, seed: int = 0, vocabulary: int = 272) -> list[Encoded]:
    """Sequences of random tokens of which about a third does not count."""
    import torch

    from pipeline.data.encode import Encoded

    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for length in lengths:
        ids = torch.randint(0, vocabulary, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.3, -100, ids)
        labels[0], labels[-1] = -100, ids[-1]
        sequences.append(Encoded(ids.tolist(), labels.tolist(), len(sequences)))
    return sequences


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the Euclidean norm of the difference, relative to that of the expected values."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())
