"""Patches of any kind: shared where they treat tokens by themselves, shown all tokens where they can be, or refused."""

from __future__ import annotations

import logging

import comfy_scenarios as scenarios
import pytest
import torch
from comfy_models import CONFIGS, VERSIONS
from slow_cases import slow

from rayltx.diffusion_models.lightricks.relative_error import relative_error
from rayltx.errors import UnsupportedError
from rayltx.sequence_parallel.partition import ParallelConfig

pytestmark = pytest.mark.comfyui
TOLERANCE = 2e-5  # of a sampling with patches that attend by other kernels than the model
DEGREES = [(2, 1), *slow((1, 2), (3, 1))]


def block_of(model, number):
    return model.model.diffusion_model.transformer_blocks[number]


def own_attention(attention):
    """Self-attention with a kernel of its own, as patches for faster ones have it."""

    def forward(x, context=None, mask=None, pe=None, k_pe=None, transformer_options={}):  # noqa: B006
        from comfy.ldm.lightricks.model import apply_rotary_emb

        query, key = attention.q_norm(attention.to_q(x)), attention.k_norm(attention.to_k(x))
        query, key = apply_rotary_emb(query, pe), apply_rotary_emb(key, pe)
        heads = [y.unflatten(2, (attention.heads, -1)).transpose(1, 2) for y in (query, key, attention.to_v(x))]
        out = torch.nn.functional.scaled_dot_product_attention(*heads)
        return attention.to_out(out.transpose(1, 2).flatten(2))

    return forward


def text_mask_by_query(original):
    """Text attention with a mask for each query by its place, as temporal prompts have it."""

    def forward(x, context=None, mask=None, **kwargs):
        queries, keys = x.shape[1], context.shape[1]
        places = torch.linspace(0, 1, queries, device=x.device, dtype=x.dtype)
        by_query = -6.0 * (places[:, None] - torch.linspace(0, 1, keys, device=x.device, dtype=x.dtype)).abs()
        by_query = by_query.expand(x.shape[0], 1, queries, keys)
        return original(x, context=context, mask=by_query if mask is None else by_query + mask, **kwargs)

    return forward


def normalised_over_tokens(original):
    def forward(x):
        out = original(x)
        return out / out.std(dim=1, keepdim=True)

    return forward


def own_attentions(model):
    for number in range(2):
        attention = block_of(model, number).attn1
        model.add_object_patch(f"diffusion_model.transformer_blocks.{number}.attn1.forward", own_attention(attention))


def text_masks(model):
    attention = block_of(model, 1).attn2
    model.add_object_patch("diffusion_model.transformer_blocks.1.attn2.forward", text_mask_by_query(attention.forward))


def normalised_feed_forward(model):
    feed_forward = block_of(model, 0).ff
    patch = normalised_over_tokens(feed_forward.forward)
    model.add_object_patch("diffusion_model.transformer_blocks.0.ff.forward", patch)


class ChangesTheVideo:
    """A block, and what `change` makes of its video. kinds: the options' `cond_or_uncond`."""

    def __call__(self, args, extra):
        out = extra["original_block"](args)["img"]
        kinds = args["transformer_options"].get("cond_or_uncond")
        video = self.change(out[0] if isinstance(out, tuple) else out, kinds)
        return {"img": (video, *out[1:]) if isinstance(out, tuple) else video}


class NormalisesOverTokens(ChangesTheVideo):
    def change(self, video, kinds):
        return video / video.std(dim=1, keepdim=True)


class ScalesByIndex(ChangesTheVideo):
    def change(self, video, kinds):
        return video * torch.linspace(0.5, 1.5, video.shape[1], device=video.device, dtype=video.dtype)[:, None]


class Scales(ChangesTheVideo):
    def change(self, video, kinds):
        return video * 1.1


def on_a_block(patch):
    def apply(model):
        model.set_model_patch_replace(patch, "dit", "double_block", 0)

    return apply


