"""ComfyUI's LTX models in small, for the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rayltx.comfy_dist.tiny_checkpoints import model_class, save_tiny_checkpoint  # noqa: F401
from rayltx.diffusion_models.lightricks.checkpoint import OFFICIAL_PREFIX
from rayltx.diffusion_models.lightricks.tiny_configs import COMFYUI_CONFIGS as CONFIGS  # noqa: F401


def slow(*values):
    """Parameters of a test that are left to `-m slow`."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# The one that has most of what the others have each time; those with `-m slow`.
VERSIONS = ["LTX-2.3", *slow("LTX-Video", "LTX-2", "LTX-2.5")]


def set_up_comfyui(path: str) -> None:
    """Make `comfy` importable, on the CPU, with default arguments."""
    if path not in sys.path:
        sys.path.insert(0, path)
    import comfy.options  # noqa: F401  (with argument parsing left off)
    from comfy.cli_args import args

    args.cpu = True


def quantise(path: Path, scaled: bool) -> None:
    """Make the block's matrices of a checkpoint fp8, as they are, or with a scale for each (ComfyUI's first format)."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for name in [
        name for name in tensors if "transformer_blocks" in name and tensors[name].ndim == 2 and "table" not in name
    ]:
        weight = tensors[name].float()
        if scaled:
            scale = weight.abs().max() / 448.0
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".scale_weight")] = scale.reshape(1)
        else:
            tensors[name] = weight.to(torch.float8_e4m3fn)
    if scaled:
        tensors[OFFICIAL_PREFIX + "scaled_fp8"] = torch.tensor([], dtype=torch.float8_e4m3fn)
    else:
        tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata=metadata)
