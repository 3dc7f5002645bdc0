"""Checkpoints and LoRAs onto the workers."""

from __future__ import annotations

from typing import Any

from rayltx.comfy_dist.dtype_choices import GGUF_DTYPES
from rayltx.nodes.inputs import CATEGORY, MAX_VRAM, WEIGHT_DTYPE, Schema, advanced
from rayltx.nodes.model_files import file_names, gguf_folders, path_of
from rayltx.nodes.requirements_check import require_packages

_UNET_FOLDERS = ("diffusion_models", "checkpoints")
_INIT = ("RAY_ACTORS_INIT", {"tooltip": "The workers, from Ray Init Actor."})
_LORA = (
    "RAY_LORA",
    {"tooltip": "LoRAs from Load Lora Model (Ray). ComfyUI's own LoRA nodes work on the MODEL as well."},
)
_ACTOR_NAMES = ("ray_actors", "model")
_ACTOR_TOOLTIPS = ("For the XFuser samplers and Ray nodes.", "For every node of ComfyUI that takes a MODEL.")


class RayUNETLoader:
    """A checkpoint onto the workers."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("RAY_ACTORS", "MODEL")
    RETURN_NAMES = _ACTOR_NAMES
    OUTPUT_TOOLTIPS = _ACTOR_TOOLTIPS
    FUNCTION = "load_ray_unet"
    DESCRIPTION = (
        "Loads an LTX model once, for all workers. The MODEL works with every standard node: samplers, schedulers, guiders, "
        "LoRA loaders and model patches."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {
            "required": {
                "unet_name": (
                    file_names(_UNET_FOLDERS),
                    {"tooltip": "An LTX model, from models/diffusion_models or models/checkpoints."},
                ),
                "weight_dtype": WEIGHT_DTYPE,
                "ray_actors_init": _INIT,
            },
            "optional": {"lora": _LORA, "max_vram_gb": advanced(MAX_VRAM)},
        }

    def load_ray_unet(
        self, unet_name: str, weight_dtype: str, ray_actors_init: Any, lora: Any = (), max_vram_gb: float = 0.0
    ) -> tuple[Any, Any]:
        require_packages()
        from rayltx.comfy_dist.main_process.ray_values import kept_by, load_actors

        path = path_of(unet_name, _UNET_FOLDERS)
        actors = load_actors(path, ray_actors_init, lora, max_vram_gb, kept_by(self), weight_dtype=weight_dtype)
        return actors, actors.model


class RayCheckpointLoader:
    """A checkpoint that holds the VAE, and maybe the text encoder, next to the model."""

    CATEGORY = CATEGORY
    # The first three as ComfyUI's Load Checkpoint has them, whose place it takes.
    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "RAY_ACTORS")
    RETURN_NAMES = ("model", "clip", "vae", "ray_actors")
    OUTPUT_TOOLTIPS = (
        _ACTOR_TOOLTIPS[1],
        "The text encoder of the file, in ComfyUI's own process; none where the file has none.",
        "The VAE of the file, on the workers.",
        _ACTOR_TOOLTIPS[0],
    )
    FUNCTION = "load_ray_checkpoint"
    _parts: Any = None  # of the last run
    DESCRIPTION = (
        "Takes the place of Load Checkpoint: the LTX model of the file and its VAE go onto the workers, its text encoder is "
        "ComfyUI's own."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {
            "required": {
                "ckpt_name": (
                    file_names(("checkpoints",)),
                    {"tooltip": "A checkpoint of an LTX model, from models/checkpoints."},
                ),
                "ray_actors_init": _INIT,
            },
            "optional": {"weight_dtype": advanced(WEIGHT_DTYPE), "lora": _LORA, "max_vram_gb": advanced(MAX_VRAM)},
        }

    def load_ray_checkpoint(
        self,
        ckpt_name: str,
        ray_actors_init: Any,
        weight_dtype: str = "default",
        lora: Any = (),
        max_vram_gb: float = 0.0,
    ) -> tuple[Any, ...]:
        require_packages()
        from rayltx.comfy_dist.main_process.checkpoint_parts import CheckpointParts, check_is_bundle, vae_of
        from rayltx.comfy_dist.main_process.loaded_models import FileState
        from rayltx.comfy_dist.main_process.ray_values import kept_by, load_actors

        path = path_of(ckpt_name, ("checkpoints",))
        if self._parts is None or self._parts.source != FileState.of(path):
            check_is_bundle(path)
            self._parts = None  # the memory of the last file's text encoder may be needed for this one's
        actors = load_actors(path, ray_actors_init, lora, max_vram_gb, kept_by(self), weight_dtype=weight_dtype)
        self._parts = self._parts or CheckpointParts.of(path)
        vae = vae_of(path, ray_actors_init, self, "use that of Load VAE (Ray), or of Load VAE")
        return actors.model, self._parts.clip, vae, actors


class RayGGUFLoader:
    """A GGUF file onto the workers."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("RAY_ACTORS", "MODEL")
    RETURN_NAMES = _ACTOR_NAMES
    OUTPUT_TOOLTIPS = _ACTOR_TOOLTIPS
    FUNCTION = "load_ray_unet"
    DESCRIPTION = (
        "Loads a GGUF file of an LTX model once, for all workers. Its blocks stay as they are in memory and on the GPUs, and "
        "are dequantised where they are used."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {
            "required": {
                "unet_name": (
                    file_names(gguf_folders()),
                    {"tooltip": "A GGUF file of an LTX model, from models/diffusion_models or models/unet."},
                ),
                "dequant_dtype": (
                    list(GGUF_DTYPES),
                    {
                        "default": "default",
                        "tooltip": "In what blocks become numbers. default: float32; target: as the model.",
                    },
                ),
                "patch_dtype": (
                    list(GGUF_DTYPES),
                    {
                        "default": "default",
                        "tooltip": "In what LoRAs are computed. default: float32; target: as the model.",
                    },
                ),
                "ray_actors_init": _INIT,
            },
            "optional": {"lora": _LORA, "max_vram_gb": advanced(MAX_VRAM)},
        }

    def load_ray_unet(
        self, unet_name: str, dequant_dtype: str, patch_dtype: str, ray_actors_init: Any, lora: Any = (),
        max_vram_gb: float = 0.0,
    ) -> tuple[Any, Any]:  # fmt: skip
        require_packages()
        from rayltx.comfy_dist.main_process.ray_values import kept_by, load_actors

        path = path_of(unet_name, gguf_folders())
        actors = load_actors(
            path,
            ray_actors_init,
            lora,
            max_vram_gb,
            kept_by(self),
            dequant_dtype=dequant_dtype,
            patch_dtype=patch_dtype,
        )
        return actors, actors.model


class RayLoraLoader:
    """A LoRA, for a Ray loader."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("RAY_LORA",)
    RETURN_NAMES = ("ray_lora",)
    OUTPUT_TOOLTIPS = ("For a Ray loader, or another Load Lora Model (Ray).",)
    FUNCTION = "load_lora"
    DESCRIPTION = "Names a LoRA for a Ray loader. Changing it does not load the model again."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {
            "required": {
                "lora_name": (file_names(("loras",)), {"tooltip": "A LoRA, from models/loras."}),
                "strength_model": (
                    "FLOAT",
                    {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01, "tooltip": "How strongly it counts."},
                ),
            },
            "optional": {"prev_ray_lora": ("RAY_LORA", {"tooltip": "LoRAs that come before this one."})},
        }

    def load_lora(self, lora_name: str, strength_model: float, prev_ray_lora: Any = ()) -> tuple[Any]:
        from rayltx.comfy_dist.main_process.lora_files import LoraFile

        return ((*prev_ray_lora, LoraFile(path_of(lora_name, ("loras",)), strength_model)),)
