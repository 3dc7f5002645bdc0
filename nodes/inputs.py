"""Input definitions that several nodes share."""

from __future__ import annotations

from typing import Any

from rayltx.comfy_dist.dtype_choices import WEIGHT_DTYPES

CATEGORY = "Raylight"
# Words by which ComfyUI's search finds what one begins with. Other nodes have none of them: among those that a word finds
# alike, the search prefers names of the word's length.
BEGINNING = ["multi gpu", "multiple gpus", "several gpus", "two gpus", "parallel", "distributed", "ltx", "ray"]
CUSTOM_SAMPLING = "Raylight/extra/custom_sampling"
Schema = dict[str, Any]
Definition = tuple[Any, dict[str, Any]]

MAX_SEED = 0xFFFFFFFFFFFFFFFF
MAX_WORKERS = 64  # a fixed number: what this machine has is looked at when the node runs


def advanced(definition: Definition) -> Definition:
    """An input that ComfyUI's Nodes 2.0 folds away until one asks for more. It stays where it is in the order of values."""
    kind, options = definition
    return kind, {**options, "advanced": True}


def seed(tooltip: str = "The random seed of the noise. The same seed gives the same video.") -> Definition:
    return "INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True, "tooltip": tooltip}


def cfg(default: float = 8.0) -> Definition:
    return "FLOAT", {
        "default": default, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01,
        "tooltip": "How strongly the text guides. 1 skips the negative text, and half of the work.",
    }  # fmt: skip


def steps() -> Definition:
    return "INT", {
        "default": 20, "min": 1, "max": 10000,
        "tooltip": "Steps of the schedule. With sigmas connected, their number counts, and a different number here is not used.",
    }  # fmt: skip


def sampler_name() -> Definition:
    import comfy.samplers

    return comfy.samplers.KSampler.SAMPLERS, {"tooltip": "Any sampler that ComfyUI has."}


def scheduler() -> Definition:
    import comfy.samplers

    tooltip = "How the noise levels are spaced. Not used with sigmas connected."
    return comfy.samplers.KSampler.SCHEDULERS, {"tooltip": tooltip}


def denoise() -> Definition:
    return "FLOAT", {
        "default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01,
        "tooltip": "How much to change a latent that holds a video already: below 1, only the last part of the schedule runs.",
    }  # fmt: skip


SIGMAS = (
    "SIGMAS",
    {
        "tooltip": "Noise levels from a scheduler node, such as LTXVScheduler. They take the place of steps and scheduler."
    },
)
RAY_ACTORS = ("RAY_ACTORS", {"tooltip": "The model on the workers, from a Ray loader."})
POSITIVE = ("CONDITIONING", {"tooltip": "The text to follow."})
NEGATIVE = ("CONDITIONING", {"tooltip": "The text to stay away from. Not used at cfg 1."})
LATENT = ("LATENT", {"tooltip": "The latent to start from: an empty one, or a video to change."})
SAMPLER = ("SAMPLER", {"tooltip": "From a sampler node, such as KSamplerSelect."})
CUSTOM_SIGMAS = ("SIGMAS", {"tooltip": "Noise levels from a scheduler node, such as LTXVScheduler."})
ADD_NOISE = (
    "BOOLEAN",
    {"default": True, "tooltip": "Off for the second of two passes, whose latent holds noise already."},
)
MAX_VRAM: Definition = (
    "FLOAT",
    {
        "default": 0.0, "min": 0.0, "max": 1024.0, "step": 0.5,
        "tooltip": "The weights that each GPU may hold, in GiB; the rest is streamed from host memory, block by block. 0: as "
        "many as fit next to the video.",
    },
)  # fmt: skip
WEIGHT_DTYPE: Definition = (
    list(WEIGHT_DTYPES),
    {"default": "default", "tooltip": "The dtype of the weights in memory. default: as ComfyUI chooses."},
)
DEVICE: Definition = (
    ["auto", "cuda", "cpu"],
    {
        "default": "auto",
        "tooltip": "auto: what ComfyUI itself runs on. cpu runs the workers without a GPU: slow, and exact, to try things out.",
    },
)
