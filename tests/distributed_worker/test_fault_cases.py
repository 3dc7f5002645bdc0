"""A row of the table that `scripts/faults.py` makes; all of them with -m slow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS.parent / "scripts"))

from fault_cases import CASES  # noqa: E402
from fault_subject import Bench, NotTriedHere  # noqa: E402


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))  # for the workers, whose hosts are here
        bench = Bench(tmp_path_factory.mktemp("bench"))
        yield bench
        bench.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_answers_are_equal_and_nothing_is_left(bench, name):
    try:
        tried = CASES[name](bench)
    except NotTriedHere as reason:
        pytest.skip(f"not tried here: {reason}")
    assert tried.equal == tried.tries
    assert tried.next_equal in (None, tried.tries)
    assert not tried.left
