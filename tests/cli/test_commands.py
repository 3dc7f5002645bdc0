"""The commands end to end: real workers, real files."""

import os
import subprocess
from pathlib import Path

import imageio.v3 as iio
import psutil
import pytest
import torch
from PIL import Image
from rayltx_command import rayltx, rayltx_here
from safetensors.torch import load_file, save_file

from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint

from bound_processes import bound_to_this_process

ROOT = Path(__file__).parents[2]


def test_a_clip_from_three_workers_equals_one_workers(tmp_path):
    outputs = [tmp_path / name for name in ("deep/er/clip.mp4", "clip.gif", "clip.png", "clip.safetensors")]
    flags = [flag for path in outputs for flag in ("--output", path)]
    done = rayltx(
        "generate", "--device", "cpu", "--workers", 3, "--prompt", "blue square left", "--steps", 3, "--frames", 17,
        "--width", 96, "--height", 160, "--verify", *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    difference = float(done.stdout.split("differ from 1 worker by ")[1].split()[0])
    assert difference <= 5e-6
    assert done.stdout.splitlines()[-4:] == [str(path) for path in outputs]

    video = iio.imread(outputs[0])
    assert video.shape == (17, 160, 96, 3)
    assert iio.immeta(outputs[0], plugin="pyav")["fps"] == 24.0
    assert len(iio.imread(outputs[1])) == 17
    assert Image.open(outputs[2]).size == (6 * 100 - 4, 2 * 164 - 4)  # 12 frames, 4 pixels between them
    assert load_file(outputs[3])["video"].shape == (1, 128, 3, 5, 3)
    left_over = [path for path in tmp_path.rglob("*") if path.is_file() and path not in outputs]
    assert not left_over


@pytest.mark.slow
def test_sound_and_picture_from_conditioning_in_a_file(tmp_path):
    save_tiny_checkpoint(tmp_path / "ltx2.safetensors", "LTX-2")
    text = {"context": torch.randn(1, 5, 48), "audio_context": torch.randn(1, 5, 48)}
    save_file({**text, **{f"negative_{name}": -tensor for name, tensor in text.items()}}, tmp_path / "text.safetensors")
    done = rayltx(
        "generate", tmp_path / "ltx2.safetensors", "--conditioning", tmp_path / "text.safetensors", "--device", "cpu",
        "--workers", 2, "--ring", 2, "--sigmas", "1,0.5,0", "--frames", 25, "--width", 64, "--height", 64, "--verify",
        "-o", tmp_path / "latent.safetensors",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "audio: 2 workers (ulysses 1 x ring 2) differ" in done.stdout
    latents = load_file(tmp_path / "latent.safetensors")
    assert latents["video"].shape == (1, 128, 4, 2, 2) and latents["audio"].shape == (1, 8, 26, 16)


def test_info_says_what_a_file_is(tmp_path):
    model = save_tiny_checkpoint(tmp_path / "ltx23.safetensors", "LTX-2.3", dtype=torch.bfloat16)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    done = rayltx_here("info", tmp_path / "ltx23.safetensors")
    assert done.returncode == 0, done.stderr
    expected = (
        "LTX-2.3 transformer",
        f"{millions:.2f} million in 2 blocks",
        "bfloat16 100.0%",
        "4 heads of 24",
        "14080",
        "times one",
        "(assumed)",
    )
    for words in expected:
        assert words in done.stdout, (words, done.stdout)


@pytest.mark.slow
def test_check_prints_the_table():
    done = rayltx("check", "--workers", 2, "--model", "LTX-Video", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "exact" in done.stdout and "image to video" in done.stdout and "1 x 2" in done.stdout


def test_an_interrupt_leaves_no_process(tmp_path):
    import signal
    import time

    environment = {**os.environ, "PYTHONPATH": str(ROOT / "importable")}
    process = subprocess.Popen(
        bound_to_this_process("-m", "rayltx.cli.main", "generate", "--device", "cpu", "--workers", "2", "--steps", "10000",
                              "-o", str(tmp_path / "clip.mp4")),
        env=environment, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    ours = psutil.Process(process.pid)
    deadline = time.monotonic() + 300.0
    while sum("ray::RayWorker" in " ".join(child.cmdline()[:1]) for child in _children(ours)) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    time.sleep(1.0)
    children = _children(ours)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120.0) == 130
    _, alive = psutil.wait_procs(children, timeout=60.0)
    assert not alive
    assert not list(tmp_path.iterdir())


def _children(process):
    found = []
    for child in process.children(recursive=True):
        try:
            child.cmdline()
            found.append(child)
        except psutil.Error:
            pass
    return found


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version(flag):
    done = rayltx(flag)
    assert done.returncode == 0 and done.stdout.strip()
