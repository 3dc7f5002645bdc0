"""What a GGUF file is said to hold, and what is refused."""

import pickle
import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf_files import random_blocks, write_gguf

from rayltx.errors import CheckpointError
from rayltx.expansion.comfyui_gguf.dequantisation import QuantisedTensor
from rayltx.expansion.comfyui_gguf.reading import get_gguf_metadata, open_gguf, read_tensor
from rayltx.expansion.comfyui_gguf.scales import check_scales

V = GGUFValueType
FIELDS = [
    ("a.uint8", 200, V.UINT8), ("a.int8", -100, V.INT8), ("a.uint16", 60000, V.UINT16), ("a.int16", -30000, V.INT16),
    ("a.uint32", 4000000000, V.UINT32), ("a.int32", -2000000000, V.INT32), ("a.uint64", 2**63 + 1, V.UINT64),
    ("a.int64", -(2**62), V.INT64), ("a.float32", 0.5, V.FLOAT32), ("a.float64", 1 / 3, V.FLOAT64),
    ("a.true", True, V.BOOL), ("a.false", False, V.BOOL), ("a.string", "größer", V.STRING), ("a.empty", "", V.STRING),
    ("config", '{"transformer": {}}', V.STRING), ("a.ints", [1, -2, 3], V.ARRAY), ("a.floats", [0.5, 2.0], V.ARRAY),
    ("a.strings", ["one", "", "drei"], V.ARRAY), ("a.bools", [True, False], V.ARRAY), ("a.one", [7], V.ARRAY),
]  # fmt: skip


@pytest.fixture
def small(tmp_path):
    """A file with a plain tensor, a quantised one, and a little metadata: and where its tensor data begins."""
    blocks = random_blocks(GGMLQuantizationType.Q4_K, 8).reshape(4, -1)
    tensors = {"plain": np.arange(12, dtype=np.float32).reshape(3, 4), "blocks": (GGMLQuantizationType.Q4_K, blocks)}
    fields = [("a.strings", ["one", "two"], V.ARRAY), ("a.int", 3, V.INT32), ("a.ints", [1, 2, 3], V.ARRAY)]
    return write_gguf(tmp_path / "small.gguf", tensors, fields)


def test_metadata_of_every_type(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", {}, FIELDS)
    expected = {"general.architecture": "ltxv", **{key: value for key, value, _ in FIELDS}}
    found = get_gguf_metadata(GGUFReader(path))
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in expected.items()}
    assert open_gguf(path).metadata == expected


def test_a_file_is_known_from_its_header(small):
    file = open_gguf(small)
    assert file.architecture == "ltxv"
    assert list(file.tensors) == ["plain", "blocks"]
    plain, blocks = file.tensors.values()
    assert (plain.type.name, plain.shape, plain.num_bytes, plain.num_elements) == ("F32", (3, 4), 48, 12)
    assert (blocks.type.name, blocks.shape, blocks.num_bytes) == ("Q4_K", (4, 512), 8 * 144)
    assert (plain.is_quantised, blocks.is_quantised) == (False, True)
    assert blocks.stored_shape == (4, 288)
    assert pickle.loads(pickle.dumps(file)) == file


def test_tensors_are_read(small):
    file = open_gguf(small)
    assert torch.equal(read_tensor(file, "plain"), torch.arange(12.0).view(3, 4))
    with file.open() as reader:
        blocks = reader.read("blocks")
    assert isinstance(blocks, QuantisedTensor)
    assert blocks.data.shape == (4, 288)
    expected = gguf.quants.dequantize(random_blocks(GGMLQuantizationType.Q4_K, 8).reshape(4, -1), blocks.type)
    np.testing.assert_array_equal(blocks.dequantise().numpy(), expected)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "int16", "int8"])
