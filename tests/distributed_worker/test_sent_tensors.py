"""Memory files that are written again: only when nobody looks at what is in them."""

import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch

from rayltx.distributed_worker.messages import AnswerTensors, Received, SentTensors, pack, unpack
from rayltx.distributed_worker.shared_bytes import Access, Segment
from rayltx.errors import ClusterError

NUM = 100_000


def numbers(value, size=NUM):
    return np.full(size, value, np.uint8)


def crossed(message):
    """As it arrives elsewhere. What has come by itself is not held by who sent it."""
    return pickle.loads(pickle.dumps(message))


def files():
    return {link for fd in os.listdir("/proc/self/fd") if "memfd:rayltx" in (link := _target(fd))}


def _target(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # of the listing itself
        return ""


def test_a_segment_is_not_written_while_a_message_names_its_bytes():
    segment = Segment([numbers(1)])
    parts = segment.parts()
    assert not segment.rewrite([numbers(2)])
    assert (parts[0].array() == 1).all()
    del parts
    assert segment.rewrite([numbers(2)]) and (segment.views()[0] == 2).all()


def test_a_segment_is_not_written_while_a_tensor_lies_on_it():
    segment = Segment([numbers(1)])
    tensor = torch.from_numpy(crossed(segment.parts()[0]).array(access=Access.OWN))[5:].view(-1, 5)
    assert not segment.rewrite([numbers(2)])
    assert (tensor == 1).all()
    del tensor
    assert segment.rewrite([numbers(2)])


def test_who_comes_too_late_finds_out():
    segment = Segment([numbers(1)])
    late = crossed(segment.parts()[0])
    assert segment.rewrite([numbers(2)])
    with pytest.raises(ClusterError, match=r"what process .* has shared is gone.*other bytes"):
        late.array()
    assert (crossed(segment.parts()[0]).array() == 2).all()


def test_bytes_of_another_size_need_another_segment():
    segment = Segment([numbers(1), numbers(2)])
    assert not segment.rewrite([numbers(1)]) and not segment.rewrite([numbers(1), numbers(2, NUM + 1)])
    assert [view[0] for view in segment.views()] == [1, 2]


def _hold(part, ready, end):
    held = part.array()
    ready.set()
    end.wait(60)
    os._exit(int(held[0]))  # without an orderly end


def test_a_process_that_ends_holds_nothing_any_more():
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    segment = Segment([numbers(7)])
    process = context.Process(target=_hold, args=(crossed(segment.parts()[0]), ready, end))
    process.start()
    assert ready.wait(60)
    assert not segment.rewrite([numbers(2)])
    end.set()
    process.join(60)
    assert process.exitcode == 7 and segment.rewrite([numbers(2)])


def test_steps_take_turns_with_few_files_and_what_stays_the_same_stays():
    before, store = files(), SentTensors()
    text = torch.arange(NUM, dtype=torch.float32)
    for step in range(40):
        latent = torch.full((NUM,), float(step))  # as large as the text
        message = crossed(pack({"latent": latent, "text": text.clone()}, store))
        found = unpack(message)
        assert torch.equal(found["latent"], latent) and torch.equal(found["text"], text)
        if step == 0:
            text_file = message.tensors[1].data.segment
        assert message.tensors[1].data.segment == text_file
        del message, found
    assert len(store) <= 7 and len(files() - before) <= 7, "one for each step"


def test_a_latent_that_a_worker_keeps_is_not_overwritten():
    store = SentTensors()
    kept = [unpack(crossed(pack(torch.full((NUM,), float(step)), store))) for step in range(20)]
    assert all(bool((tensor == step).all()) for step, tensor in enumerate(kept))


def test_what_is_as_large_as_all_room_is_written_over_at_once():
    before, store = files(), SentTensors(max_bytes=9 * NUM)
    for step in range(5):
        latent = torch.full((NUM,), float(step))
        assert torch.equal(unpack(crossed(pack(latent, store))), latent)
    assert len(files() - before) <= 2


def test_answers_take_turns_and_the_last_one_stays():
    before, store = files(), AnswerTensors()
    last, kept = None, None
    for step in range(20):
        answer = pack([torch.full((NUM,), float(step)), torch.zeros(3)], store)
        arrived = crossed(last) if last is not None else None  # of a caller who is late by one
        assert arrived is None or (unpack(arrived)[0] == step - 1).all()
        kept = unpack(crossed(answer))[0] if step == 5 else kept
        last = answer
    assert (kept == 5).all()
    assert len(files() - before) <= 4


def test_large_answers_leave_nothing_behind():
    before, store = files(), AnswerTensors(max_bytes=1000)
    pack(torch.zeros(NUM), store)
    assert files() == before


def arrived(store, received, obj):
    return unpack(crossed(pack(obj, store)), received=received)


def test_what_comes_again_is_the_same_tensor_and_what_does_not_is_not_kept():
    store, received = SentTensors(), Received()
    text = torch.arange(NUM, dtype=torch.float32)
    found = []
    for step in range(6):
        inputs = arrived(store, received, {"latent": torch.full((NUM,), float(step)), "text": text.clone()})
        assert torch.equal(inputs["text"], text) and (inputs["latent"] == step).all()
        found.append(inputs["text"])
        assert len(received) == min(step, 1)
    assert found[0] is not found[1] and all(tensor is found[1] for tensor in found[2:])


def test_texts_that_take_turns_are_each_the_same_tensor():
    store, received = SentTensors(), Received()
    texts = [torch.full((NUM,), float(number)) for number in range(4)]
    steps = [[arrived(store, received, text.clone()) for text in texts] for _ in range(4)]
    assert all(steps[3][number] is steps[1][number] for number in range(4))
    assert all(torch.equal(steps[3][number], texts[number]) for number in range(4))


def test_what_was_written_to_comes_anew():
    store, received = SentTensors(), Received()
    text = torch.arange(NUM, dtype=torch.float32)
    for _ in range(4):
        found = arrived(store, received, text)
        assert torch.equal(found, text)
        with torch.inference_mode():
            found[10:20].add_(1)


def test_a_tensor_that_is_changed_in_place_is_sent_again():
    store, received = SentTensors(), Received()
    text = torch.arange(NUM, dtype=torch.float32)
    for _ in range(4):
        assert torch.equal(arrived(store, received, text), text)
    text.numpy()[-1] = 0  # which no version counts
    assert torch.equal(arrived(store, received, text), text)


def test_equal_tensors_of_one_call_are_two_tensors():
    store, received = SentTensors(), Received()
    text = torch.arange(NUM, dtype=torch.float32)
    for _ in range(4):
        one, other = arrived(store, received, [text, text.clone()])
        other.zero_()
        assert torch.equal(one, text)


def test_what_does_not_come_again_is_let_go_of():
    store, received = SentTensors(), Received()
    for _ in range(3):
        arrived(store, received, torch.zeros(NUM))
    assert len(received) == 1
    for step in range(6):
        arrived(store, received, torch.full((NUM,), step + 1.0))
    assert not len(received)
