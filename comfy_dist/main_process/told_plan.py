"""What a step comes to on these GPUs, and on fewer of them, for the log: as `rayltx plan` calculates it."""

from __future__ import annotations

import dataclasses
import logging

from rayltx.comfy_dist.comfy_types import DiffusionModel
from rayltx.comfy_dist.main_process.placement import Placement
from rayltx.comfy_dist.main_process.rank_choice import shape_of
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.step_cost import ModelShape
from rayltx.diffusion_models.lightricks.step_plan import ASSUMED_CARDS, HIDDEN, Cards, Work, plan
from rayltx.distributed_worker.cluster import Cluster
from rayltx.errors import RayLTXError, first_line
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)

_SIZE = (1280, 704, 121)  # pixels and frames


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


def plan_line(shape: ModelShape, weight_bytes: int, config: ParallelConfig, cards: Cards) -> str:
    """cards: whose memory, products and link were measured."""
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
        f"TFLOP/s a card in large products and {cards.link_bytes_per_s / 1e9:.1f} GB/s between them (measured), with "
        f"{HIDDEN:.0%} of the exchange behind computing and {cards.host_bytes_per_s / 1e9:.0f} GB/s from the host (assumed)"
    )
