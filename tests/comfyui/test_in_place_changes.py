"""What nodes and other packs change in place, on a MODEL or in ComfyUI's code: forwarded exactly, or refused by name."""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import pickle
from unittest import mock

import comfy_scenarios as scenarios
import pytest
import torch
from comfy_models import CONFIGS
from slow_cases import slow

from rayltx.diffusion_models.lightricks.relative_error import relative_error
from rayltx.errors import UnsupportedError
from rayltx.sequence_parallel.partition import ParallelConfig

pytestmark = pytest.mark.comfyui
TOLERANCE = 2e-5  # of a sampling with patches
DEGREES = [(2, 1), *slow((1, 2), (3, 1))]


def lightricks(name="model"):
    return importlib.import_module(f"comfy.ldm.lightricks.{name}")


def sample(model, version):
    with torch.inference_mode():
        return scenarios.tensors_of(scenarios.euler(model, version, CONFIGS[version]))


# ---- as packs do it when they are imported


def block_class(version):
    return (
        lightricks().BasicTransformerBlock if version == "LTX-Video" else lightricks("av_model").BasicAVTransformerBlock
    )


def blocks_of_a_class(version):
    kind = block_class(version)
    original = kind.forward

    def forward(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        return (out[0] * 1.1, *out[1:]) if isinstance(out, tuple) else out * 1.1

    return mock.patch.object(kind, "forward", forward)


def text_attention_of_a_class(version):
    """Which looks at all queries."""
    kind = lightricks().CrossAttention
    original = kind.forward

    def forward(self, x, context=None, *args, **kwargs):
        out = original(self, x, context, *args, **kwargs)
        return out if context is None else out / out.std(dim=1, keepdim=True)

    return mock.patch.object(kind, "forward", forward)


def decorated_blocks_of_a_class(version):
    """By a decorator of torch's, and under one of functools'."""
    kind = block_class(version)
    original = kind.forward

    @torch.no_grad()
    @functools.wraps(original)
    def forward(*args, **kwargs):
        out = original(*args, **kwargs)
        return (out[0] * 1.1, *out[1:]) if isinstance(out, tuple) else out * 1.1

    return mock.patch.object(kind, "forward", forward)


def attention_of_everything(version):
    from comfy.ldm.modules import attention

    original = attention.attention_pytorch

    def sharper(q, k, v, heads, *args, **kwargs):
        q, k, v = (part if isinstance(part, torch.Tensor) else part.take() for part in (q, k, v))  # newer versions' way
        return original(q * 1.5, k, v, heads, *args, **kwargs)

    return mock.patch.multiple(attention, optimized_attention=sharper, optimized_attention_masked=sharper)


def another_of_comfyuis_attentions(version):
    from comfy.ldm.modules import attention

    return mock.patch.object(attention, "optimized_attention", attention.attention_split)


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize(
    "change",
    [
        blocks_of_a_class,
        decorated_blocks_of_a_class,
        text_attention_of_a_class,
        attention_of_everything,
        another_of_comfyuis_attentions,
    ],
)
@pytest.mark.parametrize("version", ["LTX-Video", "LTX-2.3", *slow("LTX-2", "LTX-2.5")])
def test_what_packs_exchange_in_comfyuis_code_reaches_the_workers(models, version, change, degrees):
    whole, twin = models(version)[:2]
    twin = twin.with_config(ParallelConfig(*degrees))
    for module in whole.model.diffusion_model.modules():
        # Left by ComfyUI where an object patch was undone: a method of the class as it was, on the instance.
        vars(module).pop("forward", None)
    plain = sample(whole, version)
    with change(version):
        out, expected = sample(twin, version), sample(whole, version)
    for mine, reference in zip(out, expected):
        assert relative_error(mine, reference) <= TOLERANCE
    if change is not another_of_comfyuis_attentions:
        assert relative_error(expected[0], plain[0]) > 1e-3, "the change does nothing"
    for mine, reference in zip(sample(twin, version), plain):
        assert relative_error(mine, reference) <= scenarios.SAMPLING_TOLERANCE, "it stayed"


def test_what_is_forwarded_is_told_once(models, caplog):
    from rayltx.comfy_dist.main_process.in_place_changes import InPlaceChanges

    model = models("LTX-Video")[1].model.diffusion_model
    changes = InPlaceChanges(model)
    with blocks_of_a_class("LTX-Video"), caplog.at_level(logging.INFO, "rayltx"):
        first, second = (changes.object_patches(model) for _ in range(2))
    names = ["transformer_blocks.0.forward", "transformer_blocks.1.forward"]
    assert list(first) == [f"diffusion_model.{name}" for name in names]
    assert all(first[name] is second[name] for name in first), "the same objects, which are not sent again"
    assert [record.getMessage() for record in caplog.records] == [
        f"changed in place by another pack, and forwarded: {', '.join(names)}"
    ]


def test_a_base_class_does_not_stand_in_for_what_has_another(models):
    """LTX-Video's own method, which the audio-video model has another of."""
    from rayltx.comfy_dist.main_process.code_changes import changed_methods

    base = lightricks().LTXVModel
    with mock.patch.object(base, "_process_input", lambda self, *args, **kwargs: None):
        assert "_process_input" not in changed_methods(models("LTX-2.3")[1].model.diffusion_model)
        assert "_process_input" in changed_methods(models("LTX-Video")[1].model.diffusion_model)


def test_a_packs_attention_and_an_override_are_refused_together(models):
    twin = models("LTX-Video")[1].clone()
    twin.model_options["transformer_options"]["optimized_attention_override"] = scenarios.doubled_scale_attention
    with attention_of_everything("LTX-Video"), pytest.raises(UnsupportedError, match="Remove one of the two"):
        sample(twin, "LTX-Video")


def test_text_is_prepared_by_what_packs_exchanged(models):
    models_of_both = [model.model.diffusion_model for model in models("LTX-2")[:2]]
    context = torch.randn(1, 9, CONFIGS["LTX-2"]["caption_channels"])
    with torch.inference_mode():
        plain = models_of_both[0].preprocess_text_embeds(context)
        with attention_of_everything("LTX-2"):
            expected, out = (model.preprocess_text_embeds(context) for model in models_of_both)
    assert relative_error(expected, plain) > 1e-3, "the change does nothing"
    assert relative_error(out, expected) <= TOLERANCE


def attention_of_torch(version):
    original = torch.nn.functional.scaled_dot_product_attention
    return mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: original(*a, **k))


