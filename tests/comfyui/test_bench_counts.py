"""What `rayltx bench counts` has to count of ComfyUI's own model."""

import pytest
from comfy_checkout import find_comfyui
from layer_counts import check, counted

pytestmark = pytest.mark.comfyui


def test_a_layer_of_comfyuis_costs_no_more(comfy):
    layers = counted("--comfyui", find_comfyui())
    check(layers, {1: 0.68, 2: 0.46, 4: 0.27})
    assert any(line.startswith(("sequence_parallel/", "diffusion_models/")) for line in layers[2]["held_at_peak"])
