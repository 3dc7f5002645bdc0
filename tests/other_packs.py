"""Nodes of other packs that touch a MODEL, a guider or a sampler, run on ComfyUI's own MODEL and on the workers' alike.

Packs are looked for in the folder RAYLTX_PACKS_PATH, or ~/comfy/packs. Nodes are found by what they take and give: one that
needs nothing but a model, conditionings, latents and what has a default is tried with its defaults.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import traceback
from dataclasses import dataclass
from pathlib import Path

import comfy_scenarios as scenarios
import torch

from rayltx.diffusion_models.lightricks.relative_error import relative_error, worst_error
from rayltx.errors import RayLTXError

PACKS = {"ComfyUI-KJNodes": "KJNodes", "ComfyUI-LTXVideo": "Lightricks"}
OF_OTHER_MODELS = ("Wan", "Hunyuan", "Hunuyan", "Flux", "Krea", "Ideogram", "MiniMax", "NABLA", "QwenImage", "PiD")
LEFT_OUT = (
    "ModelSaveKJ", "CheckpointPerturbWeights", "VRAM_Debug", "GetPreviewOverrideFramesKJ", "GenerateNoise",
    "LTXVSetAudioVideoMaskByTime", "LTXQ8Patch", "LTXVQ8LoraModelLoader",
)  # fmt: skip
# Values without a default, or whose default does nothing.
GIVEN = {
    "LTXVChunkFeedForward": {"chunks": 2, "dim_threshold": 1},
    "LTX2AttentionTunerPatch": {"video_scale": 1.1, "blocks": ""},
    "LTXVApplySTG": {"block_indices": "1"},
    "STGGuider": {"cfg": 3.0, "stg": 1.0, "rescale": 0.7},
    "STGGuiderNode": {"cfg": 3.0, "stg": 1.0, "rescale": 0.7},
    "LTXPerturbedAttention": {"layers": "1"},
    "LTXVEnhanceAVideoKJ": {"weight": 4.0},
}
# Types that another node of the pack gives, and what that is told.
MADE = {"GUIDER_PARAMETERS": {"modality": "VIDEO", "cfg": 3.0, "stg": 1.0}, "ATTN_OVERRIDE": {"layers": "1"}}
# Nodes that work on what another one has left on the MODEL.
AFTER = {"STGGuider": "LTXVApplySTG", "STGGuiderNode": "LTXVApplySTG"}
LAST = ("ModifyLTXModel",)  # exchanges the class of the MODEL's modules, which stays so


def packs_folder() -> Path:
    return Path(os.environ.get("RAYLTX_PACKS_PATH", Path.home() / "comfy" / "packs"))


def load_packs() -> dict[str, list[str]]:
    """Import the packs that are there into this process's ComfyUI. Returns the names of their nodes; [] for one that fails."""
    nodes, server = importlib.import_module("nodes"), importlib.import_module("server")
    found = {}

    async def load() -> None:
        if getattr(server.PromptServer, "instance", None) is None:
            server.PromptServer(asyncio.get_running_loop())
        for folder, name in PACKS.items():
            path = packs_folder() / folder
            if path.is_dir():
                before = set(nodes.NODE_CLASS_MAPPINGS)
                await nodes.load_custom_node(str(path), module_parent="custom_nodes")
                found[name] = sorted(set(nodes.NODE_CLASS_MAPPINGS) - before)

    loop = asyncio.new_event_loop()  # which stays open: nodes tell the server's clients what they do
    loop.run_until_complete(load())
    return {name: sorted(names, key=lambda node: node in LAST) for name, names in found.items()}


def _types_of(node) -> dict[str, tuple]:
    """(type, its options, whether it is required) of each input."""
    schema = node.INPUT_TYPES()
    return {
        name: (spec[0], spec[1] if len(spec) > 1 else {}, kind == "required")
        for kind in ("required", "optional")
        for name, spec in schema.get(kind, {}).items()
    }


def touches_models(node) -> bool:
    takes = {str(spec[0]) for spec in _types_of(node).values()}
    return bool(takes & {"MODEL", "GUIDER"}) and bool(
        {"MODEL", "GUIDER", "SAMPLER", "LATENT"} & set(map(str, node.RETURN_TYPES))
    )


@dataclass
class Row:
    """What came of a node. error: relative, against ComfyUI's own MODEL; effect: of the node, on that."""

    pack: str
    node: str
    version: str
    effect: float = float("nan")
    error: float = float("nan")
    verdict: str = ""

    @property
    def is_wrong(self) -> bool:
        return self.verdict == "differs" or self.verdict.startswith("fails")

    def __str__(self) -> str:
        effect, error = ("" if value != value else f"{value:.1e}" for value in (self.effect, self.error))
        return f"| {self.pack} | {self.node} | {self.version} | {effect} | {error} | {self.verdict} |"


class NoInput(Exception):
    """The tests have nothing to give to an input of this type."""


