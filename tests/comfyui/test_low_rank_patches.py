"""LoRAs on layers that ComfyUI multiplies in fp8: the product stays, and the LoRA is added to it."""

import json

import pytest
import torch

pytestmark = pytest.mark.comfyui
CPU = torch.device("cpu")
OUT, IN, RANK = 48, 64, 4


@pytest.fixture
def quantised(comfy):
    """quantised(format, disabled=()) -> a layer of ComfyUI's with a random weight in that format."""
    import comfy.ops
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    def make(quant_format, disabled=()):
        if quant_format not in QUANT_ALGOS:
            pytest.skip(f"this ComfyUI has no {quant_format}")
        torch.manual_seed(0)
        weight = QuantizedTensor.from_float(torch.randn(OUT, IN), QUANT_ALGOS[quant_format]["comfy_tensor_layout"])
        tensors = {**weight.state_dict("weight"), "bias": torch.randn(OUT)}
        tensors["comfy_quant"] = torch.tensor(list(json.dumps({"format": quant_format}).encode()), dtype=torch.uint8)
        layer = comfy.ops.mixed_precision_ops({}, torch.float32, disabled=set(disabled)).Linear(IN, OUT)
        layer.load_state_dict(tensors, assign=True)
        return layer.requires_grad_(False)

    return make


def lora(strength=0.7, alpha=2.0, dora=None, seed=1):
    """(the patches of a weight, their delta)"""
    from comfy.weight_adapter.lora import LoRAAdapter

    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(OUT, RANK, generator=generator), torch.randn(RANK, IN, generator=generator)
    adapter = LoRAAdapter(set(), (up, down, alpha, None, dora, None))
    return [(strength, adapter, 1.0, None, None)], strength * (alpha or RANK) / RANK * up @ down


def put(layer, *sources):
    from rayltx.comfy_dist.worker_process.patches_at_use import set_patches_at_use

    set_patches_at_use(layer, "layer.weight", list(sources), "default", CPU)


def test_the_quantised_product_stays_and_the_loras_are_added(quantised):
    layer = quantised("float8_e4m3fn")
    x = torch.randn(2, 7, IN, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        bare = layer(x)
        in_full = torch.nn.functional.linear(x, layer.weight.dequantize(), layer.bias)
        assert not torch.allclose(bare, in_full, atol=1e-3)  # it is another product
        (first, one), (second, other) = lora(), lora(strength=-0.3, alpha=None, seed=3)
        put(layer, first, second)
        assert layer.weight_function == []  # with one, ComfyUI multiplies in full
        assert torch.allclose(layer(x), bare + x @ (one + other).T, atol=1e-4)
        assert torch.allclose(layer(x[0]), bare[0] + x[0] @ (one + other).T, atol=1e-4)
        put(layer, second)
        assert torch.allclose(layer(x), bare + x @ other.T, atol=1e-4)
        assert layer.comfy_force_forward, "newer feed-forwards multiply past other layers"
        put(layer)
        assert torch.equal(layer(x), bare) and not layer._forward_hooks and not hasattr(layer, "comfy_force_forward")


def test_int8_is_patched_where_the_feed_forward_finds_it(quantised):
    """ComfyUI multiplies int8 weights past the layer, and its hooks, when it folds an activation into the product."""
    import comfy.ops

    if not hasattr(comfy.ops, "linear_input_act"):
        pytest.skip("this ComfyUI does not")
    layer, (patches, delta) = quantised("int8_tensorwise"), lora()
    x = torch.randn(1, 7, IN, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        activated = torch.nn.functional.gelu(x, approximate="tanh")
        in_full = torch.nn.functional.linear(activated, layer.weight.dequantize(), layer.bias)
        put(layer, patches)
        out = comfy.ops.linear_input_act(layer, x, "gelu_tanh")
    expected = in_full + activated @ delta.T
    assert (out - expected).norm() <= 0.02 * expected.norm() < 0.2 * (expected - in_full).norm()


def test_a_lora_that_stays_is_not_prepared_again(quantised):
    from rayltx.comfy_dist.marks import LOW_RANK_PATCHES

    layer, (patches, _) = quantised("float8_e4m3fn"), lora()
    put(layer, patches)
    before = getattr(layer, LOW_RANK_PATCHES)[0].products
    put(layer, patches)
    assert getattr(layer, LOW_RANK_PATCHES)[0].products is before


@pytest.mark.parametrize("other", ["dora", "diff", "whole weight scaled"])
def test_what_is_no_low_rank_product_is_added_to_the_weight(quantised, other):
    """With all other patches of the layer, in their order: a DoRA takes its norm from the weight as it is then."""
    layer, (plain, _) = quantised("float8_e4m3fn"), lora()
    if other == "dora":
        patches, _ = lora(dora=torch.rand(OUT, 1) + 0.5)
    elif other == "diff":
        patches = [(1.0, ("diff", (torch.ones(OUT, IN),)), 1.0, None, None)]
    else:
        patches = [(*plain[0][:2], 0.5, None, None)]
    put(layer, plain, patches)
    assert [type(function).__name__ for function in layer.weight_function] == ["PatchAtUse"] * 2
    assert not layer._forward_hooks
    put(layer, plain)
    assert layer.weight_function == [] and len(layer._forward_hooks) == 1


def test_a_layer_that_is_dequantised_in_any_case_is_patched_there(quantised):
    """On a card without the format's products: one rounding less."""
    layer, (patches, _) = quantised("float8_e4m3fn", disabled=["float8_e4m3fn"]), lora()
    put(layer, patches)
    assert len(layer.weight_function) == 1 and not layer._forward_hooks


def test_layers_of_fast_fp8_keep_their_products_too(comfy):
    import comfy.ops

    layer = comfy.ops.fp8_ops.Linear(IN, OUT, dtype=torch.float8_e4m3fn, device=CPU)
    layer.weight.data = torch.randn(OUT, IN).to(torch.float8_e4m3fn)
    layer.bias.data = torch.randn(OUT).to(torch.float8_e4m3fn)
    layer.requires_grad_(False).comfy_cast_weights = True
    patches, delta = lora()
    x = torch.randn(1, 7, IN, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.inference_mode():
        bare = layer(x.clone())
        put(layer, patches)
        assert layer.weight_function == []
        assert torch.allclose(layer(x.clone()).float(), bare.float() + x.float() @ delta.T, atol=0.25)
