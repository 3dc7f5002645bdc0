"""The seam on gloo ranks: every case of the self-test, on every version of the model, for every degree."""

import pytest
from comfy_checkout import find_comfyui
from comfy_models import CONFIGS
from comfy_ranks import audio_of_every_rank, seam_errors

DEGREES = [(2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2)]


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("version", list(CONFIGS))
def test_every_case_equals_one_process(comfy, ranks, version, degrees):
    errors = ranks.run(degrees[0] * degrees[1], seam_errors, str(find_comfyui()), version, degrees)[0]
    assert max(errors.values()) < 2e-6, errors


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