def imports(version):
    return mock.patch.object(lightricks(), "rearrange", lambda x, *args, **kwargs: x)


def functions(version):
    return mock.patch.object(lightricks(), "apply_rotary_emb", lambda x, *args: x)


def classes(version):
    return mock.patch.object(
        lightricks(), "FeedForward", type("Other", (torch.nn.Module,), {"__module__": "other_pack"})
    )


def layers(version):
    from comfy import ops

    return mock.patch.object(ops.manual_cast, "Linear", type("Other", (torch.nn.Linear,), {"__module__": "other_pack"}))


def methods_of_layers(version):
    from comfy import ops

    original = ops.disable_weight_init.Linear.forward
    return mock.patch.object(ops.disable_weight_init.Linear, "forward", lambda self, *args: original(self, *args) * 1.1)


def functions_of_layers(version):
    from comfy import ops

    original = ops.cast_bias_weight
    return mock.patch.object(ops, "cast_bias_weight", lambda *args, **kwargs: original(*args, **kwargs))


def constructors(version):
    return mock.patch.object(lightricks().FeedForward, "__init__", lambda self, *args, **kwargs: None)


@pytest.mark.parametrize(
    "change, words",
    [
        (attention_of_torch, "torch.nn.functional.scaled_dot_product_attention"),
        (imports, "comfy.ldm.lightricks.model.rearrange"),
        (functions, "comfy.ldm.lightricks.model.apply_rotary_emb"),
        (classes, "comfy.ldm.lightricks.model.FeedForward, which is other_pack.Other"),
        (constructors, "comfy.ldm.lightricks.model.FeedForward.__init__"),
        (layers, "comfy.ops.manual_cast.Linear"),
        (methods_of_layers, "comfy.ops.disable_weight_init.Linear.forward"),
        (functions_of_layers, "comfy.ops.cast_bias_weight"),
    ],
)
def test_other_changes_of_comfyuis_code_are_refused_by_name(models, change, words):
    twin = models("LTX-Video")[1]
    with change("LTX-Video"), pytest.raises(UnsupportedError) as error:
        sample(twin, "LTX-Video")
    assert words in str(error.value)
    sample(twin, "LTX-Video")


