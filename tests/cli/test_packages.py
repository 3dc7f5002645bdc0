"""A subcommand needs its own packages and no other's, and says what to install."""

import importlib
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from rayltx.cli.outputs import check_outputs
from rayltx.cli.packages import missing_packages_named
from rayltx.errors import MissingPackageError

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "demo" / "shapes.safetensors")

WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({modules!r}))
from rayltx.cli.main import main
main()
"""


def rayltx_without(modules, *arguments, cwd):
    """The command where `modules` cannot be imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "importable"), "COLUMNS": "200"}
    command = [sys.executable, "-c", WITHOUT.format(modules=modules.split()), *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize(
    "modules, arguments, message",
    [
        ("typer", ["--help"], "the command needs typer"),
        pytest.param("typer torch", ["info", DEMO], "info needs typer, torch", marks=pytest.mark.slow),
        pytest.param("rich", ["check"], "check needs rich", marks=pytest.mark.slow),
        ("torch", ["info", DEMO], "info needs torch"),
        pytest.param("torch", ["generate"], "generate needs torch", marks=pytest.mark.slow),
        pytest.param("torch", ["convert", DEMO, "demo.gguf"], "convert needs torch", marks=pytest.mark.slow),
        ("diffusers", ["info", DEMO], "info needs diffusers"),
        pytest.param("diffusers", ["check"], "check needs diffusers", marks=pytest.mark.slow),
        ("diffusers", ["generate", "-o", "clip.safetensors"], "generate needs diffusers"),
        ("ray", ["generate"], "generate needs ray"),
        ("gguf", ["convert", DEMO, "demo.gguf"], "convert needs gguf"),
        ("av", ["generate", "-o", "clip.mp4"], "output clip.mp4 needs av"),
    ],
)
def test_a_missing_package_is_named_before_anything_starts(tmp_path, modules, arguments, message):
    done = rayltx_without(modules, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"rayltx: {message}, which this Python lacks.\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())

    torch, others = "torch" in modules, bool(set(modules.split()) - {"torch"})
    assert (f'"{sys.executable}" -m pip install -e "{ROOT}[cli]"' in done.stderr) == others
    assert (f'"{sys.executable}" -m pip install torch' in done.stderr) == torch
    assert ("depends on the GPU" in done.stderr) == torch


SMALL = ["--device", "cpu", "--steps", "1", "--frames", "9", "--width", "64", "--height", "64", "--cfg", "1"]


@pytest.mark.parametrize(
    "modules, arguments",
    [
        ("diffusers imageio av PIL ray psutil torch", ["--help"]),
        ("imageio av ray", ["info", DEMO]),
        ("diffusers imageio av PIL ray psutil", ["convert", DEMO, "demo.gguf", "--type", "Q8_0"]),
        pytest.param(
            "imageio av", ["generate", *SMALL, "-o", "clip.safetensors", "-o", "clip.png"], marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: " ".join(value).replace(DEMO, "FILE") if isinstance(value, list) else value,
)
def test_a_subcommand_needs_no_other_packages(tmp_path, modules, arguments):
    done = rayltx_without(modules, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "suffix, needed",
    [(".mp4", ["av"]), (".gif", ["imageio", "pillow"]), (".png", ["pillow"]), (".safetensors", [])],
)
def test_a_file_needs_the_packages_that_write_it(tmp_path, monkeypatch, suffix, needed):
    for module in ("imageio", "av", "PIL"):
        monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / "deeper" / f"clip{suffix}"
    with pytest.raises(MissingPackageError) if needed else nullcontext() as raised:
        check_outputs([path], has_pixels=True)
    if needed:
        assert f"output {path} needs {', '.join(needed)}, which" in str(raised.value)
        assert not path.parent.exists()


@pytest.mark.parametrize("module", ["not_one_of_ours", "rich.not_in_this_version"])
def test_only_a_missing_package_of_ours_is_explained(module):
    with pytest.raises(ModuleNotFoundError), missing_packages_named("info"):
        importlib.import_module(module)
