"""Is the seam right for the ComfyUI that is installed here?

A tiny random model of the user's class and configuration goes through the same sharding, on the same ranks, as the real
one will, and is compared with itself unsharded: text masks, image-to-video, inpainting, guides, reference audio and
whatever else an LTX forward can be asked for. ComfyUI's inner representations change every few weeks, and code that was
written for another one gives wrong frames without a word. This takes a second, and says so.

Letters in shapes: B batch, F, H, W latent frames, rows, columns, N = F H W video tokens, A audio tokens, L text tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayltx.comfy_dist.comfy_types import DiffusionModel
from rayltx.comfy_dist.model_spec import has_audio, text_width
from rayltx.devices import is_out_of_memory
from rayltx.diffusion_models.lightricks.comfyui_rows import shared
from rayltx.diffusion_models.lightricks.random_weights import randomise
from rayltx.diffusion_models.lightricks.relative_error import TOLERANCE, worst_error
from rayltx.errors import SelfTestError
from rayltx.sequence_parallel.group import SequenceParallelGroup

logger = logging.getLogger(__name__)

_HEAD_DIM, _AUDIO_HEAD_DIM, _LAYERS = 12, 8, 2
_FRAMES, _HEIGHT, _WIDTH = 3, 3, 5
_AUDIO_TOKENS, _REFERENCE_TOKENS, _TEXT_TOKENS = 9, 4, 6
_FRAME_RATE = 25.0


def tiny_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The user's model configuration with the same features and heads, made narrow and shallow."""
    tiny = dict(config)
    heads = tiny["num_attention_heads"] = tiny.get("num_attention_heads", 32)
    tiny.update(
        attention_head_dim=_HEAD_DIM, cross_attention_dim=heads * _HEAD_DIM, num_layers=_LAYERS, caption_channels=24
    )
    if "audio_num_attention_heads" in tiny or config.get("image_model") == "ltxav":
        audio_heads = tiny["audio_num_attention_heads"] = tiny.get("audio_num_attention_heads", 32)
        tiny.update(audio_attention_head_dim=_AUDIO_HEAD_DIM, audio_cross_attention_dim=audio_heads * _AUDIO_HEAD_DIM)
    # The text connector is not part of the forward; one layer of it is built and left alone.
    tiny.update(connector_attention_head_dim=8, connector_num_attention_heads=2, connector_num_layers=1)
    tiny.update(audio_connector_attention_head_dim=8, audio_connector_num_attention_heads=2)
    for name in ("dtype", "image_model", "disable_unet_model_creation"):
        tiny.pop(name, None)
    return tiny


def tiny_model(model_class: type, config: Mapping[str, Any], device: torch.device, seed: int = 0) -> DiffusionModel:
    """A model with random weights under which every part of it matters. float32."""
    import comfy.ops

    model = model_class(
        **tiny_config(config), dtype=torch.float32, device=device, operations=comfy.ops.disable_weight_init
    )
    randomise(model, seed)
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Case:
    """One kind of forward."""

    name: str
    batch: int = 1
    text_mask: bool = False
    mask: str = ""  # "frame": image-to-video; "space": inpainting; "mixed", "space in one": rows of the batch differ
    guides: int = 0  # latent frames appended as guides
    guide_strength: float = 1.0
    guide_pixel_mask: bool = False
    dilated: bool = False  # guides of a smaller grid, as IC-LoRAs have them
    audio: bool = True
    reference_audio: bool = False
    given_audio: bool = False  # of the first of the batch: its timestep is 0
    generated_keyframes: bool = False
    options: tuple[tuple[str, object], ...] = ()
    kinds: int = 0  # of conditioning in the batch, as the options say; 0: they say nothing
    own_attention: bool = False  # each layer asks for another attention, as checkpoints of newer ComfyUIs can