@pytest.mark.parametrize("version", list(CONFIGS))
def test_an_untouched_comfyui_is_not_taken_for_changed(models, version):
    from rayltx.comfy_dist.main_process import code_changes

    assert code_changes.unforwardable_changes() == []
    assert code_changes.changed_attention() is None
    assert code_changes.changed_methods(models(version)[1].model.diffusion_model) == {}


def test_a_choice_that_was_exchanged_early_is_seen():
    """By a pack that ComfyUI loads before this one, among ComfyUI's own attentions."""
    from comfy.ldm.modules import attention

    from rayltx.comfy_dist.main_process import code_changes

    other = attention.attention_basic
    assert attention.optimized_attention is not other
    early = mock.patch.dict(code_changes._as_imported, optimized_attention=other, optimized_attention_masked=other)
    with mock.patch.multiple(attention, optimized_attention=other, optimized_attention_masked=other), early:
        assert code_changes.changed_attention() is other


# ---- as nodes do it with a MODEL


WRITING = {
    "in place": lambda weight: weight.mul_(1.1),
    "its data": lambda weight: weight.data.mul_(1.1),
    "a part": lambda weight: weight[0].fill_(1.0),
    "an element": lambda weight: weight.data.__setitem__((0, 0), 1.0),
    "augmented": lambda weight: weight.__imul__(1.1),
    "out": lambda weight: torch.mul(weight, 1.1, out=weight),
    "copied into": lambda weight: weight.data.T.copy_(torch.zeros_like(weight, device="cpu").T),
    "initialised": lambda weight: torch.nn.init.normal_(weight),
    "other data": lambda weight: setattr(weight, "data", torch.empty_like(weight, dtype=torch.float16)),
}
READING = {
    "copied": lambda weight: weight.cpu(),
    "its norm": lambda weight: weight.norm().item(),
    "a comparison": lambda weight: bool((weight.abs() > 1.0).any()),
    "copied from": lambda weight: torch.zeros(weight.shape).copy_(weight.data),
    "computed with": lambda weight: torch.nn.functional.linear(torch.ones(1, weight.shape[1]), weight).tolist(),
    "pickled": lambda weight: pickle.dumps(weight),
    "numpy": lambda weight: weight.float().numpy(),
}


@pytest.mark.parametrize("what", [*WRITING, *READING])
def test_a_touched_weight_says_what_to_do_instead(models, what):
    """It is with the workers: the picture would be the untouched one, or torch would speak of meta tensors."""
    touch = {**WRITING, **READING}[what]
    reference, twin, _ = models("LTX-Video")
    name = "transformer_blocks.1.attn1.to_q.weight"
    with torch.inference_mode(), pytest.raises(UnsupportedError, match=f"the weight {name} of this MODEL") as error:
        touch(twin.model.diffusion_model.get_parameter(name))
    remedy = "add_patches" if what in WRITING else "ComfyUI's own loader"
    assert ("writes into" if what in WRITING else "reads") in str(error.value) and remedy in str(error.value)
    weight = reference.model.diffusion_model.get_parameter(name).clone()
    with torch.inference_mode():
        touch(torch.nn.Parameter(weight, requires_grad=False))  # which a model that has its weights allows


def test_what_a_weight_is_can_be_asked(models):
    twin = models("LTX-Video")[1]
    mine, copied = (
        twin.model.diffusion_model,
        copy.deepcopy(twin.model.diffusion_model.transformer_blocks[0].attn1.to_q),
    )
    theirs = models("LTX-Video")[0].model.diffusion_model
    for name, weight in theirs.named_parameters():
        found = mine.get_parameter(name)
        assert isinstance(found, torch.nn.Parameter)
        assert (found.shape, found.dtype, found.nbytes) == (weight.shape, weight.dtype, weight.nbytes)
    assert copied.weight.shape == theirs.transformer_blocks[0].attn1.to_q.weight.shape
    with torch.inference_mode():
        delta = torch.empty_like(mine.transformer_blocks[0].attn1.to_q.weight).copy_(torch.ones(()))
        assert delta.shape == copied.weight.shape
        mine.to(theirs.dtype)  # which it has


