"""The subcommands of `rayltx bench` on ComfyUI's own model: what must hold of what they measure, on any machine."""

import pytest
from bench_reports import reported
from comfy_checkout import find_comfyui

pytestmark = pytest.mark.comfyui
SMALL = ("--width", 64, "--height", 64, "--frames", 9)


@pytest.fixture
def checkout(comfy):
    return "--comfyui", find_comfyui()


def test_shard_computes_the_same(checkout):
    samples, found = reported("shard", *checkout, *SMALL, "--layers", 1, "--rounds", 1, "--device", "cpu")
    assert len(samples) == 1 and found["relative difference from one rank"] <= 2e-6


@pytest.mark.slow
def test_overlap_also_sends_as_projected(checkout):
    samples, _ = reported("overlap", *checkout, *SMALL, "--rounds", 1, "--links", "0.2")
    (arms,) = samples.values()
    assert list(arms) == ["waited for", "in groups", "in groups, as projected"]


@pytest.mark.slow
def test_start_knows_comfyuis_code(checkout):
    samples, _ = reported("start", *checkout, "--workers", 1, "--rounds", 1)
    assert all(list(arms) == ["one process that imports", "1 worker"] for arms in samples.values())


@pytest.mark.slow
def test_load_leaves_the_shared_bytes_alone(checkout):
    samples, found = reported("load", *checkout, "--gib", 0.2, "--workers", 2, "--changes", 1, "--type", "Q8_0")
    (arms,) = samples.values()
    assert list(arms)[:4] == ["loaded, every byte read", "sampled", "unloaded", "sampled again"]
    assert arms["loaded, every byte read"][0] == pytest.approx(1.0, abs=0.5), "not one for each worker"
    assert found["the shared bytes are unchanged"]


@pytest.mark.slow
def test_lora_times_each_kind_of_patch(checkout):
    samples, _ = reported("lora", *checkout, *SMALL, "--layers", 2, "--model-width", 128, "--rounds", 1)
    assert len(samples) == 3
    for arms in samples.values():
        assert list(arms) == ["nothing", "a LoRA", "a patch on each block", "a module shown all tokens"]


@pytest.mark.slow
def test_a_forward_of_two_ranks_holds_less_on_each(checkout):
    size = ("--width", 512, "--height", 512, "--frames", 17)
    samples, found = reported("memory", *checkout, *size, "--layers", 1, "--ranks", "1,2")
    (arms,) = samples.values()
    assert arms["the most on one of 2"][0] < 0.9 * arms["1 rank"][0]
    assert len(found["MiB on each of 2"]) == 2


@pytest.mark.parametrize("kind", ["convolutions", pytest.param("diffusion", marks=pytest.mark.slow)])
def test_ranks_decode_the_same_together(checkout, kind):
    size = ("--width", 640, "--height", 96, "--frames", 9)
    samples, found = reported("decode", *checkout, *size, "--kind", kind, "--rounds", 1)
    assert len(samples) == 2 and found["relative difference of the first rank's part"] <= 2e-6
