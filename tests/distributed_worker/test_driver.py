"""Ray outside of this process: it ends, and this process does not; this process ends, and nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from slow_cases import slow
from waiting import wait_for

from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
from rayltx.diffusion_models.lightricks.exactness import CASES
from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.driver import processes
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.errors import ClusterError, DeviceError
from rayltx.sequence_parallel.partition import ParallelConfig

TESTS = Path(__file__).parents[1]
TWO = ParallelConfig(2, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint, what a host makes of it, and inputs."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_tiny_checkpoint(path, "LTX-Video")
    checkpoint = open_checkpoint(path)
    made = DiffusersModel.of_checkpoint(checkpoint)
    return checkpoint, made, CASES[1].inputs(made)


def process_of(cluster, name):
    found = [process for process in processes.processes_of(cluster.driver.session) if name in process.name()]
    return found[0].pid


def courier_of(cluster):
    return cluster.driver.session


@pytest.mark.parametrize(
    "which",
    [
        lambda cluster: process_of(cluster, "raylet"),
        pytest.param(lambda cluster: process_of(cluster, "gcs_server"), marks=pytest.mark.slow),
        pytest.param(courier_of, marks=pytest.mark.slow),
    ],
    ids=["raylet", "gcs", "courier"],
)
def test_the_end_of_ray_costs_the_step_and_nothing_else(model, caplog, which):
    checkpoint, made, inputs = model
    with Cluster.start(ClusterRequest(workers=2)) as cluster:
        remote = cluster.load(checkpoint, made)
        before = remote.forward(inputs, TWO)
        session, folder = cluster.driver.session, cluster.driver.folder
        killed = []

        def poll():
            if not killed:
                killed.append(which(cluster))
                os.kill(killed[0], signal.SIGKILL)

        after = remote.forward(inputs, TWO, poll=poll)
        if cluster.driver.is_running and cluster.driver.session == session:
            after = remote.forward(inputs, TWO)  # the step was faster than the end of Ray
        assert killed and torch.equal(after["video"], before["video"])
        remote.forward(inputs, TWO)
        assert processes.processes_of(session) == [] or cluster.driver.session == session
        assert not folder.exists() or cluster.driver.folder == folder


@pytest.mark.slow
def test_an_end_between_runs_is_noticed_by_the_next(model, caplog):
    checkpoint, made, inputs = model
    with Cluster.start(ClusterRequest(workers=2)) as cluster:
        remote = cluster.load(checkpoint, made)
        before = remote.forward(inputs, TWO)
        session, folder = cluster.driver.session, cluster.driver.folder
        os.kill(process_of(cluster, "raylet"), signal.SIGKILL)
        wait_for(lambda: not cluster.driver.is_running)
        assert "its process raylet ended" in caplog.text
        assert torch.equal(remote.forward(inputs, TWO)["video"], before["video"])
        assert "started Ray again" in caplog.text
        assert processes.processes_of(session) == [] and not folder.exists()
        assert cluster.driver.session != session


@pytest.mark.slow
@pytest.mark.parametrize("is_sending", [False, True])
def test_a_courier_that_hangs_is_taken_for_ended(model, monkeypatch, caplog, is_sending):
    checkpoint, made, inputs = model
    monkeypatch.setattr("rayltx.distributed_worker.driver.link._SILENT_S", 5.0)
    with Cluster.start(ClusterRequest(workers=2)) as cluster:
        remote = cluster.load(checkpoint, made)
        before = remote.forward(inputs, TWO)
        session = courier_of(cluster)
        os.kill(session, signal.SIGSTOP)
        if is_sending:
            cluster.driver.keep(np.zeros(2**24, np.uint8))  # more than the pipe takes
        # Meanwhile steps go on, which do not go by it, until it is ended, with all that it has started.
        wait_for(
            lambda: (
                torch.equal(remote.forward(inputs, TWO)["video"], before["video"])
                and "its driver's process says nothing for 5 s" in caplog.text
            )
        )
        assert torch.equal(remote.forward(inputs, TWO)["video"], before["video"])
        assert processes.processes_of(session) == []


@pytest.mark.slow
def test_signs_of_life_come_while_nothing_is_asked(model, monkeypatch):
    monkeypatch.setattr("rayltx.distributed_worker.driver.link._SILENT_S", 3.0)
    with Cluster.start(ClusterRequest(workers=1)) as cluster:
        cluster.workers()
        time.sleep(5.0)
        assert cluster.driver.is_running


@pytest.mark.slow
def test_where_no_worker_comes_up_ray_is_started_again(model, caplog):
    """A GCS that hangs lets workers go on, and none start."""
    checkpoint, made, inputs = model
    with Cluster.start(ClusterRequest(workers=2, call_timeout_s=45.0)) as cluster:
        remote = cluster.load(checkpoint, made)
        before = remote.forward(inputs, TWO)
        os.kill(process_of(cluster, "gcs_server"), signal.SIGSTOP)
        os.kill(cluster.workers()[1].pid, signal.SIGKILL)
        assert torch.equal(remote.forward(inputs, TWO)["video"], before["video"])
        assert "started Ray again" in caplog.text


@pytest.mark.slow
def test_what_cannot_be_read_again_is_lost_alone(model, tmp_path, caplog):
    """After Ray's end the weights come from their files: of one model the file is gone."""
    checkpoint, made, inputs = model
    gone = tmp_path / "gone.safetensors"
    gone.write_bytes(Path(checkpoint.path).read_bytes())
    with Cluster.start(ClusterRequest(workers=2)) as cluster:
        first, other = cluster.load(open_checkpoint(gone), made), cluster.load(checkpoint, made)
        before = other.forward(inputs, TWO)
        gone.unlink()
        os.kill(process_of(cluster, "raylet"), signal.SIGKILL)
        wait_for(lambda: not cluster.driver.is_running)
        assert torch.equal(other.forward(inputs, TWO)["video"], before["video"])
        for _ in range(2):
            with pytest.raises(ValueError, match=r"gone.safetensors could not be loaded again: .*load the model again"):
                first.forward(inputs, TWO)
        assert torch.equal(other.forward(inputs, TWO)["video"], before["video"])


