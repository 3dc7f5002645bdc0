"""The example workflows as files: nothing here needs ComfyUI or a browser."""

from __future__ import annotations

import json
import math
import re
import sys
from itertools import combinations
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from rayltx.about import VERSION
from rayltx.nodes import NODE_CLASS_MAPPINGS

FOLDER = Path(__file__).resolve().parents[1] / "example_workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
NOTES = ("Note", "MarkdownNote")
TITLE = 30  # the height of a node's title, which lies above its position
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")
OURS = {"cnr_id": "rayltx", "ver": VERSION}  # the pack's name and version in pyproject.toml
COMFYUI = {"cnr_id": "comfy-core", "ver": "0.33.0"}

# The folders that ComfyUI's own loaders list, by the names of their inputs.
FOLDERS = {
    "ckpt_name": "checkpoints",
    "clip_name": "text_encoders",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
    "lora_name": "loras",
    "model_name": "latent_upscale_models",
    "text_encoder": "text_encoders",
}

# ComfyUI opens a template with all nodes, and a margin around them, on three quarters of the window, and leaves out what is
# written in nodes below LEAST_ZOOM. All in pixels.
WINDOW, MARGIN, LEAST_ZOOM = (1600, 900), 10, 8 / 14
LEAST_SIZE = 11  # of text that can be read
# A note's text has 10 pixels at zoom 1. Its largest headings have more: their size, a line, the space between two, a character,
# and the space around all of them.
HEADING, LINE, BETWEEN, CHARACTER, PADDING = 20, 24, 14, 11.5, 22


def read(name):
    return json.loads((FOLDER / name).read_text())


def number_of_widgets(node):
    groups = node.INPUT_TYPES()
    definitions = [d for group in ("required", "optional") for d in groups.get(group, {}).values()]
    widgets = [d for d in definitions if isinstance(d[0], list) or d[0] in WIDGETS]
    return len(widgets) + sum(bool(d[1].get("control_after_generate")) for d in widgets)


def notes_of(name):
    return [node for node in read(f"{name}.json")["nodes"] if node["type"] in NOTES]


def opening_zoom(nodes):
    boxes = [(x, y - TITLE, x + w, y + h) for (x, y), (w, h) in ((node["pos"], node["size"]) for node in nodes)]
    left, top, right, bottom = (outer(side) for outer, side in zip((min, min, max, max), zip(*boxes)))
    sizes = (right - left + 2 * MARGIN, bottom - top + 2 * MARGIN)
    return min(0.75 * window / size for window, size in zip(WINDOW, sizes))


def text_height(text, width):
    """Of headings of one line of text, `# ...`, or of several, `...\\` and `===` under the last."""
    blocks = text.strip().split("\n\n")
    assert all(block.startswith("# ") or block.endswith("\n===") for block in blocks)
    shown = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", block).removeprefix("# ").removesuffix("\n===") for block in blocks]
    lines = sum(math.ceil(len(line) * CHARACTER / width) for block in shown for line in block.split("\\\n"))
    return lines * LINE + (len(blocks) - 1) * BETWEEN


def test_there_are_examples():
    assert len(NAMES) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_links_agree_with_both_ends(name):
    workflow = read(f"{name}.json")
    assert workflow["version"] == 0.4
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"])
    ends = set()
    for number, source, output, target, slot, kind in workflow["links"]:
        out, into = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in out["links"] and into["link"] == number
        assert out["type"] == kind and kind in into["type"].split(",")
        ends |= {("out", source, output, number), ("in", target, slot, number)}
    for node in nodes.values():
        for slot, output in enumerate(node["outputs"]):
            assert all(("out", node["id"], slot, number) in ends for number in output["links"] or ())
        for slot, entry in enumerate(node["inputs"]):
            assert entry["link"] is None or ("in", node["id"], slot, entry["link"]) in ends


