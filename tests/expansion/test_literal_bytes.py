"""Files written out byte by byte: no library that reads one has made it."""

import torch
from gguf import GGMLQuantizationType

from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
from rayltx.expansion.comfyui_gguf.checkpoint import open_model_file
from rayltx.expansion.comfyui_gguf.convert import convert
from rayltx.expansion.comfyui_gguf.loader import gguf_sd_loader

# Numbers in a GGUF file are little-endian; fromhex skips the spaces.
GGUF = bytes.fromhex(
    "47475546"  # "GGUF"
    "03000000"  # version 3
    "0200000000000000"  # 2 tensors
    "0200000000000000"  # 2 fields of metadata
    # The first field: its key of 20 bytes, "general.architecture";
    "1400000000000000 67656e6572616c 2e 617263686974656374757265"
    "08000000"  # a text,
    "0400000000000000 6c747876"  # of 4 bytes, "ltxv"
    # The second field: its key of 6 bytes, "config";
    "0600000000000000 636f6e666967"
    "08000000"  # a text,
    "1200000000000000 7b227472616e73666f726d6572223a7b7d7d"  # of 18 bytes, '{"transformer":{}}'
    # The first tensor: its name of 1 byte, "q";
    "0100000000000000 71"
    "02000000"  # 2 dimensions:
    "2000000000000000 0200000000000000"  # rows of 32 elements, 2 rows
    "08000000"  # Q8_0
    "0000000000000000"  # at the beginning of the data
    # The second tensor: its name of 1 byte, "f";
    "0100000000000000 66"
    "01000000"  # 1 dimension:
    "0300000000000000"  # 3 elements
    "00000000"  # F32
    "6000000000000000"  # at byte 96 of the data: behind 2 blocks of 34, at a multiple of 32
    # These were 186 bytes: on to 192, a multiple of 32, where the data begins.
    "000000000000"
    # A block of Q8_0: the scale 0.5 as a half, then 32 signed bytes, 0 to 31;
    "0038 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
    # and one with the scale -2.0: 127, -128, -1, 1, and zeros.
    "00c0 7f80ff01 00000000000000000000000000000000000000000000000000000000"
    # On to byte 96 of the data.
    "00000000000000000000000000000000000000000000000000000000"
    "0000803f"  # 1.0
    "000020c1"  # -10.0
    "0000203e"  # 0.15625
)
Q = [[0.5 * value for value in range(32)], [-254.0, 256.0, 2.0, -2.0] + [0.0] * 28]
F = [1.0, -10.0, 0.15625]

SAFETENSORS = (
    bytes.fromhex("1e01000000000000")  # the length of the text that follows: 286
    + b'{"__metadata__":{"config":"{\\"transformer\\":{\\"num_layers\\":1}}"},'
    + b'"model.diffusion_model.adaln_single.emb.timestep_embedder.linear_1.bias":'
    + b'{"dtype":"BF16","shape":[2],"data_offsets":[8,12]},'
    + b'"model.diffusion_model.patchify_proj.weight":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}'
    + bytes.fromhex(
        "0000803f"  # patchify_proj.weight: 1.0,
        "000020c1"  # -10.0
        "c03f"  # linear_1.bias, the upper half of a float: 1.5,
        "00c0"  # -2.0
    )
)


def test_a_gguf_file(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(GGUF)
    checkpoint = open_model_file(path)
    assert checkpoint.metadata == {"general.architecture": "ltxv", "config": '{"transformer":{}}'}
    assert checkpoint.config == {"transformer": {}}
    assert list(checkpoint.tensors) == ["q", "f"]
    q, f = checkpoint.tensors.values()
    assert (q.type_name, q.values_shape, q.dtype, q.shape) == ("Q8_0", (2, 32), torch.uint8, (2, 34))
    assert (f.type_name, f.values_shape, f.dtype) == ("float32", (3,), torch.float32)
    assert (checkpoint.file.tensors["q"].offset, checkpoint.file.tensors["f"].offset) == (192, 288)
    with checkpoint.open() as reader:
        assert reader.read("q").flatten().tolist() == list(GGUF[192:260])
        assert reader.read("q", torch.float32).tolist() == Q
        assert reader.read("f").tolist() == F
    state_dict, extra = gguf_sd_loader(path)
    assert (state_dict["q"].type, extra["arch_str"]) == (GGMLQuantizationType.Q8_0, "ltxv")
    assert state_dict["q"].dequantise(torch.bfloat16).tolist() == Q, "all of them are exact in bfloat16"


def test_a_safetensors_file(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(SAFETENSORS)
    checkpoint = open_checkpoint(path)
    assert checkpoint.prefix == "model.diffusion_model."
    assert checkpoint.config == {"transformer": {"num_layers": 1}}
    weight, bias = "patchify_proj.weight", "adaln_single.emb.timestep_embedder.linear_1.bias"
    found = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    assert found == {weight: (torch.float32, (1, 2)), bias: (torch.bfloat16, (2,))}
    with checkpoint.open() as reader:
        assert reader.read(weight).tolist() == [[1.0, -10.0]]
        assert reader.read(bias).tolist() == [1.5, -2.0]


def test_a_converted_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(GGUF)
    convert(tmp_path / "m.gguf", tmp_path / "m.safetensors", "bfloat16")
    written = (tmp_path / "m.safetensors").read_bytes()
    text = (
        b'{"__metadata__": {"general.architecture": "ltxv", "config": "{\\"transformer\\":{}}"}, '
        b'"q": {"dtype": "BF16", "shape": [2, 32], "data_offsets": [0, 128]}, '
        b'"f": {"dtype": "BF16", "shape": [3], "data_offsets": [128, 134]}}'
    )
    assert written[:8] == bytes.fromhex("e000000000000000")  # 224, a multiple of 8
    assert written[8:232].rstrip(b" ") == text
    assert written[232:240] == bytes.fromhex("0000 003f 803f c03f")  # 0.0, 0.5, 1.0, 1.5
    assert written[296:304] == bytes.fromhex("7ec3 8043 0040 00c0")  # -254.0, 256.0, 2.0, -2.0
    assert written[360:] == bytes.fromhex("803f 20c1 203e")  # 1.0, -10.0, 0.15625
