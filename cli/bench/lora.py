"""`rayltx bench lora`: what a change of patches costs, with what proves the patches: the first step after it against later ones.

Samples on CPU ranks with ComfyUI's Euler. For each kind of patch, when it is new and when it has been seen, it is the time
before the second step begins, less a later step's. The patches of each round are new.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rayltx.cli.bench.measurements import Arm, Clock, Measurement
from rayltx.cli.bench.report import Output, at_least, reporting
from rayltx.comfy_dist.comfy_environment import check_comfyui
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.errors import InputError
from rayltx.sequence_parallel.partition import ParallelConfig

_HEADS, _STEPS, _TEXT_TOKENS = 16, 4, 32
_NEW, _SEEN, _STEP = (
    "before the second step, less a step: new",
    "before the second step, less a step: seen before",
    "a step",
)


@dataclass(frozen=True)
class LoraOptions:
    workers: int
    rounds: int
    layers: int
    model_width: int
    width: int
    height: int
    frames: int
    comfyui: Path


def run_lora(options: LoraOptions, output: Output) -> None:
    """Print. Raises InputError."""
    at_least(workers=(options.workers, 1), rounds=(options.rounds, 1), layers=(options.layers, 2))
    if options.model_width < 1 or options.model_width % (8 * _HEADS):
        raise InputError(f"model-width={options.model_width} must be a multiple of {8 * _HEADS}; try {8 * _HEADS}")
    shape = LatentShape.from_pixels(options.width, options.height, options.frames)
    check_comfyui(options.comfyui)
    from rayltx.cli.bench.comfyui_sampling import sample, with_lora
    from rayltx.comfy_dist.main_process.headless import comfyui_cluster

    with (
        reporting("lora", vars(options), output, options.workers, options.comfyui) as report,
        tempfile.TemporaryDirectory() as folder,
        comfyui_cluster(options.comfyui, ClusterRequest(workers=options.workers)) as cluster,
    ):
        from rayltx.comfy_dist.main_process.placement import Placement
        from rayltx.comfy_dist.main_process.twin import load_twin
        from rayltx.comfy_dist.tiny_checkpoints import save_tiny_checkpoint

        path = Path(folder) / "model.safetensors"
        save_tiny_checkpoint(
            path, "LTX-Video", num_layers=options.layers, cross_attention_dim=options.model_width,
            num_attention_heads=_HEADS, attention_head_dim=options.model_width // _HEADS,
        )  # fmt: skip
        twin = load_twin(str(path), Placement(cluster.request, ParallelConfig(options.workers)))
        kinds: dict[str, Callable[[int], Any]] = {
            "nothing": lambda number: twin.clone(),
            "a LoRA": lambda number: with_lora(twin, options.model_width, number),
            "a patch on each block": lambda number: _on_blocks(twin, number),
            "a module shown all tokens": lambda number: _on_a_module(twin, number),
        }

        def times(model: Any) -> tuple[float, float]:
            first, later = sample(model, (1, 128, shape.frames, shape.height, shape.width), _TEXT_TOKENS, _STEPS)
            return first - later, later

        report.found["the first sampling of a model that was just loaded, less a step, in seconds"] = times(twin)[0]
        samples: dict[str, dict[str, list[float]]] = {
            _NEW: defaultdict(list),
            _SEEN: defaultdict(list),
            _STEP: defaultdict(list),
        }
        for number in range(1, options.rounds + 1):
            for name, patched in kinds.items():
                model = patched(number)
                for when in (_NEW, _SEEN):
                    extra, step = times(model)
                    samples[when][name].append(extra)
                    samples[_STEP][name].append(step)
                    times(twin)  # the patches go, and come back
        for what, by_kind in samples.items():
            arms = tuple(Arm(name, tuple(each)) for name, each in by_kind.items())
            report.measurements.append(Measurement(what, "s", Clock.WALL, arms, has_ratios=what == _STEP))


class _Scaled:
    """Of a block, what it adds up to."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, arguments: Any, extra: Any) -> dict[str, Tensor]:
        return {"img": extra["original_block"](arguments)["img"] * self.factor}


def _on_blocks(model: Any, number: int) -> Any:
    """As packs for guidance and caching make them: one for each block."""
    model = model.clone()
    for block in range(len(model.model.diffusion_model.transformer_blocks)):
        model.set_model_patch_replace(_Scaled(1.0 + 0.001 * number), "dit", "double_block", block)
    return model


def _on_a_module(model: Any, number: int) -> Any:
    """A forward that looks at all tokens, which is shown them."""
    model = model.clone()
    name = "diffusion_model.transformer_blocks.0.ff"
    feed_forward = model.get_model_object(name)

    def forward(x: Tensor) -> Tensor:
        out = type(feed_forward).forward(feed_forward, x)
        return out / (out.std(dim=1, keepdim=True) + number)

    model.add_object_patch(f"{name}.forward", forward)
    return model
