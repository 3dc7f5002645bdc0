"""What users do with a MODEL in ComfyUI, done with ComfyUI's own nodes. A scenario takes a MODEL and samples.

Everything is made from seeds, so that two calls differ only in the MODEL.
"""

from __future__ import annotations

import functools
import importlib

import torch

from rayltx.comfy_dist.main_process.comfy_nodes import call_node
from rayltx.demo.pixels import latent_to_pixels, pixels_to_latent

SAMPLING_TOLERANCE = (
    5e-6  # relative error of a latent, float32, over a whole sampling: each step's sums in another order
)

FRAMES, HEIGHT, WIDTH, AUDIO_TOKENS, TEXT_TOKENS = 3, 5, 7, 11, 9
STEPS = 3


class LinearVAE:
    """Stands in for LTX's VAE where a node wants one: the demo's fixed transform."""

    downscale_index_formula = (8, 32, 32)
    latent_channels = 128

    def encode(self, pixels):
        return pixels_to_latent(pixels)[None]

    def decode(self, latent):
        return latent_to_pixels(latent[0])


class LinearAudioVAE:
    """Audio of any kind to 25 latents a second."""

    audio_sample_rate = 16000
    latent_channels = 8

    class first_stage_model:  # noqa: N801 (ComfyUI's name)
        latent_frequency_bins = 16

        @staticmethod
        def num_of_latents_from_frames(frames, frame_rate):
            return max(1, round(25 * frames / frame_rate))

    def encode(self, waveform):
        tokens = max(1, waveform.shape[1] // 640)
        return torch.linspace(-1.0, 1.0, 8 * tokens * 16).view(1, 8, tokens, 16)


def node(module, name):
    """A function that calls a node of ComfyUI, of its old or its new kind, and returns its outputs as a tuple."""
    return functools.partial(call_node, module, name)


class Workspace:
    """Inputs for one version of the model."""

    def __init__(self, version, config, batch=1, frames=FRAMES, audio=True, seed=0):
        self.version, self.config = version, config
        self.has_audio = version != "LTX-Video" and audio
        generator = torch.Generator().manual_seed(seed)
        self.randn = lambda *shape: torch.randn(*shape, generator=generator)
        self.batch, self.frames = batch, frames
        self.positive = self.conditioning()
        self.negative = self.conditioning()
        self.video = {"samples": self.randn(batch, 128, frames, HEIGHT, WIDTH) * 0.1}

    @property
    def context_width(self):
        """Of text as the encoder gives it: for LTX-2 and later, before the model's own connector."""
        if self.version == "LTX-Video" or self.version == "LTX-2":
            return self.config["caption_channels"]
        return self.config["cross_attention_dim"] + self.config["audio_cross_attention_dim"]

    def conditioning(self):
        extra = {"frame_rate": 25.0}
        if self.version == "LTX-Video":
            extra["attention_mask"] = torch.ones(1, TEXT_TOKENS, dtype=torch.int64)
            extra["attention_mask"][:, 6:] = 0
        return [[self.randn(1, TEXT_TOKENS, self.context_width), extra]]

    def latent(self, video=None):
        video = self.video if video is None else video
        if not self.has_audio:
            return video
        audio = {"samples": torch.zeros(self.batch, 8, AUDIO_TOKENS, 16), "type": "audio"}
        return node("comfy_extras.nodes_lt", "LTXVConcatAVLatent")(video_latent=video, audio_latent=audio)[0]


def ksampler(model, work, latent=None, sampler="euler", cfg=3.0, scheduler="simple", denoise=1.0, seed=5):
    return node("nodes", "KSampler")(
        model=model, seed=seed, steps=STEPS, cfg=cfg, sampler_name=sampler, scheduler=scheduler, positive=work.positive,
        negative=work.negative, latent_image=work.latent() if latent is None else latent, denoise=denoise,
    )[0]  # fmt: skip


def sampler_custom_advanced(model, work, latent=None, sampler="euler", guider="cfg", cfg=3.0, seed=5):
    custom = "comfy_extras.nodes_custom_sampler"
    latent = work.latent() if latent is None else latent
    sigmas = node("comfy_extras.nodes_lt", "LTXVScheduler")(
        steps=STEPS, max_shift=2.05, base_shift=0.95, stretch=True, terminal=0.1, latent=work.video
    )[0]
    if guider == "cfg":
        guided = node(custom, "CFGGuider")(model=model, positive=work.positive, negative=work.negative, cfg=cfg)[0]
    else:
        guided = node(custom, "BasicGuider")(model=model, conditioning=work.positive)[0]
    chosen = node(custom, "KSamplerSelect")(sampler_name=sampler)[0]
    noise = node(custom, "RandomNoise")(noise_seed=seed)[0]
    return node(custom, "SamplerCustomAdvanced")(
        noise=noise, guider=guided, sampler=chosen, sigmas=sigmas, latent_image=latent
    )[0]


def tensors_of(latent):
    samples = latent["samples"]
    return [t.clone() for t in (samples.unbind() if getattr(samples, "is_nested", False) else [samples])]


# ---- the scenarios: (model, version, config) -> latent


def euler(model, version, config):
    return ksampler(model, Workspace(version, config))


def without_guidance(model, version, config):
    return sampler_custom_advanced(model, Workspace(version, config), guider="basic")


def custom_cfg_guider(model, version, config):
    return sampler_custom_advanced(model, Workspace(version, config))


def uni_pc(model, version, config):
    return ksampler(model, Workspace(version, config), sampler="uni_pc")


def dpmpp_2m_sde(model, version, config):
    return ksampler(model, Workspace(version, config), sampler="dpmpp_2m_sde")


def ancestral(model, version, config):
    return ksampler(model, Workspace(version, config), sampler="euler_ancestral")


def batch_of_two(model, version, config):
    return ksampler(model, Workspace(version, config, batch=2))


def odd_token_count(model, version, config):
    work = Workspace(version, config, frames=1)
    work.video = {"samples": work.randn(1, 128, 1, 3, 3)}
    return ksampler(model, work)


def _image(work):
    return work.randn(1, 32 * HEIGHT, 32 * WIDTH, 3).sigmoid()


def image_to_video(model, version, config):
    work = Workspace(version, config)
    video = node("comfy_extras.nodes_lt", "LTXVImgToVideoInplace")(
        vae=LinearVAE(), image=_image(work), latent=work.video, strength=1.0, bypass=False
    )[0]
    return ksampler(model, work, work.latent(video))


def inpainting(model, version, config):
    work = Workspace(version, config)
    mask = torch.ones(1, 1, FRAMES, HEIGHT, WIDTH)
    mask[:, :, 1:, 1:3, 2:5] = 0.3
    return ksampler(model, work, work.latent({**work.video, "noise_mask": mask}))


def _with_guide(work, strength, attention_mask=None, frame_idx=8, pixel_frames=1):
    add_guide = node("comfy_extras.nodes_lt", "LTXVAddGuide")
    extra = {} if attention_mask is None else {"attention_mask": attention_mask}  # ComfyUI 0.20 takes none
    images = work.randn(pixel_frames, 32 * HEIGHT, 32 * WIDTH, 3).sigmoid()
    work.positive, work.negative, video = add_guide(
        positive=work.positive, negative=work.negative, vae=LinearVAE(), latent=work.video, image=images,
        frame_idx=frame_idx, strength=strength, **extra,
    )  # fmt: skip
    return video


def guide_with_strength(model, version, config):
    work = Workspace(version, config)
    work.video = _with_guide(work, 0.5)
    return ksampler(model, work, work.latent(work.video))


def guide_with_pixel_mask(model, version, config):
    work = Workspace(version, config)
    mask = torch.linspace(0.0, 1.0, 32 * WIDTH).expand(1, 32 * HEIGHT, 32 * WIDTH)
    work.video = _with_guide(work, 1.0, attention_mask=mask)
    return ksampler(model, work, work.latent(work.video))


def keyframes(model, version, config):
    """Two guides at full strength: a frame at the start, a short clip at the end."""
    work = Workspace(version, config)
    work.video = _with_guide(work, 1.0, frame_idx=0)
    work.video = _with_guide(work, 0.8, frame_idx=8, pixel_frames=9)
    return ksampler(model, work, work.latent(work.video))


def reference_audio(model, version, config):
    work = Workspace(version, config)
    sound = {"waveform": torch.zeros(1, 2, 3200), "sample_rate": 16000}
    model, work.positive, work.negative = node("comfy_extras.nodes_lt", "LTXVReferenceAudio")(
        model=model, positive=work.positive, negative=work.negative, reference_audio=sound, audio_vae=LinearAudioVAE(),
        identity_guidance_scale=1.5, start_percent=0.0, end_percent=1.0,
    )  # fmt: skip
    return ksampler(model, work)


def video_only(model, version, config):
    return ksampler(model, Workspace(version, config, audio=False))


def model_sampling(model, version, config):
    work = Workspace(version, config)
    model = node("comfy_extras.nodes_lt", "ModelSamplingLTXV")(
        model=model, max_shift=2.05, base_shift=0.95, latent=work.video
    )[0]
    return ksampler(model, work)


def cfg_zero_star(model, version, config):
    return ksampler(node("comfy_extras.nodes_cfg", "CFGZeroStar")(model=model)[0], Workspace(version, config))


def easy_cache(model, version, config):
    model = node("comfy_extras.nodes_easycache", "EasyCacheNode")(
        model=model, reuse_threshold=5.0, start_percent=0.0, end_percent=1.0, verbose=False
    )[0]
    return ksampler(model, Workspace(version, config))


def _defaults(module, name, **given):
    """The inputs of a node of the new kind: its defaults, and what is given of those that it has."""
    schema = getattr(importlib.import_module(module), name).define_schema()
    inputs = {i.id: getattr(i, "default", None) for i in schema.inputs}
    return {**inputs, **{key: value for key, value in given.items() if key in inputs}}


def context_windows(model, version, config):
    where = ("comfy_extras.nodes_context_windows", "LTXVContextWindowsNode")
    wanted = _defaults(*where, model=model, context_length=17, context_overlap=8, context_schedule="standard_static",
                       freenoise=False)  # fmt: skip
    return ksampler(node(*where)(**wanted)[0], Workspace(version, config, frames=5))


def spatio_temporal_guidance(model, version, config):
    where = ("comfy_extras.nodes_lt", "LTXVSpatioTemporalGuidance")
    return ksampler(node(*where)(**_defaults(*where, model=model, blocks="1"))[0], Workspace(version, config))


def modality_guidance(model, version, config):
    where = ("comfy_extras.nodes_lt", "LTXVModalityGuidance")
    return ksampler(node(*where)(**_defaults(*where, model=model))[0], Workspace(version, config))


# ---- patches of the model


def make_lora(config, seed=3, rank=2, layers=("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.0.proj")):
    """A LoRA of the common kind for a few layers of a tiny model."""
    generator = torch.Generator().manual_seed(seed)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    tensors = {}
    for layer in layers:
        out = 4 * width if "net.0" in layer else width
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(rank, width, generator=generator) * 0.2
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.2
    return tensors


def with_lora(model, config, strength=1.0, seed=3):
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, make_lora(config, seed), strength, 0)[0]


