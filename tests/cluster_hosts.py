"""Hosts that fail in chosen ways, for the workers of the tests. Imported by the workers."""

import ctypes
import functools
import os
import signal
import time
import weakref
from pathlib import Path

import torch
import torch.distributed as dist

from rayltx.diffusion_models.lightricks.diffusers_host import DiffusersHost
from rayltx.distributed_worker.worker_calls import collective, individual
from rayltx.errors import InputError


class FailingHost(DiffusersHost):
    """Takes one more input, `fail`: (kind, rank, path). It fails once, and leaves a file at the path."""

    @individual
    def doubled(self, tensor, seconds):
        if tensor is None:
            raise RuntimeError("no number")
        time.sleep(seconds)
        return 2 * tensor

    def forward(self, group, inputs):
        inputs = dict(inputs)
        kind, rank, path = inputs.pop("fail", (None, None, None))
        if kind == "alike":
            raise RuntimeError("every rank is out of patience")
        if kind == "one exchange more":
            if group.rank == rank:
                dist.all_reduce(torch.ones(1), async_op=True)
            return torch.zeros(())
        if kind == "user error":
            raise InputError("seed=-1 must not be negative")
        if kind == "out of memory while others wait":
            if group.rank == rank and not Path(path).exists():
                Path(path).touch()
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 896.00 MiB.")
            if group.rank != rank and not Path(f"{path}-{group.rank}").exists():
                Path(f"{path}-{group.rank}").touch()
                while dist.is_initialized():  # as kernels of NCCL wait: nothing but the end of the group ends it
                    time.sleep(0.05)
                raise RuntimeError("NCCL communicator was aborted on rank")
        if kind == "wait in a block":
            block = self._transformer.transformer_blocks[rank]
            handle = block.register_forward_pre_hook(functools.partial(_wait_for, path, group.rank))
            try:
                return super().forward(group, inputs)
            finally:
                handle.remove()
        if kind == "slow blocks":
            blocks = self._transformer.transformer_blocks
            handles = [block.register_forward_pre_hook(lambda *_: time.sleep(rank)) for block in blocks]
            try:
                return super().forward(group, inputs)
            finally:
                for handle in handles:
                    handle.remove()
        if kind in ("stop in a block", "loop in a block") and group.rank == rank and not Path(path).exists():
            hang = functools.partial(_hang, path, kind)
            handle = self._transformer.transformer_blocks[1].register_forward_pre_hook(hang)
            try:
                return super().forward(group, inputs)
            finally:
                handle.remove()
        if (
            kind is not None
            and not kind.endswith(("in a block", "blocks"))
            and group.rank == rank
            and not Path(path).exists()
        ):
            Path(path).touch()
            if kind == "raise":
                raise RuntimeError("only this rank is out of memory")
            if kind == "exit":
                os._exit(1)
            if kind == "hang":
                time.sleep(3600)
            if kind == "write":
                weight = max(self.parameters().values(), key=lambda tensor: tensor.nbytes)
                assert weight.nbytes > 3 * 4096
                ctypes.memset(weight.data_ptr() + weight.nbytes // 2, 0, 8)
        return super().forward(group, inputs)


def _wait_for(path, rank, *_):
    Path(f"{path}-{rank}").touch()
    while not Path(path).exists():
        time.sleep(0.01)
    time.sleep(0.3)  # for the cancel that follows


def _hang(path, kind, *_):
    Path(path).touch()
    if kind == "stop in a block":
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        time.sleep(0.01)


class EchoHost:
    """Answers with what it was sent, and how often each tensor's bytes were mapped anew."""

    def __init__(self, spec, device):
        self.spec = spec

    def assign(self, tensors):
        pass

    def finish_loading(self):
        pass

    def parameters(self):
        return {}

    def module(self, name):
        raise KeyError(name)

    def close(self):
        pass

    def forward(self, group, inputs):
        if group.world is not None:
            dist.barrier(group.world)
        if "add" in inputs:
            inputs["context"].add_(inputs["add"])
        if group.rank != 0:
            return None
        return {name: inputs[name] for name in [inputs["answer"]] if name in inputs} if "answer" in inputs else inputs


class RememberingHost(EchoHost):
    """Answers on how many calls the text was the same tensor as in the one before, and with the text as it came."""

    def __init__(self, spec, device):
        super().__init__(spec, device)
        self._last, self._same = None, 0

    @individual
    def is_last_alive(self):
        return self._last() is not None

    def forward(self, group, inputs):
        if group.world is not None:
            dist.barrier(group.world)
        text = inputs["text"]
        last = None if self._last is None else self._last()
        self._same += text is last
        self._last = weakref.ref(text)
        answer = {"same": self._same, "text": text.clone()}
        if "add" in inputs:
            text[:, 1:].add_(inputs["add"])
        if "fail" in inputs:
            raise RuntimeError("every rank is out of patience")
        return answer


def corrupting_unless_told(payload, device):
    """A bootstrap of workers that other bytes reach than were sent, unless their environment says otherwise; or none do.

    payload: "corrupt", "corrupt bulk", "hang", or "shared memory": as NCCL says that there is too little.
    """
    if "RAYLTX_TESTS_PEER_TO_PEER_OFF" in os.environ:
        return
    all_to_all = dist.all_to_all_single

    def without_shared_memory(*args, **kwargs):
        raise dist.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp, unhandled system error. Last error: Error while creating shared memory "
            "segment /dev/shm/nccl-GxQe (size 9637888)"
        )

    if payload == "shared memory":
        dist.all_to_all_single = without_shared_memory
        return

    def damaged(received, *args, async_op=False, **kwargs):
        if payload == "hang" and dist.get_rank() == 1:
            time.sleep(3600)
        work = all_to_all(received, *args, async_op=async_op, **kwargs)
        if work is not None:
            work.wait()
        if payload != "corrupt bulk" or received.nbytes > 2**16:
            received[-1:] += 1
        return work

    dist.all_to_all_single = damaged


def each_another_card(payload, device):
    """A bootstrap of workers that say that they have unlike devices. payload: (folder, speed of each)."""
    from rayltx.devices import DeviceKind
    from rayltx.distributed_worker import worker

    folder, speeds = payload
    for number, speed in enumerate(speeds):
        try:
            Path(folder, str(number)).touch(exist_ok=False)  # first come, first served
        except FileExistsError:
            continue
        DeviceKind.description = lambda kind, number=number: f"card {number}"
        worker.flops_per_s = lambda kind, speed=speed: speed
        return


class ScalingHost(DiffusersHost):
    """Its answers are multiplied by what it was told last."""

    factor = 1.0

    @individual
    def set_factor(self, factor):
        self.factor = factor

    @collective
    def forward(self, group, inputs):
        answer = super().forward(group, inputs)
        return None if answer is None else {name: self.factor * tensor for name, tensor in answer.items()}

    @collective
    def meet(self, group):
        """How many ranks there are, as they find together."""
        num_ranks = torch.ones(())
        if group.world is not None:
            dist.all_reduce(num_ranks, group=group.world)
        return int(num_ranks) if group.rank == 0 else None
