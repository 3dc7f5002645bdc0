"""How much of the link's time is hidden behind a rank's work, by a clock that no other process disturbs.

    PYTHON benchmarks/overlap.py [--comfyui FOLDER] [--version LTX-2] [--link 0.1 0.2 0.4] [--repeats 7]

Two ranks of one thread each run a forward of a model, ComfyUI's or diffusers', and really exchange through gloo. Time is
counted in each rank's own processor time, and the link's is added by a model: a collective begins when both ranks have asked
for it and the link is free, and takes its bytes over the link's speed. The speed is chosen so that all of a forward's
exchanges, one after the other, take a given part of its work. "Hidden" is the part of these that a forward is not longer by
than one over a link without limits right before it; the median of the repeats counts, in which all arms run in turn. With
--comfyui it needs a Python that can import that ComfyUI.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parents[1] / "importable"))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig

RANKS = 2
HEADS, HEAD_DIM, LAYERS = 16, 32, 2
FRAMES, ROWS, COLUMNS = 8, 16, 16
_MOST_COLLECTIVES = 4096
# Whether heads travel in groups, and whether ComfyUI's attention is sent part by part.
ARMS = {"waited for": (1, False), "in groups": (4, False), "in groups, as projected": (4, True)}


class Link:
    """Between two ranks, with the clock of one of them."""

    def __init__(self, rank: int, posted: Tensor) -> None:
        self._rank, self._posted = rank, posted  # (ranks, collectives): when each asked for it, on its clock
        self.restart(math.inf)

    def restart(self, bytes_per_s: float) -> None:
        self.bytes_per_s, self.bytes, self._number, self._free = bytes_per_s, 0, 0, 0.0
        self._added, self._began = 0.0, time.thread_time()

    def now(self) -> float:
        return time.thread_time() - self._began + self._added

    def post(self, received_bytes: int) -> Callable[[], None]:
        """Ask for a collective. What is returned is called when it is really over, and moves the clock."""
        number, self._number = self._number, self._number + 1
        self._posted[self._rank, number] = self.now()
        self.bytes += received_bytes

        def over() -> None:
            begins = max(float(self._posted[:, number].max()), self._free)
            self._free = begins + received_bytes / self.bytes_per_s
            self._added += max(0.0, self._free - self.now())

        return over


class _Work:
    def __init__(self, work: dist.Work, over: Callable[[], None]) -> None:
        self._work, self._over = work, over

    def wait(self) -> None:
        self._work.wait()
        self._over()


@contextlib.contextmanager
def on(link: Link) -> Iterator[None]:
    """Let this process's exchanges go over a link."""
    gather_name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    all_to_all, all_gather = dist.all_to_all_single, getattr(dist, gather_name)

    def timed_all_to_all(received, sent, output_split_sizes, input_split_sizes, group=None, async_op=False):  # type: ignore[no-untyped-def]
        own = output_split_sizes[dist.get_rank()]
        over = link.post((received.numel() - own) * received.element_size())
        work = _Work(all_to_all(received, sent, output_split_sizes, input_split_sizes, group, async_op=True), over)
        if async_op:
            return work
        return work.wait()

    def timed_all_gather(received, sent, group=None):  # type: ignore[no-untyped-def]
        over = link.post((received.numel() - sent.numel()) * received.element_size())
        _Work(all_gather(received, sent, group=group, async_op=True), over).wait()

    with (
        mock.patch.object(dist, "all_to_all_single", timed_all_to_all),
        mock.patch.object(dist, gather_name, timed_all_gather),
    ):
        yield


