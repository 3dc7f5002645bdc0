"""GPU pinning, allocator settings and the size of the object store: all without a GPU."""

import pytest

from rayltx.devices import DeviceKind, visible_devices
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.gpu_pinning import assign_gpus, parse_gpu_indices, without_async_allocator
from rayltx.distributed_worker.machine_checks import check_machine, differing_cards
from rayltx.distributed_worker.object_store import MIN_BYTES, fits_object_store, object_store_bytes
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.errors import DeviceError

GIB = 2**30


def test_indices_are_parsed():
    assert parse_gpu_indices("") == parse_gpu_indices("  ") == ()
    assert parse_gpu_indices("0,2") == parse_gpu_indices(" 0 , 2, ") == (0, 2)


@pytest.mark.parametrize("text", ["0,,2", "a", "0;1", "-1", "1,1", "0 1"])
def test_other_lists_are_refused_with_the_value(text):
    with pytest.raises(DeviceError) as error:
        parse_gpu_indices(text)
    assert f'"{text}"' in str(error.value)


def test_indices_count_within_what_is_visible():
    assert assign_gpus(2, (0, 2), visible_devices("4,5,6", 3)) == ("4", "6")
    assert assign_gpus(2, (2, 0), visible_devices(None, 4)) == ("2", "0")
    assert assign_gpus(2, (), visible_devices("GPU-aa,GPU-bb", 2)) == ("GPU-aa", "GPU-bb")


def test_a_visible_list_longer_than_the_machine_is_cut_as_cuda_cuts_it():
    assert visible_devices("0,1,9", 2) == ("0", "1")


@pytest.mark.parametrize(
    "workers, indices, message",
    [
        (2, (0, 7), "GPU index 7 does not exist: 3 GPU"),
        (4, (), "workers=4.*3 are visible"),
        (2, (1,), "gpu_indices names 1"),
    ],
)
def test_missing_gpus_are_refused_with_the_numbers(workers, indices, message):
    with pytest.raises(DeviceError, match=message):
        assign_gpus(workers, indices, ("0", "1", "2"))


def test_a_request_for_missing_gpus_starts_nothing():
    before = Cluster.current()
    with pytest.raises(DeviceError, match="0 are visible here"):
        Cluster.start(ClusterRequest(workers=2, device="cuda"))
    assert Cluster.current() is before


@pytest.fixture
def cards(monkeypatch):
    """cards(names, variable) pretends that these GPUs are here, with a torch that has NCCL."""

    def pretend(*names, visible=None):
        monkeypatch.setattr(DeviceKind, "count", lambda kind: len(names))
        monkeypatch.setattr(DeviceKind, "names", lambda kind: names)
        monkeypatch.setattr("torch.distributed.is_backend_available", lambda backend: True)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return pretend


def test_one_card_for_two_workers_is_refused(cards):
    cards("RTX 4090", "RTX 4090", visible="0,0")
    with pytest.raises(DeviceError, match="CUDA_VISIBLE_DEVICES names GPU 0 twice: each worker needs its own"):
        check_machine(ClusterRequest(workers=2, device="cuda"))


@pytest.mark.parametrize("names, visible", [(("A100", "A100"), "MIG-1,MIG-2"), (("A100 MIG 1g.5gb",) * 2, None)])
def test_slices_of_a_card_are_refused(cards, names, visible):
    cards(*names, visible=visible)
    with pytest.raises(DeviceError, match=r"slices of a card \(MIG\) cannot talk.*turn MIG off"):
        check_machine(ClusterRequest(workers=2, device="cuda"))
    check_machine(ClusterRequest(workers=1, device="cuda"))


def test_cards_that_differ_are_named(cards):
    cards("RTX 4090", "RTX 3090", "RTX 4090")
    assert not differing_cards(ClusterRequest(workers=2, device="cuda", gpu_indices=(0, 2)))
    assert "the GPUs differ (RTX 4090, RTX 3090)" in differing_cards(ClusterRequest(workers=2, device="cuda"))
    assert not differing_cards(ClusterRequest(workers=2))


def test_a_torch_without_nccl_is_refused(cards, monkeypatch):
    cards("RTX 4090", "RTX 4090")
    monkeypatch.setattr("torch.distributed.is_backend_available", lambda backend: False)
    with pytest.raises(DeviceError, match="2 workers: this torch has no nccl"):
        check_machine(ClusterRequest(workers=2, device="cuda"))
    check_machine(ClusterRequest(workers=1, device="cuda"))


def test_native_windows_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(DeviceError, match="on Windows within WSL2"):
        Cluster.start(ClusterRequest(workers=1))


def test_comfyuis_allocator_does_not_reach_the_workers_but_other_settings_do():
    assert without_async_allocator("backend:cudaMallocAsync") == ""
    assert without_async_allocator("backend:cudaMallocAsync,expandable_segments:True") == "expandable_segments:True"
    assert without_async_allocator("max_split_size_mb:128") == "max_split_size_mb:128"


def test_automatic_store_size_keeps_within_shared_memory_and_memory():
    assert object_store_bytes(0, shared_memory_free=10 * GIB, memory=100 * GIB) == 9 * GIB
    assert object_store_bytes(0, shared_memory_free=100 * GIB, memory=100 * GIB) == 60 * GIB
    assert object_store_bytes(0, shared_memory_free=64 * 2**20, memory=100 * GIB) == MIN_BYTES


def test_gpus_that_talk_through_shared_memory_find_room_in_it():
    request = ClusterRequest(workers=2, device="cuda")
    assert request.kept_shared_memory == GIB and ClusterRequest(workers=2).kept_shared_memory == 0
    assert object_store_bytes(0, GIB, shared_memory_free=11 * GIB, memory=100 * GIB) == 9 * GIB
    with pytest.raises(DeviceError, match=r"8.00 GiB does not fit.*7.50 GiB free for it"):
        object_store_bytes(8 * GIB, GIB, shared_memory_free=int(8.5 * GIB), memory=100 * GIB)


def test_a_store_that_shared_memory_cannot_hold_is_refused():
    with pytest.raises(DeviceError, match=r"8.00 GiB does not fit.*4.00 GiB free.*--shm-size"):
        object_store_bytes(8 * GIB, shared_memory_free=4 * GIB, memory=100 * GIB)
    with pytest.raises(DeviceError, match="too small"):
        object_store_bytes(1000, shared_memory_free=4 * GIB, memory=100 * GIB)


def test_room_for_the_steps_is_kept():
    assert fits_object_store(5 * GIB, 6 * GIB, 0)
    assert not fits_object_store(6 * GIB, 6 * GIB, 0)
    assert not fits_object_store(3 * GIB, 6 * GIB, 3 * GIB)
