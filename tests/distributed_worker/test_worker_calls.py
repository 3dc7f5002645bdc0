"""What a worker can be asked, and that a wrong call is an error of the type checker."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rayltx.comfy_dist.comfy_host import ComfyHost
from rayltx.distributed_worker.host import Host
from rayltx.distributed_worker.worker import Worker
from rayltx.distributed_worker.worker_calls import CallKind, ask, ask_together, kind_of

ROOT = Path(__file__).parents[2]


def public_methods(cls):
    return {name: method for name, method in inspect.getmembers(cls, inspect.isfunction) if not name.startswith("_")}


def test_every_method_of_a_worker_is_marked():
    methods = public_methods(Worker)
    methods.pop("answer")  # the way in
    assert [name for name, method in methods.items() if kind_of(method) is None] == []


def test_every_method_that_comfyui_adds_to_a_host_is_marked_and_described():
    added = {name: method for name, method in public_methods(ComfyHost).items() if name not in public_methods(Host)}
    assert {"set_patches", "keep_hooks", "self_test"} <= set(added)
    for name, method in added.items():
        assert kind_of(method) is not None and method.__doc__, name


@pytest.mark.parametrize("host", [Host, ComfyHost])
def test_a_method_is_collective_if_it_takes_the_group(host):
    for name, method in public_methods(host).items():
        takes_group = "group" in inspect.signature(method).parameters
        assert takes_group == (kind_of(method) is CallKind.COLLECTIVE), name


def test_a_call_carries_the_method_and_its_arguments():
    call = ask(Worker.join, 1, "config", meeting_point=("here", 1), timeout_s=2.0)
    assert (call.method, call.args) == ("join", (1, "config"))
    assert call.kwargs == {"meeting_point": ("here", 1), "timeout_s": 2.0}
    assert call.kind is CallKind.COLLECTIVE
    assert ask(Worker.leave).kind is CallKind.INDIVIDUAL


def test_what_is_not_marked_cannot_be_asked():
    with pytest.raises(AssertionError, match=r"Worker.answer is marked neither"):
        ask(Worker.answer, b"", ())
    with pytest.raises(AssertionError, match=r"takes the group, and is not marked"):
        ask_together(ComfyHost.unload)


RIGHT = """
from rayltx.comfy_dist.comfy_host import ComfyHost
from rayltx.comfy_dist.wire import LoadInputs, SentPatches, TextInputs
from rayltx.distributed_worker.remote_model import RemoteModel
from rayltx.distributed_worker.worker import Worker
from rayltx.distributed_worker.worker_calls import ask, ask_together

def calls(model: RemoteModel, load: LoadInputs, sent: SentPatches) -> None:
    model.set_up("patches", ask(ComfyHost.set_patches, sent), "patches")
    width: int = model.call(ask(ComfyHost.preprocess_text, TextInputs((), {}, load, None)), "text")[0].shape[-1]
"""
WRONG = {
    "    model.call(ask(ComfyHost.set_patch, sent), 'a misspelt method')": "attr-defined",
    "    model.call(ask(ComfyHost.set_patches, load), 'an argument of another type')": "arg-type",
    "    model.call(ask(ComfyHost.set_patches), 'an argument too few')": "call-arg",
    "    model.call(ask(Worker.leave), 'not of a host')": "type-var",
    "    text: str = model.call(ask(ComfyHost.placed_bytes), 'a result of another type')[0]": "assignment",
    "    ask_together(ComfyHost.forward, load)": "arg-type",
}


@pytest.mark.slow
def test_a_wrong_call_is_an_error_of_the_type_checker(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "rayltx").symlink_to(ROOT)
    (tmp_path / "calls.py").write_text(RIGHT + "\n".join(WRONG))
    command = [
        sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--follow-imports", "silent",
        "--cache-dir", str(ROOT / ".mypy_cache" / "calls"), "calls.py",
    ]  # fmt: skip
    environment = {**os.environ, "MYPYPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    found = re.findall(r"^calls.py:(\d+): error: .*\[(.*)\]$", done.stdout, re.MULTILINE)
    expected = list(enumerate(WRONG.values(), start=len(RIGHT.splitlines()) + 1))
    assert [(int(line), code) for line, code in found] == expected, done.stdout + done.stderr
