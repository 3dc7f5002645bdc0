"""Sizes, positions, timesteps, schedules: no model, no process."""

import math

import pytest
import torch

from rayltx.diffusion_models.lightricks.feed_forward import chunk_tokens, chunked_feed_forward
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape, video_positions
from rayltx.diffusion_models.lightricks.relative_error import relative_error
from rayltx.diffusion_models.lightricks.sampling import initial_noise, parse_sigmas, sample, schedule
from rayltx.diffusion_models.lightricks.timestep_rows import TimestepRows
from rayltx.errors import InputError


def test_latent_of_a_video():
    assert LatentShape.from_pixels(1280, 704, 121) == LatentShape(16, 22, 40)
    assert LatentShape(16, 22, 40).num_tokens == 14080
    assert LatentShape(16, 22, 40).pixel_frames == 121


@pytest.mark.parametrize(
    "size, message",
    [
        ((100, 64, 9), "width=100 must be a positive multiple of 32; try 96"),
        ((64, 0, 9), "height=0 .* try 32"),
        ((64, 64, 0), "frames=0 must be 8k"),
        ((64, 64, 24), "frames=24 must be 8k .* try 25"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_a_remedy(size, message):
    with pytest.raises(InputError, match=message):
        LatentShape.from_pixels(*size)


def test_positions_equal_diffusers_own_for_any_part_of_the_tokens():
    from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed

    shape = LatentShape(3, 4, 5)
    theirs = LTX2AudioVideoRotaryPosEmbed(dim=96).prepare_video_coords(1, 3, 4, 5, torch.device("cpu"), fps=24.0)[0]
    assert torch.equal(video_positions(shape, 24.0, causal=True), theirs)
    assert torch.equal(video_positions(shape, 24.0, True, slice(17, 41)), theirs[:, 17:41])


def test_positions_of_ltx_video_equal_its_pipelines():
    pytest.importorskip("transformers", reason="diffusers' LTX pipelines import their text encoder's package")
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline

    ids = LTXConditionPipeline._prepare_video_ids(1, 3, 4, 5, device=torch.device("cpu"))
    theirs = LTXConditionPipeline._scale_video_ids(ids, scale_factor=32, scale_factor_t=8, frame_index=0, device="cpu")
    theirs = theirs.float()
    theirs[:, 0] *= 1.0 / 25.0
    ours = video_positions(LatentShape(3, 4, 5), 25.0, causal=True)[..., 0]
    torch.testing.assert_close(ours, theirs[0], rtol=1e-6, atol=0)


SHAPE = LatentShape(4, 2, 3)  # 24 tokens, 6 a frame


@pytest.mark.parametrize(
    "tokens", [slice(0, 24), slice(0, 5), slice(5, 13), slice(6, 12), slice(23, 24), slice(24, 24)]
)
@pytest.mark.parametrize("kind", ["single", "frame", "token", "constant over frames"])
def test_expanded_rows_are_the_tokens_own_timesteps(tokens, kind):
    generator = torch.Generator().manual_seed(0)
    by_token = torch.rand(2, 24, generator=generator)
    by_frame = by_token[:, :4]
    timestep, whole = {
        "single": (by_token[:, 0], by_token[:, :1].expand(2, 24)),
        "frame": (by_frame, by_frame.repeat_interleave(6, 1)),
        "token": (by_token, by_token),
        "constant over frames": (by_frame.repeat_interleave(6, 1),) * 2,
    }[kind]
    rows = TimestepRows.of_tokens(timestep, SHAPE, tokens)
    computed = torch.stack([rows.values.flatten(), -rows.values.flatten()], dim=-1)  # some function of the rows
    expanded = rows.expand(computed).view(2, -1, 2)
    count = tokens.stop - tokens.start
    assert torch.equal(expanded.expand(2, count, 2)[..., 0], whole[:, tokens])


def test_a_rank_keeps_only_the_frames_that_its_tokens_touch():
    by_frame = torch.rand(1, 4)
    rows = TimestepRows.of_tokens(by_frame, SHAPE, slice(7, 13))
    assert torch.equal(rows.values, by_frame[:, 1:3])
    assert rows.index.tolist() == [0, 0, 0, 0, 0, 1]
    by_token = torch.rand(1, 24)
    assert torch.equal(TimestepRows.of_tokens(by_token, SHAPE, slice(7, 13)).values, by_token[:, 7:13])
    assert TimestepRows.of_tokens(by_frame.repeat_interleave(6, 1), SHAPE, slice(7, 13)).values.shape == (1, 2)
    assert TimestepRows.of_tokens(torch.rand(1), SHAPE, slice(7, 13)).index is None


def test_a_timestep_of_another_length_is_refused_not_padded():
    with pytest.raises(InputError, match=r"\(1, 5\): it must hold 1, 4 .* or 24"):
        TimestepRows.of_tokens(torch.rand(1, 5), SHAPE, slice(0, 12))


def test_relative_error():
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == 0.1
    assert relative_error(torch.tensor([[3.0, 4.0]]), reference) == math.inf, "another shape, though it would broadcast"
    assert math.isnan(relative_error(torch.tensor([3.0, math.nan]), reference)), "within no tolerance"


def test_chunks_are_large_enough_and_aligned():
    assert chunk_tokens(10_000, 8) == 1280
    assert chunk_tokens(10_000, 100) == 512
    assert chunk_tokens(100, 1) == 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [2, 3, 8])
def test_chunked_feed_forward_is_the_same(dtype, chunks):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU("tanh"), torch.nn.Linear(256, 64)).to(dtype)
    x = torch.randn(2, 2100, 64, dtype=dtype)
    calls = []
    layers.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    with torch.inference_mode():
        out = chunked_feed_forward(layers, x, chunks)
        length = chunk_tokens(2100, chunks)
        rest = 2100 % length
        assert len(calls) == 2100 // length + (rest >= 512) and sum(calls) == 2100 and min(calls) >= 512
        assert torch.equal(out, layers(x))


def test_the_schedule_is_ltx_own():
    """Against the formula as Lightricks and ComfyUI write it."""
    sigmas = torch.linspace(1.0, 0.0, 21)
    tokens = 2000
    shift = math.exp(tokens * (2.05 - 0.95) / 3072 + 0.95 - 1024 * (2.05 - 0.95) / 3072)
    shifted = torch.where(sigmas != 0, shift / (shift + (1 / sigmas - 1)), torch.zeros(()))
    stretched = 1.0 - (1.0 - shifted[:-1]) * (1.0 - 0.1) / (1.0 - shifted[-2])
    expected = torch.cat([stretched, torch.zeros(1)])
    torch.testing.assert_close(schedule(20, tokens), expected, rtol=1e-5, atol=1e-6)


def test_schedules_of_one_step_and_of_none():
    assert schedule(1, 100).tolist() == [1.0, 0.0]
    with pytest.raises(InputError, match="steps=0"):
        schedule(0, 100)


@pytest.mark.parametrize("text", ["1", "0,1", "1,0.5,0.5,0", "1,a", "1.5,0", "", "1,nan,0"])
def test_sigmas_that_do_not_fall_are_refused(text):
    with pytest.raises(InputError, match="sigmas="):
        parse_sigmas(text)


def test_euler_finds_the_end_of_a_straight_path():
    noise = initial_noise({"video": (1, 2, 3, 4, 5)}, seed=3)
    target = torch.randn(1, 2, 3, 4, 5)
    out = sample(lambda inputs: {"video": noise["video"] - target}, noise, schedule(7, 60), {}, None, cfg=1.0)
    torch.testing.assert_close(out["video"], target, rtol=1e-5, atol=1e-5)


def test_stochastic_steps_are_diffusers_own():
    from diffusers import FlowMatchEulerDiscreteScheduler

    noise, sigmas = initial_noise({"video": (1, 2, 3, 4, 5)}, seed=3), torch.tensor([1.0, 0.8, 0.3, 0.0])

    def velocity(latent, sigma):
        return torch.tanh(latent * (1.0 + sigma))

    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    torch.testing.assert_close(scheduler.sigmas, sigmas)
    torch.manual_seed(7)  # of the generator that it draws from
    expected = noise["video"]
    for sigma, timestep in zip(sigmas, scheduler.timesteps):
        expected = scheduler.step(velocity(expected, sigma), timestep, expected).prev_sample
    out = sample(
        lambda inputs: {"video": velocity(inputs["latent"], inputs["timestep"][0])},
        noise, sigmas, {}, None, cfg=1.0, stochastic_seed=7,
    )  # fmt: skip
    torch.testing.assert_close(out["video"], expected, rtol=1e-6, atol=1e-6)


def test_guidance_moves_away_from_the_negative_side():
    noise = initial_noise({"video": (1, 1, 1, 1, 1)}, seed=0)
    sides = {"yes": 2.0, "no": 1.0}
    out = sample(
        lambda inputs: {"video": torch.full_like(inputs["latent"], sides[inputs["side"]])},
        noise, torch.tensor([1.0, 0.0]), {"side": "yes"}, {"side": "no"}, cfg=3.0,
    )  # fmt: skip
    torch.testing.assert_close(out["video"], noise["video"] - (1.0 + 3.0 * (2.0 - 1.0)))
