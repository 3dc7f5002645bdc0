"""The seam on gloo ranks: every case of the self-test, on every version of the model, for every degree."""

import pytest
from comfy_checkout import find_comfyui
from comfy_models import CONFIGS
from comfy_ranks import seam_errors

DEGREES = [(2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2)]


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("version", list(CONFIGS))
def test_every_case_equals_one_process(comfy, ranks, version, degrees):
    errors = ranks.run(degrees[0] * degrees[1], seam_errors, str(find_comfyui()), version, degrees)[0]
    assert max(errors.values()) < 2e-6, errors
