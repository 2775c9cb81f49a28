"""The evaluation of one model: quality on both texts, speed, memory, size and answers.

A model is always measured through its files. The full-precision model is the reference. Its scores are kept in files,
so that a variant can be compared without loading the reference.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from pipeline.config.catalog import LLAMA_CPP
from pipeline.config.schema import MeasuredRun
from pipeline.data import general_text
from pipeline.errors import ModelError
from pipeline.evaluation.model_result import Answer, Machine, ModelResult, Quality
from pipeline.evaluation.speed import by_loader
from pipeline.inference.loaders import DEQUANTIZED, PACKED, STOCK, missing_packages, only_file
from pipeline.models.checkpoint_files import stored_bytes
from pipeline.models.context import context_length
from pipeline.models.safe_loading import open_config, open_tokenizer
from pipeline.system.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.data.encode import Encoded
    from pipeline.evaluation.metrics import Divergence, Scores
    from pipeline.evaluation.texts import RunTexts
    from pipeline.inference.llama_cpp import Reader
    from pipeline.inference.output_head import Head

Progress = Callable[[int, int, str], None]
Count = Callable[[int, int], None]

PROBE_TOKENS = 64
CHECKED_CHARACTERS, CHECKED_SEQUENCES = 50_000, 8  # of general and held-out text, for which tokens are compared


def evaluate(
    label: str,
    folder: Path,
    config: MeasuredRun,
    run_texts: RunTexts,
    progress: Progress,
    reference: Path | None = None,
    offload: bool | Literal["auto"] = "auto",
    in_full: bool = True,
) -> ModelResult:
    """Measure the model in `folder`.

    A model that does not fit into memory is offloaded. Then only its quality is measured, because speed and answers
    would depend on the disk.

    Args:
        label: its name in progress lines; that of the catalogue for a variant.
        folder: the folder of its files.
        config: the run.
        run_texts: the texts to measure on.
        progress: called with how much is done, of how much, and what.
        reference: folder of the full-precision model, measured before; None if it is this one.
        offload: as `pipeline.load` takes it.
        in_full: measure speed and answers too.

    Returns:
        Size, quality per text, speed per loader, answers. A GGUF is measured in llama.cpp if it is installed, else by
        its dequantized weights; `loader` names which.

    Raises:
        ModelError: if a loader cannot load the files, or if two loaders disagree.
    """
    from pipeline.inference import llama_cpp
    from pipeline.system import hardware

    def tell(what: str) -> Count:
        return lambda done, total: progress(done, total, f"{label}: {what}")

    file = only_file(folder)
    if file is not None and reference is not None and llama_cpp.is_installed():
        found = _in_llama_cpp(file, config, run_texts, reference, tell, in_full)
    else:
        found = _in_transformers(label, folder, file, config, run_texts, reference, offload, tell, in_full)
    return found.changed(size_bytes=stored_bytes(folder), machine=Machine.model_validate(hardware.describe()))


def _in_transformers(
    label: str,
    folder: Path,
    file: Path | None,
    config: MeasuredRun,
    run_texts: RunTexts,
    reference: Path | None,
    offload: bool | Literal["auto"],
    tell: Callable[[str], Count],
    in_full: bool,
) -> ModelResult:
    """Return the figures of a folder with safetensors, or of the dequantized weights of a GGUF, without speed."""
    import torch

    from pipeline.evaluation import generation, metrics, texts
    from pipeline.inference import output_head
    from pipeline.inference.kernels.products import product_dtype
    from pipeline.inference.load import load, load_dequantized
    from pipeline.inference.offload import is_offloaded
    from pipeline.models.vocabulary_size import check_tokens
    from pipeline.system import hardware

    device: str = config.evaluate.device
    if file and reference:
        model, tokenizer = load_dequantized(file, reference, device, offload)
    else:
        model, tokenizer = load(folder, device=device, offload=offload)
    offloaded = is_offloaded(model)
    texts.restore_template(tokenizer, run_texts)
    if reference is None:
        run_texts = texts.plan_tokens(config, run_texts, model, tokenizer)
    sequences = texts.all_texts(config, run_texts, tokenizer, context_length(model.config.to_dict()))
    questions = [generation.question(tokenizer, prompt)["input_ids"][0].tolist() for prompt in config.evaluate.prompts]
    read = [*(sequence.input_ids for part in sequences.values() for sequence in part), *questions]
    check_tokens(reference or folder, tokenizer, read)
    head = output_head.head_of(model).to("cpu")
    scored = {text: metrics.score(model, part, tell(f"{text} text")) for text, part in sequences.items()}
    if reference is None:
        for text, scores in scored.items():
            scores.save(run_texts.reference_scores(text), output_head.head_names(model))
    samples = []
    if in_full and not offloaded:
        tell("sample answers")(0, 1)
        samples = generation.answers(model, tokenizer, config.evaluate.prompts)
    device = str(output_head.device_of(model))
    compute_dtype = hardware.dtype_name(product_dtype(model.dtype) if device == "cpu" else model.dtype)
    parameters = model.num_parameters()
    ids = sequences[texts.GENERAL][0].input_ids[:PROBE_TOKENS]
    del model
    if device.startswith("cuda"):
        torch.cuda.empty_cache()  # the probes load the model again, in processes of their own

    if reference is None:
        quality = {text: _quality(text, sequences[text], scores, config) for text, scores in scored.items()}
    else:
        theirs, quality = _reference_head(reference, run_texts), {}
        for text, scores in scored.items():
            other = metrics.Scores.load(run_texts.reference_scores(text))
            compared = metrics.divergence(scores, head, other, theirs, tell("divergence"))
            quality[text] = _quality(text, sequences[text], scores, config, other, compared)

    quantized = "quantization_config" in read_json(folder / "config.json", {})
    loaders = (STOCK, PACKED) if quantized else (STOCK,)
    packing = next((spec.packing for spec in config.quantize.variants if spec.name == label), None)
    lacks = missing_packages(label, packing)
    timed = in_full and not offloaded and file is None
    if timed:
        tell("speed and memory, in fresh processes")(0, 1)
    found = ModelResult(
        device=device,
        compute_dtype=compute_dtype,
        loader=DEQUANTIZED if file else PACKED,
        quality=quality,
        speed=by_loader(folder, ids, loaders, config.evaluate.device, lacks) if timed else {},
        answers=tuple(samples),
    )
    about = {"file": file.name} if file else {} if quantized else {"parameters": parameters}
    return found.changed(**about, **({"offloaded": True} if offloaded else {}))


def _in_llama_cpp(
    file: Path,
    config: MeasuredRun,
    run_texts: RunTexts,
    reference: Path,
    tell: Callable[[str], Count],
    in_full: bool,
) -> ModelResult:
    """Return the figures of a GGUF file, on the same tokens as the full-precision model."""
    from pipeline.evaluation import generation, metrics, texts
    from pipeline.evaluation.load_probe import probe
    from pipeline.inference import llama_cpp, output_head

    tokenizer = texts.restore_template(open_tokenizer(reference), run_texts)
    settings = open_config(reference)
    context = context_length(settings.to_dict())
    sequences = texts.all_texts(config, run_texts, tokenizer, context)
    prompts = config.evaluate.prompts if in_full else []
    questions = [generation.question(tokenizer, prompt)["input_ids"][0].tolist() for prompt in prompts]
    longest = [len(s.input_ids) for part in sequences.values() for s in part]
    longest += [len(question) + generation.ANSWER_TOKENS for question in questions]
    head = _reference_head(reference, run_texts)
    quality = {}
    with llama_cpp.opened(file, max(longest), output_head.LOGIT_ELEMENTS) as reader:
        if reader.vocabulary != head.rows:
            raise ModelError(f"{file}: has {reader.vocabulary} tokens, but the full-precision model has {head.rows}")
        others = [s.input_ids for s in sequences.get(texts.HELD_OUT, ())[:CHECKED_SEQUENCES]] + questions
        sample = unicodedata.normalize("NFC", general_text(config.evaluate.general)[:CHECKED_CHARACTERS])
        _check_tokens(reader, tokenizer, [sample, *(cast(str, tokenizer.decode(ids)) for ids in others)])
        for text, part in sequences.items():
            other = metrics.Scores.load(run_texts.reference_scores(text))
            logits = metrics.counted_logits(reader, part)
            scores, compared = metrics.compare_logits(logits, part, other, head, tell(f"{text} text"))
            quality[text] = _quality(text, part, scores, config, other, compared)
        tell("sample answers")(0, 1)
        stops = generation.stop_tokens(reference)
        rooms = [generation.answer_room(p, len(q), context) for p, q in zip(prompts, questions, strict=True)]
        replies = [reader.answer(q, stops, room) for q, room in zip(questions, rooms, strict=True)]
    if in_full:
        tell("speed and memory, in a fresh process")(0, 1)
    return ModelResult(
        file=file.name,
        device="cpu",
        loader=LLAMA_CPP,
        quality=quality,
        speed={LLAMA_CPP: probe(file, LLAMA_CPP).figures} if in_full else {},
        answers=tuple(
            Answer(prompt=prompt, answer=generation.text_of(tokenizer, reply))
            for prompt, reply in zip(prompts, replies, strict=True)
        ),
    )


def _check_tokens(reader: Reader, tokenizer: PreTrainedTokenizerBase, samples: Iterable[str]) -> None:
    """Check that llama.cpp and the tokenizer of the model cut texts into the same tokens.

    Raises:
        ModelError: with the text at the first difference.
    """
    for text in samples:
        ours, theirs = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], reader.cut(text)
        if ours != theirs:
            same = len(os.path.commonprefix([ours, theirs]))
            raise ModelError(
                f"{reader.path}: llama.cpp cuts {tokenizer.decode(ours[same : same + 8])!r} into other tokens than the "
                "model's tokenizer. Try: leave out the variants for llama.cpp"
            )


def _quality(
    text: str,
    sequences: Sequence[Encoded],
    scores: Scores,
    config: MeasuredRun,
    reference: Scores | None = None,
    compared: Divergence | None = None,
) -> Quality:
    from pipeline.evaluation import metrics, texts

    against = {}
    if reference and compared:
        against = {"rise": metrics.rise(scores, reference), "kl": compared.kl, "agreement": compared.agreement}
    return Quality(
        text=config.data.held_out_named if config.data and text == texts.HELD_OUT else config.evaluate.general,
        tokens=len(scores.nll),
        sequences=len(sequences),
        clusters=int(scores.cluster.unique().numel()),
        freedom=metrics.freedom(scores.cluster),
        digest=texts.digest(sequences),
        loss=metrics.mean(scores.nll, scores.cluster),
        perplexity=metrics.perplexity(scores),
        **against,
    )


def _reference_head(reference: Path, run_texts: RunTexts) -> Head:
    """Return the output head of the full-precision model."""
    from pipeline.evaluation import metrics, texts

    return metrics.Scores.saved_head(run_texts.reference_scores(texts.GENERAL)).read(reference)
