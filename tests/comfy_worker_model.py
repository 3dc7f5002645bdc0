"""A worker's model in the process of the test."""

import torch
from comfy_models import save_tiny_checkpoint


def loaded(folder, version="LTX-Video"):
    """(a `ComfyModel` of a tiny checkpoint, the inputs of a step)"""
    from rayltx.comfy_dist.main_process.detection import detect
    from rayltx.comfy_dist.self_test import CASES, forward_arguments
    from rayltx.comfy_dist.wire import ConstantOptions, LoadInputs, StepInputs
    from rayltx.comfy_dist.worker_process.comfy_model import ComfyModel
    from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
    from rayltx.distributed_worker.messages import pack
    from rayltx.distributed_worker.weights import map_file

    save_tiny_checkpoint(folder / "model.safetensors", version)
    checkpoint = open_checkpoint(folder / "model.safetensors")
    detected = detect(checkpoint)
    model = ComfyModel(detected.spec, "cpu")
    model.assign(map_file(checkpoint, tuple(checkpoint.tensors), detected.dtypes))
    model.finish_loading()
    model.keep_options(ConstantOptions("none", pack({})))
    (x, timestep), kwargs = forward_arguments(model.diffusion_model, CASES[0], torch.device("cpu"))
    kwargs.pop("transformer_options")
    arguments = {"x": x, "timestep": timestep, **kwargs}
    load = LoadInputs(run=1, latent_shape=list(x.shape), weight_budget=0, share=1.0)
    return model, StepInputs(arguments, {}, "none", None, load)