@pytest.mark.slow
def test_a_worker_that_dies_while_it_starts_is_replaced(model):
    checkpoint, made, inputs = model
    with Cluster.start(ClusterRequest(workers=2)) as cluster:
        wait_for(lambda: _actors(cluster))
        killed = _actors(cluster)[0].pid
        os.kill(killed, signal.SIGKILL)
        assert killed not in [info.pid for info in cluster.workers()]
        cluster.load(checkpoint, made).forward(inputs, TWO)


def _actors(cluster):
    return [process for process in processes.processes_of(cluster.driver.session) if "RayWorker" in process.name()]


def test_an_ended_cluster_stays_ended():
    with Cluster.start(ClusterRequest(workers=1)) as old:
        old.workers()
        old.shutdown()
        with pytest.raises(ClusterError, match="were ended"):
            old.workers()
        assert not old.is_alive() and not old.driver.is_running


@pytest.mark.slow
def test_what_is_let_go_of_makes_room_in_the_store():
    """Ray would write what does not fit into files, among its own."""
    with Cluster.start(ClusterRequest(workers=1, object_store_bytes=128 * 2**20)) as cluster:
        cluster.workers()
        for number in range(12):
            kept = cluster.driver.keep(np.full(40 * 2**20, number, np.uint8))
            cluster.memory()  # after it, as calls are in order
            del kept
        cluster.memory()
        spilled = [
            path for path in cluster.driver.folder.rglob("*") if "spilled" in path.parent.name and path.is_file()
        ]
        assert spilled == [] and cluster.driver.is_running


def test_everything_listens_on_loopback_alone(model):
    checkpoint, made, inputs = model
    with Cluster.start(ClusterRequest(workers=2)) as cluster:
        cluster.load(checkpoint, made).forward(inputs, TWO)
        own = {process.pid for process in processes.processes_of(cluster.driver.session)}
        listening = [
            each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN and each.pid in own
        ]
        addresses = {each.laddr.ip for each in listening}
        assert len(listening) > 4
        assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, listening
        assert {psutil.Process(pid).nice() for pid in own} == {psutil.Process().nice()}
        commands = [" ".join(psutil.Process(pid).cmdline()) for pid in own]
        unused = [
            each for each in commands if any(f"/{name}.py" in each for name in ("monitor", "log_monitor", "dashboard"))
        ]
        assert any("gcs_server" in each for each in commands) and unused == []
        token = cluster.driver.folder / "token"
        assert len(token.read_text()) >= 32
        assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)


