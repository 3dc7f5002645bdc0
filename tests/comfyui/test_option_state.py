"""Options that do not change are not pickled again, and a flag that is flipped anywhere in them is seen."""

from __future__ import annotations

import functools
from typing import ClassVar

import comfy_scenarios as scenarios
import pytest
import torch
from comfy_models import CONFIGS

pytestmark = pytest.mark.comfyui
COUNT = {"of calls": 0}


class Flag:
    def __init__(self):
        self.skip = False


class Wrapper:
    def __init__(self, flag, weights):
        self.flag, self.weights = flag, weights

    def __call__(self, args, extra):
        return extra["original_block"](args)


def options_with(flag, weights, tables, scale):
    def closure(args, extra):
        return args, extra, tables["scale"], scale, COUNT["of calls"]

    patches = {
        ("double_block", 0): Wrapper(flag, weights),
        ("double_block", 1): closure,
        2: functools.partial(closure, 1),
    }
    return {"patches_replace": {"dit": patches}, "other": [1, 2.0, "three", None, {"a": torch.float32}]}


@pytest.fixture
def state_of(comfy):
    from rayltx.comfy_dist.main_process.forwarding import is_sent_whole
    from rayltx.comfy_dist.main_process.option_state import OptionState

    return lambda options: OptionState(options, is_sent_whole, lambda obj: None)


@pytest.mark.parametrize("inference_mode", [False, True])
def test_every_change_is_seen(state_of, monkeypatch, inference_mode):
    with torch.inference_mode(inference_mode):
        flag, weights, tables = Flag(), torch.ones(5), {"scale": 1.0}
        options = options_with(flag, weights, tables, 1.0)
        before = state_of(options)
        assert state_of(options).is_same(before) and not before.is_same(None)
        flag.skip = True
        assert not state_of(options).is_same(before)
        flag.skip = False
        weights[2] = 3.0
        assert not state_of(options).is_same(before)
        weights[2] = 1.0
        tables["scale"] = 2.0
        assert not state_of(options).is_same(before)
        tables["scale"] = 1.0
        monkeypatch.setitem(COUNT, "of calls", 1)
        assert not state_of(options).is_same(before), "a global that a function reads"
        monkeypatch.undo()
        options["other"][0] = True  # which equals 1
        assert not state_of(options).is_same(before)
        options["other"][0] = 1
        assert state_of(options).is_same(before)
        options["patches_replace"]["dit"][3] = None
        assert not state_of(options).is_same(before)
        assert not state_of(options_with(flag, weights, tables, 1.0)).is_same(before), "other objects"


class Base:
    flags: ClassVar[dict] = {"on": False}


class Derived(Base):
    def __call__(self, args, extra):
        return COUNT["of calls"]


def test_a_flag_is_seen_wherever_it_is(state_of, monkeypatch):
    def plain():
        return 1

    def nested():
        return [COUNT["of calls"] for _ in range(2)]

    first, second = [1], [2]
    derived, table = Derived(), {"a": 1}
    options = {
        "plain": plain, "nested": nested, "derived": derived, "regions": [first, second], "current": first, "get": table.get
    }  # fmt: skip

    def change_all():
        yield lambda: setattr(plain, "on", True), lambda: delattr(plain, "on")
        yield lambda: COUNT.update({"of calls": 1}), lambda: COUNT.update({"of calls": 0})
        yield lambda: Base.flags.update(on=True), lambda: Base.flags.update(on=False)
        yield lambda: options.update(current=second), lambda: options.update(current=first)
        yield lambda: table.update(a=2), lambda: table.update(a=1)

    before = state_of(options)
    for number, (change, undo) in enumerate(change_all()):
        change()
        assert not state_of(options).is_same(before), number
        undo()
        assert state_of(options).is_same(before), number
    nested_alone = state_of({"nested": nested})
    monkeypatch.setitem(COUNT, "of calls", 3)
    assert not state_of({"nested": nested}).is_same(nested_alone)


@pytest.mark.parametrize(
    "hidden",
    [torch.Generator(), iter([1]), torch.ones(5000), torch.nn.Linear(1, 1), type("S", (), {"__slots__": ("a",)})()],
)
def test_what_cannot_be_seen_is_not_taken_for_the_same(state_of, hidden):
    from rayltx.comfy_dist.main_process.option_state import Unknown

    with pytest.raises(Unknown):
        state_of({"patches": {"a": [hidden]}})


def test_a_sampling_packs_its_options_once(models, monkeypatch):
    from rayltx.comfy_dist.main_process import worker_link

    _, twin, _ = models("LTX-Video")
    twin = twin.clone()
    flag = Flag()
    twin.set_model_patch_replace(Wrapper(flag, torch.ones(3)), "dit", "double_block", 0)
    packed, pack = [], worker_link.pack
    monkeypatch.setattr(worker_link, "pack", lambda obj, **more: packed.append(obj) or pack(obj, **more))

    def sample():
        packed.clear()
        with torch.inference_mode():
            scenarios.euler(twin, "LTX-Video", CONFIGS["LTX-Video"])
        return sum("patches_replace" in obj for obj in packed)

    assert sample() == 1
    assert sample() <= 1  # a run has options of its own, the steps of it the same ones
    flag.skip = True
    assert sample() == 1
