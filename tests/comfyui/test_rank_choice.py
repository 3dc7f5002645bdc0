"""Whether one GPU takes a step alone: what is tried, what is remembered, and what is said."""

from __future__ import annotations

import dataclasses
import logging
import re

import comfy_scenarios as scenarios
import pytest
import torch
from comfy_models import CONFIGS, model_class, save_tiny_checkpoint

from rayltx.distributed_worker.request import ClusterRequest
from rayltx.distributed_worker.worker import LinkReport, WorkerInfo
from rayltx.errors import OutOfMemory
from rayltx.sequence_parallel.first_exchange import ExchangeReport
from rayltx.sequence_parallel.partition import ParallelConfig

pytestmark = pytest.mark.comfyui
FAST, SLOW = ExchangeReport(50e9, 2e-5), ExchangeReport(2e9, 5e-4)
CONFIG = ParallelConfig(4)
SHARED_S = 3.0


@pytest.fixture
def kind(comfy):
    """A step of 121 frames of 1280x704 on four GPUs."""
    import comfy.ops

    from rayltx.comfy_dist.main_process.rank_choice import StepKind

    with torch.device("meta"):
        config = {**CONFIGS["LTX-2"], "num_layers": 48}
        model = model_class("LTX-2")(**config, operations=comfy.ops.disable_weight_init)
        x = [torch.empty(1, 128, 16, 22, 40), torch.empty(1, 8, 126, 16)]
    # Of the real width, without its layers.
    model.inner_dim, model.audio_inner_dim, model.num_attention_heads = 4096, 2048, 32
    workers = [WorkerInfo(number, "a machine", "cuda", 24 * 2**30, "a card") for number in range(4)]
    return StepKind.of("LTX-2 in bfloat16", model, x, CONFIG, workers, LinkReport("nccl", SLOW, 0))


class Steps:
    """What computes a step, on a clock of its own. asked: of each call, whether one rank was to do it alone."""

    def __init__(self, monkeypatch, alone_s, shared_s=SHARED_S, fits=True):
        from rayltx.comfy_dist.main_process import rank_choice

        self.alone_s, self.shared_s, self.fits, self.now, self.asked = alone_s, shared_s, fits, 0.0, []
        monkeypatch.setattr(rank_choice.time, "monotonic", lambda: self.now)

    def __call__(self, alone):
        self.asked.append(alone)
        if alone and not self.fits:
            raise OutOfMemory("rank 0 of 1 ran out of memory")
        first = self.asked.count(alone) == 1
        self.now += (self.alone_s if alone else self.shared_s) * (3 if first else 1)  # the first has more to do
        return "by one" if alone else "by all"


@pytest.fixture
def choice(comfy, tmp_path):
    from rayltx.comfy_dist.main_process.rank_choice import RankChoice

    return lambda: RankChoice(tmp_path / "rank_choice.json")


@pytest.mark.parametrize("alone_s, chosen", [(2.0, True), (5.0, False)])
def test_the_faster_way_is_taken_from_the_first_step_on_and_remembered(
    kind, choice, monkeypatch, caplog, alone_s, chosen
):
    steps = Steps(monkeypatch, alone_s)
    answer = "by one" if chosen else "by all"
    with caplog.at_level(logging.INFO, "rayltx"):
        first = choice()
        assert [first.step(kind, SLOW, 2, steps) for _ in range(3)] == [answer] * 3
    assert steps.asked == [False, False, True, True, chosen, chosen]
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"{alone_s:.3f} s on one GPU and {SHARED_S:.3f} s on 4" in said and "14080 video tokens" in said
    assert said.count("videos of this size run on one." if chosen else "videos of this size run on all 4.") == 1
    # In another process, and of another kind.
    assert choice().step(kind, SLOW, 2, steps) == answer and steps.asked[6:] == [chosen]
    choice().step(dataclasses.replace(kind, devices=("another card",) * 4), SLOW, 2, steps)
    assert steps.asked[7:] == [False, False, True, True]


