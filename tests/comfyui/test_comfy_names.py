"""What RayLTX knows of ComfyUI by name is written down, and is there."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfyui
ROOT = Path(__file__).parents[2]
OF_COMFYUI = ("comfy", "comfy_extras", "folder_paths", "nodes")
BY_STRING = {
    "comfy_extras.nodes_custom_sampler", "comfy_extras.nodes_lt", "nodes.VAELoader", "nodes.common_ksampler",
    "comfy.memory_management", "comfy.ldm.lightricks.av_model", "comfy.ldm.lightricks.model",
}  # fmt: skip
MEASUREMENTS = ROOT / "cli" / "bench"  # which nobody's picture depends on
PACKAGES = ("cli", "comfy_dist", "diffusion_models", "distributed_worker", "expansion", "nodes", "sequence_parallel")


def names_in(path: Path) -> set[str]:
    """The dotted names of ComfyUI's that a source file uses."""
    tree = ast.parse(path.read_text())
    known, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in OF_COMFYUI:
                    found.add(alias.name)
                    known[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OF_COMFYUI:
            for alias in node.names:
                found.add(f"{node.module}.{alias.name}")
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in known:
            found.add(".".join([known[inner.id], *reversed(parts)]))
    return found


def test_every_name_that_the_source_uses_is_in_the_list(comfy):
    from rayltx.comfy_dist.comfy_names import USED

    used = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if not path.is_relative_to(MEASUREMENTS):
                used |= names_in(path)
    assert len(used) > 60
    listed = set(USED)
    for name in used - {"folder_paths.__file__"}:
        beginnings = {name.rsplit(".", count)[0] for count in range(name.count(".") + 1)}
        assert beginnings & listed or any(entry.startswith(f"{name}.") for entry in listed), name
    for entry in listed:
        assert any(name == entry or name.startswith(f"{entry}.") or entry.startswith(name) for name in used) or (
            entry in BY_STRING
        ), f"{entry} is used nowhere"


def test_every_method_that_takes_a_place_is_in_the_list(comfy):
    from rayltx.comfy_dist.comfy_names import REPLACED

    listed = {name.rsplit(".", 1)[1] for name in REPLACED}
    base = importlib.import_module("comfy.model_patcher").ModelPatcher
    twin = importlib.import_module("rayltx.comfy_dist.main_process.twin").TwinPatcher
    worker = importlib.import_module("rayltx.comfy_dist.worker_process.shared_patcher").SharedWeightPatcher
    ours = {name for kind in (twin, worker) for name, value in vars(kind).items() if inspect.isfunction(value)}
    in_some_versions = {"model_mmap_residency", "model_state_dict_for_saving"}
    assert {name for name in ours if hasattr(base, name)} <= listed | in_some_versions
    assert listed - {"state_dict_for_saving"} <= ours, "no method of ours"


def test_this_comfyui_has_them_all(comfy):
    from rayltx.comfy_dist.comfy_names import missing_names

    assert missing_names() == []


def test_what_is_gone_is_named(comfy, monkeypatch):
    from rayltx.comfy_dist.comfy_names import missing_names
    from rayltx.comfy_dist.main_process.detection import check_names
    from rayltx.errors import UnsupportedError

    utils, model = importlib.import_module("comfy.utils"), importlib.import_module("comfy.ldm.lightricks.model")
    monkeypatch.delattr(utils, "convert_old_quants")
    monkeypatch.setattr(model.LTXVModel, "_process_transformer_blocks", lambda self, tokens, options: None)
    expected = [
        "comfy.utils.convert_old_quants",
        "comfy.ldm.lightricks.model.LTXVModel._process_transformer_blocks(x=)",
        "comfy.ldm.lightricks.model.LTXVModel._process_transformer_blocks(transformer_options=)",
    ]
    assert missing_names() == expected
    monkeypatch.setattr(model.CrossAttention, "forward", lambda *args, **kwargs: None)  # of a pack, and forwarded
    assert missing_names() == expected
    check_names.cache_clear()
    try:
        with pytest.raises(UnsupportedError, match=r"convert_old_quants.*update RayLTX"):
            check_names()
    finally:
        check_names.cache_clear()
