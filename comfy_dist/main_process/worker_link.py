"""The way from a model of this process to the workers' copies of it: its patches, and its calls."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import uuid
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import comfy.model_management
from torch import Tensor

from rayltx.comfy_dist.comfy_environment import user_folder
from rayltx.comfy_dist.comfy_host import ComfyHost, ModelOutput
from rayltx.comfy_dist.comfy_types import BaseModel, DiffusionModel, Model, Options
from rayltx.comfy_dist.containers import to_device
from rayltx.comfy_dist.main_process.attention_names import warn_if_ring_replaces
from rayltx.comfy_dist.main_process.code_changes import changed_attention
from rayltx.comfy_dist.main_process.detection import Detected
from rayltx.comfy_dist.main_process.device_memory import DeviceMemory
from rayltx.comfy_dist.main_process.forwarding import (
    CHANGING,
    MODEL_PREFIX,
    check_sendable,
    is_same_state,
    is_sent_whole,
    patch_state_of,
    register_unimportable_modules,
    remote_options,
)
from rayltx.comfy_dist.main_process.in_place_changes import InPlaceChanges
from rayltx.comfy_dist.main_process.input_checks import check_inputs, check_text_to_connect, estimated_shape
from rayltx.comfy_dist.main_process.lora_shapes import misfits
from rayltx.comfy_dist.main_process.memory_estimate import Replicated
from rayltx.comfy_dist.main_process.memory_saving import MemorySaving
from rayltx.comfy_dist.main_process.module_snapshot import QuickState
from rayltx.comfy_dist.main_process.option_state import OptionState
from rayltx.comfy_dist.main_process.patch_proof import Patched, PatchProofs, digest_of, names_of_patches
from rayltx.comfy_dist.main_process.placement import Placement
from rayltx.comfy_dist.main_process.rank_choice import RankChoice, StepKind
from rayltx.comfy_dist.main_process.self_test_record import dtype_name, prove_seam, prove_seam_on_first
from rayltx.comfy_dist.main_process.sent_hooks import SentHooks
from rayltx.comfy_dist.self_test import Case, case_like
from rayltx.comfy_dist.wire import (
    OBJECTS,
    ConstantOptions,
    Difference,
    ModuleInputs,
    PatchState,
    PatchTestInputs,
    SentPatches,
    StepInputs,
    TextInputs,
    Way,
)
from rayltx.diffusion_models.lightricks.comfyui_host import OVERRIDE
from rayltx.diffusion_models.lightricks.comfyui_rows import rows_are_alike
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.messages import Message, pack
from rayltx.distributed_worker.remote_model import RemoteModel
from rayltx.distributed_worker.worker_calls import ask, ask_together
from rayltx.errors import RANK_LOST, InputError, SelfTestError, UnsupportedError, listed
from rayltx.sequence_parallel.partition import ParallelConfig

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

# Keys of what workers that take others' places are sent again.
_PATCHES, _OPTIONS = "patches", "options"


def raise_if_cancelled() -> None:
    """What ComfyUI raises where its user has pressed cancel, for whatever waits for workers."""
    comfy.model_management.throw_exception_if_processing_interrupted()


class WorkerLink:
    """The way from one model of this process to the workers' copies of it."""

    def __init__(self, cluster: Cluster, remote: RemoteModel, placement: Placement, detected: Detected) -> None:
        self.placement = placement  # of the MODEL that was last loaded
        self.state_dict = detected.state_dict  # the weights' names and shapes
        self.cluster, self.remote, self.spec = cluster, remote, detected.spec
        self._base_model = weakref.ref(detected.base_model)
        self._proved: tuple[Cluster, ParallelConfig] | None = None
        self._proved_on_first: dict[int, str] = {}  # by how many of its first ranks: why it is not, or ""
        self._own_patches = PatchState()  # of the MODEL that was last loaded
        self._sent_patches: PatchState | None = None
        self._patches_digest = b""
        self._proofs = PatchProofs()
        self._in_place: InPlaceChanges | None = None
        self._at_start: QuickState | None = None  # of a run
        self._sent_options: tuple[str, Message, bytes] | None = None  # their key, themselves, and their digest
        self._options_state: OptionState | None = None
        self.hooks = SentHooks(remote)
        self.memory = DeviceMemory(self)
        self._rank_choice = RankChoice(user_folder() / "rank_choice.json")

    @property
    def base_model(self) -> BaseModel:
        found = self._base_model()
        assert found is not None, "the model is used after it was collected"
        return found

    def keep_snapshot(self) -> None:
        """The model of this process is whole now: what is changed in place from here on is seen."""
        self._in_place = InPlaceChanges(self.base_model.diffusion_model)

    # ---- patches

    def sync(self, patcher: Model) -> None:
        """Give the workers the patches of this MODEL, if they do not have them. Raises UnsupportedError by name."""
        self._own_patches = patch_state_of(patcher)
        state = self._with_changes_in_place()
        self._at_start = QuickState(self.base_model.diffusion_model)
        self.move(patcher.placement)
        with self.cluster.group.polling(raise_if_cancelled):
            self._send_patches(state)
            self.memory.put_on_devices()

    def _with_changes_in_place(self) -> PatchState:
        """The patches of the MODEL that was last loaded, and what was changed in place. Raises UnsupportedError by name."""
        state = self._own_patches
        if self._in_place is None:
            return state
        in_place = self._in_place.object_patches(self.base_model.diffusion_model)
        return dataclasses.replace(state, object_patches={**in_place, **state.object_patches})

    def _send_patches(self, state: PatchState) -> None:
        register_unimportable_modules()
        if self._sent_patches is None or not is_same_state(state, self._sent_patches):
            self._sent_patches = None
            self._check_patches(state)
            # As views: one copy of a LoRA for all workers.
            objects = pack({name: getattr(state, name) for name in OBJECTS}, refer=self.remote.source.refer)
            sent = SentPatches(dataclasses.replace(state, object_patches={}, injections={}), objects)
            self._patches_digest = digest_of(objects)
            self.remote.set_up(_PATCHES, ask(ComfyHost.set_patches, sent), "forwarding patches", as_views=True)
            self.hooks.forget()
            self._sent_patches = state

    def _check_patches(self, state: PatchState) -> None:
        wrong = misfits(state.patches, self.state_dict, MODEL_PREFIX)
        if wrong:
            raise InputError(
                f"a LoRA is for another model than this {self.spec.model_version} one: {listed(wrong, 3, '; ')}; "
                "remove it, or use one for this model"
            )
        refer = self.remote.source.refer
        check_sendable(state.object_patches, "the object patch", refer)
        check_sendable(state.injections, "the injection", refer)
        check_sendable(state.weight_wrapper_patches, "the weight wrapper of", refer)

    def move(self, placement: Placement) -> None:
        """Have the weights where a MODEL wants them, and the seam proved on the ranks that it wants.

        Workers that were ended or exchanged in the meantime get the model again: ComfyUI keeps MODELs for longer.
        """
        cluster = Cluster.start(placement.request)
        if cluster is not self.cluster or self.remote.is_lost:
            logger.warning("the Ray workers do not have this MODEL any more: loading it again")
            self.remote.release_unless_busy()
            self.cluster, self.remote = cluster, cluster.load_source(self.remote.source)
            self._sent_patches = self._sent_options = None
            self.hooks, self._proofs = SentHooks(self.remote), PatchProofs()
        with cluster.group.polling(raise_if_cancelled):
            placement = dataclasses.replace(placement, config=cluster.group.with_shares(placement.config))
            self.placement = placement
            if self._proved != (cluster, placement.config):
                warn_if_ring_replaces(placement.comfyui_arguments, placement.config.ring_degree)
                prove_seam(self.remote, placement, cluster.workers(), self.spec, self.base_model)
                self._proved, self._proved_on_first = (cluster, placement.config), {}
            # Before weights take the devices' memory: communicators need some.
            cluster.group.repeated(lambda: cluster.group.form(placement.config), "forming the group")

    # ---- calls

    def forward(self, model: DiffusionModel, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """The model's `_forward`, by the workers. Returns what it returns, on the device of the input."""
        bound = inspect.signature(type(model)._forward).bind(model, *args, **kwargs)
        arguments = dict(bound.arguments)
        arguments.pop("self")
        arguments.update(arguments.pop("kwargs", {}))
        options: Options = dict(arguments.pop("transformer_options", None) or {})
        if "x" not in arguments:
            raise UnsupportedError(
                f"another pack has put a function in the place of {type(model).__name__}._forward that does not have its "
                "parameters: its calls cannot be sent to the workers. Start ComfyUI without it"
            )
        x = arguments["x"]
        if self._at_start is not None and not self._at_start.is_same(model):
            raise UnsupportedError(
                "a node changes this MODEL's modules around each step, which the workers do not see; remove it, or use ComfyUI's "
                "own loader for this graph"
            )
        check_inputs(model, self.spec.model_version, x, arguments.get("context"))
        self.memory.latent_shape = estimated_shape(x)
        self.memory.replicated = Replicated.of(x, arguments.get("context"))
        patcher = self.base_model.current_patcher
        kept = remote_options(options)
        if self._in_place is not None and (override := self._in_place.attention_override()) is not None:
            if kept.get(OVERRIDE) is not None:
                raise UnsupportedError(
                    "another pack has put an attention of its own in the place of ComfyUI's, and this MODEL has an override of "
                    "attention besides: which of them counts is the pack's own matter. Remove one of the two"
                )
            kept[OVERRIDE] = override
        inputs = StepInputs(
            arguments=arguments,
            changing_options={name: value for name, value in options.items() if name in CHANGING},
            options_key=self._options_key(kept),
            hooks_key=None,
            load=self.memory.load_inputs(),
        )
        if patcher is not None:
            inputs = self._with_proved_patches(inputs, kept)
            inputs = dataclasses.replace(inputs, hooks_key=self.hooks.key_of(patcher))

        def step(saving: MemorySaving | None) -> ModelOutput:
            def compute(ranks: int) -> ModelOutput:
                config = self.placement.config
                sent = inputs if saving is None else saving.step(inputs)
                if ranks < config.world_size:
                    self._prove_on_first(ranks)
                    sent = dataclasses.replace(sent, by_fewer=True, way=Way())
                call = ask_together(ComfyHost.forward, sent)
                out = self.remote.call_together(call, config, poll=raise_if_cancelled, ranks=ranks)
                assert out is not None, "rank 0 answers"
                return out

            if saving is not None:
                return compute(self.placement.config.world_size)
            return self._by_best_ranks(model, x, kept, compute)

        out = self.memory.within(step)
        device = (x[0] if isinstance(x, (list, tuple)) else x).device
        return [stream.to(device) for stream in out] if isinstance(out, (list, tuple)) else out.to(device)

    def _by_best_ranks(
        self, model: DiffusionModel, x: Any, options: Options, compute: Callable[[int], ModelOutput]
    ) -> ModelOutput:
        """A step by all ranks, or by so many of the first. x: as the model's forward takes it."""
        link, config = self.cluster.group.link_report, self.placement.config
        if link is None or config.world_size == 1 or self.placement.request.on_cpu:
            return compute(config.world_size)  # workers on the CPU share its cores
        name = f"{self.spec.model_version} of {', '.join(self.spec.weight_kinds)} in {dtype_name(self.spec)}"
        workers = self.cluster.workers()[: config.world_size]
        kind = StepKind.of(name, model, x, config, workers, link, self.placement.weight_budget)
        element_bytes = self.spec.compute_dtype.itemsize
        if not self.placement.chooses_ranks:
            return self._rank_choice.step_of_all(kind, link.exchange, element_bytes, compute)
        # Code of a patch may count its calls, and has to be where it is on all ranks.
        has_code = self._sent_patches is None or bool(names_of_patches(self._sent_patches, options))
        fewer = [] if has_code else [n for n in config.halves if self.memory.has_room_on_first(n)]
        group = self.cluster.group
        return self._rank_choice.step(
            kind, link.exchange, element_bytes, compute, fewer, was_disturbed=lambda: group.link_report is not link
        )

    def _prove_on_first(self, ranks: int) -> None:
        """Raises SelfTestError where the seam is not proven on so many of the first ranks. One shares nothing."""
        if ranks > 1 and ranks not in self._proved_on_first:
            wrong = ""
            with self.cluster.group.polling(raise_if_cancelled):
                workers = self.cluster.workers()
                try:
                    prove_seam_on_first(self.remote, self.placement, ranks, workers, self.spec, self.base_model)
                except SelfTestError as error:
                    wrong = str(error)  # not the error, whose frames hold the model
            self._proved_on_first[ranks] = wrong
        if wrong := self._proved_on_first.get(ranks, ""):
            raise SelfTestError(wrong)

    def _with_proved_patches(self, inputs: StepInputs, options: Options) -> StepInputs:
        """The same with how it is shared. Raises UnsupportedError for patches that cannot be shared."""
        config, state = self.placement.config, self._sent_patches
        if config.world_size == 1 or state is None or self._sent_options is None:
            return inputs
        names = names_of_patches(state, options)
        if not names:
            return inputs
        x: Any = inputs.arguments["x"]
        case, video_tokens = case_like(x, inputs.arguments), (x[0] if isinstance(x, (list, tuple)) else x)[0, 0].numel()
        digests = self._patches_digest, self._sent_options[2]
        patched = Patched(names, state, digests, case, config, video_tokens)
        if config.row_groups > 1 and case.batch > 1:
            kinds = tuple(inputs.changing_options.get("cond_or_uncond") or ())
            # NVFP4's scales are agreed among all ranks, at each layer: a patch can call one for some rows alone.
            has_nvfp4 = any("nvfp4" in kind for kind in self.spec.weight_kinds)
            go_apart = not has_nvfp4 and rows_are_alike(inputs.arguments)
            patched = dataclasses.replace(patched, kinds=kinds, rows_go_apart=go_apart)
        way = self._proofs.known(patched)
        if way is None:

            def attempt(case: Case | None, way: Way) -> Difference | str:
                arguments = inputs.arguments if case is None else {}
                plain = dataclasses.replace(inputs, arguments=arguments, way=way)

                def run(saving: MemorySaving | None) -> Difference | str:
                    step = plain if saving is None else saving.step(plain)
                    call = ask_together(ComfyHost.patch_test, PatchTestInputs(step, case))
                    return self.remote.call_together(
                        call, config, "trying the patches", poll=raise_if_cancelled, again=RANK_LOST
                    )

                return self.memory.within(run)

            way = self._proofs.prove(patched, attempt)
        return dataclasses.replace(inputs, way=way)

    def preprocess_text_embeds(self, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> Tensor:
        """The text connector, which is part of the weights. One worker is enough for it."""
        context = args[0]
        check_text_to_connect(self.base_model.diffusion_model, self.spec.model_version, context)

        self._notice_changes()

        def connect(saving: MemorySaving | None) -> Tensor:
            load = self.memory.load_inputs(saving)
            call = ask(ComfyHost.preprocess_text, TextInputs(args, kwargs, load, changed_attention()))
            return self.remote.call(call, "the text connector", ranks=[0])[0]

        return self.memory.text_on_one(connect).to(context.device)

    def run_module(self, name: str, *args: object, **kwargs: object) -> object:
        """A module that prepares text, where a node calls it by itself. One worker is enough for it."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self._notice_changes()

        def run(saving: MemorySaving | None) -> object:
            load = self.memory.load_inputs(saving)
            call = ask(ComfyHost.run_module, ModuleInputs(args, kwargs, load, changed_attention(), name))
            return self.remote.call(call, name, ranks=[0])[0]

        out = self.memory.text_on_one(run)
        return to_device(out, tensors[0].device) if tensors else out

    def _notice_changes(self) -> None:
        """Let the workers have what was changed in place, for calls before a run."""
        register_unimportable_modules()  # for an attention of another pack's, too
        state = self._with_changes_in_place()
        if state.object_patches or self._sent_patches is not None:
            self._send_patches(state)

    def _options_key(self, options: Options) -> str:
        """The workers' name for the transformer options that stay the same, which they are sent when they change."""
        refer = self.remote.source.refer
        state = self._state_of(options)
        if state is not None and self._sent_options is not None and state.is_same(self._options_state):
            return self._sent_options[0]
        try:
            message = pack(options, refer=refer)
        except Exception as error:  # pickling raises anything
            check_sendable(options, "the transformer option", refer)
            raise UnsupportedError(f"the transformer options cannot be sent to the workers: {error}") from error
        if self._sent_options is None or not message.is_same(self._sent_options[1]):
            key = uuid.uuid4().hex
            call = ask(ComfyHost.keep_options, ConstantOptions(key, message))
            self.remote.set_up(_OPTIONS, call, "forwarding patches")
            self._sent_options = (key, message, digest_of(message))
        self._options_state = state
        return self._sent_options[0]

    def _state_of(self, options: Options) -> OptionState | None:
        """What the options are made of, where that can be seen without pickling them."""
        try:
            return OptionState(options, is_sent_whole, self.remote.source.refer or (lambda obj: None))
        except Exception:  # Unknown, or what looking into something strange raises
            return None

    def release(self) -> None:
        """Let the workers forget the model. Nothing is waited for."""
        self.remote.release_unless_busy()
