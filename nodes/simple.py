"""One node for a first graph: the model of a file on all GPUs, and what else the file holds."""

from __future__ import annotations

import logging
import os
from typing import Any

from rayltx.nodes.inputs import BEGINNING, CATEGORY, DEVICE, MAX_VRAM, MAX_WORKERS, WEIGHT_DTYPE, Schema, advanced
from rayltx.nodes.model_files import GGUF, file_names, gguf_folders, path_of
from rayltx.nodes.requirements_check import require_packages

logger = logging.getLogger(__name__)

FROM_THE_FILE = "from the file"
# Every degree left open: they are chosen by the number of GPUs.
_AUTOMATIC = {"ulysses_degree": 0, "ring_degree": 0, "cfg_degree": 0, "dp_degree": 0}


def _folders() -> tuple[str, ...]:
    return ("checkpoints", "diffusion_models", *gguf_folders())


def _model_names() -> list[str]:
    """Those that look like LTX first, since the first one is chosen in a new node."""
    return sorted(file_names(_folders()), key=lambda name: "ltx" not in name.lower())


def _vae(path: str, vae_name: str, placement: Any, node: object) -> Any:
    """The node's VAE, on the workers. Where the model file, at `path`, has none, one that says so when it is used."""
    from rayltx.comfy_dist.main_process.checkpoint_parts import vae_of
    from rayltx.comfy_dist.main_process.ray_values import load_vae

    if vae_name != FROM_THE_FILE:
        return load_vae(path_of(vae_name, ("vae",)), "auto", placement.request, node)
    remedy = (
        "choose one of models/vae in vae_name of LTX on several GPUs, which is one of its advanced inputs, or use that of Load "
        "VAE"
    )
    return vae_of(path, placement, node, remedy)


class RayLTX:
    """A model on several GPUs, by what one knows without reading: the file, and how many GPUs."""

    CATEGORY = CATEGORY
    SEARCH_ALIASES = BEGINNING
    RETURN_TYPES = ("MODEL", "VAE", "CLIP", "STRING")
    RETURN_NAMES = ("model", "vae", "clip", "info")
    OUTPUT_TOOLTIPS = (
        "For every node of ComfyUI that takes a MODEL.",
        "The VAE of the file, or the chosen one, on the workers.",
        "The text encoder of the file; none where the file has none.",
        "What was chosen: the GPUs, and how they share the work.",
    )
    FUNCTION = "load"
    _parts: Any = None  # of the last run's file
    DESCRIPTION = (
        "Runs an LTX model on several GPUs. Takes the place of Load Checkpoint, Load Diffusion Model and a GGUF loader; "
        "everything behind it stays as it is."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {
            "required": {
                "model_name": (
                    _model_names(),
                    {"tooltip": "An LTX model, from models/checkpoints, models/diffusion_models or models/unet."},
                ),
                "gpus": (
                    "INT",
                    {
                        "default": 0, "min": 0, "max": MAX_WORKERS,
                        "tooltip": "How many GPUs work on one video. 0: all that ComfyUI sees; without a GPU, one worker.",
                    },
                ),
            },
            "optional": {
                "weight_dtype": advanced(WEIGHT_DTYPE),
                "max_vram_gb": advanced(MAX_VRAM),
                "device": advanced(DEVICE),
                "vae_name": advanced(
                    (
                        [FROM_THE_FILE, *file_names(("vae",))],
                        {
                            "default": FROM_THE_FILE,
                            "tooltip": "Where the VAE comes from: the model's own file, or one of models/vae.",
                        },
                    )
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }  # fmt: skip

    def load(
        self, model_name: str, gpus: int, weight_dtype: str = "default", max_vram_gb: float = 0.0, device: str = "auto",
        vae_name: str = FROM_THE_FILE, unique_id: str | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        require_packages()
        from rayltx.comfy_dist.main_process.checkpoint_parts import AbsentVAE, CheckpointParts, is_bundle
        from rayltx.comfy_dist.main_process.initializer_settings import start_workers
        from rayltx.comfy_dist.main_process.ray_values import kept_by, load_actors

        path = path_of(model_name, _folders())
        _check_dtype(path, weight_dtype)
        self._forget_other_parts(path)
        placement = start_workers(GPU=gpus, gpu_input="gpus", device=device, **_AUTOMATIC)
        actors = load_actors(path, placement, (), max_vram_gb, kept_by(self), weight_dtype=weight_dtype)
        if self._parts is None and is_bundle(path):
            self._parts = CheckpointParts.of(path)
        vae = _vae(path, vae_name, placement, self)
        clip = None if self._parts is None else self._parts.clip
        info = _info(path, placement, vae_name, not isinstance(vae, AbsentVAE), clip is not None)
        logger.info("%s", info.replace("\n", "; "))
        _show(f"{_workers(placement)}:\n{placement.config}", unique_id)
        return actors.model, vae, clip, info

    def _forget_other_parts(self, path: str) -> None:
        """Before the model is loaded: the memory of the last file's text encoder may be needed for this one."""
        from rayltx.comfy_dist.main_process.loaded_models import FileState

        if self._parts is not None and self._parts.source != FileState.of(path):
            self._parts = None


def _check_dtype(path: str, weight_dtype: str) -> None:
    """Raises UnsupportedError for a GGUF file that was to be of another dtype."""
    from rayltx.errors import UnsupportedError

    if path.lower().endswith(GGUF) and weight_dtype != "default":
        raise UnsupportedError(
            f'weight_dtype="{weight_dtype}": the blocks of a GGUF file stay as they are; set weight_dtype to default'
        )


def _info(path: str, placement: Any, vae_name: str, has_vae: bool, has_clip: bool) -> str:
    """Two lines: who works on it and how they share it; where the rest comes from."""
    if vae_name == FROM_THE_FILE:
        vae = "VAE from the file" if has_vae else "no VAE in the file"
    else:
        vae = f"VAE {vae_name}"
    clip = "text encoder from the file" if has_clip else "no text encoder in the file"
    return f"{os.path.basename(path)} on {_workers(placement)}: {placement.config}\n{vae}, {clip}"


def _workers(placement: Any) -> str:
    request = placement.request
    return f"{request.workers} worker{'s' if request.workers > 1 else ''} ({request.device})"


def _show(text: str, node_id: str | None) -> None:
    """On the node itself, as ComfyUI's own nodes show what they are told. There is room for two short lines."""
    if node_id is not None:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, node_id)
