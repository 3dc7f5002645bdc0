"""What the ranks of the tests against ComfyUI run. In a module of its own: the ranks import it by name."""

import contextlib
import dataclasses
import math
from unittest import mock

import torch

from rayltx.distributed_worker.worker import import_dotted
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig


def seam_errors(path, version, degrees, sabotage=None):
    """The self-test's errors of a tiny model. sabotage: name of a function below, applied to the model's class."""
    from comfy_models import CONFIGS, model_class, set_up_comfyui

    set_up_comfyui(path)
    from rayltx.comfy_dist.self_test import errors_by_case, tiny_model

    group = SequenceParallelGroup.create(ParallelConfig(*degrees))
    model = tiny_model(model_class(version), CONFIGS[version], torch.device("cpu"))
    before = _state(model)
    if sabotage is not None:
        with globals()[sabotage](type(model)):
            return errors_by_case(model, group, torch.device("cpu"))
    errors = errors_by_case(model, group, torch.device("cpu"))
    assert _state(model) == before, "the seam left something on the model"
    return errors


@contextlib.contextmanager
def blocks_in_another_order(model_class):
    """A ComfyUI whose blocks see the tokens shifted against their positions."""
    base = model_class.__mro__[0]
    original = base._process_transformer_blocks

    def shifted(self, x, *args, **kwargs):
        streams = list(x) if isinstance(x, (list, tuple)) else [x]
        streams[0] = streams[0].roll(1, 1)
        out = original(self, streams if len(streams) > 1 else streams[0], *args, **kwargs)
        outs = list(out) if isinstance(out, (list, tuple)) else [out]
        outs[0] = outs[0].roll(-1, 1)
        return outs if len(outs) > 1 else outs[0]

    base._process_transformer_blocks = shifted
    try:
        yield
    finally:
        base._process_transformer_blocks = original


@contextlib.contextmanager
def positions_in_another_layout(model_class):
    """A ComfyUI whose positions have their tokens in another dimension."""
    base = model_class.__mro__[0]
    process, prepare = base._process_input, base._prepare_positional_embeddings

    def swap(coordinates):
        if isinstance(coordinates, (list, tuple)):
            return [coordinates[0].transpose(1, 2).contiguous(), *coordinates[1:]]
        return coordinates.transpose(1, 2).contiguous()

    def process_swapped(self, *args, **kwargs):
        tokens, coordinates, additional = process(self, *args, **kwargs)
        return tokens, swap(coordinates), additional

    base._process_input = process_swapped
    base._prepare_positional_embeddings = lambda self, coordinates, *args: prepare(self, swap(coordinates), *args)
    try:
        yield
    finally:
        base._process_input, base._prepare_positional_embeddings = process, prepare


@contextlib.contextmanager
def no_answer_without_audio(model_class):
    """A ComfyUI whose own model cannot run one kind of input, as 0.29 without audio."""
    original = model_class.forward

    def forward(self, x, *args, **kwargs):
        if len(x) == 1:
            raise AttributeError("'list' object has no attribute 'shape'")
        return original(self, x, *args, **kwargs)

    with mock.patch.object(model_class, "forward", forward):
        yield


@contextlib.contextmanager
def no_answer_at_all(model_class):
    def forward(self, *args, **kwargs):
        raise AttributeError("no forward today")

    with mock.patch.object(model_class, "forward", forward):
        yield


def audio_of_every_rank(path, version, degrees):
    """What each rank holds of the replicated audio at the end of a forward, as bytes."""
    from comfy_models import CONFIGS, model_class, set_up_comfyui

    set_up_comfyui(path)
    from rayltx.comfy_dist.self_test import CASES, call, tiny_model
    from rayltx.diffusion_models.lightricks.comfyui_host import sharded

    group = SequenceParallelGroup.create(ParallelConfig(*degrees))
    model = tiny_model(model_class(version), CONFIGS[version], torch.device("cpu"))
    with torch.inference_mode(), sharded(model, group):
        return call(model, CASES[0], torch.device("cpu"))[1].numpy().tobytes()


