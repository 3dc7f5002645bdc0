"""ComfyUI's VAE on one worker, on weights that all workers share."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rayltx.comfy_dist.comfy_types import VAE
from rayltx.comfy_dist.random_states import random_state, set_random_state
from rayltx.comfy_dist.vae_building import build_vae
from rayltx.comfy_dist.vae_host import Slab, VAECall, VAEHost, VAESpec
from rayltx.comfy_dist.worker_process.auxiliary_model import AuxiliaryModel
from rayltx.diffusion_models.lightricks.comfyui_decoder import Slabs, chunks_of, decode_slab
from rayltx.errors import InputError
from rayltx.sequence_parallel.group import SequenceParallelGroup

# How far sums in another order may take a decoded video, of its largest value: some times what was seen on CPU ranks, 4e-6 in
# float32, 8e-4 in float16 and 7e-3 in bfloat16. Without the borders it was 0.08 at least.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 0.03}


class ComfyVAE(AuxiliaryModel, VAEHost):
    """What it can be asked is described in `VAEHost`."""

    def __init__(self, spec: VAESpec, device: str) -> None:
        super().__init__()
        self._spec = spec
        self._vae: VAE = None

    def _build(self) -> nn.Module:
        self._vae = build_vae(self._given, self._spec.metadata, self._spec.dtype)
        return self._vae.first_stage_model

    def _device(self) -> torch.device:
        return self._vae.device

    def finish_loading(self) -> None:
        super().finish_loading()
        self._vae.patcher = self._patcher

    # ---- calls

    def forward(self, group: SequenceParallelGroup, inputs: VAECall) -> tuple[Slab, Tensor | None]:
        model = self._vae.first_stage_model
        slabs = Slabs.of(model, inputs.x.shape, group)
        if isinstance(slabs, str):
            raise InputError(f"this video cannot be decoded by {group.world_size} workers together: {slabs}")
        with self._ready(inputs, self._vae.memory_used_decode, group.config.largest_share):
            pixels = decode_slab(model, self._placed(inputs.x), slabs, group, inputs.options).cpu()
            state = None if inputs.random_state is None else random_state(self._vae.device)
        start = pixels.shape[slabs.dim] * slabs.parts.starts[group.rank] // slabs.parts.sizes[group.rank]
        return Slab(slabs.dim, start, pixels), state

    def slab_test(self, group: SequenceParallelGroup, inputs: VAECall) -> tuple[float, float]:
        alone = self.decode(inputs)
        part, _ = self.forward(group, inputs)
        apart = (part.pixels - alone.narrow(part.dim, part.start, part.pixels.shape[part.dim])).abs().max()
        error = apart.to(self._vae.device) / alone.abs().max().to(self._vae.device)
        torch.distributed.all_reduce(error, torch.distributed.ReduceOp.MAX, group.world)
        return float(error), _tolerance(self._vae.vae_dtype, self._vae.device)

    def decode(self, call: VAECall) -> Tensor:
        model = self._vae.first_stage_model
        with self._ready(call, self._vae.memory_used_decode):
            return model.decode(self._placed(call.x), **call.options).cpu()

    def encode(self, call: VAECall) -> Tensor:
        model = self._vae.first_stage_model
        with self._ready(call, self._vae.memory_used_encode):
            if getattr(model, "comfy_has_chunked_io", False):  # brings the video to the device in parts
                return model.encode(call.x, device=self._vae.device, **call.options).cpu()
            return model.encode(self._placed(call.x), **call.options).cpu()

    def draws(self, call: VAECall) -> list[tuple[int, ...]]:
        whole = self._vae.first_stage_model
        # What deepcopy finds here it takes in place of a copy.
        memo: dict[int, Any] = {
            id(tensor): type(tensor)(torch.empty_like(tensor, device="meta"), False) for tensor in whole.parameters()
        }
        model = copy.deepcopy(whole, memo).to("meta")
        _set(model, call.settings)
        found: list[tuple[int, ...]] = []
        with torch.inference_mode(), chunks_of(model, call.chunk_bytes), _Drawn(found):
            options = dict(call.options)
            if getattr(model, "comfy_has_chunked_io", False):
                options["output_buffer"] = torch.empty(model.decode_output_shape(call.x.shape), device="meta")
            model.decode(call.x.to("meta", self._vae.vae_dtype), **options)
        return found

    def _placed(self, x: Tensor) -> Tensor:
        return x.to(self._vae.device)

    @contextlib.contextmanager
    def _ready(self, call: VAECall, memory_used: Callable[..., float], share: float = 1.0) -> Iterator[None]:
        """The weights are on the device, and the random state and the model's settings are those of the call."""
        vae = self._vae
        with torch.inference_mode():
            needed = memory_used(tuple(call.x.shape), vae.vae_dtype) * share
            management.load_models_gpu([vae.patcher], memory_required=needed, force_full_load=vae.disable_offload)
            _set(vae.first_stage_model, call.settings)
            if call.random_state is not None:
                set_random_state(vae.device, call.random_state)
            with chunks_of(vae.first_stage_model, call.chunk_bytes):
                yield


def _tolerance(dtype: torch.dtype, device: torch.device) -> float:
    if dtype is torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return _TOLERANCE[torch.float16]  # as many digits
    return _TOLERANCE[dtype]


def _set(model: nn.Module, settings: Mapping[str, object]) -> None:
    for name, value in settings.items():
        setattr(model, name, value)


class _Drawn(TorchFunctionMode):
    """Notes what would be drawn from the device's own generator."""

    def __init__(self, found: list[tuple[int, ...]]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.randn_like, torch.randn) and (kwargs or {}).get("generator") is None:
            self._found.append(tuple(out.shape))
        return out
