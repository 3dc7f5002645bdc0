"""What a worker's model can be asked from ComfyUI's process.

`worker_process.comfy_model.ComfyModel` answers. The marks say who runs a call and what its failure costs; see
`distributed_worker.worker_calls`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from rayltx.comfy_dist.wire import (
    ConstantOptions,
    Difference,
    HookPatches,
    LoadInputs,
    ModuleInputs,
    PatchTestInputs,
    SentPatches,
    StepInputs,
    TextInputs,
)
from rayltx.distributed_worker.host import Host
from rayltx.distributed_worker.worker_calls import collective, individual
from rayltx.sequence_parallel.group import SequenceParallelGroup

COMFY_HOST = "rayltx.comfy_dist.worker_process.comfy_model:ComfyModel"  # what a worker imports

ModelOutput = Tensor | list[Tensor]
"""What an LTX model of ComfyUI's returns: the video, or the video and the audio."""


class ComfyHost(Host, Protocol):
    """ComfyUI's LTX model on one rank."""

    @collective
    def forward(self, group: SequenceParallelGroup, inputs: StepInputs) -> ModelOutput | None:
        """One call of the model. Returns on rank 0 what the model returns, on the CPU; None elsewhere.

        Raises what the model raises, and what putting the weights on the device raises, such as out of memory.
        """
        ...

    @collective
    def self_test(self, group: SequenceParallelGroup) -> dict[str, float | str]:
        """Compare a tiny model of this class and configuration, sharded, with itself. Returns errors by kind of input.

        In place of an error stands what the model said when it could not be sharded at all. Rank 0's count.
        """
        ...

    @individual
    def send_as_projected(self, on: bool) -> None:
        """Whether video self-attention sends each part as soon as it is projected, as it does at first."""
        ...

    @collective
    def kernel_test(self, group: SequenceParallelGroup) -> dict[str, Difference]:
        """Compare the model's own first blocks, sharded, with themselves, as they will run. By kind of input; rank 0's count.

        Raises what the model and its kernels raise.
        """
        ...

    @collective
    def patch_test(self, group: SequenceParallelGroup, inputs: PatchTestInputs) -> Difference | str:
        """Compare the model, with its patches and options, sharded with itself whole. Rank 0's answer counts.

        Returns what the model said instead, if it does not take such inputs even whole. Raises what it raises sharded.
        Patches that keep something between calls begin anew for each of the calls, and after them.
        """
        ...

    @individual
    def set_patches(self, sent: SentPatches) -> None:
        """Take the patches of a MODEL, in place of those before. They are applied when the weights are next loaded."""
        ...

    @individual
    def keep_options(self, options: ConstantOptions) -> None:
        """Remember transformer options under a key, in place of those before."""
        ...

    @individual
    def keep_hooks(self, hooks: HookPatches) -> None:
        """Remember the patches of some hooks under a key."""
        ...

    @individual
    def forget_hooks(self, key: str) -> None:
        """Hooks of this key do not come again."""
        ...

    @individual
    def drop_hooks(self) -> None:
        """Undo hooks, and forget them all."""
        ...

    @individual
    def preprocess_text(self, inputs: TextInputs) -> Tensor:
        """Run the text connector of LTX-2 and later, which is part of the weights. Returns its output, on the CPU.

        Raises InputError where the file has no connector.
        """
        ...

    @individual
    def run_module(self, inputs: ModuleInputs) -> object:
        """Run a module that prepares text, by itself. Returns what it returns, its tensors on the CPU."""
        ...

    @individual
    def load(self, load: LoadInputs) -> int:
        """Put the weights on the device, as many as fit, before a run. Returns `placed_bytes`.

        Raises what the device raises, such as out of memory.
        """
        ...

    @individual
    def end_run(self) -> None:
        """A sampling run is over: give back what was only needed for it."""
        ...

    @individual
    def unload(self) -> None:
        """Free the device's memory. The weights stay in the host's, where all workers share them."""
        ...

    @individual
    def unload_bytes(self, num_bytes: int) -> int:
        """Take at least so many bytes of weights off the device, which are streamed from then on. Returns `placed_bytes`."""
        ...

    @individual
    def placed_bytes(self) -> int:
        """What ComfyUI counts as loaded of the weights, on the CPU too; the rest is streamed when it is used."""
        ...

    @individual
    def free_bytes(self) -> int:
        """What a step can have of the device's memory, next to what is on it."""
        ...
