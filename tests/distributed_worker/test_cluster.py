"""Real Ray, real processes: sharing, failing, and going on."""

import contextlib
import dataclasses
import gc
import logging
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from slow_cases import EMBEDDED_VERSIONS

from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
from rayltx.diffusion_models.lightricks.exactness import CASES, cases_for, untouched_forward, worst_error
from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.driver import link
from rayltx.distributed_worker.host import Host
from rayltx.distributed_worker.messages import dump_call
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.distributed_worker.worker_calls import ask, ask_together
from rayltx.errors import InputError, OutOfMemory, ParallelConfigError, RanksFailedAlike, UnsupportedError, WorkerStuck
from rayltx.sequence_parallel.partition import ParallelConfig

from cluster_hosts import RememberingHost

TESTS = str(Path(__file__).parents[1])
FAILING = "cluster_hosts:FailingHost"
SLOW_EXIT = pytest.param("exit", 1, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def cluster():
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = TESTS  # for the workers to find cluster_hosts
    try:
        with Cluster.start(ClusterRequest(workers=3, step_timeout_s=60.0)) as cluster:
            cluster.workers()
            yield cluster
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {}

    def get(version):
        if version not in made:
            path = folder / f"{version}.safetensors"
            untouched = save_tiny_checkpoint(path, version)
            made[version] = (open_checkpoint(path), untouched)
        return made[version]

    return get


@pytest.fixture
def loaded(cluster, checkpoint_of):
    """An LTX-Video model whose host fails when asked; its inputs; the right answer."""
    checkpoint, untouched = checkpoint_of("LTX-Video")
    model = DiffusersModel.of_checkpoint(checkpoint)
    inputs = CASES[1].inputs(model)
    remote = cluster.load(checkpoint, model, host=FAILING)
    yield remote, inputs, untouched_forward(untouched, model, inputs)
    remote.release()


@contextlib.contextmanager
def limits(cluster, **limits):
    """Others than were asked for."""
    before = {name: getattr(cluster.request, name) for name in limits}
    for name, value in limits.items():
        object.__setattr__(cluster.request, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(cluster.request, name, value)


@pytest.mark.parametrize("version", EMBEDDED_VERSIONS)
def test_every_version_equals_the_untouched_model_through_ray(cluster, checkpoint_of, version):
    checkpoint, untouched = checkpoint_of(version)
    model = DiffusersModel.of_checkpoint(checkpoint)
    remote = cluster.load(checkpoint, model)
    try:
        for case in cases_for(model)[:5]:
            inputs = case.inputs(model)
            reference = untouched_forward(untouched, model, inputs)
            for config in (ParallelConfig(1, 1), ParallelConfig(3, 1), ParallelConfig(1, 2)):
                assert worst_error(remote.forward(inputs, config), reference) < 2e-6, (case.name, config)
    finally:
        remote.release()


def test_workers_see_the_files_bytes_after_the_references_are_gone(cluster, loaded):
    remote, _, _ = loaded
    checkpoint = remote.source.checkpoint
    import hashlib

    from rayltx.distributed_worker.messages import bytes_of_tensor

    digest = hashlib.sha256()
    with checkpoint.open() as reader:
        for name in sorted(checkpoint.tensors):
            digest.update(name.encode())
            digest.update(bytes_of_tensor(reader.read(name)).data)
    assert remote.digest() == dict.fromkeys(range(3), digest.hexdigest())
    remote.weights.let_go()  # the views alone keep the objects
    filler = [cluster.driver.keep(np.full(2**25, number, np.uint8)) for number in range(8)]
    assert remote.digest() == dict.fromkeys(range(3), digest.hexdigest())
    del filler


def test_releasing_a_model_leaves_nothing_in_the_store(cluster, checkpoint_of):
    checkpoint, _ = checkpoint_of("LTX-2")
    model = DiffusersModel.of_checkpoint(checkpoint)
    remote = cluster.load(checkpoint, model)
    assert cluster.held_bytes() == checkpoint.num_bytes
    portions = [weakref.ref(portion) for portion in remote.weights._portions]
    assert portions
    remote.release()
    assert cluster.held_bytes() == 0
    gc.collect()
    assert [portion() for portion in portions if portion() is not None] == []


@pytest.mark.parametrize("kind, replaced", [SLOW_EXIT, ("raise", 0), ("write", 1)])
def test_a_rank_that_fails_alone_costs_the_step_and_nothing_else(cluster, loaded, tmp_path, caplog, kind, replaced):
    remote, inputs, reference = loaded
    digest = remote.digest()
    pids = [info.pid for info in cluster.workers()]
    fail = {**inputs, "fail": (kind, 1, str(tmp_path / "failed"))}
    with caplog.at_level(logging.WARNING, "rayltx"):
        answer = remote.forward(fail, ParallelConfig(3, 1))
    assert worst_error(answer, reference) < 2e-6
    assert "rank 1" in caplog.text and "repeating the step" in caplog.text
    assert "no answer" not in caplog.text and "no progress" not in caplog.text, "it was waited for"
    assert not [record.getMessage() for record in caplog.records if "\n" in record.getMessage()], (
        "an event has one line"
    )
    now = [info.pid for info in cluster.workers()]
    assert sum(pid not in pids for pid in now) == replaced
    assert remote.digest() == digest, "a write by one worker reached the others"


@pytest.mark.parametrize("kind, replaced", [(None, 0), SLOW_EXIT, ("raise", 0)])
def test_the_first_ranks_compute_without_the_others(cluster, loaded, tmp_path, kind, replaced):
    remote, inputs, reference = loaded
    config = ParallelConfig(3, 1)
    whole = remote.forward(inputs, config)
    pids = [info.pid for info in cluster.workers()]
    fail = {**inputs, "fail": (kind, 1, str(tmp_path / "failed"))}
    answers = [remote.call_together(ask_together(Host.forward, fail), config, ranks=2) for _ in range(2)]
    of_two = remote.forward(inputs, ParallelConfig(2, 1))  # by a group of two from the start
    assert all(torch.equal(answer[name], of_two[name]) for answer in answers for name in of_two)
    assert worst_error(of_two, reference) < 2e-6
    assert all(torch.equal(again, whole[name]) for name, again in remote.forward(inputs, config).items())
    assert sum(info.pid not in pids for info in cluster.workers()) == replaced


def test_the_group_of_all_is_not_formed_anew_by_what_its_first_ranks_compute(cluster, loaded):
    remote, inputs, reference = loaded
    config = ParallelConfig(3, 1)
    remote.forward(inputs, config)
    report = cluster.group.link_report
    for ranks in (2, 1, 2, None, 2):
        answer = remote.call_together(ask_together(Host.forward, inputs), config, ranks=ranks)
        assert worst_error(answer, reference) < 2e-6
    assert cluster.group.link_report is report and cluster.group.config == config


@pytest.mark.parametrize("kind", ["alike", "out of memory while others wait", "user error"])
def test_one_rank_that_fails_alone_leaves_the_group_of_all_as_it_is(cluster, loaded, tmp_path, kind):
    remote, inputs, reference = loaded
    config = ParallelConfig(3, 1)
    assert worst_error(remote.forward(inputs, config), reference) < 2e-6
    report = cluster.group.link_report
    fail = {**inputs, "fail": (kind, 0, str(tmp_path / "failed"))}
    with pytest.raises((OutOfMemory, RanksFailedAlike, InputError)):
        remote.call_together(ask_together(Host.forward, fail), config, ranks=1)
    assert cluster.group.config == config and not cluster.group.is_broken
    assert worst_error(remote.forward(inputs, config), reference) < 2e-6
    assert cluster.group.link_report is report, "the group was formed anew"


@pytest.mark.parametrize("kind, replaced", [SLOW_EXIT, ("write", 1), (None, 0)])
def test_one_rank_computes_alone_and_the_group_of_all_stays(cluster, loaded, tmp_path, kind, replaced):
    remote, inputs, reference = loaded
    config = ParallelConfig(3, 1)
    assert worst_error(remote.forward(inputs, config), reference) < 2e-6
    pids, report = [info.pid for info in cluster.workers()], cluster.group.link_report
    fail = {**inputs, "fail": (kind, 0, str(tmp_path / "failed"))}
    answer = remote.call_together(ask_together(Host.forward, fail), config, ranks=1)
    assert worst_error(answer, reference) < 2e-6
    assert sum(info.pid not in pids for info in cluster.workers()) == replaced
    assert worst_error(remote.forward(inputs, config), reference) < 2e-6
    assert (cluster.group.link_report is report) == (not replaced)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_wait_for_one_without_memory_are_told_and_kept(cluster, loaded, tmp_path, rank):
    """On GPUs they notice nothing by themselves: their kernels wait."""
    remote, inputs, reference = loaded
    config = ParallelConfig(3, 1)
    assert worst_error(remote.forward(inputs, config), reference) < 2e-6
    pids = [info.pid for info in cluster.workers()]
    fail = {**inputs, "fail": ("out of memory while others wait", rank, str(tmp_path / "failed"))}
    with pytest.raises(OutOfMemory, match=rf"rank {rank} of 3 ran out of memory. rank {rank}: CUDA out of memory"):
        remote.forward(fail, config)
    assert len(list(tmp_path.iterdir())) == 3, "all of them waited"
    assert worst_error(remote.forward(fail, config), reference) < 2e-6
    assert [info.pid for info in cluster.workers()] == pids, "a worker was replaced"


def test_ranks_that_fail_alike_are_reported_and_kept(cluster, loaded):
    remote, inputs, reference = loaded
    pids = [info.pid for info in cluster.workers()]
    with pytest.raises(RanksFailedAlike, match=r"all 2 ranks.*every rank is out of patience"):
        remote.forward({**inputs, "fail": ("alike", None, None)}, ParallelConfig(2, 1))
    with pytest.raises(InputError, match="seed=-1"):
        remote.forward({**inputs, "fail": ("user error", None, None)}, ParallelConfig(2, 1))
    assert worst_error(remote.forward(inputs, ParallelConfig(2, 1)), reference) < 2e-6
    assert [info.pid for info in cluster.workers()] == pids


def test_ranks_out_of_step_form_their_group_anew(cluster, loaded):
    """Left in it, the next forward's first exchange would meet the one that nobody has answered."""
    remote, inputs, reference = loaded
    pids = [info.pid for info in cluster.workers()]
    remote.forward({**inputs, "fail": ("one exchange more", 1, None)}, ParallelConfig(2, 1))
    remote.disband()
    assert worst_error(remote.forward(inputs, ParallelConfig(2, 1)), reference) < 2e-6
    assert [info.pid for info in cluster.workers()] == pids


@pytest.mark.slow
def test_a_silent_rank_is_named_and_replaced(cluster, loaded, tmp_path, monkeypatch):
    remote, inputs, reference = loaded
    monkeypatch.setattr("rayltx.distributed_worker.outcomes.GRACE_S", 2.0)
    fail = {**inputs, "fail": ("hang", 2, str(tmp_path / "hung"))}
    cluster.group.form(ParallelConfig(3, 1))
    match = "no answer within 4 s from rank 0, 1, 2 of 3"
    with limits(cluster, step_timeout_s=4.0, block_timeout_s=4.0), pytest.raises(WorkerStuck, match=match):
        remote.forward(fail, ParallelConfig(3, 1), repeats=0)
    assert worst_error(remote.forward(fail, ParallelConfig(3, 1)), reference) < 2e-6


def test_a_cancel_stops_all_ranks_in_the_step(cluster, loaded, tmp_path):
    """At the same block, so that their group is whole."""
    remote, inputs, reference = loaded
    config = ParallelConfig(3, 1)
    assert worst_error(remote.forward(inputs, config), reference) < 2e-6
    pids = [info.pid for info in cluster.workers()]

    class Cancelled(Exception):
        pass

    for block in (0, 1):  # which all ranks wait in, until the cancel is there
        path = tmp_path / str(block)

        def cancel(path=path):
            if len(list(tmp_path.glob(f"{path.name}-*"))) == 3:
                path.touch()
                raise Cancelled

        with pytest.raises(Cancelled):
            remote.forward({**inputs, "fail": ("wait in a block", block, str(path))}, config, poll=cancel)
        assert worst_error(remote.forward(inputs, config), reference) < 2e-6
    assert [info.pid for info in cluster.workers()] == pids
    assert not cluster.group.is_broken


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "loop"])
def test_a_rank_without_progress_is_found_by_its_block(cluster, loaded, tmp_path, caplog, how):
    """Long before the time that a step may take."""
    remote, inputs, reference = loaded
    config = ParallelConfig(3, 1)
    remote.forward({**inputs, "fail": ("slow blocks", 0.3, None)}, config)  # by which it is known what a block takes
    fail = {**inputs, "fail": (f"{how} in a block", 1, str(tmp_path / "stuck"))}
    with limits(cluster, block_timeout_s=2.0), caplog.at_level(logging.WARNING, "rayltx"):
        assert worst_error(remote.forward(fail, config), reference) < 2e-6
    assert "no progress for" in caplog.text and "rank 1, in block 2" in caplog.text
    assert ("in _hang" in caplog.text) == (how == "loop"), "its stack"
    assert ("rank 1: says nothing" in caplog.text) == (how == "stop")