def inlined_block(model):
    """A block's forward that attends without the attention modules: what they are told by their calls is lost."""
    block = block_of(model, 0)
    original, attention = block.forward, own_attention(block.attn1)

    def forward(x, *args, **kwargs):
        out = original(x, *args, **kwargs)
        video = out[0] if isinstance(out, tuple) else out
        pe = kwargs.get("pe") if kwargs.get("pe") is not None else kwargs.get("v_pe")
        video = video + 0.5 * attention(video, pe=pe)
        return (video, *out[1:]) if isinstance(out, tuple) else video

    model.add_object_patch("diffusion_model.transformer_blocks.0.forward", forward)


def sample(model, version):
    with torch.inference_mode():
        return scenarios.tensors_of(scenarios.euler(model, version, CONFIGS[version]))


@pytest.fixture
def pair(models):
    """pair(version, degrees, apply) -> (ComfyUI's own MODEL, the workers' one), both patched."""

    def get(version, degrees, apply):
        whole, twin = (model.clone() for model in models(version)[:2])
        twin = twin.with_config(ParallelConfig(*degrees))
        apply(whole)
        apply(twin)
        return whole, twin

    return get


@pytest.fixture
def patched(models, pair, caplog):
    """patched(version, degrees, apply) -> (the workers' answer, ComfyUI's own); the log is in caplog."""

    def get(version, degrees, apply):
        whole, twin = pair(version, degrees, apply)
        with caplog.at_level(logging.INFO, "rayltx"):
            return sample(twin, version), sample(whole, version), sample(models(version)[0], version)

    return get


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("apply", [own_attentions, text_masks, normalised_feed_forward])
@pytest.mark.parametrize("version", ["LTX-Video", *VERSIONS[:1], *slow("LTX-2", "LTX-2.5")])
def test_modules_that_look_at_more_than_one_token_are_shown_all(patched, caplog, version, apply, degrees):
    out, expected, plain = patched(version, degrees, apply)
    for mine, reference in zip(out, expected):
        assert relative_error(mine, reference) <= TOLERANCE
    if apply is not own_attentions:  # which is another kernel, and the same attention where the model has no gates
        assert relative_error(expected[0], plain[0]) > 1e-3, "the patch does nothing"
    assert "run on all tokens on every rank" in caplog.text and "exact on" in caplog.text


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize(
    "apply, name",
    [
        (on_a_block(NormalisesOverTokens()), "patches_replace dit"),
        (on_a_block(ScalesByIndex()), "patches_replace dit"),
        (inlined_block, "diffusion_model.transformer_blocks.0.forward"),
    ],
)
@pytest.mark.parametrize("version", ["LTX-Video", *VERSIONS[:1]])
def test_what_cannot_be_shared_is_refused_by_name(patched, version, apply, name, degrees):
    with pytest.raises(UnsupportedError, match=rf"with {name}.*would differ by .*Remove the node that adds it"):
        patched(version, degrees, apply)


@pytest.mark.parametrize("version", ["LTX-Video", *VERSIONS[:1]])
def test_what_treats_tokens_by_themselves_is_shared_and_tried_once(patched, models, caplog, monkeypatch, version):
    from rayltx.distributed_worker.remote_model import RemoteModel

    tried, call_together = [], RemoteModel.call_together

    def noted(self, call, config, what="the step", *args, **kwargs):
        tried.append(what)
        return call_together(self, call, config, what, *args, **kwargs)

    monkeypatch.setattr(RemoteModel, "call_together", noted)
    for attempt in range(2):
        out, expected, _ = patched(version, (2, 1), on_a_block(Scales()))
        assert all(relative_error(mine, reference) <= TOLERANCE for mine, reference in zip(out, expected))
        assert tried.count("trying the patches") == 1, attempt
    assert "all tokens on every rank" not in caplog.text and "patches_replace dit: exact on 2 ranks" in caplog.text
    tried.clear()
    sample(models(version)[1], version)
    assert "trying the patches" not in tried, "nothing to prove without patches"


# ---- patches and the rows of a batch


class MixesRows(ChangesTheVideo):
    def change(self, video, kinds):
        return video - 0.3 * video.mean(0, keepdim=True)


class ScalesTheNegative(ChangesTheVideo):
    def change(self, video, kinds):
        parts = zip(video.chunk(len(kinds)), kinds, strict=True)
        return torch.cat([part * (1.1 if kind else 1.0) for part, kind in parts])


