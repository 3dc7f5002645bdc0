"""What a rank's part of a decode takes of what one rank takes for all of it: processor time, and the wall clock beside it.

    PYTHON benchmarks/decode.py --comfyui FOLDER [--kind convolutions] [--shape 3 8 20] [--ranks 2] [--repeats 5]

Each rank has one thread. The arms run in turn: the first rank alone, while the others wait; then all together, by slabs. The
slowest rank counts, and the median of the repeats. The VAE is small, of the real class, with random weights; `--shape` is the
latent's frames, rows and columns. Needs a Python that can import that ComfyUI.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "importable"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from comfy_models import VIDEO_VAES, set_up_comfyui, video_vae_model

from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig

ARMS = ("alone", "together")


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Processor time of this process, and wall clock."""
    dist.barrier()
    processor, wall = time.process_time(), time.monotonic()
    work()
    return time.process_time() - processor, time.monotonic() - wall


def run_rank(rank: int, store: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, arguments.ranks), rank=rank, world_size=arguments.ranks)
    set_up_comfyui(str(arguments.comfyui))
    from rayltx.diffusion_models.lightricks.comfyui_decoder import Slabs, decode_slab

    group = SequenceParallelGroup.create(ParallelConfig(arguments.ranks, 1))
    model = video_vae_model(arguments.kind)
    latent = torch.randn(1, 128, *arguments.shape, generator=torch.Generator().manual_seed(1))
    slabs = Slabs.of(model, latent.shape, group)
    if isinstance(slabs, str):
        raise SystemExit(f"this latent is not decoded by {arguments.ranks} ranks together: {slabs}")

    def alone() -> None:
        if rank == 0:
            model.decode(latent)

    def together() -> None:
        decode_slab(model, latent, slabs, group)

    taken: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    with torch.inference_mode():
        for repeat in range(arguments.repeats + 1):
            for arm, work in zip(ARMS, (alone, together)):
                mine = torch.tensor(seconds_of(work))
                dist.all_reduce(mine, dist.ReduceOp.MAX)
                if repeat:  # the first one warms up
                    taken[arm].append((float(mine[0]), float(mine[1])))
    if rank == 0:
        for number, clock in enumerate(("processor time", "wall clock")):
            one, all_ranks = (statistics.median(times[number] for times in taken[arm]) for arm in ARMS)
            print(f"{clock}: {one:.2f} s alone, {all_ranks:.2f} s of {arguments.ranks} together, {all_ranks / one:.3f}")
        print(f"load average {os.getloadavg()[0]:.1f}")
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--kind", choices=list(VIDEO_VAES), default="convolutions")
    parser.add_argument("--shape", type=int, nargs=3, default=(3, 8, 20))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, args=(f"{folder}/store", arguments), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
