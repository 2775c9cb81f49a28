"""The rows of the catalogue: what a variant and a rounding are, and the tables that they are registered in.

`pipeline.config.catalog` has the rows, and is what others import, so that the tables are filled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from pipeline.config.engines import EVERYWHERE, TRANSFORMERS, Runs

# Numbers of columns that can share a scale: those of torch's int4 kernels on a CPU and on CUDA.
GROUP_SIZES = (32, 64, 128, 256)

FEW_BITS = 5  # variants of at most so many bits lose much without calibration, and gain by distillation
NEAREST = "rtn"  # the rounding that other roundings are compared with
KEEP = "keep"  # the value of `embeddings` that leaves them as they are


@dataclass(frozen=True)
class Packing:
    """An order in which the codes of a variant can be stored.

    Attributes:
        format: the entry of `pipeline.quantization.formats` that writes it.
        snippet: the card's template of the code that loads it.
        usage: the card's template with a sentence before that code, if it needs one.
        said: a phrase for cards.
        mixes: True if single layers can be stored in eight bits.
        requires: (module, extra) of the optional packages that writing needs, beyond those of the variant.
        runs_on: the ways in which engines run it.
    """

    format: str
    snippet: str
    usage: str | None = None
    said: str = ""
    mixes: bool = False
    requires: tuple[tuple[str, str], ...] = ()
    runs_on: tuple[Runs, ...] = EVERYWHERE


@dataclass(frozen=True)
class Variant:
    """A kind of quantized model that a repository can carry beside the merged model.

    Attributes:
        format: the entry of `pipeline.quantization.formats` that writes it, unless its packing names another.
        bits: width of a code.
        group_size: the default number of columns that share a scale; None for one scale per row.
        roundings: the allowed roundings; the first is the default. Empty if the format takes weights directly.
        rise: the default limit for the relative rise of perplexity.
        zero: the kind of zero point of its grid, as `quantization.grid.Grid` names it.
        values: the values of its codes, as `quantization.grid.Grid` or a library that rounds by itself names them.
        packings: the allowed packings by name; the first is the default.
        group_sizes: the allowed group sizes.
        one_group_size: True if all layers have the same group size, or all have one scale a row.
        embeddings: the default treatment of embedding and output head; None if the quantizer chooses.
        keeps_embeddings: True if there is no other treatment than to leave them as they are.
        rounds_inputs: True if its layers round their inputs as well, token by token.
        static_inputs: True if they round them with one scale for all tokens, which calibration text tells.
        quantizer: the library that quantizes it with its own settings and takes no options, unless a rounding is named.
        libraries: distributions whose versions can change the bytes.
        requires: (module, extra) of the optional packages that writing needs.
        quantizer_requires: those that its quantizer needs.
        engine: the engine that runs and measures it.
        measured_with: distributions of the engine whose versions can change the figures.
        suffix: the ending of its only file; None for a folder that transformers opens.
        file_type: the engine's name for the type of its weights, such as `Q4_0`.
        shared_folder: the folder that it shares with other variants; None for a folder of its own.
        snippet: the card's template of the code that loads it, unless its packing names another.
        usage: the card's template with a sentence before that code, unless its packing names another.
        stored_as: the card's template that says how it is stored.
        said: a phrase for cards that follows "Its", if there is no such template.
        experts: a phrase for cards of mixtures of experts, on how those are stored.
        runs_on: the ways in which engines run it, unless its packing names others.
    """

    name: str
    format: str
    bits: int
    group_size: int | None
    roundings: tuple[str, ...]
    rise: float
    zero: str = "none"
    values: str = "integer"
    packings: Mapping[str, Packing] = field(default_factory=dict)
    group_sizes: tuple[int, ...] = GROUP_SIZES
    one_group_size: bool = False
    embeddings: str | None = KEEP
    keeps_embeddings: bool = False
    rounds_inputs: bool = False
    static_inputs: bool = False
    quantizer: str | None = None
    libraries: tuple[str, ...] = ("torch", "torchao", "transformers")
    requires: tuple[tuple[str, str], ...] = ()
    quantizer_requires: tuple[tuple[str, str], ...] = ()
    engine: str = TRANSFORMERS
    measured_with: tuple[str, ...] = ()
    suffix: str | None = None
    file_type: str | None = None
    shared_folder: str | None = None
    snippet: str = "snippet_stock.py.jinja"
    usage: str | None = None
    stored_as: str | None = None
    said: str = ""
    experts: str = ""
    runs_on: tuple[Runs, ...] = EVERYWHERE

    @property
    def folder(self) -> str:
        """The name of its folder in a release."""
        return self.shared_folder or self.name

    @property
    def is_one_file(self) -> bool:
        """Return True if the variant is one file instead of a folder that transformers opens."""
        return self.suffix is not None

    @property
    def has_few_bits(self) -> bool:
        """Return True if calibration and distillation pay for their time."""
        return self.bits <= FEW_BITS

    @property
    def data_free(self) -> tuple[str, ...]:
        """Return the roundings that need no statistics of the layers' inputs."""
        return tuple(name for name in self.roundings if ROUNDINGS[name].needs == Need.NOTHING)

    def format_of(self, packing: str | None) -> str:
        """Return the format of a packing (None: the variant's own format)."""
        found = self.packing(packing)
        return found.format if found else self.format

    def ways(self, packing: str | None = None) -> tuple[Runs, ...]:
        """Return the ways in which engines run a packing (None: the default one)."""
        found = self.packing(packing)
        return found.runs_on if found else self.runs_on

    def opened_with(self, packing: str | None = None, engine: str = TRANSFORMERS) -> tuple[str, ...]:
        """Return the packages that an engine needs to open it, on any hardware."""
        ways = [way.packages for way in self.ways(packing) if way.engine == engine]
        return tuple(package for package in ways[0] if all(package in way for way in ways)) if ways else ()

    def packing(self, name: str | None) -> Packing | None:
        """Return the packing with that name, or the default one; None if the variant has no packings."""
        return self.packings.get(name or "", next(iter(self.packings.values()), None))