def test_kinds_that_differ_in_anything_are_remembered_apart(kind):
    assert str(kind) == str(dataclasses.replace(kind))
    others = {
        "model": "LTX-2 in float16", "shape": dataclasses.replace(kind.shape, width=2048), "streams": ((1, 128, 16, 22, 41),),
        "video_tokens": 7, "audio_tokens": 7, "rows": 2, "config": ParallelConfig(2, 2), "devices": ("another card",) * 4,
        "link": "nccl on 2 machines", "weight_budget": 2**30,
    }  # fmt: skip
    assert set(others) == {field.name for field in dataclasses.fields(kind)}
    kinds = [kind, *(dataclasses.replace(kind, **{name: value}) for name, value in others.items())]
    kinds.append(dataclasses.replace(kind, config=ParallelConfig(4, shares=(1.0, 1.0, 1.0, 0.5))))
    assert len({str(each) for each in kinds}) == len(kinds)


def test_nothing_is_learnt_of_steps_between_which_workers_were_replaced(kind, choice, monkeypatch):
    steps, ours = Steps(monkeypatch, alone_s=1.0), choice()
    assert ours.step(kind, SLOW, 2, steps, was_disturbed=lambda: True in steps.asked) == "by all"
    assert ours.step(kind, SLOW, 2, steps) == "by one" and choice().step(kind, SLOW, 2, steps) == "by one"


def test_a_step_that_does_not_fit_one_rank_any_more_goes_to_all(kind, choice, monkeypatch, caplog):
    steps, ours = Steps(monkeypatch, alone_s=1.0), choice()
    assert ours.step(kind, SLOW, 2, steps) == "by one"
    steps.fits = False
    assert [ours.step(kind, SLOW, 2, steps) for _ in range(2)] == ["by all"] * 2
    assert steps.asked[4:] == [True, False, False] and "ran out of memory" in caplog.text


@pytest.mark.parametrize("exchange, shared_s, calls", [(FAST, 30.0, 1), (SLOW, 60.0, 1), (SLOW, 6.0, 2)])
def test_one_rank_is_not_tried_where_it_cannot_be_faster(kind, choice, monkeypatch, exchange, shared_s, calls):
    """By counting alone, or by a second step, which does not do what a first one does."""
    steps, ours = Steps(monkeypatch, 1.0, shared_s), choice()
    assert ours.step(kind, exchange, 2, steps) == "by all"
    assert steps.asked == [False] * calls
    assert ours.step(kind, exchange, 2, steps) == "by all" and len(steps.asked) == calls + 1


def test_a_step_that_does_not_fit_one_rank_stays_with_all(kind, choice, monkeypatch):
    steps, ours = Steps(monkeypatch, 1.0, fits=False), choice()
    assert [ours.step(kind, SLOW, 2, steps) for _ in range(2)] == ["by all"] * 2
    assert steps.asked == [False, False, True, False]


def test_what_is_counted_of_a_step(kind):
    """What `rayltx plan` counts: 83 MiB of each of 48 blocks at 2 GB/s, and as many exchanges of half a millisecond."""
    link_s = kind.link_s(SLOW, 2)
    assert link_s == pytest.approx(48 * 83.62 * 2**20 / 2e9 + 18 * 48 * 5e-4, rel=0.02)
    assert kind.alone_s(SHARED_S, link_s, hidden=0.0) == pytest.approx(4 * (SHARED_S - link_s), rel=0.02)
    assert kind.alone_s(SHARED_S, link_s, hidden=0.8) > kind.alone_s(SHARED_S, link_s, hidden=0.0)


def test_where_degrees_were_chosen_it_is_told_once(kind, choice, monkeypatch, caplog):
    link_s = kind.link_s(SLOW, 2)
    for shared_s, told in ((1.1 * link_s, 1), (2.5 * link_s, 0)):
        caplog.clear()
        steps, ours = Steps(monkeypatch, 1.0, shared_s), choice()
        with caplog.at_level(logging.WARNING, "rayltx"):
            assert {ours.step_of_all(kind, SLOW, 2, steps) for _ in range(4)} == {"by all"}
        assert steps.asked == [False] * 4
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == told
        if told:
            (alone_s,) = (float(number) for number in re.findall(r"one GPU would take about ([\d.]+) s", said[0]))
            assert alone_s < shared_s and "on 4 GPUs" in said[0]


