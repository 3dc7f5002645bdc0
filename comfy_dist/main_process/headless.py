"""ComfyUI without its server, for the command line: its own model in the workers, its own sampler here."""

from __future__ import annotations

import dataclasses
import gc
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayltx.comfy_dist.comfy_environment import ComfyEnvironment, check_comfyui, enter_given
from rayltx.comfy_dist.comfy_host import COMFY_HOST
from rayltx.comfy_dist.comfy_types import VAE, Conditioning, Model
from rayltx.comfy_dist.main_process.comfy_nodes import LIGHTRICKS, SOUND, call_node
from rayltx.comfy_dist.main_process.self_test_record import ask_errors
from rayltx.devices import is_out_of_memory
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.errors import InputError, first_line
from rayltx.sequence_parallel.partition import ParallelConfig


@contextmanager
def comfyui_cluster(root: Path, request: ClusterRequest) -> Iterator[Cluster]:
    """Become like the ComfyUI at `root`, and start workers that are. Raises InputError if there is none."""
    check_comfyui(root)
    environment = ComfyEnvironment.headless(str(root.resolve()), cpu=request.device == "cpu")
    request = dataclasses.replace(request, host=COMFY_HOST, bootstrap=environment.bootstrap())
    with Cluster.start(request) as cluster:
        enter_given(root, environment, request.device)
        yield cluster


def comfyui_schedule(steps: int, video: Tensor) -> Tensor:
    """The sigmas of ComfyUI's LTXVScheduler."""
    scheduler = importlib.import_module("comfy_extras.nodes_lt").LTXVScheduler
    out = scheduler.execute(
        steps=steps, max_shift=2.05, base_shift=0.95, stretch=True, terminal=0.1, latent={"samples": video}
    )
    return out.result[0]


def encode_text(
    paths: Sequence[Path], prompts: tuple[str, str], frame_rate: float
) -> tuple[Conditioning, Conditioning]:
    """Positive and negative prompt, by ComfyUI's text encoder, of which nothing stays in memory. paths: its files.

    Raises InputError where ComfyUI makes none of them.
    """
    import comfy.model_management
    import comfy.sd

    with torch.inference_mode():
        try:
            clip = comfy.sd.load_clip([str(path) for path in paths], clip_type=comfy.sd.CLIPType.LTXV)
            sides = [call_node("nodes", "CLIPTextEncode", clip=clip, text=prompt)[0] for prompt in prompts]
        except Exception as error:  # ComfyUI's loader raises anything for files that it does not know
            if is_out_of_memory(error):
                raise
            raise InputError(
                f"text-encoder: ComfyUI makes no text encoder of LTX's of {', '.join(map(str, paths))} "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        positive, negative = call_node(
            LIGHTRICKS, "LTXVConditioning", positive=sides[0], negative=sides[1], frame_rate=frame_rate
        )[:2]
        del clip
        comfy.model_management.unload_all_models()
        gc.collect()
    return positive, negative


def decode_video(vae: VAE, latent: Tensor) -> Tensor:
    """(1, C, f, h, w) to (pixel frames, height, width, 3) float32 in [0, 1]."""
    return call_node("nodes", "VAEDecode", vae=vae, samples={"samples": latent})[0].float()


def decode_sound(vae: VAE, latent: Tensor) -> tuple[Tensor, int]:
    """(1, 8, tokens, 16) to (channels, samples) float32 in [-1, 1], and how many samples there are in a second."""
    sound = call_node(SOUND, "LTXVAudioVAEDecode", samples={"samples": latent}, audio_vae=vae)[0]
    return sound["waveform"][0].float().clamp(-1.0, 1.0), sound["sample_rate"]


def sample_with_comfyui(
    twin: Model,
    noise: dict[str, Tensor],
    sigmas: Tensor,
    positive: Conditioning,
    negative: Conditioning,
    cfg: float,
    on_step: Callable[[int, dict[str, Tensor]], None],
    stochastic_seed: int | None = None,
) -> dict[str, Tensor]:
    """As `sampling.sample`, with ComfyUI's samplers on a MODEL: Euler's, or LCM's, which has new noise in each step."""
    import comfy.nested_tensor
    import comfy.sample
    import comfy.samplers

    names = list(noise)
    streams = list(noise.values())
    packed = streams[0] if len(streams) == 1 else comfy.nested_tensor.NestedTensor(streams)
    latent = torch.zeros_like(streams[0])
    if len(streams) > 1:
        latent = comfy.nested_tensor.NestedTensor([torch.zeros_like(stream) for stream in streams])
    sampler = "euler" if stochastic_seed is None else "lcm"
    with torch.inference_mode():
        out = comfy.sample.sample_custom(
            twin, packed, cfg, comfy.samplers.sampler_object(sampler), sigmas, positive, negative, latent,
            callback=lambda step, *_: on_step(step + 1, {}), disable_pbar=True, seed=stochastic_seed or 0,
        )  # fmt: skip
    return dict(zip(names, out.unbind() if len(streams) > 1 else [out]))


def conditioning_of(side: dict[str, Any]) -> Conditioning:
    """ComfyUI's CONDITIONING from the command line's: of LTX-2 and later, both streams' text side by side."""
    context = side["context"]
    if "audio_context" in side:
        context = torch.cat([context, side["audio_context"]], dim=-1)
    mask = side.get("context_mask")
    if mask is None:  # ComfyUI's LTX-Video model does not do without
        mask = torch.ones(context.shape[:2], dtype=torch.int64)
    return [[context, {"frame_rate": side["frame_rate"], "attention_mask": mask}]]


def comfyui_errors(
    cluster: Cluster,
    folder: Path,
    versions: list[str],
    configs: list[ParallelConfig],
    on_config: Callable[[str, int], None],
) -> Iterator[tuple[str, list[dict[str, float | str]]]]:
    """The self-test's errors by case, one dictionary for each config, for each version of the model."""
    from rayltx.comfy_dist.main_process.detection import detect
    from rayltx.comfy_dist.tiny_checkpoints import known_versions, save_tiny_checkpoint
    from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint

    known = known_versions()
    unknown = sorted(set(versions) - set(known))
    if unknown:
        raise InputError(f"model={', '.join(unknown)}: this ComfyUI has {', '.join(known)}")
    for version in versions or known:
        path = folder / f"{version}.safetensors"
        save_tiny_checkpoint(path, version)
        checkpoint = open_checkpoint(path)
        detected = detect(checkpoint)
        remote = cluster.load(checkpoint, detected.spec, COMFY_HOST, detected.dtypes)
        errors = []
        for number, config in enumerate(configs):
            on_config(version, number)
            errors.append(ask_errors(remote, config))
        remote.release()
        yield version, errors
