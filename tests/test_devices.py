"""The kinds of devices, without any but the CPU."""

import pytest

from rayltx.devices import CPU, KINDS, DeviceKind, automatic, is_out_of_memory, kind_of
from rayltx.errors import DeviceError

ROCM = DeviceKind("cuda", "nccl", "CUDA_VISIBLE_DEVICES", ("HIP_VISIBLE_DEVICES",))


def test_other_devices_are_refused_by_name():
    with pytest.raises(DeviceError, match='device="mps" must be one of cpu, cuda, xpu'):
        kind_of("mps")


def test_without_a_gpu_ranks_run_on_the_cpu():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert automatic() == CPU and KINDS["cuda"].count() == 0
    assert KINDS[CPU].count() == 1 and KINDS[CPU].total_bytes() > 2**30 and KINDS[CPU].memory_report() == ""


def test_a_worker_on_rocm_does_not_inherit_the_variable_that_wins(monkeypatch):
    """HIP_VISIBLE_DEVICES counts over CUDA_VISIBLE_DEVICES: set by the user, it would give every worker the same cards."""
    monkeypatch.setattr(DeviceKind, "count", lambda self: 3)
    assert ROCM.visible({"HIP_VISIBLE_DEVICES": "4,5,6", "CUDA_VISIBLE_DEVICES": "0"}) == ("4", "5", "6")
    assert ROCM.pinned_to("5") == {"CUDA_VISIBLE_DEVICES": "5", "HIP_VISIBLE_DEVICES": "5"}
    assert KINDS["xpu"].pinned_to("1") == {"ZE_AFFINITY_MASK": "1"}


def test_a_card_that_not_even_a_context_fits_has_no_report(monkeypatch):
    def fail(index):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("torch.cuda.mem_get_info", fail)
    assert KINDS["cuda"].memory_report() == ""


def test_running_out_of_memory_is_told_from_other_errors():
    import torch
    import torch.distributed

    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 896.00 MiB."))
    assert is_out_of_memory(
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
    )
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(
        torch.distributed.DistBackendError("NCCL error ... Last error: Cuda failure 2 'out of memory'")
    )
    assert not is_out_of_memory(RuntimeError("expected m1 and m2 to have the same dtype"))
    assert not is_out_of_memory(MemoryError("of the host"))
