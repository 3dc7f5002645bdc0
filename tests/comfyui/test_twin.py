"""A MODEL on several workers against the same ComfyUI in one process: final latents of whole sampling runs."""

import copy
import importlib
import inspect
import json
import os
from pathlib import Path

import comfy_scenarios as scenarios
import pytest
import torch
from comfy_checkout import find_comfyui
from comfy_models import CONFIGS, VERSIONS, save_tiny_checkpoint
from comfy_scenarios import SAMPLING_TOLERANCE
from slow_cases import slow

from rayltx.diffusion_models.lightricks.relative_error import relative_error
from rayltx.sequence_parallel.partition import ParallelConfig

DEGREES = [
    (1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2), (1, 1, 2), (2, 1, 2), (1, 2, 2), (2, 1, 1, 1, (3.0, 1.0)),
]  # fmt: skip


@pytest.fixture
def compare(models, degrees=(2, 1)):
    """compare(scenario, version, degrees) -> relative error of the latents."""

    def run(scenario, version, degrees=(2, 1), change=lambda model: model):
        whole, twin, _ = models(version)
        twin = twin.with_config(ParallelConfig(*degrees))
        with torch.inference_mode():
            reference = scenarios.tensors_of(scenario(change(whole), version, CONFIGS[version]))
            out = scenarios.tensors_of(scenario(change(twin), version, CONFIGS[version]))
        assert len(out) == len(reference)
        assert all(torch.isfinite(tensor).all() for tensor in reference)
        return max(map(relative_error, out, reference))

    return run


def _skip_unless_known(scenario):
    """ComfyUI 0.20 lacks some of the nodes."""
    needed = {
        scenarios.spatio_temporal_guidance: ("comfy_extras.nodes_lt", "LTXVSpatioTemporalGuidance"),
        scenarios.modality_guidance: ("comfy_extras.nodes_lt", "LTXVModalityGuidance"),
        scenarios.reference_audio: ("comfy_extras.nodes_lt", "LTXVReferenceAudio"),
        scenarios.context_windows: ("comfy_extras.nodes_context_windows", "LTXVContextWindowsNode"),
    }
    if scenario is scenarios.guide_with_pixel_mask:
        add_guide = importlib.import_module("comfy_extras.nodes_lt").LTXVAddGuide
        if "attention_mask" not in inspect.signature(add_guide.execute).parameters:
            pytest.skip("this ComfyUI's LTXVAddGuide takes no mask")
    module, name = needed.get(scenario, ("nodes", "KSampler"))
    if not hasattr(importlib.import_module(module), name):
        pytest.skip(f"this ComfyUI has no {name}")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("scenario", scenarios.EVERYWHERE + scenarios.AUDIO_VIDEO, ids=lambda s: s.__name__)
def test_every_scenario_equals_one_process(compare, scenario, version):
    if version == "LTX-Video" and scenario in scenarios.AUDIO_VIDEO:
        pytest.skip("LTX-Video has no audio")
    _skip_unless_known(scenario)
    error = compare(scenario, version)
    assert error <= SAMPLING_TOLERANCE


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("degrees", DEGREES)
def test_every_degree_equals_one_process(compare, version, degrees):
    for scenario in (
        scenarios.euler,
        scenarios.image_to_video,
        scenarios.guide_with_strength,
        scenarios.odd_token_count,
    ):
        error = compare(scenario, version, degrees)
        assert error <= SAMPLING_TOLERANCE, scenario.__name__


@pytest.mark.parametrize("version", VERSIONS)
def test_patches_equal_one_process_and_leave_the_shared_bytes(models, compare, version):
    _, twin, _ = models(version)
    before = twin.link.remote.digest()
    assert len(set(before.values())) == 1
    plain = compare(scenarios.euler, version)
    for scenario in scenarios.PATCHES:
        for degrees in [(2, 1), (1, 2)]:
            error = compare(scenario, version, degrees)
            assert error <= SAMPLING_TOLERANCE, scenario.__name__
    assert compare(scenarios.euler, version) == plain, "a patch stayed"
    assert twin.link.remote.digest() == before


def test_patches_matter(models):
    """The control: what the patches' tests compare is not what the plain model gives."""
    whole, _, _ = models("LTX-2")
    with torch.inference_mode():
        plain = scenarios.tensors_of(scenarios.euler(whole, "LTX-2", CONFIGS["LTX-2"]))[0]
        for scenario in scenarios.PATCHES[:-1]:
            patched = scenarios.tensors_of(scenario(whole, "LTX-2", CONFIGS["LTX-2"]))[0]
            assert (patched - plain).norm() > 1e-3 * plain.norm(), scenario.__name__


def test_unchanged_patches_are_sent_once(models, monkeypatch):
    _, twin, _ = models("LTX-2")
    patched = scenarios.with_lora(twin, CONFIGS["LTX-2"])
    remote = twin.link.remote
    sent = []
    set_up = remote.set_up
    monkeypatch.setattr(remote, "set_up", lambda key, *args, **kwargs: (sent.append(key), set_up(key, *args, **kwargs)))
    with torch.inference_mode():
        for _ in range(3):
            scenarios.ksampler(patched, scenarios.Workspace("LTX-2", CONFIGS["LTX-2"]))
    assert sent.count("patches") == 1


