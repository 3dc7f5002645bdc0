"""Tables of positions are made once for steps that are alike, with the same bits as when each step makes them."""

import comfy_worker_model
import pytest
import torch
from comfy_checkout import find_comfyui
from comfy_kept_tables import answers_by_case, tables_made
from comfy_models import CONFIGS

from rayltx.sequence_parallel.partition import ParallelConfig


@pytest.mark.parametrize("degrees", [(1, 1), (2, 1), (2, 1, 2)])
@pytest.mark.parametrize("version", list(CONFIGS))
def test_steps_with_kept_tables_are_bit_for_bit_those_without(comfy, ranks, version, degrees):
    world_size = ParallelConfig(*degrees).world_size
    for of_rank in ranks.run(world_size, answers_by_case, str(find_comfyui()), version, degrees):
        for case, calls in of_rank.items():
            assert all(same for same, _ in calls), case
            assert [made for _, made in calls[1:]] == [0, 0], (case, calls)
        assert next(iter(of_rank.values()))[0][1] > 0


def test_tables_are_made_anew_where_anything_is_another(comfy, ranks):
    (found,) = ranks.run(1, tables_made, str(find_comfyui()))
    assert all(same for _, same in found.values()), found
    made = {what: count for what, (count, _) in found.items()}
    assert made == {
        "first": 3,  # of the video for itself and for the sound; of the sound, which has one for both
        "the same": 0,
        "another frame rate": 3,  # what was not met before the first that is missing goes with it
        "back": 3,
        "a patch that writes": 0,
        "after it": 3,
        "another setting of the model": 3,
        "and the same again": 0,
        "another's method": 0,  # by what would count it
    }


def test_a_worker_keeps_them_for_a_run(comfy, tmp_path):
    from rayltx.sequence_parallel.group import SequenceParallelGroup

    model, inputs = comfy_worker_model.loaded(tmp_path, "LTX-Video")
    group = SequenceParallelGroup.single()
    plain = model.forward(group, inputs)
    assert len(model._kept_tables) == 1
    assert torch.equal(model.forward(group, inputs), plain)
    model.end_run()
    assert len(model._kept_tables) == 0