@pytest.mark.parametrize("how", ["exit", "raise", pytest.param("loop in a block", marks=pytest.mark.slow)])
def test_a_rank_with_rows_of_its_own_is_missed_as_any_other(cluster, checkpoint_of, tmp_path, caplog, how):
    """Ranks that exchange nothing before the answer."""
    checkpoint, untouched = checkpoint_of("LTX-Video")
    model = DiffusersModel.of_checkpoint(checkpoint)
    inputs = next(case for case in CASES if case.name == "batch of 2").inputs(model)
    reference = untouched_forward(untouched, model, inputs)
    remote = cluster.load(checkpoint, model, host=FAILING)
    config = ParallelConfig(1, 1, 2)
    remote.forward({**inputs, "fail": ("slow blocks", 0.3, None)}, config)
    fail = {**inputs, "fail": (how, 1, str(tmp_path / "failed"))}
    with limits(cluster, block_timeout_s=2.0), caplog.at_level(logging.WARNING, "rayltx"):
        assert worst_error(remote.forward(fail, config), reference) < 2e-6
    assert "rank 1" in caplog.text and "repeating the step" in caplog.text
    remote.release()


def test_like_devices_are_not_measured(cluster, monkeypatch):
    monkeypatch.setattr(cluster.group, "run_whole", lambda *args: pytest.fail("they are"))
    assert cluster.group.with_shares(ParallelConfig(3)) == ParallelConfig(3)


