"""Every attribute that RayLTX puts on an object of ComfyUI's, and how a MODEL of ours is told from others by one.

But for what the seam puts there for the time of one forward, and into the options of a call: that is named at the top of
`diffusion_models.lightricks.comfyui_host`, which knows no other part of ComfyUI. Needs no Ray.
"""

from __future__ import annotations

from rayltx.comfy_dist.comfy_types import Model

# In ComfyUI's process.
LINK = "rayltx_link"  # of a twin's diffusion model, and of its modules that prepare text: its WorkerLink
MODULE_NAME = "rayltx_module_name"  # of a twin's module that prepares text: its name within the model
PLACEMENT = "rayltx_placement"  # attachment of a twin's patcher: where this MODEL runs
OBJECT_BACKUP = "rayltx_object_backup"  # of a twin's BaseModel: what object patches of any MODEL on it replaced
CHUNKED_FEED_FORWARD = "rayltx_chunked_feed_forward"  # key of the wrapper that chunks a MODEL's feed-forward

# In a worker.
PATCH_DTYPE = "rayltx_patch_dtype"  # of a BaseModel: in what patches of quantised weights are computed
HOOK_VIEWS = "rayltx_hook_views"  # of a BaseModel: the views in whose place hooks have a private copy
HOOKS_AT_USE = "rayltx_hooks_at_use"  # of a BaseModel: patches of the hooks that are on, for quantised weights
STREAMING = "rayltx_streaming"  # of a BaseModel: the BlockStreaming of its blocks
LOW_RANK_PATCHES = "rayltx_low_rank_patches"  # of a quantised layer: its LoRAs, which are forward hooks


def is_twin(model: Model) -> bool:
    """Whether a MODEL's weights are with the workers."""
    return hasattr(getattr(model.model, "diffusion_model", None), LINK)
