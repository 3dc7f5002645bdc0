"""Every exception that RayLTX raises.

    RayLTXError
    |-- UserError (ValueError)          something was asked for that cannot be; nothing was started or changed
    |   |-- ParallelConfigError         degrees, worker counts, heads
    |   |-- DeviceError                 GPU indices and counts, shared memory, object store
    |   |-- CheckpointError             a file that is missing, damaged, or not what it should be
    |   |-- InputError                  sizes, timesteps, conditioning, prompts
    |   |   `-- AbsentPartError         what a model file does not hold was used (an AttributeError too)
    |   |-- UnsupportedError            a valid request that this host or file cannot honour
    |   `-- MissingPackageError         a package that is needed is not installed
    |-- SelfTestError (RuntimeError)    the installed ComfyUI's model would give another picture on several ranks
    `-- ClusterError (RuntimeError)     the workers failed
        |-- RanksFailedAlike            every rank raised the same: the group is whole, and the call can be repeated
        |-- OutOfMemory                 a device's memory ran out on some rank: less may be asked for
        |-- StepCancelled               all ranks stopped at the same block, as they were told: the group is whole
        |-- RanksDisagree               some ranks raised and others did not: the group's collectives are out of step
        |-- WorkerDied                  a process is gone
        |-- WorkerStuck                 a rank did not answer in time
        `-- ExchangeError               other bytes came from a rank than were sent

Each keeps its constructor's one argument, the message, in `args`, so that all survive pickling: a class whose
constructor wants more arrives from Ray as `UnserializableException`, past every `except` that was meant for it.
"""

from __future__ import annotations

from collections.abc import Sequence


class RayLTXError(Exception):
    """Base of all."""


class UserError(RayLTXError, ValueError):
    """The message names the value, the rule and the remedy."""


class ParallelConfigError(UserError):
    pass


class DeviceError(UserError):
    pass


class CheckpointError(UserError):
    pass


class InputError(UserError):
    pass


class AbsentPartError(InputError, AttributeError):
    """An AttributeError too: whoever only asks whether a part has an attribute is told no."""


class UnsupportedError(UserError):
    pass


class MissingPackageError(UserError):
    pass


class SelfTestError(RayLTXError, RuntimeError):
    """The message names the ComfyUI version, what differs, and by how much."""


class ClusterError(RayLTXError, RuntimeError):
    """The message names the ranks."""


class RanksFailedAlike(ClusterError):
    pass


class OutOfMemory(ClusterError):
    """The message names the ranks, and what is known of each one's memory."""


class StepCancelled(ClusterError):
    pass


class RanksDisagree(ClusterError):
    pass


class WorkerDied(ClusterError):
    pass


class WorkerStuck(ClusterError):
    pass


class ExchangeError(ClusterError):
    """The message names the rank, and the kind of message."""


RANK_LOST = (WorkerDied, WorkerStuck)
"""What is no verdict on what was being done: the same may go well with another worker in that one's place."""


def first_line(text: object, most: int = 300) -> str:
    """The first line of a message that says something, up to so many characters; "" where there is none."""
    return next((line.strip() for line in str(text).splitlines() if line.strip()), "")[:most]


def listed(items: Sequence[str], most: int = 4, separator: str = ", ") -> str:
    """The first of many, and how many more there are, for a message."""
    more = f"{separator}and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more
