"""How many GPUs take a step: what is tried, what is remembered, and what is said."""

from __future__ import annotations

import dataclasses
import json
import logging
import re

import comfy_scenarios as scenarios
import pytest
import torch
from comfy_models import CONFIGS, model_class, save_tiny_checkpoint

from rayltx.diffusion_models.lightricks.relative_error import TOLERANCE, relative_error
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.distributed_worker.worker import LinkReport, WorkerInfo
from rayltx.errors import OutOfMemory, SelfTestError, WorkerDied
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
    """What computes a step, on a clock of its own.

    seconds: that each number of ranks takes. unfit: what it raises on numbers that cannot. asked: the number of each call.
    """

    def __init__(self, monkeypatch, seconds, unfit=None):
        from rayltx.comfy_dist.main_process import rank_choice

        self.seconds, self.unfit, self.now, self.asked = {4: SHARED_S, **seconds}, unfit or {}, 0.0, []
        monkeypatch.setattr(rank_choice.time, "monotonic", lambda: self.now)

    def __call__(self, ranks):
        self.asked.append(ranks)
        if ranks in self.unfit:
            raise self.unfit[ranks]
        self.now += self.seconds[ranks] * (3 if self.asked.count(ranks) == 1 else 1)  # the first has more to do
        return f"by {ranks}"


@pytest.fixture
def choice(comfy, tmp_path):
    """choice() -> what gives a step's answer, with a memory of its own next to the file."""
    from rayltx.comfy_dist.main_process.rank_choice import RankChoice

    def make():
        ours = RankChoice(tmp_path / "rank_choice.json")

        def step(kind, exchange, steps, fewer=(2, 1), **kwargs):
            return ours.step(kind, exchange, 2, steps, fewer, **kwargs)

        return step

    return make


@pytest.mark.parametrize(
    "seconds, chosen, said",
    [
        ({2: 2.5, 1: 2.0}, 1, "one GPU"), ({2: 2.0, 1: 2.5}, 2, "2 GPUs"), ({2: 5.0, 1: 5.0}, 4, "all 4"),
        ({2: 2.0, 1: 2.0}, 1, "one GPU"),
    ],
)  # fmt: skip
def test_the_fastest_way_is_taken_from_the_first_step_on_and_remembered(
    kind, choice, monkeypatch, caplog, seconds, chosen, said
):
    steps = Steps(monkeypatch, seconds)
    with caplog.at_level(logging.INFO, "rayltx"):
        first = choice()
        assert [first(kind, SLOW, steps) for _ in range(3)] == [f"by {chosen}"] * 3
    assert steps.asked == [4, 4, 2, 2, 1, 1, chosen, chosen]
    (told,) = [record.getMessage() for record in caplog.records]
    assert "14080 video tokens" in told
    assert f"{SHARED_S:.3f} s on 4 GPUs, {seconds[2]:.3f} s on 2 GPUs, {seconds[1]:.3f} s on one GPU" in told
    assert told.count(f"videos of this size run on {said}. ") == 1
    # In another process, and of another kind.
    assert choice()(kind, SLOW, steps) == f"by {chosen}" and steps.asked[8:] == [chosen]
    choice()(dataclasses.replace(kind, devices=("another card",) * 4), SLOW, steps)
    assert steps.asked[9:] == [4, 4, 2, 2, 1, 1]


def test_what_an_earlier_version_remembered_is_tried_again(kind, choice, monkeypatch, tmp_path):
    """Whether one rank, in place of how many: it did not know of those between."""
    (tmp_path / "rank_choice.json").write_text(json.dumps({str(kind): True}))
    steps = Steps(monkeypatch, {2: 2.0, 1: 2.5})
    assert choice()(kind, SLOW, steps) == "by 2" and steps.asked[:2] == [4, 4]


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


@pytest.mark.parametrize("at", [2, 1])
def test_nothing_is_learnt_of_steps_between_which_workers_were_replaced(kind, choice, monkeypatch, at):
    steps, ours = Steps(monkeypatch, {2: 2.0, 1: 1.9}), choice()
    assert ours(kind, SLOW, steps, was_disturbed=lambda: at in steps.asked) == "by 4"
    assert ours(kind, SLOW, steps) == "by 1" and choice()(kind, SLOW, steps) == "by 1"


