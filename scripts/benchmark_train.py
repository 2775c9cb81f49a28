"""Training an adapter: tokens a second and peak memory of ours, beside plain trl with peft.

    python scripts/benchmark_train.py [--size 135m] [--methods qlora,lora] [--steps 4] [--times 1] [--dropout 0.05]
                                      [--batch 4] [--length 256] [--device cpu] [--peers none] [--json FILE]

Every side trains the same random model on the same random sequences, packed, with the same batch, adapter and steps, in
a fresh process. The first step warms up and is not counted. Plain trl is `SFTTrainer` as its documentation has it,
in bfloat16, without gradient checkpointing on a CPU, as ours. The losses of both are shown: they train the same.
On a CPU without bfloat16 instructions a step of plain trl takes minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import AS_STAGES, SIZES, medians, random_checkpoint, run
from rich.console import Console
from rich.table import Table

COMMON = """
import json, random, statistics, sys, time
from pathlib import Path
from pipeline.system.libraries import quiet
quiet()
import torch
from transformers import AutoTokenizer, TrainerCallback, set_seed
from pipeline.system import hardware

folder, output, asked = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
draw = random.Random(0)
sequences, tokens = [], 0
while tokens < (asked["steps"] + 2) * asked["batch"] * asked["length"]:
    sequence = [draw.randrange(asked["vocabulary"]) for _ in range(draw.randint(asked["length"] // 4, asked["length"]))]
    sequences.append(sequence)
    tokens += len(sequence)

class Steps(TrainerCallback):
    def __init__(self):
        self.begun, self.seconds = 0.0, []

    def on_step_begin(self, *_, **__):
        self.begun = time.perf_counter()

    def on_step_end(self, args, *_, **__):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begun)

def finish(trainer):
    set_seed(0)
    watch = Steps()
    trainer.add_callback(watch)
    hardware.reset_peak_memory()
    trainer.train()
    seconds = statistics.median(watch.seconds[1:])
    on_gpu = trainer.args.device.type == "cuda"
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(json.dumps({
        "tokens_per_second": asked["batch"] * asked["length"] / seconds,
        "held_bytes": torch.cuda.max_memory_allocated() if on_gpu else hardware.peak_memory_bytes(),
        "losses": [round(float(loss), 3) for loss in losses],
    }))
"""
OURS = (
    COMMON
    + """
from pipeline.config.schema import Config
from pipeline.data.encode import Encoded, EncodedSet
from pipeline.training.trainers import Job
from pipeline.training.trainers.sft import build

set_seed(0)
config = Config.model_validate({
    "name": "benchmark", "model": {"source": str(folder)}, "data": {"source": "unused"},
    "train": {"method": asked["method"], "max_steps": asked["steps"] + 1, "batch_size": asked["batch"], "accumulate": 1,
              "max_length": asked["length"], "lora": {"dropout": asked["dropout"]}, "checkpoint_every": 10**6},
})
encoded = [Encoded(ids, [-100, *ids[1:]]) for ids in sequences]
parts = {"training": EncodedSet(encoded, 0, 0, 0, 0), "held-out": EncodedSet([], 0, 0, 0, 0)}
finish(build(config, folder, AutoTokenizer.from_pretrained(folder), parts, Job(output)))
"""
)
PLAIN = (
    COMMON
    + """
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

set_seed(0)
on_gpu = torch.cuda.is_available() and asked["device"] != "cpu"
quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.bfloat16, trust_remote_code=False, use_safetensors=True,
    quantization_config=quantization if asked["method"] == "qlora" else None,
    device_map={"": 0} if on_gpu else None,
)
args = SFTConfig(
    output_dir=str(output), max_steps=asked["steps"] + 1, per_device_train_batch_size=asked["batch"],
    gradient_accumulation_steps=1, learning_rate=2e-4, lr_scheduler_type="cosine", warmup_steps=0.03,
    max_length=asked["length"], packing=True, bf16=True, use_cpu=not on_gpu, gradient_checkpointing=on_gpu,
    save_strategy="no", logging_steps=1, report_to=[], disable_tqdm=True, seed=0, data_seed=0,
    dataloader_pin_memory=on_gpu,
)
lora = LoraConfig(
    r=16, lora_alpha=32, lora_dropout=asked["dropout"], target_modules="all-linear", task_type="CAUSAL_LM"
)
data = Dataset.from_dict({"input_ids": sequences, "labels": [[-100, *ids[1:]] for ids in sequences]})
finish(SFTTrainer(model=model, args=args, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(folder),
                  peft_config=lora))
"""
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="135m")
    parser.add_argument("--methods", default="qlora,lora")
    parser.add_argument("--steps", type=int, default=4, help="that are counted")
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--peers", default="trl")
    parser.add_argument("--scratch", type=Path, help="folder for the model; the system's if not given")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    settings = {"CUDA_VISIBLE_DEVICES": ""} if arguments.device == "cpu" else {}
    asked = {key: getattr(arguments, key) for key in ("steps", "batch", "length", "dropout", "device")}
    asked["vocabulary"] = SIZES[arguments.size]["vocab_size"]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        model = random_checkpoint(Path(scratch) / "model", arguments.size, 1)
        sides = {}
        for method in arguments.methods.split(","):
            sides[f"tunepress {method}"] = partial(train, OURS, model, asked | {"method": method}, settings)
            if "trl" in arguments.peers:
                sides[f"trl + peft {method}"] = partial(train, PLAIN, model, asked | {"method": method}, settings)
        rows = medians(sides, arguments.times)
    show(f"training an adapter of {arguments.size}, {arguments.batch} x {arguments.length} tokens a step", rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def train(code: str, model: Path, asked: dict, settings: dict[str, str]) -> dict:
    """Run one side, and return its figures."""
    own = AS_STAGES if code is OURS else {}
    with tempfile.TemporaryDirectory() as output:
        found = run([sys.executable, "-c", code, str(model), output, json.dumps(asked)], settings | own)
    told = json.loads(found.pop("output").splitlines()[-1])
    losses = dict(enumerate(told.pop("losses")))
    return found | told | {f"loss {number}": loss for number, loss in losses.items()}


def show(title: str, rows: list[dict]) -> None:
    """Print the table, and our speed and memory in those of the peer."""
    console, table = Console(), Table("side", "tokens/s", "peak MB", "losses", title=title)
    figures = {row["side"]: row for row in rows}
    for side, row in figures.items():
        losses = " ".join(f"{value:.3f}" for key, value in row.items() if key.startswith("loss "))
        table.add_row(side, f"{row['tokens_per_second']:.0f}", f"{row['held_bytes'] / 1e6:.0f}", losses)
    console.print(table)
    for side, row in figures.items():
        peer = figures.get(side.replace("tunepress", "trl + peft"))
        if peer and peer is not row:
            faster, smaller = (row[key] / peer[key] for key in ("tokens_per_second", "held_bytes"))
            console.print(f"{side}: {faster:.2f} times the speed, {smaller:.2f} of the memory")


if __name__ == "__main__":
    main()
