"""The catalogue of variants, roundings and data forms, as plain rows of data. It imports nothing heavy.

A variant is one row. Its format is an entry of `pipeline.quantization.formats`, and its roundings are entries of
`pipeline.quantization.roundings`. The wizard, `--help`, planning and cards read the row, so they do not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

# Numbers of columns that can share a scale: those of torch's int4 kernels on a CPU and on CUDA.
GROUP_SIZES = (32, 64, 128, 256)

TRANSFORMERS, LLAMA_CPP = "transformers", "llama.cpp"  # engines that run variants
NEAREST = "rtn"  # the rounding that other roundings are compared with
EIGHT_BITS = "int8"  # the value of `embeddings`, and the key for single layers, for eight bits with a scale per row
GGUF = "gguf"  # the format of llama.cpp, and the folder of its files
KEEP = "keep"  # the value of `embeddings` that leaves them as they are


@dataclass(frozen=True)
class Packing:
    """An order in which the codes of a variant can be stored.

    Attributes:
        format: the entry of `pipeline.quantization.formats` that writes it.
        snippet: the card's template of the code that loads it.
        usage: the card's template that says where it runs.
        said: a phrase for cards.
        mixes: True if single layers can be stored in eight bits.
    """

    format: str
    snippet: str
    usage: str
    said: str = ""
    mixes: bool = False


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
        packings: the allowed packings by name; the first is the default.
        group_sizes: the allowed group sizes.
        embeddings: the default treatment of embedding and output head; None if the quantizer chooses.
        rounds_inputs: True if its layers round their inputs as well, token by token.
        quantizer: the library that quantizes it with its own settings; it takes no options.
        libraries: distributions whose versions can change the bytes.
        requires: (module, extra) of the optional packages that writing needs.
        engine: the engine that runs and measures it.
        measured_with: distributions of the engine whose versions can change the figures.
        suffix: the ending of its only file; None for a folder that transformers opens.
        file_type: the engine's name for the type of its weights, such as `Q4_0`.
        shared_folder: the folder that it shares with other variants; None for a folder of its own.
        snippet: the card's template of the code that loads it, unless its packing names another.
        usage: the card's template that says where it runs, unless its packing names another.
        stored_as: the card's template that says how it is stored.
        said: a phrase for cards that follows "Its", if there is no such template.
    """

    name: str
    format: str
    bits: int
    group_size: int | None
    roundings: tuple[str, ...]
    rise: float
    zero: str = "none"
    packings: Mapping[str, Packing] = field(default_factory=dict)
    group_sizes: tuple[int, ...] = GROUP_SIZES
    embeddings: str | None = KEEP
    rounds_inputs: bool = False
    quantizer: str | None = None
    libraries: tuple[str, ...] = ("torch", "torchao", "transformers")
    requires: tuple[tuple[str, str], ...] = ()
    engine: str = TRANSFORMERS
    measured_with: tuple[str, ...] = ()
    suffix: str | None = None
    file_type: str | None = None
    shared_folder: str | None = None
    snippet: str = "snippet_stock.py.jinja"
    usage: str = "runs_stock.md.jinja"
    stored_as: str | None = None
    said: str = ""

    @property
    def folder(self) -> str:
        """The name of its folder in a release."""
        return self.shared_folder or self.name

    @property
    def is_one_file(self) -> bool:
        """Return True if the variant is one file instead of a folder that transformers opens."""
        return self.suffix is not None

    @property
    def data_free(self) -> tuple[str, ...]:
        """Return the roundings that need no statistics of the layers' inputs."""
        return tuple(name for name in self.roundings if ROUNDINGS[name].needs == Need.NOTHING)

    def format_of(self, packing: str | None) -> str:
        """Return the format of a packing (None: the variant's own format)."""
        found = self.packing(packing)
        return found.format if found else self.format

    def packing(self, name: str | None) -> Packing | None:
        """Return the packing with that name, or the default one; None if the variant has no packings."""
        return self.packings.get(name or "", next(iter(self.packings.values()), None))


