"""A wheel of this folder, installed alone, is the command; and what ComfyUI's registry reads is complete."""

import os
import re
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings this one there
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
OUTSIDE_THE_PACKAGE = ("tests/", "scripts/", "importable/", "setup.py")


def run(*command, **options):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["COLUMNS"] = "200"
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, **options)


def succeed(*command, **options):
    done = run(*command, **options)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def pip(*arguments, into=None):
    target = ["--python", into / "bin" / "python"] if into else []
    return succeed(sys.executable, "-m", "pip", *target, "--disable-pip-version-check", *arguments)


@pytest.fixture(scope="module")
def tracked():
    names = run("git", "ls-files", cwd=ROOT).stdout.split("\n")
    names = [name for name in names if name and (ROOT / name).is_file()]
    if not names:
        pytest.skip("needs a git checkout to know which files belong to the package")
    return names


@pytest.fixture(scope="module")
def wheel(tracked, tmp_path_factory):
    """Built from a copy of the tracked files: a build leaves files of its own, and packs those that an older one left."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", target, source)
    return next(target.glob("rayltx-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A new environment with the wheel, and this one's packages, but not this one's `rayltx`.

    That is on the search path by a .pth file, and such files are read in an environment's own folder only.
    """
    folder = tmp_path_factory.mktemp("environment")
    succeed(sys.executable, "-m", "venv", "--without-pip", folder)
    pip("install", "--no-deps", "--no-index", wheel, into=folder)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "other_packages.pth").write_text("\n".join(site.getsitepackages()))
    return folder


def test_a_wheel_holds_every_module_and_what_they_read(wheel, tracked):
    modules = {name for name in tracked if name.endswith(".py") and not name.startswith(OUTSIDE_THE_PACKAGE)}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {f"rayltx/{name}" for name in (*modules, "demo/shapes.safetensors")}


def test_the_package_of_a_wheel_is_the_installed_one_and_importing_it_does_nothing(installed, tmp_path):
    code = """
import sys
path, modules = list(sys.path), set(sys.modules)
import rayltx
assert set(sys.modules) - modules == {"rayltx"} and sys.path == path
from rayltx import about
print(rayltx.__file__, *about.SEARCH_PATH)
"""
    (found,) = succeed(installed / "bin" / "python", "-c", code, cwd=tmp_path).split()
    assert Path(found).is_relative_to(installed)


def test_comfyui_finds_the_nodes_in_the_folder(tmp_path):
    """It imports the folder under its path, where `rayltx` need not be installed: -S hides what is."""
    code = f"""
import importlib.util, sys
name = {str(ROOT)!r}
spec = importlib.util.spec_from_file_location(name, name + "/__init__.py")
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
print(len(module.NODE_CLASS_MAPPINGS), module.WEB_DIRECTORY)
"""
    num_nodes, web = succeed(sys.executable, "-S", "-c", code, cwd=tmp_path).split()
    assert int(num_nodes) > 0 and (ROOT / web).is_dir()


@pytest.mark.slow
def test_the_command_of_a_wheel_runs_from_any_folder(installed, tmp_path):
    command = installed / "bin" / "rayltx"
    demo = next(installed.glob("lib/python*/site-packages/rayltx/demo/shapes.safetensors"))
    assert "LTX-Video transformer" in succeed(command, "info", demo, cwd=tmp_path)
    checked = succeed(command, "check", "--model", "LTX-Video", "--workers", 2, "--device", "cpu", cwd=tmp_path)
    assert "1 x 2" in checked and "NOT EXACT" not in checked
    small = ("--steps", 1, "--frames", 9, "--width", 64, "--height", 64, "--cfg", 1)
    succeed(command, "generate", "--device", "cpu", "--workers", 2, *small, "-o", "clip.safetensors", cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.safetensors"]


def test_a_wheel_names_itself_in_what_to_install(installed):
    code = "import sys; sys.modules['typer'] = None; from rayltx.cli.main import main; main()"
    done = run(installed / "bin" / "python", "-c", code, "info", "x.safetensors")
    assert done.returncode == 2 and f'"{installed}/bin/python" -m pip install "rayltx[cli]"\n' in done.stderr, (
        done.stderr
    )


@pytest.mark.slow
def test_a_wheel_alone_in_an_empty_environment_says_what_to_install_and_then_runs(wheel, tmp_path):
    """Downloads torch, Ray and the rest."""
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    succeed(sys.executable, "-m", "venv", "--without-pip", environment)
    pip("install", "--constraint", ROOT / "constraints.txt", wheel, into=environment)
    command = environment / "bin" / "rayltx"
    demo = next(environment.glob("lib/python*/site-packages/rayltx/demo/shapes.safetensors"))
    for arguments in (["info", demo], ["check"], ["generate"], ["convert", demo, "a.gguf"], ["--help"]):
        done = run(command, *arguments, cwd=elsewhere)
        assert done.returncode == 2 and "needs typer, torch, " in done.stderr, done.stderr
    asked_for = re.findall(r'-m pip install "?([^"\n]+)', done.stderr)
    assert asked_for == ["rayltx[cli]", "torch"]

    pip("install", "--constraint", ROOT / "constraints.txt", *asked_for, into=environment)
    assert "LTX-Video transformer" in succeed(command, "info", demo, cwd=elsewhere)
    checked = succeed(command, "check", "--model", "LTX-Video", "--workers", 2, "--device", "cpu", cwd=elsewhere)
    assert "1 x 2" in checked and "NOT EXACT" not in checked
    small = ("--steps", 1, "--frames", 9, "--width", 64, "--height", 64, "--cfg", 1)
    for output in ("clip.mp4", "clip.gif", "clip.png"):
        succeed(command, "generate", "--device", "cpu", "--workers", 1, *small, "-o", output, cwd=elsewhere)
        assert (elsewhere / output).stat().st_size > 0


# ---- what ComfyUI's registry and manager read, as comfy-cli's `registry/config_parser.py` reads it


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_registry_lists_the_packages_that_the_manager_installs(pyproject):
    """The one reads a static list in pyproject.toml, the other requirements.txt."""
    assert "dynamic" not in pyproject["project"]
    assert pyproject["project"]["dependencies"] == (ROOT / "requirements.txt").read_text().split()


def test_the_registry_can_read_every_field(pyproject):
    project, comfy = pyproject["project"], pyproject["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*", project["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"] == "Apache-2.0" and project["description"] and project["requires-python"]
    # One that it does not know makes it drop all of its kind.
    accelerators = {name for name in project["classifiers"] if name.startswith("Environment ::")}
    assert accelerators == {"Environment :: GPU :: NVIDIA CUDA"}
    systems = {name for name in project["classifiers"] if name.startswith("Operating System ::")}
    assert systems == {"Operating System :: POSIX :: Linux"}
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert "web" not in comfy  # __init__.py names it: ComfyUI would load it twice
