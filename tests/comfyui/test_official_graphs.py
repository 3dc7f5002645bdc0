"""ComfyUI's official graphs: with our loaders in the place of its own they give what they gave.

RAYLTX_WRITE_TABLES=FILE writes the table.
"""

from __future__ import annotations

import json

import pytest
from comfy_browser import page_on
from comfy_checkout import find_comfyui
from comfy_models import CONFIGS, save_tiny_bundle, save_tiny_checkpoint, save_tiny_upscaler, save_tiny_vae
from comfy_scenarios import make_lora
from comfy_server import Server
from official_graphs import BUNDLE, LORA, NOT_HERE, SOUND_VAE, UPSCALER, made_small, official_graphs, on_workers, saved
from safetensors.torch import load_file, save_file

from rayltx.diffusion_models.lightricks.relative_error import worst_error

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]
TOLERANCE = 2e-5  # of two samplings, one on what the other gave
COMFYUI = find_comfyui()
GRAPHS = official_graphs(COMFYUI) if COMFYUI else []


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    base = tmp_path_factory.mktemp("official graphs")
    models = base / "models"
    for folder in ("checkpoints", "diffusion_models", "loras", "latent_upscale_models", "vae"):
        (models / folder).mkdir(parents=True)
    for version in CONFIGS:
        save_tiny_bundle(models / "checkpoints" / BUNDLE.format(version=version), version)
        save_tiny_checkpoint(models / "diffusion_models" / f"{version}.safetensors", version)
        metadata = {"reference_downscale_factor": "2"}
        save_file(make_lora(CONFIGS[version]), models / "loras" / LORA.format(version=version), metadata=metadata)
    save_tiny_upscaler(models / "latent_upscale_models" / UPSCALER)
    for folder in ("vae", "checkpoints"):
        save_tiny_vae(models / folder / SOUND_VAE, "sound")
    server = Server(COMFYUI, base)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def page(browser, server):
    return page_on(browser, server)


def test_there_are_official_graphs_of_every_version():
    if not GRAPHS:
        pytest.skip("this ComfyUI brings none")
    assert {graph.version for graph in GRAPHS} == set(CONFIGS)


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)
def test_an_official_graph_gives_the_same(server, page, table, graph):
    if graph.name in NOT_HERE:
        table.append(f"| {graph.name} | {graph.version} | | {NOT_HERE[graph.name]} |")
        pytest.skip(NOT_HERE[graph.name])
    workflow = json.loads(graph.path.read_text())
    api = page.evaluate(
        "async (w) => { await app.loadGraphData(w); return (await app.graphToPrompt()).output }", workflow
    )
    whole = made_small(api, graph.version, server.get("/object_info"))
    outputs = []
    for kind, prompt in (("whole", whole), ("workers", on_workers(whole))):
        nodes, names = saved(prompt, f"{graph.name} {kind}")
        server.run(nodes)
        outputs.append([load_file(server.output / f"{name}.safetensors") for name in names])
    assert outputs[0], "nothing is sampled"
    errors = [
        worst_error([found[key] for key in expected], list(expected.values())) for expected, found in zip(*outputs)
    ]
    row = f"| {graph.name} | {graph.version} | {len(errors)} | {max(errors):.1e} |"
    print(row)
    table.append(row)
    assert max(errors) <= TOLERANCE
