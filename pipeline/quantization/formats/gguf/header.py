"""The header of a GGUF file: shape of the model, rotary embeddings, tokenizer, chat template.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A configuration that llama.cpp
cannot compute is refused.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import ModelError
from pipeline.models.chat_templates import DEFAULT
from pipeline.models.checkpoint_files import companions
from pipeline.models.gguf_metadata import ENDS, SAMPLING
from pipeline.models.safe_loading import open_config, open_generation_config, open_tokenizer
from pipeline.quantization.formats.gguf.names import BIASES, Architecture, architecture, library
from pipeline.quantization.formats.gguf.vocabulary import Vocabulary, vocabulary
from pipeline.system.files import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

NO_ROPE_EVERY = 4  # layers of SmolLM3, in llama.cpp
_FILE_TYPES = {"Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}  # llama.cpp's names of files with hardly any other type
_SAMPLING = {  # of `generation_config.json`, and what a GGUF calls them
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


@dataclass(frozen=True)
class Description:
    """The header of a model, to which tensors can still be added.

    Attributes:
        writer: of the package `gguf`, with every key set and no file open.
        architecture: the one of llama.cpp.
        head_dim: channels of a head.
        tensors: float32 tensors that no checkpoint holds, by their names in GGUF.
    """

    writer: GGUFWriter
    architecture: Architecture
    layers: int
    head_dim: int
    tensors: dict[str, torch.Tensor]


def describe(folder: Path, name: str, type_name: str, license: str | None = None) -> Description:
    """Return the header of the model in `folder`.

    Args:
        name: of the model.
        type_name: the type of most weights, such as `Q4_0`.

    Raises:
        ModelError: if llama.cpp cannot compute this model, with the reason.
        MissingExtra: if the package `gguf` is not installed.
    """
    gguf = library()
    try:
        config = open_config(folder)
        known = architecture(config.model_type)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: {str(error).strip().splitlines()[0]}") from None
    tokenizer, words = _tokenizer(folder, config.vocab_size, _states(folder))
    writer = gguf.GGUFWriter(None, known.name)
    writer.add_type("model")
    writer.add_name(name)
    if license:
        writer.add_license(license)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{_FILE_TYPES.get(type_name, type_name)}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    try:
        head_dim = _add_shape(writer, config, known)
        tensors = _add_positions(writer, config, known, head_dim)
        _add_tokenizer(writer, config, tokenizer, words, folder)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
    _add_templates(writer, tokenizer)
    _add_sampling(writer, folder)
    return Description(writer, known, config.num_hidden_layers, head_dim, tensors)


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path, size: int, states: tuple) -> tuple[PreTrainedTokenizerBase, Vocabulary]:
    """Return the tokenizer of a model with `size` rows in its embedding; cached for the variants of a pass."""
    try:
        tokenizer = open_tokenizer(folder)
    except ModelError as error:
        raise ModelError(f"{error}; a GGUF carries one") from None
    try:
        return tokenizer, vocabulary(tokenizer, size)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None


def _states(folder: Path) -> tuple:
    """Return a value that changes when a file beside the weights changes."""
    stats = ((path.name, path.stat()) for path in companions(folder))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _add_shape(writer: GGUFWriter, config: PretrainedConfig, known: Architecture) -> int:
    """Add sizes, norms and windows; return the channels of a head."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != known.activation:
        raise ModelError(f"its activation is {activation}; llama.cpp computes {known.name} with {known.activation}")
    for key, layers in BIASES.items():
        lost = [layer for layer in layers if layer not in known.biases]
        if lost and hasattr(type(config), key) and getattr(config, key):
            raise ModelError(f"{key}: llama.cpp has no place for the bias of {lost[0]} in {known.name}")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    if known.sums_to_one is not None:
        _add_experts(writer, config, known)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    if known.name == "gemma3":
        _add_gemma(writer, config, head_dim)
    elif "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise ModelError(f"has layers with a sliding window, which llama.cpp does not compute for {known.name}")
    if known.name == "smollm3":
        turned = [int((layer + 1) % NO_ROPE_EVERY != 0) for layer in range(config.num_hidden_layers)]
        if list(config.no_rope_layers[: config.num_hidden_layers]) != turned:
            raise ModelError(f"no_rope_layers: llama.cpp leaves out every {NO_ROPE_EVERY}th layer, and no other")
    return head_dim


