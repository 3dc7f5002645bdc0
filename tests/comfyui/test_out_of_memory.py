"""A device whose memory runs out on some rank: nobody is replaced, and the step is tried with less."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_checkout import find_comfyui
from comfy_models import save_tiny_checkpoint

pytestmark = pytest.mark.comfyui

SCRIPT = """
import logging, sys
from pathlib import Path
import torch
import comfy_scenarios as scenarios
from comfy_models import CONFIGS, set_up_comfyui
comfyui, checkpoint, folder = sys.argv[1:]
set_up_comfyui(comfyui)
import comfy.model_management
from rayltx.comfy_dist.comfy_environment import ComfyEnvironment
from rayltx.comfy_dist.comfy_host import COMFY_HOST, ComfyHost
from rayltx.comfy_dist.main_process.placement import Placement
from rayltx.comfy_dist.main_process.twin import load_twin
from rayltx.distributed_worker import outcomes
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import Bootstrap, ClusterRequest
from rayltx.distributed_worker.worker_calls import ask
from rayltx.sequence_parallel.partition import ParallelConfig

messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("rayltx").addHandler(handler)

environment = ComfyEnvironment.headless(comfyui, cpu=True)
bootstrap = Bootstrap("comfy_ranks:enter_short_of_memory", (environment, folder))
with Cluster.start(ClusterRequest(workers=2, host=COMFY_HOST, bootstrap=bootstrap)) as cluster:
    twin = load_twin(checkpoint, Placement(cluster.request, ParallelConfig(2, 1)))
    pids = [info.pid for info in cluster.workers()]

    def sample(*failures):
        messages.clear()
        for rank, count in enumerate(failures):
            (Path(folder) / f"rank {rank}").write_text(str(count))
        with torch.inference_mode():
            return scenarios.tensors_of(scenarios.euler(twin, "LTX-Video", CONFIGS["LTX-Video"]))[0]

    right = sample(0, 0)
    assert not messages, messages

    # On both ranks, each in its own words; and on one, whose neighbour is in the middle of an exchange.
    for failures, who in (((1, 1), "rank 0, 1 of 2"), ((0, 1), "rank 1 of 2")):
        again = sample(*failures)
        assert torch.equal(again, right), (again - right).abs().max()
        warned = [text for text in messages if "ran out of memory" in text]
        assert len(warned) == 1 and who in warned[0] and "trying again with at most" in warned[0], messages
        assert "101.31 MiB is free" in warned[0]
        assert [info.pid for info in cluster.workers()] == pids, "a worker was replaced"

    try:
        sample(2, 2)
    except torch.OutOfMemoryError as error:
        assert comfy.model_management.is_oom(error)
        text = str(error)
        assert "rank 0: CUDA out of memory" in text and "rank 1: CUDA out of memory" in text, text
        assert "max_vram_gb" in text and "smaller or shorter" in text, text
    else:
        raise SystemExit("no error")
    assert [info.pid for info in cluster.workers()] == pids, "a worker was replaced"
    placed = twin.link.remote.call(ask(ComfyHost.placed_bytes), "measuring")
    assert set(placed.values()) == {0}, placed
    assert torch.equal(sample(0, 0), right)
    assert [info.pid for info in cluster.workers()] == pids

    # A neighbour that waits, and notices nothing, is replaced; the budget is no less for it.
    outcomes.GRACE_S = 1.0
    (Path(folder) / "rank 1 waits").touch()
    assert torch.equal(sample(1, 0), right)
    now = [info.pid for info in cluster.workers()]
    assert now[0] == pids[0] and now[1] != pids[1], (pids, now)
    warned = [text for text in messages if "ran out of memory" in text]
    assert len(warned) == 1 and "rank 0 of 2" in warned[0], messages
"""


def test_out_of_memory_costs_a_step_and_no_worker(comfy, tmp_path):
    checkpoint, folder = tmp_path / "model.safetensors", tmp_path / "failures"
    folder.mkdir()
    save_tiny_checkpoint(checkpoint, "LTX-Video")
    script = f"import sys; sys.path[:0] = {sys.path!r}\n{SCRIPT}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", script, str(find_comfyui()), str(checkpoint), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


def test_the_budget_is_halved_and_never_nothing(comfy):
    from rayltx.comfy_dist.main_process.memory_saving import MemorySaving

    gib = 2**30
    assert MemorySaving.after({0: 20 * gib, 1: 12 * gib}, 20 * gib, 0).weight_budget == 10 * gib
    assert MemorySaving.after({0: 20 * gib}, 20 * gib, 8 * gib).weight_budget == 4 * gib
    assert MemorySaving.after({0: 0, 1: 0}, 20 * gib, 0).weight_budget == 10 * gib, "the workers are others"
    assert MemorySaving.after({0: 0, 1: 0}, 20 * gib, 12 * gib).weight_budget == 6 * gib
    assert MemorySaving.after({0: 10}, 10, 0).weight_budget == 64 * 2**20
