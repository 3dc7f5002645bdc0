"""How tensors reach the workers: through memory files on this machine, and through Ray's store where there are others."""

from __future__ import annotations

from rayltx.distributed_worker.driver.link import RayDriver
from rayltx.distributed_worker.messages import KeptTensors, SentTensors, SharedTensors, Store


class Sending:
    """Of one cluster, for all its models."""

    def __init__(self, driver: RayDriver) -> None:
        keep = None if driver.shares_memory else driver.keep
        self.of_steps = SentTensors(keep=keep)  # of which much is the same in the next
        self.of_setups: Store = SharedTensors() if keep is None else KeptTensors(keep)  # each message keeps its own

    def clear(self) -> None:
        self.of_steps.clear()
