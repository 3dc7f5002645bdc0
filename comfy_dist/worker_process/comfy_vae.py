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
from rayltx.comfy_dist.worker_process.shared_patcher import SharedWeightPatcher
from rayltx.diffusion_models.lightricks.comfyui_decoder import Slabs, chunks_of, decode_slab
from rayltx.distributed_worker.freed_memory import give_back_freed_memory
from rayltx.distributed_worker.messages import INLINE_BYTES
from rayltx.errors import InputError
from rayltx.sequence_parallel.group import SequenceParallelGroup

# How far sums in another order may take a decoded video, of its largest value: some times what was seen on CPU ranks, 4e-6 in
# float32, 8e-4 in float16 and 7e-3 in bfloat16. Without the borders it was 0.08 at least.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 0.03}
_ALIGNMENT = 64  # bytes; of torch's memory


class VAEPatcher(SharedWeightPatcher):
    """Without blocks to stream: a VAE is on the device as a whole while it runs."""

    def _reserved_for_streaming(self, budget: float) -> int:
        return 0


class ComfyVAE(VAEHost):
    """What it can be asked is described in `VAEHost`."""

    def __init__(self, spec: VAESpec, device: str) -> None:
        self._spec = spec
        self._given: dict[str, Tensor] = {}
        self._vae: VAE = None

    # ---- loading

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        self._given.update({name: _aligned(tensor) for name, tensor in tensors.items()})

    def finish_loading(self) -> None:
        with torch.inference_mode():
            self._vae = build_vae(self._given, self._spec.metadata, self._spec.dtype)
        model = self._vae.first_stage_model
        absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        assert not absent, f"parameters without weights: {absent[:5]}"
        model.requires_grad_(False)
        self._vae.patcher = VAEPatcher(model, load_device=self._vae.device, offload_device=torch.device("cpu"))

    def parameters(self) -> Mapping[str, Tensor]:
        return self._given

    def module(self, name: str) -> nn.Module:
        return self._vae.first_stage_model.get_submodule(name)

    def close(self) -> None:
        self.unload()

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

    # ---- memory

    def rest(self) -> None:
        give_back_freed_memory()
        management.soft_empty_cache()  # for what shares the card

    def unload(self) -> None:
        with torch.inference_mode():
            for loaded in list(management.current_loaded_models):
                if self._vae is not None and loaded.model is self._vae.patcher:
                    loaded.model_unload()
                    management.current_loaded_models.remove(loaded)
            management.soft_empty_cache()

    def free_bytes(self) -> int:
        return int(management.get_free_memory(self._vae.device))


def _tolerance(dtype: torch.dtype, device: torch.device) -> float:
    if dtype is torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return _TOLERANCE[torch.float16]  # as many digits
    return _TOLERANCE[dtype]


def _aligned(tensor: Tensor) -> Tensor:
    """A small tensor as torch allocates one: on the CPU the last bits of a product can differ with where its numbers lie."""
    is_small = tensor.nbytes < INLINE_BYTES
    return tensor.clone() if is_small and tensor.data_ptr() % _ALIGNMENT else tensor


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
