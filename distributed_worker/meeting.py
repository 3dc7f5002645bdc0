"""Where ranks meet to form a group, and what they see of ComfyUI's process while a step runs.

On one machine: a file that only this user can read, and shared memory. Where there are several, or where an address is asked for:
a server in ComfyUI's process (see `meeting_server`).
"""

from __future__ import annotations

import datetime
import itertools
import os
from dataclasses import dataclass

import psutil
import torch.distributed as dist

from rayltx.distributed_worker.driver.link import RayDriver
from rayltx.distributed_worker.meeting_server import MeetingServer, Place, ServedControl, ServedStore
from rayltx.distributed_worker.step_control import StepControl
from rayltx.errors import ClusterError

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
RankControl = StepControl | ServedControl  # as a worker has it


def use_interface_of(address: str) -> None:
    """Let this process's groups meet over the network that has an address, by which Ray's nodes reach each other.

    gloo would take the one that the host's name resolves to, which often is loopback.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            for variable in INTERFACE_VARIABLES:
                os.environ.setdefault(variable, name)


@dataclass(frozen=True)
class MeetingPoint:
    """Of one group. path: of a file that does not exist yet; "": at a server's place."""

    path: str = ""
    place: Place | None = None
    group: str = ""

    def join(self, timeout_s: float = 300.0) -> dist.Store:
        """A store of its own for each thread that uses it, to be kept while it is used. timeout_s: of what waits for others."""
        if self.place is not None:
            return ServedStore(self.place, self.group, timeout_s)
        store: dist.Store = dist.FileStore(self.path)
        store.set_timeout(datetime.timedelta(seconds=timeout_s))
        return store


class Meetings:
    """Of a cluster's ranks, in ComfyUI's process."""

    def __init__(self, driver: RayDriver, address: str) -> None:
        """address: host:port for the server; "": none is needed on one machine, and a free port where there are several."""
        self._driver, self._address = driver, address
        self._numbers = itertools.count()
        self._server: MeetingServer | None = None
        self._is_closed = False

    def next_point(self) -> MeetingPoint:
        """For a new group. Raises DeviceError for an address that cannot be had."""
        if self._driver.shares_memory and not self._address:
            return MeetingPoint(path=str(self._driver.folder / f"group-{next(self._numbers)}"))
        server = self._serve()
        return MeetingPoint(place=server.place, group=server.begin_group())

    def share(self, control: StepControl) -> RankControl:
        """What ranks are to be sent for the numbers of a step."""
        return control if self._driver.shares_memory else self._serve().share(control)

    def close(self) -> None:
        self._is_closed = True
        if self._server is not None:
            self._server.close()
            self._server = None

    def _serve(self) -> MeetingServer:
        if self._is_closed:
            raise ClusterError("the workers were ended")
        if self._server is None:
            host, _, port = self._address.rpartition(":")
            self._server = MeetingServer(host or self._driver.address, int(port or 0))
        return self._server