def test_stateful_patches_keep_their_state_between_steps(models):
    """A patch that counts its calls: the workers' copy lives as long as the patch does."""
    _, twin, _ = models("LTX-Video")
    model = twin.clone()
    model.set_model_patch_replace(GrowingBlock(), "dit", "double_block", 1)
    whole = models("LTX-Video")[0].clone()
    whole.set_model_patch_replace(GrowingBlock(), "dit", "double_block", 1)
    with torch.inference_mode():
        out, reference = (
            scenarios.tensors_of(scenarios.euler(m, "LTX-Video", CONFIGS["LTX-Video"]))[0] for m in (model, whole)
        )
    assert relative_error(out, reference) <= SAMPLING_TOLERANCE


class GrowingBlock:
    def __init__(self):
        self.calls = 0

    def __call__(self, args, extra):
        self.calls += 1
        out = extra["original_block"](args)
        return {"img": out["img"] * (1.0 + 0.01 * self.calls)}


def _patch_at_use(monkeypatch):
    """Have ComfyUI itself compute LoRAs where the weight is used, as it does on a card that is too small.

    Elsewhere it rounds the patched weight to fp8 again, by chance even; the workers never do.
    """
    from comfy.model_patcher import ModelPatcher

    load = ModelPatcher.load
    monkeypatch.setattr(ModelPatcher, "load", lambda self, device, *args, **kwargs: load(self, device, 1))


