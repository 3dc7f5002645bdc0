"""The demo checkpoint is an official-format file: ComfyUI samples the same latent from it."""

import torch

from rayltx.about import ROOT
from rayltx.diffusion_models.lightricks.relative_error import relative_error
from rayltx.diffusion_models.lightricks.sampling import initial_noise, sample, schedule
from rayltx.sequence_parallel.group import SequenceParallelGroup

CFG, SEED, FRAME_RATE = 3.0, 7, 24.0


def test_comfyui_samples_the_same_latent(comfy):
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    from embedded_host import load_host

    from rayltx.demo.prompts import parse_prompt, scene_context

    path = ROOT / "demo" / "shapes.safetensors"
    positive, negative = scene_context(parse_prompt("red circle right")), scene_context(None)
    sigmas = schedule(12, 6 * 6 * 6)
    noise = initial_noise({"video": (1, 128, 6, 6, 6)}, SEED)

    host = load_host(path)
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


def test_comfyui_decodes_and_encodes_by_its_vae(comfy):
    import comfy.sd
    import comfy.utils

    from rayltx.demo.clips import Scene, render_clip
    from rayltx.demo.pixels import pixels_to_latent
    from rayltx.demo.vae import CHECKPOINT, decode, load_vae

    tensors, metadata = comfy.utils.load_torch_file(str(CHECKPOINT), return_metadata=True)
    vae = comfy.sd.VAE(
        sd=comfy.utils.state_dict_prefix_replace(tensors, {"vae.": ""}, filter_keys=True), metadata=metadata
    )
    clip = render_clip(Scene("green", "square", "left"), 25, 160, 192, torch.Generator().manual_seed(2))
    latent = pixels_to_latent(clip)[None]
    assert (vae.decode(latent)[0] - decode(latent)).abs().max() < 1e-4
    with torch.inference_mode():
        expected = load_vae(CHECKPOINT).encode(clip.permute(3, 0, 1, 2)[None] * 2.0 - 1.0).latent_dist.mean
    assert (vae.encode(clip) - expected).abs().max() < 1e-4
    assert (expected - latent).square().mean() < latent.square().mean()