def lora(model, version, config):
    return ksampler(with_lora(model, config), Workspace(version, config))


def two_loras(model, version, config):
    return ksampler(with_lora(with_lora(model, config, 0.7), config, -0.4, seed=4), Workspace(version, config))


def hook_lora(model, version, config):
    """A LoRA on the positive conditioning alone, stronger in the second half."""
    import comfy.hooks

    work = Workspace(version, config)
    hooks = comfy.hooks.create_hook_lora(lora=make_lora(config), strength_model=1.0, strength_clip=0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(strength=0.3, start_percent=0.0))
    frames.add(comfy.hooks.HookKeyframe(strength=1.2, start_percent=0.5))
    hooks.set_keyframes_on_hooks(hook_kf=frames)
    work.positive = comfy.hooks.set_hooks_for_conditioning(work.positive, hooks)
    return ksampler(model, work)


def block_replacement(model, version, config):
    """A patch in the place of a block, as packs for skipping and caching make them."""
    model = model.clone()
    model.set_model_patch_replace(scaled_block, "dit", "double_block", 0)
    return ksampler(model, Workspace(version, config))


def scaled_block(args, extra):
    out = extra["original_block"](args)
    image = out["img"]
    out["img"] = (image[0] * 0.9, image[1]) if isinstance(image, (tuple, list)) else image * 0.9
    return out


