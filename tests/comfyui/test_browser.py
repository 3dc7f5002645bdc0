"""The pack in ComfyUI's own frontend, in a browser without a window.

RAYLTX_WRITE_EXAMPLES=1 writes what is made from example_workflows/*.json: the API forms and the pictures.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from urllib.parse import quote

import comfy_server
import pytest
from comfy_browser import page_on
from comfy_checkout import find_comfyui
from comfy_models import save_tiny_checkpoint
from comfy_server import ROOT, Server

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

# ComfyUI cannot serve the web folder of a pack whose folder's name has a space in it (aiohttp compares the quoted name
# with the unquoted one). This is the name that a browser gives to a second download from GitHub.
PACK_FOLDER = "RayLTX-main(1)"
PACK_URL = f"/extensions/{quote(PACK_FOLDER)}"
WORKFLOWS = ROOT / "tests" / "comfyui" / "browser_workflows"
EXAMPLES = ROOT / "example_workflows"
EXAMPLE_NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))
WRITE_EXAMPLES = os.environ.get("RAYLTX_WRITE_EXAMPLES") == "1"

MODEL_FOLDERS = ("checkpoints", "diffusion_models", "vae", "loras", "text_encoders", "latent_upscale_models")


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    base = tmp_path_factory.mktemp("browser")
    models = base / "models"
    for folder in MODEL_FOLDERS:
        (models / folder).mkdir(parents=True)
        for name in EXAMPLE_NAMES:  # empty files, for validation to find
            for file in re.findall(r'"([^"/]+\.(?:safetensors|gguf))"', (EXAMPLES / f"{name}.json").read_text()):
                (models / folder / file).touch()
    save_tiny_checkpoint(models / "diffusion_models" / "tiny.safetensors", "LTX-Video")
    (base / "input").mkdir()
    shutil.copy(find_comfyui() / "input" / "example.png", base / "input")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy_server, "PACK_FOLDER", PACK_FOLDER)
        server = Server(find_comfyui(), base, "--preview-method", "latent2rgb")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def page(browser, server):
    return page_on(browser, server, viewport={"width": 1600, "height": 1000})


def _read(path: Path):
    return json.loads(path.read_text())


# ---- files of other versions

REPAIRS = {
    # file: node -> what its widgets hold that is not their default
    "10_values": {
        "RayInitializer": {"GPU": 4, "ulysses_degree": 4, "cfg_degree": 2, "sync_ulysses": True, "XFuser_attention": "TORCH"},
        "XFuserKSamplerAdvanced": {"noise_seed": 431370320220295, "control_after_generate": "fixed", "steps": 30,
                                   "cfg": 3.5, "sampler_name": "euler", "scheduler": "simple"},
        "RayLoraLoader": {"lora_name": "ltx-2.3-22b-distilled-lora-384.safetensors", "strength_model": 0.8},
        "RayUNETLoader": {"unet_name": "ltx-2.3-22b-dev_transformer_only_fp8_scaled.safetensors"},
    },
    "12_values_with_gpu_indices": {
        "RayInitializer": {"ulysses_degree": 1, "ring_degree": 2, "XFuser_attention": "SAGE_FP8_CUDA",
                           "ray_object_store_gb": 12.5, "gpu_indices": "1,2"},
    },
    "12_values_with_comm_test": {
        "RayInitializer": {"GPU": 4, "ulysses_degree": 2, "ring_degree": 2, "FSDP_CPU_OFFLOAD": True,
                           "XFuser_attention": "FLASH_ATTN", "skip_comm_test": True, "use_mmap": True},
    },
    "13_values": {
        "RayInitializer": {"ulysses_degree": 2, "dp_degree": 0, "sync_ulysses": True, "FSDP": True, "skip_comm_test": True},
    },
    "13_values_in_a_subgraph": {
        "RayInitializer": {"ulysses_degree": 2, "dp_degree": 0, "sync_ulysses": True, "FSDP": True, "skip_comm_test": True},
    },
    "14_values": {
        "RayInitializer": {"GPU": 8, "ulysses_degree": 8, "clear_vram_after_sampling": True,
                           "XFuser_attention": "SAGE_AUTO_DETECT", "use_mmap": True},
        "XFuserSamplerCustomAdvanced": {"noise_seed": 426531804527645, "control_after_generate": "randomize"},
        "RayCFGGuider": {"cfg": 3},
    },
    "26_values": {
        "RayInitializer": {"GPU": 4, "ulysses_degree": 4, "sync_ulysses": True, "XFuser_attention": "FA",
                           "gpu_indices": "2,3"},
    },
    "advanced_14_values": {
        "RayInitializerAdvanced": {"ulysses_degree": 2, "ray_object_store_gb": 6.5, "torch_dist_address": "127.0.0.1:29500",
                                   "sync_ulysses": True, "XFuser_attention": "FLASH_ATTN_3", "gpu_indices": "0,3"},
    },
    "advanced_18_values": {
        "RayInitializerAdvanced": {"GPU_SELECT": "0,3", "ulysses_degree": 2, "clear_vram_after_sampling": True, "dp_degree": 0,
                                   "XFuser_attention": "TORCH_CUDNN", "skip_comm_test": True, "ray_object_store_gb": 2,
                                   "torch_dist_address": "127.0.0.1:29500"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REPAIRS)
def test_values_of_other_versions_find_their_widgets(page, name):
    nodes = {node["type"]: node for node in page.evaluate("load", _read(WORKFLOWS / f"{name}.json"))}
    assert not [kind for kind, node in nodes.items() if node["missing"]]
    for kind, changed in REPAIRS[name].items():
        defaults = page.evaluate("(type) => widgetsOf(LiteGraph.createNode(type))", kind)
        assert nodes[kind]["widgets"] == {**defaults, **changed}


def test_a_saved_workflow_loads_as_it_was(page):
    page.evaluate("load", _read(WORKFLOWS / "14_values.json"))
    before = page.evaluate("""() => {
        const node = allNodes().find(({ type }) => type === "RayInitializer")
        node.widgets.find(({ name }) => name === "device").value = "cpu"
        node.widgets.find(({ name }) => name === "dp_degree").value = 0
        return widgetsOf(node)
    }""")
    saved = json.loads(page.evaluate("JSON.stringify(app.rootGraph.serialize())"))
    after = {node["type"]: node["widgets"] for node in page.evaluate("load", saved)}
    assert after["RayInitializer"] == before


INITIALIZER = {  # as much of the node's widgets as the repair looks at
    "ray_cluster_address": "local", "ray_cluster_namespace": "default", "GPU": 2, "ulysses_degree": 0, "ring_degree": 1,
    "cfg_degree": 1, "dp_degree": 1, "sync_ulysses": False, "clear_vram_after_sampling": False, "FSDP": False,
    "FSDP_CPU_OFFLOAD": False, "XFuser_attention": "TORCH_FLASH", "skip_comm_test": False, "use_mmap": False,
    "ray_object_store_gb": 0.0, "gpu_indices": "", "device": "cuda",
}  # fmt: skip
OURS = ["local", "default", 4, 4, 1, 1, 0, True, True, False, False, "TORCH", True, False, 2.0, "0", "cpu"]
START = {"GPU": 4, "ulysses_degree": 4}
ODD_VALUES = {
    # what the file holds, what differs from the defaults, what is not used
    "the present order": (OURS, dict(zip(INITIALIZER, OURS)), []),
    "a string in the place of a switch": (
        ["local", "default", 4, 4, 1, True, False, False, "TORCH", "TORCH"],
        {**START, "cfg_degree": 2, "XFuser_attention": "TORCH"},
        ["FSDP_CPU_OFFLOAD"],
    ),
    "a switch for cfg_degree, off": (["local", "default", 4, 4, 1, False, False, False, False, "TORCH"],
                                     {**START, "XFuser_attention": "TORCH"}, []),
    "a version that is not known": (["local", "default", 4, 4, 1, 1, "FA", 7, "x"], {**START, "XFuser_attention": "FA"},
                                    ["value 8", "value 9"]),
    "no attention": (["local", "default", 4, 4, 1, 1, True], START, ["value 7"]),
    "more than we have": ([*OURS, "new"], dict(zip(INITIALIZER, OURS)), ["value 18"]),
    "nothing": ([], {}, []),
}  # fmt: skip


def _repair(stored, named=None):
    """What web/widget_orders.js makes of the values, by name, and the names of what it does not use."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node.js")
    choices = {"XFuser_attention": ["TORCH", "TORCH_FLASH", "FA"], "device": ["cuda", "cpu"]}
    widgets = [{"name": n, "value": v, "options": {"values": choices.get(n)}} for n, v in INITIALIZER.items()]
    arguments = ", ".join(json.dumps(value) for value in ("RayInitializer", widgets, stored, named))
    script = (ROOT / "web" / "widget_orders.js").read_text() + f"\nconsole.log(JSON.stringify(repair({arguments})))"
    output = subprocess.run([node, "--input-type=module"], input=script, capture_output=True, text=True, check=True)
    found = json.loads(output.stdout)
    return dict(zip(INITIALIZER, found["values"])), [text.split(" = ")[0] for text in found["dropped"]]