@pytest.mark.parametrize("error", [OutOfMemory("rank 0 of 1 ran out of memory"), SelfTestError("not as on one rank")])
def test_a_step_that_fewer_ranks_cannot_take_any_more_goes_to_all(kind, choice, monkeypatch, caplog, error):
    steps, ours = Steps(monkeypatch, {2: 2.0, 1: 2.5}), choice()
    assert ours(kind, SLOW, steps) == "by 2"
    steps.unfit = {2: error}
    assert [ours(kind, SLOW, steps) for _ in range(2)] == ["by 4"] * 2
    assert steps.asked[6:] == [2, 4, 4] and str(error) in caplog.text


def test_a_step_goes_to_all_while_there_is_no_room_for_fewer(kind, choice, monkeypatch):
    steps, ours = Steps(monkeypatch, {2: 2.0, 1: 1.9}), choice()
    assert [ours(kind, SLOW, steps, fewer=()) for _ in range(2)] == ["by 4"] * 2, "and nothing is learnt of it"
    assert ours(kind, SLOW, steps) == "by 1"
    assert ours(kind, SLOW, steps, fewer=(2,)) == "by 4" and ours(kind, SLOW, steps) == "by 1"


@pytest.mark.parametrize(
    "exchange, shared_s, asked",
    [(FAST, 30.0, [4]), (SLOW, 60.0, [4]), (SLOW, 9.0, [4, 4]), (SLOW, 5.0, [4, 4, 2, 2])],
)
def test_fewer_ranks_are_not_tried_where_they_cannot_be_faster(kind, choice, monkeypatch, exchange, shared_s, asked):
    """By counting alone, or by a second step, which does not do what a first one does; one rank not where two could be."""
    steps, ours = Steps(monkeypatch, {4: shared_s, 2: shared_s, 1: 1.0}), choice()
    assert ours(kind, exchange, steps) == ("by 4" if len(asked) < 3 else "by 2") and steps.asked == asked
    ours(kind, exchange, steps)
    assert len(steps.asked) == len(asked) + 1


def test_what_there_was_no_room_for_is_tried_when_there_is(kind, choice, monkeypatch):
    steps = Steps(monkeypatch, {2: 2.0, 1: 1.9})
    assert choice()(kind, SLOW, steps, fewer=(2,)) == "by 2" and steps.asked == [4, 4, 2, 2]
    assert choice()(kind, SLOW, steps, fewer=(2,)) == "by 2" and steps.asked[4:] == [2], "remembered"
    assert choice()(kind, SLOW, steps) == "by 1" and steps.asked[5:] == [4, 4, 2, 2, 1, 1]
    assert choice()(kind, SLOW, steps) == "by 1" and steps.asked[11:] == [1]


def test_a_trial_that_loses_a_worker_costs_no_answer(kind, choice, monkeypatch):
    steps, ours = Steps(monkeypatch, {1: 1.0}, {2: WorkerDied("rank 1 of 2 died")}), choice()
    assert [ours(kind, SLOW, steps) for _ in range(2)] == ["by 4"] * 2 and steps.asked == [4, 4, 2, 4]


def test_a_step_that_does_not_fit_fewer_ranks_stays_with_all(kind, choice, monkeypatch):
    steps, ours = Steps(monkeypatch, {2: 2.0, 1: 1.9}, {2: OutOfMemory("rank 0 of 2 ran out of memory")}), choice()
    assert [ours(kind, SLOW, steps) for _ in range(2)] == ["by 4"] * 2
    assert steps.asked == [4, 4, 2, 4], "one has less room yet"
    steps.unfit = {}
    assert choice()(kind, SLOW, steps) == "by 1", "in another process there may be room"


def test_one_rank_is_tried_where_two_are_not_proven(kind, choice, monkeypatch):
    steps, ours = Steps(monkeypatch, {1: 1.0}, {2: SelfTestError("not as on one rank")}), choice()
    assert [ours(kind, SLOW, steps) for _ in range(2)] == ["by 1"] * 2
    assert steps.asked == [4, 4, 2, 1, 1, 1]


def test_what_is_counted_of_a_step(kind):
    """What `rayltx plan` counts: 83 MiB of each of 48 blocks at 2 GB/s, and as many exchanges of half a millisecond."""
    link_s = kind.link_s(SLOW, 2)
    assert link_s == pytest.approx(48 * 83.62 * 2**20 / 2e9 + 18 * 48 * 5e-4, rel=0.02)
    assert kind.least_s(1, SHARED_S, link_s) == pytest.approx(4 * (SHARED_S - link_s), rel=0.02)
    assert kind.least_s(2, SHARED_S, link_s) == pytest.approx(2 * (SHARED_S - link_s), rel=0.02)
    for ranks in (1, 2):
        assert kind.expected_s(ranks, SHARED_S, SLOW, 2) > kind.least_s(ranks, SHARED_S, link_s)
    assert kind.expected_s(4, SHARED_S, SLOW, 2) == pytest.approx(SHARED_S), "what it was calculated from"


