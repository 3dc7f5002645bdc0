"""The way from a MODEL of this process to the workers' copies of it: where it runs, its patches, and its calls."""

from __future__ import annotations

import inspect
import itertools
import logging
import uuid
import weakref
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor

from rayltx.comfy_dist.detection import Detected
from rayltx.comfy_dist.forwarding import (
    CHANGING,
    MODEL_PREFIX,
    PatchState,
    check_sendable,
    module_names,
    register_unimportable_modules,
    remote_options,
)
from rayltx.comfy_dist.patch_shapes import misfits
from rayltx.comfy_dist.verdicts import prove_seam
from rayltx.distributed_worker.cluster import Cluster, ClusterRequest, RemoteModel
from rayltx.distributed_worker.messages import Message, SharedTensors, pack
from rayltx.errors import InputError, ParallelConfigError, UnsupportedError
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where a MODEL runs, and how its ranks share the work. It travels with the MODEL, from node to node.

    It names the workers by what was asked for, so it is never a stale handle: whoever samples gets the cluster that runs,
    or a new one.
    """

    request: ClusterRequest
    config: ParallelConfig
    free_after_sampling: bool = False  # give the devices' memory back at the end of a run
    weight_budget: int = 0  # bytes of weights on a device at most, the rest is streamed; 0: as many as fit

    def check(self) -> None:
        """Raises ParallelConfigError if the ranks are more than the workers."""
        if self.config.world_size > self.request.workers:
            raise ParallelConfigError(
                f"ulysses_degree={self.config.ulysses_degree} x ring_degree={self.config.ring_degree} = "
                f"{self.config.world_size} ranks, but there are {self.request.workers} workers"
            )


class Link:
    """The way from one model of this process to the workers' copies of it."""

    def __init__(self, remote: RemoteModel, placement: Placement, detected: Detected) -> None:
        self.remote = remote
        self.placement = placement  # of the MODEL that was last loaded
        self.spec = detected.spec
        self.base_model = weakref.ref(detected.base_model)
        self.state_dict = detected.state_dict
        self._proved: Any = None
        self.loaded = False
        self._refer = module_names(detected.base_model.diffusion_model)
        remote.refer = self._refer
        self._sent_patches: PatchState | None = None
        self._sent_part: tuple[str, Message] | None = None
        self._sent_hooks: dict[Any, str] = {}
        self._runs = itertools.count()
        self._load_key = next(self._runs)
        self.latent_shape: list[int] = [1, 1, 1, 1, 1]  # of what is about to be sampled

    # ---- patches

    def sync(self, patcher: Any) -> None:
        """Give the workers the patches of this MODEL, if they do not have them. Raises UnsupportedError by name."""
        self.move(patcher.placement)
        state = PatchState.of(patcher)
        register_unimportable_modules()
        if self._sent_patches is None or not state.is_same(self._sent_patches):
            self._sent_patches = None
            wrong = misfits(state.patches, self.state_dict, MODEL_PREFIX)
            if wrong:
                raise InputError(
                    f"a LoRA is for another model than this {self.spec.model_version} one: {'; '.join(wrong[:3])}"
                    f"{f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''}; remove it, or use one for this model"
                )
            check_sendable(state.object_patches, "the object patch", self._refer)
            check_sendable(state.injections, "the injection", self._refer)
            check_sendable(state.weight_wrappers, "the weight wrapper of", self._refer)
            message = pack(state, SharedTensors(), self._refer)  # one copy of a LoRA for all workers
            self.remote.setup("patches", "set_patches", message, "forwarding patches")
            self.remote.forget_setups("hooks ")
            self._sent_hooks.clear()
            self._sent_patches = state
        self.loaded = True

    def move(self, placement: Placement) -> None:
        """Have the weights where a MODEL wants them, and the seam proved on the ranks that it wants.

        Workers that were ended or exchanged in the meantime get the model again: ComfyUI keeps MODELs for longer.
        """
        cluster = Cluster.start(placement.request)
        if cluster is not self.remote.cluster:
            logger.warning("the Ray workers of this MODEL are others now: loading it again")
            self.remote.release_unless_busy()
            self.remote = self.remote.load_again(cluster)
            self._sent_patches = self._sent_part = None
            self._sent_hooks.clear()
        self.placement = placement
        if self._proved != (cluster, placement.config):
            prove_seam(self.remote, placement.config, self.spec, self.base_model())
            self._proved = (cluster, placement.config)

    def begin_run(self) -> None:
        """A sampling run begins: weights are put on the devices anew, if anything took their place."""
        self._load_key = next(self._runs)

    def _hooks_key(self, patcher: Any) -> str | None:
        """The workers' name for the hooks of this step, whose patches they are sent when they are first used."""
        hooks = patcher.current_hooks
        if hooks is None:
            return None
        # The references are part of the key, so that they live, and their ids stay their own.
        identity = tuple((hook.hook_ref, float(hook.strength)) for hook in hooks.hooks), patcher.patches_uuid
        if identity not in self._sent_hooks:
            key = uuid.uuid4().hex
            self._forget_other_strengths(identity)
            combined = patcher.get_combined_hook_patches(hooks)
            check_sendable(combined, "the hook's patch of", self._refer)
            self.remote.setup(
                f"hooks {key}",
                "keep_hooks",
                pack((key, combined), SharedTensors(), self._refer),
                "forwarding hooks",
            )
            self._sent_hooks[identity] = key
        return self._sent_hooks[identity]

    def _forget_other_strengths(self, identity: Any) -> None:
        """Of the same hooks: a strength that changes with every step would be kept for every step."""

        def references(of: Any) -> list[Any]:
            return [reference for reference, _ in of[0]]

        for other in [known for known in self._sent_hooks if references(known) == references(identity)]:
            key = self._sent_hooks.pop(other)
            self.remote.forget_setups(f"hooks {key}")
            self.remote.tell("forget_hooks", key)

    def drop_hooks(self) -> None:
        if self._sent_hooks:
            self._sent_hooks.clear()
            self.remote.forget_setups("hooks ")
            self.remote.tell("drop_hooks")  # not waited for: this is how a cancelled run ends, too

    # ---- calls

    def forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's `_forward`, by the workers. Returns what it returns, on the device of the input."""
        bound = inspect.signature(type(model)._forward).bind(model, *args, **kwargs)
        arguments = dict(bound.arguments)
        arguments.pop("self")
        arguments.update(arguments.pop("kwargs", {}))
        options = dict(arguments.pop("transformer_options", None) or {})
        x = arguments["x"]
        self._check(model, x, arguments.get("context"))
        self.latent_shape = _latent_shape(x)
        patcher = self.base_model().current_patcher  # type: ignore[union-attr]
        inputs = {
            "args": (),
            "kwargs": arguments,
            "options": {name: value for name, value in options.items() if name in CHANGING},
            "parts": self._part_key(remote_options(options)),
            "hooks": self._hooks_key(patcher) if patcher is not None else None,
            **self._load_inputs(),
        }
        poll = comfy.model_management.throw_exception_if_processing_interrupted
        out = self.remote.forward(inputs, self.placement.config, poll)
        device = (x[0] if isinstance(x, (list, tuple)) else x).device
        return [stream.to(device) for stream in out] if isinstance(out, (list, tuple)) else out.to(device)

    def preprocess_text_embeds(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The text connector, which is part of the weights. One worker is enough for it."""
        context: Tensor = args[0]
        model = self.base_model().diffusion_model  # type: ignore[union-attr]
        both = model.cross_attention_dim + model.audio_cross_attention_dim
        if context.shape[-1] not in (model.caption_channels, 2 * model.caption_channels, both):
            raise InputError(
                f"the conditioning is {context.shape[-1]} wide, which this {self.remote.checkpoint.version} model's text "
                "connector does not take; encode the text with the text encoder of this LTX version"
            )
        message = pack((self._load_inputs(), args, kwargs))
        answers = self.remote.call("preprocess_text_embeds", message, what="the text connector", ranks=[0])
        return answers[0].to(context.device)

    def _load_inputs(self) -> dict[str, Any]:
        """By what a worker puts weights on its device, if they are not there."""
        return {
            "load": self._load_key,
            "latent_shape": self.latent_shape,
            "weight_budget": self.placement.weight_budget,
            "world_size": self.placement.config.world_size,
        }

    def _part_key(self, part: dict[str, Any]) -> str:
        """The workers' name for the transformer options that stay the same, which they are sent when they change."""
        try:
            message = pack(part, refer=self._refer)
        except Exception as error:  # pickling raises anything
            check_sendable(part, "the transformer option", self._refer)
            raise UnsupportedError(f"the transformer options cannot be sent to the workers: {error}") from error
        if self._sent_part is None or not _same(message, self._sent_part[1]):
            key = uuid.uuid4().hex
            self.remote.setup("part", "keep_part", pack((key, part), refer=self._refer), "forwarding patches")
            self._sent_part = (key, message)
        return self._sent_part[0]

    def _check(self, model: Any, x: Any, context: Tensor | None) -> None:
        """Raises InputError for latents and text of another model, before the workers stumble over them."""
        video = x[0] if isinstance(x, (list, tuple)) else x
        version = self.remote.checkpoint.version
        if video.ndim == 3:  # ComfyUI packs several streams into one before a model that has one asks for them apart
            raise InputError(
                f"the latent holds video and audio, and this {version} model has no audio: give it the video latent alone "
                "(LTXVSeparateAVLatent), or load an LTX-2 checkpoint"
            )
        if video.ndim != 5 or video.shape[1] != model.in_channels:
            raise InputError(
                f"the latent has the shape {tuple(video.shape)}: a {version} model takes (batch, {model.in_channels}, frames, "
                "height, width); use an empty LTX latent, or the VAE of this model"
            )
        width = _context_width(model)
        if context is not None and context.shape[-1] != width:
            raise InputError(
                f"the conditioning is {context.shape[-1]} wide, and this {version} model takes {width}; encode the text with "
                "the text encoder of this LTX version"
            )

    # ---- memory

    def end_run(self, free: bool) -> None:
        """A sampling run is over, or cancelled: nothing is waited for. free: give the devices' memory back."""
        self.remote.tell("unload" if free else "end_run")
        self.loaded = self.loaded and not free

    def unload(self) -> None:
        """Free the devices; the host's copy stays."""
        if self.loaded:
            self.loaded = False
            if self.remote.cluster.is_alive():
                self.remote.call("unload", what="unloading")

    def device_bytes(self, device: torch.device) -> int:
        """What the workers' weights take on a device of this process, when loaded."""
        if device.type != "cuda":
            return 0
        index = device.index or 0
        return self.remote.weight_bytes if self.remote.cluster.uses_gpu(index) else 0


def _latent_shape(x: Any) -> list[int]:
    """As ComfyUI estimates memory by: an audio-video latent counts as one packed stream."""
    if isinstance(x, (list, tuple)):
        batch = x[0].shape[0]
        return [batch, 1, sum(stream.numel() for stream in x) // batch]
    return list(x.shape)


def _context_width(model: Any) -> int:
    if not hasattr(model, "audio_inner_dim"):
        return model.inner_dim if model.caption_proj_before_connector else model.caption_channels
    if model.caption_proj_before_connector:
        return model.inner_dim + model.audio_inner_dim
    return 2 * model.caption_channels


def _same(a: Message, b: Message) -> bool:
    if a.payload != b.payload or len(a.tensors) != len(b.tensors):
        return False
    return all(
        (x.dtype, x.shape) == (y.dtype, y.shape) and bool((x.data == y.data).all())
        for x, y in zip(a.tensors, b.tensors)
    )
