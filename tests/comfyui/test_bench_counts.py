"""What `rayltx bench counts` has to count of ComfyUI's own model."""

import pytest
from comfy_checkout import find_comfyui
from layer_counts import check, counted

pytestmark = pytest.mark.comfyui


def test_a_layer_of_comfyuis_costs_no_more(comfy):
    layers = counted("--comfyui", find_comfyui())
    check(layers, {1: 1.0, 2: 1.01, 4: 1.03, 8: 1.07})
    assert any(line.startswith(("sequence_parallel/", "diffusion_models/")) for line in layers[2]["held_at_peak"])
