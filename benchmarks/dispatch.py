"""What it costs to have a step done elsewhere: milliseconds of a step of a model that does nothing.

    PYTHON benchmarks/dispatch.py [--workers 2] [--steps 40] [--rounds 3]

For a small latent, for one of 121 frames at 1280x704, and for that one with a text that stays the same: the median of all steps.
To compare two versions, run it in checkouts of both, in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "importable"), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = str(ROOT / "tests")  # for the workers to find cluster_hosts

import torch  # noqa: E402

from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint  # noqa: E402
from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint  # noqa: E402
from rayltx.distributed_worker.cluster import Cluster  # noqa: E402
from rayltx.distributed_worker.request import ClusterRequest  # noqa: E402
from rayltx.sequence_parallel.partition import ParallelConfig  # noqa: E402

LATENT = (1, 128, 16, 22, 40)
KINDS = {
    "nothing": {},
    "a latent of 7 MB": {"latent": torch.zeros(LATENT)},
    "and a text of 16 MB": {"latent": torch.zeros(LATENT), "context": torch.zeros(1, 1024, 3840)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    config = ParallelConfig(arguments.workers, 1)
    with tempfile.TemporaryDirectory() as folder, Cluster.start(ClusterRequest(workers=arguments.workers)) as cluster:
        path = Path(folder) / "model.safetensors"
        save_tiny_checkpoint(path, "LTX-Video")
        remote = cluster.load(open_checkpoint(path), None, host="cluster_hosts:EchoHost")
        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(arguments.rounds):
            for kind, tensors in KINDS.items():
                for step in range(arguments.steps):
                    inputs = dict(tensors)
                    if "latent" in inputs:
                        inputs["latent"] = torch.full(LATENT, float(step))
                    if "context" in inputs:
                        inputs["context"] = inputs["context"].clone()
                    started = time.perf_counter()
                    answer = remote.forward({**inputs, "answer": "latent"}, config, poll=lambda: None)
                    found[kind].append(time.perf_counter() - started)
                    assert answer.keys() <= {"latent"}
        for kind, times in found.items():
            print(f"{kind:22s} {statistics.median(times) * 1e3:6.1f} ms")


if __name__ == "__main__":
    main()
