"""The torchao format: files as transformers and torchao write them, loaded in a fresh process."""

import ast
import itertools
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.config import catalog
from pipeline.config.schema import VariantSpec
from pipeline.errors import QuantizationError
from pipeline.inference.kernels.rounded import int8_products_are_exact
from pipeline.models.checkpoint import SINGLE_NAME, Checkpoint, row_blocks
from pipeline.models.matrices import linear_weights
from pipeline.quantization.formats import format_of, storage
from pipeline.quantization.formats.torchao.format import FORMAT as TORCHAO
from pipeline.quantization.formats.torchao.format import pack_nibbles, unpack_nibbles
from pipeline.quantization.grid import Grid
from pipeline.quantization.roundings import rounding
from pipeline.quantization.writer import Variants, quantize_checkpoint, unfit
from tests.support import REPOSITORY
from tests.support.checkpoints import assert_same_headers

VARIANTS = [name for name, variant in catalog.VARIANTS.items() if variant.format == "torchao"]
KEPT = ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj")
KEEP = ["*.o_proj", "model.layers.1.mlp.down_proj"]
IDS = torch.tensor([[7, 200, 31, 64, 5, 5, 90, 12, 250, 33, 2, 149]])

# Loads each folder as a reader of the model card would, without this project, and writes down what it found.
STOCK_LOADER = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ids = torch.tensor(json.loads(sys.argv[2]))
for name, job in json.loads(sys.argv[1]).items():
    model, info = AutoModelForCausalLM.from_pretrained(
        job["root"], subfolder=job["subfolder"], dtype="auto", output_loading_info=True
    )
    types, tensors = {}, {}
    for layer, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            types[layer] = type(weight).__name__
            for part in ("qdata", "scale", "zero_point"):
                if hasattr(weight, part):
                    tensors[f"{layer}.{part}"] = getattr(weight, part).contiguous()
    if job["runs"]:
        with torch.no_grad():
            tensors["logits"] = model(ids).logits.float()
    save_file(tensors, job["out"] + ".safetensors")
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    with open(job["out"] + ".json", "w") as file:
        json.dump({"types": types, "problems": problems, "package": "pipeline" in sys.modules}, file)
