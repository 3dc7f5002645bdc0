"""Files with anything in them: only our own errors, no hang, and no memory beyond a multiple of the file."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from gguf_files import random_blocks, write_gguf
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rayltx.diffusion_models.lightricks.checkpoint import LTX_MARKS
from rayltx.errors import RayLTXError
from rayltx.expansion.comfyui_gguf.checkpoint import open_model_file
from rayltx.expansion.comfyui_gguf.convert import convert

_T = GGMLQuantizationType
KINDS = (_T.Q4_0, _T.Q8_0, _T.Q4_K, _T.Q6_K, _T.IQ4_NL)
TIMES_THE_FILE, AND_BYTES = (
    40,
    8 * 2**20,
)  # of what is allocated while it is read; the latter for the readers themselves


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of whole files, and how far their headers reach."""
    folder = tmp_path_factory.mktemp("whole")
    config = json.dumps({"transformer": {"num_layers": 1, "cross_attention_dim": 32}})
    marks = {f"model.diffusion_model.{mark}": torch.ones(4, 32) for mark in LTX_MARKS}
    weights = {**marks, "model.diffusion_model.a": torch.ones(8, 8, dtype=torch.bfloat16)}
    save_file(weights, folder / "m.safetensors", metadata={"config": config, "other": "text"})
    blocks = {f"block.{kind.name}": (kind, random_blocks(kind, 8).reshape(2, -1)) for kind in KINDS}
    fields = [
        ("config", config, GGUFValueType.STRING), ("split.count", 1, GGUFValueType.UINT16),
        ("a.number", 3.0, GGUFValueType.FLOAT64), ("general.alignment", 32, GGUFValueType.UINT32),
        ("comfy.gguf.orig_shape.a", [4, 32], GGUFValueType.ARRAY),
    ]  # fmt: skip
    plain = {mark: np.ones((4, 32), np.float16) for mark in LTX_MARKS}
    write_gguf(folder / "m.gguf", {**plain, **blocks}, fields)
    found = {}
    for path in folder.iterdir():
        data = path.read_bytes()
        header = (
            8 + int.from_bytes(data[:8], "little")
            if path.suffix == ".safetensors"
            else gguf.GGUFReader(path).data_offset
        )
        found[path.suffix] = data, header
    return found


def bytes_of(number, size):
    return (number % 2 ** (8 * size)).to_bytes(size, "little")


POSITION = st.floats(0, 1, exclude_max=True)
NUMBERS = st.sampled_from([0, 1, 2**7, 2**8 - 1, 2**31 - 1, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
TEXTS = st.sampled_from(
    [
        b'{"config":',
        b"[" * 3000,
        b"9" * 5000,
        b"null",
        b"-1",
        b"1e999",
        b'"\\ud800"',
        b"\x00",
        b"NaN",
        b"dtype",
        b"F8_E8M0",
    ]
)
CHANGE = st.one_of(
    st.tuples(st.just("set"), POSITION, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("set"), POSITION, st.builds(bytes_of, NUMBERS, st.sampled_from([1, 2, 4, 8]))),
    st.tuples(st.just("insert"), POSITION, st.one_of(st.binary(min_size=1, max_size=16), TEXTS)),
    st.tuples(st.just("remove"), POSITION, st.binary(min_size=1, max_size=64)),
    st.tuples(st.just("cut"), POSITION, st.just(b"")),
)  # fmt: skip


def changed(data, header, changes, anywhere, mend_length):
    """Bytes with some changes, most of them in the header."""
    data = bytearray(data)
    for kind, position, value in changes:
        at = int(position * (len(data) if anywhere else min(header, len(data))))
        if kind == "set":
            data[at : at + len(value)] = value
        elif kind == "insert":
            data[at:at] = value
        elif kind == "remove":
            del data[at : at + len(value)]
        else:
            del data[at:]
    if mend_length and len(data) > 8:  # so that what is behind it is looked at
        data[:8] = max(0, header - 8 + len(data) - mend_length).to_bytes(8, "little")
    return bytes(data)


def read_all(path):
    checkpoint = open_model_file(path)
    checkpoint.check_values()
    with checkpoint.open() as reader:
        for name in checkpoint.tensors:
            reader.read(name)


def check(files, folder, suffix, changes, anywhere, mends):
    data, header = files[suffix]
    mend = len(data) if mends and suffix == ".safetensors" else 0
    fuzzed = changed(data, header, changes, anywhere, mend)
    path = Path(folder) / f"m{suffix}"
    path.write_bytes(fuzzed)
    tracemalloc.start()
    try:
        read_all(path)
    except RayLTXError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= TIMES_THE_FILE * len(fuzzed) + AND_BYTES


ARGUMENTS = {
    "suffix": st.sampled_from([".safetensors", ".gguf"]),
    "changes": st.lists(CHANGE, min_size=1, max_size=4),
    "anywhere": st.booleans(),
    "mends": st.booleans(),
}
COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    "phases": [Phase.explicit, Phase.generate, Phase.shrink],
    "database": None,
}


@given(**ARGUMENTS)
@settings(max_examples=300, derandomize=True, **COMMON)
def test_some_files(files, tmp_path, **arguments):
    check(files, tmp_path, **arguments)


@pytest.mark.slow
@given(**ARGUMENTS)
@settings(max_examples=100_000, **COMMON)
def test_many_files(files, tmp_path, **arguments):
    check(files, tmp_path, **arguments)


@pytest.mark.parametrize("config", ["[" * 100_000, '{"transformer": ' * 3000, "9" * 10_000, "NaN", "3"])
def test_a_config_that_python_cannot_take_is_told(tmp_path, config):
    weights = {f"model.diffusion_model.{mark}": torch.ones(4, 32) for mark in LTX_MARKS}
    save_file(weights, tmp_path / "m.safetensors", metadata={"config": config})
    with pytest.raises(RayLTXError, match="config"):
        open_model_file(tmp_path / "m.safetensors")


@pytest.mark.parametrize("kind", [kind for kind in GGMLQuantizationType], ids=lambda kind: kind.name)
def test_an_empty_tensor_is_read_or_told(tmp_path, kind):
    plain = {mark: np.ones((4, 32), np.float16) for mark in LTX_MARKS}
    path = write_gguf(tmp_path / "m.gguf", {**plain, "empty": np.zeros((0, 256), np.float32)})
    data = bytearray(path.read_bytes())
    at = data.index(b"empty") + len(b"empty") + 4 + 16  # behind the number of dimensions, and two of them
    data[at : at + 4] = int(kind).to_bytes(4, "little")
    path.write_bytes(data)
    try:
        read_all(path)
        convert(path, tmp_path / "out.gguf", "Q8_0")
    except RayLTXError:
        pass


def test_a_split_file_with_text_for_a_number_is_told(tmp_path):
    fields = [("split.count", 3, GGUFValueType.UINT16), ("split.no", "two", GGUFValueType.STRING)]
    with pytest.raises(RayLTXError, match="of a model"):
        open_model_file(write_gguf(tmp_path / "m.gguf", fields=fields))
