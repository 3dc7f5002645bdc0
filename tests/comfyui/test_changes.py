"""Another model, LoRA and number of workers in each run: the picture is ComfyUI's, and nothing is left of what was before."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from comfy_checkout import find_comfyui
from comfy_models import save_tiny_checkpoint

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

VERSIONS = ("LTX-Video", "LTX-2")
TIMES = 20

# In a process of its own: a process has one cluster.
CHILD = """
import json, sys
folder, comfyui, times, sys.path[:0] = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
import psutil, torch, comfy_scenarios as scenarios
from pathlib import Path
from comfy_models import CONFIGS, set_up_comfyui
set_up_comfyui(comfyui)
import comfy.sd
from rayltx.comfy_dist.comfy_environment import ComfyEnvironment
from rayltx.comfy_dist.comfy_host import COMFY_HOST
from rayltx.comfy_dist.main_process.placement import Placement
from rayltx.comfy_dist.main_process.twin import load_twin
from rayltx.diffusion_models.lightricks.relative_error import relative_error
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.driver.processes import processes_of
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.sequence_parallel.partition import ParallelConfig

bootstrap = ComfyEnvironment.headless(comfyui, cpu=True).bootstrap()
VERSIONS, STRENGTHS = ("LTX-Video", "LTX-2"), (None, 1.0, -0.5)

def picture(model, version, strength):
    config = CONFIGS[version]
    model = model if strength is None else scenarios.with_lora(model, config, strength)
    return scenarios.tensors_of(scenarios.euler(model, version, config))

errors, left, held = [], 0, []
with torch.inference_mode():
    paths = {version: str(Path(folder) / f"{version}.safetensors") for version in VERSIONS}
    whole = {version: comfy.sd.load_diffusion_model(path) for version, path in paths.items()}
    for number in range(times):
        version, strength, workers = VERSIONS[number % 2], STRENGTHS[number % 3], 1 + number // 2 % 3
        before = Cluster.current()
        request = ClusterRequest(workers=workers, host=COMFY_HOST, bootstrap=bootstrap)
        twin = load_twin(paths[version], Placement(request, ParallelConfig(workers, 1)))
        if before is not None and before is not Cluster.current():
            left += len(processes_of(before.driver.session)) + before.driver.folder.exists()
        reference = picture(whole[version], version, strength)
        errors.append(max(map(relative_error, picture(twin, version, strength), reference)))
        del twin, before
        if number in (times // 2 - 1, times - 1):  # each the second run of its workers, who keep what was sent for the first
            held.append((psutil.Process().num_fds(), psutil.Process().num_threads()))
Cluster.current().shutdown()
print(json.dumps([errors, left, held]))
"""


def test_the_picture_is_comfyuis_after_each_change(comfy, tmp_path):
    for version in VERSIONS:
        save_tiny_checkpoint(tmp_path / f"{version}.safetensors", version)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(find_comfyui()), str(TIMES), json.dumps(sys.path)],
        stdout=subprocess.PIPE, text=True, timeout=1500, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0
    errors, left, (halfway, at_the_end) = json.loads(done.stdout.splitlines()[-1])
    print(f"largest error {max(errors):.1e}; descriptors and threads {halfway} to {at_the_end}")
    assert len(errors) == TIMES and max(errors) <= 2e-6
    assert left == 0
    assert all(after <= before for before, after in zip(halfway, at_the_end))
