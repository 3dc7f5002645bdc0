"""The self-test's verdicts: each ComfyUI and model configuration is tried once, and remembered."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rayltx.about import ROOT, VERSION
from rayltx.comfy_dist.detection import ComfySpec, config_digest
from rayltx.comfy_dist.self_test import check_errors
from rayltx.distributed_worker.cluster import RemoteModel
from rayltx.errors import RanksDisagree, RanksFailedAlike
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)


def prove_seam(remote: RemoteModel, config: ParallelConfig, spec: ComfySpec, base_model: Any) -> None:
    """Try the seam on the ranks that will use it, unless it has passed there before.

    Raises SelfTestError if a tiny model of this class and configuration gives something else on these ranks than alone.
    """
    if config.world_size == 1:
        return
    about = f"ComfyUI {spec.version}, {spec.model_version}"
    key = verdict_key(spec, base_model, config, remote.cluster.request.device)
    passed = _read()
    if key in passed:
        return
    started = time.monotonic()
    try:
        errors = remote.call_collective("self_test", config, "the self-test")[0]
    except (RanksDisagree, RanksFailedAlike) as error:  # says the same as a wrong number, unless memory ran out
        if "out of memory" in str(error).lower():
            raise
        errors = {"every kind of input": str(error).splitlines()[0]}
    check_errors(errors, about)
    worst = max(errors.values())
    logger.info(
        "%s: exact on %d ranks (%d kinds of input, largest error %.1e, %.1f s)",
        about, config.world_size, len(errors), worst, time.monotonic() - started,
    )  # fmt: skip
    _write({**passed, key: {"about": about, "largest_error": worst, "world_size": config.world_size}})


def verdict_key(spec: ComfySpec, base_model: Any, config: ParallelConfig, device: str) -> str:
    """Changes with anything that the verdict could depend on: ComfyUI's code, ours, torch, the model, the degrees."""
    model_class = next(c for c in type(base_model.diffusion_model).__mro__ if c.__module__.startswith("comfy."))
    folder = Path(sys.modules[model_class.__module__].__file__ or "").parent
    digest = hashlib.sha256()
    folders = (folder, folder.parent / "modules", ROOT / "diffusion_models" / "lightricks", ROOT / "sequence_parallel")
    for source in (path for part in folders for path in sorted(part.glob("*.py"))):
        digest.update(source.read_bytes())
    unet_config = {k: v for k, v in base_model.model_config.unet_config.items() if k != "dtype"}
    rest = (spec.version, VERSION, torch.__version__, device, model_class.__name__, config_digest(unet_config))
    digest.update(json.dumps([*rest, config.ulysses_degree, config.ring_degree]).encode())
    return f"{spec.version}-{digest.hexdigest()[:24]}"


def _path() -> Path:
    import folder_paths

    return Path(folder_paths.get_user_directory()) / "rayltx" / "self_test.json"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(_path().read_text())
    except (OSError, ValueError):  # none yet, or damaged: the test is run again
        return {}
    return found if isinstance(found, dict) else {}


def _write(verdicts: dict[str, Any]) -> None:
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(verdicts, indent=1))
        temporary.replace(path)
    except OSError as error:
        logger.warning("the self-test's verdict cannot be kept (%s): it will be run at every load", error)
