"""A Ray that was started elsewhere, with two nodes: joined, with its token and without, and sent what it does not have."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
from rayltx.diffusion_models.lightricks.exactness import CASES, untouched_forward, worst_error
from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.driver.processes import end_session
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.errors import ClusterError
from rayltx.sequence_parallel.partition import ParallelConfig

# In a folder without this package on its search path, and a session of its own.
NODES = """
import sys
from ray.cluster_utils import Cluster
size = {"num_cpus": 2, "object_store_memory": 100 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**size, "temp_dir": sys.argv[1]})
cluster.add_node(**size)
print("address", cluster.address, flush=True)
sys.stdin.readline()
"""


@contextmanager
def ray_of_others(environment):
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        process = subprocess.Popen(
            [sys.executable, "-c", NODES, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**inherited, **environment}, start_new_session=True, cwd=folder,
        )  # fmt: skip
        try:
            line = next((line for line in process.stdout if line.startswith("address ")), None)
            assert line is not None, "Ray did not start"
            yield line.split()[1]
        finally:
            # In one way: an end of its input and a signal at once can leave it waiting for itself.
            process.kill()
            process.wait()
            end_session(process.pid)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    untouched = save_tiny_checkpoint(path, "LTX-2")
    checkpoint = open_checkpoint(path)
    made = DiffusersModel.of_checkpoint(checkpoint)
    inputs = CASES[1].inputs(made)
    # Large enough to travel outside of the call.
    inputs["context"] = torch.randn(1, 300, inputs["context"].shape[2], generator=torch.Generator().manual_seed(0))
    inputs["audio_context"] = torch.randn(1, 300, inputs["audio_context"].shape[2])
    inputs.pop("context_mask"), inputs.pop("audio_context_mask")
    return checkpoint, made, inputs, untouched_forward(untouched, made, inputs)


@pytest.mark.parametrize("with_token", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_workers_of_two_nodes_share_a_model(model, tmp_path, monkeypatch, with_token):
    checkpoint, made, inputs, reference = model
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    environment = (
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)} if with_token else {"RAY_AUTH_MODE": "disabled"}
    )
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with ray_of_others(environment) as address:
        with Cluster.start(ClusterRequest(workers=2, address=address)) as cluster:
            remote = cluster.load(checkpoint, made)
            assert cluster.held_bytes() == checkpoint.num_bytes, "in the store of each node"
            for _ in range(2):
                assert worst_error(remote.forward(inputs, ParallelConfig(2, 1)), reference) < 2e-6
            first = cluster.workers()
            os.kill(first[1].pid, signal.SIGKILL)
            assert worst_error(remote.forward(inputs, ParallelConfig(2, 1)), reference) < 2e-6
        with Cluster.start(ClusterRequest(workers=2, address=address)) as again:
            assert len(again.workers()) == 2, "the other's Ray goes on"
        assert Path(checkpoint.path).exists()


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr("rayltx.distributed_worker.driver.link._JOIN_LIMIT_S", 5.0)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with (
        Cluster.start(ClusterRequest(workers=1, address="127.0.0.1:1")) as cluster,
        pytest.raises(ClusterError, match=r"Ray ended: the Ray cluster at 127.0.0.1:1 was not there within 5 s"),
    ):
        cluster.workers()
