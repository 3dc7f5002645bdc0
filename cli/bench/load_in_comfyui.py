"""`rayltx bench load --comfyui`: workers' memory on ComfyUI's model: loaded, unloaded, loaded again, LoRA on and off.

Physical memory as in `load`, above what the interpreters take once they have sampled a small model: ComfyUI imports much of
itself only then.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from rayltx.cli.bench.measurements import Arm, Clock, Measurement
from rayltx.cli.bench.report import Output, at_least, reporting
from rayltx.comfy_dist.comfy_environment import check_comfyui
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.errors import InputError
from rayltx.expansion.comfyui_gguf.convert import convert
from rayltx.sequence_parallel.partition import ParallelConfig

_WIDTH, _HEADS = 2048, 32  # of LTX-Video 2B
_SMALL_WIDTH = 96
_WEIGHT_BYTES = {None: 4.0, "Q8_0": 34 / 32, "Q4_0": 18 / 32}
_SHAPE, _TEXT_TOKENS, _STEPS = (1, 128, 2, 4, 4), 8, 2


@dataclass(frozen=True)
class LoadInComfyUIOptions:
    gib: float
    workers: int
    type: str | None
    changes: int
    comfyui: Path


def run_load_in_comfyui(options: LoadInComfyUIOptions, output: Output) -> None:
    """Print. Raises InputError."""
    at_least(gib=(options.gib, 0.001), workers=(options.workers, 1), changes=(options.changes, 1))
    if options.type not in _WEIGHT_BYTES:
        raise InputError(f"type={options.type} must be Q8_0 or Q4_0, for a GGUF file; without, it is float32")
    check_comfyui(options.comfyui)
    from rayltx.cli.bench.comfyui_sampling import sample, with_lora
    from rayltx.comfy_dist.main_process.headless import comfyui_cluster

    with (
        reporting("load", vars(options), output, options.workers, options.comfyui) as report,
        tempfile.TemporaryDirectory() as folder,
        comfyui_cluster(options.comfyui, ClusterRequest(workers=options.workers)) as cluster,
    ):
        from rayltx.comfy_dist.main_process.placement import Placement
        from rayltx.comfy_dist.main_process.twin import load_twin

        placement = Placement(cluster.request, ParallelConfig(options.workers))
        small = load_twin(str(_checkpoint(Path(folder) / "small", options.type)), placement)
        sample(with_lora(small, _SMALL_WIDTH, 0), _SHAPE, _TEXT_TOKENS, _STEPS)
        small.link.remote.release()
        interpreters = sum(cluster.memory())

        layers = max(2, -(-int(options.gib * 2**30) // int(16 * _WIDTH**2 * _WEIGHT_BYTES[options.type])))
        path = _checkpoint(
            Path(folder) / "model", options.type, num_layers=layers, num_attention_heads=_HEADS,
            attention_head_dim=_WIDTH // _HEADS, cross_attention_dim=_WIDTH,
        )  # fmt: skip
        size = path.stat().st_size
        arms = []

        def look(when: str) -> None:
            arms.append(Arm(when, ((sum(cluster.memory()) - interpreters) / size,)))

        def sample_it(model: object) -> None:
            sample(model, _SHAPE, _TEXT_TOKENS, _STEPS)

        twin = load_twin(str(path), placement)
        digest = twin.link.remote.digest()
        look("loaded, every byte read")
        sample_it(twin)
        look("sampled")
        twin.link.memory.unload()
        look("unloaded")
        sample_it(twin)
        look("sampled again")
        for change in range(options.changes):
            sample_it(with_lora(twin, _WIDTH, change))
            if change == 0:
                look("with a LoRA on 2 layers")
            sample_it(twin)
        look(f"LoRA on and off {options.changes} times")
        what = f"memory of {options.workers} workers above their interpreters', over the file's size"
        report.measurements.append(Measurement(what, "files", Clock.NONE, tuple(arms)))
        report.found["the file, in GiB"] = size / 2**30
        report.found["the interpreters, in MiB"] = interpreters / 2**20
        report.found["the shared bytes are unchanged"] = twin.link.remote.digest() == digest


def _checkpoint(path: Path, type: str | None, **sizes: int) -> Path:
    from rayltx.comfy_dist.tiny_checkpoints import save_tiny_checkpoint

    written = path.with_suffix(".safetensors")
    save_tiny_checkpoint(written, "LTX-Video", dtype=torch.bfloat16 if type else torch.float32, **sizes)
    if type is None:
        return written
    convert(written, path.with_suffix(".gguf"), type)
    written.unlink()
    return path.with_suffix(".gguf")