class Need(Enum):
    """The statistics of a layer's inputs that a rounding needs."""

    NOTHING = "nothing"
    RANGES = "ranges"
    SECOND_MOMENTS = "second moments"
    GRAM_MATRIX = "gram matrix"


@dataclass(frozen=True)
class Rounding:
    """A way to put weights on a grid.

    Attributes:
        module: the module with its function `round`, as `pipeline.quantization.roundings` describes it.
        zeros: the kinds of zero point that it can fill.
        said: a phrase for cards.
        needs: the statistics that it cannot do without.
        uses: the statistics that it rounds with if there is calibration text.
        gain: for a rounding with whole matrices, its usual loss as a share of that with second moments alone.
    """

    name: str
    module: str
    zeros: tuple[str, ...]
    said: str
    needs: Need = Need.NOTHING
    uses: Need = Need.NOTHING
    gain: float = 1.0


VARIANTS: dict[str, Variant] = {}
ROUNDINGS: dict[str, Rounding] = {}


def register(entry: Variant | Rounding) -> None:
    """Add a variant, or a rounding.

    A rounding becomes available to each variant that is registered already and whose grid it can fill.
    """
    if isinstance(entry, Variant):
        VARIANTS[entry.name] = entry
        return
    ROUNDINGS[entry.name] = entry
    for variant in list(VARIANTS.values()):
        if variant.roundings and variant.zero in entry.zeros and entry.name not in variant.roundings:
            VARIANTS[variant.name] = replace(variant, roundings=(*variant.roundings, entry.name))


def remove(name: str) -> None:
    """Remove a variant or a rounding."""
    VARIANTS.pop(name, None)
    if ROUNDINGS.pop(name, None):
        for variant in list(VARIANTS.values()):
            VARIANTS[variant.name] = replace(variant, roundings=tuple(r for r in variant.roundings if r != name))
