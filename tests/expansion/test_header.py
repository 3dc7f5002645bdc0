"""The header of a GGUF file as the gguf package's own reader finds it, read once."""

import struct
from itertools import pairwise

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from gguf_files import random_blocks, write_gguf
from test_reading import FIELDS

from rayltx.errors import CheckpointError
from rayltx.expansion.comfyui_gguf import header
from rayltx.expansion.comfyui_gguf.checkpoint import open_model_file
from rayltx.expansion.comfyui_gguf.reading import get_gguf_metadata, open_gguf

V = GGUFValueType
TENSORS = {
    "plain": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
    "scalar": np.array(1.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "blocks": (GGMLQuantizationType.Q6_K, random_blocks(GGMLQuantizationType.Q6_K, 8).reshape(4, -1)),
}


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_what_the_packages_reader_finds(tmp_path, alignment):
    fields = FIELDS + ([] if alignment is None else [("general.alignment", alignment, V.UINT32)])
    path = write_gguf(tmp_path / "m.gguf", TENSORS, fields)
    theirs, ours = gguf.GGUFReader(path), open_gguf(path)
    assert ours.metadata == get_gguf_metadata(theirs)
    assert list(ours.metadata) == [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert [(name, t.type, t.shape[::-1], t.offset, t.num_bytes) for name, t in ours.tensors.items()] == [
        (t.name, t.tensor_type, tuple(t.shape), t.data_offset, t.n_bytes) for t in theirs.tensors
    ]


def test_arrays_in_arrays(tmp_path):
    fields = [("numbers", [[1, 2], [3]], V.ARRAY), ("texts", [["one"], ["two", ""]], V.ARRAY)]
    path = write_gguf(tmp_path / "m.gguf", {}, fields)
    found = open_gguf(path).metadata
    assert found == get_gguf_metadata(gguf.GGUFReader(path))
    assert (found["numbers"], found["texts"]) == ([1, 2, 3], ["one", "two", ""])


def test_arrays_of_several_types_in_an_array(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {}, [("mixed", [["one"], ["two"]], V.ARRAY)])
    content = path.read_bytes()
    second = struct.pack("<IQ", V.STRING, 1) + struct.pack("<Q", 3) + b"two"
    numbers = struct.pack("<IQ", V.UINT8, len(second) - 12) + b"\xff" * (len(second) - 12)
    assert second in content
    path.write_bytes(content.replace(second, numbers))
    with pytest.raises(CheckpointError, match="the gguf package cannot read it"):
        open_gguf(path)


@pytest.mark.parametrize("depth, refused", [(4, False), (5, True)])
def test_arrays_that_are_nested_too_deep(tmp_path, depth, refused):
    value = [7]
    for _ in range(depth - 1):
        value = [value]
    path = write_gguf(tmp_path / "m.gguf", {}, [("deep", value, V.ARRAY)])
    if refused:
        with pytest.raises(CheckpointError, match="metadata field deep: arrays in more than 4 arrays"):
            open_gguf(path)
    else:
        assert open_gguf(path).metadata["deep"] == [7]


@pytest.mark.parametrize("dims", [(0, 2**60), (0, 2**64 - 1), (2**40, 0)])
def test_dimensions_next_to_an_empty_one(tmp_path, dims):
    path = write_gguf(tmp_path / "m.gguf", {"a": np.zeros((0, 4), np.float32)})
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<QQ", 4, 0), struct.pack("<QQ", *dims)))
    if max(dims) < 2**60:
        assert open_gguf(path).tensors["a"].shape == dims[::-1]
    else:
        with pytest.raises(CheckpointError, match=r"tensor a: its dimensions .* are more than can be counted"):
            open_gguf(path)


def test_a_header_is_read_once(tmp_path, monkeypatch):
    """Every byte of it, by one reader, on the way from a path to a checkpoint."""
    path = write_gguf(tmp_path / "m.gguf", fields=FIELDS)
    read, take = [], header._HeaderReader._take

    def counted_take(self, dtype, count=1):
        start = self.at
        content = take(self, dtype, count)
        read.append((start, self.at))
        return content

    def not_again(*args, **kwargs):
        raise AssertionError("the header is read again")

    monkeypatch.setattr(header._HeaderReader, "_take", counted_take)
    monkeypatch.setattr(gguf.GGUFReader, "__init__", not_again)
    checkpoint = open_model_file(path)
    assert read[0][0] == len(b"GGUF")
    assert all(end == start for (_, end), (start, _) in pairwise(read))
    data_start = min(tensor.offset for tensor in checkpoint.file.tensors.values())
    assert data_start - gguf.GGUF_DEFAULT_ALIGNMENT < read[-1][1] <= data_start