def test_a_worker_that_dies_between_runs_is_replaced_when_ranks_share_otherwise(cluster, loaded):
    """Forming a group for another number of ranks meets the loss first."""
    remote, inputs, reference = loaded
    remote.forward(inputs, ParallelConfig(2, 1))
    os.kill(cluster.workers()[1].pid, signal.SIGKILL)
    cluster.group.repeated(lambda: cluster.group.form(ParallelConfig(3, 1)), "forming the group")
    assert worst_error(remote.forward(inputs, ParallelConfig(3, 1)), reference) < 2e-6


def test_a_cancelled_step_leaves_the_next_one_right(cluster, loaded):
    remote, inputs, reference = loaded

    class Cancelled(Exception):
        pass

    def cancel():
        raise Cancelled

    with pytest.raises(Cancelled):
        remote.forward(inputs, ParallelConfig(3, 1), poll=cancel)
    assert cluster.group._abandoned is not None, "it was waited for"
    assert worst_error(remote.forward(inputs, ParallelConfig(3, 1)), reference) < 2e-6


def test_bad_requests_name_value_rule_and_remedy(cluster, loaded):
    remote, inputs, _ = loaded
    with pytest.raises(ParallelConfigError, match=r"2 x ring_degree=2 = 4, but there are 3 workers"):
        remote.forward(inputs, ParallelConfig(2, 2))
    with pytest.raises(UnsupportedError, match="does not know the input control"):
        remote.forward({**inputs, "control": torch.zeros(1)}, ParallelConfig(2, 1))
    with pytest.raises(InputError, match=r"context has the shape \(1, 7, 47\).*another LTX version"):
        remote.forward({**inputs, "context": inputs["context"][..., :-1]}, ParallelConfig(2, 1))


