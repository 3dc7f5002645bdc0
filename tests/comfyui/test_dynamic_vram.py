"""The server with ComfyUI's dynamic VRAM on, as it is on every NVIDIA card."""

from __future__ import annotations

import pytest
import torch
from comfy_checkout import find_comfyui
from comfy_models import CONFIGS, VERSIONS, save_tiny_checkpoint
from comfy_scenarios import SAMPLING_TOLERANCE
from comfy_server import Server
from comfy_workflows import Workflow, ksampler
from safetensors.torch import load_file

from rayltx.diffusion_models.lightricks.relative_error import relative_error

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]


@pytest.fixture(scope="module")
def servers(comfy, tmp_path_factory):
    """A server without, whose own loader cannot do with it on the CPU, and one with dynamic VRAM."""
    running = []
    for setting in ("0", "1"):
        base = tmp_path_factory.mktemp(f"dynamic vram {setting}")
        models = base / "models" / "diffusion_models"
        models.mkdir(parents=True)
        for version in CONFIGS:
            save_tiny_checkpoint(models / f"{version}.safetensors", version, dtype=torch.bfloat16)
        running.append(Server(find_comfyui(), base, environment={"RAYLTX_TESTS_DYNAMIC_VRAM": setting}))
    yield running
    for server in running:
        server.stop()


@pytest.mark.parametrize("weight_dtype", ["default", "fp8_e4m3fn"])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_picture_is_that_of_comfyuis_loader(servers, version, weight_dtype):
    chosen = {"unet_name": f"{version}.safetensors", "weight_dtype": weight_dtype}
    whole = Workflow(version)
    whole.save(ksampler(whole, whole.add("UNETLoader", **chosen)[0]), "expected")
    shared = Workflow(version)
    shared.save(ksampler(shared, shared.add("RayUNETLoader", ray_actors_init=shared.init(), **chosen)[1]), "found")
    expected, found = (
        (server.run(work.nodes), load_file(server.output / f"{name}.safetensors"))[1]
        for server, work, name in zip(servers, (whole, shared), ("expected", "found"))
    )
    assert expected.keys() == found.keys()
    # On the CPU a bfloat16 model computes in float32.
    assert max(relative_error(found[key], expected[key]) for key in found) <= SAMPLING_TOLERANCE
