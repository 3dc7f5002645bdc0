"""`rayltx plan`: what it calculates, and what it says about where its numbers come from."""

import dataclasses
import json

import pytest
from rayltx_command import rayltx, rayltx_here

from rayltx.diffusion_models.lightricks.step_cost import LTX_2, StepCost
from rayltx.diffusion_models.lightricks.step_plan import ASSUMED_CARDS, Work, best, plan, ways_to_share
from rayltx.sequence_parallel.partition import ParallelConfig

GUIDED = Work(LTX_2, 0, 14080, 126, rows=2)


def test_every_way_is_there_once():
    ways = ways_to_share(4, 2)
    assert len(ways) == len(set(ways)) == 11
    assert {way.world_size for way in ways} == {1, 2, 3, 4}
    assert all(way.cfg_degree in (1, 2) for way in ways)
    assert all(way.cfg_degree == 1 for way in ways_to_share(4, 1))


def test_rows_apart_move_fewer_bytes_than_any_other_way_and_two_cards_none():
    costs = {way: StepCost.of(LTX_2, 14080, 126, way, 2) for way in ways_to_share(4, 2) if way.world_size == 4}
    assert min(costs, key=lambda way: costs[way].received_elements) == ParallelConfig(2, 1, 2)
    assert StepCost.of(LTX_2, 14080, 126, ParallelConfig(1, 1, 2), 2).received_elements == 0
    of_one_row = [StepCost.of(LTX_2, 14080, 126, config, 1) for config in (ParallelConfig(1, 1, 2), ParallelConfig(2))]
    assert of_one_row[0] == of_one_row[1], "a single row is shared by all"


def test_the_best_is_the_fastest_and_takes_no_card_that_brings_nothing():
    ways = ways_to_share(4, 2)
    assert best([plan(GUIDED, ASSUMED_CARDS, way) for way in ways]).config == ParallelConfig(2, 1, 2)
    slow = dataclasses.replace(ASSUMED_CARDS, link_bytes_per_s=1e7)
    assert best([plan(GUIDED, slow, way) for way in ways]).config == ParallelConfig(1, 1, 2)
    clip = Work(LTX_2, 0, 14080, 126)
    assert best([plan(clip, slow, way) for way in ways_to_share(4, 1)]).config == ParallelConfig()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("workers", range(2, 9))
def test_degrees_that_are_left_open_are_the_best_plan_for_all_cards(workers, rows):
    """But for what small exchanges cost by their number, which rings have fewer of: within 6 %."""
    ways = [way for way in ways_to_share(workers, rows) if way.world_size == workers]
    for tokens in (3000, 14080, 60000):
        for link in (2e9, 11e9, 100e9):
            cards = dataclasses.replace(ASSUMED_CARDS, link_bytes_per_s=link)
            work = Work(LTX_2, 0, tokens, 126, rows)
            ours = plan(work, cards, ParallelConfig.for_workers(workers, 0, 0, 0, 0))
            assert ours.seconds < 1.06 * min(plan(work, cards, way).seconds for way in ways), (tokens, link)


def test_weights_that_do_not_fit_are_streamed_and_bound_the_time():
    work = Work(LTX_2, 38 * 2**30, 640, 26)
    found = plan(work, ASSUMED_CARDS, ParallelConfig(4))
    assert 38 * 2**30 - 24 * 2**30 < found.streamed_bytes < 38 * 2**30
    assert found.seconds == found.streamed_bytes / ASSUMED_CARDS.host_bytes_per_s


def test_the_command_says_where_its_numbers_come_from(tmp_path):
    done = rayltx("plan", "--cfg", 3, "--workers", 4, "--link", 3, "--tflops", 120)
    assert done.returncode == 0, done.stderr
    in_one_line = " ".join(done.stdout.split())
    for words in ("120 TFLOP/s (given)", "3.0 GB/s", "GB/s from the host (assumed)"):
        assert words in in_one_line
    best_line = next(line for line in done.stdout.splitlines() if line.strip().startswith("best"))
    assert "2 x 1 x 2" in best_line
    found = json.loads(rayltx_here("plan", "--cfg", 3, "--workers", 4, "--link", 3, "--tflops", 120, "--json").stdout)
    assert found["cards"]["link_bytes_per_s"] == {"value": 3e9, "origin": "given"}
    assert [each["config"]["cfg_degree"] for each in found["plans"] if each["is_best"]] == [2]
    assert "bring next to nothing" in rayltx_here("plan", "--link", 0.01, "--frames", 25).stdout


@pytest.mark.parametrize(
    "flags, words",
    [(("--workers", 0), "workers=0"), (("--link", -1), "link=-1.0"), (("--width", 100), "multiple of 32")],
)
def test_wrong_numbers_are_told(flags, words):
    done = rayltx_here("plan", *flags)
    assert done.returncode == 2 and words in done.stderr
