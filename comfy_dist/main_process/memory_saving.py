"""What a step is tried with once more when a device's memory ran out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from rayltx.comfy_dist.wire import LoadInputs, StepInputs

_LEAST_BUDGET = 64 * 2**20  # bytes; a block or two of any model


@dataclass(frozen=True)
class MemorySaving:
    """Less weights on each device, and the feed-forward in chunks: the same numbers, more slowly."""

    weight_budget: int  # bytes; the rest is streamed

    @classmethod
    def after(cls, placed_bytes: dict[int, int], weight_bytes: int, weight_budget: int) -> MemorySaving:
        """Half of what the rank with the most weights had on its device.

        placed_bytes: by rank; 0 where a worker had to be replaced, whose weights are all taken for placed.
        weight_bytes: of the whole model. weight_budget: what was allowed; 0 for as many as fit.
        """
        had = max(placed_bytes.values()) or weight_bytes
        allowed = min(had, weight_budget) if weight_budget else had
        return cls(max(allowed // 2, _LEAST_BUDGET))

    def load(self, inputs: LoadInputs) -> LoadInputs:
        return dataclasses.replace(inputs, weight_budget=self.weight_budget)

    def step(self, inputs: StepInputs) -> StepInputs:
        return dataclasses.replace(inputs, saves_memory=True, load=self.load(inputs.load))

    def __str__(self) -> str:
        return f"at most {self.weight_budget / 2**30:.2f} GiB of weights on a device and the feed-forward in chunks"


def advice(saving: MemorySaving) -> str:
    """What a user can change when even that is too much."""
    return (
        f"The step was tried again with {saving}. Make the video smaller or shorter, lower max_vram_gb of the Ray loader below "
        f"{saving.weight_budget / 2**30:.1f}, take more GPUs, or leave this GPU to the workers alone (gpu_indices)"
    )