@pytest.mark.parametrize("kind", ["bfloat16", "fp8 raw", "fp8 scaled", "as fp8_e4m3fn", "as bf16"])
@pytest.mark.parametrize("version", ["LTX-2.3", *slow("LTX-Video")])
def test_every_dtype_equals_one_process_with_the_same_file(cluster, tmp_path, monkeypatch, version, kind):
    import comfy.sd
    from comfy_models import quantise

    from rayltx.comfy_dist.main_process.placement import Placement
    from rayltx.comfy_dist.main_process.twin import LoadOptions, load_twin

    path = tmp_path / "model.safetensors"
    save_tiny_checkpoint(path, version, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    if kind.startswith("fp8"):
        quantise(path, scaled=kind == "fp8 scaled")
    weight_dtype = kind.removeprefix("as ") if kind.startswith("as ") else "default"
    options = {"as fp8_e4m3fn": {"dtype": torch.float8_e4m3fn}, "as bf16": {"dtype": torch.bfloat16}}.get(kind, {})
    with torch.inference_mode():
        whole = comfy.sd.load_diffusion_model(str(path), model_options=options)
        twin = load_twin(str(path), Placement(cluster.request, ParallelConfig(2, 1)), LoadOptions(weight_dtype))
        before = twin.link.remote.digest()
        for scenario in (scenarios.euler, scenarios.lora):
            if scenario is scenarios.lora and kind in ("fp8 scaled", "as fp8_e4m3fn"):
                _patch_at_use(monkeypatch)
            reference, out = (scenarios.tensors_of(scenario(m, version, CONFIGS[version])) for m in (whole, twin))
            error = max(map(relative_error, out, reference))
            # In bfloat16 a step's rounding is 4e-3, and 2 ranks round as often as one.
            low = twin.model.get_dtype_inference() != torch.float32
            assert error <= (2e-2 if low else SAMPLING_TOLERANCE), scenario.__name__
        assert twin.link.remote.digest() == before
    assert twin.model.get_dtype() == whole.model.get_dtype()
    assert twin.model.manual_cast_dtype == whole.model.manual_cast_dtype
    twin.link.remote.release()


def test_raw_text_goes_through_the_models_connector(models):
    """LTX-2's text arrives unprocessed, and the connector's weights are with the workers."""
    whole, twin, _ = models("LTX-2")
    context = torch.randn(1, 9, CONFIGS["LTX-2"]["caption_channels"])
    with torch.inference_mode():
        assert torch.equal(
            whole.model.diffusion_model.preprocess_text_embeds(context),
            twin.model.diffusion_model.preprocess_text_embeds(context),
        )


def test_the_verdict_is_remembered_with_the_version(models):
    import folder_paths

    models("LTX-2")
    verdicts = json.loads((Path(folder_paths.get_user_directory()) / "rayltx" / "self_test.json").read_text())
    version = importlib.import_module("comfyui_version").__version__
    assert any(key.startswith(version) and verdict["largest_error"] < 2e-6 for key, verdict in verdicts.items())


def test_the_workers_weights_are_freed_with_the_model(cluster, tmp_path):
    import gc
    import time

    from rayltx.comfy_dist.main_process.placement import Placement
    from rayltx.comfy_dist.main_process.twin import load_twin

    path = tmp_path / "model.safetensors"
    save_tiny_checkpoint(path, "LTX-Video")
    held = cluster.held_bytes()
    twin = load_twin(str(path), Placement(cluster.request, ParallelConfig(2, 1)))
    assert cluster.held_bytes() > held
    del twin
    gc.collect()
    deadline = time.monotonic() + 10.0
    while cluster.held_bytes() > held and time.monotonic() < deadline:
        time.sleep(0.05)
    assert cluster.held_bytes() == held


def test_a_worker_that_dies_while_sampling_changes_nothing(models, cluster, caplog):
    """The replaced worker gets weights, patches and hooks again, and the same step is repeated."""
    import signal

    whole, twin, _ = models("LTX-2")
    config = CONFIGS["LTX-2"]
    steps = []

    def kill_once(step, *args):
        steps.append(step)
        if step == 0:
            os.kill(cluster.workers()[1].pid, signal.SIGKILL)

    def sample(model, callback=None):
        import comfy.sample

        work = scenarios.Workspace("LTX-2", config)
        latent = work.latent()["samples"]
        noise = comfy.sample.prepare_noise(latent, 3)
        return comfy.sample.sample(
            scenarios.with_lora(model, config), noise, 4, 3.0, "euler", "simple", work.positive, work.negative, latent,
            callback=callback, disable_pbar=True, seed=3,
        )  # fmt: skip

    with torch.inference_mode():
        reference = sample(whole).unbind()
        out = sample(twin, kill_once).unbind()
    assert steps == [0, 1, 2, 3]
    assert "died" in caplog.text and "repeating the step" in caplog.text
    assert max(map(relative_error, out, reference)) <= SAMPLING_TOLERANCE


@pytest.mark.slow
def test_a_model_whose_cluster_was_ended_starts_it_again(cluster, tmp_path):
    """In a process of its own: a process has one cluster."""
    import subprocess
    import sys

    path = tmp_path / "model.safetensors"
    save_tiny_checkpoint(path, "LTX-Video")
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
import torch, comfy_scenarios as scenarios
from comfy_models import CONFIGS, set_up_comfyui
set_up_comfyui({str(find_comfyui())!r})
from rayltx.comfy_dist.comfy_environment import ComfyEnvironment
from rayltx.comfy_dist.comfy_host import COMFY_HOST
from rayltx.comfy_dist.main_process.placement import Placement
from rayltx.comfy_dist.main_process.twin import load_twin
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.sequence_parallel.partition import ParallelConfig
environment = ComfyEnvironment.headless({str(find_comfyui())!r}, cpu=True)
request = ClusterRequest(workers=1, host=COMFY_HOST, bootstrap=environment.bootstrap())
twin = load_twin({str(path)!r}, Placement(request, ParallelConfig(1, 1)))
with torch.inference_mode():
    sample = lambda: scenarios.tensors_of(scenarios.lora(twin, "LTX-Video", CONFIGS["LTX-Video"]))[0]
    before = sample()
    Cluster.current().shutdown()
    assert torch.equal(sample(), before)
Cluster.current().shutdown()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_a_clone_that_goes_leaves_the_patches_of_the_one_that_samples(models):
    """ComfyUI's patchers detach when they are collected, and a collection can come at any time."""
    import gc

    _, twin, _ = models("LTX-Video")
    sibling, sampling = twin.clone(), twin.clone()
    patched = copy.deepcopy(twin.model.model_sampling)
    sampling.add_object_patch("model_sampling", patched)
    before = sampling.model.model_sampling
    sampling.patch_model()
    del sibling
    gc.collect()
    assert sampling.model.model_sampling is patched
    sampling.unpatch_model()
    assert sampling.model.model_sampling is before


def test_all_models_on_the_same_weights_undo_each_others_patches(models):
    from rayltx.comfy_dist.main_process.twin import patcher_of

    _, twin, _ = models("LTX-Video")
    before = twin.model.model_sampling
    first, second = patcher_of(twin.model), patcher_of(twin.model)
    first.add_object_patch("model_sampling", copy.deepcopy(before))
    first.patch_model()
    second.unpatch_model()
    assert twin.model.model_sampling is before


def test_another_object_is_another_patch(models):
    """Closures that differ in what they hold alone, one after the other at the same address."""
    from rayltx.comfy_dist.main_process.forwarding import is_same_state, patch_state_of

    _, twin, _ = models("LTX-Video")
    name = "diffusion_model.transformer_blocks.0.ff.forward"

    def state(scale):
        model = twin.clone()
        model.object_patches[name] = lambda x: x * scale
        return patch_state_of(model)

    sent = state(1.0)
    for number in range(50):
        assert not is_same_state(state(float(number)), sent)
    assert is_same_state(sent, sent)


def test_settings_that_change_by_themselves_ask_for_the_same_workers(comfy):
    import folder_paths
    from comfy.cli_args import args

    from rayltx.comfy_dist.comfy_environment import ComfyEnvironment

    before = ComfyEnvironment.of_this_process()
    method, args.preview_method = args.preview_method, "another"
    folder_paths.folder_names_and_paths["rayltx tests"] = ([], set())
    try:
        assert ComfyEnvironment.of_this_process() == before
        args.deterministic = True
        assert ComfyEnvironment.of_this_process() != before
    finally:
        args.preview_method, args.deterministic = method, False
        del folder_paths.folder_names_and_paths["rayltx tests"]
