"""Random blocks and small files for the tests of GGUF."""

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from rayltx.diffusion_models.lightricks.checkpoint import LTX_MARKS
from rayltx.expansion.comfyui_gguf.quant_types import SCALE_OFFSETS


def random_blocks(type, num_blocks, seed=0):
    """(num_blocks, bytes) uint8: any bits, with scales that are finite, negative, zero and subnormal among them."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (num_blocks, GGML_QUANT_SIZES[type][1]), dtype=np.uint8)
    blocks[: num_blocks // 8] = 0xFF  # the extreme integers
    blocks[num_blocks // 8 : num_blocks // 4] = 0
    for offset in SCALE_OFFSETS[type]:
        scales = generator.integers(0, 2**16, num_blocks, dtype=np.uint16)
        scales[(scales & 0x7C00) == 0x7C00] = 0x8001  # the smallest negative subnormal, for what would be infinite
        scales[1::4] = generator.integers(0, 0x400, len(scales[1::4]), dtype=np.uint16)  # positive subnormals
        scales[:4] = 0x7BFF, 0xFBFF, 0x0000, 0x8000
        blocks[:, offset : offset + 2] = scales[:, None].view(np.uint8)
    return blocks


def write_gguf(path, tensors=None, fields=(), architecture="ltxv", prefix=""):
    """A file of `name: array | (type, rows of blocks)`; without tensors, two that make it look like LTX.

    fields: (key, value, GGUFValueType).
    """
    if tensors is None:
        tensors = {prefix + mark: np.ones((4, 32), np.float32) for mark in LTX_MARKS}
    writer = gguf.GGUFWriter(path, architecture or "")
    for field in fields:
        if field[0] == gguf.Keys.General.ALIGNMENT:
            writer.add_custom_alignment(field[1])  # and writes by it
        else:
            writer.add_key_value(*field)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[1], raw_dtype=GGMLQuantizationType(tensor[0]))
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