@pytest.mark.parametrize("degrees", [(1, 1, 2), *slow((2, 1, 2))])
@pytest.mark.parametrize("version", ["LTX-Video", *VERSIONS[:1]])
@pytest.mark.parametrize("patch, is_mixing", [(MixesRows(), True), (ScalesTheNegative(), False)])
def test_patches_of_rows(patched, caplog, version, patch, is_mixing, degrees):
    out, expected, plain = patched(version, degrees, on_a_block(patch))
    assert relative_error(expected[0], plain[0]) > 1e-3, "the patch does nothing"
    for mine, reference in zip(out, expected):
        assert relative_error(mine, reference) <= TOLERANCE
    assert ("more than one row of the batch" in caplog.text) is is_mixing
    assert "patches_replace dit: exact on" in caplog.text


class CallsBlocksTwiceFor:
    """One kind of conditioning. Ranks with other rows call fewer, and none may wait for a word about those."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, args, extra):
        img = args["img"]
        kept = tuple(stream.clone() for stream in img) if isinstance(img, tuple) else img.clone()
        out = extra["original_block"](args)
        if self.kind in args["transformer_options"]["cond_or_uncond"]:
            out = extra["original_block"]({**args, "img": kept})
        return out


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("version", ["LTX-Video", VERSIONS[0]])
def test_ranks_may_have_unlike_numbers_of_blocks(patched, caplog, version, kind):
    out, expected, _ = patched(version, (1, 1, 2), on_a_block(CallsBlocksTwiceFor(kind)))
    assert all(relative_error(mine, reference) <= TOLERANCE for mine, reference in zip(out, expected))
    assert "exact on 2 ranks" in caplog.text and "no answer" not in caplog.text


class MixesUnderGuidance(MixesRows):
    def change(self, video, kinds):
        return video if len(kinds) == 1 else super().change(video, kinds)


@pytest.mark.parametrize("degrees", [(1, 1, 2), (1, 1, 2, 2)])
def test_patches_find_their_rows_among_clips_under_guidance(pair, caplog, degrees):
    """Two clips of two conditionings, over two groups and over four."""
    version = VERSIONS[0]
    whole, twin = pair(version, degrees, on_a_block(ScalesTheNegative()))
    clips = scenarios.Workspace(version, CONFIGS[version], batch=2)
    with torch.inference_mode(), caplog.at_level(logging.INFO, "rayltx"):
        out, reference = (
            scenarios.tensors_of({"samples": scenarios.ksampler(m, clips)["samples"]}) for m in (twin, whole)
        )
    assert all(relative_error(mine, theirs) <= TOLERANCE for mine, theirs in zip(out, reference))
    assert "exact on" in caplog.text and "more than one row" not in caplog.text


def test_a_patch_is_proved_as_its_rows_are_shared(pair):
    """Clips whose masks differ are shared by all ranks: what is right for rows apart is not for these."""
    version = VERSIONS[0]
    _, twin = pair(version, (1, 1, 2), on_a_block(NormalisesOverTokens()))
    clips = scenarios.Workspace(version, CONFIGS[version], batch=2)
    with torch.inference_mode():
        scenarios.ksampler(twin, clips, cfg=1.0)  # a rank has all tokens of its clip
        latent = clips.latent()
        video = torch.ones(2, 1, scenarios.FRAMES, scenarios.HEIGHT, scenarios.WIDTH)
        video[0, :, 0] = 0.0
        masked = {**latent, "noise_mask": _with_audio(video, latent)}
        with pytest.raises(UnsupportedError, match="would differ by"):
            scenarios.ksampler(twin, clips, masked, cfg=1.0)


def _with_audio(video_mask, latent):
    """A mask as ComfyUI's audio-video latents have it, of both streams."""
    import comfy.nested_tensor

    audio = latent["samples"].unbind()[1]
    return comfy.nested_tensor.NestedTensor((video_mask, torch.ones_like(audio)))


