"""The chunked feed-forward on any LTX MODEL of ComfyUI's. Needs no Ray."""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension

from rayltx.comfy_dist.comfy_types import Model
from rayltx.comfy_dist.marks import CHUNKED_FEED_FORWARD, is_twin
from rayltx.diffusion_models.lightricks.comfyui_host import chunked
from rayltx.diffusion_models.lightricks.feed_forward import CHUNKS_OPTION
from rayltx.errors import InputError


def with_chunked_feed_forward(model: Model, chunks: int) -> Model:
    """A clone of the MODEL whose feed-forwards run over slices of the tokens. The given one stays as it is.

    chunks: 0 chooses by the number of tokens. Nothing is changed on the modules but for the time of a forward.
    Raises InputError for a model that is not LTX.
    """
    kind = getattr(model.model, "diffusion_model", None)
    if not all(hasattr(kind, name) for name in ("transformer_blocks", "patchify_proj", "adaln_single")):
        raise InputError(
            f"this MODEL is a {type(kind).__name__}, not an LTX transformer, whose feed-forward this node knows; connect the "
            "MODEL of an LTX checkpoint"
        )
    clone = model.clone()
    clone.model_options["transformer_options"][CHUNKS_OPTION] = chunks
    if not is_twin(model):  # the workers read the option themselves
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        clone.remove_wrappers_with_key(kind, CHUNKED_FEED_FORWARD)
        clone.add_wrapper_with_key(kind, CHUNKED_FEED_FORWARD, _chunked_forward)
    return clone


def _chunked_forward(executor: Any, *args: Any, **kwargs: Any) -> object:
    options = kwargs.get("transformer_options") or next(
        (a for a in args if isinstance(a, dict) and CHUNKS_OPTION in a), {}
    )
    with chunked(executor.class_obj, options.get(CHUNKS_OPTION, 1)):
        return executor(*args, **kwargs)
