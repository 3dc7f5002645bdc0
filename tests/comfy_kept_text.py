"""What ranks run to see whether the text's keys are kept, in ComfyUI's models. In a module of its own: they import it by name."""

import contextlib
import math
from unittest import mock

import torch
from comfy_models import tiny_model

from rayltx.diffusion_models.lightricks.comfyui_host import OVERRIDE
from rayltx.diffusion_models.lightricks.comfyui_rows import shared
from rayltx.diffusion_models.lightricks.kept_text import KeptText
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig

CPU = torch.device("cpu")


@contextlib.contextmanager
def _products():
    """Products of a layer with a text that are really made, within the `with`: a list of them."""
    made = []
    project = KeptText.project

    def counting(self, layer, product, x):
        def counted(x):
            made.append(layer)
            return product(x)

        return project(self, layer, counted, x)

    with mock.patch.object(KeptText, "project", counting):
        yield made


def answers_by_case(path, version, degrees):
    """By case: whether each of three calls gives the bits of one that keeps nothing, and the products made in each."""
    model = tiny_model(path, version)
    from rayltx.comfy_dist import self_test

    config = ParallelConfig(*degrees)
    group = SequenceParallelGroup.create(config) if config.world_size > 1 else SequenceParallelGroup.single()
    found = {}
    for case in self_test.cases_for(model, group):
        with self_test.own_attention_of(model, case), torch.inference_mode():
            with shared(model, group):
                plain = self_test.call(model, case, CPU)
            kept, made = KeptText(lambda: math.inf), []
            for _ in range(3):
                with _products() as products, shared(model, group, kept_text=kept):
                    answer = self_test.call(model, case, CPU)
                made.append((all(map(torch.equal, answer, plain)), len(products)))
            found[case.name] = made
    return found


def products_of_patched(path):
    """By what was done to a model of two blocks: the products made in a second call with the same text, and the layers kept."""
    model = tiny_model(path, "LTX-2")
    from rayltx.comfy_dist import self_test

    group = SequenceParallelGroup.create(ParallelConfig(2, 1))
    args, kwargs = self_test.forward_arguments(model, self_test.CASES[0], CPU)
    attention = model.transformer_blocks[0].attn2

    def second_call(options=None):
        given = {**kwargs, "transformer_options": {**kwargs.get("transformer_options", {}), **(options or {})}}
        kept = KeptText(lambda: math.inf)
        with torch.inference_mode():
            for _ in range(2):
                with _products() as products, shared(model, group, kept_text=kept):
                    self_test.answer(model, args, given)
        return len(products), sum(len(text.projected) for text in kept._texts)

    def replaced_block(arguments, extra):
        return extra["original_block"](arguments)

    found = {"nothing": second_call()}
    found["another attention for all"] = second_call(
        {OVERRIDE: lambda kernel, *args, **kwargs: kernel(*args, **kwargs)}
    )
    found["a replaced block"] = second_call({"patches_replace": {"dit": {("double_block", 0): replaced_block}}})
    own = type(attention).forward
    attention.forward = lambda *args, **kwargs: own(attention, *args, **kwargs)
    found["another forward of one attention"] = second_call()
    del attention.forward
    handle = attention.to_k.register_forward_hook(lambda layer, args, out: out.mul_(1.0))
    found["a hook on one layer"] = second_call()
    handle.remove()

    class ByTheStep(torch.nn.Module):
        """A patch in the place of a layer, which gives another answer each time."""

        def __init__(self, layer):
            super().__init__()
            self.layer, self.calls = layer, 0

        def forward(self, x):
            self.calls += 1
            return self.layer(x) * self.calls

    attention.to_v = ByTheStep(attention.to_v)
    found["a layer of a patch"] = (*second_call(), attention.to_v.calls)
    return found