def blocks_in_a_list(model):
    """As caches of the first block do: other blocks for the time of a call."""
    blocks = torch.nn.ModuleList([torch.nn.Identity()])
    return mock.patch.dict(vars(model)["_modules"], transformer_blocks=blocks)


def forward_for_a_call(model):
    return mock.patch.dict(vars(model.transformer_blocks[0].attn1), forward=lambda *args, **kwargs: None)


@pytest.mark.parametrize("change", [blocks_in_a_list, forward_for_a_call])
def test_what_is_changed_around_a_call_is_refused(models, change):
    twin = models("LTX-Video")[1].clone()

    def around(apply_model, arguments):
        with change(twin.model.diffusion_model):
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    twin.set_model_unet_function_wrapper(around)
    with pytest.raises(UnsupportedError, match="changes this MODEL's modules around each step"):
        sample(twin, "LTX-Video")
    sample(models("LTX-Video")[1], "LTX-Video")


@pytest.mark.parametrize("version", ["LTX-Video", *slow("LTX-2.3")])
def test_a_method_that_was_set_on_a_block_reaches_the_workers(models, version):
    whole, twin = models(version)[:2]
    blocks = [model.model.diffusion_model.transformer_blocks[0] for model in (whole, twin)]

    def scaled(original):
        def forward(*args, **kwargs):
            out = original(*args, **kwargs)
            return (out[0] * 0.8, *out[1:]) if isinstance(out, tuple) else out * 0.8

        return forward

    plain = sample(whole, version)
    for block in blocks:
        block.forward = scaled(block.forward)
    try:
        out, expected = sample(twin, version), sample(whole, version)
    finally:
        for block in blocks:
            del block.forward
    assert relative_error(expected[0], plain[0]) > 1e-3, "the change does nothing"
    for mine, reference in zip(out, expected):
        assert relative_error(mine, reference) <= TOLERANCE
    for mine, reference in zip(sample(twin, version), plain):
        assert relative_error(mine, reference) <= scenarios.SAMPLING_TOLERANCE, "it stayed"


def exchange_class(block):
    before = type(block)
    block.__class__ = type("Other", (before,), {})
    return lambda: setattr(block, "__class__", before)


def add_hook(block):
    return block.attn1.register_forward_hook(lambda *_: None).remove


def change_setting(block):
    block.attn1.heads += 1
    return lambda: setattr(block.attn1, "heads", block.attn1.heads - 1)


def replace_parameter(block):
    before = block.attn1.to_q.weight
    block.attn1.to_q.weight = torch.nn.Parameter(torch.empty_like(before), requires_grad=False)
    return lambda: setattr(block.attn1.to_q, "weight", before)


@pytest.mark.parametrize(
    "change, words",
    [
        (exchange_class, "transformer_blocks.1: its class is Other in place of BasicTransformerBlock"),
        (add_hook, "transformer_blocks.1.attn1: hooks in _forward_hooks"),
        (change_setting, "transformer_blocks.1.attn1: the setting heads"),
        (replace_parameter, "transformer_blocks.1.attn1.to_q: the part weight"),
    ],
)
def test_changes_in_place_are_refused_by_name(models, change, words):
    """They would reach no worker, and the picture would be the unpatched one."""
    from rayltx.errors import UnsupportedError

    _, twin, _ = models("LTX-Video")
    undo = change(twin.model.diffusion_model.transformer_blocks[1])
    try:
        with torch.inference_mode(), pytest.raises(UnsupportedError) as error:
            scenarios.euler(twin, "LTX-Video", CONFIGS["LTX-Video"])
        assert words in str(error.value) and "load the model again" in str(error.value)
    finally:
        undo()
    with torch.inference_mode():
        scenarios.euler(twin, "LTX-Video", CONFIGS["LTX-Video"])


def test_a_block_that_was_taken_out_is_seen(models):
    from rayltx.comfy_dist.main_process.module_snapshot import ModuleSnapshot

    model = models("LTX-Video")[0].model.diffusion_model
    snapshot = ModuleSnapshot(model)
    assert snapshot.changes(model) == []
    block = model.transformer_blocks[1]
    del model.transformer_blocks[1]
    assert "transformer_blocks.1 is gone" in snapshot.changes(model)
    model.transformer_blocks.append(block)
    assert snapshot.changes(model) == []
