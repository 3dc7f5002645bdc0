"""A card that a worker shares with the text encoder and the VAE: what ComfyUI is told of it, and what it gives back."""

from __future__ import annotations

import comfy_scenarios as scenarios
import comfy_worker_model
import pytest
import torch
from comfy_models import CONFIGS

from rayltx.distributed_worker.worker_calls import ask
from rayltx.sequence_parallel.partition import ParallelConfig

pytestmark = pytest.mark.comfyui
VERSION = "LTX-Video"


@pytest.fixture
def twin(models, monkeypatch):
    """On two CPU ranks, the second of which is taken for one on ComfyUI's own device."""
    from rayltx.comfy_dist.main_process.device_memory import DeviceMemory

    monkeypatch.setattr(DeviceMemory, "_rank_on", lambda self, device: 1 if device.type == "cpu" else None)
    return models(VERSION)[1].clone()


def sample(twin):
    with torch.inference_mode():
        return scenarios.tensors_of(scenarios.euler(twin, VERSION, CONFIGS[VERSION]))[0]


def placed(twin):
    from rayltx.comfy_dist.comfy_host import ComfyHost

    return twin.link.remote.call(ask(ComfyHost.placed_bytes), "measuring", range(2))


def test_reported_sizes_are_those_of_the_worker_on_that_device(twin):
    twin.link.memory.unload()
    assert twin.loaded_size() == 0 and twin.model_size() == twin.link.remote.source.weight_bytes
    right = sample(twin)
    before = placed(twin)
    assert twin.loaded_size() == before[1] > 0.9 * twin.model_size()

    part = twin.model_size() // 3
    freed = twin.partially_unload(twin.offload_device, part)
    after = placed(twin)
    assert after[0] == before[0], "another card was freed"
    assert part <= freed == before[1] - after[1] < before[1]
    assert twin.loaded_size() == after[1] and twin.link.memory.loaded
    # Then ComfyUI puts it back, as it does before every run.
    assert torch.equal(sample(twin), right)
    assert placed(twin) == before

    twin.detach()
    assert placed(twin) == {0: 0, 1: 0} and twin.loaded_size() == 0


def test_what_is_loaded_on_another_workers_card_can_push_it_out(twin, monkeypatch):
    """A VAE that a node has put there. The worker on ComfyUI's own card keeps its weights."""
    import comfy.model_management as management

    from rayltx.comfy_dist.main_process import device_memory
    from rayltx.comfy_dist.main_process.device_memory import DeviceMemory

    other = torch.device("cuda", 1)
    monkeypatch.setattr(DeviceMemory, "_rank_on", lambda self, device: {"cpu": 0, "cuda": 1}[device.type])
    monkeypatch.setattr(device_memory, "devices_elsewhere", lambda cluster: [other])
    right = sample(twin)
    before = placed(twin)
    listed = [loaded for loaded in management.current_loaded_models if loaded.device == other]
    assert len(listed) == 1 and listed[0].model_loaded_memory() == before[1] > 0

    monkeypatch.setattr(management, "get_free_memory", lambda *_, **kwargs: (0, 0) if kwargs else 0)
    part = twin.model_size() // 3
    management.free_memory(part, other)
    after = placed(twin)
    assert after[0] == before[0] and part <= before[1] - after[1] < before[1]
    management.free_memory(1e30, other)
    assert placed(twin) == {0: before[0], 1: 0}
    assert not any(loaded.device == other for loaded in management.current_loaded_models)
    monkeypatch.undo()
    assert torch.equal(sample(twin), right) and placed(twin) == before


def test_positive_and_negative_are_batched_or_not_by_one_decision_a_run(twin, monkeypatch):
    """A worker's cache grows with the first step, and what else runs on the card comes and goes."""
    import itertools

    import comfy.model_management as management

    from rayltx.comfy_dist.main_process.device_memory import DeviceMemory
    from rayltx.comfy_dist.main_process.worker_link import WorkerLink

    changing = itertools.cycle([1 << 50, 0])
    monkeypatch.setattr(management, "get_free_memory", lambda *_, **__: next(changing))
    batches = []
    forward = WorkerLink.forward

    def counted(self, model, args, kwargs):
        batches.append(args[0].shape[0])
        return forward(self, model, args, kwargs)

    monkeypatch.setattr(WorkerLink, "forward", counted)
    for free, expected in ((1 << 50, {2}), (0, {1})):
        batches.clear()
        monkeypatch.setattr(DeviceMemory, "free_bytes", lambda self, free=free: free)
        sample(twin)
        assert set(batches) == expected, batches
    assert not twin.link.memory.is_running
    monkeypatch.undo()


def test_what_is_free_is_asked_once_a_run_when_the_weights_are_there(twin, monkeypatch):
    from rayltx.distributed_worker.remote_model import RemoteModel

    asked, call = [], RemoteModel.call

    def noted(self, call_, what, *more):
        asked.append(what)
        return call(self, call_, what, *more)

    monkeypatch.setattr(RemoteModel, "call", noted)
    sample(twin)
    assert asked.count("measuring") == 1 and asked.index("measuring") > asked.index("putting weights on the devices")
    sample(twin)
    assert asked.count("measuring") == 2


def test_the_estimate_has_what_sharing_takes(comfy):
    """LTX-2 at 57,024 tokens in bfloat16, by hand."""
    from types import SimpleNamespace

    from rayltx.comfy_dist.main_process.memory_estimate import Replicated, bytes_of_sharing

    model = SimpleNamespace(
        in_channels=128, inner_dim=4096, num_attention_heads=32, audio_inner_dim=2048, audio_patchify_proj=None
    )
    shape = (1, 128, 72, 22, 36)

    def estimate(ulysses, ring, text=0, audio=0):
        return bytes_of_sharing(model, shape, ParallelConfig(ulysses, ring), 2, Replicated(text, audio))

    tensor = 57_024 * 4096 * 2
    assert estimate(1, 1, 1024, 256) == 0
    assert estimate(2, 1) == 6 * tensor // 2
    assert estimate(1, 2) == (5 + 2 * 2) * tensor // 2
    assert estimate(4, 1) == 6 * tensor // 4
    assert estimate(2, 1, text=1024) - estimate(2, 1) == 1024 * 4 * (4096 + 2048) * 2 // 2
    assert estimate(2, 1, audio=256) - estimate(2, 1) == 256 * 16 * 2048 * 2 // 2
    # Packed streams, as ComfyUI hands them to its estimate.
    packed = bytes_of_sharing(model, (1, 1, 128 * 57_024), ParallelConfig(2, 1), 2, Replicated(0, 0))
    assert packed == estimate(2, 1)


def test_a_model_that_another_has_pushed_out_is_loaded_again(comfy, tmp_path):
    """Two models that take turns within a run, on a worker's card that holds one."""
    import comfy.model_management as management

    from rayltx.sequence_parallel.group import SequenceParallelGroup

    model, inputs = comfy_worker_model.loaded(tmp_path, VERSION)
    group = SequenceParallelGroup.single()
    right = model.forward(group, inputs)
    assert model.placed_bytes() > 0
    for loaded in list(management.current_loaded_models):  # as ComfyUI does for the other
        loaded.model_unload()
        management.current_loaded_models.remove(loaded)
    assert model.placed_bytes() == 0
    assert torch.equal(model.forward(group, inputs), right) and model.placed_bytes() > 0
    model.close()