def test_plain_types_keep_their_dtype(tmp_path, dtype):
    array = np.arange(8).reshape(2, 4).astype(dtype)
    found = read_tensor(open_gguf(write_gguf(tmp_path / "m.gguf", {"a": array})), "a")
    assert str(found.dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(found.numpy(), array)


def test_bfloat16(tmp_path):
    values = torch.randn(2, 4).to(torch.bfloat16)
    stored = (GGMLQuantizationType.BF16, values.view(torch.uint8).numpy())
    found = read_tensor(open_gguf(write_gguf(tmp_path / "m.gguf", {"a": stored})), "a")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, values)


def test_a_tensor_without_elements(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {"a": np.zeros((0, 4), np.float32), "b": np.ones(3, np.float16)})
    assert read_tensor(open_gguf(path), "a").shape == (0, 4)
    check_scales(open_gguf(path))


def test_writing_to_a_tensor_does_not_reach_the_file(small):
    file = open_gguf(small)
    before = small.read_bytes()
    tensor = read_tensor(file, "plain")
    tensor.zero_()
    assert small.read_bytes() == before
    assert read_tensor(file, "plain").any()


def test_a_shape_of_five_dimensions_comes_from_metadata(tmp_path):
    array = np.arange(64, dtype=np.float32).reshape(2, 32)
    path = write_gguf(tmp_path / "m.gguf", {"a": array}, [("comfy.gguf.orig_shape.a", [1, 2, 2, 2, 8], V.ARRAY)])
    file = open_gguf(path)
    assert file.tensors["a"].shape == (1, 2, 2, 2, 8)
    assert torch.equal(read_tensor(file, "a"), torch.arange(64.0).view(1, 2, 2, 2, 8))


