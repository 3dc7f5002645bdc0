"""Ctrl-C where it would be swallowed."""

import contextlib
import os
import signal

import pytest

from rayltx.cli.interrupts import check_interrupted, remembered_interrupts


def test_a_swallowed_interrupt_is_found_at_the_next_step(monkeypatch):
    import threading

    monkeypatch.setattr("rayltx.cli.interrupts._asked", threading.Event())
    before = signal.getsignal(signal.SIGINT)
    with remembered_interrupts():
        check_interrupted()
        with contextlib.suppress(BaseException):  # as a callback from compiled code would
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check_interrupted()
    assert signal.getsignal(signal.SIGINT) is before
