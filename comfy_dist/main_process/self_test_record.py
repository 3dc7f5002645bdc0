"""The self-test on the workers, and the record of its verdicts: each kind of model is tried once on each kind of ranks."""

from __future__ import annotations

import dataclasses
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
from rayltx.comfy_dist.main_process.attention_names import chooses_other_kernel
from rayltx.comfy_dist.main_process.placement import Placement
from rayltx.comfy_dist.model_spec import ComfySpec
from rayltx.comfy_dist.self_test import check_errors, wrong_cases
from rayltx.comfy_dist.wire import Difference
from rayltx.distributed_worker.remote_model import RemoteModel
from rayltx.distributed_worker.worker import WorkerInfo
from rayltx.distributed_worker.worker_calls import ask, ask_together
from rayltx.errors import (
    RANK_LOST,
    ClusterError,
    OutOfMemory,
    RanksDisagree,
    RanksFailedAlike,
    SelfTestError,
    first_line,
)
from rayltx.json_records import read_record, write_record
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)

_AS_PROJECTED = "as_projected"  # in a verdict, and of a setup
_TESTS = ("self_test.py", "worker_process/kernel_test.py")
_COLLECTIVES_VARIABLES = ("NCCL_", "TORCH_NCCL_")
_KERNEL_WORDS = ("attention", "fast", "fp8", "fp16", "bf16", "fp32", "fp64", "deterministic")


def prove_seam(
    remote: RemoteModel, placement: Placement, workers: Sequence[WorkerInfo], spec: ComfySpec, base_model: BaseModel
) -> None:
    """Try the seam on the ranks that will use it, unless it has passed there before.

    workers: all of the cluster, by rank.
    Raises SelfTestError if a tiny model of this class and configuration gives something else on these ranks than alone, or
    this model's first blocks do.
    """
    config = placement.config
    about = f"ComfyUI {spec.version}, {spec.model_version}"
    key = verdict_key(spec, base_model, placement, workers)
    passed = read_record(_path())
    if key in passed:
        _send_as_projected(remote, passed[key].get(_AS_PROJECTED, True))
        return
    started = time.monotonic()
    _send_as_projected(remote, True)
    if config.world_size == 1:
        is_exact = _is_exact_alone(remote, config)
        if is_exact is not None:
            _remember(passed, key, {"about": about, "world_size": 1, _AS_PROJECTED: is_exact})
        if not is_exact:
            _send_as_projected(remote, False)
            logger.info(
                "%s: self-attention stays as ComfyUI has it, which holds more than another that was tried", about
            )
        return
    errors, as_projected = _errors_and_path(remote, config, about)
    check_errors(errors, about)
    worst = max(errors.values())
    try:
        differences = ask_differences(remote, config)
    except OutOfMemory as error:  # there is a way on with less memory for sampling, and none here
        logger.warning(
            "%s: no memory to try this model's own kernels on several ranks, so they are not: %s", about, error
        )
        return
    except (RanksDisagree, RanksFailedAlike) as error:  # says the same as a wrong number
        raise SelfTestError(
            f"{about}: exact on several ranks in float32, but not with this model's layers, which do not run there: "
            f"{first_line(error)}. Choose another attention (ComfyUI's --use-pytorch-cross-attention), another weight_dtype, or "
            "one GPU"
        ) from error
    check_differences(differences, about, spec, chooses_other_kernel(placement.comfyui_arguments))
    in_dtype = max(differences.values(), key=lambda difference: difference.error)
    logger.info(
        "%s: exact on %d ranks (%d kinds of input, largest error %.1e; with its own layers, in %s, %.1e of %.1e that rounding "
        "accounts for; %.1f s)",
        about, config.world_size, len(errors), worst, dtype_name(spec), in_dtype.error, in_dtype.allowed,
        time.monotonic() - started,
    )  # fmt: skip
    verdict = {
        "about": about,
        "largest_error": worst,
        "largest_difference": in_dtype.error,
        "dtype": dtype_name(spec),
        "world_size": config.world_size,
        _AS_PROJECTED: as_projected,
    }
    _remember(passed, key, verdict)


def prove_seam_on_first(
    remote: RemoteModel,
    placement: Placement,
    ranks: int,
    workers: Sequence[WorkerInfo],
    spec: ComfySpec,
    base_model: BaseModel,
) -> None:
    """Try the seam on so many of the first of a group's ranks, unless it has passed there before. The group stays as it is.

    Raises SelfTestError as `prove_seam`, and ClusterError where it could not be tried.
    """
    first = dataclasses.replace(placement, config=placement.config.of_first(ranks))
    about = f"ComfyUI {spec.version}, {spec.model_version} on {ranks} of {placement.config.world_size} ranks"
    passed = read_record(_path())
    key = verdict_key(spec, base_model, first, workers)
    of_all = passed.get(verdict_key(spec, base_model, placement, workers), {})
    as_projected = of_all.get(_AS_PROJECTED, True)  # as it is now on all of them
    if of_all and key in passed and passed[key].get(_AS_PROJECTED, True) == as_projected:
        return
    try:
        errors = ask_errors(remote, placement.config, ranks)
        check_errors(errors, about)
        differences = ask_differences(remote, placement.config, ranks)
    except (RanksDisagree, RanksFailedAlike) as error:  # says the same as a wrong number
        raise SelfTestError(f"{about}: its layers do not run there: {first_line(error)}") from error
    check_differences(differences, about, spec, chooses_other_kernel(placement.comfyui_arguments))
    logger.info("%s: exact (largest error %.1e)", about, max(errors.values()))
    if of_all and as_projected:  # what is proven for less would be taken for all that is, by a group of so many
        _remember(passed, key, {"about": about, "world_size": ranks, _AS_PROJECTED: True})