SCRIPT = """
import sys; sys.path.insert(0, {importable!r})
import os, time
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import ClusterRequest
cluster = Cluster.start(ClusterRequest(workers=2))
infos = cluster.workers()
print(cluster.driver.session, cluster.driver.folder, flush=True)
{then}
"""


def _run(then, **environment):
    script = SCRIPT.format(importable=str(TESTS.parent / "importable"), then=then)
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment}, start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGKILL, *slow(signal.SIGTERM, 0)])
def test_nothing_is_left_of_a_process_that_ended(number):
    """0: it ends by itself."""
    process = _run("time.sleep(3600)" if number else "")
    session, folder = process.stdout.readline().split()
    if number:
        process.send_signal(number)
    process.wait(60)
    wait_for(lambda: not processes.processes_of(int(session)) and not Path(folder).exists())


@pytest.mark.slow
def test_what_a_killed_pair_left_is_ended_by_the_next():
    """Of ComfyUI's process and the courier at once nobody is left to do it."""
    process = _run("time.sleep(3600)")
    session, folder = process.stdout.readline().split()
    assert json.loads((Path(folder) / "owner.json").read_text())["pid"] == process.pid
    os.kill(int(session), signal.SIGSTOP)  # so that it cannot see the other's end
    process.kill()
    process.wait(60)
    os.kill(int(session), signal.SIGKILL)
    assert processes.processes_of(int(session))
    processes.remove_leftovers()
    wait_for(lambda: not processes.processes_of(int(session)))
    assert not Path(folder).exists()


def test_leftovers_of_others_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(processes.tempfile, "gettempdir", lambda: str(tmp_path))
    running, ended, nobodys = tmp_path / "rayltx-a", tmp_path / "rayltx-b", tmp_path / "rayltx-c"
    for folder in (running, ended, nobodys):
        folder.mkdir()
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    processes.note_owner(running, bystander.pid)
    record = {
        **json.loads((running / "owner.json").read_text()),
        "pid": 2**22 + 1,
    }  # of a session that is others' since
    (ended / "owner.json").write_text(json.dumps(record))
    container = tmp_path / "rayltx-d"
    container.mkdir()
    (container / "owner.json").write_text(json.dumps({**record, "namespace": "pid:[1]"}))
    earlier = tmp_path / "rayltx-e"
    earlier.mkdir()
    (earlier / "owner.json").write_text(json.dumps({**record, "pid": os.getpid(), "boot": "another"}))
    processes.remove_leftovers()
    assert running.exists() and nobodys.exists() and container.exists() and not ended.exists() and not earlier.exists()
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


@pytest.mark.parametrize("place", ["a" * 60, "\u00e4\u00f6\u00fc"])
def test_a_temporary_folder_that_ray_cannot_have_is_not_used(tmp_path, monkeypatch, place):
    folder = tmp_path / place
    folder.mkdir()
    monkeypatch.setattr(processes.tempfile, "gettempdir", lambda: str(folder))
    made = processes.make_folder()
    assert folder not in made.parents and len(str(made)) <= 38
    made.rmdir()


def test_no_place_is_told_with_what_to_do(monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(processes.tempfile, "mkdtemp", full)
    with pytest.raises(DeviceError, match=r"/tmp: No space left on device.*Set TMPDIR"):
        processes.make_folder()


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"HOME": "/nonexistent"},
        {"TMPDIR": "/tmp/" + "long" * 20},
        {"RAY_ADDRESS": "192.0.2.77:6379"},
        {"RAY_RUNTIME_ENV_HOOK": "ray._private.runtime_env.uv_runtime_env_hook.hook"},
        {"CUDA_VISIBLE_DEVICES": ""},
        {"http_proxy": "http://192.0.2.1:1", "https_proxy": "http://192.0.2.1:1"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_ray_starts_under(environment):
    if "TMPDIR" in environment:
        Path(environment["TMPDIR"]).mkdir(exist_ok=True)
    process = _run("", **environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out, err
