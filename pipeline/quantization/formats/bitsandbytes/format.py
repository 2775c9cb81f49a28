"""Safetensors of bitsandbytes, as `save_pretrained` of a model writes them that transformers has quantized with it.

    llm_int8    weight (N, K) int8, SCB (N,) float32, the largest magnitude of each row; w = q * SCB / 127
    fp4, nf4    weight (N * K / 2, 1) uint8, two codes to a byte; absmax, the largest magnitude of each 64 weights
                of a row; w = quant_map[q] * absmax
    nf4         absmax is quantized too (double quantization): uint8, with a scale for each 256 of them

The functions of bitsandbytes compute all codes, on the CPU and in one thread for a weight, so that the bytes are the
same everywhere. Its layers pack codes for a processor when they run; such packed codes are never stored. Embeddings
and the output head stay as they are. (Dettmers et al., LLM.int8(), 2022, and QLoRA, 2023.)
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config.schema import VariantSpec
from pipeline.errors import QuantizationError
from pipeline.models.matrices import gate_modules, skipped_modules
from pipeline.quantization.formats import StoredTensors
from pipeline.quantization.formats.bitsandbytes import sizes
from pipeline.quantization.formats.safetensors import Grids, SafetensorsFormat, wrong_parts
from pipeline.quantization.grid import Grid, GroupQuantized
from pipeline.quantization.layers import Output, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = (sizes.INT8, sizes.NF4, sizes.FP4)


@dataclass(frozen=True)
class Numbers(Grid):
    """The numbers of bitsandbytes, which only its functions round to and read.

    Attributes:
        kind: their name in `KINDS`.
    """

    kind: str = ""


@dataclass(frozen=True)
class Rounded(GroupQuantized):
    """Rows of a weight (N, K) as bitsandbytes has rounded them.

    Attributes:
        codes: (N, K) int8, or (N, K / 2) uint8 with the even column in the high nibble.
        scale: (N, 1) or (N, K / 64) float32, the largest magnitude of each row or block.
        grid: `Numbers`.
    """

    @property
    def shape(self) -> torch.Size:
        """Return (N, K)."""
        rows, width = self.codes.shape
        return torch.Size((rows, width if _kind(self.grid) == sizes.INT8 else 2 * width))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight (N, K) as bitsandbytes dequantizes it."""
        from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant

        kind = _kind(self.grid)
        if kind == sizes.INT8:
            return int8_vectorwise_dequant(self.codes, self.scale.flatten()).to(dtype)
        known = {"shape": self.shape, "dtype": torch.bfloat16, "blocksize": sizes.BLOCK, "quant_type": kind}
        state = QuantState(absmax=self.scale.flatten(), **known)
        return dequantize_4bit(self.codes.view(-1, 1), state).to(dtype)

    def rows(self, first: int, stop: int) -> Rounded:
        """Return the rows from `first` to `stop`."""
        return replace(self, codes=self.codes[first:stop], scale=self.scale[first:stop])


