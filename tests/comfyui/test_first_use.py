"""What someone meets who has just installed the pack, in ComfyUI's own frontend: a first graph, and what goes wrong."""

from __future__ import annotations

import json

import comfy_server
import pytest
import torch
from comfy_browser import page_on
from comfy_checkout import find_comfyui
from comfy_models import save_tiny_bundle
from comfy_server import ROOT, Server
from comfy_workflows import AUDIO_TOKENS, FRAMES, HEIGHT, STEPS, WIDTH, Workflow
from safetensors.torch import save_file

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

PACK_FOLDER = "RayLTX"  # with help pages, which ComfyUI does not serve from a folder whose name has a space in it
BUNDLE, OTHER = "ltx-2.3-tiny.safetensors", "a model of another kind.safetensors"
TITLE = "LTX on several GPUs"
WAIT_MS = 300_000  # the first run starts Ray and the workers, and here on few cores
MANY_STEPS = 10_000

# As in a browser that has not been here: they are kept by the server.
SETTINGS = {"Comfy.VueNodes.Enabled": False, "Comfy.RightSidePanel.IsOpen": False}

BUILD = """(nodes) => {
  const made = {}
  for (const [name, { type, column, widgets, inputs }] of Object.entries(nodes)) {
    const node = (made[name] = LiteGraph.createNode(type))
    app.rootGraph.add(node)
    for (const [widget, value] of Object.entries(widgets ?? {}))
      node.widgets.find((found) => found.name === widget).value = value
    for (const [input, [from, output]] of Object.entries(inputs ?? {}))
      made[from].connect(made[from].findOutputSlot(output), node, node.findInputSlot(input))
    const above = Object.values(made).filter((other) => other !== node && other.column === column)
    node.column = column
    node.pos = [column * 350, Math.max(0, ...above.map(({ pos, size }) => pos[1] + size[1] + 150))]
  }
  app.canvas.setDirty(true, true)
}"""
EVENTS = """() => {
  const names = ["execution_start", "progress", "b_preview_with_metadata", "execution_success", "execution_error",
                 "execution_interrupted"]
  for (const name of names)
    app.api.addEventListener(name, ({ detail }) =>
      seen.push({ name, value: detail.value ?? null, max: detail.max ?? null, bytes: detail.blob?.size ?? null }))
}"""
ENDINGS = ("execution_success", "execution_error", "execution_interrupted")


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    base = tmp_path_factory.mktemp("first use")
    checkpoints = base / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    save_tiny_bundle(checkpoints / BUNDLE, "LTX-2.3")
    save_file({"conv_in.weight": torch.zeros(4, 4)}, checkpoints / OTHER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy_server, "PACK_FOLDER", PACK_FOLDER)
        server = Server(find_comfyui(), base, "--preview-method", "latent2rgb")
    yield server
    server.stop()