def test_what_does_not_change_travels_once(cluster, checkpoint_of):
    checkpoint, _ = checkpoint_of("LTX-Video")
    remote = cluster.load(checkpoint, None, host="cluster_hosts:EchoHost")
    cluster.sending.clear()
    context = torch.randn(1, 300, 256)
    for step in range(3):
        inputs = {"context": context.clone(), "latent": torch.full((300, 300), float(step)), "nested": [context * 1.0]}
        answer = remote.forward(inputs, ParallelConfig(2, 1))
        assert torch.equal(answer["context"], context) and torch.equal(answer["latent"], inputs["latent"])
    assert len(cluster.sending.of_steps) == 1 + 3, "one for the text in every step, one for each latent"
    remote.release()


def test_a_step_is_pickled_and_sent_once_for_all_ranks(cluster, loaded, monkeypatch):
    remote, inputs, reference = loaded
    remote.forward(inputs, ParallelConfig(3, 1))
    dumped = []
    monkeypatch.setattr(link, "dump_call", lambda asked: dumped.append(asked) or dump_call(asked))
    assert worst_error(remote.forward(inputs, ParallelConfig(3, 1)), reference) < 2e-6
    assert [call.method for call in dumped] == ["call_host_together"]


def test_a_model_gets_the_same_tensor_for_what_did_not_change(cluster, checkpoint_of):
    """From the third step on. After the run, and after a failure, nothing is left of it."""
    checkpoint, _ = checkpoint_of("LTX-Video")
    remote = cluster.load(checkpoint, None, host="cluster_hosts:RememberingHost")
    text, two = torch.randn(1, 300, 256), ParallelConfig(2, 1)

    def same_in(steps, **more):
        found = []
        for step in range(steps):
            inputs = {"text": text.clone(), "latent": torch.full((300, 300), float(step)), **more}
            found.append(remote.forward_on_each(inputs, two))
            assert all(torch.equal(answer["text"], text) for answer in found[-1])
        return [answer["same"] for answer in found[-1]]

    assert same_in(6) == [4, 4]
    assert remote.call(ask(RememberingHost.is_last_alive), "asking", [0, 1]) == {0: False, 1: False}
    assert same_in(1) == [4, 4] and same_in(2) == [6, 6]
    assert same_in(3, add=1.0) == [7, 7], "what was written to is not what came"
    with pytest.raises(RanksFailedAlike):
        same_in(1, fail=True)
    assert remote.call(ask(RememberingHost.is_last_alive), "asking", [0, 1]) == {0: False, 1: False}
    text[0, 0, 0] += 1
    before = same_in(1)
    text.numpy()[0, 0, 1] += 1  # which no version counts
    assert same_in(1) == before
    remote.release()


