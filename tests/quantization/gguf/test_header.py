"""GGUF headers: read as the official package reads them, without trust in their values."""

import struct

import pytest

from pipeline.errors import CheckpointError
from pipeline.models import gguf_metadata
from pipeline.models.gguf_metadata import read_dialogue, read_header
from tests.support.gguf_files import TYPES

NUMBER, TEXT, ARRAY = 4, 8, 9


@pytest.mark.parametrize("variant", TYPES)
def test_header_equals_the_official_reader(tiny_model, written, variant):
    gguf = pytest.importorskip("gguf")
    path = written(tiny_model("llama"), variant)
    theirs, ours = gguf.GGUFReader(path), read_header(path, ["tokenizer.ggml.tokens", "tokenizer.ggml.token_type"])
    found = {name: (t.kind, t.shape, t.offset, t.nbytes) for name, t in ours.tensors.items()}
    assert found == {
        t.name: (t.tensor_type.name, tuple(int(n) for n in t.shape[::-1]), t.data_offset, t.n_bytes)
        for t in theirs.tensors
    }
    keys = {name: list(value) if isinstance(value, tuple) else value for name, value in ours.keys.items()}
    left_out = {"tokenizer.ggml.merges", "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    assert keys == {name: f.contents() for name, f in theirs.fields.items() if name not in left_out}


def test_the_types_of_k_quants_are_as_large_as_the_official_package_says():
    gguf = pytest.importorskip("gguf")
    sizes = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert gguf_metadata._TYPES.items() <= sizes.items()


def text(value):
    return struct.pack("<Q", len(value)) + value


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def array(kind, count, values=b""):
    return struct.pack("<IQ", kind, count) + values


def tensor(name, shape, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(*keys, tensors=(), counts=None, version=3, data=b"\0" * 200):
    head = struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys))))
    return b"GGUF" + head + b"".join(keys) + b"".join(tensors) + data


HOSTILE = {
    "of another version": (file(version=1), "version 1 is not read here"),
    "with more keys than bytes": (file(counts=(0, 2**63)), "GGUF"),
    "with more tensors than bytes": (file(counts=(2**63, 0)), "GGUF"),
    "with a name of any length": (file(struct.pack("<Q", 2**62)), "a text of 4611686018427387904 bytes"),
    "with a text longer than itself": (file(key(b"k", TEXT, struct.pack("<Q", 9999))), "it ends too soon"),
    "with a text that is none": (file(key(b"k", TEXT, text(b"\xff\xfe"))), "a text is none"),
    "with an unknown type of value": (file(key(b"k", 77, b"")), "unknown type 77"),
    "with an array longer than itself": (file(key(b"k", ARRAY, array(NUMBER, 2**61))), "it ends too soon"),
    "with an array of texts without end": (file(key(b"k", ARRAY, array(TEXT, 2**61))), "it ends too soon"),
    "with a wanted array without end": (file(key(b"wanted", ARRAY, array(NUMBER, 2**61))), "entries"),
    "with arrays in arrays": (file(key(b"k", ARRAY, array(ARRAY, 1) * 5000)), "unknown type 9"),
    "aligned to nothing": (file(key(b"general.alignment", NUMBER, bytes(4)), tensors=[tensor(b"t", (8,))]), "is 0"),
    "aligned to a word": (file(key(b"general.alignment", TEXT, text(b"x")), tensors=[tensor(b"t", (8,))]), "is x"),
    "with a tensor between its places": (file(tensors=[tensor(b"t", (8,), offset=7)]), "t begins between multiples"),
    "with a tensor of an unknown type": (file(tensors=[tensor(b"t", (8,), 99)]), "t is of the type 99"),
    "with a tensor without dimensions": (file(tensors=[tensor(b"t", ())]), "t has 0 dimensions"),
    "with a tensor of many dimensions": (file(tensors=[tensor(b"t", (1,) * 5)]), "t has 5 dimensions"),
    "with half a block": (file(tensors=[tensor(b"t", (16,), 2)]), "t is Q4_0 with 16 columns"),
    "with a tensor behind its end": (file(tensors=[tensor(b"t", (8,), offset=2**63)]), "before its last tensor"),
    "with a tensor larger than itself": (file(tensors=[tensor(b"t", (2**40, 2**40))]), "before its last tensor"),
    "with a tensor twice": (file(tensors=[tensor(b"t", (8,))] * 2), "two tensors of the same name"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_hostile_is_refused_in_one_line(tmp_path, name):
    content, said = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path, ["wanted"])
    assert said in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_truncated_file_is_not_read(tmp_path, tiny_model, written):
    content, path = written(tiny_model("llama"), "gguf-q4_0").read_bytes(), tmp_path / "cut.gguf"
    for length in [*range(4, 400, 7), *range(400, len(content), 2999), len(content) - 33]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="cut.gguf: not a whole GGUF file"):
            read_header(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.gguf: cannot be read \(No such file or directory\)"):
        read_header(tmp_path / "x.gguf")


def test_unrequested_vocabulary_is_skipped(tmp_path, tiny_model, written):
    path = written(tiny_model("llama"), "gguf-q4_0")
    assert not any(name in read_header(path).keys for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"))
    assert read_dialogue(path).tokens  # which needs it
