"""The command line on a real ComfyUI."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import rayltx_command
from comfy_checkout import find_comfyui
from comfy_models import CONFIGS, save_tiny_checkpoint
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


rayltx = functools.partial(rayltx_command.rayltx, timeout=300)


@pytest.fixture(autouse=True)
def needs_the_command_lines_packages(comfy):
    pytest.importorskip("typer", reason="the command line's packages are not in ComfyUI's Python: install rayltx[cli]")
    pytest.importorskip(
        "imageio", reason="the command line's packages are not in ComfyUI's Python: install rayltx[cli]"
    )


def test_check_prints_the_table(comfy):
    done = rayltx("check", "--comfyui", find_comfyui(), "--workers", 2, "--model", "LTX-2", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "LTX-2" in done.stdout and "text to video" in done.stdout and "2 x 1" in done.stdout


def test_generate_equals_one_worker(comfy, tmp_path):
    import torch

    checkpoint, text, out = (tmp_path / name for name in ("model.safetensors", "text.safetensors", "out.safetensors"))
    save_tiny_checkpoint(checkpoint, "LTX-Video")
    save_file({"context": torch.randn(1, 9, CONFIGS["LTX-Video"]["caption_channels"])}, text)
    done = rayltx(
        "generate", checkpoint, "--comfyui", find_comfyui(), "--conditioning", text, "--width", 224, "--height", 160,
        "--frames", 17, "--steps", 2, "--cfg", 1, "--workers", 2, "--device", "cpu", "--verify", "--output", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert load_file(out)["video"].shape == (1, 128, 3, 5, 7)
    difference = float(done.stdout.split("differ from 1 worker by")[1].split()[0])
    assert difference <= 5e-6


def test_a_folder_without_comfyui(comfy, tmp_path):
    done = rayltx("check", "--comfyui", tmp_path)
    assert done.returncode == 2 and "there is no ComfyUI in that folder" in done.stderr