CASES = (
    Case("text to video", text_mask=True),
    Case("image to video", batch=2, mask="frame"),
    Case("inpainting", mask="space"),
    Case("guide", guides=1),
    Case("guide with a strength", guides=2, guide_strength=0.5, batch=2),
    Case("guide with a pixel mask", guides=1, guide_pixel_mask=True, text_mask=True),
    Case("small-grid guide", guides=1, dilated=True, guide_strength=0.7),
    Case("video only", audio=False, mask="frame"),
    Case("reference audio", reference_audio=True, mask="frame"),
    Case("generated keyframes", generated_keyframes=True),
    Case("attention of the layers' own", own_attention=True, text_mask=True),
    Case("guide and attention of the layers' own", own_attention=True, guides=1, guide_strength=0.5),
    Case("spatio-temporal guidance", options=(("stg_self_attn_blocks", (1,)),)),
    Case("without audio-to-video attention", options=(("a2v_cross_attn", False),)),
    Case("without video-to-audio attention", options=(("v2a_cross_attn", False),)),
)
# By the beginnings of their names.
_AUDIO_CASES = (
    "sound of one clip given",
    "video only",
    "reference audio",
    "without audio-to-video attention",
    "without video-to-audio attention",
)


def case_like(x: object, kwargs: Mapping[str, Any]) -> Case:
    """A small one of the kind of a call of the model's `_forward`: x as it takes it, the rest by name."""
    streams: list[Any] = list(x) if isinstance(x, (list, tuple)) else [x]
    given = {name for name, value in kwargs.items() if value is not None}
    return Case(
        "the kind of input of this run",
        batch=streams[0].shape[0],
        text_mask="attention_mask" in given,
        mask="frame" if "denoise_mask" in given else "",
        guides=1 if "keyframe_idxs" in given else 0,
        guide_strength=0.5 if kwargs.get("guide_attention_entries") else 1.0,
        audio=len(streams) > 1 and streams[1].numel() > 0,
        reference_audio="ref_audio" in given,
        generated_keyframes="generated_keyframes" in given,
        kinds=1,  # as the rows of one sampling: which is which stands in the options that come with it
    )


def cases_for(model: DiffusionModel, group: SequenceParallelGroup | None = None) -> list[Case]:
    """What this model can be asked for, by the ranks of this group; None: by one."""
    possible = [
        case
        for case in [*CASES, *_of_row_groups(group or SequenceParallelGroup.single())]
        if has_audio(model) or not case.name.startswith(_AUDIO_CASES)
    ]
    return [case for case in possible if not case.own_attention or _choosing_layers(model)]


def _of_row_groups(group: SequenceParallelGroup) -> list[Case]:
    """Batches whose rows go to as many groups of ranks as there can be: every kind of input, and what ComfyUI's model decides
    for all rows together."""
    most = max(group.row_groups, default=1)
    if most == 1:
        return []
    apart = [
        dataclasses.replace(case, name=f"{case.name}, {groups} rows", batch=groups, kinds=2 if groups % 2 == 0 else 1)
        for groups in group.row_groups
        for case in (CASES if groups == most else CASES[:1])
    ]
    apart += [
        Case(f"text to video, {groups} x 2 rows", batch=2 * groups, text_mask=True, kinds=2)
        for groups in group.row_groups
    ]
    together = [
        Case("unlike masks of clips", batch=most, mask="mixed", kinds=1),
        Case("one clip inpainted", batch=most, mask="space in one", kinds=1),
        Case(
            "small-grid guides of some clips",
            batch=most,
            guides=1,
            dilated=True,
            guide_strength=0.7,
            mask="mixed",
            kinds=1,
        ),
        Case("sound of one clip given", batch=most, kinds=1, given_audio=True),
    ]
    return apart + together


def _choosing_layers(model: DiffusionModel) -> list[Any]:
    """The blocks' attention modules, in versions where a layer can ask for an attention of its own."""
    parts = [part for block in model.transformer_blocks for part in block.children()]
    return [part.comfy_attention for part in parts if hasattr(part, "comfy_attention")]


@contextlib.contextmanager
def own_attention_of(model: DiffusionModel, case: Case) -> Iterator[None]:
    """Let each layer ask for an attention of its own within the `with`, if the case is of that kind."""
    layers = _choosing_layers(model) if case.own_attention else []
    before = [layer.function for layer in layers]
    for layer in layers:
        layer.function = _sharper_attention
    try:
        yield
    finally:
        for layer, function in zip(layers, before):
            layer.function = function


def _sharper_attention(*args: Any, **kwargs: Any) -> Tensor:
    """An attention like no other, whose answer to a query depends on all of them. It takes what ComfyUI's kernels do."""
    from comfy.ldm.modules.attention import attention_pytorch

    query, key, value = (part if isinstance(part, Tensor) else part.take() for part in args[:3])
    query = 1.5 * query / (1.0 + query.abs().mean(1, keepdim=True))
    return attention_pytorch(query, key, value, *args[3:], **kwargs)


