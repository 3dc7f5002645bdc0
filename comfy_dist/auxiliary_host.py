"""What a worker's model next to the transformer can be asked, whichever it is: a VAE, or an upsampler of latents.

`worker_process.auxiliary_model.AuxiliaryModel` answers. The marks are those of `distributed_worker.worker_calls`.
"""

from __future__ import annotations

from typing import Protocol

from rayltx.distributed_worker.host import Host
from rayltx.distributed_worker.worker_calls import individual


class AuxiliaryHost(Host, Protocol):
    """A model of ComfyUI's on one worker."""

    @individual
    def rest(self) -> None:
        """The last of some calls is over: give back what they took, and the answer to the last one."""
        ...

    @individual
    def unload(self) -> None:
        """Free the device's memory. The weights stay in the host's, where all workers share them."""
        ...

    @individual
    def free_bytes(self) -> int:
        """What a call can have of the device's memory, next to what is on it."""
        ...