class Need(Enum):
    """The statistics of a layer's inputs that a rounding needs."""

    NOTHING = "nothing"
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
    """

    name: str
    module: str
    zeros: tuple[str, ...]
    said: str
    needs: Need = Need.NOTHING
    uses: Need = Need.NOTHING


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


_ROUNDINGS = "pipeline.quantization.roundings"
register(Rounding(NEAREST, f"{_ROUNDINGS}.rtn", ("none", "integer", "float"), "rounded to nearest"))
register(Rounding("hqq", f"{_ROUNDINGS}.hqq", ("none", "float"), "rounded by HQQ without data"))
register(
    Rounding(
        "search",
        f"{_ROUNDINGS}.search",
        ("none", "float"),
        "scales fitted by least squares",
        uses=Need.SECOND_MOMENTS,
    )
)


def _gguf(name: str, bits: int, *roundings: str, zero: str = "none") -> Variant:
    """Return a GGUF variant: with groups of 32 and embeddings in Q8_0 if it has roundings."""
    groups = {"group_size": 32, "group_sizes": (32,), "embeddings": EIGHT_BITS}
    return Variant(
        name=f"gguf-{name}",
        format=GGUF,
        bits=bits,
        roundings=roundings,
        rise={16: 0.01, 8: 0.02}.get(bits, 0.05),
        zero=zero,
        libraries=("torch", "gguf", "transformers"),
        requires=(("gguf", "gguf"),),
        engine=LLAMA_CPP,
        measured_with=("llama-cpp-python",),
        suffix=".gguf",
        file_type=name.upper(),
        shared_folder=GGUF,
        **(groups if roundings else {"group_size": None, "group_sizes": ()}),
    )


def _k_quants(name: str, bits: int) -> Variant:
    """Return a GGUF variant that llama.cpp quantizes with its own settings."""
    plain = _gguf(name, bits)
    return replace(
        plain,
        embeddings=None,
        quantizer=LLAMA_CPP,
        libraries=(*plain.libraries, *plain.measured_with),
        requires=(*plain.requires, ("llama_cpp", "llama-cpp")),
    )


register(
    Variant(
        name="int8",
        format="torchao",
        bits=8,
        group_size=None,
        roundings=(NEAREST, "hqq"),
        rise=0.02,
        stored_as="stored_as_int8.md.jinja",
    )
)
register(
    replace(
        VARIANTS[EIGHT_BITS],
        name="int8-dynamic",
        group_sizes=(),
        rounds_inputs=True,
        stored_as="stored_as_int8-dynamic.md.jinja",
    )
)
register(
    Variant(
        name="int4",
        format="torchao",
        bits=4,
        group_size=64,
        roundings=("search", "hqq", NEAREST),
        rise=0.05,
        zero="float",
        packings={
            "plain": Packing("torchao", "snippet_int4.py.jinja", "runs_int4.md.jinja", mixes=True),
            "tile_packed": Packing(
                "tile_packed",
                "snippet_int4_tiles.py.jinja",
                "runs_int4_tiles.md.jinja",
                "stored in the tiles that the tensor cores of CUDA cards read",
            ),
        },
        stored_as="stored_as_int4.md.jinja",
    )
)
register(_gguf("f16", 16))
register(_gguf("bf16", 16))
register(_gguf("q8_0", 8, NEAREST, "hqq", "search"))
register(_gguf("q4_0", 4, "search", "hqq", NEAREST))
register(_gguf("q4_1", 4, "search", "hqq", NEAREST, zero="float"))
register(_gguf("q5_0", 5, "search", "hqq", NEAREST))
register(_gguf("q5_1", 5, "search", "hqq", NEAREST, zero="float"))
register(_k_quants("q4_k_m", 4))
register(_k_quants("q5_k_m", 5))
register(_k_quants("q6_k", 6))
# A further rounding is registered here, after the variants that offer it.
register(
    Rounding(
        "gptq",
        f"{_ROUNDINGS}.gptq",
        ("none", "float"),
        "rounded by GPTQ, so that later columns make up for the errors of earlier ones",
        needs=Need.GRAM_MATRIX,
        uses=Need.GRAM_MATRIX,
    )
)
CALIBRATED = "gptq"  # the default rounding of variants with few bits if there is calibration text
FEW_BITS = 5

DEFAULT_VARIANTS = ("int8", "int4")

ALIASES = {
    "int8_weight_only": ("int8",),
    "int4_weight_only": ("int4",),
    "int8_dynamic": ("int8-dynamic",),
    "both": DEFAULT_VARIANTS,
    # The names of llama.cpp, except bf16 and f16, which do not imply GGUF.
    **{v.file_type.lower(): (v.name,) for v in VARIANTS.values() if v.file_type and v.bits < 16},
}

DATA_FORMS = {
    "messages": "a list of {role, content} under `messages`",
    "prompt_completion": "two strings under `prompt` and `completion`",
    "instruction": "`instruction` and `output`, and where there is one `input`",
    "question_answer": "two strings under `question` and `answer`",
    "text": "plain text under `text`, all of it learned from",
}


def resolve_variants(name: str) -> tuple[str, ...]:
    """Return the variants of a name: of a variant or an alias, in any case.

    Raises:
        KeyError: if there is no such variant.
    """
    key = name.strip().lower()
    if key in VARIANTS:
        return (key,)
    return ALIASES[key]


def resolve_listed(listed: Iterable[str]) -> list[str]:
    """Return the variants of lists of names, each separated by commas, in their order; one may occur twice.

    Raises:
        KeyError: with the first name that is no variant.
    """
    names: list[str] = []
    for given in (name.strip() for text in listed for name in text.split(",") if name.strip()):
        try:
            names += resolve_variants(given)
        except KeyError:
            raise KeyError(given) from None
    return names


def variant_names() -> str:
    """Return all names that `resolve_variants` takes, for messages."""
    return ", ".join([*VARIANTS, *ALIASES])


def is_one_file(model: str) -> bool:
    """Return True if `model`, a model of a release, is a variant in one file."""
    return model in VARIANTS and VARIANTS[model].is_one_file


def fitting_group_size(width: int, wanted: int) -> int | None:
    """Return the largest allowed group size that divides `width` and is at most `wanted`; None if none does."""
    return next((size for size in sorted(GROUP_SIZES, reverse=True) if size <= wanted and width % size == 0), None)