"""


SPECS = [
    {"name": "int8"},
    {"name": "int8", "group_size": 32},
    {"name": "int8-dynamic"},
    {"name": "int4"},
    {"name": "int4", "group_size": 32},
    {"name": "int4", "packing": "tile_packed"},
]


def torchao_config(spec: VariantSpec):
    from torchao import quantization
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    if spec.name == "int8-dynamic":
        return quantization.Int8DynamicActivationInt8WeightConfig()
    if spec.name == "int4":
        packing = Int4PackingFormat("tile_packed_to_4d" if spec.packing == "tile_packed" else "plain")
        return quantization.Int4WeightOnlyConfig(group_size=spec.group_size, int4_packing_format=packing)
    granularity = {"granularity": quantization.PerGroup(spec.group_size)} if spec.group_size else {}
    return quantization.Int8WeightOnlyConfig(**granularity)


@pytest.mark.parametrize("options", SPECS, ids=str)
@pytest.mark.parametrize(
    "kept, tables, eight",
    [([], [], []), (["a"], [], []), ([], ["t"], []), (["a"], ["t", "u"], []), ([], [], ["e"]), (["a"], ["t"], ["e"])],
)
def test_the_configuration_is_what_transformers_writes_for_the_same_choice(options, kept, tables, eight, tiny_model):
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    spec = VariantSpec(**options).resolved()
    kind = torchao_config(spec)
    if tables or eight:
        kind = FqnToConfig({**dict.fromkeys([*tables, *eight], Int8WeightOnlyConfig()), "_default": kind})
    if tables:
        expected = TorchAoConfig(kind, modules_to_not_convert=kept, include_input_output_embeddings=True)
    else:
        expected = TorchAoConfig(kind, modules_to_not_convert=["lm_head", *kept] if kept else None)
    found = format_of(spec).quantization_config(spec, kept, tables, eight, {}, tiny_model("llama"))
    assert json.dumps(found, sort_keys=True) == json.dumps(expected.to_dict(), sort_keys=True)


@pytest.mark.parametrize("options", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_headers_metadata_is_what_torchaos_encoder_writes(options, dtype):
    from torchao.prototype.safetensors.safetensors_utils import TensorSubclassAttributeJSONEncoder
    from torchao.quantization import Int4Tensor, Int4TilePackedTo4dTensor, Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    spec = VariantSpec(**options).resolved()
    form = format_of(spec)
    grids = {"layer.weight": ((96, 128), form.grid(spec, 128)), "table.weight": ((272, 128), form.TABLE)}
    found = form.metadata(spec, grids, ["norm.weight"], dict.fromkeys(grids, dtype), ["table.weight"])
    expected = {"norm.weight": {"_type": "Tensor"}}
    for name, (shape, grid) in grids.items():
        parts = [torch.empty(size, dtype=kind, device="meta") for kind, size in form.plan(name, shape, grid).values()]
        block = [1, grid.group(128)]
        if grid.bits == 8:
            qdata, scale, zero_point = parts
            rounds_inputs = spec.name == "int8-dynamic" and name == "layer.weight"
            inputs = QuantizeTensorToInt8Kwargs(granularity=PerRow()) if rounds_inputs else None
            weight = Int8Tensor(qdata, scale, block, dtype, zero_point=zero_point, act_quant_kwargs=inputs)
        else:
            kind = Int4TilePackedTo4dTensor if spec.packing == "tile_packed" else Int4Tensor
            weight = kind(*parts, block, torch.Size(shape))
        expected[name] = weight
    for name, entry in expected.items():
        assert found[name] == json.dumps(entry, cls=TensorSubclassAttributeJSONEncoder)
    assert sorted(json.loads(found["tensor_names"])) == sorted(expected)


@pytest.fixture(scope="module")
def releases(tiny_model, quantized):
    """Checkpoints with a variant beside them, by a name that says what is special."""
    llama = tiny_model("llama")
    made = {
        "int8": (quantized(llama, "int8"), "int8"),
        "int4": (quantized(llama, "int4"), "int4"),
        "int8 in shards": (quantized(llama, "int8", shard_bytes=60_000), "int8"),
        "int4 in shards": (quantized(llama, "int4", shard_bytes=60_000), "int4"),
        "int8 with layers kept": (quantized(llama, "int8", keep=KEEP), "int8"),
        "int4 with layers kept": (quantized(llama, "int4", keep=KEEP), "int4"),
        "int8, tied": (quantized(tiny_model("qwen3"), "int8"), "int8"),
        "int4, tied": (quantized(tiny_model("qwen3"), "int4"), "int4"),
        "int8, tied, with layers kept": (quantized(tiny_model("smollm3"), "int8", keep=KEEP), "int8"),
        "int8 of float32": (quantized(tiny_model("llama", "float32"), "int8"), "int8"),
        "int8-dynamic": (quantized(llama, "int8-dynamic"), "int8-dynamic"),
        "int8-dynamic in shards": (quantized(llama, "int8-dynamic", shard_bytes=60_000), "int8-dynamic"),
        "int8-dynamic with layers kept": (quantized(llama, "int8-dynamic", keep=KEEP), "int8-dynamic"),
    }
    return made


@pytest.fixture(scope="module")
def stock(releases, tmp_path_factory):
    """What a fresh process with stock transformers finds in each release: through subfolder=, and the folder itself."""
    folder = tmp_path_factory.mktemp("stock")
    jobs = {}
    for number, (name, (root, variant)) in enumerate(releases.items()):
        jobs[name] = {
            "root": str(root),
            "subfolder": variant,
            "runs": "int8" in variant,
            "out": str(folder / f"{number}"),
        }
    root, _ = releases["int8"]
    jobs["int8 by its own folder"] = {
        "root": str(root / "int8"), "subfolder": "", "runs": True, "out": str(folder / "own")
    }  # fmt: skip
    command = [sys.executable, "-I", "-c", STOCK_LOADER, json.dumps(jobs), json.dumps(IDS.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: (json.loads(open(j["out"] + ".json").read()), load_file(j["out"] + ".safetensors"))
        for name, j in jobs.items()
    }


NAMES = [
    "int8", "int4", "int8 in shards", "int4 in shards", "int8 with layers kept", "int4 with layers kept",
    "int8, tied", "int4, tied", "int8, tied, with layers kept", "int8 of float32", "int8 by its own folder",
    "int8-dynamic", "int8-dynamic in shards", "int8-dynamic with layers kept",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_stock_transformers_loads_it_whole_and_every_eligible_layer_is_quantized(stock, name):
    found, _ = stock[name]
    assert not found["package"] and not found["problems"]
    expected = "Int8Tensor" if "int8" in name else "Int4Tensor"
    kept = KEPT if "kept" in name else ()
    for layer, kind in found["types"].items():
        plain = layer == "lm_head" or layer in kept
        assert (kind in ("Tensor", "Parameter")) if plain else (kind == expected), layer
    assert len(found["types"]) == 2 * 7 + 1


@pytest.mark.parametrize("name", [name for name in NAMES if "int8" in name])
def test_int8_runs_there_and_computes_what_its_codes_say(stock, releases, dequantized, name):
    if "dynamic" in name and not int8_products_are_exact():
        pytest.skip("torch multiplies int8 wrongly on this CPU")
    root, variant = releases[name.replace(" by its own folder", "")]
    model = dequantized(root, variant, KEPT if "kept" in name else ())
    with torch.no_grad():
        expected = model(IDS).logits.float()
    difference = (stock[name][1]["logits"] - expected).norm() / expected.norm()
    assert difference < (1e-5 if "float32" in name else 0.1 if "dynamic" in name else 0.02)  # its inputs are rounded


@pytest.mark.parametrize("name", [name for name in NAMES if "int4" in name])
def test_int4_is_loaded_there_as_exactly_the_codes_that_were_chosen(stock, releases, name):
    from torchao.quantization import Int4Tensor

    root, _ = releases[name]
    source, (found, tensors) = Checkpoint(root), stock[name]
    spec = VariantSpec(name="int4").resolved()
    layers = [layer for layer, kind in found["types"].items() if kind == "Int4Tensor"]
    for layer in layers:
        weight = source.read(f"{layer}.weight")
        ours = rounding(spec.rounding).round(weight, storage("torchao").grid(spec, weight.shape[1]))
        qdata, scale, zero = (tensors[f"{layer}.{part}"] for part in ("qdata", "scale", "zero_point"))
        theirs = TORCHAO.unpack(Int4Tensor(qdata, scale, zero, [1, ours.grid.group_size], weight.shape))
        assert theirs.grid == ours.grid
        assert torch.equal(theirs.codes, ours.codes)
        assert torch.equal(theirs.scale, ours.scale) and torch.equal(theirs.zero, ours.zero)
        assert torch.equal(theirs.dequantize(), ours.dequantize())
    assert layers


@pytest.mark.parametrize(
    "architecture, dtype",
    [("llama", "bfloat16"), ("llama", "float16"), ("llama", "float32")]
    + [(architecture, "bfloat16") for architecture in ("qwen3", "smollm3", "gemma3_text")],
)
@pytest.mark.parametrize("variant", ["int8", "int8-dynamic"])
def test_the_int8_folder_is_what_transformers_saves_itself(
    tiny_model, quantized, tmp_path, architecture, dtype, variant
):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    source = tiny_model(architecture, dtype)
    kind = Int8WeightOnlyConfig() if variant == "int8" else Int8DynamicActivationInt8WeightConfig()
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", quantization_config=TorchAoConfig(kind))
    model.save_pretrained(tmp_path)
    ours = quantized(source, variant) / variant
    a, b = load_file(ours / SINGLE_NAME), load_file(tmp_path / SINGLE_NAME)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
    assert_same_headers(ours, tmp_path)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0] == {**configs[1], "transformers_version": configs[0]["transformers_version"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_shard_carries_the_whole_metadata(releases, variant):
    root, _ = releases[f"{variant} in shards"]
    files = sorted((root / variant).glob("*.safetensors"))
    assert len(files) > 3
    contents = []
    for file in files:
        with safe_open(file, "pt") as opened:
            contents.append(opened.metadata())
    assert all(content == contents[0] for content in contents)
    assert set(json.loads(contents[0]["tensor_names"])) == set(Checkpoint(root))


@pytest.mark.parametrize("variant", VARIANTS)
def test_configuration_names_kept_layers_and_the_head(releases, variant):
    def not_converted(name):
        root, _ = releases[name]
        config = json.loads((root / variant / "config.json").read_text())
        return config["quantization_config"]["modules_to_not_convert"]

    assert not_converted(variant) is None  # which stands for the head
    assert sorted(not_converted(f"{variant} with layers kept")) == sorted(["lm_head", *KEPT])


@pytest.mark.parametrize("variant", VARIANTS)
def test_non_linear_weights_keep_their_bytes(releases, variant):
    root, _ = releases[variant]
    source, result, linear = Checkpoint(root), Checkpoint(root / variant), linear_weights(root)
    others = [name for name in source if name not in linear]
    assert (
        any("bias" in name for name in others) and any("norm" in name for name in others) and "lm_head.weight" in others
    )
    for name in others:
        assert torch.equal(result.read(name), source.read(name))


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokenizer_and_generation_settings_come_along_and_nothing_else(releases, variant):
    root, _ = releases[variant]
    names = {path.name for path in (root / variant).iterdir()}
    assert names == {
        "config.json", "model.safetensors", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip


def quantize(source, output, *specs, **options):
    specs = [VariantSpec.model_validate(spec).resolved() for spec in specs]
    folders = {spec.name: output / spec.name for spec in specs}
    return quantize_checkpoint(source, specs, folders, options.pop("linear", None) or linear_weights(source), **options)


def test_a_width_that_the_group_size_does_not_divide_gets_the_largest_that_fits_and_says_so(tiny_model, tmp_path):
    source = tiny_model("llama", intermediate_size=192)  # widths 160 and 192
    made = quantize(source, tmp_path, {"name": "int4", "group_size": 128, "rounding": "rtn"})["int4"]
    expected = {name: 32 if width == 160 else 64 for name, (_, width) in linear_weights(source).items()}
    assert made.group_sizes == expected
    assert made.shapes == tuple(sorted(set(linear_weights(source).values())))
    stored = Checkpoint(tmp_path / "int4")
    for name, (rows, width) in linear_weights(source).items():
        scale = stored[name.replace(".weight", "._weight_scale")]
        assert scale.shape == (width // expected[name], rows)


def test_a_group_size_that_fits_everywhere_is_no_exception_to_record(tiny_model, tmp_path):
    made = quantize(tiny_model("llama"), tmp_path, {"name": "int4", "group_size": 32}, "int8")
    assert made["int4"].group_sizes == {} == made["int8"].group_sizes
    assert made["int4"].kept == () == made["int8"].kept


def test_a_width_that_no_group_size_divides_is_refused_by_name(tiny_model, tmp_path):
    source = tiny_model("llama", hidden_size=80)
    with pytest.raises(
        QuantizationError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight: .* width of 80.* Try: keep: "
    ):
        quantize(source, tmp_path, "int4")
    assert "width of 80" in unfit(VariantSpec(name="int4").resolved(), linear_weights(source))
    assert unfit(VariantSpec(name="int8").resolved(), linear_weights(source)) is None


def test_unfit_layers_can_be_kept(tiny_model, tmp_path):
    source = tiny_model("llama", hidden_size=80)
    narrow = [name.removesuffix(".weight") for name, (_, width) in linear_weights(source).items() if width == 80]
    made = quantize(source, tmp_path, {"name": "int4", "keep": narrow})["int4"]
    assert sorted(made.kept) == sorted(f"{name}.weight" for name in narrow)
    assert all(torch.equal(Checkpoint(tmp_path / "int4").read(n), Checkpoint(source).read(n)) for n in made.kept)


@pytest.mark.parametrize("pattern", ["*.donw_proj", "model.layers.9.*", "lm_head", "MODEL.*"])
def test_a_pattern_that_keeps_nothing_is_a_mistake_and_refused(tiny_model, tmp_path, pattern):
    with pytest.raises(QuantizationError, match="no layer to be quantized matches"):
        quantize(tiny_model("llama"), tmp_path, {"name": "int8", "keep": ["*.o_proj", pattern]})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_that_are_not_finite_are_refused_by_name(model_copy, tmp_path, variant, value):
    tensors, name = load_file(model_copy / SINGLE_NAME), "model.layers.1.mlp.up_proj.weight"
    tensors[name][150, 17] = value
    save_file(tensors, model_copy / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(QuantizationError, match=f"{name}: has values that are not finite"):
        quantize(model_copy, tmp_path / "out", variant)


def test_a_layer_that_the_checkpoint_lacks_or_has_in_another_shape_is_refused_by_name(tiny_model, tmp_path):
    source = tiny_model("llama")
    with pytest.raises(QuantizationError, match=r"ghost\.weight: .* the checkpoint nothing"):
        quantize(source, tmp_path, "int8", linear={"ghost.weight": (4, 4)})
    name = next(iter(linear_weights(source)))
    with pytest.raises(QuantizationError, match=r"\(160, 161\), the checkpoint \(160, 160\)"):
        quantize(source, tmp_path, "int8", linear={name: (160, 161)})


@pytest.mark.parametrize(
    "spec, width, limit",
    [("int8", 576, 0.52), ("int8", 4096, 0.52)]
    + [
        ({"name": "int4", "group_size": g, "rounding": "rtn"}, w, 0.36)
        for g in (32, 64, 128)
        for w in (576, 1536, 4096)
    ],
)
def test_the_files_are_as_small_as_promised(tmp_path, spec, width, limit):
    (tmp_path / "config.json").write_text("{}")
    save_file({"layer.weight": torch.randn(64, width).bfloat16() * 0.05}, tmp_path / SINGLE_NAME)
    asked = VariantSpec.model_validate({"name": spec} if isinstance(spec, str) else spec).resolved()
    variants = Variants([asked], {asked.name: tmp_path / asked.name}, {"layer.weight": (64, width)})
    (made,) = variants.make_of(tmp_path, checkpoint=Checkpoint(tmp_path)).values()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert made.source_bytes == 64 * width * 2
    assert made.weight_bytes == Checkpoint(folder).nbytes <= limit * made.source_bytes


@pytest.mark.parametrize("block, tile", [(1, 1), (1000, 10_000), (10_000, 1000), (10**9, 500)])
def test_the_size_of_the_blocks_does_not_show_in_the_files(tiny_model, tmp_path, monkeypatch, block, tile):
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", block)
    monkeypatch.setattr(row_blocks, "TILE_ELEMENTS", tile)
    source = tiny_model("llama")
    quantize(source, tmp_path, {"name": "int4", "rounding": "rtn"}, "int8")
    monkeypatch.undo()
    quantize(source, tmp_path / "whole", {"name": "int4", "rounding": "rtn"}, "int8")
    for variant in ("int8", "int4"):
        for path in (tmp_path / "whole" / variant).iterdir():
            assert (tmp_path / variant / path.name).read_bytes() == path.read_bytes()


def test_one_pass_makes_what_single_passes_make(tiny_model, releases, tmp_path):
    quantize(tiny_model("llama"), tmp_path, *VARIANTS)
    for variant in VARIANTS:
        root, _ = releases[variant]
        for path in (root / variant).iterdir():
            assert (tmp_path / variant / path.name).read_bytes() == path.read_bytes()


def test_progress_counts_the_bytes_of_the_source_to_the_end(tiny_model, tmp_path):
    seen = []
    quantize(tiny_model("llama"), tmp_path, "int8", on_progress=lambda done, total: seen.append((done, total)))
    total = Checkpoint(tiny_model("llama")).nbytes
    assert seen[-1] == (total, total) and seen == sorted(seen)


@pytest.mark.parametrize(
    "grid", [Grid(8, None, "none", torch.float32), Grid(4, 32, "float", torch.bfloat16)], ids=["int8", "int4"]
)
def test_an_ordinary_weight_is_not_mistaken_for_a_quantized_one(grid):
    from torchao.quantization import Int4Tensor, Int8Tensor

    weight = rounding("rtn").round(torch.randn(32, 64), grid)
    stored = storage("torchao").rows("a.weight", weight) | storage("torchao").rest(
        "a.weight", (32, 64), weight.scale, weight.zero, grid
    )
    qdata, scale, zero = (stored[f"a._weight_{part}"] for part in ("qdata", "scale", "zero_point"))
    if grid.bits == 8:
        loaded = Int8Tensor(qdata, scale, [1, 64], torch.bfloat16, zero_point=zero)
    else:
        loaded = Int4Tensor(qdata, scale, zero, [1, 32], torch.Size((32, 64)))
    back = TORCHAO.unpack(loaded)
    assert back.grid == grid and torch.equal(back.dequantize(), weight.dequantize())
    assert TORCHAO.unpack(torch.randn(32, 64)) is None


def test_packing_puts_the_even_column_in_the_low_nibble():
    assert pack_nibbles(torch.tensor([[1, 2, -1, 7]], dtype=torch.int8)).view(torch.uint8).tolist() == [[0x21, 0x7F]]


def test_unpacking_undoes_packing_for_every_pair_of_codes():
    codes = torch.tensor(list(itertools.product(range(-8, 8), repeat=2)), dtype=torch.int8).view(16, 32)
    packed = pack_nibbles(codes)
    assert packed.shape == (16, 16) and packed.dtype == torch.int8
    assert torch.equal(unpack_nibbles(packed), codes)


def test_packing_undoes_unpacking_for_every_byte():
    packed = torch.arange(-128, 128, dtype=torch.int8).view(8, 32)
    assert torch.equal(pack_nibbles(unpack_nibbles(packed)), packed)


def test_packing_works_on_unsigned_codes_and_on_part_of_a_matrix():
    codes = torch.arange(16, dtype=torch.uint8).repeat(4, 4)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)).view(torch.uint8) & 0xF, codes)
    assert torch.equal(pack_nibbles(codes[1:3]), pack_nibbles(codes)[1:3])


def test_package_imports_no_prototype_and_no_private_name_of_torchao():
    found = [
        f"{path.name}: {node.module} {alias.name}"
        for path in (REPOSITORY / "pipeline").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchao"
        for alias in node.names
        if "prototype" in node.module or alias.name.startswith("_")
    ]
    assert found == []


TEMPLATES = sorted((REPOSITORY / "templates").glob("*.jinja"))
SNIPPETS = [path for path in TEMPLATES if "torchao.prototype" in path.read_text("utf-8")]


@pytest.mark.parametrize("path", SNIPPETS, ids=lambda path: path.name)
def test_snippet_says_which_torchao_it_needs_if_a_prototype_is_missing(path, monkeypatch):
    text = path.read_text("utf-8")
    (module,) = re.findall(r"torchao\.prototype[\w.]*", text)
    guard = rf"^try:\n    from {re.escape(module)} .*\nexcept ImportError:\n    .*\n"
    (guarded,) = re.findall(guard, text, re.MULTILINE)
    wanted = re.findall(r'"(torchao[^"]+)"', (REPOSITORY / "pyproject.toml").read_text("utf-8"))[0]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape(f"Try: pip install '{wanted}'")):
        exec(guarded, {})
