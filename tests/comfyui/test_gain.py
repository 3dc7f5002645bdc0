"""What is said of several GPUs that gain nothing: by a step's time and the link's speed."""

from __future__ import annotations

import logging
import re

import comfy_scenarios as scenarios
import pytest
import torch
from comfy_models import CONFIGS, model_class, save_tiny_checkpoint

from rayltx.distributed_worker.request import ClusterRequest
from rayltx.sequence_parallel.first_exchange import ExchangeReport
from rayltx.sequence_parallel.partition import ParallelConfig

pytestmark = pytest.mark.comfyui
FAST, SLOW = ExchangeReport(50e9, 2e-5), ExchangeReport(2e9, 5e-4)
CONFIG = ParallelConfig(4)


@pytest.fixture
def steps(comfy, caplog):
    """steps(exchange, seconds, times) -> what was said of so many steps of 121 frames of 1280x704 on four GPUs."""
    import comfy.ops

    from rayltx.comfy_dist.main_process.gain import Gain

    with torch.device("meta"):
        config = {**CONFIGS["LTX-2"], "num_layers": 48}
        model = model_class("LTX-2")(**config, operations=comfy.ops.disable_weight_init)
        x = [torch.empty(1, 128, 16, 22, 40), torch.empty(1, 8, 126, 16)]
    # Of the real width, without its layers.
    model.inner_dim, model.audio_inner_dim, model.num_attention_heads = 4096, 2048, 32

    def said(exchange, seconds, times=5):
        gain = Gain()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "rayltx"):
            for _ in range(times):
                gain.after_step(model, x, CONFIG, exchange, 2, seconds)
        return [record.getMessage() for record in caplog.records]

    return said


def test_a_link_that_takes_most_of_a_step_is_told_once(steps):
    (said,) = steps(SLOW, 3.0)
    # What `rayltx plan` counts: 83 MiB of each of 48 blocks at 2 GB/s, and as many exchanges of half a millisecond.
    exchanging, alone = (float(number) for number in re.findall(r"(?:can take|about) ([\d.]+) s", said))
    assert exchanging == pytest.approx(48 * 83.62 * 2**20 / 2e9 + 18 * 48 * 5e-4, rel=0.02)
    assert alone == pytest.approx(4 * (3.0 - exchanging), rel=0.02) and alone < 3.0
    assert "14080 video tokens" in said and "4 GPUs" in said
    assert steps(SLOW, 3.0, times=1) == [], "the first step has more to do"


@pytest.mark.parametrize("exchange, seconds", [(FAST, 3.0), (FAST, 0.5), (SLOW, 30.0)])
def test_nothing_is_said_where_several_are_faster(steps, exchange, seconds):
    assert steps(exchange, seconds) == []


def test_it_is_asked_with_what_was_measured(cluster, tmp_path, monkeypatch):
    """As on GPUs: in a run on CPU workers that are said to be none."""
    from rayltx.comfy_dist.main_process.gain import Gain, shape_of
    from rayltx.comfy_dist.main_process.placement import Placement
    from rayltx.comfy_dist.main_process.twin import load_twin

    seen = []
    monkeypatch.setattr(Gain, "after_step", lambda self, *told: seen.append(told))
    save_tiny_checkpoint(tmp_path / "model.safetensors", "LTX-2.3")
    with torch.inference_mode():
        twin = load_twin(str(tmp_path / "model.safetensors"), Placement(cluster.request, ParallelConfig(2)))
        scenarios.euler(twin, "LTX-2.3", CONFIGS["LTX-2.3"])
        assert seen == [], "CPU workers share its cores"
        monkeypatch.setattr(ClusterRequest, "on_cpu", False)
        scenarios.euler(twin, "LTX-2.3", CONFIGS["LTX-2.3"])
    assert len(seen) >= 2
    model, x, config, exchange, element_bytes, seconds = seen[0]
    assert config == ParallelConfig(2) and exchange.bytes_per_s > 0 and exchange.small_s > 0
    assert element_bytes in (2, 4) and 0 < seconds < 60 and shape_of(model).modulates_text
    twin.link.remote.release()
