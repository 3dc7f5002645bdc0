"""The subcommands of `rayltx bench`: what must hold of what they measure, on any machine."""

import pytest
from bench_reports import reported

SMALL = ("--width", 64, "--height", 64, "--frames", 9)


def test_dispatch_asks_for_steps_of_every_size():
    samples, found = reported("dispatch", "--workers", 2, "--steps", 2, "--rounds", 2)
    (arms,) = samples.values()
    assert [name.split(" MB")[0] for name in arms] == [
        "nothing",
        "a latent of 3.6",
        "and a text of 16",
        "a latent of 59",
    ]
    assert all(len(each) == 2 and min(each) > 0 for each in arms.values())
    assert found == {"every answer is what was sent": True}


def test_shard_computes_the_same_and_says_what_the_plan_is_off_by():
    samples, found = reported("shard", *SMALL, "--layers", 1, "--rounds", 2, "--device", "cpu", "--workers", 3)
    (arms,) = samples.values()
    alone, part = (sorted(each) for each in arms.values())
    assert len(alone) == len(part) == 2
    alone_s, part_s = sum(alone) / 2, sum(part) / 2
    assert found["efficiency T1 / (W T_rank)"] == pytest.approx(alone_s / (3 * part_s))
    planned_s = found["a rank's time, planned, in seconds"]
    assert found["deviation of the plan in percent"] == pytest.approx(100 * (planned_s / part_s - 1), abs=1e-6)
    assert 0 < found["efficiency, planned"] <= 1
    assert found["relative difference from one rank"] <= 2e-6


def test_overlap_measures_each_link_for_each_way():
    samples, _ = reported("overlap", *SMALL, "--rounds", 2, "--links", "0.2,0.4")
    assert list(samples) == [f"hidden of a link that takes {link} of the work" for link in (0.2, 0.4)]
    for arms in samples.values():
        assert list(arms) == ["waited for", "in groups"] and all(len(each) == 2 for each in arms.values())