def _add_experts(writer: GGUFWriter, config: PretrainedConfig, known: Architecture) -> None:
    """Add the number of experts and their width. llama.cpp knows each architecture in one form only."""
    if getattr(config, "norm_topk_prob", True) != known.sums_to_one:
        raise ModelError(f"norm_topk_prob is {config.norm_topk_prob}; llama.cpp computes with {known.sums_to_one}")
    if getattr(config, "clip_qkv", None):
        raise ModelError(f"clip_qkv is {config.clip_qkv}, which is not written as GGUF")
    if known.name == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        raise ModelError("num_key_value_heads: llama.cpp computes olmoe with as many key heads as query heads only")
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
        raise ModelError(f"has layers without experts, which llama.cpp does not compute for {known.name}")
    count = getattr(config, "num_local_experts", None) or config.num_experts
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _add_gemma(writer: GGUFWriter, config: PretrainedConfig, head_dim: int) -> None:
    scaled = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else head_dim
    if config.query_pre_attn_scalar != scaled:
        raise ModelError(f"query_pre_attn_scalar is {config.query_pre_attn_scalar}; llama.cpp computes with {scaled}")
    for key in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, key, None):
            raise ModelError(f"{key}: llama.cpp does not compute that for Gemma 3")
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    kinds = config.layer_types
    if "sliding_attention" not in kinds:
        raise ModelError("layer_types: every layer is a full one, with which llama.cpp aborts for Gemma 3")
    period = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    sliding = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(kinds))]
    if kinds != sliding:
        raise ModelError("layer_types: llama.cpp takes a full layer after equal numbers of sliding ones")
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(period)
    local = config.rope_parameters["sliding_attention"]
    if local.get("rope_type", "default") != "default":
        raise ModelError(f"rope_parameters: {local['rope_type']} in sliding layers is not written as GGUF")
    writer.add_rope_freq_base_swa(local["rope_theta"])


def _add_positions(
    writer: GGUFWriter, config: PretrainedConfig, known: Architecture, head_dim: int
) -> dict[str, torch.Tensor]:
    """Add the rotary embeddings; return the tensors that describe them."""
    gguf, rope = library(), config.rope_parameters
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("rope_parameters: turns a part of each head only, which is not written as GGUF")
    if kind == "default":
        return {}
    if kind == "llama3" and known.name == "llama":  # of the others llama.cpp reads no such tensor
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        return {"rope_freqs.weight": plain / scaled.float()}
    odd: dict[str, Any] = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    odd |= dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"))
    if kind not in ("linear", "yarn") or any(rope.get(key) not in (usual, None) for key, usual in odd.items()):
        raise ModelError(f"rope_parameters: {kind} as it is set here is not written as GGUF")
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN)
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    return {}


def _add_tokenizer(
    writer: GGUFWriter,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    words: Vocabulary,
    folder: Path,
) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.cut)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.space_first)
    if words.merges is not None:
        writer.add_token_merges(words.merges)
    before, after = _added(tokenizer)
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(after)
    stops = _stops(config, tokenizer, folder)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
    ids: dict[str, int | None] = {"bos": first, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    ids |= dict(zip(ENDS, stops, strict=False))
    for kind, token in ids.items():
        if token is not None:
            getattr(writer, f"add_{kind}_token_id")(token)


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Return two booleans: the tokenizer adds its first token before a text, and its last after it."""
    bare, whole = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    for before in (False, True):
        for after in (False, True):
            if whole == [tokenizer.bos_token_id] * before + bare + [tokenizer.eos_token_id] * after:
                return before, after
    raise ModelError("its tokenizer adds other tokens to a text than its first and its last")


def _stops(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[int]:
    """Return every token that ends an answer, with that of the tokenizer first."""
    found = [tokenizer.eos_token_id]
    settings = open_generation_config(folder) if (folder / "generation_config.json").is_file() else config
    ends = settings.eos_token_id
    found += ends if isinstance(ends, list) else [ends]
    stops = list(dict.fromkeys(token for token in found if token is not None))
    if len(stops) > len(ENDS):
        raise ModelError(f"ends answers with {len(stops)} tokens; GGUF names {len(ENDS)}")
    return stops


def _add_sampling(writer: GGUFWriter, folder: Path) -> None:
    """Add the sampling settings of the model, which are the defaults of llama.cpp for it."""
    settings = read_json(folder / "generation_config.json", {})
    for key, name in _SAMPLING.items():
        value = settings.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if name == "top_k":
                writer.add_int32(f"{SAMPLING}{name}", int(value))
            else:
                writer.add_float32(f"{SAMPLING}{name}", value)


def _add_templates(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the chat templates. GGUF has letters, digits and underscores in their names."""
    templates: dict[str, str] | str | None = tokenizer.chat_template
    if isinstance(templates, dict):
        keys = library().Keys.Tokenizer
        others = {re.sub(r"[^a-zA-Z0-9]", "_", name): text for name, text in templates.items() if name != DEFAULT}
        for name, text in sorted(others.items()):
            writer.add_string(keys.CHAT_TEMPLATE_N.format(name=name), text)
        if others:
            writer.add_array(keys.CHAT_TEMPLATES, sorted(others))
        templates = templates.get(DEFAULT)
    if templates:
        writer.add_chat_template(templates)