@pytest.mark.parametrize(
    "config, part, told", [(CONFIG, 1.1, "one GPU"), (CONFIG, 2.5, None), (ParallelConfig(2, 1, 2), 1.6, "2 GPUs")]
)
def test_where_degrees_were_chosen_it_is_told_once(kind, comfy, tmp_path, monkeypatch, caplog, config, part, told):
    """Where the link takes nearly all of a step, one GPU; where it takes half, two that have a row of guidance each."""
    from rayltx.comfy_dist.main_process.rank_choice import RankChoice

    kind = dataclasses.replace(kind, config=config, rows=2)
    shared_s = part * kind.link_s(SLOW, 2)
    steps, ours = Steps(monkeypatch, {4: shared_s}), RankChoice(tmp_path / "rank_choice.json")
    with caplog.at_level(logging.WARNING, "rayltx"):
        assert {ours.step_of_all(kind, SLOW, 2, steps) for _ in range(4)} == {"by 4"}
    assert steps.asked == [4] * 4
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (told is not None)
    if told:
        (expected_s,) = (float(number) for number in re.findall(rf"{told} would take about ([\d.]+) s", said[0]))
        assert expected_s < shared_s and "on 4 GPUs" in said[0]


class SpiedCalls:
    """The calls of a twin's model, as on GPUs: its workers on the CPU are said to be none, and the link to be slow."""

    def __init__(self, monkeypatch, twin):
        from rayltx.comfy_dist.main_process import rank_choice

        self.ranks = []
        remote = twin.link.remote
        monkeypatch.setattr(ClusterRequest, "on_cpu", False)
        monkeypatch.setattr(rank_choice.StepKind, "link_s", lambda *_: 1e9)
        call_together = remote.call_together

        def spy(call, *args, ranks=None, **kwargs):
            if call.method == "forward":
                self.ranks.append(ranks)
            return call_together(call, *args, ranks=ranks, **kwargs)

        monkeypatch.setattr(remote, "call_together", spy)


@pytest.fixture
def loaded(cluster, tmp_path, monkeypatch):
    """loaded(version, ranks=2) -> (a MODEL of ComfyUI's loader, one on workers that may choose), with a record of their own."""
    from rayltx.comfy_dist.main_process import worker_link
    from rayltx.comfy_dist.main_process.placement import Placement
    from rayltx.comfy_dist.main_process.twin import load_twin

    monkeypatch.setattr(worker_link, "user_folder", lambda: tmp_path)
    twins = []

    def load(version, ranks=2, **placement):
        import comfy.sd

        path = str(tmp_path / f"{version}.safetensors")
        save_tiny_checkpoint(path, version)
        placement = Placement(cluster.request, ParallelConfig(ranks), **{"chooses_ranks": True, **placement})
        twins.append(load_twin(path, placement))
        return comfy.sd.load_diffusion_model(path), twins[-1]

    with torch.inference_mode():
        yield load
    for twin in twins:
        twin.link.remote.release()


@pytest.fixture
def fastest(monkeypatch):
    """fastest(ranks): the clock says that so many are, whatever this machine is doing."""

    def choose(best):
        timed = lambda compute, ranks: (compute(ranks), 1.0 if ranks == best else 2.0 + 1.0 / ranks)  # noqa: E731
        monkeypatch.setattr("rayltx.comfy_dist.main_process.rank_choice._timed", timed)

    return choose


@pytest.mark.parametrize("version", ["LTX-Video", "LTX-2.3"])
def test_a_run_by_one_rank_is_comfyuis_bit_for_bit(loaded, monkeypatch, fastest, version):
    """Every step, for what one rank computes alone is ComfyUI's model as it is."""
    plain, twin = loaded(version)
    ways = SpiedCalls(monkeypatch, twin)
    fastest(1)
    expected, found = (
        scenarios.tensors_of(scenarios.euler(model, version, CONFIGS[version])) for model in (plain, twin)
    )
    assert ways.ranks[:4] == [2, 2, 1, 1] and set(ways.ranks[4:]) == {1}
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    # Several ranks are as before: their group was not touched.
    group = twin.link.cluster.group
    assert group.config == ParallelConfig(2) and not group.is_broken