def test_what_a_worker_writes_is_its_own(cluster, checkpoint_of):
    """Tensors that were sent may be written to, and the same bytes are there in the next step; so may an answer."""
    checkpoint, _ = checkpoint_of("LTX-Video")
    remote = cluster.load(checkpoint, None, host="cluster_hosts:EchoHost")
    context = torch.randn(1, 300, 256)
    for _ in range(3):
        inputs = {"context": context.clone(), "add": 1.0}
        answer = remote.forward(inputs, ParallelConfig(2, 1))["context"]
        assert torch.equal(answer, context + 1.0) and torch.equal(inputs["context"], context)
        answer.zero_()
    remote.release()


def test_a_file_that_the_store_cannot_hold_is_mapped(cluster, checkpoint_of, caplog, monkeypatch):
    checkpoint, untouched = checkpoint_of("LTX-Video")
    model = DiffusersModel.of_checkpoint(checkpoint)
    monkeypatch.setattr(cluster.store, "_total_bytes", lambda: 1000)
    with caplog.at_level(logging.WARNING, "rayltx"):
        remote = cluster.load(checkpoint, model)
    assert "the workers map the file itself" in caplog.text
    inputs = CASES[0].inputs(model)
    assert worst_error(remote.forward(inputs, ParallelConfig(3, 1)), untouched_forward(untouched, model, inputs)) < 2e-6
    remote.release()


