"""The MODEL that ComfyUI sees: a real one of its class, without weights, whose model calls go to the workers.

Samplers, schedulers, guiders, previews, progress and interruption are ComfyUI's own and run in its process; so do the
wrappers around the model call. One call of the model becomes one call of the workers. The class, the configuration and
the modules are ComfyUI's, so that LoRA loaders find the keys and patches the modules that they look for; what they do to
weights is forwarded.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from rayltx.comfy_dist.comfy_host import COMFY_HOST
from rayltx.comfy_dist.comfy_types import BaseModel, HookGroup
from rayltx.comfy_dist.main_process.absent_weights import mark_absent
from rayltx.comfy_dist.main_process.detection import detect
from rayltx.comfy_dist.main_process.forwarding import is_local, module_names
from rayltx.comfy_dist.main_process.placement import Placement
from rayltx.comfy_dist.main_process.releasing import release_with
from rayltx.comfy_dist.main_process.told_plan import tell_plan
from rayltx.comfy_dist.main_process.worker_link import WorkerLink, raise_if_cancelled
from rayltx.comfy_dist.marks import LINK, MODULE_NAME, OBJECT_BACKUP, PLACEMENT
from rayltx.comfy_dist.model_spec import CAPTION_PROJECTIONS, TEXT_MODULES
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.machine_facts import memory_problem
from rayltx.distributed_worker.weight_sharing import Progress
from rayltx.errors import UnsupportedError
from rayltx.expansion.comfyui_gguf.checkpoint import open_model_file
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)


_COMPILED = "torch.compile"  # the key of the wrapper that ComfyUI's node for it adds, and other packs'


@functools.cache
def _remote_class(model_class: Any) -> type:
    """ComfyUI's model class, with what needs weights done by the workers."""

    class RemoteLTX(model_class):
        def _forward(self, *args: object, **kwargs: object) -> object:
            return _link_of(self).forward(self, args, kwargs)

        def state_dict(
            self,
            *args: object,
            destination: dict[str, Tensor] | None = None,
            prefix: str = "",
            keep_vars: bool = False,
        ) -> dict[str, Tensor]:
            found = {} if destination is None else destination
            found.update({prefix + name: tensor for name, tensor in _link_of(self).state_dict.items()})
            return found

    if hasattr(model_class, "preprocess_text_embeds"):

        def preprocess_text_embeds(self: RemoteLTX, *args: Tensor, **kwargs: object) -> Tensor:
            return _link_of(self).preprocess_text_embeds(args, kwargs)

        RemoteLTX.preprocess_text_embeds = preprocess_text_embeds
    RemoteLTX._forward.__signature__ = inspect.signature(model_class._forward)  # type: ignore[attr-defined]
    RemoteLTX.__name__ = RemoteLTX.__qualname__ = model_class.__name__
    return RemoteLTX


@functools.cache
def _remote_module_class(module_class: Any) -> type:
    """The class of a module that prepares text, run by a worker. Nodes call such modules by themselves."""

    class RemoteModule(module_class):
        def forward(self, *args: object, **kwargs: object) -> object:
            return _link_of(self).run_module(getattr(self, MODULE_NAME), *args, **kwargs)

        def to(self, *args: object, **kwargs: object) -> object:
            return self  # it has no weights here, that a node could bring to a device before it calls it

    RemoteModule.__name__ = RemoteModule.__qualname__ = module_class.__name__
    return RemoteModule


def _link_of(diffusion_model: object) -> WorkerLink:
    return getattr(diffusion_model, LINK)


