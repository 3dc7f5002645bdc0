"""ComfyUI's types, by the names that its nodes and its code give them.

ComfyUI is not there when types are checked, and annotates little, so to the type checker each is anything. To a reader it
says what is passed.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Model: TypeAlias = Any  # MODEL: a comfy.model_patcher.ModelPatcher
BaseModel: TypeAlias = Any  # comfy.model_base.BaseModel: the diffusion model with its sampling and its latent format
DiffusionModel: TypeAlias = Any  # comfy.ldm.lightricks: LTXVModel or LTXAVModel
ModelConfig: TypeAlias = Any  # comfy.supported_models_base.BASE: what detection makes of a file
VAE: TypeAlias = Any  # comfy.sd.VAE
VAEModel: TypeAlias = (
    Any  # a VAE's `first_stage_model`: of LTX, comfy.ldm.lightricks.vae's VideoVAE, CausalDiffusionVAE, AudioVAE
)
UpsamplerModel: TypeAlias = Any  # comfy.ldm.lightricks.latent_upsampler.LatentUpsampler
Upsampler: TypeAlias = Any  # LATENT_UPSCALE_MODEL: a ModelPatcher of an UpsamplerModel; before ComfyUI 0.29, the model
Layer: TypeAlias = Any  # one of comfy.ops's layers
HookGroup: TypeAlias = Any  # comfy.hooks.HookGroup
Guider: TypeAlias = Any  # GUIDER
Sampler: TypeAlias = Any  # SAMPLER
Conditioning: TypeAlias = list[Any]  # CONDITIONING: a list of [text, settings]
Latent: TypeAlias = dict[str, Any]  # LATENT: {"samples": ...}
KeyPatches: TypeAlias = dict[str, list[Any]]  # of weights, as a ModelPatcher holds them: (strength, patch, ...) by name
Options: TypeAlias = dict[str, Any]  # transformer_options
