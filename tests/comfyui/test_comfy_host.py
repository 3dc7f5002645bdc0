"""What ComfyUI's process asks is what a worker's model answers."""

import inspect

import pytest
import torch

pytestmark = pytest.mark.comfyui


def test_the_model_answers_every_call_itself(comfy):
    """A method that it lacked would be the interface's own, which answers None."""
    from rayltx.comfy_dist.comfy_host import ComfyHost
    from rayltx.comfy_dist.worker_process.comfy_model import ComfyModel

    for name, asked in inspect.getmembers(ComfyHost, inspect.isfunction):
        if not name.startswith("_"):
            answered = getattr(ComfyModel, name)
            assert answered is not asked, name
            assert inspect.signature(answered).parameters.keys() == inspect.signature(asked).parameters.keys(), name


def test_a_set_among_the_arguments_is_the_same_text_in_every_process(comfy):
    from rayltx.comfy_dist.main_process.self_test_record import as_text

    assert as_text({"fast": {"b", "a"}, "dtype": torch.bfloat16}) == as_text(
        {"dtype": torch.bfloat16, "fast": {"a", "b"}}
    )
    assert "['a', 'b']" in as_text({"fast": {"b", "a"}})
