"""What the command says to bad input: one message with value, rule and remedy, exit code 2, and nothing started."""

import pytest
import torch
from safetensors.torch import save_file

from rayltx.cli import main as cli
from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint
from rayltx.distributed_worker.cluster import Cluster


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_tiny_checkpoint(folder / "ltx.safetensors", "LTX-Video")
    save_tiny_checkpoint(folder / "ltx2.safetensors", "LTX-2")
    (folder / "cut.safetensors").write_bytes((folder / "ltx.safetensors").read_bytes()[:5000])
    torch.save({}, folder / "model.ckpt")
    (folder / "notes.safetensors").write_text("Not a model, but what someone wrote down about one.\n")
    save_file({"unet.weight": torch.zeros(2)}, folder / "other.safetensors")
    save_file({"context": torch.zeros(1, 4, 47)}, folder / "narrow.safetensors")
    save_file({"context": torch.zeros(1, 4, 48)}, folder / "text.safetensors")
    save_file({"embedding": torch.zeros(1, 4, 48)}, folder / "misnamed.safetensors")
    return folder


NARROW, TEXT = "{}/narrow.safetensors", "{}/text.safetensors"
TEXT_ENCODER = ["--comfyui", "{}", "--text-encoder", "{}/ltx.safetensors"]
CASES = [
    (["generate", "{}/nothing.safetensors"], "no such file"),
    (["generate", "{}"], "is a folder; name the file in it"),
    (["info", "{}"], "is a folder; name the file in it"),
    (["generate", "{}/notes.safetensors"], "no safetensors file, whatever its name says"),
    (["generate", "--prompt", ""], "prompt=''"),
    (["generate", "--seed", "-1"], "seed=-1 must be from 0"),
    (["generate", "--seed", "18446744073709551616"], "seed=18446744073709551616 must be from 0"),
    (["generate", "--cfg", "nan"], "cfg=nan must be a number"),
    (["generate", "--frame-rate", "nan"], "frame-rate=nan must be a positive number"),
    (["generate", "--device", "cuda"], "there is no cuda device"),
    (["doctor", "--device", "cuda"], "there is no cuda device"),
    (["check", "--workers", "0"], "workers=0 must be at least 1"),
    (["generate", "--shares", "1,2", "--workers", "3"], 'shares="1,2" must be 3 numbers above 0'),
    (["generate", "--output", "{}"], "is a folder; name a file in it"),
    (["generate", "{}/cut.safetensors"], "not a whole safetensors file"),
    (["generate", "{}/model.ckpt"], "a pickle can run code"),
    (["generate", "{}/other.safetensors"], "not an LTX transformer"),
    (["generate", "--workers", "4", "--ulysses", "3"], "ulysses_degree=3 must divide workers=4; try one of 1, 2, 4"),
    (["generate", "--workers", "8", "--ulysses", "2", "--ring", "1"], "2 x ring_degree=1 x cfg_degree=2 = 4, but workers=8"),
    (["generate", "--workers", "-1"], "workers=-1"),
    (["generate", "--device", "cuda", "--workers", "2"], "there is no cuda device"),
    (["generate", "--device", "cuda", "--gpus", "0,9"], "there is no cuda device"),
    (["generate", "--device", "cpu", "--gpus", "0"], "need the device cuda"),
    (["generate", "--gpus", "x"], 'gpu_indices="x"'),
    (["generate", "--frames", "0"], "frames=0 must be 8k + 1"),
    (["generate", "--frames", "24"], "frames=24 must be 8k + 1 (1, 9, 17, ...); try 25"),
    (["generate", "--width", "0"], "width=0 must be a positive multiple of 32"),
    (["generate", "--height", "100"], "height=100 must be a positive multiple of 32; try 96"),
    (["generate", "--frame-rate", "0"], "frame-rate=0.0 must be a positive"),
    (["generate", "--steps", "0"], "steps=0 must be at least 1"),
    (["generate", "--sigmas", "0,1"], 'sigmas="0,1"'),
    (["generate", "--chunks", "-2"], "chunks=-2"),
    (["generate", "--prompt", "purple dog barking"], 'prompt=\'purple dog barking\''),
    (["generate", "--prompt", "red circle up", "--conditioning", "{}/text.safetensors"], "give one of them"),
    (["generate", "--conditioning", "{}/nothing"], "no such file"),
    (["generate", "--conditioning", "{}/misnamed.safetensors"], "holds `context`"),
    (["generate", "{}/ltx.safetensors", "-o", "{}/a.safetensors"], "give its text encoder (--text-encoder FILE"),
    (["generate", "--text-encoder", "{}/ltx.safetensors"], "text-encoder: is run by ComfyUI's code; say where it is"),
    (["generate", "--vae", "{}/ltx.safetensors", "--comfyui", "{}"], "there is no VAE of video of LTX among its"),
    (["generate", "--audio-vae", "{}/nothing", "--comfyui", "{}"], "no such file"),
    (["generate", "{}/ltx.safetensors", "-o", "{}/a.safetensors", *TEXT_ENCODER], "say what is to be seen"),
    (["generate", "{}/ltx.safetensors", "-o", "{}/a.safetensors", "--conditioning", NARROW, "--cfg", "1"], "another LTX version"),
    (["generate", "{}/ltx.safetensors", "-o", "{}/a.safetensors", "--conditioning", TEXT], "needs negative conditioning"),
    (["generate", "{}/ltx.safetensors"], "through its VAE"),
    (["generate", "--output", "{}/clip.avi"], "must end with .mp4"),
    (["generate", "--output", "/proc/nowhere/clip.mp4"], "cannot be written there"),
    (["generate", "--object-store-gb", "100000"], "does not fit into shared memory"),
    (["generate", "--object-store-gb", "-1"], "must not be negative"),
    (["info", "{}/nothing.safetensors"], "no such file"),
    (["info", "{}/other.safetensors"], "not an LTX transformer"),
    (["check", "--model", "LTX-9"], "model=LTX-9 must be one of LTX-Video"),
]  # fmt: skip


@pytest.mark.parametrize(
    "arguments, message", CASES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input(files, monkeypatch, capsys, arguments, message):
    running = Cluster.current()
    monkeypatch.setattr("sys.argv", ["rayltx", *(argument.format(files) for argument in arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    error = capsys.readouterr().err
    assert exit.value.code == 2, error
    assert error.startswith("rayltx: ") and message in error, error
    assert "Traceback" not in error
    assert Cluster.current() is running, "Ray was started"
