"""The text's keys and values are made once, for as long as they are the same, and never taken for another text's."""

import math

import pytest
import torch
from embedded_host import load_host
from torch import nn

from rayltx.diffusion_models.lightricks.exactness import CASES
from rayltx.diffusion_models.lightricks.kept_text import KeptText, is_plain
from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig

LAYERS = [nn.Linear(8, 6), nn.Linear(8, 6)]


class Counting:
    """A layer's product, and how often it was asked for."""

    def __init__(self, layer):
        self.layer, self.calls = layer, 0

    def __call__(self, x):
        self.calls += 1
        return self.layer(x)


def project(kept, x, products):
    with torch.inference_mode(), kept.in_forward(LAYERS):
        return [kept.project(product.layer, product, x) for product in products]


@pytest.fixture
def products():
    return [Counting(layer) for layer in LAYERS]


def unlimited():
    return KeptText(lambda: math.inf)


def test_the_same_numbers_are_projected_once(products):
    kept, x = unlimited(), torch.randn(1, 5, 8)
    first = project(kept, x, products)
    again = project(kept, x.clone(), products)
    assert [product.calls for product in products] == [1, 1]
    assert all(torch.equal(one, other) for one, other in zip(first, again))


@pytest.mark.parametrize(
    "change", [lambda x: x + 1e-3, lambda x: x.flip(1), lambda x: x.double().float()[:, :4], lambda x: x.bfloat16()]
)
def test_other_numbers_are_another_text(products, change):
    kept, x = unlimited(), torch.randn(1, 5, 8)
    project(kept, x, products)
    other = change(x)
    layers = [layer.to(other.dtype) for layer in LAYERS]
    try:
        found = project(kept, other, products)
        assert [product.calls for product in products] == [2, 2]
        with torch.inference_mode():
            assert all(torch.equal(made, layer(other)) for made, layer in zip(found, layers))
    finally:
        for layer in LAYERS:
            layer.float()


def test_a_text_that_is_written_to_afterwards_is_another(products):
    kept, x = unlimited(), torch.randn(1, 5, 8)
    project(kept, x, products)
    x[0, 2] = 7.0
    (found, _) = project(kept, x, products)
    assert products[0].calls == 2
    with torch.inference_mode():
        assert torch.equal(found, LAYERS[0](x))


def test_two_texts_in_turn_are_both_kept_and_a_fifth_replaces_the_first(products):
    kept, texts = unlimited(), torch.randn(5, 1, 3, 8).unbind()
    for x in (*texts[:2], *texts[:2]):
        project(kept, x, products)
    assert products[0].calls == 2
    for x in texts[2:]:
        project(kept, x, products)
    project(kept, texts[4], products)
    assert products[0].calls == 5
    project(kept, texts[0], products)
    assert products[0].calls == 6


def test_texts_of_another_width_are_counted_by_themselves():
    kept, narrow = unlimited(), nn.Linear(4, 6)
    for x in torch.randn(6, 1, 3, 8):
        with torch.inference_mode(), kept.in_forward([*LAYERS, narrow]):
            kept.project(narrow, narrow, x[..., :4].contiguous())
            assert torch.equal(kept.project(LAYERS[0], LAYERS[0], x), LAYERS[0](x))
    assert kept.num_bytes == 4 * 3 * (8 + 6 + 4 + 6) * 4


def test_nothing_is_kept_where_there_is_no_room(products):
    x = torch.randn(1, 5, 8)
    needed = 32 * (x.nbytes + 2 * 5 * 6 * 4)  # on the CPU
    for left, calls in ((needed - 1, 2), (needed, 1)):
        kept = KeptText(lambda left=left: left)
        products[0].calls = 0
        for _ in range(2):
            project(kept, x, products)
        assert products[0].calls == calls and (kept.num_bytes > 0) == (calls == 1)


def test_layers_with_a_text_of_their_own_keep_nothing(products):
    kept = unlimited()
    for _ in range(3):
        with torch.inference_mode(), kept.in_forward(LAYERS):
            for x in torch.randn(12, 1, 5, 8):
                kept.project(LAYERS[0], products[0], x)
    assert products[0].calls == 36 and kept.num_bytes == 0


def test_what_was_kept_goes_when_it_is_told_and_when_a_forward_fails(products):
    kept, x = unlimited(), torch.randn(1, 5, 8)
    project(kept, x, products)
    kept.forget()
    assert kept.num_bytes == 0
    project(kept, x, products)
    assert products[0].calls == 2
    with pytest.raises(MemoryError), kept.in_forward(LAYERS):
        raise MemoryError
    assert kept.num_bytes == 0


def test_a_layer_that_is_looked_at_is_not_plain():
    layer = nn.Linear(2, 2)
    assert is_plain(layer)
    handle = layer.register_forward_hook(lambda module, args, out: out.mul_(2.0))
    assert not is_plain(layer)
    handle.remove()
    layer.forward = lambda x: x
    assert not is_plain(layer)
    del layer.forward
    layer.weight_function = [lambda weight: weight]
    assert not is_plain(layer)


def test_a_layer_of_a_patch_is_not_plain():
    class Linear(nn.Linear):
        """As one that goes by the step."""

    assert not is_plain(Linear(2, 2)) and not is_plain(nn.Sequential(nn.Linear(2, 2)))


def forwards_of_two_texts(path, degrees):
    """On each rank: the answers of steps with two texts in turn, those of a host that keeps nothing, and the calls of a layer
    of each."""
    config = ParallelConfig(*degrees)
    group = SequenceParallelGroup.create(config) if config.world_size > 1 else SequenceParallelGroup.single()
    answers, calls = [], []
    for left in (math.inf, 0.0):
        host = load_host(path)
        host.kept_text = KeptText(lambda left=left: left)
        counted = []
        host.module("transformer_blocks.1.attn2.to_v").register_forward_hook(
            lambda *args, counted=counted: counted.append(1)
        )
        found = []
        for step in range(6):
            inputs = CASES[0].inputs(host.model)
            inputs["timestep"] = inputs["timestep"] * (1.0 - 0.1 * step)
            inputs["context"] = inputs["context"] * (1.0 + step % 2)
            answer = host.forward(group, inputs)
            found.append({name: tensor.clone() for name, tensor in answer.items()} if answer else {})
        answers.append(found)
        calls.append(len(counted))
    same = all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(*answers)
    )
    return same, calls, len(answers[0][0])


@pytest.mark.parametrize("degrees", [(1, 1), (2, 1), (1, 2), (1, 1, 2)])
@pytest.mark.parametrize("version, kept_calls", [("LTX-Video", 2), ("LTX-2", 2), ("LTX-2.3", 6)])
def test_steps_with_a_kept_text_are_bit_for_bit_those_without(ranks, tmp_path, version, kept_calls, degrees):
    path = tmp_path / "model.safetensors"
    save_tiny_checkpoint(path, version)
    world_size = ParallelConfig(*degrees).world_size
    for rank, (same, calls, streams) in enumerate(ranks.run(world_size, forwards_of_two_texts, str(path), degrees)):
        assert same and calls == [kept_calls, 6]
        assert rank > 0 or streams > 0