def forward_arguments(
    model: DiffusionModel, case: Case, device: torch.device, seed: int = 1
) -> tuple[tuple[object, ...], dict[str, Any]]:
    """Arguments of a ComfyUI LTX model's forward, as its sampler would call it. Fresh tensors each time."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    batch = case.batch
    frames = _FRAMES + case.guides
    if case.dilated:
        height, width = 2 * _HEIGHT, 2 * _WIDTH
    else:
        height, width = _HEIGHT, _WIDTH
    video = randn(batch, model.in_channels, frames, height, width)
    # Rows of one sampling have one sigma, by which they may go to different ranks.
    sigma = torch.linspace(0.75 if case.kinds else 0.6, 0.75 if case.kinds else 0.9, batch).to(device)
    kwargs: dict[str, Any] = {"frame_rate": _FRAME_RATE, "transformer_options": dict(case.options)}
    if case.kinds:
        kwargs["transformer_options"].update(cond_or_uncond=list(range(case.kinds)), uuids=list(range(case.kinds)))
    kwargs["context"] = randn(batch, _TEXT_TOKENS, text_width(model))
    kwargs["attention_mask"] = None
    if case.text_mask:
        kwargs["attention_mask"] = torch.ones(batch, _TEXT_TOKENS, dtype=torch.int64, device=device)
        kwargs["attention_mask"][:, 4:] = 0

    timestep = sigma
    if case.mask or case.guides:
        mask = _denoise_mask(case, batch, frames, height, width).to(device)
        kwargs["denoise_mask"] = mask
        timestep = model.patchifier.patchify(mask * sigma.view(-1, 1, 1, 1, 1))[0]
    if case.guides:
        kwargs.update(_guide_arguments(case, batch, height, width, device))
    if case.generated_keyframes:
        kwargs["generated_keyframes"] = {
            "first_latent_frame": 1,
            "num_keyframes": 1,
            "tokens_per_frame": height * width,
        }
    if not has_audio(model):
        return (video, timestep), kwargs
    streams = [video]
    if case.audio:
        streams.append(randn(batch, model.num_audio_channels, _AUDIO_TOKENS, model.audio_frequency_bins))
    if case.reference_audio:
        kwargs["ref_audio"] = {"tokens": randn(1, _REFERENCE_TOKENS, model.audio_in_channels)}
    audio_sigma = sigma
    if case.given_audio:
        audio_sigma = torch.where(torch.arange(batch, device=device) == 0, 0.0, sigma)
    return (streams, (timestep, audio_sigma)), kwargs


def _denoise_mask(case: Case, batch: int, frames: int, height: int, width: int) -> Tensor:
    mask = torch.ones(batch, 1, frames, height, width)
    if case.mask == "frame":
        mask[:, :, 0] = 0.0
    elif case.mask == "space":
        mask[:, :, 1, 1:, 2:4] = 0.3
    elif case.mask == "mixed":
        mask[::2, :, 0] = 0.0
    elif case.mask == "space in one":
        mask[-1:, :, 1, 1:, 2:4] = 0.3
    if case.guides:
        mask[:, :, -case.guides :] = 1.0 - min(case.guide_strength, 1.0)
        if case.dilated:  # only every second row and column holds a token; -1 takes the others out of the sequence
            sparse = torch.full_like(mask[:, :, -case.guides :], -1.0)
            sparse[..., ::2, ::2] = 1.0 - case.guide_strength
            if case.mask == "mixed":
                sparse[1:] = 1.0 - case.guide_strength
            mask[:, :, -case.guides :] = sparse
    return mask


def _guide_arguments(case: Case, batch: int, height: int, width: int, device: torch.device) -> dict[str, object]:
    """Positions of the guides' tokens, at 8 x 32 x 32 pixels a token, and their strengths, one entry a guide frame."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    tokens = height * width
    starts = [
        torch.stack([torch.full((tokens,), 8 * (2 * guide + 1)), rows.flatten() * 32, columns.flatten() * 32])
        for guide in range(case.guides)
    ]
    start = torch.cat(starts, dim=1)
    positions = torch.stack([start, start + torch.tensor([8, 32, 32])[:, None]], dim=-1)[None].expand(batch, -1, -1, -1)
    pixel_mask = None
    if case.guide_pixel_mask:
        pixel_mask = torch.linspace(0.0, 1.0, height * width * 4).view(1, 1, 1, 2 * height, 2 * width)
    entries = [
        {
            "pre_filter_count": tokens,
            "strength": case.guide_strength,
            "pixel_mask": pixel_mask,
            "latent_shape": [1, height, width],
        }
        for _ in range(case.guides)
    ]
    return {"keyframe_idxs": positions.to(device).float(), "guide_attention_entries": entries}