@pytest.fixture
def page(browser, server, tmp_path):
    """An empty graph. What the page shows in the end is in page.png, and an error of its scripts is one of the test."""
    for name, value in SETTINGS.items():
        server.post(f"/settings/{name}", value)
    page = page_on(browser, server, viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(WAIT_MS)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.evaluate(EVENTS)
    page.evaluate("load", {"nodes": [], "links": [], "version": 0.4})
    yield page
    page.screenshot(path=tmp_path / "page.png")
    page.close()
    assert not errors


def _build(page, steps=STEPS, prefix="picture", **ltx) -> None:
    """Noise to saved pictures, whose names begin with `prefix`, by the node. ltx: inputs of it."""
    width = Workflow("LTX-2.3").text_width
    latent = {"seed": 3, "batch": 1, "channels": 128, "frames": FRAMES, "height": HEIGHT, "width": WIDTH}
    sampled = {"seed": 5, "steps": steps, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    nodes = {
        "ltx": ("RayLTX", 0, {"model_name": BUNDLE, "gpus": 2, "device": "cpu", **ltx}, {}),
        "positive": ("TestConditioning", 1, {"seed": 1, "width": width, "masked": -1}, {}),
        "negative": ("TestConditioning", 1, {"seed": 2, "width": width, "masked": -1}, {}),
        "video": ("TestLatent", 0, latent, {}),
        "audio": ("TestAudioLatent", 0, {"batch": 1, "tokens": AUDIO_TOKENS}, {}),
        "latent": ("LTXVConcatAVLatent", 1, {},
                   {"video_latent": ("video", "LATENT"), "audio_latent": ("audio", "LATENT")}),
        "sampler": ("KSampler", 2, sampled,
                    {"model": ("ltx", "model"), "positive": ("positive", "CONDITIONING"),
                     "negative": ("negative", "CONDITIONING"), "latent_image": ("latent", "latent")}),
        "parts": ("LTXVSeparateAVLatent", 3, {}, {"av_latent": ("sampler", "LATENT")}),
        "decoded": ("VAEDecode", 3, {}, {"samples": ("parts", "video_latent"), "vae": ("ltx", "vae")}),
        "saved": ("SaveImage", 3, {"filename_prefix": prefix}, {"images": ("decoded", "IMAGE")}),
    }  # fmt: skip
    keys = ("type", "column", "widgets", "inputs")
    page.evaluate(BUILD, {name: dict(zip(keys, node)) for name, node in nodes.items()})
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")


def _press_run(page) -> None:
    page.evaluate("window.seen = []")
    page.get_by_role("button", name="Run", exact=True).first.click()


def _ending(page) -> list[dict]:
    """What the server has told the page of the run, until its end."""
    page.wait_for_function("(endings) => seen.some(({ name }) => endings.includes(name))", arg=ENDINGS)
    return page.evaluate("seen")


def _expect_the_picture(page) -> None:
    """On the node that saves it, whole."""
    page.wait_for_function("""() => {
        const { imgs } = allNodes().find(({ type }) => type === "SaveImage")
        return imgs?.length && imgs.every(({ complete, naturalWidth }) => complete && naturalWidth)
    }""")


def _progress(seen: list[dict], steps: int = STEPS) -> list[int]:
    """Of the sampler, whose number of steps it is."""
    return [event["value"] for event in seen if event["name"] == "progress" and event["max"] == steps]


# ---- a first graph


def test_a_graph_with_the_node_runs_to_a_picture(page, server):
    _build(page, prefix="first picture")
    _press_run(page)
    seen = _ending(page)
    assert seen[-1]["name"] == "execution_success", server.log()[-3000:]
    assert [step for step in _progress(seen) if step > 0] == [1, 2, 3]
    assert any(event["bytes"] for event in seen if event["name"] == "b_preview_with_metadata")
    assert len([*server.output.glob("first picture*.png")]) == 8 * (FRAMES - 1) + 1
    for line in ("2 workers (cpu):", "ulysses 1 x ring 1 x cfg 2"):
        page.get_by_text(line).wait_for()
    _expect_the_picture(page)


def test_a_cancelled_run_stops_and_the_next_one_runs(page, server):
    _build(page, steps=MANY_STEPS)
    _press_run(page)
    page.wait_for_function("(max) => seen.filter((e) => e.name === 'progress' && e.max === max && e.value > 0).length > 1",
                           arg=MANY_STEPS)  # fmt: skip
    page.get_by_role("button", name="Cancel current run").click()
    seen = _ending(page)
    assert seen[-1]["name"] == "execution_interrupted"
    assert max(_progress(seen, MANY_STEPS)) < MANY_STEPS
    page.evaluate("""(steps) => {
        const { widgets } = allNodes().find(({ type }) => type === "KSampler")
        widgets.find(({ name }) => name === "steps").value = steps
    }""", STEPS + 1)  # fmt: skip
    _press_run(page)
    seen = _ending(page)
    assert seen[-1]["name"] == "execution_success", server.log()[-3000:]
    assert _progress(seen, STEPS + 1)[-1] == STEPS + 1
    _expect_the_picture(page)


REFUSALS = {
    "a file of another kind": ({"model_name": OTHER}, ["not an LTX transformer", "choose an official file"]),
    "no such GPU": ({"device": "cuda"}, ["gpus=2", "no CUDA device", 'set the input "device" to cpu']),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_an_error_is_shown_with_its_remedy(page, case):
    ltx, texts = REFUSALS[case]
    if "device" in ltx and torch.cuda.is_available():
        pytest.skip("here is such a GPU")
    _build(page, **ltx)
    _press_run(page)
    assert _ending(page)[-1]["name"] == "execution_error"
    page.get_by_role("button", name="View details").click()
    for text in texts:
        page.get_by_text(text).first.wait_for()


# ---- what one finds


@pytest.mark.parametrize("words", ["multi gpu", "parallel", "ltx", "ray"])
def test_search_lists_the_node_to_begin_with_before_our_others(page, words):
    page.locator("#graph-canvas").dblclick(position={"x": 800, "y": 600})
    page.get_by_role("combobox").first.fill(words)
    found = page.get_by_role("option")
    found.filter(has_text=TITLE).first.wait_for()
    names = [text.splitlines()[0] for text in found.all_inner_texts() if PACK_FOLDER in text.splitlines()]
    assert names[0] == TITLE
    # What ends everything is the last of ours, where it is listed.
    assert "Kill Ray" not in names and "Stop Workers" not in names[:-1], names


def test_missing_models_are_offered_for_download(page):
    workflow = json.loads((ROOT / "example_workflows" / "ltx_2_5_two_stages.json").read_text())
    files = [model["name"] for node in workflow["nodes"] for model in node["properties"].get("models", [])]
    assert len(files) == 5
    page.evaluate("load", workflow)
    page.get_by_role("button", name="View details").click()
    page.get_by_role("button", name="Download all").wait_for()
    for file in files:
        page.get_by_role("button", name=f"Download {file}").wait_for()
    assert page.get_by_test_id("missing-model-download").count() == 5


ADD = """(type) => {
  const node = LiteGraph.createNode(type)
  app.rootGraph.add(node)
  app.canvas.centerOnNode(node)
  app.canvas.selectNode(node)
}"""


@pytest.mark.parametrize("node", ["RayLTX", "RayVAELoader"])
def test_help_is_a_page_that_fits(page, node):
    lines = (ROOT / "web" / "docs" / f"{node}.md").read_text().splitlines()
    page.evaluate(ADD, node)
    page.get_by_test_id("info-button").click()
    help_page = page.locator(".node-help-content")
    for line in lines:
        if line.startswith("#"):
            level, heading = line.split(" ", 1)
            help_page.get_by_role("heading", name=heading, exact=True, level=len(level)).wait_for()
    too_wide = help_page.evaluate("""(page) => {
        const boxes = [page, page.parentElement, page.parentElement.parentElement]
        return boxes.map(({ scrollWidth, clientWidth }) => scrollWidth - clientWidth).filter((more) => more > 0)
    }""")  # fmt: skip
    assert not too_wide
    help_page.get_by_role("listitem").last.scroll_into_view_if_needed()


def test_nodes_2_0_fold_away_all_but_two_inputs(page):
    page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    page.evaluate(ADD, "RayLTX")
    widgets = page.get_by_test_id("node-widget").filter(visible=True)
    advanced = page.get_by_role("button", name="Show advanced inputs")
    advanced.wait_for()
    names = lambda: [text.splitlines()[0] for text in widgets.all_inner_texts()]  # noqa: E731
    assert names() == ["model_name", "gpus"]
    advanced.click()
    page.get_by_role("button", name="Hide advanced inputs").wait_for()
    assert names() == ["model_name", "gpus", "weight_dtype", "max_vram_gb", "device", "vae_name"]
