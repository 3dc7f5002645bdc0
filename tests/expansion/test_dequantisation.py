"""Values out of blocks, against the gguf package's own dequantiser."""

import importlib.util
import logging
import os
import pickle
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_files import random_blocks

from rayltx.errors import InputError, UnsupportedError
from rayltx.expansion.comfyui_gguf import dequantisation
from rayltx.expansion.comfyui_gguf.block_layouts import LAYOUTS
from rayltx.expansion.comfyui_gguf.dequantisation import QuantisedTensor, dequantise

TYPES = pytest.mark.parametrize("type", list(LAYOUTS), ids=lambda type: type.name)
ONLY_IN_GGUF = (GGMLQuantizationType.IQ3_S, GGMLQuantizationType.TQ2_0, GGMLQuantizationType.MXFP4)


def bits(values):
    return values.numpy().view(np.int32) if isinstance(values, torch.Tensor) else values.view(np.int32)


def values_of(type, blocks, **kwargs):
    shape = (len(blocks), GGML_QUANT_SIZES[type][0])
    return dequantise(torch.from_numpy(blocks), type, shape, **{"dtype": torch.float32, **kwargs})


@TYPES
@pytest.mark.parametrize("num_blocks", [1, 7, 5000])
def test_float32_is_the_gguf_packages_bit_for_bit(type, num_blocks):
    blocks = random_blocks(type, max(num_blocks, 8))[-num_blocks:]
    expected = gguf.quants.dequantize(blocks, type)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(bits(values_of(type, blocks)), bits(expected))


