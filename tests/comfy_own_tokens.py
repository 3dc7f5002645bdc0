"""What ranks run to see how many tokens they bring to a ComfyUI model's width. A module of its own, imported by name."""

import contextlib
from unittest import mock

import torch
from comfy_models import tiny_model

from rayltx.diffusion_models.lightricks.comfyui_host import sharded
from rayltx.diffusion_models.lightricks.relative_error import worst_error
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig

CPU = torch.device("cpu")


def tokens_projected(path, version):
    """By what was done to the model: (the tokens that `patchify_proj` is shown on one rank, on this one, the worst error of
    rank 0's answers).
    """
    model = tiny_model(path, version)
    from rayltx.comfy_dist import self_test

    group = SequenceParallelGroup.create(ParallelConfig(2))
    args, kwargs = self_test.forward_arguments(model, self_test.CASES[0], CPU)

    def seen(of_group):
        shown = []
        linear = torch.nn.functional.linear
        weight = model.patchify_proj.weight

        def spied(x, w, *rest):
            if w.shape == weight.shape and torch.equal(w, weight):
                shown.append(x.shape[1])
            return linear(x, w, *rest)

        with torch.inference_mode(), mock.patch.object(torch.nn.functional, "linear", spied), sharded(model, of_group):
            answer = self_test.answer(model, args, kwargs)
        return shown, answer

    def both():
        alone, expected = seen(SequenceParallelGroup.single())
        shown, answer = seen(group)
        return alone, shown, worst_error(answer, expected) if group.rank == 0 else 0.0

    def counting_process_input(own):
        """Of a pack that adds something of its own to each token."""

        def process_input(*args, **kwargs):
            tokens, *rest = own(*args, **kwargs)
            video = tokens[0] if isinstance(tokens, list) else tokens
            video = video + torch.linspace(0, 1, video.shape[1])[None, :, None]
            return [[video, *tokens[1:]] if isinstance(tokens, list) else video, *rest]

        return process_input

    @contextlib.contextmanager
    def class_changed():
        own = type(model)._process_input

        def process_input(self, *args, **kwargs):
            return counting_process_input(lambda *a, **k: own(self, *a, **k))(*args, **kwargs)

        with mock.patch.object(type(model), "_process_input", process_input):
            yield

    found = {"nothing": both()}
    with mock.patch.object(model, "_process_input", counting_process_input(model._process_input)):
        found["another _process_input"] = both()
    with class_changed():
        found["another _process_input of the class"] = both()
    layer = model.patchify_proj
    with mock.patch.object(layer, "forward", layer.forward):
        found["another forward of the layer"] = both()
    if hasattr(model, "apply_keyframes_abs_pos_embedding"):
        with mock.patch.object(model, "apply_keyframes_abs_pos_embedding", model.apply_keyframes_abs_pos_embedding):
            found["other marks of keyframes"] = both()
    return found