@pytest.mark.parametrize("case", ODD_VALUES)
def test_values_that_no_version_has(case):
    stored, changed, dropped = ODD_VALUES[case]
    assert _repair(stored) == ({**INITIALIZER, **changed}, dropped)


def test_names_in_the_file_win_over_places():
    named = {"GPU": 4, "tensor_parallel_degree": 2, "XFuser_attention": "FA", "cfg_degree": False, "use_mmap": True}
    changed = {"GPU": 4, "XFuser_attention": "FA", "use_mmap": True}
    assert _repair(list(named.values()), named) == ({**INITIALIZER, **changed}, ["tensor_parallel_degree"])


# ---- the examples


@pytest.mark.parametrize("name", EXAMPLE_NAMES)
def test_example_loads_and_has_its_api_form(page, name, tmp_path):
    workflow = _read(EXAMPLES / f"{name}.json")
    nodes = page.evaluate("load", workflow)
    assert len(nodes) == len(workflow["nodes"])
    assert not [node["type"] for node in nodes if node["missing"] or node["errors"]]

    folder = EXAMPLES if WRITE_EXAMPLES else tmp_path
    _take_picture(page, folder / name)
    assert (folder / f"{name}.png").stat().st_size < 400_000
    prompt = page.evaluate("async () => (await app.graphToPrompt()).output")
    api_form = EXAMPLES / "api" / f"{name}.json"
    if WRITE_EXAMPLES:
        api_form.parent.mkdir(exist_ok=True)
        api_form.write_text(json.dumps(prompt, indent=2, ensure_ascii=False) + "\n")
    assert prompt == _read(api_form)


