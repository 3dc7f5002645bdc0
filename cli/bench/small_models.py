"""Models that are small but not tiny, ComfyUI's or diffusers', and a forward of them on a rank."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rayltx.cli.packages import require_packages
from rayltx.comfy_dist.comfy_environment import ComfyEnvironment, check_comfyui, enter_given
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.diffusion_models.lightricks.random_weights import randomise
from rayltx.diffusion_models.lightricks.step_cost import ModelShape
from rayltx.diffusion_models.lightricks.tiny_configs import COMFYUI_CONFIGS, TRANSFORMER_CONFIGS
from rayltx.errors import InputError
from rayltx.sequence_parallel.group import SequenceParallelGroup

HEADS, HEAD_WIDTH, LAYERS = 16, 32, 2
AUDIO_TOKENS = 64
_SIGMA = 0.8


class Forward(Protocol):
    def __call__(self, group: SequenceParallelGroup | None, as_projected: bool = True) -> list[Tensor]:
        """The whole answer on rank 0; elsewhere nothing that is of use.

        group: None for ComfyUI's model by itself, without anything of ours. as_projected: as in `comfyui_host.sharded`.
        """
        ...


@dataclass(frozen=True)
class SmallModel:
    """comfyui: the folder of a ComfyUI, whose model it is then; None: diffusers'."""

    version: str
    shape: LatentShape
    text_tokens: int
    comfyui: Path | None = None
    device: str = "cpu"
    heads: int = HEADS
    head_width: int = HEAD_WIDTH
    layers: int = LAYERS

    def check(self, who: str) -> None:
        """Raises InputError and MissingPackageError, before anything is started."""
        if self.version not in TRANSFORMER_CONFIGS:
            raise InputError(f"model={self.version} must be one of {', '.join(TRANSFORMER_CONFIGS)}")
        if self.comfyui is None:
            require_packages(("diffusers",), who)
        else:
            check_comfyui(self.comfyui)

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_width,
            "cross_attention_dim": self.heads * self.head_width,
            "num_layers": self.layers,
        }

    @property
    def audio_tokens(self) -> int:
        return AUDIO_TOKENS if self.planned.audio_width else 0

    @property
    def planned(self) -> ModelShape:
        """As the plan knows it."""
        config = TRANSFORMER_CONFIGS[self.version]
        audio = config.get("audio_num_attention_heads", 0) * config.get("audio_attention_head_dim", 0)
        modulates_text = bool(config.get("cross_attention_adaln"))
        return ModelShape(self.layers, self.heads * self.head_width, audio, self.heads, modulates_text)

    def build(self) -> Forward:
        """With seeded weights and inputs, float32, in this process. From the second forward on the text's keys are kept."""
        return _diffusers_forward(self) if self.comfyui is None else _comfyui_forward(self)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    def latent(self) -> Tensor:
        return self.randn(1, 128, self.shape.frames, self.shape.height, self.shape.width)


def enter_comfyui(folder: Path, device: str = "cpu") -> None:
    """Make this process like that ComfyUI, whose attention is torch's: its own choice takes more where more is free.

    Raises InputError where this Python cannot import it.
    """
    environment = ComfyEnvironment.headless(str(folder.resolve()), cpu=device == "cpu")
    attention = enter_given(folder, environment, device, "comfy.ldm.modules.attention")
    for name in ("optimized_attention", "optimized_attention_masked"):
        setattr(attention, name, attention.attention_pytorch)


def _diffusers_forward(small: SmallModel) -> Forward:
    from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint, TensorInfo
    from rayltx.diffusion_models.lightricks.diffusers_host import DiffusersHost
    from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
    from rayltx.diffusion_models.lightricks.tiny_models import build_reference, official_tensors

    config = {**TRANSFORMER_CONFIGS[small.version], **small.sizes}
    reference = build_reference(small.version, small.layers, config)
    randomise(reference, 0)
    tensors = official_tensors(reference, prefix="")
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    model = DiffusersModel.of_checkpoint(Checkpoint("a small model", "", infos, {}, {"transformer": config}))
    host = DiffusersHost(model, small.device)
    host.assign(tensors)
    host.finish_loading()
    widths = model.context_widths()
    inputs: dict[str, Any] = {
        "latent": small.latent(),
        "timestep": torch.full((1,), _SIGMA),
        "context": small.randn(1, small.text_tokens, widths[0]),
    }
    if model.has_audio:
        inputs["audio_latent"] = small.randn(1, 8, AUDIO_TOKENS, 16)
        inputs["audio_context"] = small.randn(1, small.text_tokens, widths[1])

    def forward(group: SequenceParallelGroup | None, as_projected: bool = True) -> list[Tensor]:
        assert group is not None, "diffusers' model is run by its host"
        return list((host.forward(group, inputs) or {}).values())

    return forward


def comfyui_model(version: str, config: dict[str, Any], device: str = "cpu") -> Any:
    """Of ComfyUI's class, float32. Within a process that has entered a ComfyUI."""
    import comfy.ops

    from rayltx.comfy_dist.tiny_checkpoints import model_class

    operations = comfy.ops.disable_weight_init
    model = model_class(version)(**config, dtype=torch.float32, operations=operations).requires_grad_(False).eval()
    randomise(model, 0)
    return model.to(device)


def _comfyui_forward(small: SmallModel) -> Forward:
    assert small.comfyui is not None
    enter_comfyui(small.comfyui, small.device)
    from rayltx.comfy_dist.model_spec import has_audio, text_width
    from rayltx.diffusion_models.lightricks.comfyui_host import sharded
    from rayltx.diffusion_models.lightricks.kept_text import KeptText

    kept_text = KeptText(lambda: math.inf)
    model = comfyui_model(small.version, {**COMFYUI_CONFIGS[small.version], **small.sizes}, small.device)
    x: Any = small.latent()
    timestep: Any = torch.full((1,), _SIGMA, device=small.device)
    mask = None
    if has_audio(model):
        x, timestep = [x, small.randn(1, 8, AUDIO_TOKENS, 16)], (timestep, timestep)
    else:
        mask = torch.ones(1, small.text_tokens, dtype=torch.int64, device=small.device)
    context = small.randn(1, small.text_tokens, text_width(model))

    def forward(group: SequenceParallelGroup | None, as_projected: bool = True) -> list[Tensor]:
        with contextlib.ExitStack() as scope:
            if group is not None:
                scope.enter_context(sharded(model, group, as_projected=as_projected, kept_text=kept_text))
            out = model(x, timestep, context=context, attention_mask=mask, frame_rate=25.0, transformer_options={})
        return list(out) if isinstance(out, (list, tuple)) else [out]

    return forward


def exact_and_error(outs: list[Tensor], references: list[Tensor]) -> tuple[bool, float]:
    """Whether the bits are the same, and the largest relative error."""
    from rayltx.diffusion_models.lightricks.relative_error import worst_error

    return all(map(torch.equal, outs, references)), worst_error(outs, references)
