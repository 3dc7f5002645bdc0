"""What goes through the pipe between ComfyUI's process and the courier.

Results that stay in Ray's store ("kept") have numbers here, as calls and workers have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LOCAL = "local"  # the address of the Ray that is started here
TELL_S = 1.0  # between signs of life of the courier


@dataclass(frozen=True)
class RaySettings:
    """What is asked of Ray."""

    address: str  # LOCAL, or of a cluster that runs
    namespace: str
    store_bytes: int  # of the one that is started here
    dashboard: str = ""  # host:port; "": none

    @property
    def is_local(self) -> bool:
        return self.address == LOCAL


@dataclass(frozen=True)
class StartRay:
    """The first message."""

    settings: RaySettings
    folder: str  # of Ray's files; the one that it lies in goes with it
    limit_s: float
    package: str  # folder that other machines are sent; "": none


@dataclass(frozen=True)
class StartWorker:
    worker: int
    rank: int
    num_ranks: int
    arguments: tuple[object, ...]  # of `RayWorker`
    environment: Mapping[str, str]
    resources: Mapping[str, float]


@dataclass(frozen=True)
class CallWorkers:
    """One call, or the same of several workers."""

    calls: tuple[tuple[int, int], ...]  # (call, worker)
    payload: bytes
    kept: tuple[int, ...]  # results that the payload has numbers for
    keep_as: int | None  # the number of what the call gives besides its answer, where it gives something


@dataclass(frozen=True)
class Serve:
    """A worker is to read its line (see `driver.line`). Answered when it was called back."""

    call: int
    worker: int


@dataclass(frozen=True)
class Keep:
    """Put bytes into Ray's store."""

    number: int
    data: bytes


@dataclass(frozen=True)
class EndWorker:
    worker: int


@dataclass(frozen=True)
class LetGo:
    kept: tuple[int, ...]


# ---- answers


@dataclass(frozen=True)
class Started:
    store_bytes: int
    address: str  # of this machine, as Ray's other nodes reach it


@dataclass(frozen=True)
class Running:
    """Said every TELL_S."""


@dataclass(frozen=True)
class Answered:
    call: int
    payload: bytes


@dataclass(frozen=True)
class NotAnswered:
    """The worker is gone, or what it needed is."""

    call: int
    reason: str


@dataclass(frozen=True)
class Ended:
    """Ray as a whole. The last message."""

    reason: str
