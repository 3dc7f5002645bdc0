"""Under which circumstances a verdict of the self-test counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from comfy_checkout import find_comfyui
from comfy_models import save_tiny_checkpoint

from rayltx.distributed_worker.request import ClusterRequest
from rayltx.distributed_worker.worker import WorkerInfo
from rayltx.sequence_parallel.partition import ParallelConfig

pytestmark = pytest.mark.comfyui
CARD = WorkerInfo(1, "here", "cuda", 24 * 2**30, "RTX 4090, major 8, minor 9, cuda 12.8, NVRM 560.35, nccl (2, 27, 3)")

ULYSSES = ParallelConfig(2, 1)


@pytest.fixture
def key(comfy, tmp_path):
    """key(...) -> the verdict's key of an LTX-2 model, with some circumstances changed."""
    from rayltx.comfy_dist.comfy_environment import ComfyEnvironment
    from rayltx.comfy_dist.main_process.detection import detect
    from rayltx.comfy_dist.main_process.placement import Placement
    from rayltx.comfy_dist.main_process.self_test_record import verdict_key
    from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint

    save_tiny_checkpoint(tmp_path / "model.safetensors", "LTX-2")
    detected = detect(open_checkpoint(tmp_path / "model.safetensors"))

    def get(config=ULYSSES, workers=(CARD, CARD), weight_kinds=("bfloat16",), **arguments):
        spec = dataclasses.replace(detected.spec, weight_kinds=weight_kinds)
        environment = ComfyEnvironment(str(find_comfyui()), {"port": 8188, "use_sage_attention": False, **arguments})
        request = ClusterRequest(workers=3, bootstrap=environment.bootstrap())
        return verdict_key(spec, detected.base_model, Placement(request, config), workers)

    return get


def test_it_counts_for_the_same_circumstances_alone(key, monkeypatch):
    other = dataclasses.replace(CARD, device_description=CARD.device_description.replace("4090", "3090"))
    driver = dataclasses.replace(CARD, device_description=CARD.device_description.replace("560.35", "570.10"))
    elsewhere = dataclasses.replace(CARD, pid=2, hostname="there")
    keys = [
        key(),
        key(ParallelConfig(1, 2)),
        key(workers=(CARD, other)),
        key(workers=(driver, driver)),
        key(use_sage_attention=True),
        key(fp8_e4m3fn_unet=True),
        key(weight_kinds=("bfloat16", "float8_e4m3fn")),
    ]
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    keys.append(key())
    monkeypatch.delenv("NCCL_P2P_DISABLE")
    assert len(set(keys)) == len(keys)
    # What changes nothing that is computed: a process, a port, a worker that has no part.
    assert keys[0] == key(workers=(elsewhere, elsewhere)) == key(port=9000) == key(workers=(CARD, CARD, other))


def test_float32_is_float32_within_the_test_whatever_was_chosen(comfy):
    from rayltx.comfy_dist.self_test import ieee_float32

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with ieee_float32():
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
