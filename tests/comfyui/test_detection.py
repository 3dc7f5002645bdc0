"""What detection finds does not depend on how ComfyUI's main program keeps weights in memory."""

from __future__ import annotations

import contextlib

import pytest
import torch
from comfy_models import CONFIGS, quantise, save_tiny_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rayltx.comfy_dist.dtype_choices import WEIGHT_DTYPES
from rayltx.errors import CheckpointError
from rayltx.expansion.comfyui_gguf.checkpoint import open_model_file
from rayltx.expansion.comfyui_gguf.convert import convert

pytestmark = pytest.mark.comfyui


@contextlib.contextmanager
def dynamic_vram():
    """As ComfyUI's main program has it on NVIDIA cards."""
    import comfy.memory_management as memory_management

    memory_management.aimdo_enabled = True
    try:
        yield
        assert memory_management.aimdo_enabled, "detection has left it off"
    finally:
        memory_management.aimdo_enabled = False


def found_in(path, **options):
    """What detection tells the workers of a file, and the names and shapes of the twin's parameters."""
    from rayltx.comfy_dist.main_process.detection import detect

    detected = detect(open_model_file(path), **options)
    parameters = detected.base_model.diffusion_model.named_parameters()
    return detected.spec, dict(detected.dtypes), {name: (p.shape, p.dtype) for name, p in parameters}


@pytest.fixture(scope="module")
def files(comfy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detection")

    def get(version, kind):
        path = folder / f"{version} {kind}.safetensors"
        if not path.exists():
            save_tiny_checkpoint(path, version, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
            if kind.startswith("fp8"):
                quantise(path, scaled=kind == "fp8 scaled")
        return path

    return get


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("version", CONFIGS)
def test_dynamic_vram_changes_nothing(files, version, weight_dtype):
    path = files(version, "bfloat16")
    expected = found_in(path, weight_dtype=weight_dtype)
    assert any(".to_q.weight" in name for name in expected[2])
    if weight_dtype in ("fp16", "fp8_e5m2"):
        assert sum(".to_q.weight" in name for name in expected[1]) > 2, "every linear layer is converted"
    with dynamic_vram():
        assert found_in(path, weight_dtype=weight_dtype) == expected


@pytest.mark.parametrize("kind", ["fp8", "fp8 scaled", "gguf"])
def test_dynamic_vram_changes_nothing_for_quantised_files(files, tmp_path, kind):
    if kind == "gguf":
        path = tmp_path / "model.gguf"
        convert(files("LTX-2.3", "float32"), path, "Q8_0")
    else:
        path = files("LTX-2.3", kind)
    expected = found_in(path)
    with dynamic_vram():
        assert found_in(path) == expected


def test_a_missing_weight_is_noticed_with_dynamic_vram(files, tmp_path):
    source = files("LTX-Video", "float32")
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(source)
    missing = next(name for name in tensors if name.endswith("blocks.1.attn1.to_q.weight"))
    del tensors[missing]
    save_file(tensors, tmp_path / "damaged.safetensors", metadata=metadata)
    with dynamic_vram(), pytest.raises(CheckpointError, match=r"transformer_blocks.1.attn1.to_q.weight is missing"):
        found_in(tmp_path / "damaged.safetensors")
