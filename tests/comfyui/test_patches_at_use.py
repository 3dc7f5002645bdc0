"""Which patches a quantised layer has, whatever ComfyUI's patcher has done with the layer. In one process."""

from __future__ import annotations

import comfy_scenarios as scenarios
import pytest
import torch
from comfy_models import CONFIGS, save_tiny_checkpoint

from rayltx.expansion.comfyui_gguf.convert import convert

pytestmark = pytest.mark.comfyui
LAYERS = ("diffusion_model.transformer_blocks.0.attn1.to_q", "diffusion_model.transformer_blocks.1.ff.net.0.proj")
CPU = torch.device("cpu")


@pytest.fixture
def patcher(comfy, tmp_path):
    """A worker's patcher on a GGUF file, with a LoRA on two layers."""
    import comfy.sd

    from rayltx.comfy_dist.main_process.detection import detect
    from rayltx.comfy_dist.worker_process.model_on_shared_weights import build_on
    from rayltx.expansion.comfyui_gguf.checkpoint import open_gguf_checkpoint

    save_tiny_checkpoint(tmp_path / "model.safetensors", "LTX-Video")
    convert(tmp_path / "model.safetensors", tmp_path / "model.gguf", "Q8_0")
    with torch.inference_mode():
        checkpoint = open_gguf_checkpoint(tmp_path / "model.gguf")
        detected = detect(checkpoint)
        with checkpoint.open() as reader:
            tensors = {name: reader.read(name, detected.dtypes.get(name)) for name in checkpoint.tensors}
        base = build_on(tensors, detected.spec)
        patched = comfy.sd.load_lora_for_models(base, None, scenarios.make_lora(CONFIGS["LTX-Video"]), 1.0, 0)[0]
        yield patched


def patches(patcher):
    """The kinds of functions that each layer of the LoRA has, by name."""
    return [[type(f).__name__ for f in patcher.model.get_submodule(name).weight_function] for name in LAYERS]


ONE = [["PatchAtUse"], ["PatchAtUse"]]


def test_one_patch_after_every_load(patcher):
    for budget in (0, patcher.model_size() * 2 // 3, patcher.model_size() // 3, 0):
        patcher.weight_budget = budget
        for _ in range(3):
            patcher.load(CPU, lowvram_model_memory=10**12)
            assert patches(patcher) == ONE


def test_one_patch_after_a_part_is_unloaded(patcher):
    patcher.load(CPU, lowvram_model_memory=10**12)
    patcher.partially_unload(CPU, patcher.model_size() // 2)
    assert patches(patcher) == ONE
    patcher.unpatch_model(CPU)
    assert patches(patcher) == [[], []]


def test_another_models_patches_take_the_place(patcher):
    bare = patcher.clone()
    bare.patches = {}
    patcher.load(CPU, lowvram_model_memory=10**12)
    bare.load(CPU, lowvram_model_memory=10**12)
    assert patches(patcher) == [[], []]


def test_hooks_come_and_go_with_every_step(patcher):
    """On weights, which are quantised, and on biases, which are not, and whose copies ComfyUI may keep."""
    from rayltx.comfy_dist.wire import HookPatches
    from rayltx.comfy_dist.worker_process.shared_patcher import RemoteHooks

    combined = {}
    for name in LAYERS:
        layer = patcher.model.get_submodule(name)
        weight, bias = torch.ones(layer.block_format.shape), torch.ones_like(layer.bias)
        combined[f"{name}.weight"] = [(1.0, ("diff", (weight,)), 1.0, None, None)]
        combined[f"{name}.bias"] = [(1.0, ("diff", (bias,)), 1.0, None, None)]
    hooks = RemoteHooks(HookPatches("a", combined))
    patcher.load(CPU, lowvram_model_memory=10**12)
    bias = patcher.model.get_submodule(LAYERS[0]).bias.clone()
    for _ in range(3):
        patcher.patch_hooks(hooks)
        assert patches(patcher) == [["PatchAtUse"] * 2] * 2
        assert torch.allclose(patcher.model.get_submodule(LAYERS[0]).bias, bias + 1)
        patcher.patch_hooks(None)
        assert patches(patcher) == ONE
        assert torch.equal(patcher.model.get_submodule(LAYERS[0]).bias, bias)


def test_a_patched_bias_leaves_the_stored_one(patcher):
    patcher.load(CPU, lowvram_model_memory=10**12)
    layer = patcher.model.get_submodule(LAYERS[0])
    stored = layer.bias.clone()
    layer.bias_function = [lambda bias: bias.add_(1.0)]
    x = torch.ones(1, layer.in_features)
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(layer.bias, stored)