class Trial:
    """One version of the model, on which nodes are tried."""

    def __init__(self, version, config, whole, twin, vae):
        self.version, self.config, self.whole, self.twin, self.vae = version, config, whole, twin, vae
        self.plain = self._sample(whole)

    def try_node(self, pack: str, name: str) -> Row:
        row = Row(pack, name, self.version)
        try:
            expected = self._run(name, self.whole)
        except NoInput as error:
            row.verdict = f"not tried: nothing to give to {error}"
            return row
        except Exception as error:
            row.verdict = f"ComfyUI's own MODEL does not run it: {_first_line(error)}"
            return row
        if len(expected) == len(self.plain) and all(a.shape == b.shape for a, b in zip(expected, self.plain)):
            row.effect = max(map(relative_error, expected, self.plain))
        try:
            out = self._run(name, self.twin)
        except RayLTXError as error:
            row.verdict = f"refused: {_first_line(error)}"
            return row
        except Exception as error:
            traceback.print_exc()
            row.verdict = f"fails: {_first_line(error)}"
            return row
        row.error = worst_error(out, expected) if len(out) == len(expected) else float("inf")
        row.verdict = "equal" if row.error <= 2e-5 else "differs"
        return row

    def _run(self, name: str, model) -> list[torch.Tensor]:
        """What comes of sampling with what a node makes of a MODEL."""
        with torch.inference_mode():
            torch.manual_seed(0)
            node = importlib.import_module("nodes").NODE_CLASS_MAPPINGS[name]
            model = model.clone()
            if name in AFTER:
                before = importlib.import_module("nodes").NODE_CLASS_MAPPINGS[AFTER[name]]
                model = _call(before, self._inputs(before, AFTER[name], model))[0]
            outputs = _call(node, self._inputs(node, name, model))
            kinds = list(map(str, node.RETURN_TYPES))
            if "MODEL" in kinds:
                return self._sample(outputs[kinds.index("MODEL")])
            if "GUIDER" in kinds:
                return self._sample(model, guider=outputs[kinds.index("GUIDER")])
            if "SAMPLER" in kinds:
                return self._sample(model, sampler=outputs[kinds.index("SAMPLER")])
            return scenarios.tensors_of(outputs[kinds.index("LATENT")])

    def _work(self):
        return scenarios.Workspace(self.version, self.config)

    def _inputs(self, node, name: str, model) -> dict:
        work, given = self._work(), GIVEN.get(name, {})
        custom = "comfy_extras.nodes_custom_sampler"
        values = {
            "MODEL": lambda key: model,
            "CONDITIONING": lambda key: work.negative if "neg" in key else work.positive,
            "LATENT": lambda key: work.latent(),
            "VAE": lambda key: self.vae,
            "SIGMAS": lambda key: self._sigmas(),
            "SAMPLER": lambda key: scenarios.node(custom, "KSamplerSelect")(sampler_name="euler")[0],
            "NOISE": lambda key: scenarios.node(custom, "RandomNoise")(noise_seed=5)[0],
            "MASK": lambda key: torch.ones(1, 32 * scenarios.HEIGHT, 32 * scenarios.WIDTH),
            "GUIDER": lambda key: scenarios.node(custom, "CFGGuider")(
                model=model, positive=work.positive, negative=work.negative, cfg=3.0
            )[0],
        }
        inputs = {}
        for key, (kind, options, is_required) in _types_of(node).items():
            if key in given:
                inputs[key] = given[key]
            elif isinstance(kind, list) or kind == "COMBO":
                choices = kind if isinstance(kind, list) else options.get("options", [])
                if not choices and is_required:
                    raise NoInput(f"{key}, a list of files")
                if choices:
                    default = options.get("default")
                    inputs[key] = default if default in choices else choices[0]
            elif kind in ("INT", "FLOAT", "BOOLEAN", "STRING", "FLOAT,INT"):
                if is_required or "default" in options:
                    inputs[key] = options.get(
                        "default", {"STRING": "", "BOOLEAN": False}.get(kind, options.get("min", 1))
                    )
            elif not is_required and kind not in MADE and kind != "CONDITIONING":
                continue
            elif kind in values:
                inputs[key] = values[kind](key)
            elif kind in MADE:
                known = importlib.import_module("nodes").NODE_CLASS_MAPPINGS.values()
                makers = [maker for maker in known if list(maker.RETURN_TYPES) == [kind]]
                if not makers:
                    raise NoInput(kind)
                inputs[key] = _call(makers[0], {**_defaults(makers[0]), **MADE[kind]})[0]
            else:
                raise NoInput(kind)
        return inputs

    def _sigmas(self):
        return scenarios.node("comfy_extras.nodes_lt", "LTXVScheduler")(
            steps=scenarios.STEPS,
            max_shift=2.05,
            base_shift=0.95,
            stretch=True,
            terminal=0.1,
            latent=self._work().video,
        )[0].clone()

    def _sample(self, model, guider=None, sampler=None):
        work, custom = self._work(), "comfy_extras.nodes_custom_sampler"
        with torch.inference_mode():
            if guider is None:
                guider = scenarios.node(custom, "CFGGuider")(
                    model=model, positive=work.positive, negative=work.negative, cfg=3.0
                )[0]
            sampler = sampler or scenarios.node(custom, "KSamplerSelect")(sampler_name="euler")[0]
            out = scenarios.node(custom, "SamplerCustomAdvanced")(
                noise=scenarios.node(custom, "RandomNoise")(noise_seed=5)[0], guider=guider, sampler=sampler,
                sigmas=self._sigmas(), latent_image=work.latent(),
            )[0]  # fmt: skip
            return scenarios.tensors_of(out)


def _defaults(node) -> dict:
    found = {}
    for key, (kind, options, is_required) in _types_of(node).items():
        if isinstance(kind, list) or kind == "COMBO":
            choices = kind if isinstance(kind, list) else options.get("options", [None])
            found[key] = options.get("default", choices[0])
        elif is_required and kind in ("INT", "FLOAT", "BOOLEAN", "STRING"):
            found[key] = options.get("default", {"STRING": "", "BOOLEAN": False}.get(kind, 1))
    return found


def _call(node, inputs: dict) -> tuple:
    if hasattr(node, "define_schema"):
        return tuple(node.EXECUTE_NORMALIZED(**inputs).result)
    return tuple(getattr(node(), node.FUNCTION)(**inputs))


def _first_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return text[:160].replace("|", "/")
