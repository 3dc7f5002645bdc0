"""Imports point one way, and the package works wherever it lies."""

import ast
import functools
import graphlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PACKAGES = (
    "cli",
    "comfy_dist",
    "demo",
    "diffusion_models",
    "distributed_worker",
    "expansion",
    "nodes",
    "sequence_parallel",
)

SCRIPT = """
import importlib, json, pkgutil, sys
package = importlib.import_module({name!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(json.dumps(sorted(sys.modules)))
"""


@functools.cache
def modules_after_importing(name, importable=ROOT / "importable", cwd=None):
    environment = {**os.environ, "PYTHONPATH": str(importable)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(name=name)], env=environment, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def from_outside(modules):
    """Top-level packages that come from a distribution, and are neither torch nor what torch brings."""
    alone = _modules_of("import torch, torch.distributed")
    return {name.split(".")[0] for name in modules - alone} - set(sys.stdlib_module_names)


def _modules_of(statement):
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(json.loads(done.stdout))


def test_sequence_parallel_imports_torch_alone():
    modules = modules_after_importing("rayltx.sequence_parallel")
    assert from_outside(modules) == {"rayltx"}
    assert {name for name in modules if name.startswith("rayltx.")} >= {
        "rayltx.sequence_parallel.ring",
        "rayltx.errors",
    }


def test_expansion_imports_neither_ray_nor_comfyui():
    modules = modules_after_importing("rayltx.expansion")
    assert not {"ray", "comfy", "folder_paths"} & modules
    assert not {
        name for name in modules if name.startswith(("rayltx.comfy_dist", "rayltx.nodes", "rayltx.distributed"))
    }


def test_importing_the_nodes_needs_neither_ray_nor_comfyui():
    """ComfyUI imports them when it starts: what a node needs is imported when it runs."""
    modules = modules_after_importing("rayltx.nodes")
    assert not {"ray", "gguf", "comfy", "diffusers", "torch"} & modules


def test_the_workers_import_no_host():
    modules = modules_after_importing("rayltx.distributed_worker")
    assert "ray" in modules
    assert not {"diffusers", "comfy", "folder_paths", "nodes"} & modules
    assert not {name for name in modules if name.startswith(("rayltx.comfy_dist", "rayltx.nodes"))}


def test_the_pure_layers_import_neither_ray_nor_comfyui():
    for package in ("rayltx.diffusion_models", "rayltx.expansion"):
        modules = modules_after_importing(package)
        assert not {"ray", "comfy", "folder_paths"} & modules, package


def imports_of(file):
    """The modules of ours that a file imports, anywhere in it: inside of functions too, but not for types alone."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rayltx"):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("rayltx"))


def reached_from(*names):
    """Every module of ours that is imported by these, directly or not."""
    reached, left = set(), list(names)
    while left:
        name = left.pop()
        file = ROOT / Path(*name.split(".")[1:])
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        if name not in reached and file.is_file():
            reached.add(name)
            left += imports_of(file)
    return reached


def modules_in(folder):
    return [f"rayltx.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}" for path in (ROOT / folder).glob("*.py")]


def test_workers_reach_nothing_of_comfyuis_process_and_the_other_way_round():
    main, worker = "rayltx.comfy_dist.main_process", "rayltx.comfy_dist.worker_process"
    in_worker = reached_from(*modules_in("comfy_dist/worker_process"), *modules_in("comfy_dist"))
    assert f"{worker}.shared_patcher" in in_worker and "rayltx.sequence_parallel.ring" in in_worker
    assert [name for name in in_worker if name.startswith((main, "rayltx.nodes", "rayltx.cli"))] == []
    in_main = reached_from(*modules_in("comfy_dist/main_process"), *modules_in("nodes"), *modules_in("comfy_dist"))
    assert f"{main}.twin" in in_main
    assert [name for name in in_main if name.startswith(worker)] == []


def test_imports_go_in_no_circle():
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] in PACKAGES]
    names = {f"rayltx.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}": path for path in files}
    graph = {name: set(imports_of(path)) & set(names) - {name} for name, path in names.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.fixture
def copy_elsewhere(tmp_path):
    """A copy of the package's files in a folder with a name that no one can import."""
    target = tmp_path / "My custom-nodes v1.0" / "ray ltx (copy)"
    names = subprocess.run(
        ["git", "ls-files", "*.py", "*.safetensors", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    if not names:
        pytest.skip("needs a git checkout to know which files belong to the package")
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


def test_the_package_works_under_any_folder_name(copy_elsewhere, tmp_path):
    modules = modules_after_importing("rayltx.sequence_parallel", copy_elsewhere / "importable", cwd=tmp_path)
    assert "rayltx.sequence_parallel.ring" in modules


@pytest.mark.slow
def test_workers_find_a_package_under_any_folder_name(copy_elsewhere, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(copy_elsewhere / "importable")}
    output = tmp_path / "clip.safetensors"
    done = subprocess.run(
        [sys.executable, "-m", "rayltx.cli.main", "generate", "--device", "cpu", "--workers", "2", "--steps", "1",
         "--frames", "9", "--width", "64", "--height", "64", "--cfg", "1", "--output", str(output)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert output.is_file()


def test_importing_does_nothing():
    """No directories, no environment writes, no output."""
    code = """
import os, sys
before = dict(os.environ)
import rayltx.distributed_worker.cluster, rayltx.cli.commands, rayltx.diffusion_models.lightricks.diffusers_host
import rayltx.demo.pixels, ray
changed = {k for k in os.environ if os.environ[k] != before.get(k)} - {"KMP_DUPLICATE_LIB_OK"}
changed = {k for k in changed if not k.startswith(("KMP_", "RAY_", "TORCHINDUCTOR_"))}
assert not changed, changed
assert not ray.is_initialized()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "importable")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_versions_agree():
    from rayltx.about import VERSION

    assert f'\nversion = "{VERSION}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text()
