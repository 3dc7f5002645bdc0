"""Graphs for the server's tests: what does not depend on who runs the model."""

from __future__ import annotations

from comfy_models import CONFIGS
from comfy_server import Graph
from safetensors.torch import load_file

from rayltx.diffusion_models.lightricks.relative_error import worst_error

STEPS = 3
FRAMES, HEIGHT, WIDTH, AUDIO_TOKENS = 3, 5, 7, 11


class Workflow(Graph):
    """The parts of a graph that do not depend on who runs the model."""

    def __init__(self, version, batch=1, audio=True, masked=3):
        super().__init__()
        self.version, self.config, self.batch = version, CONFIGS[version], batch
        self.has_audio = version != "LTX-Video" and audio
        newest = version in ("LTX-2.3", "LTX-2.5")
        self.text_width = (
            self.config["cross_attention_dim"] + self.config["audio_cross_attention_dim"]
            if newest
            else self.config["caption_channels"]
        )
        masked = masked if version == "LTX-Video" else -1
        self.positive, self.negative = (
            self.add("TestConditioning", seed=seed, width=self.text_width, masked=masked)[0] for seed in (1, 2)
        )
        self.video = self.add(
            "TestLatent", seed=3, batch=batch, channels=128, frames=FRAMES, height=HEIGHT, width=WIDTH
        )[0]

    def latent(self):
        if not self.has_audio:
            return self.video
        audio = self.add("TestAudioLatent", batch=self.batch, tokens=AUDIO_TOKENS)[0]
        return self.add("LTXVConcatAVLatent", video_latent=self.video, audio_latent=audio)[0]

    def sigmas(self, steps=STEPS):
        return self.add(
            "LTXVScheduler", steps=steps, max_shift=2.05, base_shift=0.95, stretch=True, terminal=0.1, latent=self.video
        )[0]

    def whole(self):
        name = f"{self.version}.safetensors"
        return self.add("UNETLoader", unet_name=name, weight_dtype="default")[0]

    def init(self, workers=2, ring=1, **more):
        return self.add(
            "RayInitializer", ray_cluster_address="local", ray_cluster_namespace="default", GPU=workers,
            ulysses_degree=workers // ring, ring_degree=ring, cfg_degree=1, **{"device": "cpu", **more},
        )[0]  # fmt: skip

    def actors(self, workers=2, ring=1, **more):
        """RAY_ACTORS and MODEL."""
        init = self.init(workers, ring)
        loader = self.add(
            "RayUNETLoader",
            unet_name=f"{self.version}.safetensors",
            weight_dtype="default",
            ray_actors_init=init,
            **more,
        )
        return loader[0], loader[1]

    def gguf(self, workers=2, settings=(), **more):
        """The MODEL of a GGUF file."""
        return self.add(
            "RayGGUFLoader", unet_name=f"{self.version}.gguf", dequant_dtype="default", patch_dtype="default",
            ray_actors_init=self.init(workers, **dict(settings)), **more,
        )[1]  # fmt: skip

    def save(self, latent, name):
        self.add("TestSave", latent=latent, name=name)


def ksampler(work, model, latent=None, cfg=3.0, sampler="euler"):
    return work.add(
        "KSampler", model=model, seed=5, steps=STEPS, cfg=cfg, sampler_name=sampler, scheduler="simple",
        positive=work.positive, negative=work.negative, latent_image=latent or work.latent(), denoise=1.0,
    )[0]  # fmt: skip


def sampler_custom(work, model, latent=None, cfg=3.0, sampler="euler"):
    chosen = work.add("KSamplerSelect", sampler_name=sampler)[0]
    return work.add(
        "SamplerCustom", model=model, add_noise=True, noise_seed=5, cfg=cfg, positive=work.positive,
        negative=work.negative, sampler=chosen, sigmas=work.sigmas(), latent_image=latent or work.latent(),
    )[0]  # fmt: skip


def error_of(server, name, reference):
    """Of what one graph saved, against what another did; relative, of the tensor that is furthest off."""
    found, expected = (load_file(server.output / f"{n}.safetensors") for n in (name, reference))
    assert found.keys() == expected.keys()
    return worst_error([found[key] for key in expected], list(expected.values()))
