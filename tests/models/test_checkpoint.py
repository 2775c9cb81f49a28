"""Checkpoints: written and read as safetensors does, and damaged files refused by name."""

import json
import random
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.errors import CheckpointError
from pipeline.models.checkpoint import (
    DTYPES,
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    CheckpointWriter,
    read_header,
    row_blocks,
)


def some_tensors() -> dict[str, torch.Tensor]:
    """A tensor of every type, and the shapes that go wrong: 0-d, empty, one row, odd lengths."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        noise = torch.randn(5, 3, generator=generator) * 50
        tensors[f"of.type.{name}"] = noise.abs().to(dtype) if dtype == torch.uint8 else noise.to(dtype)
    return tensors | {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "no.columns": torch.empty(4, 0, dtype=torch.bfloat16),
        "one.row": torch.randn(1, 7, generator=generator).bfloat16(),
        "cube": torch.randn(3, 4, 5, generator=generator),
        "vector": torch.randn(11, generator=generator),
    }


def plan_of(tensors: dict[str, torch.Tensor]) -> dict:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def write(folder, tensors, metadata=None, **options) -> None:
    with CheckpointWriter(folder, plan_of(tensors), metadata, **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


@pytest.mark.parametrize("shard_bytes", [1, 64, 200, 10**9])
def test_written_checkpoint_is_read_by_safetensors_and_by_our_reader(tmp_path, shard_bytes):
    tensors = some_tensors()
    write(tmp_path, tensors, {"note": "kept"}, shard_bytes=shard_bytes)
    ours, theirs = Checkpoint(tmp_path), {}
    files = sorted(tmp_path.glob("*.safetensors"))
    for file in files:
        theirs |= load_file(file)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "note": "kept"}
    assert set(ours) == set(theirs) == set(tensors)
    for name, tensor in tensors.items():
        assert same(ours.read(name), tensor) and same(theirs[name], tensor)
    assert ours.nbytes == sum(t.nbytes for t in tensors.values())
    assert (tmp_path / INDEX_NAME).is_file() == (len(files) > 1) == (shard_bytes < 10**9)


def test_safetensors_file_is_read(tmp_path):
    tensors = some_tensors()
    save_file(tensors, tmp_path / SINGLE_NAME, {"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint) == set(tensors) and checkpoint.metadata == {"format": "pt"}
    assert all(same(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_transformers_shards_are_read(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype="auto")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    checkpoint = Checkpoint(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert all(same(checkpoint.read(name), tensor) for name, tensor in model.state_dict().items())


def test_the_index_says_where_every_tensor_is_and_how_much_there_is_in_all(tmp_path):
    tensors = some_tensors()
    write(tmp_path, tensors, shard_bytes=100)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert set(index["weight_map"]) == set(tensors)


@pytest.mark.parametrize("shape", [(9, 4), (9,), (9, 2, 3)])
def test_rows_are_read_from_anywhere(tmp_path, shape):
    wanted = torch.arange(9 * 24).view(9, -1)[:, : torch.Size(shape[1:]).numel()].reshape(shape).float()
    write(tmp_path, {"before": torch.ones(3), "rows": wanted, "after": torch.ones(5)})
    checkpoint = Checkpoint(tmp_path)
    for start in range(9):
        for stop in range(start, 10):
            assert torch.equal(checkpoint.read_rows("rows", start, stop), wanted[start:stop])


@pytest.mark.parametrize("start, stop", [(0, 10), (-1, 2), (5, 4), (10, 10)])
def test_rows_that_a_tensor_does_not_have_are_not_taken_from_its_neighbour(tmp_path, start, stop):
    write(tmp_path, {"rows": torch.ones(9, 4), "neighbour": torch.ones(9, 4)})
    with pytest.raises(ValueError, match="rows"):
        Checkpoint(tmp_path).read_rows("rows", start, stop)


@pytest.mark.parametrize("seed", range(5))
def test_rows_come_in_any_order_and_in_pieces_of_any_size(tmp_path, seed):
    order, tensors = random.Random(seed), {f"t{i}": torch.randn(10, i + 1).bfloat16() for i in range(6)}
    pieces = []
    for name, tensor in tensors.items():
        cuts = sorted({0, 10, *order.sample(range(1, 10), 3)})
        pieces += [(name, tensor[a:b], a) for a, b in zip(cuts, cuts[1:], strict=False)]
    order.shuffle(pieces)
    with CheckpointWriter(tmp_path, plan_of(tensors), shard_bytes=150) as writer:
        for name, rows, first in pieces:
            writer.write(name, rows, first)
    checkpoint = Checkpoint(tmp_path)
    assert all(same(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_a_transposed_tensor_is_written_in_its_own_order(tmp_path):
    tensor = torch.randn(4, 6).T
    write(tmp_path, {"t": tensor})
    assert torch.equal(load_file(tmp_path / SINGLE_NAME)["t"], tensor)


@pytest.mark.parametrize(
    "written",
    [[], [(0, 2)], [(0, 2), (3, 4)], [(2, 4)], [(0, 2), (0, 2)], [(0, 3), (0, 3)]],
    ids=str,
)
def test_a_tensor_with_rows_missing_is_never_called_finished(tmp_path, written):
    plan = {"rows": (torch.float32, (4, 2))}
    with (
        pytest.raises(ValueError, match="1 tensors unfinished, first rows"),
        CheckpointWriter(tmp_path, plan) as writer,
    ):
        for start, stop in written:
            writer.write("rows", torch.ones(stop - start, 2), start)


def test_files_get_their_names_only_when_every_byte_is_there(tmp_path):
    tensors, folder = some_tensors(), tmp_path / "new"
    with CheckpointWriter(folder, plan_of(tensors), shard_bytes=100) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        assert {path.suffix for path in folder.iterdir()} == {".partial"}
        with pytest.raises(CheckpointError):
            Checkpoint(folder)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("shard_bytes", [100, 10**9])
def test_failed_write_keeps_the_old_checkpoint(tmp_path, shard_bytes):
    tensors = some_tensors()
    write(tmp_path, tensors, shard_bytes=shard_bytes)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for error in (ValueError, KeyError):
        with pytest.raises(error), CheckpointWriter(tmp_path, plan_of(tensors), shard_bytes=shard_bytes) as writer:
            writer.write("cube", torch.zeros(3, 4, 5))
            if error is KeyError:
                raise KeyError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rows_come_from_many_threads(tmp_path):
    tensors = {f"t{i}": torch.randn(200, 5) for i in range(4)}
    pieces = [(name, first) for first in range(0, 200, 10) for name in tensors]
    with CheckpointWriter(tmp_path, plan_of(tensors), shard_bytes=5000) as writer, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda p: writer.write(p[0], tensors[p[0]][p[1] : p[1] + 10], p[1]), pieces))
    checkpoint = Checkpoint(tmp_path)
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda p: checkpoint.read_rows(p[0], p[1], p[1] + 10), pieces))
    assert all(torch.equal(rows, tensors[n][f : f + 10]) for rows, (n, f) in zip(read, pieces, strict=True))


def test_inner_error_is_raised(tmp_path):
    with pytest.raises(KeyError, match="mine"), CheckpointWriter(tmp_path, {"t": (torch.float32, (4,))}):
        raise KeyError("mine")


@pytest.mark.parametrize(
    "tensor, first_row",
    [
        (torch.ones(4, 3), 0),
        (torch.ones(4, 2, dtype=torch.float64), 0),
        (torch.ones(8), 0),
        (torch.ones(5, 2), 0),
        (torch.ones(2, 2), 3),
        (torch.ones(1, 2), -1),
    ],
)
def test_a_piece_that_does_not_fit_its_place_is_refused(tmp_path, tensor, first_row):
    plan = {"before": (torch.float32, (2,)), "rows": (torch.float32, (4, 2)), "after": (torch.float32, (8,))}
    with pytest.raises(ValueError, match="rows"), CheckpointWriter(tmp_path, plan) as writer:
        writer.write("rows", tensor, first_row)


def test_files_can_be_read_by_everyone(tmp_path):
    write(tmp_path, some_tensors(), shard_bytes=100)
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644


def test_every_tensor_lies_at_a_multiple_of_its_item_size(tmp_path):
    write(tmp_path, {"bytes": torch.ones(3, dtype=torch.int8), "wide": torch.ones(3, dtype=torch.float64)})
    tensors, _ = read_header(tmp_path / SINGLE_NAME)
    assert all(info.offset % info.dtype.itemsize == 0 for info in tensors.values())


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder, some_tensors(), shard_bytes=100)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("first, then", [(100, 10**9), (10**9, 100)])
def test_second_write_replaces_the_first(tmp_path, first, then):
    from transformers.utils import SAFE_WEIGHTS_NAME

    write(tmp_path, {name: torch.zeros_like(t) for name, t in some_tensors().items()}, shard_bytes=first)
    write(tmp_path, some_tensors(), shard_bytes=then)
    assert torch.equal(Checkpoint(tmp_path).read("cube"), some_tensors()["cube"])
    assert (tmp_path / SAFE_WEIGHTS_NAME).exists() == (then > 100)  # which transformers would prefer


def test_full_disk_gives_one_line(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        CheckpointWriter(tmp_path, {"t": (torch.float32, (4,))})
    assert not list(tmp_path.iterdir())


# -- damaged files


def entry(start: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


GOOD = {"a": entry(0, 8, [2]), "b": entry(8, 16, [1, 2])}

DAMAGED = {
    "nothing": (b"", "cut short"),
    "seven bytes": (b"\x10\0\0\0\0\0\0", "cut short"),
    "only a length": (struct.pack("<Q", 100), "cut short"),
    "an absurd length": (struct.pack("<Q", 2**63) + b"{}", "cut short"),
    "the largest length": (struct.pack("<Q", 2**64 - 1) + b"{}", "cut short"),
    "a header of nothing": (file_of(b""), "cut short"),
    "a header that is cut": (file_of(GOOD, length=10**6), "cut short"),
    "no JSON": (file_of(b"{abc}"), "not JSON"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "not JSON"),
    "deep JSON": (file_of(b"[" * 100_000), "not JSON"),
    "a list": (file_of([]), "table of tensors"),
    "data cut": (file_of(GOOD, bytes(15)), "header says"),
    "data too long": (file_of(GOOD, bytes(17)), "header says"),
    "a gap": (file_of({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, bytes(20)), "leaves a gap"),
    "a gap before": (file_of({"a": entry(4, 12, [2])}, bytes(12)), "leaves a gap"),
    "an overlap": (file_of({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)), "overlaps"),
    "the same place twice": (file_of({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, bytes(8)), "overlaps"),
    "a wrong shape": (file_of({"a": entry(0, 8, [3])}, bytes(8)), "disagree"),
    "a wrong type": (file_of({"a": entry(0, 8, [2], "F64")}, bytes(8)), "disagree"),
    "an unknown type": (file_of({"a": entry(0, 8, [2], "F3")}, bytes(8)), "unknown type"),
    "a negative shape": (file_of({"a": entry(0, 8, [-1, -2])}, bytes(8)), "disagree"),
    "negative offsets": (file_of({"a": entry(-8, 0, [2])}, bytes(8)), "disagree"),
    "offsets that go back": (file_of({"a": entry(8, 0, [2])}, bytes(8)), "disagree"),
    "a huge shape": (file_of({"a": entry(0, 8, [2**62, 2**62])}, bytes(8)), "disagree"),
    "nothing of a shape that no machine has": (file_of({"a": entry(0, 0, [10**30, 0])}), "disagree"),
    "more dimensions than torch has": (file_of({"a": entry(0, 4, [1] * 100)}, bytes(4)), "disagree"),
    "fractions": (file_of({"a": entry(0, 8, [2.0])}, bytes(8)), "disagree"),
    "booleans": (file_of({"a": entry(0, 4, [True])}, bytes(4)), "disagree"),
    "a shape that is text": (file_of({"a": entry(0, 4, "")}, bytes(4)), "disagree"),
    "three offsets": (file_of({"a": {**entry(0, 8, [2]), "data_offsets": [0, 4, 8]}}, bytes(8)), "malformed"),
    "an entry that is no table": (file_of({"a": 5}), "malformed"),
    "an entry without a shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "malformed"),
    "a type that is a list": (file_of({"a": entry(0, 8, [2], ["F32"])}, bytes(8)), "malformed"),
    "a name twice": (
        file_of(b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 4, [1])).encode(),) * 2), bytes(4)),
        "'a' stands twice",
    ),
    "metadata that is a list": (file_of({"__metadata__": ["x"], **GOOD}, bytes(16)), "metadata"),
    "metadata of numbers": (file_of({"__metadata__": {"x": 1}, **GOOD}, bytes(16)), "metadata"),
    "a pickle": (b"PK\x03\x04" + bytes(500), "cut short"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line_that_names_it(tmp_path, damage):
    content, said = DAMAGED[damage]
    (tmp_path / SINGLE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        Checkpoint(tmp_path)
    assert str(tmp_path / SINGLE_NAME) in str(caught.value) and "\n" not in str(caught.value)


def test_the_example_that_is_damaged_above_is_sound_by_itself(tmp_path):
    (tmp_path / SINGLE_NAME).write_bytes(file_of(GOOD, bytes(16)))
    assert Checkpoint(tmp_path)["b"].shape == (1, 2)


def test_a_file_cut_after_it_was_opened_is_noticed(tmp_path):
    write(tmp_path, {"t": torch.ones(1000)})
    checkpoint = Checkpoint(tmp_path)
    with open(tmp_path / SINGLE_NAME, "r+b") as file:
        file.truncate(500)
    with pytest.raises(CheckpointError, match="ended before"):
        checkpoint.read("t")


@pytest.fixture
def sharded(tmp_path):
    """A folder of three shards, and a function that writes its index anew."""
    write(tmp_path, {name: torch.ones(10) for name in "abc"}, shard_bytes=40)

    def change(**weights):
        index = json.loads((tmp_path / INDEX_NAME).read_text())
        index["weight_map"] |= weights
        (tmp_path / INDEX_NAME).write_text(json.dumps(index))

    return tmp_path, change


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/passwd", "..", "sub/model.safetensors", "model.bin", "", ["x.safetensors"], None],
)
def test_an_index_cannot_lead_out_of_its_folder_or_to_a_pickle(sharded, file):
    folder, change = sharded
    change(a=file)
    with pytest.raises(CheckpointError, match="not the name of a file in this folder"):
        Checkpoint(folder)


def test_a_missing_shard_is_named(sharded):
    folder, _ = sharded
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors: named by the index, and missing"):
        Checkpoint(folder)


def test_a_shard_that_the_index_does_not_name_is_named(sharded):
    folder, _ = sharded
    index = json.loads((folder / INDEX_NAME).read_text())
    del index["weight_map"]["b"]
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"does not name model-00002-of-00003\.safetensors"):
        Checkpoint(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: .* missing"):
        Checkpoint(folder)


def test_a_tensor_that_only_the_index_knows_is_named(sharded):
    folder, change = sharded
    change(ghost="model-00001-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="'ghost' is in the index and not in the shard"):
        Checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(sharded):
    folder, _ = sharded
    save_file({"b": torch.ones(10), "a": torch.zeros(10)}, folder / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="'a' is in two shards"):
        Checkpoint(folder)


TEXTS = ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "[" * 100_000]
TEXTS += ['{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}']


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_invalid_index_is_refused(sharded, text):
    folder, _ = sharded
    (folder / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match="not an index"):
        Checkpoint(folder)


HURT = {
    "cut short": (lambda data: data[:-1000], "header says"),
    "cut in the header": (lambda data: data[:500], "cut short"),
    "too long": (lambda data: data + b"more", "header says"),
    "a length that is wrong": (lambda data: b"\xff" * 8 + data[8:], "cut short"),
    "a type that is wrong": (lambda data: data.replace(b'"BF16"', b'"F32" ', 1), "disagree"),
    "a name that is wrong": (lambda data: data.replace(b"layers.1.mlp.up_proj", b"layers.1.mlp.../../x", 1), "up_proj"),
}


@pytest.mark.parametrize("hurt", HURT)
@pytest.mark.parametrize("verb", ["quantize", "merge"])
def test_damaged_checkpoint_makes_no_variant(model_copy, tmp_path, verb, hurt):
    from pipeline.config.schema import VariantSpec
    from pipeline.errors import UserError
    from pipeline.models.matrices import linear_weights
    from pipeline.quantization.writer import quantize_checkpoint
    from pipeline.training.merge import merge_checkpoint

    change, said = HURT[hurt]
    linear, path, out = linear_weights(model_copy), model_copy / SINGLE_NAME, tmp_path / "out"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=said) as caught:
        if verb == "quantize":
            quantize_checkpoint(model_copy, [VariantSpec(name="int8").resolved()], {"int8": out}, linear)
        else:
            merge_checkpoint(model_copy, an_adapter(tmp_path / "adapter"), out, "nf4", linear)
    assert "\n" not in str(caught.value) and not out.exists()


def test_a_checkpoint_that_is_cut_while_it_is_read_leaves_no_weights(model_copy, tmp_path, monkeypatch):
    from pipeline.config.schema import VariantSpec
    from pipeline.models.matrices import linear_weights
    from pipeline.quantization.writer import quantize_checkpoint

    def cut(done, total):
        with open(model_copy / SINGLE_NAME, "r+b") as file:
            file.truncate(20_000)

    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 1)  # thousands of reads, most of which are still to come
    spec, out = VariantSpec(name="int8").resolved(), tmp_path / "out"
    with pytest.raises(CheckpointError, match="ended before its last tensor"):
        quantize_checkpoint(model_copy, [spec], {"int8": out}, linear_weights(model_copy), cut)
    assert not list(out.iterdir())


def an_adapter(folder):
    folder.mkdir()
    q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {f"{q}A.weight": torch.ones(2, 160), f"{q}B.weight": torch.ones(160, 2)}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    return folder


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="other formats are not read"):
        Checkpoint(tmp_path)


def test_names_with_dots_and_slashes_are_only_names(tmp_path):
    tensors = {"../../etc/passwd": torch.ones(2), "a/b": torch.ones(3), "": torch.ones(1)}
    write(tmp_path / "deep" / "er", tensors)
    assert set(Checkpoint(tmp_path / "deep" / "er")) == set(tensors)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {SINGLE_NAME}
