"""Where ranks meet to form a group: a file that only this user can read, or a port where there are several machines.

torch's own server for that (TCPStore) listens on all interfaces and asks for no password: it is used where there are several
machines, or where an address is asked for. The keys of a group there begin with a word that its ranks are told through Ray. A
stray visitor does not meet them, but torch tells who asks for it which keys there are.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import psutil
import torch.distributed as dist

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


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
    """path: of a file that does not exist yet; "" for a server at a host and port."""

    path: str = ""
    host: str = ""
    port: int = 0
    prefix: str = ""

    def join(self, timeout_s: float = 300.0) -> dist.Store:
        """A store of its own for each thread that uses it. timeout_s: of what waits for others."""
        timeout = datetime.timedelta(seconds=timeout_s)
        if self.path:
            store: dist.Store = dist.FileStore(self.path)
            store.set_timeout(timeout)
            return store
        return dist.PrefixStore(self.prefix, dist.TCPStore(self.host, self.port, is_master=False, timeout=timeout))
