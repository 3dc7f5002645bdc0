"""Two machines, in network namespaces of their own: a step is shared, cancelled, and survives the end of one of them."""

from __future__ import annotations

import pytest

from two_machines import NotHere, Steps, two_machines

pytestmark = pytest.mark.slow


@pytest.fixture
def machines():
    try:
        with two_machines() as machines:
            yield machines
    except NotHere as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("then", ["cancel", "kill", "cut"])
def test_a_step_on_two_machines(machines, tmp_path, then):
    steps = Steps.disturbed(machines, tmp_path, then)
    print(then, f"{steps.lost_s:.1f} s lost")
    assert steps.error < 2e-6 and steps.is_equal and steps.next_is_equal
    assert (steps.num_kept == 2) == (then == "cancel")
    assert ("no progress for" in steps.log) == (then == "cut") and ("died" in steps.log) == (then != "cancel")
