"""Loading, streaming and unloading on a device with memory of its own, which is the CPU in disguise."""

from __future__ import annotations

import pytest
import torch
from comfy_on_device import BASES, PLENTY, SAME, with_lora

from rayltx.diffusion_models.lightricks.relative_error import relative_error

pytestmark = pytest.mark.comfyui


@pytest.mark.parametrize("base", BASES)
def test_partly_loaded_is_fully_loaded_bit_for_bit_and_unloading_leaves_nothing(on_device, base):
    device = on_device(base)
    assert device.bytes_there() == 0
    device.load(PLENTY)
    assert device.bytes_there() >= 0.9 * device.size
    whole = device.forward()
    inputs, outputs = device.layer_outputs()
    device.unload()
    assert device.bytes_there() == 0 and device.is_shared_again()

    device.load(device.size // 2)
    assert 0 < device.bytes_there() < 0.8 * device.size
    assert device.forward().shape == whole.shape and relative_error(device.forward(), whole) <= SAME
    # By layer: the CPU's attention differs in the last bit with where its inputs lie in memory.
    streamed = device.layer_outputs(inputs)
    assert len(streamed) > 20 and [name for name in streamed if not torch.equal(streamed[name], outputs[name])] == []
    device.unload()
    assert device.bytes_there() == 0 and device.is_shared_again()

    device.load(PLENTY)
    assert relative_error(device.forward(), whole) <= SAME


@pytest.mark.parametrize("base", BASES)
def test_a_lora_counts_wherever_its_layers_are_and_goes_without_a_trace(on_device, base):
    device = on_device(base)
    device.load(PLENTY)
    plain = device.forward()
    device.unload()
    patched = with_lora(device)
    device.load(PLENTY, patched)
    whole = device.forward()
    assert relative_error(whole, plain) > 1e-2
    device.unload()
    device.load(device.size // 2, patched)
    rounding = 2e-2 if base == "bfloat16" else SAME  # a patched weight that is held is rounded, one that is used is not
    assert relative_error(device.forward(), whole) <= rounding
    device.unload()
    assert device.bytes_there() == 0 and device.is_shared_again()
    device.load(PLENTY)
    assert relative_error(device.forward(), plain) <= SAME


@pytest.mark.parametrize("state", ["NORMAL_VRAM", "LOW_VRAM", "NO_VRAM", "HIGH_VRAM"])
def test_unloading_leaves_nothing_under_every_memory_flag(on_device, monkeypatch, state):
    """--highvram and --gpu-only make the GPU the place to unload to, which frees nothing there."""
    import comfy.model_management as management

    monkeypatch.setattr(management, "vram_state", management.VRAMState[state])
    device = on_device("float32")
    device.load(PLENTY)
    if state != "NO_VRAM":
        assert device.bytes_there() > 0
    device.forward()
    device.unload()
    assert device.bytes_there() == 0 and device.is_shared_again()
    assert device.patcher.loaded_size() == 0
