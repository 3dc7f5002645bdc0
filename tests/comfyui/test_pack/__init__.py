"""Nodes for the tests: inputs from seeds in place of text encoders and VAEs, and outputs as numbers."""

import os
import sys

import comfy.memory_management
import folder_paths
import torch
from safetensors.torch import save_file

sys.path.append("@TESTS@")  # filled in where the folder is copied to
import comfy_scenarios as scenarios

if os.environ.get("RAYLTX_TESTS_DYNAMIC_VRAM") == "1":  # as the main program has it on NVIDIA cards
    comfy.memory_management.aimdo_enabled = True


def _node(inputs, outputs, run, output_node=False):
    class Node:
        CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "tests", "run", outputs, output_node

        @classmethod
        def INPUT_TYPES(cls):  # noqa: N802
            return {"required": inputs}

        def run(self, **values):
            return run(**values)

    return Node


def _int(default=0):
    return ("INT", {"default": default, "max": 2**31})


def conditioning(seed, width, masked):
    tensor = torch.randn(1, scenarios.TEXT_TOKENS, width, generator=torch.Generator().manual_seed(seed))
    extra = {"frame_rate": 25.0}
    if masked >= 0:
        extra["attention_mask"] = torch.ones(1, scenarios.TEXT_TOKENS, dtype=torch.int64)
        extra["attention_mask"][:, scenarios.TEXT_TOKENS - masked :] = 0
    return ([[tensor, extra]],)


def latent(seed, batch, channels, frames, height, width):
    generator = torch.Generator().manual_seed(seed)
    return ({"samples": torch.randn(batch, channels, frames, height, width, generator=generator) * 0.1},)


def audio_latent(batch, tokens):
    return ({"samples": torch.zeros(batch, 8, tokens, 16), "type": "audio"},)


def image(seed, width, height, count):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, height, width, 3, generator=generator),)


def sound(seconds):
    waveform = torch.randn(1, 2, 16000 * seconds, generator=torch.Generator().manual_seed(7)) * 0.1
    return ({"waveform": waveform, "sample_rate": 16000},)


def masked(latent):
    mask = torch.ones(1, 1, *latent["samples"].shape[2:])
    mask[:, :, 1:, 1:3, 2:5] = 0.3
    return ({**latent, "noise_mask": mask},)


def sigmas(text):
    return (torch.tensor([float(part) for part in text.split(",")]),)


def save(latent, name):
    parts = {str(number): tensor for number, tensor in enumerate(scenarios.tensors_of(latent))}
    save_file(parts, f"{folder_paths.get_output_directory()}/{name}.safetensors")
    return {"ui": {"tests_name": [name]}}


def save_image(image, name):
    return save({"samples": image.contiguous()}, name)


def save_sound(audio, name):
    return save({"samples": audio["waveform"].contiguous()}, name)


NODE_CLASS_MAPPINGS = {
    "TestConditioning": _node(
        {"seed": _int(), "width": _int(), "masked": ("INT", {"default": 3, "min": -1})}, ("CONDITIONING",), conditioning
    ),
    "TestLatent": _node(
        {name: _int() for name in ("seed", "batch", "channels", "frames", "height", "width")}, ("LATENT",), latent
    ),
    "TestAudioLatent": _node({"batch": _int(), "tokens": _int()}, ("LATENT",), audio_latent),
    "TestImage": _node({name: _int() for name in ("seed", "width", "height", "count")}, ("IMAGE",), image),
    "TestMasked": _node({"latent": ("LATENT",)}, ("LATENT",), masked),
    "TestAudioVAE": _node({}, ("VAE",), lambda: (scenarios.LinearAudioVAE(),)),
    "TestSound": _node({"seconds": _int(1)}, ("AUDIO",), sound),
    "TestVAE": _node({}, ("VAE",), lambda: (scenarios.LinearVAE(),)),
    "TestSigmas": _node({"text": ("STRING",)}, ("SIGMAS",), sigmas),
    "TestSaveImage": _node({"image": ("IMAGE",), "name": ("STRING",)}, (), save_image, output_node=True),
    "TestSaveSound": _node({"audio": ("AUDIO",), "name": ("STRING",)}, (), save_sound, output_node=True),
    "TestSave": _node({"latent": ("LATENT",), "name": ("STRING",)}, (), save, output_node=True),
}
