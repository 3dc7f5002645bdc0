"""A self-attention that gives something else when its parts are sent as they are projected: they are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from comfy_checkout import find_comfyui
from comfy_models import save_tiny_checkpoint

pytestmark = pytest.mark.comfyui

# In a process of its own: a process has one cluster.
CHILD = """
import json, sys
path, comfyui, sys.path[:0], workers = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
import logging, torch, comfy_scenarios as scenarios
from comfy_models import CONFIGS, set_up_comfyui
set_up_comfyui(comfyui)
import comfy.sd
from rayltx.comfy_dist.comfy_environment import ComfyEnvironment
from rayltx.comfy_dist.comfy_host import COMFY_HOST
from rayltx.comfy_dist.main_process import self_test_record
from rayltx.comfy_dist.main_process.placement import Placement
from rayltx.comfy_dist.main_process.twin import load_twin
from rayltx.diffusion_models.lightricks.relative_error import relative_error
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import Bootstrap, ClusterRequest
from rayltx.sequence_parallel.partition import ParallelConfig

VERSION, record, warned = "LTX-2", {}, []
self_test_record.read_record = lambda path: record
self_test_record.write_record = lambda path, verdicts, *told: record.update(verdicts)
self_test_record.logger.warning = lambda text, *arguments: warned.append(text % arguments)
inner = ComfyEnvironment.headless(comfyui, cpu=True).bootstrap()
request = ClusterRequest(workers=workers, host=COMFY_HOST, bootstrap=Bootstrap("comfy_ranks:take_another_rotation", inner))
with torch.inference_mode():
    picture = lambda model: scenarios.tensors_of(scenarios.euler(model, VERSION, CONFIGS[VERSION]))
    reference = picture(comfy.sd.load_diffusion_model(path))
    errors = []
    for _ in range(2):  # the second time by the record
        twin = load_twin(path, Placement(request, ParallelConfig(workers)))
        errors.append(max(map(relative_error, picture(twin), reference)))
    # The same model on fewer ranks: what it was told for more is no proof.
    errors.append(max(map(relative_error, picture(twin.with_config(ParallelConfig(1))), reference)))
Cluster.current().shutdown()
print(json.dumps([errors, warned, [verdict["as_projected"] for verdict in record.values()]]))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_it_takes_the_plain_path_and_is_exact(comfy, tmp_path, workers):
    import comfy.ldm.lightricks.model as module

    if not hasattr(module, "apply_rotary_emb_qk"):
        pytest.skip("this ComfyUI rotates query and key by themselves everywhere")
    path = tmp_path / "model.safetensors"
    save_tiny_checkpoint(path, "LTX-2")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(find_comfyui()), json.dumps(sys.path), str(workers)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors, warned, as_projected = json.loads(done.stdout.splitlines()[-1])
    assert max(errors) <= 2e-6
    assert as_projected == [False] * workers, "of two ranks, and of one"
    if workers > 1:
        assert len(warned) == 1 and "something else when its parts are sent as they are projected" in warned[0]
