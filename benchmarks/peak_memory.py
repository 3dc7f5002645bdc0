"""Peak memory of one rank's forward of ComfyUI's model, against the number of ranks.

    PYTHON_OF_COMFYUI benchmarks/peak_memory.py --comfyui FOLDER [--version LTX-2] [--frames 121] [--layers 2]

The tokens are those of 1280x704 at this many frames, the model is narrower than the real one (8 heads as wide as LTX-2's)
and image-to-video, so that timesteps differ. Prints what a forward adds to a process's memory at its peak, beyond weights
and inputs, as a share of one rank's. A table or a mask of full length on any rank would keep the share from falling with
the number of ranks. Needs Linux, and a Python that can import that ComfyUI.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "importable"))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rayltx.comfy_dist.comfy_environment import ComfyEnvironment, enter
from rayltx.diffusion_models.lightricks.comfyui_host import sharded
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig

HEADS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--version", default="LTX-2")
    parser.add_argument("--frames", type=int, default=121)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    alone = 0
    for world_size in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            queue = mp.get_context("spawn").SimpleQueue()
            mp.spawn(_rank, (world_size, folder, queue, arguments), nprocs=world_size)
            peaks = [queue.get() for _ in range(world_size)]
        alone = alone or peaks[0]
        shares = ", ".join(f"{peak / alone:.3f}" for peak in sorted(peaks))
        print(f"{world_size} ranks: {max(peaks) / 2**20:6.0f} MiB at most; shares of one rank's: {shares}", flush=True)


def _rank(rank: int, world_size: int, folder: str, queue: mp.SimpleQueue, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    enter(ComfyEnvironment.headless(str(arguments.comfyui.resolve()), cpu=True), "cpu")
    import comfy.ldm.modules.attention
    import comfy.ops

    # ComfyUI's choice on a CPU takes more where more is free.
    comfy.ldm.modules.attention.optimized_attention = comfy.ldm.modules.attention.attention_pytorch
    from rayltx.comfy_dist.tiny_checkpoints import model_class
    from rayltx.diffusion_models.lightricks.tiny_configs import COMFYUI_CONFIGS

    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", world_size), rank=rank, world_size=world_size
    )
    group = SequenceParallelGroup.create(ParallelConfig(world_size, 1))
    config = {
        **COMFYUI_CONFIGS[arguments.version], "num_layers": arguments.layers, "num_attention_heads": HEADS,
        "attention_head_dim": 128, "cross_attention_dim": 128 * HEADS, "audio_num_attention_heads": HEADS,
        "audio_attention_head_dim": 64, "audio_cross_attention_dim": 64 * HEADS,
    }  # fmt: skip
    if arguments.version == "LTX-Video":
        config = {name: value for name, value in config.items() if not name.startswith("audio_")}
    model = model_class(arguments.version)(
        **config, dtype=torch.float32, operations=comfy.ops.disable_weight_init
    ).requires_grad_(False)
    shape = LatentShape.from_pixels(1280, 704, arguments.frames)
    call = _inputs(model, config, shape)
    with torch.inference_mode(), sharded(model, group) if world_size > 1 else contextlib.nullcontext():
        model(*call[0], **call[1])  # what is made on first use
        before = _reset_peak()
        model(*call[0], **call[1])
        queue.put(_memory("VmHWM") - before)
    dist.destroy_process_group()


def _inputs(model: object, config: dict, shape: LatentShape) -> tuple[tuple, dict]:
    frames, rows, columns = shape.frames, shape.height, shape.width
    video = torch.randn(1, 128, frames, rows, columns)
    mask = torch.ones(1, 1, frames, rows, columns)
    mask[:, :, 0] = 0.0
    timestep = model.patchifier.patchify(mask * 0.8)[0]
    has_audio = "audio_num_attention_heads" in config
    width = config["caption_channels"] * (2 if has_audio else 1)
    if config.get("caption_proj_before_connector"):
        width = model.inner_dim + model.audio_inner_dim
    kwargs = {
        "context": torch.randn(1, 128, width), "attention_mask": torch.ones(1, 128, dtype=torch.int64),
        "frame_rate": 25.0, "denoise_mask": mask, "transformer_options": {},
    }  # fmt: skip
    if not has_audio:
        return (video, timestep), kwargs
    audio = torch.randn(1, 8, shape.frames * 8, 16)
    return ([video, audio], (timestep, torch.tensor([0.8]))), kwargs


def _reset_peak() -> int:
    """Make the peak the present, which is returned."""
    from rayltx.distributed_worker.freed_memory import give_back_freed_memory

    give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