def _take_picture(page, path: Path) -> None:
    """The whole graph as `path`.png, and as `path`.jpg the small one of ComfyUI's template browser."""
    from PIL import Image

    scale, margin = 0.7, 40
    page.evaluate("app.extensionManager.command.execute('Workspace.ToggleFocusMode')")
    x, y, width, height = page.evaluate("""(margin) => {
        const boxes = [...app.rootGraph.nodes, ...app.rootGraph.groups].map((item) => item.boundingRect)
        const [left, top] = [0, 1].map((axis) => Math.min(...boxes.map((box) => box[axis])) - margin)
        const [right, bottom] = [0, 1].map((axis) => Math.max(...boxes.map((box) => box[axis] + box[axis + 2])) + margin)
        return [left, top, right - left, bottom - top]
    }""", margin)  # fmt: skip
    usual = page.viewport_size
    page.set_viewport_size({"width": int(width * scale), "height": int(height * scale)})
    page.wait_for_function("""([x, y, scale, width]) => {
        const { canvas, ds } = app.canvas
        Object.assign(ds, { scale, offset: [-x, -y] })
        app.canvas.setDirty(true, true)
        return Math.abs(canvas.getBoundingClientRect().width - width * scale) < 2
    }""", arg=[x, y, scale, width])  # fmt: skip
    # The images that nodes show, and two frames, for what lies over the canvas to follow.
    page.wait_for_function(
        "allNodes().every(({ type, imgs }) => type !== 'LoadImage' || imgs?.every((i) => i.complete))"
    )
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    style = page.add_style_tag(content=".p-toast, button { visibility: hidden !important }")
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    style.evaluate("(element) => element.remove()")
    picture.quantize(256, dither=Image.Dither.NONE).save(path.with_suffix(".png"), optimize=True)
    picture.thumbnail((800, 800))
    picture.save(path.with_suffix(".jpg"), quality=80)
    page.set_viewport_size(usual)
    page.evaluate("app.extensionManager.command.execute('Workspace.ToggleFocusMode')")