def call(model: DiffusionModel, case: Case, device: torch.device) -> list[Tensor]:
    """The model's answer to a case in float32."""
    return answer(model, *forward_arguments(model, case, device))


def answer(model: DiffusionModel, args: tuple[object, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What the model's forward gives: video, and audio if there is any."""
    accepted = inspect.signature(model.forward).parameters
    assert "kwargs" in accepted or set(kwargs) <= set(accepted)
    out = model(*args, **kwargs)
    return [tensor.clone() for tensor in (out if isinstance(out, (list, tuple)) else [out])]


def errors_by_case(
    model: DiffusionModel, group: SequenceParallelGroup, device: torch.device, as_projected: bool = True
) -> dict[str, float | str]:
    """The relative error of each case, sharded over the group against whole in one process.

    model: any ComfyUI LTX model; a tiny one, because the whole runs on every rank too. as_projected: see `shared`.
    Returns the errors on rank 0, in place of one what the model said when it could not be sharded at all; elsewhere they
    mean nothing. A case that the model does not run whole either is left out: there is no picture of it to be had. Raises
    SelfTestError if it runs none. Collective.
    """
    errors: dict[str, float | str] = {}
    refused = ""
    with torch.inference_mode(), ieee_float32():
        for number, case in enumerate(cases_for(model, group)):
            # In turn with all heads at once and in groups, as large videos have them.
            in_turn = dataclasses.replace(group, head_groups=1 + number % 2)
            try:
                with own_attention_of(model, case):
                    whole = call(model, case, device)
            except Exception as error:  # of the installed ComfyUI, and the same on every rank
                if is_out_of_memory(error):
                    raise
                refused = f"{type(error).__name__}: {error}"
                logger.warning("%s is not tried: ComfyUI's own model does not run it (%s)", case.name, refused)
                continue
            try:
                with own_attention_of(model, case), shared(model, in_turn, as_projected=as_projected):
                    in_shards = call(model, case, device)
            except Exception as error:  # whatever an unknown model says to being sharded is the verdict
                logger.info("%s cannot be sharded: %s", case.name, traceback.format_exc())
                errors[case.name] = f"{type(error).__name__}: {error}"
                continue
            assert len(whole) == len(in_shards)
            errors[case.name] = worst_error(in_shards, whole)
    if not errors:
        raise SelfTestError(f"ComfyUI's own model runs no kind of input, so that nothing can be compared: {refused}")
    return errors


@contextlib.contextmanager
def ieee_float32() -> Iterator[None]:
    """Multiply float32 as float32, whatever was chosen: TF32 has ten bits, and its rounding would hide what is looked for.

    ComfyUI's --fast and some containers choose it (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1).
    """
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions


def wrong_cases(errors: Mapping[str, float | str]) -> dict[str, float | str]:
    """Those of the cases that are not within the tolerance."""
    return {name: error for name, error in errors.items() if isinstance(error, str) or not error <= TOLERANCE}


def check_errors(errors: Mapping[str, float | str], about: str) -> None:
    """Raises SelfTestError, naming what differs and by how much, unless all errors are within the tolerance.

    about: the ComfyUI version and the model's.
    """
    wrong = wrong_cases(errors)
    if wrong:
        named = "; ".join(
            f"{name} ({error})" if isinstance(error, str) else f"{name} by {error:.1e}" for name, error in wrong.items()
        )
        raise SelfTestError(
            f"{about}: on several ranks its model would give another picture than on one; these differ: {named} (allowed "
            f"{TOLERANCE:.0e}). This ComfyUI's model is not one that RayLTX knows: update RayLTX, or use one GPU until then"
        )
