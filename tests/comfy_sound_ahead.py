"""What ranks run to see when a ComfyUI block does the sound's own work. A module of its own, imported by name."""

import math
from unittest import mock

import torch
from comfy_models import tiny_model

from rayltx.diffusion_models.lightricks.comfyui_host import sharded
from rayltx.diffusion_models.lightricks.kept_text import KeptText
from rayltx.diffusion_models.lightricks.sound_ahead import SoundAhead
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig
from rayltx.sequence_parallel.ulysses import PendingExchange

CPU = torch.device("cpu")
SENT, WAITED, SOUND, SOUND_FEED_FORWARD = "sent", "waited", "sound", "feed-forward of the sound"


def answers_with_and_without(path, version, degrees):
    """By case of the self-test: whether the bits are those without the sound going ahead, and in how many blocks it went."""
    model = tiny_model(path, version)
    from rayltx.comfy_dist import self_test

    group = SequenceParallelGroup.create(ParallelConfig(*degrees))
    go, given = SoundAhead.go, []

    def counting(sound):
        go(sound)
        given.append(bool(sound._given))

    equal = {}
    with torch.inference_mode():
        for case in self_test.cases_for(model):
            answers = []
            given.clear()
            for instead in (counting, lambda sound: None):
                ahead = mock.patch.object(SoundAhead, "go", instead)
                with self_test.own_attention_of(model, case), ahead, sharded(model, group):
                    answers.append(self_test.call(model, case, CPU))
            equal[case.name] = all(map(torch.equal, *answers)), sum(given)
    return equal


def products_of_the_text(path, version):
    """Whether the sound's and the picture's text are projected, in the first and the second of two steps that keep it."""
    model = tiny_model(path, version)
    from rayltx.comfy_dist import self_test

    group, kept = SequenceParallelGroup.create(ParallelConfig(2)), KeptText(lambda: math.inf)
    args, kwargs = self_test.forward_arguments(model, self_test.CASES[0], CPU)
    block = model.transformer_blocks[0]
    layers = {name: getattr(block, name).to_k.weight.data_ptr() for name in ("attn2", "audio_attn2")}
    linear, found = torch.nn.functional.linear, []

    def spied(x, weight, *rest):
        found[-1].update(name for name, place in layers.items() if weight.data_ptr() == place)
        return linear(x, weight, *rest)

    with torch.inference_mode(), mock.patch.object(torch.nn.functional, "linear", spied):
        for _ in range(2):
            found.append(set())
            with sharded(model, group, kept_text=kept):
                self_test.answer(model, args, kwargs)
    return found


def order_of_events(path, version):
    """By what was done to the model: in what order a block sends, waits and does the sound's work, block for block."""
    model = tiny_model(path, version)
    from rayltx.comfy_dist import self_test

    group = SequenceParallelGroup.create(ParallelConfig(2))
    args, kwargs = self_test.forward_arguments(model, self_test.CASES[0], CPU)
    block = model.transformer_blocks[0]
    sound = {block.audio_attn1.to_q.weight.data_ptr(), block.audio_attn2.to_q.weight.data_ptr()}
    feed_forward = next(p for name, p in block.audio_ff.named_parameters() if name.endswith("weight")).data_ptr()

    def events(options=None):
        found = []
        linear, wait = torch.nn.functional.linear, PendingExchange.wait
        all_to_all = torch.distributed.all_to_all_single

        def spied_linear(x, weight, *rest):
            if weight.data_ptr() in sound:
                found.append(SOUND)
            if weight.data_ptr() == feed_forward:
                found.append(SOUND_FEED_FORWARD)
            return linear(x, weight, *rest)

        def spied_send(*args, **kwargs):
            found.append(SENT)
            return all_to_all(*args, **kwargs)

        def spied_wait(pending):
            found.append(WAITED)
            return wait(pending)

        # What comes behind is another block's.
        hook = model.transformer_blocks[1].register_forward_pre_hook(lambda *_: found.append(None))
        given = {**kwargs, "transformer_options": {**kwargs.get("transformer_options", {}), **(options or {})}}
        with (
            torch.inference_mode(),
            mock.patch.object(torch.nn.functional, "linear", spied_linear),
            mock.patch.object(torch.distributed, "all_to_all_single", spied_send),
            mock.patch.object(PendingExchange, "wait", spied_wait),
            sharded(model, group),
        ):
            self_test.answer(model, args, given)
        hook.remove()
        return found[: found.index(None)]

    attention, own = block.audio_attn1, type(block).forward
    found = {"nothing": events()}
    found["an override"] = events({"optimized_attention_override": lambda kernel, *a, **k: kernel(*a, **k)})
    found["a patch of attention"] = events({"patches": {"attn1_patch": [lambda q, k, v, extra: (q, k, v)]}})
    with mock.patch.object(attention, "forward", attention.forward):
        found["a forward of the sound's attention"] = events()
    hook = attention.register_forward_hook(lambda *_: None)
    found["a hook on it"] = events()
    hook.remove()
    with mock.patch.object(type(block), "forward", lambda self, *args, **kwargs: own(self, *args, **kwargs)):
        found["a forward of the block's class"] = events()
    found["no sound to go on with"] = events({"run_ax": False})
    found["nothing any more"] = events()
    return found
