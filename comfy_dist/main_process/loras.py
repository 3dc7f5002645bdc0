"""LoRA files on a MODEL, with ComfyUI's own readers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import comfy.lora
import comfy.lora_convert
import comfy.utils

from rayltx.comfy_dist.comfy_types import Model
from rayltx.comfy_dist.main_process.forwarding import MODEL_PREFIX
from rayltx.comfy_dist.main_process.lora_files import LoraFile
from rayltx.comfy_dist.main_process.lora_shapes import misfits
from rayltx.comfy_dist.marks import LINK
from rayltx.errors import InputError

logger = logging.getLogger(__name__)


def with_loras(model: Model, loras: Sequence[LoraFile]) -> Model:
    """A clone of the MODEL with LoRAs on it, in their order. Raises InputError for a file of which nothing fits."""
    for lora in loras:
        if lora.strength != 0:
            model = _with_lora(model, lora)
    return model


def _with_lora(model: Model, lora: LoraFile) -> Model:
    name = Path(lora.path).name
    loaded, metadata = comfy.utils.load_torch_file(lora.path, safe_load=True, return_metadata=True)
    tensors = comfy.lora_convert.convert_lora(loaded)
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(tensors, key_map, log_missing=False)
    clone = model.clone()
    applied = set(clone.add_patches(patches, lora.strength))
    fitting = {str(key if isinstance(key, str) else key[0]) for key in applied}
    if not fitting:
        shown = ", ".join(sorted(tensors)[:3])
        raise InputError(
            f"{name}: none of its {len(tensors)} tensors ({shown}, ...) fits this model; it is a LoRA for another one"
        )
    wrong = misfits(clone.patches, getattr(model.model.diffusion_model, LINK).state_dict, MODEL_PREFIX)
    if wrong:
        raise InputError(f"{name}: it is a LoRA for another model: {'; '.join(wrong[:3])}")
    if metadata:
        clone.set_attachments(
            "lora_metadata", metadata
        )  # where nodes for IC-LoRAs look, as behind ComfyUI's own loader
    left = _unmatched(tensors, {name for name, target in key_map.items() if _name(target) in fitting})
    if left:
        logger.warning("%s: %d of %d tensors fit no layer: %s", name, len(left), len(tensors), ", ".join(left[:8]))
    return clone


def _name(target: str | tuple[object, ...]) -> str:
    return target if isinstance(target, str) else str(target[0])


def _unmatched(tensors: Mapping[str, object], known: set[str]) -> list[str]:
    """The tensors that belong to no layer of the model: their names begin with none of the layers'."""

    def belongs(key: str) -> bool:
        parts = key.split(".")
        return any(".".join(parts[:length]) in known for length in range(1, len(parts)))

    return sorted(key for key in tensors if not belongs(key))
