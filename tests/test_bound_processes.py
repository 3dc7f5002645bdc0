"""What tests start ends with the run, however that ends."""

import signal
import subprocess
import sys
from pathlib import Path

TESTS = str(Path(__file__).parent)

SCRIPT = f"""
import subprocess, sys, time
sys.path.insert(0, {TESTS!r})
from bound_processes import bound_to_this_process
child = "import time; print('child', flush=True); time.sleep(600)"
subprocess.Popen(bound_to_this_process("-c", child), start_new_session=True)
time.sleep(600)
"""


def test_a_bound_process_ends_with_a_run_that_is_killed():
    run = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout.readline() == b"child\n"
    run.send_signal(signal.SIGKILL)
    assert b"KeyboardInterrupt" in run.stderr.read()  # ends when the child has closed it, too
