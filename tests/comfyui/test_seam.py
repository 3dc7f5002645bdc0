"""The seam on gloo ranks: every case of the self-test, on every version of the model, for every degree."""

import pytest
from comfy_checkout import find_comfyui
from comfy_models import CONFIGS
from comfy_ranks import (
    audio_of_every_rank,
    layer_traffic,
    nvfp4_answers,
    nvfp4_steps_with_rows_apart,
    projected_answers,
    projected_calls_of_patched,
    rows_in_blocks,
    seam_errors,
    tables_of_the_video,
)

from rayltx.diffusion_models.lightricks.relative_error import TOLERANCE
from rayltx.sequence_parallel.partition import ParallelConfig

DEGREES = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2)]
ROWS_APART = [(1, 1, 2), (2, 1, 2), (1, 2, 2), (1, 1, 2, 2)]
UNEQUAL = [(2, 1, 1, 1, (3.0, 1.0)), (2, 2, 1, 1, (1.0, 2.0, 3.0, 1.5)), (2, 1, 1, 1, (1e6, 1.0))]


@pytest.mark.parametrize("degrees", [*DEGREES, *ROWS_APART, *UNEQUAL])
@pytest.mark.parametrize("version", list(CONFIGS))
def test_every_case_equals_one_process(comfy, ranks, version, degrees):
    world_size = ParallelConfig(*degrees).world_size
    errors = ranks.run(world_size, seam_errors, str(find_comfyui()), version, degrees)[0]
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("version", ["LTX-Video", "LTX-2.5"])
def test_rows_are_really_apart(comfy, ranks, version):
    found = ranks.run(4, rows_in_blocks, str(find_comfyui()), version, (1, 1, 2, 2))
    tokens = 3 * 3 * 5
    quarters = [12, 11, 11, 11]
    for rank, seen in enumerate(found):
        assert seen["4 rows"] == [(1, tokens)]
        assert seen["2 rows"] == [(1, [23, 22][rank % 2])], "two groups of two ranks, which share the tokens"
        for name in set(seen) - {"4 rows", "2 rows"}:
            rows = int(name[0]) if name[0].isdigit() else 2
            assert seen[name] == [(rows, quarters[rank])], name


@pytest.mark.parametrize("degrees", [(3, 1), (2, 2)])
@pytest.mark.parametrize("version", ["LTX-2", "LTX-2.5"])
def test_ranks_hold_the_same_audio_bit_for_bit(comfy, ranks, version, degrees):
    world_size = degrees[0] * degrees[1]
    audio = ranks.run(world_size, audio_of_every_rank, str(find_comfyui()), version, degrees)
    assert audio == [audio[0]] * world_size


@pytest.mark.parametrize("sabotage", ["blocks_in_another_order", "positions_in_another_layout"])
@pytest.mark.parametrize("version", ["LTX-Video", "LTX-2.3"])
def test_a_comfyui_that_changed_is_caught_by_name(comfy, ranks, version, sabotage):
    """A ComfyUI that gives the same picture in one process, by means that the seam does not know."""
    from rayltx.comfy_dist.self_test import check_errors
    from rayltx.errors import SelfTestError

    errors = ranks.run(2, seam_errors, str(find_comfyui()), version, (2, 1), sabotage)[0]
    with pytest.raises(SelfTestError) as error:
        check_errors(errors, "ComfyUI 9.9.9, LTX-Video")
    for words in ("ComfyUI 9.9.9", "text to video", "allowed 2e-06", "use one GPU until then"):
        assert words in str(error.value)


