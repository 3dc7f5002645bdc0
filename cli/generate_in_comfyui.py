"""`rayltx generate` on ComfyUI's models, by its sampler: text encoder, transformer and VAEs."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from torch import Tensor

from rayltx.cli.generate_options import GenerateOptions, Sides
from rayltx.cli.generated import Generated, Sound
from rayltx.cli.outputs import Outputs
from rayltx.cli.sampling_runs import OnStep, Stages, noise_for, sample_and_compare
from rayltx.comfy_dist.main_process.headless import (
    comfyui_cluster,
    comfyui_schedule,
    conditioning_of,
    decode_sound,
    decode_video,
    encode_text,
    sample_with_comfyui,
)
from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint, Header
from rayltx.diffusion_models.lightricks.feed_forward import CHUNKS_OPTION
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.sampling import parse_sigmas
from rayltx.diffusion_models.lightricks.vae_checkpoint import AUDIO, VIDEO
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.errors import InputError
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)

_TEXT_PROJECTION = "text_embedding_projection"  # of LTX-2's checkpoints, part of their text encoder


def text_encoder_files(given: list[Path], checkpoint: Path) -> list[Path]:
    """What ComfyUI makes a text encoder of. It goes by their number: the checkpoint is one of them where it has a part of it."""
    if len(given) > 1 or checkpoint.suffix.lower() != ".safetensors":
        return given
    has_part = any(_TEXT_PROJECTION in name for name in Header.of(checkpoint).tensors)
    return [*given, checkpoint] if has_part else given


def generate_in_comfyui(
    options: GenerateOptions,
    checkpoint: Checkpoint,
    shape: LatentShape,
    sides: Sides | None,
    request: ClusterRequest,
    config: ParallelConfig,
    stages: Stages,
    outputs: Outputs,
) -> Generated:
    """sides: None has ComfyUI's text encoder make them of the prompts."""
    assert options.comfyui is not None
    weight_dtype = {"file": "default", "bfloat16": "bf16", "float16": "fp16"}.get(options.dtype)
    if weight_dtype is None:
        raise InputError(f"dtype={options.dtype} is not one that ComfyUI's loader takes; use file, bfloat16 or float16")
    with comfyui_cluster(options.comfyui, request) as cluster:
        from rayltx.comfy_dist.main_process.placement import Placement
        from rayltx.comfy_dist.main_process.twin import LoadOptions, load_twin

        if sides is None:
            with stages.stage("reading the prompts"):
                positive, negative = encode_text(
                    text_encoder_files(options.text_encoders, Path(checkpoint.path)),
                    (options.prompt or "", options.negative),
                    options.frame_rate,
                )
        else:
            positive, negative = (conditioning_of(side) for side in (sides[0], sides[1] or sides[0]))
        with stages.stage("starting the workers"):
            cluster.workers()
        with stages.stage(f"loading {Path(checkpoint.path).name}") as (bar, task):
            twin = load_twin(
                checkpoint.path,
                Placement(cluster.request, config),
                LoadOptions(weight_dtype),
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        model = twin.model.diffusion_model
        has_audio = hasattr(model, "audio_patchify_proj") if sides is None else "audio_context" in sides[0]
        noise = noise_for(shape, model.in_channels, options.frame_rate, options.seed, has_audio)
        sigmas = parse_sigmas(options.sigmas) if options.sigmas else comfyui_schedule(options.steps, noise["video"])
        twin.model_options["transformer_options"][CHUNKS_OPTION] = options.chunks

        def sample_on(config: ParallelConfig, on_step: OnStep) -> dict[str, Tensor]:
            return sample_with_comfyui(
                twin.with_config(config),
                noise,
                sigmas,
                positive,
                negative,
                options.cfg,
                on_step,
                options.stochastic_seed,
            )

        latents = sample_and_compare(sample_on, config, shape, len(sigmas) - 1, options.verify, stages)
        made = Generated(latents, sigmas)
        outputs.write_latents(made)
        if options.wants_pixels:
            with outputs.saving_latents(made):
                return _decoded(made, options, checkpoint.path, cluster.request, stages)
        return made


def _decoded(
    made: Generated, options: GenerateOptions, checkpoint: str, request: ClusterRequest, stages: Stages
) -> Generated:
    """With pixels and sound, by VAEs on the workers."""
    from rayltx.comfy_dist.main_process.remote_vae import get_vae

    with stages.stage("loading the VAE"):
        vae = get_vae(str(options.vae or checkpoint), VIDEO, request)
    with stages.stage("decoding"):
        made = dataclasses.replace(made, clip=decode_video(vae, made.latents["video"]))
    source = options.sound_source(checkpoint)
    if "audio" not in made.latents:
        if options.audio_vae is not None:
            logger.warning(
                "audio-vae: there is no sound to decode: the conditioning has no audio_context, or the model none"
            )
        return made
    if not options.wants_sound:
        return made
    if source is None:
        logger.warning(
            "the video is without its sound: its VAE is not in the checkpoint; name its file (--audio-vae FILE)"
        )
        return made
    with stages.stage("decoding the sound"):
        sound = Sound(*decode_sound(get_vae(str(source), AUDIO, request), made.latents["audio"]))
    return dataclasses.replace(made, sound=sound)