@pytest.mark.parametrize("name", EXAMPLE_NAMES)
def test_example_is_valid_for_the_server(server, name):
    """Its files are empty here, so it cannot run; but every input has a value of its type, from the list of choices."""
    answer = server.post("/prompt", {"prompt": _read(EXAMPLES / "api" / f"{name}.json"), "client_id": "tests"})
    server.post("/queue", {"clear": True})
    server.post("/interrupt", {})
    assert answer["node_errors"] == {}


def test_templates_are_listed_with_their_thumbnails(server):
    assert sorted(server.get("/workflow_templates")[PACK_FOLDER]) == EXAMPLE_NAMES
    for name in EXAMPLE_NAMES:
        address = f"{server.url}/api/workflow_templates/{quote(PACK_FOLDER)}/{name}.jpg"
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert answer.headers.get_content_type() == "image/jpeg"


# ---- in use


def test_a_workflow_runs_from_the_page(page, server, tmp_path):
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.evaluate("load", _read(WORKFLOWS / "tiny_on_two_workers.json"))
    page.evaluate("""() => {
        window.seen = []
        for (const name of ["execution_start", "progress", "b_preview", "b_preview_with_metadata", "execution_success",
                            "execution_error"])
          app.api.addEventListener(name, ({ detail }) =>
            seen.push({ name, detail: detail instanceof Blob ? { size: detail.size } : { ...detail } }))
    }""")
    page.get_by_role("button", name="Run", exact=True).first.click()
    page.wait_for_function("seen.some(({ name }) => ['execution_success', 'execution_error'].includes(name))")
    seen = page.evaluate(
        "seen.map(({ name, detail }) => [name, detail.value ?? detail.blob?.size ?? detail.size ?? null])"
    )
    assert seen[-1][0] == "execution_success", page.evaluate("seen.at(-1)")
    assert [value for name, value in seen if name == "progress"][-3:] == [1, 2, 3]
    assert any(value > 0 for name, value in seen if name == "b_preview_with_metadata")
    assert (server.output / "from the page.safetensors").is_file()
    assert not errors
    page.screenshot(path=tmp_path / "run.png")


def test_help_page_is_where_the_frontend_looks(page, server):
    module = server.get("/object_info/RayInitializer")["RayInitializer"]["python_module"]
    assert module == f"custom_nodes.{PACK_FOLDER}"
    answer = page.evaluate("async (url) => { const a = await fetch(url); return [a.status, await a.text()] }",
                           f"{PACK_URL}/docs/RayInitializer.md")  # fmt: skip
    assert answer[0] == 200 and "Ray Init Actor" in answer[1].splitlines()[0]