@TYPES
@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_leave_no_seam(type, threads):
    """More than one portion of scales and of values, the last of each not full."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        num_blocks = 2**18 // GGML_QUANT_SIZES[type][0] * (5 if LAYOUTS[type].parts == 1 else 1) + 3
        blocks = random_blocks(type, num_blocks, seed=1)
        np.testing.assert_array_equal(bits(values_of(type, blocks)), bits(gguf.quants.dequantize(blocks, type)))
    finally:
        torch.set_num_threads(before)


@TYPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrower_dtype_is_rounded_once(type, dtype):
    blocks = random_blocks(type, 300)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, type)).to(dtype)
    assert torch.equal(values_of(type, blocks, dtype=dtype).view(torch.int16), expected.view(torch.int16))


@TYPES
def test_computing_in_a_narrower_dtype(type):
    """What ComfyUI-GGUF calls dequant_dtype. Scale, minimum, part's scale, product and sum are rounded to 8 bits each."""
    blocks = random_blocks(type, 300)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, type))
    found = values_of(type, blocks, compute_dtype=torch.bfloat16)
    assert found.dtype == torch.float32
    layout, data = LAYOUTS[type], torch.from_numpy(blocks)
    scale, minimum = layout.scales(data, torch.float32)
    terms = (layout.quants(data).view(300, layout.parts, layout.width) * scale[..., None]).abs()
    if minimum is not None:
        terms += minimum[..., None].abs()
    assert ((found - expected).abs() <= 4 * 2**-8 * terms.view(300, -1)).all()
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("type, stored", [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_plain_types(type, stored, dtype):
    values = torch.randn(3, 64).to(stored)
    data = values.view(torch.uint8)
    assert torch.equal(dequantise(data, GGMLQuantizationType[type], (3, 64), dtype), values.to(dtype))


def test_a_number_without_dimensions():
    data = torch.tensor(2.5).view(1).view(torch.uint8)
    assert dequantise(data, GGMLQuantizationType.F32, (), torch.float16).item() == 2.5


def test_a_shape_whose_rows_are_not_whole_blocks():
    blocks = random_blocks(GGMLQuantizationType.Q8_0, 9)
    values = dequantise(torch.from_numpy(blocks), GGMLQuantizationType.Q8_0, (2, 16, 3, 3), torch.float32)
    expected = gguf.quants.dequantize(blocks, GGMLQuantizationType.Q8_0).reshape(2, 16, 3, 3)
    np.testing.assert_array_equal(values.numpy(), expected)


@TYPES
def test_blocks_that_begin_anywhere_in_their_storage(type):
    blocks = random_blocks(type, 16)
    storage = torch.zeros(blocks.size + 3, dtype=torch.uint8)
    storage[3:] = torch.from_numpy(blocks).view(-1)
    found = dequantise(storage[3:], type, (16 * GGML_QUANT_SIZES[type][0],), torch.float32)
    np.testing.assert_array_equal(bits(found), bits(gguf.quants.dequantize(blocks, type).reshape(-1)))


@TYPES
def test_the_blocks_are_left_as_they_are(type):
    blocks = random_blocks(type, 16)
    before = blocks.copy()
    values_of(type, blocks)
    np.testing.assert_array_equal(blocks, before)


@TYPES
def test_no_blocks(type):
    assert values_of(type, random_blocks(type, 8)[:0]).shape == (0, GGML_QUANT_SIZES[type][0])


@pytest.mark.parametrize("type", ONLY_IN_GGUF, ids=lambda type: type.name)
def test_other_types_by_the_gguf_package_with_one_warning_each(type, caplog):
    dequantisation._log_slow_type.cache_clear()
    values = np.random.default_rng(0).integers(0, 100, (4, GGML_QUANT_SIZES[type][1] * 2), dtype=np.uint8)
    shape = (4, GGML_QUANT_SIZES[type][0] * 2)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found = dequantise(torch.from_numpy(values), type, shape, torch.float32)
    np.testing.assert_array_equal(found.numpy(), gguf.quants.dequantize(values, type))
    assert [type.name in record.message for record in caplog.records] == [True]


def test_a_type_that_nothing_decodes():
    type = GGMLQuantizationType.Q8_K
    with pytest.raises(UnsupportedError, match="Q8_K: nothing decodes this type"):
        dequantise(torch.zeros(GGML_QUANT_SIZES[type][1], dtype=torch.uint8), type, (256,), torch.float32)


def test_bytes_that_do_not_fit_the_shape():
    with pytest.raises(
        InputError, match=r"33 elements of torch.uint8 are not a Q8_0 tensor of shape \(32,\).*34 bytes"
    ):
        QuantisedTensor(torch.zeros(33, dtype=torch.uint8), GGMLQuantizationType.Q8_0, (32,))


def test_a_quantised_tensor_survives_pickling():
    blocks = random_blocks(GGMLQuantizationType.Q4_K, 8)
    tensor = QuantisedTensor(torch.from_numpy(blocks), GGMLQuantizationType.Q4_K, (8, 256))
    assert torch.equal(pickle.loads(pickle.dumps(tensor)).dequantise(), tensor.dequantise())


@pytest.fixture(scope="module")
def comfyui_gguf():
    folder = os.environ.get("COMFYUI_GGUF_PATH")
    if not folder or not (Path(folder) / "dequant.py").is_file():
        pytest.skip("needs COMFYUI_GGUF_PATH, the folder of a ComfyUI-GGUF checkout")
    spec = importlib.util.spec_from_file_location("comfyui_gguf_dequant", Path(folder) / "dequant.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@TYPES
def test_the_values_are_those_of_comfyui_gguf(type, comfyui_gguf):
    blocks = random_blocks(type, 500)
    shape = (500, GGML_QUANT_SIZES[type][0])
    theirs = comfyui_gguf.dequantize(torch.from_numpy(blocks), type, shape, dtype=torch.float32)
    assert torch.equal(values_of(type, blocks), theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@TYPES
def test_a_gpu_gives_the_same(type):
    blocks = random_blocks(type, 5000)
    shape = (5000, GGML_QUANT_SIZES[type][0])
    found = dequantise(torch.from_numpy(blocks).cuda(), type, shape, torch.float32)
    np.testing.assert_array_equal(bits(found.cpu()), bits(gguf.quants.dequantize(blocks, type)))