class SpiedCalls:
    """The calls of a twin's model, as on GPUs: its workers on the CPU are said to be none, and the link to be slow."""

    def __init__(self, monkeypatch, twin):
        from rayltx.comfy_dist.main_process import rank_choice

        self.alone = []
        remote = twin.link.remote
        monkeypatch.setattr(ClusterRequest, "on_cpu", False)
        monkeypatch.setattr(rank_choice.StepKind, "link_s", lambda *_: 1e9)
        call_together = remote.call_together

        def spy(call, *args, alone=False, **kwargs):
            if call.method == "forward":
                self.alone.append(alone)
            return call_together(call, *args, alone=alone, **kwargs)

        monkeypatch.setattr(remote, "call_together", spy)


@pytest.fixture
def loaded(cluster, tmp_path, monkeypatch):
    """loaded(version) -> (a MODEL of ComfyUI's loader, one on two workers that may choose), with a record of their own."""
    from rayltx.comfy_dist.main_process import worker_link
    from rayltx.comfy_dist.main_process.placement import Placement
    from rayltx.comfy_dist.main_process.twin import load_twin

    monkeypatch.setattr(worker_link, "user_folder", lambda: tmp_path)
    twins = []

    def load(version, **placement):
        import comfy.sd

        path = str(tmp_path / f"{version}.safetensors")
        save_tiny_checkpoint(path, version)
        placement = Placement(cluster.request, ParallelConfig(2), **{"chooses_ranks": True, **placement})
        twins.append(load_twin(path, placement))
        return comfy.sd.load_diffusion_model(path), twins[-1]

    with torch.inference_mode():
        yield load
    for twin in twins:
        twin.link.remote.release()


@pytest.mark.parametrize("version", ["LTX-Video", "LTX-2.3"])
def test_a_run_by_one_rank_is_comfyuis_bit_for_bit(loaded, monkeypatch, version):
    """Every step, for what one rank computes alone is ComfyUI's model as it is."""
    plain, twin = loaded(version)
    ways = SpiedCalls(monkeypatch, twin)
    # The clock says that one is faster, whatever this machine is doing.
    monkeypatch.setattr(
        "rayltx.comfy_dist.main_process.rank_choice._timed", lambda compute, alone: (compute(alone), 2.0 - alone)
    )
    expected, found = (
        scenarios.tensors_of(scenarios.euler(model, version, CONFIGS[version])) for model in (plain, twin)
    )
    assert ways.alone[:4] == [False, False, True, True] and all(ways.alone[4:]) and len(ways.alone) > 4
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    # Several ranks are as before: their group was not touched.
    group = twin.link.cluster.group
    assert group.config == ParallelConfig(2) and not group.is_broken


def test_what_one_rank_has_no_room_for_is_not_tried(loaded, monkeypatch):
    _, twin = loaded("LTX-Video")
    ways = SpiedCalls(monkeypatch, twin)
    monkeypatch.setattr(twin.link.memory, "free_bytes", lambda: 1)
    scenarios.euler(twin, "LTX-Video", CONFIGS["LTX-Video"])
    assert ways.alone and not any(ways.alone)


def test_code_of_a_patch_is_not_called_more_often_than_it_would_be(loaded, monkeypatch):
    """It may count its calls."""
    _, twin = loaded("LTX-Video")
    ways = SpiedCalls(monkeypatch, twin)
    scenarios.object_patch_inside(twin, "LTX-Video", CONFIGS["LTX-Video"])
    assert ways.alone and not any(ways.alone)


def test_ranks_that_a_user_has_chosen_all_work(loaded, monkeypatch):
    _, twin = loaded("LTX-Video", chooses_ranks=False)
    ways = SpiedCalls(monkeypatch, twin)
    scenarios.euler(twin, "LTX-Video", CONFIGS["LTX-Video"])
    assert ways.alone and not any(ways.alone)


