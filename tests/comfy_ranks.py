"""What the ranks of the tests against ComfyUI run. In a module of its own: the ranks import it by name."""

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


def _state(model):
    return [
        (name, sorted(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]
