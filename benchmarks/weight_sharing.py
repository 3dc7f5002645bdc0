"""Memory and time of loading one checkpoint on several workers.

    python benchmarks/weight_sharing.py [--gib 1.1] [--workers 4] [--rounds 3]

Prints the workers' physical memory (PSS, which counts a shared page once among its users) before and after, as a
multiple of the file, and how long loading took on one and on all workers, in turn: the first time, when the kernel
has to find (and clear) memory for the object store, and again, when the store has it. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "importable"))

import torch
from safetensors.torch import save_file

from rayltx.diffusion_models.lightricks.checkpoint import OFFICIAL_PREFIX, open_checkpoint
from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
from rayltx.diffusion_models.lightricks.tiny_models import official_name
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import ClusterRequest

WIDTH, HEADS = 1024, 16
CONFIG = {
    "num_attention_heads": HEADS,
    "attention_head_dim": WIDTH // HEADS,
    "cross_attention_dim": WIDTH,
    "caption_channels": 64,
    "causal_temporal_positioning": True,
}


def write_checkpoint(path: Path, num_bytes: int) -> None:
    """An LTX-Video checkpoint of about this size, float32, of arbitrary weights."""
    from diffusers import LTXVideoTransformer3DModel

    arguments = {key: value for key, value in CONFIG.items() if key != "causal_temporal_positioning"}
    layers = -(-num_bytes // (16 * WIDTH**2 * 4))
    with torch.device("meta"):
        model = LTXVideoTransformer3DModel(**arguments, num_layers=layers)
    tensors = {
        OFFICIAL_PREFIX + official_name(name): torch.empty(tensor.shape).uniform_(-0.1, 0.1)
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, path, {"config": json.dumps({"transformer": {**CONFIG, "num_layers": layers}})})


def measure(workers: int, path: Path) -> tuple[float, float, float, float]:
    """Load on fresh workers: PSS before and after in bytes, seconds for the first time and again."""
    checkpoint = open_checkpoint(path)
    model = DiffusersModel.of_checkpoint(checkpoint)
    with Cluster.start(ClusterRequest(workers=workers)) as cluster:
        cluster.workers()
        before = sum(cluster.memory())
        seconds = []
        for _ in range(2):
            started = time.monotonic()
            remote = cluster.load(checkpoint, model)
            seconds.append(time.monotonic() - started)
            remote.digest()  # reads every byte on every worker: what is not shared would show
            after = sum(cluster.memory())
            remote.release()
            time.sleep(1.0)  # the store learns of it in the background
    return before, after, seconds[0], seconds[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.1)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_checkpoint(path, int(arguments.gib * 2**30))
        size = path.stat().st_size
        print(f"file: {size / 2**30:.2f} GiB")
        ratios: dict[str, list[float]] = {"first": [], "again": []}
        for _ in range(arguments.rounds):
            first, again = {}, {}
            for workers in (1, arguments.workers):
                before, after, first[workers], again[workers] = measure(workers, path)
                print(
                    f"{workers} worker(s): interpreters {before / 2**20:.0f} MiB, with the weights {after / 2**20:.0f} MiB "
                    f"= interpreters + {(after - before) / size:.3f} x the file; loaded in {first[workers]:.2f} s, again in "
                    f"{again[workers]:.2f} s",
                    flush=True,
                )
            ratios["first"].append(first[arguments.workers] / first[1])
            ratios["again"].append(again[arguments.workers] / again[1])
    for kind, values in ratios.items():
        shown = ", ".join(f"{value:.2f}" for value in sorted(values))
        print(f"time of {arguments.workers} workers / 1, {kind}: median {statistics.median(values):.2f} ({shown})")


if __name__ == "__main__":
    main()
