"""The demo checkpoint is an official-format file: ComfyUI samples the same latent from it."""

import torch

from rayltx.about import ROOT
from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
from rayltx.diffusion_models.lightricks.relative_error import relative_error
from rayltx.diffusion_models.lightricks.sampling import initial_noise, sample, schedule
from rayltx.sequence_parallel.group import SequenceParallelGroup

CFG, SEED, FRAME_RATE = 3.0, 7, 24.0


def test_comfyui_samples_the_same_latent(comfy):
    import comfy.sample
    import comfy.samplers
    import comfy.sd

    from rayltx.demo.prompts import parse_prompt, scene_context
    from rayltx.diffusion_models.lightricks.diffusers_host import DiffusersHost
    from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel

    path = ROOT / "demo" / "shapes.safetensors"
    positive, negative = scene_context(parse_prompt("red circle right")), scene_context(None)
    sigmas = schedule(12, 6 * 6 * 6)
    noise = initial_noise({"video": (1, 128, 6, 6, 6)}, SEED)

    checkpoint = open_checkpoint(path)
    host = DiffusersHost(DiffusersModel.of_checkpoint(checkpoint))
    with checkpoint.open() as reader:
        host.assign({name: reader.read(name) for name in checkpoint.tensors})
    host.finish_loading()
    sides = [{"context": c, "context_mask": m, "frame_rate": FRAME_RATE} for c, m in (positive, negative)]
    ours = sample(lambda inputs: host.forward(SequenceParallelGroup.single(), inputs), noise, sigmas, *sides, CFG)[
        "video"
    ]

    model = comfy.sd.load_diffusion_model(str(path))
    conditioning = [[[c, {"attention_mask": m, "frame_rate": FRAME_RATE}]] for c, m in (positive, negative)]
    with torch.inference_mode():
        theirs = comfy.sample.sample_custom(
            model, noise["video"], CFG, comfy.samplers.sampler_object("euler"), sigmas, *conditioning,
            torch.zeros_like(noise["video"]), seed=SEED, disable_pbar=True,
        )  # fmt: skip
    error = relative_error(ours, theirs)
    print(f"relative error {error:.2e}")
    assert error < 2e-5
