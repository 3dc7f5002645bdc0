"""`rayltx bench counts`, and what it has to count of diffusers' models."""

import pytest
from layer_counts import check, counted
from rayltx_command import rayltx_here

from rayltx.diffusion_models.lightricks.step_cost import LTX_2, StepCost
from rayltx.sequence_parallel.partition import ParallelConfig


def test_a_layer_of_diffusers_costs_no_more_and_the_plan_knows_it():
    layers = counted()
    check(layers, {1: 0.8, 2: 0.45, 4: 0.27})
    for ranks, layer in layers.items():
        planned = StepCost.of(LTX_2, 14080, 126, ParallelConfig(ranks), keeps_text=True)
        assert planned.flops / LTX_2.blocks == pytest.approx(layer["flops"], rel=0.01)
        assert planned.received_elements * 2 / LTX_2.blocks == pytest.approx(layer["received_bytes"], rel=0.01)
        assert planned.collectives / LTX_2.blocks == layer["collectives"]
        assert layer["kept_text_bytes"] == pytest.approx(sum(LTX_2.kept_text_elements()) * 2 / LTX_2.blocks, rel=0.01)
    assert any(line.startswith("diffusion_models/") for line in layers[2]["held_at_peak"])


@pytest.mark.slow
@pytest.mark.parametrize("version", ["LTX-Video", "LTX-2.3", "LTX-2.5"])
def test_every_version_can_be_counted(version):
    layers = counted("--model", version, "--ranks", "1,3")
    assert layers[3]["of_minimum"] <= 1.05 and 3 * layers[3]["flops"] >= layers[1]["flops"]


@pytest.mark.slow
def test_long_videos_fall_with_the_ranks():
    layers = counted("--width", 1920, "--height", 1088, "--frames", 897)
    for ranks, layer in layers.items():
        assert layer["peak_bytes"] <= (1 / ranks + 0.05) * layer["plain_peak_bytes"]
        assert layer["of_minimum"] <= 1.05


@pytest.mark.parametrize("flags, words", [(("--ranks", "0,1"), 'ranks="0,1"'), (("--model", "LTX-9"), "model=LTX-9")])
def test_what_cannot_be_counted_is_told(flags, words):
    done = rayltx_here("bench", "counts", *flags)
    assert done.returncode == 2 and words in done.stderr
