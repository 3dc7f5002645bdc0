"""From safetensors to GGUF and back."""

import json

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from gguf_files import write_gguf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rayltx.diffusion_models.lightricks.checkpoint import LTX_MARKS
from rayltx.errors import CheckpointError, InputError, UnsupportedError
from rayltx.expansion.comfyui_gguf import convert as convert_module
from rayltx.expansion.comfyui_gguf.convert import convert, quantisable_types
from rayltx.expansion.comfyui_gguf.loader import gguf_sd_loader
from rayltx.expansion.comfyui_gguf.reading import open_gguf, read_tensor
from rayltx.expansion.comfyui_gguf.scales import check_scales

METADATA = {"config": json.dumps({"transformer": {"num_layers": 2}}), "empty": "", "note": "größer\n"}
MATRIX = "transformer_blocks.0.attn1.to_q.weight"


def tensors_of(dtype=torch.float32, prefix=""):
    torch.manual_seed(0)
    shapes = {
        LTX_MARKS[0]: (64,),
        LTX_MARKS[1]: (64, 32),
        MATRIX: (64, 256),
        "transformer_blocks.0.attn1.q_norm.weight": (64, 32),
        "transformer_blocks.0.scale_shift_table": (6, 512),
        "small.weight": (4, 32),
        "odd.weight": (50, 50),
        "conv.weight": (4, 4, 2, 2, 32),
        "scalar": (),
    }
    return {prefix + name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.fixture
def source(tmp_path):
    def save(dtype=torch.float32, prefix="", **more):
        path = tmp_path / "model.safetensors"
        save_file({**tensors_of(dtype, prefix), **more}, path, METADATA)
        return path

    return save


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("type", ["F32", None])
def test_there_and_back_is_bit_identical(source, tmp_path, prefix, type):
    target, back = tmp_path / "m.gguf", tmp_path / "back.safetensors"
    convert(source(prefix=prefix), target, type)
    convert(target, back)
    expected, found = tensors_of(), load_file(back)
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name


def test_metadata_goes_both_ways(source, tmp_path):
    target, back = tmp_path / "m.gguf", tmp_path / "back.safetensors"
    convert(source(), target, "Q8_0")
    stored = open_gguf(target)
    assert stored.architecture == "ltxv"
    assert METADATA.items() <= stored.metadata.items()
    convert(target, back)
    found = metadata_of(back)
    assert METADATA.items() <= found.items()
    assert found["general.architecture"] == "ltxv"
    assert not any("orig_shape" in key for key in found)
    convert(back, target)  # what describes the file is not taken for the model's
    assert open_gguf(target).metadata == stored.metadata


def test_metadata_of_other_types_becomes_text(tmp_path):
    fields = [
        ("a.int", 3, GGUFValueType.INT32),
        ("a.bool", True, GGUFValueType.BOOL),
        ("a.list", ["x", "y"], GGUFValueType.ARRAY),
        ("general.alignment", 32, GGUFValueType.UINT32),
    ]
    convert(write_gguf(tmp_path / "m.gguf", fields=fields), tmp_path / "m.safetensors")
    found = metadata_of(tmp_path / "m.safetensors")
    assert found == {"general.architecture": "ltxv", "a.int": "3", "a.bool": "True", "a.list": '["x", "y"]'}


@pytest.mark.parametrize("type", [name for name in quantisable_types() if name not in ("F32", "F16", "BF16")])
def test_matrices_are_quantised_as_the_gguf_package_does(source, tmp_path, type):
    target = tmp_path / "m.gguf"
    convert(source(), target, type.lower())
    file = open_gguf(target)
    check_scales(file)
    expected = tensors_of()
    quantised = {name for name, tensor in file.tensors.items() if tensor.is_quantised}
    assert MATRIX in quantised
    assert quantised <= {MATRIX, LTX_MARKS[1], "conv.weight"}
    for name in file.tensors:
        assert file.tensors[name].shape == expected[name].shape
        found = read_tensor(file, name)
        if name in quantised:
            rows = expected[name].reshape(-1, expected[name].shape[-1]).numpy()
            qtype = GGMLQuantizationType[type]
            exact = gguf.quants.dequantize(gguf.quants.quantize(rows, qtype), qtype)
            assert torch.equal(found.dequantise(), torch.from_numpy(exact).view(expected[name].shape))
        else:
            assert torch.equal(found, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_not_quantised_keeps_its_dtype(source, tmp_path, dtype):
    convert(source(dtype), tmp_path / "m.gguf", "Q4_0")
    state_dict, _ = gguf_sd_loader(tmp_path / "m.gguf")
    for name in (LTX_MARKS[0], "transformer_blocks.0.scale_shift_table", "odd.weight"):
        assert state_dict[name].dtype == dtype
        assert torch.equal(state_dict[name], tensors_of(dtype)[name])
    assert state_dict["scalar"].item() == tensors_of(dtype)["scalar"].item()


def test_integers_and_float8_are_kept(source, tmp_path):
    more = {"ids": torch.arange(5), "eight": torch.randn(40, 64).to(torch.float8_e4m3fn)}
    convert(source(**more), tmp_path / "m.gguf", "F32")
    state_dict, _ = gguf_sd_loader(tmp_path / "m.gguf")
    assert torch.equal(state_dict["ids"], more["ids"])
    assert torch.equal(state_dict["eight"], more["eight"].float())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_blocks_to_a_dtype(source, tmp_path, dtype):
    convert(source(ids=torch.arange(5)), tmp_path / "m.gguf", "Q8_0")
    convert(tmp_path / "m.gguf", tmp_path / "back.safetensors", dtype)
    found = load_file(tmp_path / "back.safetensors")
    assert {str(tensor.dtype) for name, tensor in found.items() if name != "ids"} == {f"torch.{dtype}"}
    exact = read_tensor(open_gguf(tmp_path / "m.gguf"), MATRIX).dequantise()
    assert torch.equal(found[MATRIX], exact.to(getattr(torch, dtype)))
    assert torch.equal(found["ids"], torch.arange(5))


def test_progress_is_told(source, tmp_path):
    calls = []
    convert(source(), tmp_path / "m.gguf", "Q8_0", progress=lambda *call: calls.append(call))
    assert [done for done, _, _ in calls] == list(range(10))
    assert {total for _, total, _ in calls} == {9}
    assert calls[-1][2] == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("back", [False, True])
def test_what_is_interrupted_leaves_nothing(source, tmp_path, error, back):
    start, target = source(), tmp_path / "m.gguf"
    if back:
        convert(start, target)
        start, target = target, tmp_path / "back.safetensors"
    target.write_bytes(b"what was there")
    before = sorted(path.name for path in tmp_path.iterdir())

    def interrupt(done, total, name):
        if done == 4:
            raise error

    with pytest.raises(error):
        convert(start, target, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert target.read_bytes() == b"what was there"


@pytest.mark.parametrize(
    "source_name, target_name, type, message",
    [
        ("model.safetensors", "m.safetensors", None, "one must be a .gguf file"),
        ("model.safetensors", "m.bin", None, "one must be a .gguf file"),
        ("model.safetensors", "m.gguf", "Q9_9", "type=Q9_9 must be one of F32, F16"),
        ("model.safetensors", "m.gguf", "Q4_K", "type=Q4_K must be one of"),
        ("model.safetensors", "model.safetensors", None, "the same file"),
        ("model.safetensors", "missing/m.gguf", None, "there is no folder"),
    ],
)
def test_what_cannot_be_asked(source, tmp_path, source_name, target_name, type, message):
    source()
    with pytest.raises(InputError, match=message):
        convert(tmp_path / source_name, tmp_path / target_name, type)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_dtype_that_cannot_be(source, tmp_path):
    convert(source(), tmp_path / "m.gguf")
    with pytest.raises(InputError, match="type=Q8_0 must be one of float32, float16, bfloat16"):
        convert(tmp_path / "m.gguf", tmp_path / "back.safetensors", "Q8_0")


@pytest.mark.parametrize(
    "more, message",
    [
        ({"mask": torch.zeros(3, dtype=torch.bool)}, "tensor mask: a GGUF file cannot hold the dtype BOOL"),
        ({"a.weight_scale": torch.ones(1)}, "a.weight_scale: scaled 8-bit weights"),
    ],
)
def test_tensors_that_a_gguf_file_cannot_hold(source, tmp_path, more, message):
    with pytest.raises(UnsupportedError, match=message):
        convert(source(**more), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_values_too_large_for_float16(source, tmp_path):
    with pytest.raises(UnsupportedError, match=r"large\.weight: its largest value, 100000, exceeds F16; use BF16"):
        convert(source(**{"large.weight": torch.full((64, 32), 1e5)}), tmp_path / "m.gguf", "F16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_sources_that_are_not_ltx_or_not_whole(source, tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        convert(path, tmp_path / "m.gguf")
    save_file({"double_blocks.0.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="not an LTX transformer"):
        convert(path, tmp_path / "m.gguf")
    path.write_bytes(source().read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        convert(path, tmp_path / "m.gguf")


def test_the_types_that_can_be_written():
    assert {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"} <= set(quantisable_types())
    assert "Q4_K" not in quantisable_types()


def test_the_command(source, tmp_path, capsys):
    from rayltx.cli.convert import run_convert

    run_convert(source(), tmp_path / "m.gguf", "Q8_0")
    assert "m.gguf" in capsys.readouterr().out
    assert convert_module.open_gguf(tmp_path / "m.gguf").architecture == "ltxv"
