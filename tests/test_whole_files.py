"""What is written appears when it is whole, or not at all."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rayltx.errors import InputError
from rayltx.whole_files import appearing_whole

ROOT = Path(__file__).parents[1]


def test_the_file_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("before")
    with appearing_whole(target) as temporary:
        temporary.write_text("after")
        assert target.read_text() == "before"
        assert temporary.parent == tmp_path and temporary.name.endswith(".part")
    assert target.read_text() == "after"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_was_there_stays_when_the_block_fails(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("before")
    with pytest.raises(error), appearing_whole(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_writer_that_goes_by_the_ending_finds_it(tmp_path):
    with appearing_whole(tmp_path / "a.gif", ".gif") as temporary:
        assert temporary.suffix == ".gif"
        temporary.touch()
    assert (tmp_path / "a.gif").exists()


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_the_file_is_for_whom_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with appearing_whole(tmp_path / "a.safetensors", ".safetensors") as temporary:
            save_file({"a": torch.zeros(1)}, temporary)  # which writes files for their owner alone
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == mode


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no folder .*missing"), appearing_whole(tmp_path / "missing" / "a"):
        pass


def test_it_needs_nothing_but_python():
    code = "import sys, rayltx.whole_files; assert not {'torch', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "importable", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