def _comfyui_forward(folder: str, version: str) -> Callable[[SequenceParallelGroup, bool], None]:
    from rayltx.comfy_dist.comfy_environment import ComfyEnvironment, enter

    enter(ComfyEnvironment.headless(folder, cpu=True), "cpu")
    import comfy.ldm.modules.attention
    import comfy.ops

    from rayltx.comfy_dist.tiny_checkpoints import model_class
    from rayltx.diffusion_models.lightricks.comfyui_host import sharded
    from rayltx.diffusion_models.lightricks.tiny_configs import COMFYUI_CONFIGS

    comfy.ldm.modules.attention.optimized_attention = comfy.ldm.modules.attention.attention_pytorch
    config = {
        **COMFYUI_CONFIGS[version], "num_layers": LAYERS, "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM, "cross_attention_dim": HEAD_DIM * HEADS,
    }  # fmt: skip
    model = (
        model_class(version)(**config, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
        .requires_grad_(False)
        .eval()
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    has_audio = "audio_num_attention_heads" in config
    width = config["caption_channels"] * (2 if has_audio else 1)
    if config.get("caption_proj_before_connector"):
        width = model.inner_dim + model.audio_inner_dim
    video, text = torch.randn(1, 128, FRAMES, ROWS, COLUMNS), torch.randn(1, 128, width)
    kwargs = {"context": text, "attention_mask": None, "frame_rate": 25.0, "transformer_options": {}}
    sigma = torch.tensor([0.8])
    args = ([video, torch.randn(1, 8, 64, 16)], (sigma, sigma)) if has_audio else (video, sigma)

    def forward(group: SequenceParallelGroup, projected: bool) -> None:
        with sharded(model, group, as_projected=projected):
            model(*args, **kwargs)

    return forward


def _diffusers_forward(version: str) -> Callable[[SequenceParallelGroup, bool], None]:
    from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
    from rayltx.diffusion_models.lightricks.diffusers_host import DiffusersHost
    from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
    from rayltx.diffusion_models.lightricks.exactness import Case
    from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
    from rayltx.diffusion_models.lightricks.tiny_configs import TRANSFORMER_CONFIGS
    from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint

    TRANSFORMER_CONFIGS[version].update(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, cross_attention_dim=HEADS * HEAD_DIM
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_tiny_checkpoint(path, version, layers=LAYERS)
        checkpoint = open_checkpoint(path)
        host = DiffusersHost(DiffusersModel.of_checkpoint(checkpoint))
        with checkpoint.open() as reader:
            host.assign({name: reader.read(name).clone() for name in checkpoint.tensors})
    inputs = Case("long", shape=LatentShape(FRAMES, ROWS, COLUMNS)).inputs(host.model)
    return lambda group, projected: host.forward(group, inputs)


def _rank(rank: int, folder: str, posted: Tensor, answers: mp.SimpleQueue, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    make = _diffusers_forward if arguments.comfyui is None else lambda v: _comfyui_forward(str(arguments.comfyui), v)
    torch.manual_seed(0)
    forward = make(arguments.version)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    group = SequenceParallelGroup.create(ParallelConfig(RANKS, 1))
    link = Link(rank, posted)
    arms = {name: arm for name, arm in ARMS.items() if arguments.comfyui is not None or not arm[1]}

    def seconds(arm: tuple[int, bool], bytes_per_s: float) -> float:
        dist.barrier()
        link.restart(bytes_per_s)
        forward(dataclasses.replace(group, head_groups=arm[0]), arm[1])
        return link.now()

    with torch.inference_mode(), on(link):
        whole = torch.tensor([min(seconds(arm, math.inf) for _ in range(3)) for arm in arms.values()])
        dist.all_reduce(whole, dist.ReduceOp.MAX)  # so that both take the link for equally fast
        work_s, moved = float(whole[0]), link.bytes
        exposed: dict[tuple[float, str], list[float]] = defaultdict(list)
        for _ in range(arguments.repeats):
            for name, arm in arms.items():
                for part in arguments.link:
                    alone = seconds(arm, math.inf)
                    exposed[part, name].append(seconds(arm, moved / (part * work_s)) - alone)
    answers.put({key: statistics.median(each) / (key[0] * work_s) for key, each in exposed.items()})
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path)
    parser.add_argument("--version", default="LTX-2")
    parser.add_argument("--link", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.comfyui is not None:
        arguments.comfyui = arguments.comfyui.resolve()
    answers = mp.get_context("spawn").SimpleQueue()
    posted = torch.zeros(RANKS, _MOST_COLLECTIVES, dtype=torch.float64).share_memory_()
    print(f"load average {os.getloadavg()[0]:.1f}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, posted, answers, arguments), nprocs=RANKS)
        found = [answers.get() for _ in range(RANKS)]
    for part in arguments.link:
        exposed = {name: max(each[part, name] for each in found) for of, name in found[0] if of == part}
        told = ", ".join(f"{name} {100 * (1 - share):.0f} %" for name, share in exposed.items())
        print(f"link over work {part:.1f}: hidden {told}", flush=True)


if __name__ == "__main__":
    main()
