"""`rayltx bench memory`: peak memory of one rank's forward of ComfyUI's model, against the number of ranks.

The model is narrower than the real one (8 heads as wide as LTX-2's) and image-to-video, so that timesteps differ. What a
forward adds to a process's memory at its peak is measured, beyond weights and inputs. A table or a mask of full length on any
rank would keep it from falling with the number of ranks. Needs Linux.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rayltx.cli.bench.measurements import Arm, Clock, Measurement
from rayltx.cli.bench.ranks import on_ranks
from rayltx.cli.bench.report import Output, at_least, reporting
from rayltx.cli.bench.small_models import comfyui_model, enter_comfyui
from rayltx.comfy_dist.comfy_environment import check_comfyui
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.tiny_configs import COMFYUI_CONFIGS
from rayltx.errors import InputError
from rayltx.sequence_parallel.group import SequenceParallelGroup

_HEADS = 8
_TEXT_TOKENS = 128
_CLEAR_REFS = Path("/proc/self/clear_refs")  # where the kernel takes the wish to count the peak anew


@dataclass(frozen=True)
class MemoryOptions:
    model: str
    ranks: Sequence[int]
    width: int
    height: int
    frames: int
    layers: int
    comfyui: Path


def run_memory(options: MemoryOptions, output: Output) -> None:
    """Print. Raises InputError."""
    at_least(layers=(options.layers, 1))
    if options.model not in COMFYUI_CONFIGS:
        raise InputError(f"model={options.model} must be one of {', '.join(COMFYUI_CONFIGS)}")
    shape = LatentShape.from_pixels(options.width, options.height, options.frames)
    check_comfyui(options.comfyui)
    if not _CLEAR_REFS.exists():
        raise InputError(f"a process's peak memory cannot be counted anew here (no {_CLEAR_REFS}); use Linux")
    with reporting("memory", vars(options), output, max(options.ranks), options.comfyui) as report:
        arms = []
        for ranks in options.ranks:
            peaks = [peak / 2**20 for peak in on_ranks(_measure, ranks, options, shape)]
            arms.append(Arm("1 rank" if ranks == 1 else f"the most on one of {ranks}", (max(peaks),)))
            report.found[f"MiB on each of {ranks}"] = [round(peak, 1) for peak in peaks]
        what = f"peak of a forward of a narrow {options.model}, {shape.num_tokens} video tokens, on a rank"
        report.measurements.append(Measurement(what, "MiB", Clock.NONE, tuple(arms)))
        report.remarks.append("beyond weights and inputs; float32")


def _measure(group: SequenceParallelGroup, options: MemoryOptions, shape: LatentShape) -> int:
    """Bytes."""
    enter_comfyui(options.comfyui)
    from rayltx.diffusion_models.lightricks.comfyui_host import sharded

    config = {
        **COMFYUI_CONFIGS[options.model], "num_layers": options.layers, "num_attention_heads": _HEADS,
        "attention_head_dim": 128, "cross_attention_dim": 128 * _HEADS,
    }  # fmt: skip
    if options.model != "LTX-Video":
        config.update(
            audio_num_attention_heads=_HEADS, audio_attention_head_dim=64, audio_cross_attention_dim=64 * _HEADS
        )
    model = comfyui_model(options.model, config)
    arguments, keywords = _inputs(model, shape)
    with torch.inference_mode(), sharded(model, group) if group.world_size > 1 else contextlib.nullcontext():
        model(*arguments, **keywords)  # what is made on first use
        before = _begin_peak()
        model(*arguments, **keywords)
        return _memory("VmHWM") - before


def _inputs(model: Any, shape: LatentShape) -> tuple[tuple[Any, ...], dict[str, Any]]:
    from rayltx.comfy_dist.model_spec import has_audio, text_width

    video = torch.randn(1, 128, shape.frames, shape.height, shape.width)
    mask = torch.ones(1, 1, shape.frames, shape.height, shape.width)
    mask[:, :, 0] = 0.0
    timestep = model.patchifier.patchify(mask * 0.8)[0]
    keywords = {
        "context": torch.randn(1, _TEXT_TOKENS, text_width(model)),
        "attention_mask": torch.ones(1, _TEXT_TOKENS, dtype=torch.int64),
        "frame_rate": 25.0, "denoise_mask": mask, "transformer_options": {},
    }  # fmt: skip
    if not has_audio(model):
        return (video, timestep), keywords
    audio = torch.randn(1, 8, shape.frames * 8, 16)
    return ([video, audio], (timestep, torch.tensor([0.8]))), keywords


def _begin_peak() -> int:
    """Make the peak the present, which is returned."""
    from rayltx.distributed_worker.freed_memory import give_back_freed_memory

    give_back_freed_memory()
    _CLEAR_REFS.write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
