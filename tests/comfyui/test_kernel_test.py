"""The kernel test: a model's own blocks, widths and dtype on several ranks, against what rounding does to them."""

import pytest
import torch
from comfy_checkout import find_comfyui
from comfy_models import VERSIONS
from comfy_ranks import kernel_differences

from rayltx.diffusion_models.lightricks.relative_error import TOLERANCE

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_several_ranks_differ_by_rounding_alone(comfy, ranks, version, dtype, degrees):
    _, differences = ranks.run(2, kernel_differences, str(find_comfyui()), version, degrees, dtype)[0]
    assert len(differences) == 4
    for name, difference in differences.items():
        assert difference.is_rounding, (name, difference)


def test_half_precision_is_not_an_excuse(comfy, ranks):
    """What rounding accounts for is of the order of the dtype's own precision: errors of a missing part are larger."""
    _, differences = ranks.run(2, kernel_differences, str(find_comfyui()), "LTX-2.3", (2, 1), torch.bfloat16)[0]
    assert all(
        TOLERANCE < difference.allowed < 8 * torch.finfo(torch.bfloat16).eps for difference in differences.values()
    )


def test_a_kernel_that_is_wrong_in_half_precision_alone_is_told_by_name(comfy, ranks, caplog):
    from rayltx.comfy_dist.main_process.self_test_record import check_differences
    from rayltx.comfy_dist.model_spec import ComfySpec
    from rayltx.comfy_dist.self_test import check_errors
    from rayltx.errors import SelfTestError

    arguments = (str(find_comfyui()), "LTX-2.3", (1, 2))
    errors, differences = ranks.run(2, kernel_differences, *arguments, torch.bfloat16, True)[0]
    check_errors(errors, "ComfyUI, LTX-2.3")  # does not see it
    spec = ComfySpec("0.33.0", "LTX-2.3", {}, torch.bfloat16, None, weight_kinds=("bfloat16",))
    check_differences(differences, "ComfyUI 0.33.0, LTX-2.3", spec)  # other devices may add up so differently
    assert "text to video by" in caplog.text and "rounding accounts for" in caplog.text
    errors, differences = ranks.run(2, kernel_differences, *arguments, torch.float16, True)[0]
    check_differences(differences, "ComfyUI 0.33.0, LTX-2.3", spec, other_kernel=True)  # whose parts are torch's
    with pytest.raises(SelfTestError, match=r"text to video by .*rounding accounts for .*another attention"):
        check_differences(differences, "ComfyUI 0.33.0, LTX-2.3", spec)