def test_what_is_proved_for_two_clips_is_not_taken_for_guidance(pair, caplog):
    """As many rows, of one conditioning and of two."""
    version = VERSIONS[0]
    whole, twin = pair(version, (1, 1, 2), on_a_block(MixesUnderGuidance()))
    work, clips = (scenarios.Workspace(version, CONFIGS[version], batch=batch) for batch in (1, 2))
    with torch.inference_mode(), caplog.at_level(logging.INFO, "rayltx"):
        for cfg, each in ((1.0, clips), (3.0, work)):
            out, reference = (
                scenarios.tensors_of({"samples": scenarios.ksampler(model, each, cfg=cfg)["samples"]})
                for model in (twin, whole)
            )
            assert all(relative_error(mine, theirs) <= TOLERANCE for mine, theirs in zip(out, reference)), cfg
            assert ("more than one row of the batch" in caplog.text) is (cfg != 1.0)


# ---- what packs do besides


def smooth(video):
    """Takes tokens for frames, rows and columns of the sampling's own size."""
    frames = video.reshape(video.shape[0], scenarios.FRAMES, scenarios.HEIGHT, scenarios.WIDTH, -1)
    return (0.5 * frames + 0.5 * frames.mean(1, keepdim=True)).flatten(1, 3)


class SmoothsFrames(ChangesTheVideo):
    def change(self, video, kinds):
        return smooth(video)


def smoothed_over_frames(original):
    def forward(x, *args, **kwargs):
        return smooth(original(x, *args, **kwargs))

    return forward


def smoothed_attention(model):
    attention = block_of(model, 0).attn1
    model.add_object_patch(
        "diffusion_model.transformer_blocks.0.attn1.forward", smoothed_over_frames(attention.forward)
    )


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("version", ["LTX-Video", *VERSIONS[:1], *slow("LTX-2", "LTX-2.5")])
def test_tokens_that_are_taken_for_frames(patched, caplog, version, degrees):
    """Small inputs have another size than the patch is for: it is tried on the step's own."""
    out, expected, plain = patched(version, degrees, smoothed_attention)
    assert all(relative_error(mine, reference) <= TOLERANCE for mine, reference in zip(out, expected))
    assert relative_error(expected[0], plain[0]) > 1e-3, "the patch does nothing"
    assert "run on all tokens on every rank" in caplog.text
    with pytest.raises(UnsupportedError, match=r"with patches_replace dit.*does not run there"):
        patched(version, degrees, on_a_block(SmoothsFrames()))


def changed_on_the_way(model):
    """Wrappers around the model's call, which change what they pass on and what comes back."""
    import comfy.patcher_extension

    def around_the_call(executor, x, timestep, context, *args, **kwargs):
        return executor(x, timestep, context * 1.1, *args, **kwargs)

    def around_all(executor, x, *args, **kwargs):
        return executor(x * 1.05, *args, **kwargs) * 0.9

    kinds = comfy.patcher_extension.WrappersMP
    model.add_wrapper_with_key(kinds.DIFFUSION_MODEL, "tests", around_the_call)
    model.add_wrapper_with_key(kinds.APPLY_MODEL, "tests", around_all)


def injected(model):
    """What is put into the modules while they are in use, and taken out again."""
    from comfy.patcher_extension import PatcherInjection

    def inject(patcher):
        feed_forward = patcher.model.diffusion_model.transformer_blocks[1].ff
        original = feed_forward.forward
        feed_forward.forward = lambda x: original(x) * 1.2

    def eject(patcher):
        vars(patcher.model.diffusion_model.transformer_blocks[1].ff).pop("forward", None)

    model.set_injections("tests", [PatcherInjection(inject, eject)])


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("apply", [changed_on_the_way, injected])
@pytest.mark.parametrize("version", ["LTX-Video", *VERSIONS[:1], *slow("LTX-2", "LTX-2.5")])
def test_wrappers_and_injections(patched, caplog, models, version, apply, degrees):
    out, expected, plain = patched(version, degrees, apply)
    assert all(relative_error(mine, reference) <= TOLERANCE for mine, reference in zip(out, expected))
    assert relative_error(expected[0], plain[0]) > 1e-3, "the patch does nothing"
    assert "all tokens on every rank" not in caplog.text
    again = sample(models(version)[1].with_config(ParallelConfig(*degrees)), version)
    assert all(relative_error(mine, reference) <= TOLERANCE for mine, reference in zip(again, plain)), "it stayed"
