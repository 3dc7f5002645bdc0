"""The subcommands of `rayltx bench`: what must hold of what they measure, on any machine."""

import pytest
import torch
from bench_reports import reported
from compared_ways import answers

from rayltx.cli.bench.compare import WAYS
from rayltx.diffusion_models.lightricks.relative_error import relative_error

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


@pytest.mark.slow
def test_start_counts_all_processes_of_workers_and_one_that_imports():
    samples, _ = reported("start", "--workers", 1, "--rounds", 1)
    processor, wall = samples.values()
    for arms in (processor, wall):
        assert list(arms) == ["one process that imports", "1 worker"]
        assert all(len(each) == 1 and each[0] > 0 for each in arms.values())


@pytest.mark.slow
def test_load_finds_one_copy_of_the_weights():
    samples, found = reported("load", "--gib", 0.4, "--workers", 2, "--rounds", 1)
    held, first, again = samples.values()
    assert list(held) == list(first) == list(again) == ["1 worker", "2 workers"]
    assert held["2 workers"][0] - held["1 worker"][0] < 0.6, "one copy for both, and what they import"
    assert found["the file, in GiB"] == pytest.approx(0.4, rel=0.3)


def test_dequant_gives_the_bits_of_the_gguf_package():
    samples, found = reported("dequant", "--elements", 2**16, "--rounds", 2)
    assert [what.split()[0] for what in samples if what.endswith("on cpu")] == ["Q8_0", "Q4_K"]
    assert all(list(arms)[:2] == ["a copy", "RayLTX"] for arms in samples.values())
    assert found["Q8_0 on cpu: the same bits as gguf"] and found["Q4_K on cpu: the same bits as gguf"]


def test_dequant_compares_with_a_checkout(tmp_path):
    (tmp_path / "dequant.py").write_text(
        "import gguf, torch\n"
        "def dequantize(data, type, shape, dtype):\n"
        "    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), type)).to(dtype)\n"
    )
    flags = ("--elements", 2**16, "--rounds", 1, "--types", "Q4_0", "--comfyui-gguf", tmp_path)
    samples, found = reported("dequant", *flags)
    assert "ComfyUI-GGUF" in next(iter(samples.values()))
    assert found["Q4_0 on cpu: the same bits as ComfyUI-GGUF"]


def test_the_ways_that_are_compared_give_one_answer(ranks):
    found = ranks.run(2, answers, 37, 9, 11, 2)
    video, sound = found[0]["alone"]
    for name in WAYS:
        together = torch.cat([each[name][0] for each in found], dim=1)[:, :37]
        assert relative_error(together, video) <= 2e-6, name
        heard = [each[name][1] for each in found]
        if heard[0].shape != sound.shape:  # a part on each rank
            heard = [torch.cat(heard, dim=1)[:, :11]]
        assert all(relative_error(each, sound) <= 2e-6 for each in heard), name


def test_compare_counts_what_each_way_moves_at_least():
    samples, _ = reported("compare", "--ranks", "3,4", "--width", 256, "--height", 256, "--frames", 25)
    tokens, width, element_bytes, text, sound, sounds_width = 4 * 8 * 8, 4096, 2, 1024, 26, 2048

    def elements(ranks, way):
        return samples[f"received on one of {ranks} ranks"][way][0] * 2**20 / element_bytes

    local, minimum = tokens // 4, 4 * (tokens // 4) * width * 3 / 4
    of_sound = 2 * local * sounds_width * 3 / 4  # the video's keys and values
    padded_sound = 2 * 7 * sounds_width * 3 / 4  # queries and output
    assert minimum < elements(4, "RayLTX") < minimum + of_sound
    assert (
        elements(4, "all traded and padded")
        == minimum + (2 * local + 2 * text // 4) * width * 3 / 4 + of_sound + padded_sound
    )
    assert elements(4, "traded, text and sound whole") == minimum + of_sound + 3 * sound * sounds_width / 4
    assert elements(4, "keys and values gathered") == 2 * local * (width + sounds_width) * 3
    assert "all traded and padded" not in samples["received on one of 3 ranks"], "3 does not divide the heads"
