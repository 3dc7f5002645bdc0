"""ComfyUI's model on weights that all workers share."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from rayltx.comfy_dist.detection import ComfySpec, build_base_model
from rayltx.comfy_dist.shared_patcher import SharedWeightPatcher

logger = logging.getLogger(__name__)


def build_on(tensors: dict[str, Tensor], spec: ComfySpec) -> SharedWeightPatcher:
    """Build the model; its parameters are the given tensors, uncopied.

    tensors: by official name without prefix, in the dtypes that `detection` chose. The dictionary is emptied.
    What ComfyUI's own loader does, but for the copy.
    """
    import comfy.model_detection
    import comfy.model_management
    import comfy.utils

    state_dict, metadata = comfy.utils.convert_old_quants(tensors, "", metadata=dict(spec.metadata))
    config = comfy.model_detection.model_config_from_unet(state_dict, "", metadata=metadata)
    assert config is not None, "detected by the ComfyUI process, not by this worker's"
    # Not on the meta device: quantised layers would sample garbage. Parameters that are never touched cost no memory.
    base_model: Any = build_base_model(config, spec, state_dict, device=None)
    state_dict = config.process_unet_state_dict(state_dict)
    missing, unexpected = base_model.diffusion_model.load_state_dict(state_dict, strict=False, assign=True)
    assert not missing, f"parameters without weights: {missing[:5]}"
    if unexpected:
        logger.info("tensors without a place in the model: %s", ", ".join(unexpected[:5]))
    base_model.diffusion_model.requires_grad_(False)
    return SharedWeightPatcher(
        base_model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