def attention_override(model, version, config):
    """Another attention kernel for the whole model, as packs for fast attention set it."""
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = doubled_scale_attention
    return ksampler(model, Workspace(version, config))


def doubled_scale_attention(kernel, q, k, v, heads, *args, **kwargs):
    return kernel(q * 1.5, k, v, heads, *args, **kwargs)


def object_patch_inside(model, version, config):
    """A method of one of the model's modules exchanged: a closure over modules of the model."""
    model = model.clone()
    name = "diffusion_model.transformer_blocks.0.ff.forward"
    feed_forward = model.get_model_object("diffusion_model.transformer_blocks.0.ff")
    model.add_object_patch(name, lambda x: type(feed_forward).forward(feed_forward, x) * 1.1)
    return ksampler(model, Workspace(version, config))


def compute_dtype(model, version, config):
    model = model.clone()
    model.set_model_compute_dtype(torch.float32)
    return ksampler(model, Workspace(version, config))


PATCHES = (
    lora, two_loras, hook_lora, block_replacement, attention_override, object_patch_inside, compute_dtype,
)  # fmt: skip
EVERYWHERE = (
    euler, without_guidance, custom_cfg_guider, uni_pc, dpmpp_2m_sde, ancestral, batch_of_two, odd_token_count,
    image_to_video, inpainting, guide_with_strength, guide_with_pixel_mask, keyframes, model_sampling, cfg_zero_star,
    easy_cache, context_windows,
)  # fmt: skip
AUDIO_VIDEO = (reference_audio, video_only, spatio_temporal_guidance, modality_guidance)
