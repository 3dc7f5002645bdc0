"""Tests against a real ComfyUI, in its own environment: `scripts/test.sh` runs them where it finds both."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from comfy_browser import CHROMIUM, CHROMIUM_ARGUMENTS
from comfy_checkout import find_comfyui

from rayltx.sequence_parallel.partition import ParallelConfig


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


@pytest.fixture(scope="session")
def cluster(comfy):
    from rayltx.comfy_dist.comfy_environment import ComfyEnvironment
    from rayltx.comfy_dist.comfy_host import COMFY_HOST
    from rayltx.distributed_worker.cluster import Cluster
    from rayltx.distributed_worker.request import ClusterRequest

    torch.set_num_threads(1)
    environment = ComfyEnvironment.headless(str(find_comfyui()), cpu=True)
    request = ClusterRequest(workers=4, host=COMFY_HOST, bootstrap=environment.bootstrap())
    with Cluster.start(request) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def models(cluster, tmp_path_factory):
    """models(version) -> (MODEL of ComfyUI's loader, MODEL on the workers, path)"""
    import comfy.sd
    from comfy_models import save_tiny_checkpoint

    from rayltx.comfy_dist.main_process.placement import Placement
    from rayltx.comfy_dist.main_process.twin import load_twin

    folder = tmp_path_factory.mktemp("checkpoints")
    loaded = {}

    def get(version):
        if version not in loaded:
            path = folder / f"{version}.safetensors"
            save_tiny_checkpoint(path, version)
            with torch.inference_mode():
                whole = comfy.sd.load_diffusion_model(str(path))
            loaded[version] = whole, load_twin(str(path), Placement(cluster.request, ParallelConfig(2, 1))), path
        return loaded[version]

    return get


@pytest.fixture
def on_device(comfy, tmp_path, monkeypatch):
    """on_device(base) -> a worker's model, in a ComfyUI that takes the device in disguise for its GPU."""
    from comfy_on_device import taking_the_disguise

    # Not in inference mode, which goes past a tensor's own dispatch.
    with torch.inference_mode(False), torch.no_grad():
        yield taking_the_disguise(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def browser():
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("no browser tests: the package playwright is not installed")
    if not CHROMIUM.is_file():
        pytest.skip(f"no browser tests: no {CHROMIUM}; set CHROMIUM_PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def table():
    """Rows of a table for the docs, which RAYLTX_WRITE_TABLES=FILE writes."""
    rows = []
    yield rows
    if "RAYLTX_WRITE_TABLES" in os.environ:
        Path(os.environ["RAYLTX_WRITE_TABLES"]).write_text("\n".join(rows) + "\n")
