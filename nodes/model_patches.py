"""Nodes that change how a MODEL runs."""

from __future__ import annotations

from typing import Any

from rayltx.nodes import inputs
from rayltx.nodes.inputs import CATEGORY, Definition, Schema

_MEMORY = "Raylight/memory"
_MODEL: Definition = ("MODEL", {"tooltip": "An LTX model."})
_NUM_GPUS: Definition = (
    "INT",
    {"default": 2, "min": 1, "max": 64, "tooltip": "How many of the workers share the video."},
)
_VERBOSE: Definition = ("INT", {"default": 1, "min": 0, "max": 2, "tooltip": "0 leaves `info` empty."})
_CHUNKS_TOOLTIP = (
    "Parts in which the feed-forward runs. Its peak memory falls by about as much, and the result is the same. Parts of "
    "fewer than 512 tokens are not made."
)


class LTXChunkedFeedForward:
    CATEGORY = _MEMORY
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model with its feed-forward in parts.",)
    FUNCTION = "patch"
    DESCRIPTION = (
        "Runs the feed-forward of an LTX model over a part of the video's tokens at a time: the same result, with less memory. "
        "On any LTX MODEL, on one GPU or on the workers. Bypass it to remove it."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        tooltip = _CHUNKS_TOOLTIP + " 0 chooses by the size of the video."
        return {
            "required": {
                "model": _MODEL,
                "chunks": ("INT", {"default": 0, "min": 0, "max": 256, "tooltip": tooltip}),
            }
        }

    def patch(self, model: Any, chunks: int) -> tuple[Any]:
        from rayltx.comfy_dist.main_process.feed_forward_patch import with_chunked_feed_forward

        return (with_chunked_feed_forward(model, chunks),)


# The next three are for graphs made with other packs, which run as before: ComfyUI does not offer them for new graphs.


class TensorParallelV3Node:
    CATEGORY = _MEMORY
    DEPRECATED = True
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "info")
    OUTPUT_TOOLTIPS = ("The model with its feed-forward in parts.", "What was done.")
    FUNCTION = "patch"
    DESCRIPTION = "As LTX Chunked Feed-Forward, under the name that graphs for the LTX-2 memory nodes use."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {
            "required": {
                "model": _MODEL,
                "ffn_chunks": ("INT", {"default": 8, "min": 2, "max": 32, "tooltip": _CHUNKS_TOOLTIP}),
                "verbose": _VERBOSE,
            }
        }

    def patch(self, model: Any, ffn_chunks: int, verbose: int) -> tuple[Any, str]:
        from rayltx.comfy_dist.main_process.feed_forward_patch import with_chunked_feed_forward

        info = f"the feed-forward runs in up to {ffn_chunks} parts" if verbose else ""
        return with_chunked_feed_forward(model, ffn_chunks), info


class TensorParallelAttentionV2:
    CATEGORY = _MEMORY
    DEPRECATED = True
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "info")
    OUTPUT_TOOLTIPS = ("The model, shared by Ulysses.", "What was done.")
    FUNCTION = "patch"
    DESCRIPTION = "Shares a model from a Ray loader among workers by Ulysses, with the feed-forward in parts."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {
            "required": {
                "model": _MODEL,
                "num_gpus": _NUM_GPUS,
                "primary_gpu": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 63,
                        "tooltip": "Kept for older graphs: no worker is above the others.",
                    },
                ),
                "parallelize_ffn": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Run the feed-forward in ffn_chunks parts. It is shared in any case."},
                ),
                "ffn_chunks": ("INT", {"default": 8, "min": 4, "max": 32, "step": 2, "tooltip": _CHUNKS_TOOLTIP}),
                "verbose": _VERBOSE,
            }
        }

    def patch(
        self, model: Any, num_gpus: int, primary_gpu: int, parallelize_ffn: bool, ffn_chunks: int, verbose: int
    ) -> tuple[Any, str]:
        from rayltx.comfy_dist.main_process.memory_nodes import with_ulysses

        model, info = with_ulysses(model, num_gpus, ffn_chunks if parallelize_ffn else 1)
        return model, info if verbose else ""


class TensorParallelV5Node:
    CATEGORY = _MEMORY
    DEPRECATED = True
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "info")
    OUTPUT_TOOLTIPS = ("The model, shared by ring attention.", "What was done.")
    FUNCTION = "patch"
    DESCRIPTION = (
        "Shares a model from a Ray loader by ring attention among all of num_gpus but GPU 0, which stays with the text encoder "
        "and the VAE."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {"required": {"model": _MODEL, "num_gpus": _NUM_GPUS, "verbose": _VERBOSE}}

    def patch(self, model: Any, num_gpus: int, verbose: int) -> tuple[Any, str]:
        from rayltx.comfy_dist.main_process.memory_nodes import with_ring

        model, info = with_ring(model, num_gpus)
        return model, info if verbose else ""


class RayModelSamplingLTXV:
    CATEGORY = f"{CATEGORY}/extra"
    RETURN_TYPES = ("RAY_ACTORS",)
    RETURN_NAMES = ("ray_actors",)
    OUTPUT_TOOLTIPS = ("The workers, with the shift.",)
    FUNCTION = "patch"
    DESCRIPTION = "ComfyUI's ModelSamplingLTXV, for RAY_ACTORS."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        shift = {"min": 0.0, "max": 100.0, "step": 0.01}
        return {
            "required": {
                "ray_actors": inputs.RAY_ACTORS,
                "max_shift": (
                    "FLOAT",
                    {"default": 2.05, **shift, "tooltip": "The shift towards noise of a long video."},
                ),
                "base_shift": (
                    "FLOAT",
                    {"default": 0.95, **shift, "tooltip": "The shift towards noise of a short video."},
                ),
            },
            "optional": {"latent": ("LATENT", {"tooltip": "The latent whose size decides. Without it, 4096 tokens."})},
        }

    def patch(self, ray_actors: Any, max_shift: float, base_shift: float, latent: Any = None) -> tuple[Any]:
        from rayltx.comfy_dist.main_process.comfy_nodes import LIGHTRICKS, call_node

        model = call_node(
            LIGHTRICKS,
            "ModelSamplingLTXV",
            model=ray_actors.model,
            max_shift=max_shift,
            base_shift=base_shift,
            latent=latent,
        )[0]
        return (ray_actors.with_model(model),)
