"""The host that the workers run for ComfyUI: its own model, sharded, on shared weights."""

from __future__ import annotations

import contextlib
import functools
import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import comfy.ldm.modules.attention as attention_module
import comfy.model_management as management
import torch
from torch import Tensor

from rayltx.comfy_dist.comfy_host import ComfyHost, ModelOutput
from rayltx.comfy_dist.comfy_types import DiffusionModel, Model, Options
from rayltx.comfy_dist.containers import to_device
from rayltx.comfy_dist.model_spec import OWN_ATTENTION, ComfySpec
from rayltx.comfy_dist.self_test import errors_by_case, tiny_model
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
from rayltx.comfy_dist.worker_process.kernel_test import call_in_dtype, difference, differences_by_case
from rayltx.comfy_dist.worker_process.model_on_shared_weights import build_on
from rayltx.comfy_dist.worker_process.shared_patcher import RemoteHooks
from rayltx.device_copies import DeviceCopies
from rayltx.diffusion_models.lightricks.comfyui_rows import shared
from rayltx.diffusion_models.lightricks.feed_forward import CHUNKS_OPTION, SAVING, UNASKED
from rayltx.diffusion_models.lightricks.kept_tables import KeptTables
from rayltx.diffusion_models.lightricks.kept_text import KeptText
from rayltx.diffusion_models.lightricks.replaced import replaced
from rayltx.distributed_worker.freed_memory import give_back_freed_memory
from rayltx.distributed_worker.messages import Message, unpack
from rayltx.sequence_parallel.group import SequenceParallelGroup


@contextlib.contextmanager
def _attending_by(function: Callable[..., Any] | None) -> Iterator[None]:
    """Put a function in the place of ComfyUI's choice of attention, within the `with`, as another pack has in its process."""
    with contextlib.ExitStack() as scope:
        for name in ("optimized_attention", "optimized_attention_masked") if function is not None else ():
            scope.enter_context(replaced(attention_module, name, function))
        yield