def test_workers_on_the_cpu_are_not_timed(loaded, monkeypatch):
    """They share its cores."""
    _, twin = loaded("LTX-Video")
    ways = SpiedCalls(monkeypatch, twin)
    monkeypatch.setattr(ClusterRequest, "on_cpu", True)
    scenarios.euler(twin, "LTX-Video", CONFIGS["LTX-Video"])
    assert ways.alone and not any(ways.alone)


# ---- what a step comes to, when a model is loaded


def test_the_plan_counts_what_is_measured_and_says_what_is_assumed(comfy):
    from rayltx.comfy_dist.main_process.told_plan import plan_line
    from rayltx.diffusion_models.lightricks.step_cost import LTX_2
    from rayltx.diffusion_models.lightricks.step_plan import ASSUMED_CARDS

    cards = dataclasses.replace(ASSUMED_CARDS, flops_per_s=160e12, link_bytes_per_s=5e9)
    line = plan_line(LTX_2, 38 * 2**30, ParallelConfig(2, 1, 2), cards)
    told = [(float(s), int(n), int(e)) for s, n, e in re.findall(r"([\d.]+) s on (\d) \((\d+)%", line)]
    assert [number for _, number, _ in told] == [1, 2, 3, 4] and told[0][2] == 100
    assert told == sorted(told, reverse=True)
    for seconds, number, efficiency in told:
        assert efficiency == pytest.approx(100 * told[0][0] / seconds / number, abs=1.5)
    assert "160 TFLOP/s" in line and "5.0 GB/s between them (measured)" in line and "(assumed)" in line
    assert line.count("GiB of weights streamed") == 4, "38 GiB do not fit 24"


def test_the_plan_is_told_when_cards_load_a_model(loaded, monkeypatch, caplog):
    from rayltx.comfy_dist.main_process.told_plan import tell_plan

    _, twin = loaded("LTX-2.3")
    link = twin.link
    monkeypatch.setattr(ClusterRequest, "gpu_names", lambda self: ())  # of another machine
    told = []
    for on_cpu, config in ((True, ParallelConfig(2)), (False, ParallelConfig()), (False, ParallelConfig(2))):
        monkeypatch.setattr(ClusterRequest, "on_cpu", on_cpu)
        placement = dataclasses.replace(link.placement, config=config)
        caplog.clear()
        with caplog.at_level(logging.INFO, "rayltx"):
            tell_plan(link.cluster, placement, twin.model.diffusion_model, link.remote.source.weight_bytes)
        told.append([each for each in caplog.messages if each.startswith("a step of 121 frames of 1280x704")])
    assert told[:2] == [[], []], "nothing is measured of a CPU's workers, or of one"
    assert len(told[2]) == 1 and f"{link.cluster.group.link_report.exchange.bytes_per_s / 1e9:.1f} GB/s" in told[2][0]


def test_the_plan_is_told_ahead_by_what_was_measured_before(loaded, monkeypatch, caplog, tmp_path):
    from rayltx.comfy_dist.main_process import told_plan

    _, twin = loaded("LTX-2.3")
    link = twin.link
    monkeypatch.setattr(told_plan, "user_folder", lambda: tmp_path)
    monkeypatch.setattr(ClusterRequest, "gpu_names", lambda self: ("card of a test", "card of a test"))
    placement = dataclasses.replace(link.placement, config=ParallelConfig(2))

    def told():
        caplog.clear()
        with caplog.at_level(logging.INFO, "rayltx"):
            told_plan.tell_plan_ahead(placement)
        return caplog.text

    assert told() == "", "workers on the CPU"
    monkeypatch.setattr(ClusterRequest, "on_cpu", False)
    ahead = told()
    assert "with LTX-2, weights aside, a step of 121 frames" in ahead and "assumed until a model is loaded" in ahead
    told_plan.tell_plan(link.cluster, placement, twin.model.diffusion_model, link.remote.source.weight_bytes)
    ahead = told()
    link_told = f"{link.cluster.group.link_report.exchange.bytes_per_s / 1e9:.1f} GB/s between them (measured before)"
    assert link_told in ahead
    (tmp_path / "cards.json").write_text('{"card of a test, card of a test": {"flops": 1}}')
    assert "assumed until a model is loaded" in told(), "of another version"