def _remember(passed: Mapping[str, object], key: str, verdict: Mapping[str, object]) -> None:
    write_record(_path(), {**passed, key: verdict}, "the self-test's verdict", "it will be run at every load")


def _is_exact_alone(remote: RemoteModel, config: ParallelConfig) -> bool | None:
    """Whether one rank, which shares nothing, may project self-attention as several do; None where that cannot be tried.

    A model for which it is not exact runs without: nothing is refused.
    """
    try:
        if wrong_cases(ask_errors(remote, config)):
            return False
        return all(found.is_rounding for found in ask_differences(remote, config).values())
    except ClusterError as error:
        logger.info("%s", first_line(error))
        return None


def _errors_and_path(remote: RemoteModel, config: ParallelConfig, about: str) -> tuple[dict[str, float | str], bool]:
    """The self-test's errors, and whether attention is sent part by part there: where that is not proven, it is not."""
    errors = _ask_errors_or_told(remote, config)
    if not wrong_cases(errors):
        return errors, True
    _send_as_projected(remote, False)
    plain = _ask_errors_or_told(remote, config)
    if wrong_cases(plain):
        return errors, False
    logger.warning(
        "%s: its self-attention gives something else when its parts are sent as they are projected (%s), so they are not: it "
        "waits for the link longer",
        about, ", ".join(wrong_cases(errors)),
    )  # fmt: skip
    return plain, False


def _ask_errors_or_told(remote: RemoteModel, config: ParallelConfig) -> dict[str, float | str]:
    try:
        return ask_errors(remote, config)
    except (RanksDisagree, RanksFailedAlike) as error:  # says the same as a wrong number
        return {"every kind of input": first_line(error)}


def _send_as_projected(remote: RemoteModel, on: bool) -> None:
    """Also where it is so at first: the model may have been asked otherwise for other ranks."""
    remote.set_up(_AS_PROJECTED, ask(ComfyHost.send_as_projected, on), "choosing how attention is sent")


def ask_errors(remote: RemoteModel, config: ParallelConfig, ranks: int | None = None) -> dict[str, float | str]:
    """The self-test's errors by kind of input, on the ranks of a group, or its first. Raises as `RemoteModel.call_together`."""
    call = ask_together(ComfyHost.self_test)
    errors = remote.call_together(call, config, "the self-test", remote.call_timeout_s, again=RANK_LOST, ranks=ranks)
    if wrong_cases(errors):
        remote.disband()  # a rank that could not go on with a case has not exchanged all that the others have
    return errors


def ask_differences(remote: RemoteModel, config: ParallelConfig, ranks: int | None = None) -> dict[str, Difference]:
    """How far the model's own first blocks are, on the same ranks, from themselves. Raises as `ask_errors`."""
    call = ask_together(ComfyHost.kernel_test)
    return remote.call_together(call, config, "the self-test", remote.call_timeout_s, again=RANK_LOST, ranks=ranks)


def dtype_name(spec: ComfySpec) -> str:
    return str(spec.compute_dtype).removeprefix("torch.")


def check_differences(
    differences: Mapping[str, Difference], about: str, spec: ComfySpec, other_kernel: bool = False
) -> None:
    """Raises SelfTestError, naming what differs and by how much, where rounding does not account for it.

    Warns where it is not clear: up to twice as much, or where another kernel of attention than torch's is chosen, whose parts
    cannot be merged, so that torch's takes its place there.
    """
    unlike = {name: found for name, found in differences.items() if not found.is_rounding}
    told = "; ".join(
        f"{name} by {found.error:.1e} (rounding accounts for {found.allowed:.1e})" for name, found in unlike.items()
    )
    layers = f"this model's layers ({', '.join(spec.weight_kinds)}; computed in {dtype_name(spec)})"
    if not unlike:
        return
    if other_kernel or all(found.may_be_rounding for found in unlike.values()):
        logger.warning(
            "%s: exact on several ranks in float32; with %s and its attention kernel: %s", about, layers, told
        )
        return
    raise SelfTestError(
        f"{about}: exact on several ranks in float32, but not with {layers} and the attention kernel chosen: {told}. Choose "
        "another attention (ComfyUI's --use-pytorch-cross-attention), another weight_dtype, or one GPU"
    )


def verdict_key(spec: ComfySpec, base_model: BaseModel, placement: Placement, workers: Sequence[WorkerInfo]) -> str:
    """Changes with anything that the verdict could depend on.

    That is ComfyUI's code, ours, torch, the model, the degrees; the ranks' devices, with what drives them and lets them talk;
    what the weights are held and computed in; and what was asked of ComfyUI's kernels and of NCCL.
    """
    config = placement.config
    model_class = next(c for c in type(base_model.diffusion_model).__mro__ if c.__module__.startswith("comfy."))
    folder = Path(sys.modules[model_class.__module__].__file__ or "").parent
    digest = hashlib.sha256()
    folders = (folder, folder.parent / "modules", ROOT / "diffusion_models" / "lightricks", ROOT / "sequence_parallel")
    sources = [path for part in folders for path in sorted(part.glob("*.py"))]
    for source in (*sources, *(ROOT / "comfy_dist" / name for name in _TESTS)):
        digest.update(source.read_bytes())
    unet_config = {k: v for k, v in base_model.model_config.unet_config.items() if k != "dtype"}
    devices = [worker.device_description for worker in workers[: config.world_size]]
    rest = (
        spec.version, VERSION, torch.__version__, model_class.__name__, as_text(unet_config), as_text(vars(config)),
        devices, _kernel_arguments(placement),
        dtype_name(spec), spec.fp8_optimizations, spec.weight_kinds,
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
