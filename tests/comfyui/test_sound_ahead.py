"""The sound's own work goes on while the picture's self-attention waits for the link, where a block is ComfyUI's as it is."""

import pytest
from comfy_checkout import find_comfyui
from comfy_models import CONFIGS
from comfy_sound_ahead import (
    SENT,
    SOUND,
    SOUND_FEED_FORWARD,
    WAITED,
    answers_with_and_without,
    order_of_events,
    products_of_the_text,
)

WITH_SOUND = [version for version in CONFIGS if version != "LTX-Video"]


@pytest.mark.parametrize("degrees", [(2, 1), (3, 1), (2, 2), (1, 1, 2)])
@pytest.mark.parametrize("version", WITH_SOUND)
def test_the_bits_are_those_without(comfy, ranks, version, degrees):
    world_size = degrees[0] * degrees[1] * (degrees[2] if len(degrees) > 2 else 1)
    for found in ranks.run(world_size, answers_with_and_without, str(find_comfyui()), version, degrees):
        assert len(found) > 10 and all(is_equal for is_equal, _ in found.values()), found
        assert sum(blocks > 0 for _, blocks in found.values()) > 5, found


@pytest.mark.parametrize("version", WITH_SOUND)
def test_the_sound_goes_on_between_the_last_send_and_the_first_wait(comfy, ranks, version):
    for events in ranks.run(2, order_of_events, str(find_comfyui()), version):
        for what, order in events.items():
            first_wait, last_sent = order.index(WAITED), len(order) - 1 - order[::-1].index(SENT)
            sends_before = order[:first_wait].count(SENT)
            assert sends_before >= 3, "value, query and key"
            if what == "no sound to go on with":
                assert SOUND not in order and SOUND_FEED_FORWARD not in order
                continue
            at = [number for number, event in enumerate(order) if event == SOUND]
            assert len(at) == 2 and order.count(SOUND_FEED_FORWARD) == 1, (what, "each layer is called once")
            assert order.index(SOUND_FEED_FORWARD) > max(*at, last_sent), "it needs what the picture tells the sound"
            if what.startswith("nothing"):
                assert order[:first_wait] == [SENT] * sends_before + [SOUND] * 2, order
            else:
                assert min(at) > first_wait, what


def test_the_text_of_the_sound_is_kept_as_that_of_the_picture_is(comfy, ranks):
    for found in ranks.run(2, products_of_the_text, str(find_comfyui()), "LTX-2"):
        assert found == [{"attn2", "audio_attn2"}, set()]
