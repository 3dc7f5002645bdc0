"""ComfyUI's model on weights that all workers share."""

from __future__ import annotations

import functools
import logging
from typing import NoReturn

import comfy.hooks
import comfy.model_detection
import comfy.model_management
import comfy.utils
import torch
from torch import Tensor

from rayltx.comfy_dist.comfy_types import BaseModel
from rayltx.comfy_dist.marks import PATCH_DTYPE
from rayltx.comfy_dist.model_spec import ComfySpec, build_base_model, missing_text_modules
from rayltx.comfy_dist.worker_process.shared_patcher import SharedWeightPatcher
from rayltx.errors import InputError

logger = logging.getLogger(__name__)


def build_on(tensors: dict[str, Tensor], spec: ComfySpec) -> SharedWeightPatcher:
    """Build the model; its parameters are the given tensors, uncopied.

    tensors: by official name without prefix, in the dtypes that `detection` chose. The dictionary is emptied.
    What ComfyUI's own loader does, but for the copy.
    """
    state_dict, metadata = tensors, dict(spec.metadata)
    if spec.gguf is None:
        state_dict, metadata = comfy.utils.convert_old_quants(tensors, "", metadata=metadata)
    config = comfy.model_detection.model_config_from_unet(_with_shapes(state_dict, spec), "", metadata=metadata)
    assert config is not None, "detected by the ComfyUI process, not by this worker's"
    # Not on the meta device: quantised layers would sample garbage. Parameters that are never touched cost no memory.
    base_model: BaseModel = build_base_model(config, spec, _with_shapes(state_dict, spec), device=None)
    if spec.gguf is not None:
        setattr(base_model, PATCH_DTYPE, spec.gguf.patch_dtype)
    state_dict = config.process_unet_state_dict(state_dict)
    tensor_names = dict.fromkeys(state_dict)
    missing, unexpected = base_model.diffusion_model.load_state_dict(state_dict, strict=False, assign=True)
    left_out = missing_text_modules(base_model.diffusion_model, tensor_names)
    missing = [name for name in missing if name.split(".")[0] not in left_out]
    assert not missing, f"parameters without weights: {missing[:5]}"
    for name in left_out:
        getattr(base_model.diffusion_model, name).forward = functools.partial(_refuse_text, spec.model_version)
    if unexpected:
        logger.info("tensors without a place in the model: %s", ", ".join(unexpected[:5]))
    base_model.diffusion_model.requires_grad_(False)
    patcher = SharedWeightPatcher(
        base_model,
        load_device=comfy.model_management.get_torch_device(),
        # Whatever ComfyUI's memory flags say: the host has the weights in any case, and --highvram would unload to the GPU.
        offload_device=torch.device("cpu"),
    )
    # Not a copy of each patched layer for each strength that a hook has had.
    patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    return patcher


def _refuse_text(version: str, *args: object, **kwargs: object) -> NoReturn:
    raise InputError(
        f"this {version} file has no text connector, and the text was encoded without it; load the text encoder together with "
        "the connector's file (DualCLIPLoader), or use a checkpoint that holds the connector"
    )


def _with_shapes(tensors: dict[str, Tensor], spec: ComfySpec) -> dict[str, Tensor]:
    """The tensors as detection expects them: blocks with the shape of their values."""
    if spec.gguf is None:
        return tensors
    formats = spec.gguf.formats
    return {
        name: torch.empty(formats[name].shape, dtype=tensor.dtype, device="meta")
        if name in formats and tensor.dtype == torch.uint8
        else tensor
        for name, tensor in tensors.items()
    }