@pytest.mark.parametrize(
    "value, type, message",
    [
        ([3, 3], V.ARRAY, r"tensor a: its comfy.gguf.orig_shape. metadata says \[3, 3\], which is 9 .* \(2, 32\)"),
        ("2,32", V.STRING, "not a list of sizes"),
        ([-2, -32], V.ARRAY, "not a list of sizes"),
    ],
)
def test_a_shape_that_cannot_be(tmp_path, value, type, message):
    path = write_gguf(tmp_path / "m.gguf", {"a": np.zeros((2, 32), "f")}, [("comfy.gguf.orig_shape.a", value, type)])
    with pytest.raises(CheckpointError, match=message):
        open_gguf(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        open_gguf(tmp_path / "nothing.gguf")


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"\x10\0\0\0\0\0\0\0{}" * 9, b"PK\x03\x04" + bytes(99)])
def test_what_is_not_a_gguf(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        open_gguf(path)


@pytest.mark.parametrize("version, message", [(1, "GGUF version 1"), (9, "version 9"), (3 << 24, "big-endian")])
def test_other_versions(small, version, message):
    content = bytearray(small.read_bytes())
    content[4:8] = struct.pack("<I", version)
    small.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_gguf(small)


def test_a_file_cut_anywhere(small, tmp_path):
    content = small.read_bytes()
    end = max(tensor.offset + tensor.num_bytes for tensor in open_gguf(small).tensors.values())
    header = min(tensor.offset for tensor in open_gguf(small).tensors.values())
    path = tmp_path / "cut.gguf"
    for length in (*range(header + 1), *range(header + 1, end, 37), end - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            open_gguf(path)
    path.write_bytes(content[:end])
    open_gguf(path)


def test_a_file_cut_in_a_tensor_names_it(small):
    small.write_bytes(small.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"tensor blocks: it ends at byte \d+, the file at \d+: the file is cut"):
        open_gguf(small)


def test_any_damaged_byte_of_the_header_is_refused_or_harmless(small, tmp_path):
    """Never another exception, and never a long wait."""
    content = small.read_bytes()
    header = min(tensor.offset for tensor in open_gguf(small).tensors.values())
    path = tmp_path / "damaged.gguf"
    refused = 0
    for at in range(header):
        for value in (0x00, 0x7F, 0xFF):
            damaged = bytearray(content)
            damaged[at] = value
            path.write_bytes(damaged)
            try:
                open_gguf(path)
            except CheckpointError:
                refused += 1
    assert refused > header


@pytest.mark.parametrize("at, what", [(8, "tensors"), (16, "metadata fields")])
@pytest.mark.parametrize("count", [10**4, 2**62, 2**64 - 1])
def test_absurd_counts(small, at, what, count):
    content = bytearray(small.read_bytes())
    content[at : at + 8] = struct.pack("<Q", count)
    small.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"speaks of {count} {what}"):
        open_gguf(small)


def test_one_tensor_more_than_there_is(small):
    content = bytearray(small.read_bytes())
    content[8:16] = struct.pack("<Q", 3)
    small.write_bytes(content)
    with pytest.raises(CheckpointError):
        open_gguf(small)


@pytest.mark.parametrize("length", [2**31, 2**62, 2**64 - 1])
def test_an_absurd_array(small, length):
    content = small.read_bytes()
    at = content.index(b"a.ints") + len(b"a.ints") + 8
    small.write_bytes(content[:at] + struct.pack("<Q", length) + content[at + 8 :])
    with pytest.raises(CheckpointError, match=r"metadata field a\.ints"):
        open_gguf(small)


def test_an_unknown_type_of_tensor(small):
    content = bytearray(small.read_bytes())
    at = content.index(b"blocks") + len(b"blocks") + 4 + 16
    assert content[at] == GGMLQuantizationType.Q4_K
    content[at] = 250
    small.write_bytes(content)
    with pytest.raises(CheckpointError, match="tensor blocks: its type 250 is not known"):
        open_gguf(small)


def test_rows_that_are_not_whole_blocks(small):
    content = bytearray(small.read_bytes())
    at = content.index(b"blocks") + len(b"blocks") + 4
    content[at : at + 8] = struct.pack("<Q", 500)
    small.write_bytes(content)
    with pytest.raises(CheckpointError, match="tensor blocks: rows of 500 elements are not whole blocks of Q4_K"):
        open_gguf(small)


def test_a_text_that_is_not_utf8(small):
    content = small.read_bytes()
    small.write_bytes(content.replace(b"ltxv", b"lt\xffv"))
    with pytest.raises(CheckpointError, match=r"general.architecture: a text that is not UTF-8"):
        open_gguf(small)


def test_a_file_that_became_shorter_after_it_was_opened(small):
    file = open_gguf(small)
    small.write_bytes(small.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="shorter since it was opened"):
        read_tensor(file, "blocks")


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00, 0xFFFF])
@pytest.mark.parametrize("type, offset", [("Q8_0", 0), ("Q4_1", 2), ("Q2_K", 82), ("Q3_K", 108), ("Q6_K", 208)])
def test_scales_that_are_not_finite(tmp_path, type, offset, bits):
    type = GGMLQuantizationType[type]
    blocks = random_blocks(type, 20_000)
    path = tmp_path / "m.gguf"
    check_scales(open_gguf(write_gguf(path, {"good": (type, blocks), "other": (type, blocks)})))
    blocks[19_997, offset : offset + 2] = np.frombuffer(struct.pack("<H", bits), np.uint8)
    file = open_gguf(write_gguf(path, {"good": (type, random_blocks(type, 8)), "bad": (type, blocks)}))
    with pytest.raises(CheckpointError, match=rf"m.gguf: tensor bad .*byte {offset} of block 19997 is -?(inf|nan)"):
        check_scales(file)
    check_scales(file, ["good"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_values_that_are_not_numbers(tmp_path, dtype):
    type = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    values = torch.randn(600_000, 2).to(dtype)
    values[3, 0] = float("inf")

    def stored():
        return {"a": (GGMLQuantizationType[type], values.view(torch.uint8).numpy())}

    check_scales(open_gguf(write_gguf(tmp_path / "m.gguf", stored())))
    values[599_000, 1] = float("nan")
    with pytest.raises(CheckpointError, match="value 1198001 is a NaN"):
        check_scales(open_gguf(write_gguf(tmp_path / "m.gguf", stored())))
