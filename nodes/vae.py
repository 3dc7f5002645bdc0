"""VAEs and upsamplers of latents onto the workers, and a decode for graphs made with Raylight."""

from __future__ import annotations

from typing import Any

from rayltx.nodes.inputs import CATEGORY, Definition, Schema, advanced
from rayltx.nodes.model_files import file_names, path_of
from rayltx.nodes.requirements_check import require_packages

_FOLDERS = ("vae", "checkpoints")
_UPSAMPLER_FOLDERS = ("latent_upscale_models",)
_PARTS = ("auto", "video", "audio")
_ACTORS = (
    "RAY_ACTORS",
    {"tooltip": "The workers that run the model, from a Ray loader. None: those that run already."},
)
_INIT = ("RAY_ACTORS_INIT", {"tooltip": "The workers, from Ray Init Actor, for a graph without a model."})


def _vae_name() -> Definition:
    return (
        file_names(_FOLDERS),
        {"tooltip": "A VAE of an LTX model, from models/vae, or a checkpoint in models/checkpoints that holds it."},
    )


def _pixels(default: int, least: int, step: int, tooltip: str) -> Definition:
    return "INT", {"default": default, "min": least, "max": 4096, "step": step, "tooltip": tooltip}


class RayVAELoader:
    """A VAE onto the workers."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("RAY_VAE", "VAE")
    RETURN_NAMES = ("ray_vae", "vae")
    OUTPUT_TOOLTIPS = ("For Distributed VAE (Ray).", "For every node of ComfyUI that takes a VAE.")
    FUNCTION = "load_vae"
    DESCRIPTION = (
        "Loads a VAE of an LTX model once, for all workers. The VAE works with every standard node: whole videos are decoded by "
        "all workers together, tiles by whichever is free."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {
            "required": {"vae_name": _vae_name()},
            "optional": {
                "ray_actors": _ACTORS,
                "ray_actors_init": _INIT,
                "part": advanced(
                    (
                        list(_PARTS),
                        {
                            "default": "auto",
                            "tooltip": "Which VAE of a file that holds two. auto: that of the video, where there is one.",
                        },
                    )
                ),
            },
        }

    def load_vae(
        self, vae_name: str, ray_actors: Any = None, ray_actors_init: Any = None, part: str = "auto"
    ) -> tuple[Any, Any]:
        require_packages()
        from rayltx.comfy_dist.main_process.ray_values import load_vae, request_of

        vae = load_vae(path_of(vae_name, _FOLDERS), part, request_of(ray_actors, ray_actors_init), self)
        return vae, vae


class RayLatentUpscaleModelLoader:
    """An upsampler of latents onto the workers."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("LATENT_UPSCALE_MODEL",)
    RETURN_NAMES = ("upscale_model",)
    OUTPUT_TOOLTIPS = ("For LTXVLatentUpsampler.",)
    FUNCTION = "load_upsampler"
    DESCRIPTION = (
        "Loads an upsampler of LTX's latents once, for all workers. One of them runs it, and the latent is that of ComfyUI's own "
        "loader."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {
            "required": {
                "model_name": (
                    file_names(_UPSAMPLER_FOLDERS),
                    {"tooltip": "An upsampler of LTX's latents, from models/latent_upscale_models."},
                )
            },
            "optional": {"ray_actors": _ACTORS, "ray_actors_init": _INIT},
        }

    def load_upsampler(self, model_name: str, ray_actors: Any = None, ray_actors_init: Any = None) -> tuple[Any]:
        require_packages()
        from rayltx.comfy_dist.main_process.ray_values import load_upsampler, request_of

        path = path_of(model_name, _UPSAMPLER_FOLDERS)
        return (load_upsampler(path, request_of(ray_actors, ray_actors_init), self),)


class RayVAEDecodeDistributed:
    """A decode by tiles, for graphs made with Raylight."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("image",)
    OUTPUT_TOOLTIPS = ("The video.",)
    FUNCTION = "decode"
    DESCRIPTION = (
        "Decodes a video by tiles, each on whichever worker is free. The same picture as that of VAE Decode (Tiled) with these "
        "numbers, which takes the VAE of Load VAE (Ray) as well."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {
            "required": {
                "ray_actors": _ACTORS,
                "samples": ("LATENT", {"tooltip": "The latent of a video."}),
                "vae_name": _vae_name(),
                "tile_size": _pixels(512, 64, 32, "Rows and columns of a tile, in pixels."),
                "overlap": _pixels(64, 0, 32, "Pixels that neighbouring tiles share, over which they are blended."),
                "temporal_size": _pixels(64, 8, 4, "Frames of a tile."),
                "temporal_overlap": _pixels(8, 4, 4, "Frames that tiles share which follow each other."),
            },
            "optional": {"ray_vae": ("RAY_VAE", {"tooltip": "The VAE of Load VAE (Ray), in place of vae_name."})},
        }

    def decode(
        self, ray_actors: Any, samples: Any, vae_name: str, tile_size: int, overlap: int, temporal_size: int,
        temporal_overlap: int, ray_vae: Any = None,
    ) -> tuple[Any]:  # fmt: skip
        require_packages()
        from rayltx.comfy_dist.main_process.comfy_nodes import call_node
        from rayltx.comfy_dist.main_process.ray_values import load_vae, request_of

        vae = ray_vae or load_vae(path_of(vae_name, _FOLDERS), "video", request_of(ray_actors), self)
        found = call_node(
            "nodes", "VAEDecodeTiled", vae=vae, samples=samples, tile_size=tile_size, overlap=overlap,
            temporal_size=temporal_size, temporal_overlap=temporal_overlap,
        )  # fmt: skip
        return (found[0],)
