"""The self-test on the workers, and the record of its verdicts: each kind of model is tried once on each kind of ranks."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rayltx.about import ROOT, VERSION
from rayltx.comfy_dist.comfy_environment import user_folder
from rayltx.comfy_dist.comfy_host import ComfyHost
from rayltx.comfy_dist.comfy_types import BaseModel
from rayltx.comfy_dist.main_process.placement import Placement
from rayltx.comfy_dist.model_spec import ComfySpec
from rayltx.comfy_dist.self_test import check_errors
from rayltx.distributed_worker.rank_group import START_TIMEOUT_S
from rayltx.distributed_worker.remote_model import RemoteModel
from rayltx.distributed_worker.worker import WorkerInfo
from rayltx.distributed_worker.worker_calls import ask_together
from rayltx.errors import RanksDisagree, RanksFailedAlike
from rayltx.json_records import read_record, write_record
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)

_COLLECTIVES_VARIABLES = ("NCCL_", "TORCH_NCCL_")
_KERNEL_WORDS = ("attention", "fast", "fp8", "fp16", "bf16", "fp32", "fp64", "deterministic")


def prove_seam(
    remote: RemoteModel, placement: Placement, workers: Sequence[WorkerInfo], spec: ComfySpec, base_model: BaseModel
) -> None:
    """Try the seam on the ranks that will use it, unless it has passed there before.

    workers: all of the cluster, by rank.
    Raises SelfTestError if a tiny model of this class and configuration gives something else on these ranks than alone.
    """
    config = placement.config
    if config.world_size == 1:
        return
    about = f"ComfyUI {spec.version}, {spec.model_version}"
    key = verdict_key(spec, base_model, placement, workers)
    passed = read_record(_path())
    if key in passed:
        return
    started = time.monotonic()
    try:
        errors = ask_errors(remote, config)
    except (RanksDisagree, RanksFailedAlike) as error:  # says the same as a wrong number
        errors = {"every kind of input": str(error).splitlines()[0]}
    check_errors(errors, about)
    worst = max(errors.values())
    logger.info(
        "%s: exact on %d ranks (%d kinds of input, largest error %.1e, %.1f s)",
        about, config.world_size, len(errors), worst, time.monotonic() - started,
    )  # fmt: skip
    record = {**passed, key: {"about": about, "largest_error": worst, "world_size": config.world_size}}
    write_record(_path(), record, "the self-test's verdict", "it will be run at every load")


def ask_errors(remote: RemoteModel, config: ParallelConfig) -> dict[str, float | str]:
    """The self-test's errors by kind of input, on the ranks of a group. Raises as `RemoteModel.call_together`."""
    call = ask_together(ComfyHost.self_test)
    return remote.call_together(call, config, "the self-test", START_TIMEOUT_S, repeats=0)


def verdict_key(spec: ComfySpec, base_model: BaseModel, placement: Placement, workers: Sequence[WorkerInfo]) -> str:
    """Changes with anything that the verdict could depend on.

    That is ComfyUI's code, ours, torch, the model, the degrees; the ranks' devices, with what drives them and lets them talk;
    and what was asked of ComfyUI's kernels and of NCCL.
    """
    config = placement.config
    model_class = next(c for c in type(base_model.diffusion_model).__mro__ if c.__module__.startswith("comfy."))
    folder = Path(sys.modules[model_class.__module__].__file__ or "").parent
    digest = hashlib.sha256()
    folders = (folder, folder.parent / "modules", ROOT / "diffusion_models" / "lightricks", ROOT / "sequence_parallel")
    sources = [path for part in folders for path in sorted(part.glob("*.py"))]
    for source in (*sources, ROOT / "comfy_dist" / "self_test.py"):
        digest.update(source.read_bytes())
    unet_config = {k: v for k, v in base_model.model_config.unet_config.items() if k != "dtype"}
    devices = [worker.device_description for worker in workers[: config.world_size]]
    rest = (
        spec.version, VERSION, torch.__version__, model_class.__name__, as_text(unet_config), config.ulysses_degree,
        config.ring_degree, devices, _kernel_arguments(placement),
        sorted((name, value) for name, value in os.environ.items() if name.startswith(_COLLECTIVES_VARIABLES)),
    )  # fmt: skip
    digest.update(json.dumps(rest).encode())
    return f"{spec.version}-{digest.hexdigest()[:24]}"


def _kernel_arguments(placement: Placement) -> str:
    """Of the arguments of the workers' ComfyUI, those that choose kernels and precisions."""
    arguments = placement.comfyui_arguments
    return as_text({name: value for name, value in arguments.items() if any(word in name for word in _KERNEL_WORDS)})


def as_text(config: Mapping[str, object]) -> str:
    """A model configuration as text, the same for equal configurations."""
    return json.dumps({key: _settled(value) for key, value in sorted(config.items())})


def _settled(value: object) -> str:
    """As text that is the same in each process: a set's order is not."""
    return str(sorted(map(str, value))) if isinstance(value, (set, frozenset)) else str(value)


def _path() -> Path:
    return user_folder() / "self_test.json"