def test_weights_can_be_converted_once_for_all(cluster, checkpoint_of):
    import hashlib

    from rayltx.distributed_worker.messages import bytes_of_tensor

    checkpoint, _ = checkpoint_of("LTX-Video")
    model = DiffusersModel.of_checkpoint(checkpoint)
    remote = cluster.load(checkpoint, model, dtypes={name: torch.bfloat16 for name in checkpoint.tensors})
    rounded = hashlib.sha256()
    with checkpoint.open() as reader:
        for name in sorted(checkpoint.tensors):
            rounded.update(name.encode())
            rounded.update(bytes_of_tensor(reader.read(name).to(torch.bfloat16)).data)
    assert remote.digest() == dict.fromkeys(range(3), rounded.hexdigest())
    answer = remote.forward(CASES[0].inputs(model), ParallelConfig(2, 1))
    assert torch.isfinite(answer["video"]).all()
    remote.release()


def test_a_truncated_file_fails_before_any_worker_is_asked(tmp_path, checkpoint_of):
    from rayltx.errors import CheckpointError

    checkpoint, _ = checkpoint_of("LTX-Video")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(checkpoint.path).read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        open_checkpoint(cut)


def test_the_same_request_gets_the_same_workers(cluster):
    assert Cluster.start(cluster.request) is cluster


def test_what_differs_between_requests_is_named(cluster):
    """For the warning that one cluster takes the place of another."""
    request = cluster.request
    other = dataclasses.replace(request, workers=request.workers + 1, namespace="other")
    assert other.differences(request) == ["workers", "namespace"] and request.differences(request) == []


@pytest.mark.slow
def test_two_clusters_live_side_by_side_and_leave_nothing(cluster, loaded, checkpoint_of):
    remote, inputs, reference = loaded
    script = f"""
import sys; sys.path.insert(0, {str(Path(TESTS).parent / "importable")!r})
import os, time, psutil, torch
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.sequence_parallel.partition import ParallelConfig
from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
from rayltx.diffusion_models.lightricks.exactness import CASES
checkpoint = open_checkpoint({remote.source.checkpoint.path!r})
model = DiffusersModel.of_checkpoint(checkpoint)
environment = dict(os.environ)
# A store as large as the memory that is available, which Ray by itself refuses: it takes memory only as it fills.
store = min(psutil.virtual_memory().available, psutil.disk_usage("/dev/shm").free)
with Cluster.start(ClusterRequest(workers=2, object_store_bytes=store)) as cluster:
    assert dict(os.environ).items() >= environment.items()
    pids = [info.pid for info in cluster.workers()]
    answer = cluster.load(checkpoint, model).forward(CASES[1].inputs(model), ParallelConfig(2, 1))
    torch.save(answer, sys.argv[1])
for _ in range(100):
    if not any(psutil.pid_exists(pid) for pid in pids) and not psutil.Process().children(recursive=True):
        break
    time.sleep(0.1)
else:
    raise SystemExit(f"left behind: {{psutil.Process().children(recursive=True)}}")
"""
    path = Path(remote.source.checkpoint.path).with_name("side-by-side.pt")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], env=environment, stderr=subprocess.PIPE, text=True
    )
    while other.poll() is None:
        assert worst_error(remote.forward(inputs, ParallelConfig(2, 1)), reference) < 2e-6
    assert other.returncode == 0, other.stderr.read()
    assert worst_error(torch.load(path), reference) < 2e-6