def layer_traffic(path, layers, latent_shape, audio_tokens, heads=4):
    """Bytes that this rank receives and collectives that it calls in one forward of an LTX-2 with these many layers.

    Heads are as wide as LTX-2's, and fewer. Attention's arithmetic is left out, not its shapes.
    """
    from comfy_models import CONFIGS, model_class, set_up_comfyui

    from rayltx.cli.bench.traffic import counted_traffic

    set_up_comfyui(path)
    import comfy.ldm.modules.attention as attention
    import comfy.ops

    from rayltx.diffusion_models.lightricks.comfyui_host import sharded

    config = {
        **CONFIGS["LTX-2"], "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": 128,
        "cross_attention_dim": 128 * heads, "audio_num_attention_heads": heads, "audio_attention_head_dim": 64,
        "audio_cross_attention_dim": 64 * heads,
    }  # fmt: skip
    model = model_class("LTX-2")(**config, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    model.requires_grad_(False)
    video = torch.zeros(1, 128, *latent_shape)
    audio = torch.zeros(1, 8, audio_tokens, 16)
    context = torch.zeros(1, 1024, 2 * config["caption_channels"])
    sigma = torch.ones(1)

    @attention.wrap_attn
    def hollow(q, k, v, heads, *args, **kwargs):
        return torch.zeros_like(q)

    group = SequenceParallelGroup.create(ParallelConfig(torch.distributed.get_world_size(), 1))
    with contextlib.ExitStack() as scope:
        for name in ("optimized_attention", "optimized_attention_masked"):
            scope.enter_context(mock.patch.object(attention, name, hollow))
        scope.enter_context(sharded(model, group))
        traffic = scope.enter_context(counted_traffic())
        model([video, audio], (sigma, sigma), context=context, attention_mask=None, frame_rate=25.0)
    return traffic.received_bytes, traffic.collectives


def tables_of_the_video(path, version, degrees, case_name):
    """(this rank's tokens, elements of its rotary tables, elements of its modulation tables), as the blocks get them."""
    from comfy_models import CONFIGS, model_class, set_up_comfyui

    set_up_comfyui(path)
    from rayltx.comfy_dist.self_test import CASES, call, tiny_model
    from rayltx.diffusion_models.lightricks.comfyui_host import sharded

    group = SequenceParallelGroup.create(ParallelConfig(*degrees))
    model = tiny_model(model_class(version), CONFIGS[version], torch.device("cpu"))
    blocks, seen = model._process_transformer_blocks, []

    def watch(x, context, attention_mask, timestep, pe, **kwargs):
        if isinstance(x, (list, tuple)):  # of an audio-video model: timestep is [video, audio, cross, ...]
            x_video, of_blocks, rotary = x[0], [timestep[0], timestep[2][1:3]], pe[0]
        else:
            x_video, of_blocks, rotary = x, timestep, pe
        seen.append((x_video.shape[1], _elements(rotary), _elements(of_blocks)))
        return blocks(x, context, attention_mask, timestep, pe, **kwargs)

    model._process_transformer_blocks = watch
    with torch.inference_mode(), sharded(model, group) if group.world_size > 1 else contextlib.nullcontext():
        call(model, next(case for case in CASES if case.name == case_name), torch.device("cpu"))
    return seen[0]


def _elements(obj):
    if isinstance(obj, torch.Tensor):
        return obj.numel()
    if isinstance(obj, (list, tuple)):
        return sum(map(_elements, obj))
    return obj.data.numel() if hasattr(obj, "expand_for_computation") else 0  # ComfyUI's CompressedTimestep


def _state(model):
    return [
        (name, sorted(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]


def enter_changed(environment, device):
    """A bootstrap of workers whose ComfyUI is not what the seam knows."""
    from rayltx.comfy_dist.comfy_environment import enter

    enter(environment, device)
    from comfy.ldm.lightricks.av_model import LTXAVModel

    _for_good.enter_context(blocks_in_another_order(LTXAVModel))


_for_good = contextlib.ExitStack()


def enter_short_of_memory(payload, device):
    """A bootstrap of workers whose model runs out of memory, in CUDA's words, while a file says that it does.

    payload: (environment, folder). `folder/rank 0` and so on hold how often that rank's next forwards fail; a rank for which
    there is a `folder/rank 0 waits` waits for an hour, as one does in an exchange on a GPU, and the file is gone.
    """
    import os
    import time
    from pathlib import Path

    from rayltx.comfy_dist.comfy_environment import enter

    environment, folder = payload
    enter(environment, device)
    from comfy.ldm.lightricks.model import LTXVModel

    whole = LTXVModel._forward

    def short_of_memory(self, *args, **kwargs):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        file = Path(folder) / f"rank {rank}"
        waits = file.with_name(f"{file.name} waits")
        if waits.exists():
            waits.unlink()
            time.sleep(3600)
        left = int(file.read_text()) if file.exists() else 0
        if left > 0:
            file.write_text(str(left - 1))
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate 896.00 MiB. GPU 0 has a total capacity of 23.64 GiB of which "
                f"{100 + rank}.31 MiB is free. Process {os.getpid()} has 1.12 GiB memory in use."
            )
        return whole(self, *args, **kwargs)

    LTXVModel._forward = short_of_memory


def disguised_cases(path, version, degrees):
    """The self-test's cases on a device in disguise, sharded, by name: the relative error against the whole model on the CPU;
    and `disguised_device.Counts` of the forward, as dictionaries, of the whole model there and of the sharded one."""
    import disguised_device as disguise
    from comfy_models import CONFIGS, model_class, set_up_comfyui

    set_up_comfyui(path)
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True
    from rayltx.comfy_dist import self_test
    from rayltx.diffusion_models.lightricks.comfyui_rows import shared
    from rayltx.diffusion_models.lightricks.relative_error import relative_error

    group = SequenceParallelGroup.create(ParallelConfig(*degrees))
    cpu = torch.device("cpu")
    # Not in inference mode, which goes past a tensor's own dispatch.
    with torch.inference_mode(False), torch.no_grad():
        model = self_test.tiny_model(model_class(version), CONFIGS[version], cpu)
        cases = self_test.cases_for(model, group)
        references = {case.name: self_test.call(model, case, cpu) for case in cases}
        disguise.disguise(model)

        def run(case, scope):
            with disguise.active() as counts:
                args, kwargs = self_test.forward_arguments(model, case, disguise.DEVICE)
                counts.clear()
                with scope:
                    out = model(*args, **kwargs)
                out = out if isinstance(out, (list, tuple)) else [out]
                assert all(tensor.device == disguise.DEVICE for tensor in out), "the answer has left the device"
                error = max(relative_error(tensor.inner, whole) for tensor, whole in zip(out, references[case.name]))
                return error, {name: dict(counter) for name, counter in vars(counts).items()}

        found = {}
        for case in cases:
            whole_error, of_whole = run(case, contextlib.nullcontext())
            assert whole_error < 1e-5, "the device itself"
            found[case.name] = (*run(case, shared(model, group)), of_whole)
        return found


def rows_in_blocks(path, version, degrees):
    """By case, (rows, video tokens) that this rank's blocks see, of batches of rows with one sigma."""
    from comfy_models import CONFIGS, model_class, set_up_comfyui

    set_up_comfyui(path)
    from rayltx.comfy_dist.self_test import Case, call, tiny_model
    from rayltx.diffusion_models.lightricks.comfyui_rows import shared

    group = SequenceParallelGroup.create(ParallelConfig(*degrees))
    model = tiny_model(model_class(version), CONFIGS[version], torch.device("cpu"))
    cases = [Case(f"{batch} rows", batch=batch, kinds=1) for batch in (1, 2, 3, 4)]
    found = {}
    with torch.inference_mode():
        others = [Case("unlike sigmas", batch=2), Case("unlike masks", batch=2, mask="mixed", kinds=1)]
        others += [Case("unlike sound", batch=2, given_audio=True, kinds=1)] if version != "LTX-Video" else []
        for case in [*cases, *others]:
            seen = []

            def watch(x, *args, seen=seen, blocks=model._process_transformer_blocks, **kwargs):
                seen.append(tuple((x[0] if isinstance(x, (list, tuple)) else x).shape[:2]))
                return blocks(x, *args, **kwargs)

            with mock.patch.object(model, "_process_transformer_blocks", watch), shared(model, group):
                call(model, case, torch.device("cpu"))
            found[case.name] = seen
    return found


def kernel_differences(path, version, degrees, dtype, wrong_kernel=False):
    """The kernel test's findings for a model with heads of real widths. wrong_kernel: the half-precision ring's is."""
    from comfy_models import CONFIGS, model_class, set_up_comfyui

    set_up_comfyui(path)
    import comfy.ops

    from rayltx.comfy_dist.self_test import errors_by_case, tiny_model
    from rayltx.comfy_dist.worker_process.kernel_test import differences_by_case
    from rayltx.diffusion_models.lightricks.random_weights import randomise
    from rayltx.sequence_parallel import local_attention

    cpu = torch.device("cpu")
    config = {**CONFIGS[version], "num_layers": 3, "attention_head_dim": 128 if version != "LTX-Video" else 64}
    config["cross_attention_dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    if version != "LTX-Video":
        config["audio_attention_head_dim"] = 64
        config["audio_cross_attention_dim"] = config["audio_num_attention_heads"] * 64
    model = model_class(version)(**config, dtype=dtype, device=cpu, operations=comfy.ops.disable_weight_init)
    randomise(model, 0)
    group = SequenceParallelGroup.create(ParallelConfig(*degrees))
    right = local_attention._cpu_attention

    def in_other_units(q, *args):
        out, lse = right(q, *args)
        return out, lse if q.dtype == torch.float32 else lse * 1.4427  # of a kernel that answers in powers of two

    with mock.patch.object(local_attention, "_cpu_attention", in_other_units if wrong_kernel else right):
        before = _state(model)
        errors = errors_by_case(tiny_model(type(model), CONFIGS[version], cpu), group, cpu)
        differences = differences_by_case(model.requires_grad_(False), group, dtype, cpu)
        assert _state(model) == before, "the test left something on the model"
    return errors, differences


def nvfp4_answers(path, degrees):
    """By case, (error on several ranks, noise) of an LTX-2 whose blocks are NVFP4 without input scales.

    Rounding to so few values is no continuous function: noise is the largest error of a few changes in the last bits.
    """
    model = _nvfp4_model(path)

    from rayltx.comfy_dist.self_test import cases_for, forward_arguments
    from rayltx.comfy_dist.worker_process.kernel_test import rounded_otherwise
    from rayltx.diffusion_models.lightricks.comfyui_host import sharded
    from rayltx.diffusion_models.lightricks.relative_error import relative_error

    group = SequenceParallelGroup.create(ParallelConfig(*degrees))
    errors, before = {}, _state(model)
    with torch.inference_mode():
        for case in cases_for(model):
            answers = []
            changes = [rounded_otherwise(model, seed) for seed in range(4)]
            for scope in (contextlib.nullcontext(), sharded(model, group), *changes):
                args, kwargs = forward_arguments(model, case, torch.device("cpu"))
                with scope:
                    answers.append(model(*args, **kwargs))
            error, *noise = (max(map(relative_error, answer, answers[0])) for answer in answers[1:])
            errors[case.name] = error, max(noise)
    assert _state(model) == before, "something is left on the model"
    return errors


def nvfp4_steps_with_rows_apart(path):
    """Of such a model, on two ranks with a row each: the answer to two texts, kept text or not, in a run where the second row had
    another text before."""
    model = _nvfp4_model(path)

    from rayltx.comfy_dist.self_test import Case, forward_arguments
    from rayltx.diffusion_models.lightricks.comfyui_rows import shared
    from rayltx.diffusion_models.lightricks.kept_text import KeptText

    group = SequenceParallelGroup.create(ParallelConfig(1, 1, 2))

    def step(kept_text, times):
        args, kwargs = forward_arguments(model, Case("two rows", batch=2, kinds=1), torch.device("cpu"))
        kwargs["context"][1] *= times
        with shared(model, group, kept_text=kept_text):
            return model(*args, **kwargs)

    with torch.inference_mode():
        kept = KeptText(lambda: math.inf)
        step(kept, 8.0)
        return step(kept, 1.0), step(None, 1.0)


def _nvfp4_model(path):
    """The product itself is for Blackwell cards: here what was quantised is multiplied in the dtype that it came from."""
    from comfy_models import CONFIGS, model_class, set_up_comfyui

    set_up_comfyui(path)
    import comfy.ops
    from comfy.quant_ops import QuantizedTensor

    from rayltx.diffusion_models.lightricks.random_weights import randomise

    operations = comfy.ops.mixed_precision_ops({}, torch.float32)
    operations.Linear._forward = lambda self, x, weight, bias: torch.nn.functional.linear(
        _plain(x), _plain(weight), bias
    )
    plain = model_class("LTX-2")(**CONFIGS["LTX-2"], dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    randomise(plain, 0)
    model = model_class("LTX-2")(**CONFIGS["LTX-2"], dtype=torch.float32, operations=operations)
    tensors = {}
    for name, tensor in plain.state_dict().items():
        layer = name.removesuffix(".weight")
        if "transformer_blocks" in name and tensor.ndim == 2 and "table" not in name:
            tensors.update(QuantizedTensor.from_float(tensor, "TensorCoreNVFP4Layout").state_dict(name))
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
        else:
            tensors[name] = tensor
    model.load_state_dict(tensors, assign=True)
    return model


def _plain(tensor):
    return tensor.dequantize() if hasattr(tensor, "dequantize") and hasattr(tensor, "_params") else tensor


def projected_answers(path, version, degrees):
    """By case: whether video self-attention that is sent part by part gives the bits of the plain path, and how often it ran.

    As (bits are equal with one group of heads, with two, calls of each).
    """
    from comfy_models import CONFIGS, model_class, set_up_comfyui

    set_up_comfyui(path)
    from rayltx.comfy_dist import self_test
    from rayltx.diffusion_models.lightricks import comfyui_host

    group = SequenceParallelGroup.create(ParallelConfig(*degrees))
    model = self_test.tiny_model(model_class(version), CONFIGS[version], torch.device("cpu"))
    calls = []

    def counting(*args):
        calls.append(1)
        return projecting(*args)

    projecting = comfyui_host.attend_while_projecting
    answers = {}
    with torch.inference_mode(), mock.patch.object(comfyui_host, "attend_while_projecting", counting):
        for case in self_test.cases_for(model):
            plain = _in_groups(self_test, model, case, group, 1, as_projected=False)
            assert not calls
            equal = []
            for groups in (1, 2):
                shared = _in_groups(self_test, model, case, group, groups)
                equal.append(all(map(torch.equal, shared, plain)))
            answers[case.name] = (*equal, len(calls))
            calls.clear()
    return answers


def _in_groups(self_test, model, case, group, groups, as_projected=True):
    from rayltx.diffusion_models.lightricks.comfyui_host import sharded

    shared = dataclasses.replace(group, head_groups=groups)
    with self_test.own_attention_of(model, case), sharded(model, shared, as_projected=as_projected):
        return self_test.call(model, case, torch.device("cpu"))


def projected_calls_of_patched(path):
    """By what was done to the model: how many of its two blocks' attentions were sent part by part."""
    from comfy_models import CONFIGS, model_class, set_up_comfyui

    set_up_comfyui(path)
    from rayltx.comfy_dist import self_test
    from rayltx.diffusion_models.lightricks import comfyui_host

    group = SequenceParallelGroup.create(ParallelConfig(2, 1))
    model = self_test.tiny_model(model_class("LTX-2"), CONFIGS["LTX-2"], torch.device("cpu"))
    args, kwargs = self_test.forward_arguments(model, self_test.CASES[0], torch.device("cpu"))
    attention = model.transformer_blocks[0].attn1
    own = type(attention).forward
    calls = []

    def counting(*args):
        calls.append(1)
        return projecting(*args)

    def forwards(options=None):
        calls.clear()
        given = {**kwargs, "transformer_options": {**kwargs.get("transformer_options", {}), **(options or {})}}
        with torch.inference_mode(), comfyui_host.sharded(model, group):
            self_test.answer(model, args, given)
        return len(calls)

    projecting = comfyui_host.attend_while_projecting
    counts = {}
    with mock.patch.object(comfyui_host, "attend_while_projecting", counting):
        counts["nothing"] = forwards()
        counts["an override"] = forwards({"optimized_attention_override": lambda kernel, *a, **k: kernel(*a, **k)})
        attention.forward = lambda *a, **k: own(attention, *a, **k)
        counts["a forward of one module"] = forwards()
        del attention.forward
        with mock.patch.object(type(attention), "forward", lambda self, *a, **k: own(self, *a, **k)):
            counts["a forward of the class"] = forwards()
        counts["nothing any more"] = forwards()
    return counts


def take_another_rotation(inner, device):
    """A bootstrap: what rotates query and key by themselves gives something else, and what rotates them together does not.

    Of the video's alone, whose width 3 divides: so whole models, which rotate them together, are as before.
    """
    import_dotted(inner.function)(inner.payload, device)
    import comfy.ldm.lightricks.model as module

    rotate = module.apply_rotary_emb
    module.apply_rotary_emb = lambda x, positions: rotate(x, positions) * (1.01 if x.shape[-1] % 3 == 0 else 1.0)


def slab_error(path, kind, blind):
    """How far a small video's slabs are from the video decoded whole, of its largest. blind: without the neighbours' borders."""
    from comfy_models import set_up_comfyui, video_vae_model

    set_up_comfyui(path)
    from rayltx.diffusion_models.lightricks import comfyui_decoder
    from rayltx.diffusion_models.lightricks.comfyui_decoder import Slabs, decode_slab

    group = SequenceParallelGroup.create(ParallelConfig(2, 1))
    model = video_vae_model(kind)
    latent = torch.randn(1, 128, 2, 3, 10, generator=torch.Generator().manual_seed(1))
    slabs = Slabs.of(model, latent.shape, group)
    torch.manual_seed(5)
    whole = model.decode(latent)
    torch.manual_seed(5)
    shown = mock.patch.object(comfyui_decoder, "with_borders", lambda local, dim, width, group: (local, 0))
    with shown if blind else contextlib.nullcontext():
        part = decode_slab(model, latent, slabs, group)
    size = part.shape[slabs.dim]
    apart = (part - whole.narrow(slabs.dim, size * group.rank, size)).abs().max() / whole.abs().max()
    torch.distributed.all_reduce(apart, torch.distributed.ReduceOp.MAX)
    return float(apart)


def decode_cost(path, kind, shape):
    """(operations on numbers, most bytes of tensors at once, bytes of the answer) of this rank's part of a decode."""
    from comfy_models import set_up_comfyui, video_vae_model
    from torch.utils.flop_counter import FlopCounterMode

    set_up_comfyui(path)
    from rayltx.cli.bench.live_tensors import LiveTensors
    from rayltx.diffusion_models.lightricks.comfyui_decoder import Slabs, decode_slab

    world = torch.distributed.get_world_size()
    group = SequenceParallelGroup.create(ParallelConfig(world, 1))
    model = video_vae_model(kind)
    latent = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as flops, LiveTensors() as live:
        if world == 1:
            out = model.decode(latent)
        else:
            out = decode_slab(model, latent, Slabs.of(model, shape, group), group)
    return flops.get_total_flops(), live.peak_bytes, out.nbytes
