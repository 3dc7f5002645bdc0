"""The example workflows as files: nothing here needs ComfyUI or a browser."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

from rayltx.nodes import NODE_CLASS_MAPPINGS

FOLDER = Path(__file__).resolve().parents[1] / "example_workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
NOTES = ("Note", "MarkdownNote")
TITLE = 30  # the height of a node's title, which lies above its position
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")


def read(name):
    return json.loads((FOLDER / name).read_text())


def number_of_widgets(node):
    groups = node.INPUT_TYPES()
    definitions = [d for group in ("required", "optional") for d in groups.get(group, {}).values()]
    widgets = [d for d in definitions if isinstance(d[0], list) or d[0] in WIDGETS]
    return len(widgets) + sum(bool(d[1].get("control_after_generate")) for d in widgets)


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
def test_our_nodes_have_a_value_for_each_widget(name, lists_of_names):
    ours = [node for node in read(f"{name}.json")["nodes"] if node["type"] in NODE_CLASS_MAPPINGS]
    assert ours
    for node in ours:
        assert len(node["widgets_values"]) == number_of_widgets(NODE_CLASS_MAPPINGS[node["type"]]), node["type"]


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
def test_example_has_pictures_and_says_what_to_download(name):
    assert (FOLDER / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (FOLDER / f"{name}.jpg").read_bytes().startswith(b"\xff\xd8")
    notes = [n["widgets_values"][0] for n in read(f"{name}.json")["nodes"] if n["type"] in NOTES]
    assert any("What to download" in text and "models/" in text for text in notes)
