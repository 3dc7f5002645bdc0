"""A rank brings its own tokens to the model's width, and no others, where nobody else looks at them there."""

import pytest
from comfy_checkout import find_comfyui
from comfy_models import CONFIGS
from comfy_own_tokens import tokens_projected


@pytest.mark.parametrize("version", list(CONFIGS))
def test_a_rank_projects_its_own_tokens_alone(comfy, ranks, version):
    first, second = ranks.run(2, tokens_projected, str(find_comfyui()), version)
    for what, (alone, shown, error) in first.items():
        other = second[what][1]
        (whole,) = alone
        assert error <= 2e-6, (what, error)
        if what == "nothing":
            assert len(shown) == len(other) == 1 and shown[0] + other[0] == whole, (shown, other, whole)
        else:
            assert shown == other == [whole], what
