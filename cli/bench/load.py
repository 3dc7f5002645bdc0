"""`rayltx bench load`: memory and time of loading one checkpoint on several workers, on diffusers' model.

Memory is the workers' physical one (PSS, which counts a shared page once among its users), above what their interpreters take.
Time is that of all workers over one's, in turn, each time on new workers: the first time, when the kernel has to find (and
clear) memory for the object store, and again, when the store has it. Needs Linux.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from rayltx.cli.bench.measurements import Arm, Clock, Measurement
from rayltx.cli.bench.report import Output, at_least, reporting
from rayltx.cli.packages import require_packages
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import ClusterRequest

_WIDTH, _HEADS = 1024, 16
_CONFIG = {
    "num_attention_heads": _HEADS,
    "attention_head_dim": _WIDTH // _HEADS,
    "cross_attention_dim": _WIDTH,
    "caption_channels": 64,
    "causal_temporal_positioning": True,
}
_HELD, _FIRST, _AGAIN = "memory of the weights, over the file's size", "loading, the first time", "loading again"
_UNITS = {_HELD: ("files", Clock.NONE), _FIRST: ("s", Clock.WALL), _AGAIN: ("s", Clock.WALL)}
_STORE_SETTLES_S = 1.0  # it learns in the background of what is released


@dataclass(frozen=True)
class LoadOptions:
    gib: float
    workers: int
    rounds: int


def run_load(options: LoadOptions, output: Output) -> None:
    """Print. Raises InputError and MissingPackageError."""
    at_least(gib=(options.gib, 0.001), workers=(options.workers, 1), rounds=(options.rounds, 1))
    require_packages(("diffusers",), "bench load")
    with reporting("load", vars(options), output, options.workers) as report, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        _write_checkpoint(path, int(options.gib * 2**30))
        samples: dict[str, dict[int, list[float]]] = {what: defaultdict(list) for what in _UNITS}
        for _ in range(options.rounds):
            for workers in dict.fromkeys((1, options.workers)):
                for what, value in zip(_UNITS, _measure(workers, path)):
                    samples[what][workers].append(value)
        for what, (unit, clock) in _UNITS.items():
            arms = [Arm(f"{n} worker{'s' if n > 1 else ''}", tuple(each)) for n, each in samples[what].items()]
            report.measurements.append(Measurement(what, unit, clock, tuple(arms)))
        report.remarks.append(
            "what a worker imports when it first loads is in its memory, and shows where the file is small"
        )
        report.found["the file, in GiB"] = path.stat().st_size / 2**30


def _measure(workers: int, path: Path) -> tuple[float, float, float]:
    """On new workers: what the weights take, over the file; seconds for the first time and again."""
    from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
    from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel

    checkpoint = open_checkpoint(path)
    model = DiffusersModel.of_checkpoint(checkpoint)
    with Cluster.start(ClusterRequest(workers=workers)) as cluster:
        cluster.workers()
        before = sum(cluster.memory())
        seconds, held = [], []
        for _ in range(2):
            started = time.monotonic()
            remote = cluster.load(checkpoint, model)
            seconds.append(time.monotonic() - started)
            remote.digest()  # reads every byte on every worker: what is not shared would show
            held.append(sum(cluster.memory()) - before)
            remote.release()
            time.sleep(_STORE_SETTLES_S)
    # Of the first time: the store of a busy machine may still have that copy when the next comes, which then lies elsewhere.
    return held[0] / path.stat().st_size, seconds[0], seconds[1]


def _write_checkpoint(path: Path, num_bytes: int) -> None:
    """An LTX-Video checkpoint of about this size, float32, of arbitrary weights."""
    from diffusers import LTXVideoTransformer3DModel
    from safetensors.torch import save_file

    from rayltx.diffusion_models.lightricks.checkpoint import OFFICIAL_PREFIX
    from rayltx.diffusion_models.lightricks.tiny_models import official_name

    arguments = {key: value for key, value in _CONFIG.items() if key != "causal_temporal_positioning"}
    layers = -(-num_bytes // (16 * _WIDTH**2 * 4))
    with torch.device("meta"):
        model = LTXVideoTransformer3DModel(**arguments, num_layers=layers)
    tensors = {
        OFFICIAL_PREFIX + official_name(name): torch.empty(tensor.shape).uniform_(-0.1, 0.1)
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, path, {"config": json.dumps({"transformer": {**_CONFIG, "num_layers": layers}})})
