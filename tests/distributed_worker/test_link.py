"""Ranks that cannot reach each other as they should: found when the group forms, and mended for good."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest

from rayltx import devices
from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
from rayltx.diffusion_models.lightricks.exactness import CASES, untouched_forward, worst_error
from rayltx.diffusion_models.lightricks.relative_error import TOLERANCE
from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.machine_record import MachineRecord
from rayltx.distributed_worker.request import Bootstrap, ClusterRequest
from rayltx.errors import ClusterError, DeviceError
from rayltx.sequence_parallel.partition import ParallelConfig

TWO = ParallelConfig(2, 1)


@pytest.fixture
def request_for(monkeypatch, tmp_path):
    """request_for(damage) -> a request whose workers' link is damaged, until peer-to-peer is off."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # for the workers to find cluster_hosts
    monkeypatch.setattr("rayltx.distributed_worker.rank_group._JOIN_TIMEOUT_S", 20.0)

    def get(damage, **more):
        bootstrap = Bootstrap("cluster_hosts:corrupting_unless_told", damage)
        return ClusterRequest(
            workers=2, bootstrap=bootstrap, machine_record=str(tmp_path / "m" / "machine.json"), **more
        )

    return get


@pytest.fixture
def with_peer_to_peer(monkeypatch):
    """The CPU as a device whose peer-to-peer copies can be turned off."""
    kind = dataclasses.replace(devices.KINDS["cpu"], peer_to_peer_off=(("RAYLTX_TESTS_PEER_TO_PEER_OFF", "1"),))
    monkeypatch.setitem(devices.KINDS, "cpu", kind)
    monkeypatch.setattr(ClusterRequest, "gpu_names", lambda request: ("CPU", "CPU"))


@pytest.mark.parametrize("damage", ["corrupt bulk", "corrupt", "hang"])
@pytest.mark.slow
def test_a_link_that_corrupts_or_hangs_is_used_without_peer_to_peer(
    request_for, with_peer_to_peer, tmp_path, caplog, damage
):
    untouched = save_tiny_checkpoint(tmp_path / "model.safetensors", "LTX-Video")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    model = DiffusersModel.of_checkpoint(checkpoint)
    inputs = CASES[0].inputs(model)
    reference = untouched_forward(untouched, model, inputs)
    with caplog.at_level(logging.INFO, "rayltx"), Cluster.start(request_for(damage)) as cluster:
        remote = cluster.load(checkpoint, model)
        first = [info.pid for info in cluster.workers()]
        assert worst_error(remote.forward(inputs, TWO), reference) <= TOLERANCE
        assert not {info.pid for info in cluster.workers()} & set(first), "workers that started anew"
        assert "received other numbers" in caplog.text or "no answer" in caplog.text
        assert "without peer-to-peer copies" in caplog.text and "ACS or the IOMMU" in caplog.text
        assert "2 ranks reach each other: gloo" in caplog.text
        assert cluster.group.link_report.exchange.bytes_per_s > 0
    caplog.clear()
    with caplog.at_level(logging.INFO, "rayltx"), Cluster.start(request_for(damage)) as cluster:
        cluster.group.form(TWO)
        assert "without peer-to-peer" not in caplog.text, "it is remembered"
        assert "2 ranks reach each other" in caplog.text


@pytest.mark.slow
def test_without_another_way_the_error_says_what_arrived(request_for, tmp_path):
    with Cluster.start(request_for("corrupt")) as cluster:
        with pytest.raises(ClusterError, match=r"rank [01] received other numbers than were sent"):
            cluster.group.form(TWO)
        cluster.group.form(ParallelConfig())
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_too_little_shared_memory_is_told_from_a_bad_link(request_for, with_peer_to_peer, caplog):
    with (
        Cluster.start(request_for("shared memory")) as cluster,
        pytest.raises(DeviceError, match=r"gloo finds no room in /dev/shm.*nccl-GxQe.*--shm-size"),
    ):
        cluster.group.form(TWO)
    assert "without peer-to-peer" not in caplog.text


def test_findings_are_kept_by_the_gpus_that_they_are_about(tmp_path):
    path = tmp_path / "folder" / "machine.json"
    cards, others = ("RTX 4090", "RTX 4090"), ("RTX 3090", "RTX 3090")
    assert not MachineRecord(str(path), cards).needs_no_peer_to_peer()
    MachineRecord(str(path), cards).remember_no_peer_to_peer()
    MachineRecord(str(path), cards).remember_no_peer_to_peer()
    assert MachineRecord(str(path), cards).needs_no_peer_to_peer()
    assert not MachineRecord(str(path), others).needs_no_peer_to_peer()
    assert json.loads(path.read_text()) == {"without peer-to-peer": ["RTX 4090, RTX 4090"]}
    for damaged in ("[]", "{", '{"without peer-to-peer": 3}'):
        path.write_text(damaged)
        assert not MachineRecord(str(path), cards).needs_no_peer_to_peer()
    path.unlink()
    MachineRecord(str(path), ()).remember_no_peer_to_peer()
    assert not path.exists(), "other machines' cards have no names here"
    MachineRecord("", cards).remember_no_peer_to_peer()
    assert not MachineRecord("", cards).needs_no_peer_to_peer()


@pytest.mark.slow
def test_unlike_devices_get_shares_by_their_speed(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    untouched = save_tiny_checkpoint(tmp_path / "model.safetensors", "LTX-Video")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    model = DiffusersModel.of_checkpoint(checkpoint)
    inputs = CASES[1].inputs(model)
    bootstrap = Bootstrap("cluster_hosts:each_another_card", (str(tmp_path), [4e12, 1e12]))
    with Cluster.start(ClusterRequest(workers=2, bootstrap=bootstrap)) as cluster:
        with caplog.at_level(logging.INFO, "rayltx"):
            config = cluster.group.with_shares(ParallelConfig(2))
        assert sorted(config.shares) == [0.25, 1.0] and "unlike devices" in caplog.text
        remote = cluster.load(checkpoint, model)
        assert worst_error(remote.forward(inputs, config), untouched_forward(untouched, model, inputs)) < 2e-6
        caplog.clear()
        assert cluster.group.with_shares(ParallelConfig(2)) == config and not caplog.text, "measured once"
        by_hand = ParallelConfig(2, shares=(1.0, 3.0))
        assert cluster.group.with_shares(by_hand) == by_hand
