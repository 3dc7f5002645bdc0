"""What a step comes to on these GPUs, and on fewer of them, for the log: as `rayltx plan` calculates it."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from rayltx.comfy_dist.comfy_environment import user_folder
from rayltx.comfy_dist.comfy_types import DiffusionModel
from rayltx.comfy_dist.main_process.placement import Placement
from rayltx.comfy_dist.main_process.rank_choice import shape_of
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.step_cost import LTX_2, ModelShape
from rayltx.diffusion_models.lightricks.step_plan import ASSUMED_CARDS, HIDDEN, Cards, Work, plan
from rayltx.distributed_worker.cluster import Cluster
from rayltx.errors import RayLTXError, first_line
from rayltx.json_records import read_record, write_record
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)

_SIZE = (1280, 704, 121)  # pixels and frames
_MEASURED, _ASSUMED = "measured", "assumed until a model is loaded"
_REMEMBERED = "measured before"


def tell_plan_ahead(placement: Placement) -> None:
    """Log it where several GPUs are asked for and no model is known yet: LTX-2's, by what was measured of them before."""
    config = placement.config
    if placement.request.on_cpu or config.world_size == 1:
        return
    found = read_record(_record()).get(_gpus(placement))
    cards, origin = ASSUMED_CARDS, _ASSUMED
    if isinstance(found, dict):
        try:
            cards, origin = Cards(**found), _REMEMBERED
        except TypeError:  # another version's
            logger.debug("what was measured of the GPUs is not read: %s", found)
    logger.info("with LTX-2, weights aside, %s", plan_line(LTX_2, 0, config, cards, origin))


def tell_plan(cluster: Cluster, placement: Placement, model: DiffusionModel, weight_bytes: int) -> None:
    """Log it, where several GPUs have formed their group. Measures the cards, which must have room for it."""
    report = cluster.group.link_report
    if report is None or placement.request.on_cpu or placement.config.world_size == 1:
        return
    try:
        speeds = cluster.group.speeds()[: placement.config.world_size]
    except RayLTXError as error:  # a line of the log is not worth a load
        logger.info("the devices were not measured: %s", first_line(error))
        return
    cards = dataclasses.replace(
        ASSUMED_CARDS,
        flops_per_s=min(speeds),
        link_bytes_per_s=report.exchange.bytes_per_s,
        small_s=report.exchange.small_s,
        memory_bytes=min(info.device_memory_bytes for info in cluster.workers()[: len(speeds)]),
    )
    logger.info("%s", plan_line(shape_of(model), weight_bytes, placement.config, cards))
    if gpus := _gpus(placement):
        record = {**read_record(_record()), gpus: dataclasses.asdict(cards)}
        write_record(_record(), record, "what was measured of the GPUs", "the next start assumes it")


def _record() -> Path:
    return user_folder() / "cards.json"


def _gpus(placement: Placement) -> str:
    """Which work together; "" where they are other machines'."""
    return ", ".join(placement.request.gpu_names())


def plan_line(
    shape: ModelShape, weight_bytes: int, config: ParallelConfig, cards: Cards, origin: str = _MEASURED
) -> str:
    """origin: of the cards' products and link."""
    width, height, frames = _SIZE
    size = LatentShape.from_pixels(width, height, frames)
    work = Work(shape, weight_bytes, size.num_tokens, size.audio_tokens() if shape.audio_width else 0)
    fewer = [ParallelConfig.for_workers(ranks) for ranks in range(1, config.world_size)]
    told = []
    for found in (plan(work, cards, each) for each in [*fewer, dataclasses.replace(config, shares=())]):
        streamed = f", {found.streamed_bytes / 2**30:.0f} GiB of weights streamed" if found.streamed_bytes else ""
        told.append(f"{found.seconds:.2f} s on {found.config.world_size} ({found.efficiency:.0%}{streamed})")
    return (
        f"a step of {frames} frames of {width}x{height}, one row, comes to {', '.join(told)}: at {cards.flops_per_s / 1e12:.0f} "
        f"TFLOP/s a card in large products and {cards.link_bytes_per_s / 1e9:.1f} GB/s between them ({origin}), with "
        f"{HIDDEN:.0%} of the exchange behind computing and {cards.host_bytes_per_s / 1e9:.0f} GB/s from the host (assumed)"
    )
