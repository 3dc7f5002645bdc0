"""The embedded host against diffusers' untouched transformers, on 1 to 4 ranks."""

import functools

import pytest
import torch
from embedded_host import load_host
from slow_cases import EMBEDDED_VERSIONS

from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
from rayltx.diffusion_models.lightricks.exactness import CASES, cases_for, untouched_forward, worst_error
from rayltx.diffusion_models.lightricks.relative_error import TOLERANCE
from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig

DEGREES = [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2)]
ROWS_APART = [(1, 1, 2), (2, 1, 2), (1, 2, 2), (1, 1, 2, 2)]
UNEQUAL = [
    (2, 1, 1, 1, (3.0, 1.0)),
    (2, 2, 1, 1, (1.0, 2.0, 3.0, 1.5)),
    (2, 1, 2, 1, (1.0, 2.0, 2.0, 1.0)),
    (2, 1, 1, 1, (1e6, 1.0)),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{(version, dtype): (path, diffusers' model with these weights)}"""
    folder = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def get(version, dtype=torch.float32):
        path = folder / f"{version}-{dtype}.safetensors"
        return str(path), save_tiny_checkpoint(path, version, dtype=dtype)

    return get


def run_cases(path, degrees, names, dtype=torch.float32):
    """On every rank: the answers by case, on rank 0."""
    host = load_host(path)
    config = ParallelConfig(*degrees)
    group = SequenceParallelGroup.create(config) if config.world_size > 1 else SequenceParallelGroup.single()
    answers = {}
    for case in CASES:
        if case.name in names:
            answer = host.forward(group, case.inputs(host.model))
            answers[case.name] = {key: tensor.float().numpy() for key, tensor in answer.items()} if answer else None
    return answers


@pytest.mark.parametrize("version", EMBEDDED_VERSIONS)
@pytest.mark.parametrize("degrees", [*DEGREES, *ROWS_APART, *UNEQUAL])
def test_every_case_equals_the_untouched_model(ranks, checkpoints, version, degrees):
    path, untouched = checkpoints(version)
    model = DiffusersModel.of_checkpoint(open_checkpoint(path))
    cases = cases_for(model)
    world_size = ParallelConfig(*degrees).world_size
    answers = ranks.run(world_size, run_cases, path, degrees, [case.name for case in cases])
    errors = {}
    for case in cases:
        reference = untouched_forward(untouched, model, case.inputs(model))
        out = {key: torch.from_numpy(array) for key, array in answers[0][case.name].items()}
        errors[case.name] = worst_error(out, reference)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("version", EMBEDDED_VERSIONS)
@pytest.mark.parametrize("degrees", [(2, 1), (4, 1), (1, 3), (2, 2)])
def test_bfloat16_is_no_further_from_float64_than_one_rank(ranks, checkpoints, version, degrees):
    path, untouched = checkpoints(version, torch.bfloat16)
    model = DiffusersModel.of_checkpoint(open_checkpoint(path))
    case = next(case for case in CASES if case.name == "batch of 2")
    reference = untouched_forward(_double(untouched), model, case.inputs(model), torch.float64)
    alone = ranks.run(1, run_cases, path, (1, 1), [case.name])[0][case.name]
    shared = ranks.run(degrees[0] * degrees[1], run_cases, path, degrees, [case.name])[0][case.name]
    one, many = (worst_error({k: torch.from_numpy(a) for k, a in out.items()}, reference) for out in (alone, shared))
    assert many < 1.1 * one, (many, one)


def _double(model):
    import copy

    return copy.deepcopy(model).double()


def test_without_the_exchange_the_answer_is_wrong(ranks, checkpoints, monkeypatch):
    """The negative control: the cases notice a rank that keeps to its own tokens."""
    path, untouched = checkpoints("LTX-Video")
    model = DiffusersModel.of_checkpoint(open_checkpoint(path))
    case = CASES[0]
    answer = ranks.run(2, run_without_exchange, path, case.name)[0][case.name]
    error = worst_error(
        {k: torch.from_numpy(a) for k, a in answer.items()}, untouched_forward(untouched, model, case.inputs(model))
    )
    assert error > 1e-2


def run_without_exchange(path, name):
    from rayltx.sequence_parallel import self_attention

    original = self_attention.SelfAttentionExchange.attend
    send = self_attention.SelfAttentionExchange.send
    self_attention.SelfAttentionExchange.send = lambda self, x: x
    self_attention.SelfAttentionExchange.attend = lambda self, q, k, v, attend, *args, mask=None: attend(q, k, v, None)
    try:
        return run_cases(path, (2, 1), [name])
    finally:
        self_attention.SelfAttentionExchange.attend = original
        self_attention.SelfAttentionExchange.send = send