class Bitsandbytes(SafetensorsFormat):
    """int8, NF4 and FP4, run by the layers of bitsandbytes."""

    replaces_layers, assembles = True, False

    def output(self, spec: VariantSpec, folder: Path, source: Source, others: Iterable[Output]) -> Output:
        """Return the output that writes a variant into `folder`."""
        import bitsandbytes.functional  # noqa: F401  # threads that import it at once may find it without its kernels

        return super().output(spec, folder, source, others)

    def grid(self, spec: VariantSpec, width: int) -> Numbers:
        """Return the numbers of a layer with `width` columns."""
        return Numbers(spec.variant.bits, None, "none", torch.float32, kind=spec.variant.values)

    def quantize(self, rows: torch.Tensor, grid: Grid) -> Rounded:
        """Return rows (N, K) as bitsandbytes rounds them: to int8 from float16, and to four bits from bfloat16.

        Raises:
            QuantizationError: if a value is too large for float16.
        """
        from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

        kind = _kind(grid)
        if kind == sizes.INT8:
            halves = rows.to(torch.float16)
            if not halves.isfinite().all():
                raise QuantizationError("bitsandbytes: a weight is too large for float16. Try: another variant")
            codes, scale, _ = int8_vectorwise_quant(halves)
            return Rounded(codes, scale.view(-1, 1), None, grid)
        given = rows.to(torch.bfloat16).contiguous()
        packed, state = quantize_4bit(given, blocksize=sizes.BLOCK, quant_type=kind)
        return Rounded(packed.view(len(rows), -1), state.absmax.view(len(rows), -1), None, grid)

    def plan(self, name: str, shape: tuple[int, ...], grid: Grid) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the stored tensors of the weight `name` of `shape` (N, K): name -> (dtype, shape)."""
        module = name.removesuffix(".weight")
        found = sizes.parts(shape, _kind(grid))
        return {f"{module}{end}": (getattr(torch, dtype), size) for end, (dtype, size) in found.items()}

    def place(self, row: int, shape: tuple[int, ...], grid: Grid) -> int:
        """Return the number of the row of stored codes that begins with row `row` of a weight of `shape` (N, K)."""
        return row if _kind(grid) == sizes.INT8 else row * shape[1] // 2

    def rows(self, name: str, block: GroupQuantized) -> dict[str, torch.Tensor]:
        """Return the codes of a block of rows as they are stored."""
        return {name: block.codes if _kind(block.grid) == sizes.INT8 else block.codes.view(-1, 1)}

    def rest(
        self, name: str, shape: tuple[int, ...], scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
    ) -> dict[str, torch.Tensor]:
        """Return the scales (N, G) of a whole weight, and its description, as they are stored."""
        from bitsandbytes.functional import get_4bit_type, quantize_blockwise

        kind, module = _kind(grid), name.removesuffix(".weight")
        if kind == sizes.INT8:
            return {f"{module}.SCB": scale.flatten(), f"{module}.weight_format": torch.zeros((), dtype=torch.uint8)}
        scales, offset = scale.flatten(), 0.0
        found = {f"{name}.quant_map": get_4bit_type(kind, device="cpu")}
        if kind == sizes.NF4:
            mean = scales.mean()
            scales, nested = quantize_blockwise(scales - mean, scale_codes(), blocksize=sizes.SCALE_BLOCK)
            found |= {f"{name}.nested_absmax": nested.absmax, f"{name}.nested_quant_map": nested.code}
            offset = mean.item()
        state = torch.frombuffer(bytearray(sizes.state(shape, kind, offset)), dtype=torch.uint8)
        return found | {f"{name}.absmax": scales, f"{name}.quant_state.bitsandbytes__{kind}": state}

    def quantization_config(
        self, spec: VariantSpec, kept: list[str], tables: list[str], eight: list[str], grids: Grids, folder: Path
    ) -> dict:
        """Return the `quantization_config` of config.json, as transformers' `BitsAndBytesConfig` has it."""
        kind = spec.variant.values
        in_eight = kind == sizes.INT8
        return {
            "_load_in_4bit": not in_eight,
            "_load_in_8bit": in_eight,
            "bnb_4bit_compute_dtype": "float32" if in_eight else "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": sizes.FP4 if in_eight else kind,
            "bnb_4bit_use_double_quant": kind == sizes.NF4,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": skipped_modules(folder, [*gate_modules(folder), *kept]),
            "llm_int8_threshold": 6.0,
            "load_in_4bit": not in_eight,
            "load_in_8bit": in_eight,
            "quant_method": "bitsandbytes",
        }

    def weights(self, checkpoint: StoredTensors) -> Collection[str]:
        """Return the names of the weights that a checkpoint holds in this format."""
        ends = {".SCB": ".weight", ".weight.absmax": ".weight"}
        return [part.removesuffix(end) + to for part in checkpoint for end, to in ends.items() if part.endswith(end)]

    def part_names(self, name: str) -> list[str]:
        """Return the names of the tensors that the weight `name` may be stored as."""
        module = name.removesuffix(".weight")
        return [f"{module}{end}" for end in dict.fromkeys(end for kind in KINDS for end in sizes.parts((1, 64), kind))]

    def check_stored(self, checkpoint: StoredTensors, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError if the stored parts of a weight are not those of a layer of `shape` (N, K).

        bitsandbytes itself believes what a file says, and would read beyond scales that are too few.
        """
        self._stored_grid(checkpoint, name, shape)

    def _stored_grid(self, checkpoint: StoredTensors, name: str, shape: tuple[int, ...]) -> Numbers:
        found = self.stored(checkpoint, name)
        for kind in KINDS:
            grid = Numbers(8 if kind == sizes.INT8 else 4, None, "none", torch.float32, kind=kind)
            if self._fits(found, self.plan(name, shape, grid)):
                state = f"{name}.quant_state.bitsandbytes__{kind}"
                if state not in found or sizes.is_state_of(bytes(checkpoint.read(state).tolist()), shape, kind):
                    return grid
        raise wrong_parts(name, shape)

    def read(self, checkpoint: StoredTensors, name: str, shape: tuple[int, ...]) -> Rounded:
        """Return the codes and scales of a stored weight, for a layer of `shape` (N, K)."""
        grid = self._stored_grid(checkpoint, name, shape)
        codes = checkpoint.read(name).view(shape[0], -1)
        if grid.kind == sizes.INT8:
            return Rounded(codes, checkpoint.read(f"{name.removesuffix('.weight')}.SCB").view(-1, 1), None, grid)
        from bitsandbytes.functional import QuantState, dequantize_blockwise

        parts = (n for n in self.part_names(name) if n != name and n in checkpoint)
        ends = {n.removeprefix(f"{name}."): checkpoint.read(n) for n in parts}
        state = QuantState.from_dict(ends, device=torch.device("cpu"))
        scale = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        return Rounded(codes, scale.view(shape[0], -1), None, grid)

    @staticmethod
    def _fits(found: Mapping[str, Any], planned: Mapping[str, Any]) -> bool:
        """Return True if stored parts are the planned ones. The length of a description may differ."""
        states = {n for n in planned if ".quant_state." in n}
        return found.keys() == planned.keys() and all(found[n] == planned[n] for n in planned.keys() - states)

    def rounds_inputs(self, config: Any) -> bool:
        """Return True if layers of this model round their inputs too, as those in int8 do."""
        quantization = getattr(config, "quantization_config", None)
        known = quantization if isinstance(quantization, dict) else {}
        return known.get("quant_method") == "bitsandbytes" and bool(known.get("load_in_8bit"))

    def settle(self, model: PreTrainedModel) -> None:
        """Let the layers of a loaded model compute with the codes as they are stored.

        On CPUs with AVX512-BF16 bitsandbytes repacks weights in place at the first evaluation. Scales then lose
        precision, and layers fail if 64 does not divide their columns or 32 their rows.
        """
        layer: Any
        for layer in model.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False


def _kind(grid: Grid) -> str:
    assert isinstance(grid, Numbers), "other grids are not stored so"
    return grid.kind


FORMAT = Bitsandbytes()


@functools.cache
def scale_codes() -> torch.Tensor:
    """Return the numbers (256,) float32 that scales are rounded to: `create_dynamic_map()` of bitsandbytes.

    There the last bits of `torch.linspace` depend on the processor. These are the numbers with AVX2 and AVX-512.
    """
    numbers = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        count = 2**exponent
        step = (torch.tensor(1.0) - torch.tensor(0.1)) / count
        place = torch.arange(count + 1)
        # The sum and the product of each are rounded once, as by one instruction.
        up = (torch.tensor(0.1).double() + step.double() * place).float()
        down = (1.0 - step.double() * (count - place)).float()
        bounds = torch.where(place < (count + 1) // 2, up, down)
        means = 10 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        numbers += [means, -means]
    return torch.cat(numbers).sort().values
