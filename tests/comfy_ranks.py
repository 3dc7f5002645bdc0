"""What the ranks of the tests against ComfyUI run. In a module of its own: the ranks import it by name."""

import contextlib

import torch

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


def _state(model):
    return [
        (name, sorted(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]


def enter_changed(environment, device):
    """A bootstrap of workers whose ComfyUI is not what the seam knows."""
    from rayltx.comfy_dist.bootstrap import enter

    enter(environment, device)
    from comfy.ldm.lightricks.av_model import LTXAVModel

    _for_good.enter_context(blocks_in_another_order(LTXAVModel))


_for_good = contextlib.ExitStack()
