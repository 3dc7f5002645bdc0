"""`diffusers`' LTX transformers for an official checkpoint: class, arguments and parameter names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel, LTXVideoTransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_ltx2_transformer_to_diffusers,
    convert_ltx_transformer_checkpoint_to_diffusers,
)
from torch import Tensor

from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.errors import CheckpointError, InputError, UnsupportedError

logger = logging.getLogger(__name__)

# What diffusers builds whatever the config says: another value means another model.
_FIXED = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "positional_embedding_type": ("rope",),
    "qk_norm": ("rms_norm",),
    "standardization_norm": ("rms_norm",),
    "upcast_attention": (False,),
    "only_cross_attention": (False,),
    "double_self_attention": (False,),
    "use_linear_projection": (False,),
    "num_vector_embeds": (None,),
    "dropout": (0, 0.0),
    "share_ff": (False,),
    "use_audio_video_cross_attention": (True,),
    "av_cross_ada_norm": (True,),
    "caption_projection_first_linear": (True,),
}
_FIXED_LTX_VIDEO = {
    "positional_embedding_theta": (10000, 10000.0),
    "positional_embedding_max_pos": ([20, 2048, 2048],),
    "frequencies_precision": ("float32",),
    "rope_type": ("interleaved",),
    "cross_attention_adaln": (False,),
    "ff_bias": (True,),
    "caption_proj_before_connector": (False,),
}
_FIXED_AUDIO_VIDEO = {"use_middle_indices_grid": (True,)}
_UNUSED = (  # in official files, without a meaning for the transformer's forward
    "_class_name", "_diffusers_version", "_name_or_path", "adaptive_norm", "attention_type", "causal_temporal_positioning",
    "cross_attention_norm", "norm_eps", "norm_num_groups", "num_embeds_ada_norm", "patch_size", "project_to_2d_pos",
    "sample_size", "skip_final_norm", "timestep_scale_multiplier", "use_additional_conditions", "use_middle_indices_grid",
    "use_rope", "use_tpu_flash_attention", "vae_scale_factors", "video_causal", "cross_attn_timestep_scale_multiplier",
    "rope_interpolation", "input_type", "text_encoder_norm_type",
)  # fmt: skip


@dataclass(frozen=True)
class DiffusersModel:
    """How to build and use a model. Picklable; building needs no weights."""

    version: str
    has_audio: bool
    arguments: Mapping[str, Any]
    names: Mapping[str, str]  # diffusers' parameter name: official name without prefix
    timestep_scale: float
    causal: bool
    use_middle_positions: bool
    cross_timestep: bool  # audio-video modulation by the other stream's sigma, as from LTX-2.3 on

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> DiffusersModel:
        """Raises CheckpointError where metadata and tensors disagree, UnsupportedError for what diffusers has not."""
        config = checkpoint.transformer_config
        if not config:
            raise CheckpointError(
                f"{checkpoint.path}: it has no `config` metadata, without which its positions and its sizes can only be "
                "guessed; use the original file, or convert it with its metadata kept"
            )
        _refuse_unknown(checkpoint, config)
        arguments = _audio_video_arguments(checkpoint) if checkpoint.has_audio else _video_arguments(checkpoint)
        model = cls(
            version=checkpoint.version,
            has_audio=checkpoint.has_audio,
            arguments=arguments,
            names=_parameter_names(checkpoint),
            timestep_scale=float(config.get("timestep_scale_multiplier", 1000)),
            causal=bool(config.get("causal_temporal_positioning", checkpoint.has_audio)),
            use_middle_positions=bool(config.get("use_middle_indices_grid", checkpoint.has_audio)),
            cross_timestep=bool(config.get("cross_attention_adaln", False)),
        )
        model._check_tensors(checkpoint)
        return model

    def build(self) -> LTXVideoTransformer3DModel | LTX2VideoTransformer3DModel:
        """The model with parameters that have shapes and no memory."""
        model_class = LTX2VideoTransformer3DModel if self.has_audio else LTXVideoTransformer3DModel
        with torch.device("meta"):
            return model_class(**self.arguments).eval()

    @cached_property
    def channels(self) -> int:
        return int(self.arguments["in_channels"])

    @property
    def num_heads(self) -> int:
        return int(self.arguments["num_attention_heads"])

    @property
    def width(self) -> int:
        return self.num_heads * int(self.arguments["attention_head_dim"])

    def context_widths(self) -> tuple[int, int]:
        """Width of the text context of the video and of the audio stream."""
        if not self.has_audio or self.arguments["use_prompt_embeddings"]:
            return (self.arguments["caption_channels"],) * 2
        return self.arguments["cross_attention_dim"], self.arguments["audio_cross_attention_dim"]

    def check_context(self, context: Tensor | None, audio_context: Tensor | None) -> None:
        """Raises InputError for text that was made for another model."""
        for name, tensor, width in zip(("context", "audio_context"), (context, audio_context), self.context_widths()):
            if tensor is not None and (tensor.ndim != 3 or tensor.shape[-1] != width):
                raise InputError(
                    f"{name} has the shape {tuple(tensor.shape)}: this {self.version} model takes (batch, tokens, "
                    f"{width}); was it made for another LTX version?"
                )

    def _check_tensors(self, checkpoint: Checkpoint) -> None:
        expected = {name: tuple(tensor.shape) for name, tensor in self.build().state_dict().items()}
        complaints = []
        for name in sorted(expected.keys() - self.names.keys()):
            complaints.append(f"{name} is missing")
        for name, official in self.names.items():
            shape = checkpoint.tensors[official].values_shape
            if name not in expected:
                complaints.append(f"{official} has no place in the model")
            elif shape != expected[name]:
                complaints.append(f"{official} is {list(shape)} and should be {list(expected[name])}")
        if complaints:
            more = f", and {len(complaints) - 4} more" if len(complaints) > 4 else ""
            raise CheckpointError(
                f"{checkpoint.path}: its metadata and its tensors disagree: {'; '.join(complaints[:4])}{more}"
            )


def _refuse_unknown(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    fixed = {**_FIXED, **(_FIXED_AUDIO_VIDEO if checkpoint.has_audio else _FIXED_LTX_VIDEO)}
    for key, allowed in fixed.items():
        if key in config and config[key] not in allowed:
            raise UnsupportedError(
                f"{checkpoint.path}: {key}={config[key]!r} in its config; diffusers' {checkpoint.version} model has only "
                f"{allowed[0]!r}; run this file in ComfyUI"
            )
    known = {*fixed, *_UNUSED, *_TAKEN}
    unknown = sorted(set(config) - known)
    if unknown:
        logger.warning("%s: config keys without a known meaning: %s", checkpoint.path, ", ".join(unknown))


def _video_arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.transformer_config
    defaults = {
        "in_channels": 128, "out_channels": 128, "num_attention_heads": 32, "attention_head_dim": 64,
        "cross_attention_dim": 2048, "caption_channels": 4096,
    }  # fmt: skip
    return {**{key: config.get(key, value) for key, value in defaults.items()}, "num_layers": _num_layers(checkpoint)}


def _audio_video_arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.transformer_config
    defaults = {
        "in_channels": 128, "out_channels": 128, "num_attention_heads": 32, "attention_head_dim": 128,
        "cross_attention_dim": 4096, "audio_in_channels": 128, "audio_out_channels": 128,
        "audio_num_attention_heads": 32, "audio_attention_head_dim": 64, "audio_cross_attention_dim": 2048,
        "caption_channels": 3840, "ff_bias": True, "audio_ff_bias": True, "use_prompt_adaln_single": True,
        "rope_type": "split",
    }  # fmt: skip
    arguments = {key: config.get(key, value) for key, value in defaults.items()}
    max_positions = config.get("positional_embedding_max_pos", [20, 2048, 2048])
    gated, modulated = config.get("apply_gated_attention", False), config.get("cross_attention_adaln", False)
    return {
        **arguments,
        "num_layers": _num_layers(checkpoint),
        "pos_embed_max_pos": max_positions[0],
        "base_height": max_positions[1],
        "base_width": max_positions[2],
        "audio_pos_embed_max_pos": config.get("audio_positional_embedding_max_pos", [20])[0],
        "gated_attn": gated,
        "audio_gated_attn": gated,
        "cross_attn_mod": modulated,
        "audio_cross_attn_mod": modulated,
        "rope_theta": config.get("positional_embedding_theta", 10000.0),
        "rope_double_precision": config.get("frequencies_precision", "float32") == "float64",
        "timestep_scale_multiplier": config.get("timestep_scale_multiplier", 1000),
        "cross_attn_timestep_scale_multiplier": config.get("av_ca_timestep_scale_multiplier", 1),
        "use_prompt_embeddings": not config.get("caption_proj_before_connector", False),
        "perturbed_attn": True,  # lets blocks take spatio-temporal guidance; changes nothing without it
        "use_keyframes_abs_pos_embedding": "keyframes_abs_pos_embedding" in checkpoint.tensors,
    }


_TAKEN = (
    "in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "cross_attention_dim", "caption_channels",
    "num_layers", "audio_in_channels", "audio_out_channels", "audio_num_attention_heads", "audio_attention_head_dim",
    "audio_cross_attention_dim", "ff_bias", "audio_ff_bias", "use_prompt_adaln_single", "rope_type",
    "positional_embedding_max_pos", "audio_positional_embedding_max_pos", "apply_gated_attention", "cross_attention_adaln",
    "positional_embedding_theta", "frequencies_precision", "av_ca_timestep_scale_multiplier",
    "caption_proj_before_connector", "use_keyframes_abs_pos_embedding", "connector_attention_head_dim",
    "connector_num_attention_heads", "connector_num_layers", "connector_apply_gated_attention",
    "audio_connector_attention_head_dim", "audio_connector_num_attention_heads", "connector_norm_output",
    "connector_num_learnable_registers", "connector_positional_embedding_max_pos", "connector_rope_type",
)  # fmt: skip


def _num_layers(checkpoint: Checkpoint) -> int:
    declared = checkpoint.transformer_config.get("num_layers", checkpoint.num_blocks)
    if declared != checkpoint.num_blocks:
        raise CheckpointError(
            f"{checkpoint.path}: its metadata and its tensors disagree: the config says num_layers={declared}, the file "
            f"holds {checkpoint.num_blocks} transformer blocks"
        )
    return checkpoint.num_blocks


def _parameter_names(checkpoint: Checkpoint) -> dict[str, str]:
    """diffusers' own conversion, run on the names."""
    official = {name: name for name in checkpoint.tensors}
    if not checkpoint.has_audio:
        return convert_ltx_transformer_checkpoint_to_diffusers(official)
    names = convert_ltx2_transformer_to_diffusers(official)
    # The library's conversion predates LTX-2.3, and leaves its two modules for the prompt's timestep as they are.
    return {name.replace("prompt_adaln_single.", "prompt_adaln."): official for name, official in names.items()}