class TwinPatcher(comfy.model_patcher.ModelPatcher):
    """Loads and unloads as nothing, and stands in ComfyUI's list of loaded models for the workers' memory."""

    @property
    def link(self) -> WorkerLink:
        return _link_of(self.model.diffusion_model)

    @property
    def placement(self) -> Placement:
        return self.get_attachment(PLACEMENT) or self.link.placement

    def placed(self, placement: Placement) -> TwinPatcher:
        """A clone that runs elsewhere, or otherwise."""
        clone = self.clone()
        clone.set_attachments(PLACEMENT, placement)
        return clone

    def with_config(self, config: ParallelConfig) -> TwinPatcher:
        """A clone whose ranks share the work otherwise. Raises ParallelConfigError for more ranks than workers."""
        return self.placed(dataclasses.replace(self.placement, config=config, chooses_ranks=False))

    def model_size(self) -> int:
        return self.link.memory.device_bytes(self.load_device)

    def loaded_size(self) -> int:
        return self.link.memory.placed_bytes(self.load_device)

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.link.memory.loaded else self.offload_device

    def lowvram_patch_counter(self) -> int:
        return 0

    def model_mmap_residency(self, free: bool = False) -> tuple[int, int]:
        return 0, 0

    def partially_load(self, device_to: object, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        self.unpatch_model()
        self.patch_model()
        self.link.sync(self)
        return self.loaded_size()

    def partially_unload(self, device_to: object, memory_to_free: float = 0, force_patch_weights: bool = False) -> int:
        """Free memory for something else on ComfyUI's own device: of the one worker that shares it."""
        return self.link.memory.unload_bytes(self.load_device, int(memory_to_free))

    def get_free_memory(self, device: torch.device) -> float:
        return self.link.memory.free_bytes() if self.link.memory.is_running else super().get_free_memory(device)

    def detach(self, unpatch_all: bool = True) -> BaseModel:
        if unpatch_all:  # not for a clone that goes while another samples
            self.unpatch_model()
            self.link.memory.unload()
        for callback in self.get_all_callbacks(comfy.model_patcher.CallbacksMP.ON_DETACH):
            callback(self, unpatch_all)
        return self.model

    def patch_model(self, *args: object, **kwargs: object) -> BaseModel:
        """Apply the object patches that are for this process, such as another model sampling."""
        for name, patch in self.object_patches.items():
            if is_local(name):
                before = comfy.utils.set_attr(self.model, name, patch)
                self.object_patches_backup.setdefault(name, before)
        return self.model

    def unpatch_model(self, *args: object, **kwargs: object) -> None:
        for name, before in self.object_patches_backup.items():
            comfy.utils.set_attr(self.model, name, before)
        self.object_patches_backup.clear()

    def inject_model(self) -> None:
        """Injections are for the weights: the workers get them."""

    def eject_model(self) -> None:
        pass

    def pre_run(self) -> None:
        super().pre_run()
        self.link.memory.begin_run()

    def cleanup(self) -> None:
        super().cleanup()
        self.link.memory.end_run(self.placement.free_after_sampling)

    # ---- torch.compile: of modules that run in the workers

    def add_wrapper_with_key(self, wrapper_type: str, key: str, wrapper: object) -> None:
        if key == _COMPILED:
            _say_that_nothing_is_compiled()
        else:
            super().add_wrapper_with_key(wrapper_type, key, wrapper)

    def add_object_patch(self, name: str, obj: object) -> None:
        if type(obj).__name__ == "OptimizedModule":
            _say_that_nothing_is_compiled()
            obj = getattr(obj, "_orig_mod", None)
            if obj is self.get_model_object(name):
                return
        super().add_object_patch(name, obj)

    # ---- hooks: combined here, where their strengths are known, applied there

    def patch_hooks(self, hooks: HookGroup) -> None:
        self.current_hooks = hooks

    def unpatch_hooks(self, whitelist_keys_set: object = None) -> None:
        self.current_hooks = None

    def clean_hooks(self) -> None:
        self.current_hooks = None
        self.link.hooks.drop()

    # ---- what cannot be done without the weights

    def get_key_patches(self, filter_prefix: object = None) -> NoReturn:
        raise UnsupportedError(
            "this MODEL holds no weights, they are with the Ray workers: it cannot be merged into another or saved; load the "
            "file with ComfyUI's own loader for that"
        )

    def model_state_dict_for_saving(self, *args: object, **kwargs: object) -> NoReturn:
        self.get_key_patches()

    def state_dict_for_saving(self, *args: object, **kwargs: object) -> NoReturn:
        self.get_key_patches()


@dataclass(frozen=True)
class LoadOptions:
    """In what a checkpoint's weights are held and computed. See `detection.detect`."""

    weight_dtype: str = "default"
    dequant_dtype: str = "default"
    patch_dtype: str = "default"


def load_twin(
    path: str, placement: Placement, options: LoadOptions = LoadOptions(), progress: Progress | None = None
) -> TwinPatcher:
    """Load a checkpoint on the workers, and make the MODEL that stands for it. Starts them if they do not run.

    Raises CheckpointError and UnsupportedError before any worker is asked; SelfTestError if this ComfyUI's model would
    give another picture on several ranks.
    """
    with torch.inference_mode():
        checkpoint = open_model_file(path)
        detected = detect(checkpoint, options.weight_dtype, options.dequant_dtype, options.patch_dtype)
        checkpoint.check_values()
        if short := memory_problem(checkpoint.num_bytes):
            logger.warning("%s", short)
        started = time.monotonic()
        cluster = Cluster.start(placement.request)
        base_model = detected.base_model
        refer = module_names(base_model.diffusion_model)
        with cluster.group.polling(raise_if_cancelled):
            remote = cluster.load(
                checkpoint, detected.spec, COMFY_HOST, detected.dtypes, progress, keeps_host_copy=True, refer=refer
            )
        link = WorkerLink(cluster, remote, placement, detected)
        try:
            link.move(placement)
            with cluster.group.polling(raise_if_cancelled):
                tell_plan(cluster, link.placement, base_model.diffusion_model, remote.source.weight_bytes)
        except BaseException:
            remote.release_unless_busy()
            raise
        logger.info(
            "%s, %s: %.2f GiB on %d workers in %.1f s", os.path.basename(path), checkpoint.version,
            remote.source.weight_bytes / 2**30, placement.request.workers, time.monotonic() - started,
        )  # fmt: skip
        diffusion_model = base_model.diffusion_model
        # The modules and the configuration of ComfyUI's class, on no memory; what needs weights goes over the link.
        diffusion_model.__class__ = _remote_class(type(diffusion_model))  # type: ignore[arg-type]
        object.__setattr__(diffusion_model, LINK, link)
        for name in (*TEXT_MODULES, *CAPTION_PROJECTIONS):
            module = getattr(diffusion_model, name, None)
            if isinstance(module, nn.Module):  # some versions have a function that does nothing there
                module.__class__ = _remote_module_class(type(module))  # type: ignore[arg-type]
                object.__setattr__(module, LINK, link)
                object.__setattr__(module, MODULE_NAME, name)
        _share_memory_estimate(base_model, link)
        mark_absent(diffusion_model)
        link.keep_snapshot()
        base_model.device = comfy.model_management.unet_offload_device()
        release_with(base_model, link)
        return patcher_of(base_model).placed(placement)


def _say_that_nothing_is_compiled() -> None:
    logger.warning(
        "torch.compile has no effect on a Ray MODEL: its blocks run in the workers, and are not compiled there. The picture is "
        "the same; remove the node, or use ComfyUI's own loader and one GPU with it"
    )


def patcher_of(base_model: BaseModel) -> TwinPatcher:
    """A MODEL without patches on a twin's model."""
    load_device = comfy.model_management.get_torch_device()
    patcher = TwinPatcher(base_model, load_device, comfy.model_management.unet_offload_device())
    # All MODELs on it undo each other's object patches, as clones of one do.
    patcher.object_patches_backup = base_model.__dict__.setdefault(OBJECT_BACKUP, {})
    return patcher


def _share_memory_estimate(base_model: BaseModel, link: WorkerLink) -> None:
    """ComfyUI decides by it whether positive and negative go in one batch: a rank holds its share of the tokens, and buffers.

    It asks before it samples, which is also how the link learns the shape of what is to come.
    """
    whole = base_model.memory_required

    def memory_required(input_shape: Sequence[int], *args: object, **kwargs: object) -> float:
        link.memory.latent_shape = list(input_shape)
        share = whole(input_shape, *args, **kwargs) * link.placement.config.largest_share
        return share + link.memory.bytes_of_sharing(link.memory.latent_shape)

    base_model.memory_required = memory_required
