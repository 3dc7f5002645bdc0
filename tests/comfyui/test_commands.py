"""The command line on a real ComfyUI."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rayltx_command
from comfy_checkout import find_comfyui
from comfy_models import CONFIGS, save_tiny_bundle, save_tiny_checkpoint, save_tiny_vae
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


def a_model_with_sound(folder):
    """Its checkpoint with the VAE of the video, and the VAE of its sound."""
    checkpoint, sound = folder / "model.safetensors", folder / "sound.safetensors"
    save_tiny_bundle(checkpoint, "LTX-2.3")
    save_tiny_vae(sound, "sound")
    return checkpoint, sound


SMALL = ("--width", 160, "--height", 96, "--frames", 17, "--sigmas", "1,0.6,0", "--workers", 2, "--device", "cpu")


def assert_seen_and_heard(path, seconds):
    import av

    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.width, video.height) == (160, 96)
        assert len(list(container.decode(video))) == 17
    with av.open(str(path)) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
    assert samples / audio.rate == pytest.approx(seconds, abs=0.2)


def test_a_video_with_sound_comes_out_of_the_workers_vaes(comfy, tmp_path):
    import torch

    checkpoint, sound = a_model_with_sound(tmp_path)
    width = CONFIGS["LTX-2.3"]["cross_attention_dim"], CONFIGS["LTX-2.3"]["audio_cross_attention_dim"]
    text = {"context": torch.randn(1, 9, width[0]), "audio_context": torch.randn(1, 9, width[1])}
    save_file(text, tmp_path / "text.safetensors")
    done = rayltx(
        "generate", checkpoint, "--comfyui", find_comfyui(), "--conditioning", tmp_path / "text.safetensors", *SMALL,
        "--audio-vae", sound, "--cfg", 1, "-o", tmp_path / "clip.mp4", "-o", tmp_path / "latent.safetensors",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert load_file(tmp_path / "latent.safetensors").keys() == {"video", "audio"}
    assert_seen_and_heard(tmp_path / "clip.mp4", 17 / 24)


@pytest.mark.parametrize(
    "given, has_part, files",
    [
        (["t5.safetensors"], False, ["t5.safetensors"]),
        (["gemma.safetensors"], True, ["gemma.safetensors", "model.safetensors"]),
        (["gemma.safetensors", "projection.safetensors"], True, ["gemma.safetensors", "projection.safetensors"]),
    ],
)
def test_the_checkpoint_is_read_for_its_part_of_the_text_encoder(comfy, tmp_path, given, has_part, files):
    """ComfyUI goes by the number of files: with one too many it takes T5 for Gemma."""
    import torch

    from rayltx.cli.generate_in_comfyui import text_encoder_files

    checkpoint = tmp_path / "model.safetensors"
    part = {"text_embedding_projection.aggregate_embed.weight": torch.zeros(2, 2)} if has_part else {}
    save_file({"model.diffusion_model.patchify_proj.weight": torch.zeros(2, 2), **part}, checkpoint)
    assert [path.name for path in text_encoder_files([tmp_path / name for name in given], checkpoint)] == files


def test_prompts_go_through_comfyuis_text_encoder(comfy, tmp_path):
    """One that is small stands for the real ones, of billions of parameters: what is asked of it is ComfyUI's."""
    checkpoint, sound = a_model_with_sound(tmp_path)
    (tmp_path / "encoder.safetensors").write_bytes(checkpoint.read_bytes())
    command = [
        sys.executable, "-c", WITH_A_SMALL_TEXT_ENCODER, "generate", checkpoint, "--comfyui", find_comfyui(),
        "--text-encoder", tmp_path / "encoder.safetensors", "--prompt", "a lighthouse", "--negative", "rain", *SMALL,
        "--audio-vae", sound, "--cfg", 2, "-o", tmp_path / "clip.mp4",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "importable")}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "encoder.safetensors, ltxv: a lighthouse | rain" in done.stdout
    assert_seen_and_heard(tmp_path / "clip.mp4", 17 / 24)


WITH_A_SMALL_TEXT_ENCODER = """
import contextlib, os
import torch
from rayltx.cli.main import main
from rayltx.comfy_dist.main_process import headless

original = headless.comfyui_cluster

class Clip:
    def __init__(self, paths, clip_type):
        self.said, self.about = [], ", ".join([*map(os.path.basename, paths), clip_type.name.lower()])
        self.projection = torch.nn.Linear(WIDTH, WIDTH)  # of LTX's text encoders, which ComfyUI leaves trainable

    def tokenize(self, text):
        self.said.append(text)
        return text

    def encode_from_tokens_scheduled(self, tokens):
        if len(self.said) == 2:
            print(f"{self.about}: {' | '.join(self.said)}")
        generator = torch.Generator().manual_seed(len(tokens))
        out = self.projection(torch.randn(1, 9, WIDTH, generator=generator))
        assert not out.requires_grad, "the weights would be held by what they gave"
        return [[out, {}]]

@contextlib.contextmanager
def cluster(*args):
    with original(*args) as found:
        import comfy.sd
        comfy.sd.load_clip = lambda paths, clip_type: Clip(paths, clip_type)
        yield found

headless.comfyui_cluster = cluster
main()
""".replace(
    "WIDTH", str(sum(CONFIGS["LTX-2.3"][name] for name in ("cross_attention_dim", "audio_cross_attention_dim")))
)


def test_a_folder_without_comfyui(comfy, tmp_path):
    done = rayltx("check", "--comfyui", tmp_path)
    assert done.returncode == 2 and "there is no ComfyUI in that folder" in done.stderr
