"""The pack in a ComfyUI whose Python lacks Ray."""

from __future__ import annotations

import pytest
from comfy_checkout import find_comfyui
from comfy_models import save_tiny_checkpoint
from comfy_server import Graph, PromptFailed, Server

pytestmark = pytest.mark.comfyui

# Run by every Python that finds it on its path: from then on there is no `ray`.
HIDE_RAY = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name.split(".")[0] == "ray" else find(name, path, target)
)
"""


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    hiding = base / "hiding"
    hiding.mkdir()
    (hiding / "sitecustomize.py").write_text(HIDE_RAY)
    models = base / "models" / "diffusion_models"
    models.mkdir(parents=True)
    save_tiny_checkpoint(models / "model.safetensors", "LTX-Video")
    server = Server(find_comfyui(), base, environment={"PYTHONPATH": str(hiding)})
    yield server
    server.stop()


def test_nodes_appear_and_running_one_says_what_to_install(server):
    from rayltx.nodes import NODE_CLASS_MAPPINGS

    assert set(NODE_CLASS_MAPPINGS) <= set(server.get("/object_info"))
    graph = Graph()
    init = graph.add(
        "RayInitializer", ray_cluster_address="local", ray_cluster_namespace="default", GPU=2, ulysses_degree=2,
        ring_degree=1, cfg_degree=1, device="cpu",
    )  # fmt: skip
    loader = graph.add("RayUNETLoader", unet_name="model.safetensors", weight_dtype="default", ray_actors_init=init[0])
    graph.add("RayKill", ray_actors=loader[0], kill_mode="Kill Workers Only")
    with pytest.raises(PromptFailed) as error:
        server.run(graph.nodes)
    assert "RayLTX needs ray" in error.value.message and "pip install -r" in error.value.message
    assert "requirements.txt" in error.value.message


def test_the_chunked_feed_forward_needs_no_ray(server):
    graph = Graph()
    model = graph.add("UNETLoader", unet_name="model.safetensors", weight_dtype="default")
    chunked = graph.add("LTXChunkedFeedForward", model=model[0], chunks=4)
    text = graph.add("TestConditioning", seed=1, width=48, masked=3)
    latent = graph.add("TestLatent", seed=3, batch=1, channels=128, frames=3, height=5, width=7)
    sampled = graph.add(
        "KSampler", model=chunked[0], seed=5, steps=1, cfg=1.0, sampler_name="euler", scheduler="simple", positive=text[0],
        negative=text[0], latent_image=latent[0], denoise=1.0,
    )  # fmt: skip
    graph.add("TestSave", latent=sampled[0], name="chunked")
    server.run(graph.nodes)
    assert (server.output / "chunked.safetensors").is_file()
