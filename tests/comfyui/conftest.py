"""Tests against a real ComfyUI, in its own environment: `scripts/test.sh` runs them where it finds both."""

import importlib
import sys

import pytest
from comfy_checkout import find_comfyui


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/comfyui" in str(item.path):
            item.add_marker(pytest.mark.comfyui)


@pytest.fixture(scope="session")
def comfy():
    """The package `comfy` of the checkout, on the CPU, with default arguments."""
    path = find_comfyui()
    if path is None:
        pytest.skip("no ComfyUI checkout: set COMFYUI_PATH, or put one at ~/comfy/ComfyUI")
    sys.path.insert(0, str(path))
    try:
        import comfy.options  # noqa: F401  (with argument parsing left off)
        from comfy.cli_args import args

        args.cpu = True
        return importlib.import_module("comfy.sd") and sys.modules["comfy"]
    except ImportError as error:
        pytest.skip(f"{path} cannot be imported by {sys.executable}: {error}; run with ComfyUI's own Python")
