"""What cannot be done is said by name, before or while sampling, and the workers stay usable."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import comfy_scenarios as scenarios
import pytest
import torch
from comfy_checkout import find_comfyui
from comfy_models import CONFIGS, save_tiny_checkpoint
from safetensors.torch import load_file, save_file

from rayltx.errors import CheckpointError, InputError, UnsupportedError
from rayltx.sequence_parallel.partition import ParallelConfig


@pytest.fixture(autouse=True)
def still_usable(models):
    """After each refusal the same workers sample the same model."""
    _, twin, _ = models("LTX-Video")
    twin = twin.with_config(ParallelConfig(2, 1))
    pids = [info.pid for info in twin.link.cluster.workers()]
    yield
    with torch.inference_mode():
        scenarios.euler(twin, "LTX-Video", CONFIGS["LTX-Video"])
    assert [info.pid for info in twin.link.cluster.workers()] == pids


@pytest.fixture
def load(cluster):
    from rayltx.comfy_dist.main_process.placement import Placement
    from rayltx.comfy_dist.main_process.twin import load_twin

    return lambda path: load_twin(str(path), Placement(cluster.request, ParallelConfig(2, 1)))


def test_a_file_without_its_metadata(load, tmp_path):
    path = tmp_path / "model.safetensors"
    save_tiny_checkpoint(path, "LTX-2")
    save_file(load_file(path), path)
    with pytest.raises(CheckpointError, match=r"disagree: .* should be .*`config` metadata kept"):
        load(path)


def test_a_file_that_lacks_a_parameter(load, tmp_path):
    path = tmp_path / "model.safetensors"
    save_tiny_checkpoint(path, "LTX-Video")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["model.diffusion_model.transformer_blocks.1.attn1.to_q.bias"]
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=r"transformer_blocks.1.attn1.to_q.bias is missing"):
        load(path)


def test_another_model(load, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="not an LTX transformer"):
        load(path)


def test_a_comfyui_that_is_too_old(load, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_tiny_checkpoint(path, "LTX-Video")
    monkeypatch.setattr("comfyui_version.__version__", "0.9.1")
    with pytest.raises(UnsupportedError, match=r"ComfyUI 0.9.1 is too old.*update ComfyUI"):
        load(path)


def sample_with(models, version, change):
    _, twin, _ = models(version)
    work = scenarios.Workspace(version, CONFIGS[version])
    change(work)
    with torch.inference_mode():
        scenarios.ksampler(twin, work)


@pytest.mark.parametrize("version", ["LTX-Video", "LTX-2", "LTX-2.3"])
def test_text_of_another_version(models, version):
    def widen(work):
        for side in (work.positive, work.negative):
            side[0][0] = torch.zeros(1, 9, 1000)

    with pytest.raises(InputError, match=r"the conditioning is 1000 wide.*text encoder of this LTX version"):
        sample_with(models, version, widen)


def test_a_latent_with_other_channels(models):
    def sixteen_channels(work):
        work.video = {"samples": torch.zeros(1, 16, 3, 5, 7) + 0.1}

    with pytest.raises((InputError, RuntimeError), match=r"128|channels"):
        sample_with(models, "LTX-Video", sixteen_channels)


def test_an_audio_latent_on_a_video_model(models):
    def add_audio(work):
        work.has_audio = True

    with pytest.raises(InputError, match="holds video and audio, and this LTX-Video model has no audio"):
        sample_with(models, "LTX-Video", add_audio)


def test_a_patch_that_cannot_cross_is_named(models):
    _, twin, _ = models("LTX-Video")
    lock = threading.Lock()
    patched = twin.clone()
    patched.add_object_patch("diffusion_model.transformer_blocks.0.ff.forward", lambda x: (lock, x)[1])
    with (
        torch.inference_mode(),
        pytest.raises(UnsupportedError, match=r"object patch 'diffusion_model.transformer_blocks.0.ff.forward'.*lock"),
    ):
        scenarios.euler(patched, "LTX-Video", CONFIGS["LTX-Video"])

    patched = twin.clone()
    patched.set_model_patch_replace(
        lambda args, extra: (lock, extra["original_block"](args))[1], "dit", "double_block", 0
    )
    with torch.inference_mode(), pytest.raises(UnsupportedError, match=r"transformer option 'patches_replace'.*lock"):
        scenarios.euler(patched, "LTX-Video", CONFIGS["LTX-Video"])


def test_a_model_without_weights_cannot_be_merged_or_saved(models):
    whole, twin, _ = models("LTX-Video")
    for attempt in (twin.get_key_patches, twin.state_dict_for_saving):
        with pytest.raises(UnsupportedError, match=r"holds no weights.*ComfyUI's own loader"):
            attempt()


@pytest.mark.slow
def test_a_changed_comfyui_is_refused_at_load_and_nothing_is_sampled(tmp_path):
    """The whole way: a worker's ComfyUI was changed; loading says so, and the same cluster can be used."""
    path = tmp_path / "model.safetensors"
    save_tiny_checkpoint(path, "LTX-2")
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
from comfy_models import set_up_comfyui
set_up_comfyui({str(find_comfyui())!r})
import folder_paths
from rayltx.comfy_dist.comfy_environment import ComfyEnvironment
from rayltx.comfy_dist.comfy_host import COMFY_HOST
from rayltx.comfy_dist.main_process.placement import Placement
from rayltx.comfy_dist.main_process.twin import load_twin
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import Bootstrap, ClusterRequest
from rayltx.errors import SelfTestError
from rayltx.sequence_parallel.partition import ParallelConfig
folder_paths.set_user_directory({str(tmp_path)!r})  # without the verdicts of earlier loads
environment = ComfyEnvironment.headless({str(find_comfyui())!r}, cpu=True)
request = ClusterRequest(workers=2, host=COMFY_HOST, bootstrap=Bootstrap("comfy_ranks:enter_changed", environment))
with Cluster.start(request) as cluster:
    try:
        load_twin({str(path)!r}, Placement(cluster.request, ParallelConfig(2, 1)))
    except SelfTestError as error:
        assert "text to video" in str(error) and environment.root and "LTX-2" in str(error), error
    else:
        raise SystemExit("not caught")
    load_twin({str(path)!r}, Placement(cluster.request, ParallelConfig(1, 1)))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_dashboard_without_its_packages_is_told_before_anything_starts(comfy, monkeypatch):
    from rayltx.comfy_dist.main_process.initializer_settings import InitializerSettings

    settings = InitializerSettings(GPU=1, device="cpu", ray_dashboard_address="127.0.0.1:8265")
    monkeypatch.setitem(sys.modules, "ray.dashboard.optional_deps", None)
    with pytest.raises(InputError, match=r'ray_dashboard_address="127.0.0.1:8265" needs packages .*ray\[default\]'):
        settings.placement()