class ComfyModel(ComfyHost):
    """ComfyUI's LTX model on one rank. What it can be asked is described in `ComfyHost`."""

    def __init__(self, spec: ComfySpec, device: str) -> None:
        self._spec = spec
        self._given: dict[str, Tensor] = {}
        self._base: Model = None  # the patcher without patches; clones of it carry them
        self._patcher: Model = None
        self._loaded_for: tuple[int, int] | None = None  # the run and the budget
        self._as_projected = True
        self._hooks: dict[str, RemoteHooks] = {}
        self._options: dict[str, tuple[Message, Options]] = {}  # as they were sent, and unpacked
        self._packed_objects: Message | None = None  # of the patches that are on
        self._kept_text = KeptText(self._left_bytes)
        self._kept_tables = KeptTables()
        self._needed_bytes = 0.0  # of the device's memory, by a step, next to the weights
        self._copies: DeviceCopies | None = None  # of what steps are sent, while a run goes on

    # ---- loading

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        self._given.update(tensors)

    def finish_loading(self) -> None:
        with torch.inference_mode():
            self._base = self._patcher = build_on(dict(self._given), self._spec)
        self._base.before_unloading = weakref.WeakMethod(self._let_go_of_inputs)

    def parameters(self) -> Mapping[str, Tensor]:
        """The shared bytes themselves, whatever has been patched since."""
        return self._given

    @property
    def diffusion_model(self) -> DiffusionModel:
        return self._base.model.diffusion_model

    def module(self, name: str) -> torch.nn.Module:
        """What a name of the ComfyUI process's model means here."""
        return self.diffusion_model.get_submodule(name)

    # ---- calls

    def forward(self, group: SequenceParallelGroup, inputs: StepInputs) -> ModelOutput | None:
        with torch.inference_mode():
            self._put_on_device(inputs.load)
            hooks = None if inputs.hooks_key is None else self._hooks[inputs.hooks_key]
            if hooks != self._patcher.current_hooks:
                self._kept_text.forget()
                self._patcher.patch_hooks(hooks)
            options = self._with_changing(self._options[inputs.options_key][1], inputs)
            keeps = self._has_no_code and not inputs.by_fewer
            kept = (self._kept_text, self._kept_tables) if keeps else (None, None)
            if not keeps:
                self._kept_tables.forget()  # next to those that the step makes
            if inputs.by_fewer:
                self._kept_text.forget()  # a step takes more on each of them
            with self._shared(group, inputs, options, *kept):
                out = self._call(inputs, options)
            return to_device(out, torch.device("cpu")) if group.rank == 0 else None

    @property
    def _has_no_code(self) -> bool:
        """Whether nothing of a patch runs inside of the model, which could write to what goes through it."""
        patcher = self._patcher
        return not any((patcher.object_patches, patcher.injections, patcher.weight_wrapper_patches))

    def _with_changing(self, kept: Options, inputs: StepInputs) -> Options:
        """The transformer options of a step, on the device."""
        return self._on_device({**kept, **inputs.changing_options})

    def _on_device(self, obj: Any) -> Any:
        """The same containers with their tensors on the device. What did not change since the last step is there."""
        if self._copies is None:
            self._copies = DeviceCopies(self._patcher.load_device)
        return self._copies.in_containers(obj)

    def _call(self, inputs: StepInputs, options: Options) -> ModelOutput:
        arguments = self._on_device(inputs.arguments)
        return self.diffusion_model._forward(**arguments, transformer_options=options)

    def _shared(
        self,
        group: SequenceParallelGroup,
        inputs: StepInputs,
        options: Options,
        kept_text: KeptText | None = None,
        kept_tables: KeptTables | None = None,
    ) -> AbstractContextManager[None]:
        chunks, way = options.get(CHUNKS_OPTION, SAVING if inputs.saves_memory else UNASKED), inputs.way
        is_alone = inputs.by_fewer and group.world is None  # for which it was not proven
        as_projected = self._as_projected and not is_alone
        return shared(
            self.diffusion_model, group, chunks, way.gathered, as_projected, way.rows_apart, kept_text, kept_tables
        )

    def patch_test(self, group: SequenceParallelGroup, inputs: PatchTestInputs) -> Difference | str:
        step, case = inputs.step, inputs.case
        model, device, dtype = self.diffusion_model, self._patcher.load_device, self._spec.compute_dtype
        packed, kept = self._options[step.options_key]
        scope = functools.partial(self._shared, group, step, {**kept, **step.changing_options})

        def call() -> list[Tensor]:
            options = self._with_changing(unpack(packed, self.module), step)
            if case is not None:
                return call_in_dtype(model, case, dtype, device, options)
            out = self._call(step, options)
            return [stream.clone() for stream in (out if isinstance(out, (list, tuple)) else [out])]

        with torch.inference_mode():
            self._put_on_device(step.load)
            try:
                return difference(call, model, scope, self._renew_objects, group)
            finally:
                self._renew_objects()

    def keep_options(self, options: ConstantOptions) -> None:
        # In place of those before: one MODEL samples at a time.
        self._options = {options.key: (options.options, unpack(options.options, self.module))}

    def keep_hooks(self, hooks: HookPatches) -> None:
        self._hooks[hooks.key] = RemoteHooks(hooks)

    def forget_hooks(self, key: str) -> None:
        self._hooks.pop(key, None)

    def drop_hooks(self) -> None:
        self._kept_text.forget()
        with torch.inference_mode():
            self._patcher.clean_hooks()
            self._hooks.clear()
            give_back_freed_memory()

    def set_patches(self, sent: SentPatches) -> None:
        self._kept_text.forget()
        with torch.inference_mode():
            self._patcher.clean_hooks()
            self._hooks.clear()
            patcher = self._base.clone()
            patcher.before_unloading = self._base.before_unloading
            for name, value in {**vars(sent.state), **self._unpacked(sent.objects)}.items():
                setattr(patcher, name, value)
            self._patcher, self._packed_objects = patcher, sent.objects
            self._loaded_for = None

    def _renew_objects(self) -> None:
        """Put the patches that are code in their own place, as they were sent."""
        self._kept_text.forget()
        if self._packed_objects is None:
            return
        self._patcher.unpatch_model(unpatch_weights=False)
        for name, value in self._unpacked(self._packed_objects).items():
            setattr(self._patcher, name, value)
        self._patcher.patch_model(load_weights=False)

    def _unpacked(self, objects: Message) -> dict[str, Any]:
        """Patches that are code. Which kernel a layer's wish for attention gets is settled by this process's device."""
        found: dict[str, Any] = unpack(objects, self.module)
        for name, patch in found["object_patches"].items():
            if name.endswith(OWN_ATTENTION) and patch.config is not None:
                wish = torch.tensor(list(json.dumps(patch.config).encode()), dtype=torch.uint8)
                found["object_patches"][name] = patch.with_config(wish)
        return found

    def preprocess_text(self, inputs: TextInputs) -> Tensor:
        return self._prepare_text(self.diffusion_model.preprocess_text_embeds, inputs)

    def run_module(self, inputs: ModuleInputs) -> object:
        return self._prepare_text(self.module(inputs.name), inputs)

    def _prepare_text(self, function: Callable[..., Any], inputs: TextInputs) -> Any:
        with torch.inference_mode():
            self._put_on_device(inputs.load)
            args, kwargs = to_device((inputs.args, inputs.kwargs), self._patcher.load_device)
            with _attending_by(inputs.attention):
                return to_device(function(*args, **kwargs), torch.device("cpu"))

    def self_test(self, group: SequenceParallelGroup) -> dict[str, float | str]:
        device = self._base.load_device
        with torch.inference_mode():
            model = tiny_model(type(self.diffusion_model), self._base.model.model_config.unet_config, device)
        return errors_by_case(model, group, device, self._as_projected)

    def send_as_projected(self, on: bool) -> None:
        self._as_projected = on

    def kernel_test(self, group: SequenceParallelGroup) -> dict[str, Difference]:
        self.unload()  # room for the copies, and blocks that are as they were loaded
        try:
            return differences_by_case(
                self.diffusion_model, group, self._spec.compute_dtype, self._base.load_device, self._as_projected
            )
        finally:
            give_back_freed_memory()

    # ---- memory

    def _put_on_device(self, load: LoadInputs) -> None:
        """Put the weights on the device, as ComfyUI does before it samples; once a run, and when patches changed."""
        if (load.run, load.weight_budget) == self._loaded_for and self._is_loaded():
            return
        self._kept_text.forget()
        self._kept_tables.forget()
        if load.weight_budget != self._patcher.weight_budget and self._patcher.loaded_size() > 0:
            self.unload()  # ComfyUI would leave a model that is loaded as it is
        self._patcher.weight_budget = load.weight_budget
        # The estimate is for the whole sequence; a rank holds its share, and what sharing takes.
        memory = self._patcher.model.memory_required(load.latent_shape) * load.share + load.sharing_bytes
        management.load_models_gpu([self._patcher], memory_required=memory, minimum_memory_required=memory)
        self._needed_bytes = memory
        if self._loaded_for is None:
            give_back_freed_memory()  # of earlier patches
        self._loaded_for = load.run, load.weight_budget

    def _is_loaded(self) -> bool:
        """Whether ComfyUI has not unloaded it since, for another model of this worker's."""
        return any(loaded.model is self._patcher for loaded in management.current_loaded_models)

    def load(self, load: LoadInputs) -> int:
        with torch.inference_mode():
            self._put_on_device(load)
        return self.placed_bytes()

    def _left_bytes(self) -> float:
        """What a step leaves of the device's memory; nothing where weights have no room, which cost more than a text's keys."""
        return 0.0 if self._patcher.model.model_lowvram else self.free_bytes() - self._needed_bytes

    def _let_go_of_inputs(self) -> None:
        """What is kept of a run's inputs, and of what was made of them."""
        self._kept_text.forget()
        self._kept_tables.forget()
        if self._copies is not None:
            self._copies.clear()
        self._copies = None

    def end_run(self) -> None:
        self._let_go_of_inputs()
        if self._patcher.load_device.type == "cpu":
            give_back_freed_memory()  # the allocator holds on to what the largest layers took
        else:
            management.soft_empty_cache()  # for what shares the card: the text encoder, the VAE

    def unload(self) -> None:
        self._let_go_of_inputs()
        with torch.inference_mode():
            for loaded in list(management.current_loaded_models):
                if self._base is not None and loaded.model is not None and loaded.model.is_clone(self._base):
                    loaded.model_unload()
                    management.current_loaded_models.remove(loaded)
            management.reset_cast_buffers()  # what weights were streamed through
            management.soft_empty_cache()
            self._loaded_for = None

    def unload_bytes(self, num_bytes: int) -> int:
        self._let_go_of_inputs()
        with torch.inference_mode():
            self._patcher.partially_unload(self._patcher.offload_device, num_bytes)
            management.soft_empty_cache()
        return self.placed_bytes()

    def placed_bytes(self) -> int:
        return int(self._patcher.loaded_size()) + self._patcher.streaming_bytes()

    def free_bytes(self) -> int:
        return int(management.get_free_memory(self._patcher.load_device))

    def close(self) -> None:
        """Before the model is forgotten: ComfyUI keeps loaded models in a list of its own."""
        self.unload()
