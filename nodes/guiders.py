"""ComfyUI's guiders, for RAY_ACTORS."""

from __future__ import annotations

from typing import Any

from rayltx.nodes import inputs
from rayltx.nodes.inputs import Schema


class _RayGuiderNode:
    CATEGORY = f"{inputs.CUSTOM_SAMPLING}/guiders"
    RETURN_TYPES = ("RAY_GUIDER",)
    RETURN_NAMES = ("guider",)
    OUTPUT_TOOLTIPS = ("For XFuser SamplerCustom Advanced.",)
    FUNCTION = "get_guider"
    GUIDER = ""  # ComfyUI's node

    def get_guider(self, ray_actors: Any, **settings: Any) -> tuple[Any]:
        from rayltx.comfy_dist.main_process.comfy_nodes import CUSTOM_SAMPLING, call_node
        from rayltx.comfy_dist.main_process.ray_values import RayGuider

        guider = call_node(CUSTOM_SAMPLING, self.GUIDER, model=ray_actors.model, **settings)[0]
        return (RayGuider(guider, ray_actors),)


class RayBasicGuider(_RayGuiderNode):
    GUIDER = "BasicGuider"
    DESCRIPTION = "ComfyUI's BasicGuider on the workers: one text, no guidance."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {"required": {"ray_actors": inputs.RAY_ACTORS, "conditioning": inputs.POSITIVE}}


class RayCFGGuider(_RayGuiderNode):
    GUIDER = "CFGGuider"
    DESCRIPTION = "ComfyUI's CFGGuider on the workers."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {
            "required": {
                "ray_actors": inputs.RAY_ACTORS,
                "positive": inputs.POSITIVE,
                "negative": inputs.NEGATIVE,
                "cfg": inputs.cfg(),
            }
        }


class RayDualCFGGuider(_RayGuiderNode):
    GUIDER = "DualCFGGuider"
    DESCRIPTION = "ComfyUI's DualCFGGuider on the workers: two texts and a negative one."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {
            "required": {
                "ray_actors": inputs.RAY_ACTORS,
                "cond1": inputs.POSITIVE,
                "cond2": ("CONDITIONING", {"tooltip": "A second text, which the first is set off against."}),
                "negative": inputs.NEGATIVE,
                "cfg_conds": (
                    "FLOAT",
                    {**inputs.cfg()[1], "tooltip": "How strongly the first text counts over the second."},
                ),
                "cfg_cond2_negative": (
                    "FLOAT",
                    {**inputs.cfg()[1], "tooltip": "How strongly the second text counts over the negative one."},
                ),
                "style": (["regular", "nested"], {"tooltip": "How the two guidances are combined."}),
            }
        }
