"""`rayltx doctor`, and each of the checks of its report: that it finds what it is there for."""

import dataclasses
import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from rayltx_command import rayltx, rayltx_here

from rayltx.cli.doctor import prediction
from rayltx.cli.gpu_report import checks, shared_device
from rayltx.cli.gpu_report.report import run_check_apart
from rayltx.devices import KINDS
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.step_cost import LTX_2, StepCost
from rayltx.diffusion_models.lightricks.step_plan import Work
from rayltx.distributed_worker.machine_facts import Fact
from rayltx.distributed_worker.worker import LinkReport
from rayltx.sequence_parallel.first_exchange import ExchangeReport
from rayltx.sequence_parallel.partition import ParallelConfig

CPU = KINDS["cpu"]
CUDA = SimpleNamespace(name="cuda", total_bytes=lambda: 24 * 2**30)
FRAMES_121 = LatentShape.from_pixels(1280, 704, 121)


def link(gb_per_s, small_ms=0.05):
    return LinkReport("nccl", ExchangeReport(gb_per_s * 1e9, small_ms / 1e3), 0)


def test_the_cost_of_a_step_is_that_of_the_published_shapes():
    """GFLOP of a layer, and bytes that a rank receives, at LTX-2's real width."""
    for shape, tokens, gflop in (
        ((768, 512, 97), 4992, 3281),
        ((1280, 704, 121), 14080, 11177),
        ((1920, 1088, 897), 230520, 1001899),
    ):
        found = LatentShape.from_pixels(*shape)
        assert found.num_tokens == tokens
        cost = StepCost.of(LTX_2, tokens, 126, ParallelConfig())
        assert cost.flops / LTX_2.blocks / 1e9 == pytest.approx(gflop, rel=0.02)
    received = StepCost.of(LTX_2, 14080, 126, ParallelConfig(8)).received_elements * 2 / LTX_2.blocks
    assert received == pytest.approx(51.83e6, rel=0.005)  # of which 1.4e6 for video-to-audio attention


def test_several_cards_pay_where_the_link_carries_enough():
    """RTX 4090s on PCIe 4 without peer-to-peer copies, as calculated by hand, and a link that is of no use."""
    every_step = dataclasses.replace(LTX_2, modulates_text=True)  # makes its text's keys
    work = Work(every_step, 0, FRAMES_121.num_tokens, 126)
    alone = StepCost.of(LTX_2, work.video_tokens, 126, ParallelConfig()).seconds(100e12)
    for ranks, waited_for, hidden in ((2, 83, 96), (4, 75, 93), (8, 71, 89)):
        cost = StepCost.of(LTX_2, work.video_tokens, 126, ParallelConfig(ranks))
        assert abs(100 * alone / cost.seconds(100e12, 11e9 / 2) / ranks - waited_for) <= 2
        assert abs(100 * alone / cost.seconds(100e12, 11e9 / 2, hidden=0.85) / ranks - hidden) <= 2
        found = prediction(link(11, small_ms=0.0), ParallelConfig(ranks), work, 100e12, CUDA)
        percent = int(found.value.partition("(")[2].partition("%")[0])
        assert waited_for < percent <= hidden and not found.problem, found
        keeps = prediction(
            link(11, small_ms=0.0), ParallelConfig(ranks), dataclasses.replace(work, model=LTX_2), 100e12, CUDA
        )
        assert percent <= int(keeps.value.partition("(")[2].partition("%")[0]) <= percent + 6, (
            "the text's keys are kept"
        )
    slow = prediction(link(0.1), ParallelConfig(2), work, 100e12, CUDA)
    assert "one cuda would be as fast" in slow.problem and "use GPU 1" in slow.problem
    assert "no faster than one" in prediction(link(11), ParallelConfig(2), work, 1e12, CPU).value


def crash(kind):
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(kind):
    time.sleep(600)


def fail(kind):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def answer(kind):
    return [Fact("fine", kind.name)]


@pytest.mark.slow
def test_a_check_may_do_anything_to_its_process():
    assert run_check_apart(answer, "cpu") == [Fact("fine", "cpu")]
    assert "SIGSEGV" in run_check_apart(crash, "cpu")[0].problem
    assert "more than 1 s" in run_check_apart(hang, "cpu", limit_s=1.0)[0].problem
    failed = run_check_apart(fail, "cpu")[0]
    assert "illegal memory access" in failed.value and "in fail" in failed.problem


def test_kernels_with_another_log_sum_exp_are_found(monkeypatch):
    assert not any(fact.problem for fact in checks.attention_kernels(CPU))
    right = checks.attention_with_lse

    def in_other_units(q, k, v, mask=None):
        out, lse = right(q, k, v, mask)
        return out, lse * 1.4427

    monkeypatch.setattr(checks, "attention_with_lse", in_other_units)
    assert all("wrong picture" in fact.problem for fact in checks.attention_kernels(CPU))


def test_products_that_round_otherwise_in_parts_are_found(monkeypatch):
    assert not any(fact.problem for fact in checks.float32_products(CPU))
    monkeypatch.setattr(checks, "relative_error", lambda *_: 1e-4)
    assert any("refuse every model" in fact.problem for fact in checks.float32_products(CPU))


def test_what_a_cpu_cannot_do_is_said():
    for check in (checks.streamed_blocks, checks.killed_process, checks.out_of_memory, checks.synchronisations):
        assert [fact.value for fact in check(CPU)] == ["needs a GPU"]


def test_an_exchange_that_gives_something_else_is_found(monkeypatch):
    monkeypatch.setattr(shared_device, "_CONFIGS", (ParallelConfig(2, 1),))
    monkeypatch.setattr(shared_device, "_ALLOWED", {torch.float32: 0.0, torch.bfloat16: 0.0})
    assert ["report this" in fact.problem for fact in shared_device.exchange_on_one_device(CPU)] == [True]


@pytest.mark.slow
def test_the_report_is_written_whole(tmp_path):
    done = rayltx("doctor", "--workers", "2", "--gpu-report", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "Between the workers",
        "GB/s to a rank",
        "exchange, 1 x 2",
        "tiny LTX-2.3 on 2 workers",
        "nothing needs attention",
    ):
        assert words in done.stdout, done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    names = [fact["name"] for fact in report["facts"]]
    assert {"torch", "link", "attention in bfloat16", "collectives", "shared pages", "exchange, 3 x 1"} <= set(names)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_what_is_asked_wrong_is_said_before_anything_starts(tmp_path):
    done = rayltx_here("doctor", "--workers", "2", "--gpu-report", tmp_path / "nowhere" / "report.json")
    assert done.returncode == 2 and "a folder that exists" in done.stderr
    assert "Between the workers" not in done.stdout
    done = rayltx_here("doctor", "--frames", "120")
    assert done.returncode == 2 and "frames=120 must be 8k + 1" in done.stderr
    done = rayltx("doctor", "--workers", "1", "--comfyui", tmp_path)
    assert done.returncode == 1 and "there is no ComfyUI in that folder" in done.stdout
