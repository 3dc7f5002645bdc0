"""ComfyUI's model as both processes build it: the one without weights, the others on the shared ones."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rayltx.comfy_dist.comfy_types import BaseModel, DiffusionModel, ModelConfig
from rayltx.comfy_dist.gguf_spec import GGUFSpec

TEXT_MODULES = ("audio_embeddings_connector", "video_embeddings_connector")
"""Names of modules that no forward of the model runs: they prepare the text for all of them."""

CAPTION_PROJECTIONS = ("caption_projection", "audio_caption_projection")
"""Names of modules that prepare text before the connectors in some versions, and within the forward in others."""

OWN_ATTENTION = ".comfy_attention"
"""The end of the name of what an attention layer asks for, in versions where a checkpoint or a LoRA can choose it."""


@dataclass(frozen=True)
class ComfySpec:
    """What detection found, and how a worker builds ComfyUI's model from it. Picklable."""

    version: str  # of ComfyUI
    model_version: str  # LTX-2.3, ...
    metadata: Mapping[str, str]
    unet_dtype: torch.dtype
    manual_cast_dtype: torch.dtype | None
    fp8_optimizations: bool = False
    gguf: GGUFSpec | None = None
    # The dtypes and quantised formats that occur among the weights, sorted: which kernels run is chosen by them.
    weight_kinds: tuple[str, ...] = ()

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the model is handed its inputs in, and computes in."""
        return self.manual_cast_dtype or self.unet_dtype


def build_base_model(
    config: ModelConfig, spec: ComfySpec, tensors: Mapping[str, Tensor], device: torch.device | None
) -> BaseModel:
    """ComfyUI's BaseModel for a detected configuration. device: None leaves parameters on the CPU, untouched."""
    arguments = {}
    if "device" in inspect.signature(config.set_inference_dtype).parameters:
        import comfy.model_management

        arguments["device"] = comfy.model_management.get_torch_device()
    config.set_inference_dtype(spec.unet_dtype, spec.manual_cast_dtype, **arguments)
    if spec.fp8_optimizations:
        config.optimizations["fp8"] = True
    if spec.gguf is not None:
        from rayltx.comfy_dist.gguf_operations import gguf_operations

        config.custom_operations = gguf_operations(spec.gguf)
    return config.get_model(tensors, "", device=device)


def has_audio(model: DiffusionModel) -> bool:
    """Whether it is an audio-video model, LTX-2 or later."""
    return hasattr(model, "audio_patchify_proj")


def text_width(model: DiffusionModel) -> int:
    """Width of the text context that the model's forward takes: of both streams side by side, where there are two."""
    if not has_audio(model):
        return model.inner_dim if model.caption_proj_before_connector else model.caption_channels
    if model.caption_proj_before_connector:
        return model.inner_dim + model.audio_inner_dim
    return 2 * model.caption_channels


def missing_text_modules(model: torch.nn.Module, tensors: Mapping[str, object]) -> list[str]:
    """The modules that only prepare text, and that a file leaves out: some keep them with the text encoder.

    Text that was encoded with them does not need them. A module that is there in part is not left out, but damaged.
    """
    names = list(TEXT_MODULES)
    if getattr(model, "caption_proj_before_connector", False):
        names += CAPTION_PROJECTIONS
    present = {name.split(".")[0] for name in tensors}
    modules = [name for name in names if isinstance(getattr(model, name, None), torch.nn.Module)]
    return [name for name in modules if name not in present]