@pytest.mark.parametrize("name", NAMES)
def test_our_nodes_have_their_outputs_and_a_value_for_each_widget(name, lists_of_names):
    ours = [node for node in read(f"{name}.json")["nodes"] if node["type"] in NODE_CLASS_MAPPINGS]
    assert ours
    for node in ours:
        kind = NODE_CLASS_MAPPINGS[node["type"]]
        assert len(node["widgets_values"]) == number_of_widgets(kind), node["type"]
        assert [output["name"] for output in node["outputs"]] == list(kind.RETURN_NAMES), node["type"]


@pytest.mark.parametrize("name", NAMES)
def test_nodes_do_not_overlap(name):
    boxes = [(n["type"], *n["pos"], *n["size"]) for n in read(f"{name}.json")["nodes"]]
    for (first, x, y, w, h), (second, x2, y2, w2, h2) in combinations(boxes, 2):
        apart = x + w <= x2 or x2 + w2 <= x or y + h <= y2 - TITLE or y2 + h2 <= y - TITLE
        assert apart, (first, second)


@pytest.mark.parametrize("name", NAMES)
def test_api_form_has_the_same_nodes(name):
    shown = {str(n["id"]): n["type"] for n in read(f"{name}.json")["nodes"] if n["type"] not in NOTES}
    assert {number: node["class_type"] for number, node in read(f"api/{name}.json").items()} == shown


@pytest.mark.parametrize("name", NAMES)
def test_every_node_says_of_which_pack_it_is(name):
    for node in read(f"{name}.json")["nodes"]:
        pack = OURS if node["type"] in NODE_CLASS_MAPPINGS else COMFYUI
        assert pack.items() <= node["properties"].items(), node["type"]


@pytest.fixture
def folders_of(lists_of_names, monkeypatch):
    """folders_of(class_type, name) -> the folders whose files a loader lists in that input"""
    monkeypatch.setattr(sys.modules["folder_paths"], "get_filename_list", lambda folder: [folder])

    def get(class_type, name):
        if class_type not in NODE_CLASS_MAPPINGS:
            return [FOLDERS[name]]
        schema = NODE_CLASS_MAPPINGS[class_type].INPUT_TYPES()
        listed = {**schema["required"], **schema.get("optional", {})}[name][0]
        return ["diffusion_models" if folder == "unet_gguf" else folder for folder in listed]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_every_file_has_its_link_and_folder(name, folders_of):
    """On its loader, where ComfyUI finds them to offer the download, and in a note."""
    properties = {str(node["id"]): node["properties"] for node in read(f"{name}.json")["nodes"]}
    notes = "".join(note["widgets_values"][0] for note in notes_of(name))
    for number, node in read(f"api/{name}.json").items():
        files = {key: file for key, file in node["inputs"].items() if str(file).endswith((".safetensors", ".gguf"))}
        models = {model["name"]: model for model in properties[number].get("models", ())}
        assert models.keys() == set(files.values())
        for key, file in files.items():
            link, folder = models[file]["url"], models[file]["directory"]
            assert urlsplit(link).scheme == "https" and urlsplit(link).path.endswith(f"/{file}")
            assert folder in folders_of(node["class_type"], key)
            assert f"`{folder}` [{file}]({link})" in notes


@pytest.mark.parametrize("name", NAMES)
def test_notes_can_be_read_as_the_graph_opens(name):
    zoom = opening_zoom(read(f"{name}.json")["nodes"])
    assert zoom >= LEAST_ZOOM and zoom * HEADING >= LEAST_SIZE
    for note in notes_of(name):
        width, height = note["size"]
        assert text_height(note["widgets_values"][0], width - PADDING) <= height - PADDING, note["title"]


@pytest.mark.parametrize("name", NAMES)
def test_example_has_pictures_and_says_what_it_is(name):
    assert (FOLDER / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (FOLDER / f"{name}.jpg").read_bytes().startswith(b"\xff\xd8")
    first = notes_of(name)[0]
    assert first["widgets_values"][0].startswith(f"# {first['title']}\n\nWhat to download into `models/`")
