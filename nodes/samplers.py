"""The XFuser samplers: ComfyUI's own, for RAY_ACTORS."""

from __future__ import annotations

from typing import Any

from rayltx.nodes import inputs
from rayltx.nodes.inputs import CATEGORY, Schema

_LATENT_OUT = "The latent, sampled."
_ACTORS_OUT = "The workers, for what comes after."


class XFuserKSampler:
    CATEGORY = CATEGORY
    RETURN_TYPES = ("LATENT", "RAY_ACTORS")
    RETURN_NAMES = ("latent", "ray_actors")
    OUTPUT_TOOLTIPS = (_LATENT_OUT, _ACTORS_OUT)
    FUNCTION = "sample"
    DESCRIPTION = "ComfyUI's KSampler on the workers. Takes sigmas from a scheduler node as well."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {
            "required": {
                "ray_actors": inputs.RAY_ACTORS,
                "seed": inputs.seed(),
                "steps": inputs.steps(),
                "cfg": inputs.cfg(),
                "sampler_name": inputs.sampler_name(),
                "scheduler": inputs.scheduler(),
                "positive": inputs.POSITIVE,
                "negative": inputs.NEGATIVE,
                "latent_image": inputs.LATENT,
                "denoise": inputs.denoise(),
            },
            "optional": {"sigmas": inputs.SIGMAS},
        }

    def sample(
        self, ray_actors: Any, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str, positive: Any,
        negative: Any, latent_image: Any, denoise: float = 1.0, sigmas: Any = None,
    ) -> tuple[Any, Any]:  # fmt: skip
        from rayltx.comfy_dist.main_process.ksampler import SamplingRange, sample_scheduled

        latent = sample_scheduled(
            ray_actors.model, True, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image,
            SamplingRange(denoise=denoise), sigmas,
        )  # fmt: skip
        return latent, ray_actors


class XFuserKSamplerAdvanced:
    CATEGORY = CATEGORY
    RETURN_TYPES = ("LATENT", "RAY_ACTORS")
    RETURN_NAMES = ("latent", "ray_actors")
    OUTPUT_TOOLTIPS = (_LATENT_OUT, _ACTORS_OUT)
    FUNCTION = "ray_sample"
    DESCRIPTION = (
        "ComfyUI's KSampler (Advanced) on the workers. With sigmas connected, the start, the end, denoise and leftover noise "
        "count as they do without."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {
            "required": {
                "add_noise": (["enable", "disable"], {"tooltip": inputs.ADD_NOISE[1]["tooltip"]}),
                "noise_seed": inputs.seed(),
                "steps": inputs.steps(),
                "cfg": inputs.cfg(),
                "sampler_name": inputs.sampler_name(),
                "scheduler": inputs.scheduler(),
                "ray_actors": inputs.RAY_ACTORS,
                "positive": inputs.POSITIVE,
                "negative": inputs.NEGATIVE,
                "latent_image": inputs.LATENT,
                "start_at_step": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 10000,
                        "tooltip": "The first step of the schedule that this pass runs.",
                    },
                ),
                "end_at_step": (
                    "INT",
                    {"default": 10000, "min": 0, "max": 10000, "tooltip": "The step before which this pass ends."},
                ),
                "return_with_leftover_noise": (
                    ["disable", "enable"],
                    {"tooltip": "enable: leave the noise of the last step in, for a next pass to go on from."},
                ),
            },
            "optional": {"sigmas": inputs.SIGMAS, "denoise": inputs.denoise()},
        }

    def ray_sample(
        self, add_noise: str, noise_seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str, ray_actors: Any,
        positive: Any, negative: Any, latent_image: Any, start_at_step: int, end_at_step: int,
        return_with_leftover_noise: str, sigmas: Any = None, denoise: float = 1.0,
    ) -> tuple[Any, Any]:  # fmt: skip
        from rayltx.comfy_dist.main_process.ksampler import SamplingRange, sample_scheduled

        sampling_range = SamplingRange(start_at_step, end_at_step, denoise, return_with_leftover_noise == "enable")
        latent = sample_scheduled(
            ray_actors.model, add_noise == "enable", noise_seed, steps, cfg, sampler_name, scheduler, positive, negative,
            latent_image, sampling_range, sigmas,
        )  # fmt: skip
        return latent, ray_actors


class XFuserSamplerCustom:
    CATEGORY = f"{inputs.CUSTOM_SAMPLING}/samplers"
    RETURN_TYPES = ("LATENT", "RAY_ACTORS")
    RETURN_NAMES = ("latent", "ray_actors")
    OUTPUT_TOOLTIPS = (_LATENT_OUT, _ACTORS_OUT)
    FUNCTION = "ray_sample"
    DESCRIPTION = "ComfyUI's SamplerCustom on the workers."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {
            "required": {
                "ray_actors": inputs.RAY_ACTORS,
                "add_noise": inputs.ADD_NOISE,
                "noise_seed": inputs.seed(),
                "cfg": inputs.cfg(),
                "positive": inputs.POSITIVE,
                "negative": inputs.NEGATIVE,
                "sampler": inputs.SAMPLER,
                "sigmas": inputs.CUSTOM_SIGMAS,
                "latent_image": inputs.LATENT,
            }
        }

    def ray_sample(
        self, ray_actors: Any, add_noise: bool, noise_seed: int, cfg: float, positive: Any, negative: Any, sampler: Any,
        sigmas: Any, latent_image: Any,
    ) -> tuple[Any, Any]:  # fmt: skip
        from rayltx.comfy_dist.main_process.ksampler import sample_custom

        latent = sample_custom(
            ray_actors.model, add_noise, noise_seed, cfg, positive, negative, sampler, sigmas, latent_image
        )
        return latent, ray_actors


class XFuserSamplerCustomAdvanced:
    CATEGORY = f"{inputs.CUSTOM_SAMPLING}/samplers"
    RETURN_TYPES = ("LATENT", "LATENT", "RAY_ACTORS")
    RETURN_NAMES = ("output", "denoised_output", "ray_actors")
    OUTPUT_TOOLTIPS = (_LATENT_OUT, "What the model last took for the video without noise.", _ACTORS_OUT)
    FUNCTION = "ray_sample"
    DESCRIPTION = "ComfyUI's SamplerCustomAdvanced on the workers."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {
            "required": {
                "add_noise": inputs.ADD_NOISE,
                "noise_seed": inputs.seed(),
                "guider": ("RAY_GUIDER", {"tooltip": "From a Ray guider, which also says on which workers."}),
                "sampler": inputs.SAMPLER,
                "sigmas": inputs.CUSTOM_SIGMAS,
                "latent_image": inputs.LATENT,
            }
        }

    def ray_sample(
        self, add_noise: bool, noise_seed: int, guider: Any, sampler: Any, sigmas: Any, latent_image: Any
    ) -> tuple[Any, Any, Any]:
        from rayltx.comfy_dist.main_process.ksampler import sample_guided

        out, denoised = sample_guided(guider.guider, add_noise, noise_seed, sampler, sigmas, latent_image)
        return out, denoised, guider.actors
