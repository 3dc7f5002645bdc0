"""What is said of a machine: of this one, and of one with GPUs that are not here."""

import psutil
import pytest
import torch

from rayltx.devices import DeviceKind
from rayltx.distributed_worker import machine_facts as facts_module
from rayltx.distributed_worker.machine_facts import log_line, machine_facts, memory_problem
from rayltx.distributed_worker.request import ClusterRequest

GIB = 2**30


def by_name(facts):
    return {fact.name: fact for fact in facts}


def test_of_this_machine(monkeypatch):
    monkeypatch.setattr(facts_module, "object_store_bytes", lambda *_: 8 * GIB)
    facts = by_name(machine_facts(ClusterRequest(workers=2)))
    assert facts["torch"].value == torch.__version__ and facts["devices"].value == "2 x cpu"
    assert f"{psutil.virtual_memory().total / GIB:.1f} GiB" in facts["memory"].value
    assert not any(fact.problem for fact in facts.values())
    assert "2 x cpu" in log_line(ClusterRequest(workers=2))


def test_a_checkpoint_that_memory_does_not_hold(monkeypatch):
    monkeypatch.setattr(facts_module, "object_store_bytes", lambda *_: 8 * GIB)
    total = psutil.virtual_memory().total
    facts = by_name(machine_facts(ClusterRequest(workers=2), weight_bytes=total))
    assert "read from the disk again at every step" in facts["memory"].problem
    assert "the workers map the file itself" in facts["/dev/shm"].problem
    assert not memory_problem(total // 2) and memory_problem(total)


@pytest.fixture
def cards(monkeypatch):
    """Two cards without peer access, one of which another program uses."""
    monkeypatch.setattr(DeviceKind, "count", lambda kind: 2)
    monkeypatch.setattr(DeviceKind, "names", lambda kind: ("RTX 4090", "RTX 4090"))
    monkeypatch.setattr(DeviceKind, "description", lambda kind: "RTX 4090, nccl (2, 27, 3)")
    monkeypatch.setattr(DeviceKind, "total_bytes", lambda kind, index=0: 24 * GIB)
    monkeypatch.setattr(DeviceKind, "free_bytes", lambda kind, index=0: (20, 4)[index] * GIB)
    monkeypatch.setattr(DeviceKind, "reaches", lambda kind, one, other: False)
    monkeypatch.setattr("torch.distributed.is_backend_available", lambda backend: True)


def test_of_two_cards(cards):
    facts = by_name(machine_facts(ClusterRequest(workers=2, device="cuda")))
    assert facts["cuda:0"].value == "RTX 4090, 24.0 GiB" and not facts["cuda:0"].problem
    assert facts["cuda:1"].problem == "20.0 GiB are in use by other programs"
    assert "none between 0-1" in facts["peer access"].value
    assert not facts["devices"].problem


def test_the_log_does_not_open_the_cards(cards, monkeypatch):
    """Asking for what is free makes a context on each, half a gigabyte in ComfyUI's process."""
    monkeypatch.setattr(DeviceKind, "free_bytes", lambda *_: pytest.fail("opened"))
    assert "cuda:1: RTX 4090, 24.0 GiB" in log_line(ClusterRequest(workers=2, device="cuda"))


def test_what_would_not_start_is_a_fact(cards, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_backend_available", lambda backend: False)
    assert (
        "this torch has no nccl" in by_name(machine_facts(ClusterRequest(workers=2, device="cuda")))["devices"].problem
    )
