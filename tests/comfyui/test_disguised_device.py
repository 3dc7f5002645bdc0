"""What a GPU would be asked for, counted on a device in disguise: no tensor strays, and sharding adds next to no waiting."""

from __future__ import annotations

from collections import Counter

import pytest
from comfy_checkout import find_comfyui
from comfy_models import VERSIONS
from comfy_ranks import disguised_cases
from slow_cases import slow

from rayltx.diffusion_models.lightricks.relative_error import TOLERANCE
from rayltx.sequence_parallel.partition import ParallelConfig

pytestmark = pytest.mark.comfyui

# What the seam itself waits for, once a forward: how many different timesteps there are, and which tokens a guide's grid has.
WAITS = {"timestep_rows.py:compress": 1, "comfyui_host.py:_timestep_by_token": 1}
WAITS_OF_ROWS = {**WAITS, "comfyui_rows.py:rows_are_alike": 1}  # before they go to different ranks


@pytest.mark.parametrize("degrees", [(2, 1), (2, 2), (2, 1, 2), *slow((1, 2), (3, 1))])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_case_is_exact_there_and_nothing_strays(comfy, ranks, version, degrees):
    """Mixing it with the CPU raises. The exchange is real, between processes."""
    config = ParallelConfig(*degrees)
    waits = WAITS if config.row_groups == 1 else WAITS_OF_ROWS
    by_rank = ranks.run(config.world_size, disguised_cases, str(find_comfyui()), version, degrees)
    assert len(by_rank[0]) >= 9
    for name, (error, sharded, _) in by_rank[0].items():
        assert error <= TOLERANCE, name
        assert sum(sharded["collectives"].values()) >= 5, name
    for found in by_rank:
        for name, (_, sharded, whole) in found.items():
            assert not sharded["to_host"], name
            assert sharded["to_device"] == whole["to_device"], f"{name}: the seam sends nothing to the device"
            more = Counter(sharded["waits"]) - Counter(whole["waits"])
            assert all(count <= waits.get(place, 0) for place, count in more.items()), (name, more)
