"""Weights that the device does not hold, brought a block ahead: on the CPU in disguise, whose streams put everything off."""

import numpy as np
import pytest
import torch
from comfy_on_device import BASES, PLENTY, SAME, with_lora

from rayltx import devices
from rayltx.diffusion_models.lightricks.relative_error import relative_error

pytestmark = pytest.mark.comfyui
LAYERS = 6
ENOUGH = 0.7  # of the model, for two blocks to be kept for streaming


@pytest.fixture
def kind(comfy, monkeypatch):
    """The device in disguise has streams."""
    import disguised_device as disguise

    kind = disguise.DisguisedKind(disguise.NAME, "gloo", "")
    monkeypatch.setitem(devices.KINDS, disguise.NAME, kind)
    return kind


def on_shared_pages(checkpoint, names, dtypes):
    """As workers take weights from the object store: views on protected pages that lie next to each other."""
    from rayltx.distributed_worker.weights import WeightPortion

    portion = WeightPortion.read(checkpoint, names, dtypes)
    store = np.empty(sum(-(-array.nbytes // 64) * 64 for array in portion.data.values()), dtype=np.uint8)
    offset = 0
    for name, array in portion.data.items():
        portion.data[name] = store[offset : offset + array.nbytes]
        portion.data[name][:] = array.view(np.uint8).reshape(-1)
        offset += -(-array.nbytes // 64) * 64
    return portion.map()


def streaming_of(device):
    from rayltx.comfy_dist.marks import STREAMING

    return device.patcher.model.__dict__.get(STREAMING)


def weights_in_a_forward(device):
    """By layer and parameter, what each layer of the blocks computes with: (on the device?, a copy)."""
    import disguised_device as disguise

    seen, handles = {}, []
    for name, layer in device.model.transformer_blocks.named_modules():
        if not hasattr(layer, "comfy_cast_weights"):
            continue

        def look(layer, args, name=name):
            for parameter_name in ("weight", "bias"):
                parameter = getattr(layer, parameter_name, None)
                if parameter is not None:
                    parts = parts_of(parameter)
                    there = all(part.device.type == disguise.NAME for part in parts)
                    seen[f"{name}.{parameter_name}"] = there, [disguise.bare(part).clone() for part in parts]

        handles.append(layer.register_forward_pre_hook(look))
    out = device.forward()
    for handle in handles:
        handle.remove()
    return seen, out


def parts_of(parameter):
    from rayltx.comfy_dist.worker_process.block_streaming import _parts

    return _parts(parameter)


@pytest.mark.parametrize("pages", ["registered", "refused", "of the file"])
@pytest.mark.parametrize("base", BASES)
def test_layers_compute_with_what_was_loaded_bit_for_bit(on_device, kind, base, pages):
    object.__setattr__(kind, "takes_host_memory", pages == "registered")
    arguments = {} if pages == "of the file" else {"take": on_shared_pages}
    device = on_device(base, num_layers=LAYERS, **arguments)
    device.load(PLENTY)
    assert streaming_of(device) is None
    whole_weights, whole = weights_in_a_forward(device)
    device.unload()
    device.load(ENOUGH * device.size)
    assert streaming_of(device) is not None and device.bytes_there() < ENOUGH * device.size
    for _ in range(2):  # the second begins with what the first has sent for
        weights, out = weights_in_a_forward(device)
        assert weights.keys() == whole_weights.keys() and relative_error(out, whole) <= SAME
        for name, (there, parts) in weights.items():
            assert there and all(map(torch.equal, parts, whole_weights[name][1])), name
    assert bool(kind.registered) == (pages == "registered")
    device.unload()
    assert device.bytes_there() == 0 and device.is_shared_again() and streaming_of(device) is None
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in device.model.transformer_blocks)


def test_only_what_is_on_the_host_travels_and_once_a_step(on_device, kind):
    import disguised_device as disguise

    device = on_device("float32", num_layers=LAYERS)
    device.load(ENOUGH * device.size)
    on_host = sum(p.nbytes for p in device.model.transformer_blocks.parameters() if p.device.type == "cpu")
    device.forward()
    device.forward()
    moved = {place: size for place, size in disguise.counts.to_device.items() if "block_streaming" in place}
    assert sum(moved.values()) == on_host
    # The model itself brings nothing while its blocks run.
    assert not {"_process_transformer_blocks", "forward"} & {place.split(":")[1] for place in disguise.counts.to_device}


def test_a_lora_counts_where_layers_are_streamed(on_device, kind):
    device = on_device("float32", num_layers=LAYERS)
    patched = with_lora(device)
    device.load(PLENTY, patched)
    whole = device.forward()
    device.unload()
    device.load(ENOUGH * device.size, patched)
    assert streaming_of(device) is not None and relative_error(device.forward(), whole) <= SAME


def test_a_weight_that_a_hook_has_replaced_is_left_to_it(on_device, kind):
    device = on_device("float32", num_layers=LAYERS)
    device.load(ENOUGH * device.size)
    before = device.forward()
    layer = next(m for m in device.model.transformer_blocks[3].modules() if _is_on_host(m))
    shared = layer.weight
    layer.weight = torch.nn.Parameter(shared * 2, requires_grad=False)
    assert relative_error(device.forward(), before) > 1e-4
    layer.weight = torch.nn.Parameter(shared.data, requires_grad=False)  # as ComfyUI puts it back
    assert relative_error(device.forward(), before) <= SAME


def _is_on_host(module):
    return (
        hasattr(module, "comfy_cast_weights")
        and getattr(module, "weight", None) is not None
        and module.weight.device.type == "cpu"
    )


def test_a_block_that_fails_leaves_the_layers_as_they_were(on_device, kind):
    device = on_device("float32", num_layers=LAYERS)
    device.load(ENOUGH * device.size)
    before = device.forward()
    handle = device.model.transformer_blocks[2].ff.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        device.forward()
    handle.remove()
    assert all(p.device.type == "cpu" for p, shared in _streamed(device) if p.data_ptr() == shared)
    assert relative_error(device.forward(), before) <= SAME
    device.unload()
    assert device.is_shared_again()


def _streamed(device):
    return [(p, p.data_ptr()) for p in device.model.transformer_blocks.parameters() if p.device.type == "cpu"]


def test_what_is_on_the_device_stays_the_same_from_run_to_run(on_device, kind):
    """ComfyUI measures what is free before each run, when the memory for the next block is not."""
    device = on_device("float32", num_layers=LAYERS)
    total, there = ENOUGH * device.size, []
    for _ in range(4):
        device.load(total - device.bytes_there() - device.patcher.streaming_bytes())
        assert streaming_of(device) is not None
        there.append(device.bytes_there())
    assert there == [there[0]] * 4 and there[0] + device.patcher.streaming_bytes() <= total


def test_too_small_a_budget_is_left_to_comfyui(on_device, kind):
    device = on_device("float32", num_layers=LAYERS)
    device.load(device.size // 10)
    assert streaming_of(device) is None
