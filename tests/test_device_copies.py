"""What is moved to a device once, and when it is moved again. A conversion on the CPU stands for the move."""

import gc
import weakref

import pytest
import torch

from rayltx.device_copies import DeviceCopies

BFLOAT16 = torch.bfloat16


@pytest.fixture
def copies():
    return DeviceCopies(torch.device("cpu"))


def kept(copies, tensor):
    """A copy that is kept: of a tensor that is asked for a second time."""
    copies.of(tensor, BFLOAT16)
    copy = copies.of(tensor, BFLOAT16)
    assert copies.of(tensor, BFLOAT16) is copy and torch.equal(copy, tensor.to(BFLOAT16))
    return copy


@pytest.mark.parametrize("in_inference_mode", [False, True])
def test_a_copy_is_kept_from_the_second_time_on(copies, in_inference_mode):
    text = torch.randn(100)
    with torch.inference_mode(in_inference_mode):
        first = copies.of(text, BFLOAT16)
        assert not copies.num_bytes, "what comes once leaves nothing"
        assert torch.equal(first, kept(copies, text)) and copies.num_bytes == 200


@pytest.mark.parametrize("write", [lambda x: x.add_(1), lambda x: x[:50].zero_(), lambda x: x.view(2, 50).mul_(3)])
def test_a_copy_that_a_model_writes_to_is_made_anew(copies, write):
    text = torch.randn(100)
    copy = kept(copies, text)
    with torch.inference_mode():
        write(copy)
        again = copies.of(text, BFLOAT16)
    assert again is not copy and torch.equal(again, text.to(BFLOAT16))


def test_what_is_written_to_the_source_is_seen(copies):
    text = torch.randn(100)
    kept(copies, text)
    with torch.inference_mode():
        text.add_(1)
        assert torch.equal(copies.of(text, BFLOAT16), text.to(BFLOAT16))
        assert torch.equal(kept(copies, text), text.to(BFLOAT16))


def test_a_copy_goes_with_its_source(copies):
    text = torch.randn(100)
    copy = weakref.ref(kept(copies, text))
    del text
    gc.collect()
    assert copy() is None and not copies.num_bytes


def test_a_copy_goes_when_it_is_let_go_of(copies):
    text = torch.randn(100)
    copy = weakref.ref(kept(copies, text))
    copies.clear()
    gc.collect()
    assert copy() is None
    assert torch.equal(kept(copies, text), text.to(BFLOAT16))


def test_tensors_whose_writes_are_not_counted_are_moved_each_time(copies):
    with torch.inference_mode():
        text = torch.randn(100)
        copies.of(text, BFLOAT16)
        first = copies.of(text, BFLOAT16)
        assert copies.of(text, BFLOAT16) is not first and not copies.num_bytes


def test_no_more_is_kept_than_it_may():
    copies, texts = DeviceCopies(torch.device("cpu"), max_bytes=500), [torch.randn(100) for _ in range(3)]
    for _ in range(3):
        for text in texts:
            assert torch.equal(copies.of(text, BFLOAT16), text.to(BFLOAT16))
    assert copies.num_bytes == 400


def test_tensors_are_found_within_containers_and_those_that_are_there_stay(copies):
    text = torch.randn(3)
    inputs = {"a": [text, (text, "name")], "b": 1}
    found = copies.in_containers(inputs)
    assert found["a"][0] is text and found["a"][1][0] is text and found["a"][1][1] == "name" and found["b"] == 1
    away = DeviceCopies(torch.device("meta"))
    assert away.in_containers(inputs)["a"][1][0].is_meta
