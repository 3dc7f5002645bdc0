"""What a change of patches costs: the first step after it against later ones, with what proves the patches.

    PYTHON_OF_COMFYUI benchmarks/patch_change.py --comfyui FOLDER [--workers 2] [--rounds 3] [--layers 16] [--width 1024]

Samples on CPU ranks with ComfyUI's Euler, and prints for each kind of patch, when it is new and when it has been seen: the
time before the second step begins, less a later step's, in seconds (the median over rounds; the patches of each round are new).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "importable"), str(ROOT / "tests")]

import torch  # noqa: E402

from rayltx.comfy_dist.main_process.headless import comfyui_cluster, sample_with_comfyui  # noqa: E402
from rayltx.distributed_worker.request import ClusterRequest  # noqa: E402
from rayltx.sequence_parallel.partition import ParallelConfig  # noqa: E402

HEADS, STEPS = 16, 4
SHAPE = (1, 128, 9, 16, 16)  # 2304 tokens


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, args, extra):
        return {"img": extra["original_block"](args)["img"] * self.factor}


def on_blocks(model, number):
    """As packs for guidance and caching make them: one for each block."""
    model = model.clone()
    for block in range(len(model.model.diffusion_model.transformer_blocks)):
        model.set_model_patch_replace(Scaled(1.0 + 0.001 * number), "dit", "double_block", block)
    return model


def on_a_module(model, number):
    """A forward that looks at all tokens, which is shown them."""
    model = model.clone()
    name = "diffusion_model.transformer_blocks.0.ff"
    feed_forward = model.get_model_object(name)

    def forward(x):
        out = type(feed_forward).forward(feed_forward, x)
        return out / (out.std(dim=1, keepdim=True) + number)

    model.add_object_patch(f"{name}.forward", forward)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    arguments = parser.parse_args()
    request = ClusterRequest(workers=arguments.workers)
    with comfyui_cluster(arguments.comfyui, request) as cluster, tempfile.TemporaryDirectory() as folder:
        from comfy_scenarios import with_lora

        from rayltx.comfy_dist.main_process.placement import Placement
        from rayltx.comfy_dist.main_process.twin import load_twin
        from rayltx.comfy_dist.tiny_checkpoints import save_tiny_checkpoint

        path = Path(folder) / "model.safetensors"
        config = {"num_attention_heads": HEADS, "attention_head_dim": arguments.width // HEADS}
        save_tiny_checkpoint(
            path, "LTX-Video", num_layers=arguments.layers, cross_attention_dim=arguments.width, **config
        )
        twin = load_twin(str(path), Placement(cluster.request, ParallelConfig(arguments.workers, 1)))
        kinds = {
            "nothing": lambda number: twin.clone(),
            "a LoRA": lambda number: with_lora(twin, config, 1.0, seed=number),
            "a patch on each block": lambda number: on_blocks(twin, number),
            "a module shown all tokens": lambda number: on_a_module(twin, number),
        }
        _sample(twin, config)
        for name, patched in kinds.items():
            new, seen, steps = [], [], []
            for number in range(1, arguments.rounds + 1):
                model = patched(number)
                for found in (new, seen):
                    first, later = _sample(model, config)
                    found.append(first - later)
                    steps.append(later)
                    _sample(twin, config)  # the patches go, and come back
            print(
                f"{name:28s} new {statistics.median(new):+6.2f} s, seen {statistics.median(seen):+6.2f} s, "
                f"a step {statistics.median(steps):.2f} s", flush=True,
            )  # fmt: skip


def _sample(model, config) -> tuple[float, float]:
    """Seconds before the second step begins, and of a later step."""
    generator = torch.Generator().manual_seed(0)
    side = {"context": torch.randn(1, 32, 48, generator=generator), "frame_rate": 25.0}
    times = [time.monotonic()]
    sample_with_comfyui(
        model, {"video": torch.randn(*SHAPE, generator=generator)}, torch.linspace(1.0, 0.0, STEPS + 1), side, None, 1.0,
        lambda step, info: times.append(time.monotonic()),
    )  # fmt: skip
    each = [after - before for before, after in itertools.pairwise(times)]
    return each[0], statistics.median(each[1:])


if __name__ == "__main__":
    main()
