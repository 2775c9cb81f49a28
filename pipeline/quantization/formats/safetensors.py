"""Formats of safetensors: folders with a header, config.json and tokenizer, which transformers opens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch

from pipeline.config.schema import VariantSpec
from pipeline.errors import CheckpointError
from pipeline.quantization.formats import Format, StoredTensors
from pipeline.quantization.grid import Grid, GroupQuantized
from pipeline.quantization.layers import Output, Source
from pipeline.quantization.statistics import Statistics

Plan = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # the dtype and the shape of each stored tensor
Grids = Mapping[str, tuple[tuple[int, ...], Grid]]  # the shape and the grid of each quantized weight or stack


class SafetensorsFormat(Format):
    """A format that `pipeline.quantization.safetensors_output` writes, part by part.

    Attributes:
        by_columns: codes are stored transposed. Then `rows` returns columns of the stored tensors, which are joined
            along the last dimension when all of them are there. Otherwise they are rows, and written at once.
        stacks_experts: the matrices of experts are stored as the stacks of the model. `plan`, `metadata` and
            `quantization_config` then know the stacks, of shape (E, N, K), and `rest` gets the scales of all rows.
    """

    by_columns = False
    stacks_experts = False

    def output(self, spec: VariantSpec, folder: Path, source: Source, others: Iterable[Output]) -> Output:
        """Return the output that writes a variant into `folder`."""
        from pipeline.quantization.safetensors_output import SafetensorsFolder

        return SafetensorsFolder(spec, folder, source)

    def together(self, grid: Grid) -> int:
        """Return the rows of a weight that one row of its stored codes holds."""
        return 1

    def place(self, row: int, shape: tuple[int, ...], grid: Grid) -> int:
        """Return the number of the row of stored codes that begins with row `row` of a weight of `shape` (N, K)."""
        return row // self.together(grid)

    def quantize(self, rows: torch.Tensor, grid: Grid) -> GroupQuantized | None:
        """Return rows (n, K) as a library rounds them; None if the rounding of the variant does.

        Raises:
            QuantizationError: if the library cannot round them.
        """
        return None

    def stored(self, checkpoint: StoredTensors, name: str) -> Plan:
        """Return the stored tensors of the weight `name`, as far as they are there: name -> (dtype, shape)."""
        return {n: (checkpoint[n].dtype, checkpoint[n].shape) for n in self.part_names(name) if n in checkpoint}

    @abstractmethod
    def plan(self, name: str, shape: tuple[int, ...], grid: Grid) -> Plan:
        """Return the stored tensors of the weight `name` of `shape` (N, K): name -> (dtype, shape)."""

    @abstractmethod
    def rows(self, name: str, block: GroupQuantized) -> dict[str, torch.Tensor]:
        """Return the codes of a block of rows as they are stored."""

    @abstractmethod
    def rest(
        self, name: str, shape: tuple[int, ...], scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
    ) -> dict[str, torch.Tensor]:
        """Return scales and zeros (N, G) of a whole weight of `shape` (N, K) as they are stored."""

    def of_inputs(self, name: str, statistics: Statistics | None) -> dict[str, torch.Tensor]:
        """Return what is stored of the inputs of the weight's layer, given their statistics if there are any."""
        return {}

    def metadata(
        self,
        spec: VariantSpec,
        grids: Grids,
        plain: Iterable[str],
        dtypes: Mapping[str, torch.dtype],
        tables: Collection[str],
    ) -> dict[str, str]:
        """Return the metadata of every file's header, as `torchao.header.metadata` describes it; nothing by default."""
        return {}

    @abstractmethod
    def quantization_config(
        self, spec: VariantSpec, kept: list[str], tables: list[str], eight: list[str], grids: Grids, folder: Path
    ) -> dict:
        """Return the `quantization_config` of config.json.

        Its `quant_method` must be one that transformers knows, or nothing can load the folder.

        Args:
            kept: modules that stay in bf16, though their kind is quantized.
            tables: the embedding and the output head, if they are in eight bits.
            eight: layers in eight bits, if the others have fewer bits.
            grids: the shape and the grid of each quantized weight.
            folder: of the full-precision model.
        """


def wrong_parts(name: str, shape: tuple[int, ...]) -> CheckpointError:
    """Return the error of a stored weight whose parts are not those of a layer of `shape`."""
    return CheckpointError(f"{name}: its stored parts are not those of a layer of {' x '.join(map(str, shape))}")
