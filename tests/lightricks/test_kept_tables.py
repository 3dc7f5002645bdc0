"""diffusers' tables of positions are made once for steps with the same positions, with the same bits."""

import pytest
import torch
from counting_tables import CountingTables
from embedded_host import load_host

from rayltx.diffusion_models.lightricks.exactness import CASES
from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig


def steps(path, degrees):
    """On each rank: whether the answers are those of a host that keeps nothing, and the tables made by each step."""
    config = ParallelConfig(*degrees)
    group = SequenceParallelGroup.create(config) if config.world_size > 1 else SequenceParallelGroup.single()
    answers, made = [], []
    for keeps in (True, False):
        host = load_host(path)
        host.kept_tables = CountingTables(keeps)
        found, counts = [], []
        for changes in ({}, {}, {"frame_rate": 12.0}, {"frame_rate": 12.0}, {}, {"timestep": 0.5}):
            inputs = CASES[0].inputs(host.model)
            inputs |= {name: inputs[name] * value if name == "timestep" else value for name, value in changes.items()}
            before = host.kept_tables.made
            answer = host.forward(group, inputs)
            found.append({name: tensor.clone() for name, tensor in answer.items()} if answer else {})
            counts.append(host.kept_tables.made - before)
        answers.append(found)
        made.append(counts)
        host.close()
        assert len(host.kept_tables) == 0
    same = [all(torch.equal(one[name], other[name]) for name in one | other) for one, other in zip(*answers)]
    return same, made, [bool(answer) for answer in answers[0]]


@pytest.mark.parametrize("degrees", [(1, 1), (2, 1), (1, 1, 2)])
@pytest.mark.parametrize("version, tables", [("LTX-Video", 1), ("LTX-2", 4), ("LTX-2.3", 4), ("LTX-2.5", 4)])
def test_steps_with_the_same_positions_have_the_same_tables(ranks, tmp_path, version, tables, degrees):
    path = tmp_path / "model.safetensors"
    save_tiny_checkpoint(path, version)
    found = ranks.run(ParallelConfig(*degrees).world_size, steps, str(path), degrees)
    for rank, (same, (kept, plain), answers) in enumerate(found):
        assert all(same) and (rank > 0 or all(answers))
        assert plain == [tables] * 6
        assert kept[1] == kept[3] == kept[5] == 0 and 0 < kept[0] <= tables, kept
        assert all(0 < kept[step] <= tables for step in (2, 4)), "others, where the positions are"
