"""What ComfyUI's process asks is what a worker's model answers."""

import inspect
import weakref
from types import SimpleNamespace

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


@pytest.mark.parametrize("end", ["end_run", "unload"])
def test_what_steps_are_sent_unchanged_is_moved_once_and_given_back_after_the_run(comfy, end):
    from rayltx.comfy_dist.worker_process.comfy_model import ComfyModel

    model = ComfyModel(None, "meta")
    model._patcher = SimpleNamespace(load_device=torch.device("meta"))
    text = torch.zeros(300)

    def step():
        """What the model is called with: the text among the arguments, and among the options."""
        options = model._with_changing({"mask": text}, SimpleNamespace(changing_options={"sigmas": torch.zeros(1)}))
        return model._on_device({"context": [text]})["context"][0], options["mask"]

    step()
    steps = [step() for _ in range(3)]
    assert steps[0][0].is_meta
    assert all(tensor is steps[0][0] for found in steps for tensor in found)
    kept = weakref.ref(steps[0][0])
    del steps
    getattr(model, end)()
    assert kept() is None