@pytest.mark.parametrize("version", ["LTX-Video", "LTX-2.3"])
def test_a_run_by_two_of_four_ranks_is_that_of_two(loaded, monkeypatch, fastest, version):
    """Bit for bit, with guidance, and without forming a group anew."""
    plain, of_two = loaded(version)
    expected = scenarios.tensors_of(scenarios.euler(of_two, version, CONFIGS[version]))
    whole = scenarios.tensors_of(scenarios.euler(plain, version, CONFIGS[version]))
    _, twin = loaded(version, ranks=4)
    ways = SpiedCalls(monkeypatch, twin)
    fastest(2)
    reports = []
    monkeypatch.setattr(type(twin.link), "_prove_on_first", noting(reports, type(twin.link)._prove_on_first))
    found = scenarios.tensors_of(scenarios.euler(twin, version, CONFIGS[version]))
    assert ways.ranks[:6] == [4, 4, 2, 2, 1, 1] and set(ways.ranks[6:]) == {2}
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert max(map(relative_error, found, whole)) <= TOLERANCE
    group = twin.link.cluster.group
    assert group.config == ParallelConfig(4) and not group.is_broken
    assert {number for number, _ in reports} == {1, 2} and len({report for _, report in reports}) == 1


def noting(reports, prove):
    def noted(link, ranks):
        prove(link, ranks)
        reports.append((ranks, link.cluster.group.link_report))

    return noted


def test_ranks_that_are_not_proven_are_not_taken(loaded, monkeypatch, fastest, caplog):
    """What the self-test says of two of four counts, and the picture is that of all."""
    from rayltx.comfy_dist.main_process import self_test_record

    _, twin = loaded("LTX-2.3", ranks=4)
    expected = scenarios.tensors_of(scenarios.euler(twin, "LTX-2.3", CONFIGS["LTX-2.3"]))
    ways = SpiedCalls(monkeypatch, twin)
    fastest(2)
    ask = self_test_record.ask_errors
    wrong = lambda remote, config, ranks=None: ask(remote, config, ranks) | ({"a kind": 0.5} if ranks else {})  # noqa: E731
    monkeypatch.setattr(self_test_record, "ask_errors", wrong)
    monkeypatch.setattr(self_test_record, "read_record", lambda path: {})  # nothing has been tried
    with caplog.at_level(logging.INFO, "rayltx"):
        found = scenarios.tensors_of(scenarios.euler(twin, "LTX-2.3", CONFIGS["LTX-2.3"]))
    assert 2 not in ways.ranks and set(ways.ranks) == {4, 1} and ways.ranks[-1] == 4
    assert "is not for 2 GPUs" in caplog.text and "a kind" in caplog.text
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_what_one_rank_has_no_room_for_is_not_tried(loaded, monkeypatch):
    _, twin = loaded("LTX-Video")
    ways = SpiedCalls(monkeypatch, twin)
    monkeypatch.setattr(twin.link.memory, "free_bytes", lambda: 1)
    scenarios.euler(twin, "LTX-Video", CONFIGS["LTX-Video"])
    assert set(ways.ranks) == {2}


def test_code_of_a_patch_is_not_called_more_often_than_it_would_be(loaded, monkeypatch):
    """It may count its calls."""
    _, twin = loaded("LTX-Video")
    ways = SpiedCalls(monkeypatch, twin)
    scenarios.object_patch_inside(twin, "LTX-Video", CONFIGS["LTX-Video"])
    assert set(ways.ranks) == {2}


def test_ranks_that_a_user_has_chosen_all_work(loaded, monkeypatch):
    _, twin = loaded("LTX-Video", chooses_ranks=False)
    ways = SpiedCalls(monkeypatch, twin)
    scenarios.euler(twin, "LTX-Video", CONFIGS["LTX-Video"])
    assert set(ways.ranks) == {2}


def test_workers_on_the_cpu_are_not_timed(loaded, monkeypatch):
    """They share its cores."""
    _, twin = loaded("LTX-Video")
    ways = SpiedCalls(monkeypatch, twin)
    monkeypatch.setattr(ClusterRequest, "on_cpu", True)
    scenarios.euler(twin, "LTX-Video", CONFIGS["LTX-Video"])
    assert set(ways.ranks) == {2}


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
