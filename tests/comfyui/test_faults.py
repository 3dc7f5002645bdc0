"""A worker ends, or fails by itself, in a call of ComfyUI's model on it: the picture is the same, and so is the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from comfy_checkout import find_comfyui
from comfy_models import save_tiny_checkpoint

from fault_points import BEGIN, END, EXIT, RAISE

pytestmark = pytest.mark.comfyui

# Of a MODEL with a LoRA and a patch on blocks, from its file to the picture.
CALLS = ["self_test", "kernel_test", "set_patches", "keep_options", "patch_test", "load", "forward", "end_run"]
IN_SHORT = [(EXIT, BEGIN, "set_patches"), (EXIT, BEGIN, "self_test"), (EXIT, END, "forward")]
# What is tried before it is trusted: a rank that is lost is replaced, one that says something else is the verdict. That of the
# first self-test is about attention that is sent as it is projected: without it the self-test comes again.
VERDICTS = {"kernel_test": "SelfTestError: ", "patch_test": "UnsupportedError: "}

# Gets orders as JSON in lines, does what they say to a new MODEL, and says what became of it.
CHILD = """
import json, sys
path, comfyui, folder, sys.path[:0] = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
import torch, comfy_scenarios as scenarios
from comfy_models import CONFIGS, set_up_comfyui
set_up_comfyui(comfyui)
import comfy.sd
from fault_points import FaultPoints
from rayltx.comfy_dist.comfy_environment import ComfyEnvironment
from rayltx.comfy_dist.comfy_host import COMFY_HOST
from rayltx.comfy_dist.main_process import self_test_record
from rayltx.comfy_dist.main_process.placement import Placement
from rayltx.comfy_dist.main_process.twin import load_twin
from rayltx.diffusion_models.lightricks.relative_error import relative_error
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.errors import RayLTXError
from rayltx.sequence_parallel.partition import ParallelConfig

VERSION = "LTX-2"
self_test_record.read_record = lambda path: {}  # nothing has been tried yet, ever
self_test_record.write_record = lambda *args: None
points = FaultPoints(folder, (), ComfyEnvironment.headless(comfyui, cpu=True).bootstrap())
request = ClusterRequest(workers=2, host=COMFY_HOST, bootstrap=points.bootstrap())

def picture(model):
    def patch(args, extra):
        return {"img": extra["original_block"](args)["img"]}
    model = scenarios.with_lora(model, CONFIGS[VERSION])
    options = model.model_options.setdefault("transformer_options", {})
    options.setdefault("patches_replace", {}).setdefault("dit", {})[("double_block", 0)] = patch
    return scenarios.tensors_of(scenarios.euler(model, VERSION, CONFIGS[VERSION]))

def on_workers():
    return picture(load_twin(path, Placement(request, ParallelConfig(2, 1))))

with torch.inference_mode():
    reference = picture(comfy.sd.load_diffusion_model(path))
    error = lambda: max(map(relative_error, on_workers(), reference))
    print(json.dumps(error()), flush=True)
    for line in sys.stdin:
        kind, at, call = json.loads(line)
        points.clear()
        points.order(kind, "host." + call, at)
        try:
            first = error()
        except RayLTXError as told:
            first = f"{type(told).__name__}: {told}"
        following = error()  # before it is counted: nobody waits for the end of a run
        print(json.dumps([first, points.num_carried_out(kind, "host." + call, at), following]), flush=True)
Cluster.current().shutdown()
"""


@pytest.fixture(scope="module")
def ask(comfy, tmp_path_factory):
    """In a process of its own: a process has one cluster."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "orders").mkdir()
    path = folder / "model.safetensors"
    save_tiny_checkpoint(path, "LTX-2")
    arguments = [str(path), str(find_comfyui()), str(folder / "orders"), json.dumps(sys.path)]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip

    def answer():
        line = child.stdout.readline()
        assert line, f"it ended: {child.wait()}"
        return json.loads(line)

    def ask(order):
        print(json.dumps(order), file=child.stdin, flush=True)
        return answer()

    try:
        assert answer() <= 2e-6
        yield ask
    finally:
        child.stdin.close()
        child.wait(60)


@pytest.mark.parametrize(
    "kind, at, call",
    [
        pytest.param(kind, at, call, marks=() if (kind, at, call) in IN_SHORT else pytest.mark.slow)
        for call in CALLS
        for kind in (EXIT, RAISE)
        for at in (BEGIN, END)
    ],
)
def test_a_fault_in_a_call_of_the_model(ask, kind, at, call):
    first, carried_out, following = ask((kind, at, call))
    assert carried_out == 1, "the fault did not come"
    if kind == RAISE and call in VERDICTS:
        assert str(first).startswith(VERDICTS[call]) and "as ordered" in first
        assert call != "kernel_test" or "\n" not in first
    else:
        assert not isinstance(first, str), first
        assert first <= 2e-6
    assert following <= 2e-6
