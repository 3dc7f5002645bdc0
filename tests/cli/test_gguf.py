"""GGUF files on the embedded host, through the commands."""

from pathlib import Path

import pytest
from rayltx_command import rayltx, rayltx_here
from safetensors.torch import load_file

from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo checkpoint as Q8_0, and the values of that as safetensors."""
    folder = tmp_path_factory.mktemp("demo")
    quantised, plain = folder / "demo.gguf", folder / "demo.safetensors"
    for arguments in ((ROOT / "demo" / "shapes.safetensors", quantised, "--type", "Q8_0"), (quantised, plain)):
        done = rayltx_here("convert", *arguments)
        assert done.returncode == 0, done.stderr
    return quantised, plain


def generate(checkpoint, out, *more):
    done = rayltx(
        "generate", checkpoint, "--device", "cpu", "--workers", 2, "--prompt", "red circle right", "--steps", 4, "--frames",
        17, "--width", 96, "--height", 160, "-o", out, *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, load_file(out)["video"].double()


@pytest.mark.slow
def test_a_quantised_demo_equals_its_values(demo, tmp_path):
    quantised, plain = demo
    assert quantised.stat().st_size < 0.4 * plain.stat().st_size
    told, found = generate(quantised, tmp_path / "a.safetensors", "--verify")
    assert float(told.split("differ from 1 worker by ")[1].split()[0]) <= 5e-6
    _, expected = generate(plain, tmp_path / "b.safetensors")
    assert (found - expected).norm() / expected.norm() <= 1e-6


def test_info_names_the_types(demo):
    done = rayltx_here("info", demo[0])
    assert done.returncode == 0, done.stderr
    assert "Q8_0 98.9%" in done.stdout and "1.80 million" in done.stdout


def test_a_broken_file_is_refused_before_anything_starts(demo, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(demo[0].read_bytes()[:-1000])
    done = rayltx_here("generate", cut, "--device", "cpu", "--workers", 2)
    assert done.returncode == 2 and "cut.gguf" in done.stderr


def test_conversion_refuses_what_cannot_be(tmp_path):
    save_tiny_checkpoint(tmp_path / "a.safetensors", "LTX-2")
    for arguments, message in (
        ((tmp_path / "a.safetensors", tmp_path / "a.gguf", "--type", "Q9_9"), "Q9_9"),
        ((tmp_path / "a.safetensors", tmp_path / "a.safetensors"), "same file"),
        ((tmp_path / "none.safetensors", tmp_path / "b.gguf"), "none.safetensors"),
    ):
        done = rayltx_here("convert", *arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]