def test_what_comfyui_itself_cannot_run_is_left_out(comfy, ranks):
    """0.29 crashes without audio: nobody can have that picture, and all others are exact."""
    path = str(find_comfyui())
    errors = ranks.run(2, seam_errors, path, "LTX-2", (2, 1), "no_answer_without_audio")[0]
    assert "video only" not in errors and "text to video" in errors
    assert max(errors.values()) <= TOLERANCE, errors
    with pytest.raises(Exception, match=r"runs no kind of input.*no forward today"):
        ranks.run(2, seam_errors, path, "LTX-2", (2, 1), "no_answer_at_all")


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2)])
def test_a_layer_that_takes_its_scale_from_all_tokens_takes_it_from_all_ranks(comfy, ranks, degrees):
    """NVFP4 without an input scale: a rank's tokens alone have another largest value, which moved the answer by 8e-2."""
    for case, (error, noise) in ranks.run(2, nvfp4_answers, str(find_comfyui()), degrees)[0].items():
        assert error <= max(TOLERANCE, 1.01 * noise), case


def test_a_text_whose_scale_other_rows_have_a_part_in_is_not_kept(comfy, ranks):
    for one, other in zip(*ranks.run(2, nvfp4_steps_with_rows_apart, str(find_comfyui()))[0]):
        assert one.equal(other)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_layer_moves_at_most_1_05_times_the_minimum(comfy, ranks, world_size):
    """At LTX-2's 121 frames of 1280x704, with 5 s of audio: 14080 video tokens and 126 of audio."""
    shape, audio_tokens, heads, head_dim = (16, 22, 40), 126, 4, 128
    one, two = (
        ranks.run(world_size, layer_traffic, str(find_comfyui()), layers, shape, audio_tokens, heads)
        for layers in (1, 2)
    )
    local = 16 * 22 * 40 / world_size
    # Query, key, value and output, each float32 and n x D, of which (W - 1) / W comes from elsewhere.
    minimum = 4 * local * heads * head_dim * 4 * (world_size - 1) / world_size
    for (first_bytes, first_calls), (second_bytes, second_calls) in zip(one, two):
        print(f"W={world_size}: {(second_bytes - first_bytes) / minimum:.3f} of the minimum a layer")
        assert second_bytes - first_bytes <= 1.05 * minimum
        assert second_calls - first_calls <= (5 if world_size == 2 else 6)
        assert first_calls - (second_calls - first_calls) == 1  # the answer is collected


@pytest.mark.parametrize("case", ["text to video", "image to video", "inpainting", "guide with a strength"])
@pytest.mark.parametrize("version", ["LTX-Video", "LTX-2", "LTX-2.3"])
def test_no_rank_has_tables_of_full_length(comfy, ranks, version, case):
    whole_tokens, whole_rotary, whole_modulation = ranks.run(
        1, tables_of_the_video, str(find_comfyui()), version, (1, 1), case
    )[0]
    on_ranks = ranks.run(3, tables_of_the_video, str(find_comfyui()), version, (3, 1), case)
    assert sum(tokens for tokens, _, _ in on_ranks) == whole_tokens
    for tokens, rotary, modulation in on_ranks:
        assert rotary * whole_tokens == whole_rotary * tokens
        assert modulation < whole_modulation or case == "text to video"  # which has one row


@pytest.mark.parametrize("degrees", [(1, 1), (2, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("version", ["LTX-Video", "LTX-2.3"])
def test_attention_that_is_sent_part_by_part_gives_the_same_bits(comfy, ranks, version, degrees):
    """In one group of heads and in two; and it is used: by each of two blocks, twice, but where values pass through."""
    answers = ranks.run(degrees[0] * degrees[1], projected_answers, str(find_comfyui()), version, degrees)
    for of_rank in answers:
        assert all(first and second for first, second, _ in of_rank.values()), of_rank
        for case, (_, _, calls) in of_rank.items():
            if case not in (
                "spatio-temporal guidance",
                "attention of the layers' own",
                "guide and attention of the layers' own",
            ):
                assert calls == 4, (case, calls)


def test_what_others_have_changed_is_not_sent_part_by_part(comfy, ranks):
    counts = ranks.run(2, projected_calls_of_patched, str(find_comfyui()))[0]
    assert counts == {
        "nothing": 2,
        "an override": 0,
        "a forward of one module": 1,
        "a forward of the class": 0,
        "nothing any more": 2,
    }
