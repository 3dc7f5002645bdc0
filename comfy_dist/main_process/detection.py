"""What ComfyUI makes of a checkpoint, found from its header: class, configuration, and the dtype of every parameter.

All decisions are made once, here, with ComfyUI's own functions, and the workers are told: a worker that decided by its
own free memory could decide otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayltx.comfy_dist.comfy_environment import comfyui_version
from rayltx.comfy_dist.comfy_names import missing_names
from rayltx.comfy_dist.comfy_types import BaseModel
from rayltx.comfy_dist.dtype_choices import FAST_FP8, WEIGHT_DTYPES
from rayltx.comfy_dist.gguf_spec import GGUFSpec, keeps_blocks
from rayltx.comfy_dist.model_spec import ComfySpec, build_base_model, missing_text_modules
from rayltx.diffusion_models.lightricks.checkpoint import Checkpoint
from rayltx.errors import CheckpointError, UnsupportedError, listed
from rayltx.expansion.comfyui_gguf.checkpoint import quantised_formats

logger = logging.getLogger(__name__)

MIN_VERSION = (0, 20)
_READ_BYTES = 4096  # tensors up to this size are read for detection: scales and formats of quantised layers


@dataclass(frozen=True)
class Detected:
    spec: ComfySpec
    base_model: BaseModel  # its parameters without memory
    state_dict: Mapping[str, Tensor]  # the parameters' names and shapes, without memory but for small ones
    dtypes: Mapping[str, torch.dtype]  # of tensors that are converted when they are read


def detect(
    checkpoint: Checkpoint, weight_dtype: str = "default", dequant_dtype: str = "default", patch_dtype: str = "default"
) -> Detected:
    """Let ComfyUI detect a checkpoint, without its weights.

    weight_dtype: as in ComfyUI's UNETLoader, and bf16 or fp16. dequant_dtype, patch_dtype: of a GGUF file, as in `GGUFSpec`.
    Raises UnsupportedError for a ComfyUI that is too old or does not know the model, CheckpointError for a file whose
    metadata and tensors disagree.
    """
    import comfy.model_detection
    import comfy.model_management
    import comfy.utils

    check_version()
    check_names()
    if weight_dtype not in WEIGHT_DTYPES:
        raise UnsupportedError(f"weight_dtype={weight_dtype!r} must be one of {', '.join(WEIGHT_DTYPES)}")
    file_tensors = header_of(checkpoint)
    tensors, metadata = dict(file_tensors), dict(checkpoint.metadata)
    gguf = GGUFSpec.of(checkpoint, dequant_dtype, patch_dtype)
    if gguf is None:
        tensors, metadata = comfy.utils.convert_old_quants(tensors, "", metadata=metadata)
    config = comfy.model_detection.model_config_from_unet(tensors, "", metadata=metadata)
    if config is None or config.unet_config.get("image_model") not in ("ltxv", "ltxav"):
        found = None if config is None else type(config).__name__
        raise UnsupportedError(
            f"{checkpoint.path}: ComfyUI {comfyui_version()} takes it for {found or 'no model that it knows'}, not for an "
            f"LTX model; {checkpoint.version} needs a newer ComfyUI, or the file lacks its `config` metadata"
        )

    dtype_name = WEIGHT_DTYPES[weight_dtype]
    asked: torch.dtype | None = None if dtype_name is None else getattr(torch, dtype_name)
    quantised = config.quant_config is not None
    supported = list(config.supported_inference_dtypes)
    unet_dtype = asked or comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(tensors),
        supported_dtypes=supported,
        weight_dtype=None if quantised else comfy.utils.weight_dtype(tensors),
    )
    manual_cast_dtype = comfy.model_management.unet_manual_cast(
        None if quantised else unet_dtype, comfy.model_management.get_torch_device(), supported
    )
    spec = ComfySpec(
        comfyui_version(),
        checkpoint.version,
        metadata,
        unet_dtype,
        manual_cast_dtype,
        fp8_optimizations=weight_dtype == FAST_FP8,
        gguf=gguf,
    )
    with without_dynamic_vram():
        base_model = build_base_model(config, spec, tensors, device=torch.device("meta"))
    tensors = config.process_unet_state_dict(tensors)
    _check_parameters(checkpoint, base_model.diffusion_model, tensors)
    dtypes = _conversions(base_model, tensors, file_tensors, spec)
    spec = dataclasses.replace(spec, weight_kinds=_weight_kinds(tensors, dtypes, spec))
    return Detected(spec, base_model, tensors, dtypes)


def check_version() -> None:
    """Raises UnsupportedError for a ComfyUI without LTX-2, or one that is too old to be sharded."""
    version = comfyui_version()
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < MIN_VERSION:
        raise UnsupportedError(
            f"ComfyUI {version} is too old: RayLTX needs {'.'.join(map(str, MIN_VERSION))} or newer; update ComfyUI"
        )


@functools.cache
def check_names() -> None:
    """Raises UnsupportedError that names what this ComfyUI does not have of what is used of it."""
    missing = missing_names()
    if missing:
        raise UnsupportedError(
            f"ComfyUI {comfyui_version()} does not have, or has otherwise: {listed(missing, most=6)}. RayLTX calls these: "
            "update RayLTX, or use the newest ComfyUI that its page of compatible versions lists"
        )


@contextlib.contextmanager
def without_dynamic_vram() -> Iterator[None]:
    """Let ComfyUI build a model as it does in a worker.

    Its main program turns dynamic VRAM on for NVIDIA cards. Linear layers then have no parameters before they are loaded, so
    what is wrong with a file's weights, and which dtype each should have, could not be found by them.
    """
    memory_management: Any = importlib.import_module("comfy.memory_management")
    before = memory_management.aimdo_enabled
    memory_management.aimdo_enabled = False
    try:
        yield
    finally:
        memory_management.aimdo_enabled = before


def header_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The checkpoint's tensors: small ones read, others shapes without memory. Blocks have the shape of their values."""
    tensors = {}
    formats = quantised_formats(checkpoint)
    with checkpoint.open() as reader:
        for name, info in checkpoint.tensors.items():
            if name in formats:
                tensors[name] = torch.empty(formats[name].shape, dtype=info.dtype, device="meta")
            elif info.num_bytes <= _READ_BYTES:
                tensors[name] = reader.read(name)
            else:
                tensors[name] = torch.empty(info.shape, dtype=info.dtype, device="meta")
    return tensors


def is_quantised(name: str, tensors: Mapping[str, object]) -> bool:
    """Whether a weight belongs to a quantised layer, whose tensors are taken as they are."""
    return f"{name.rpartition('.')[0]}.comfy_quant" in tensors


def _check_parameters(checkpoint: Checkpoint, model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for parameters that the file lacks or has in another shape.

    ComfyUI itself would warn, and sample with what happens to be in memory.
    """
    complaints = []
    left_out = tuple(f"{module}." for module in missing_text_modules(model, tensors))
    for name, parameter in model.named_parameters():
        if name.startswith(left_out):
            continue
        if name not in tensors:
            complaints.append(f"{name} is missing")
        elif not is_quantised(name, tensors) and tensors[name].shape != parameter.shape:
            complaints.append(f"{name} is {list(tensors[name].shape)} and should be {list(parameter.shape)}")
    if complaints:
        more = f", and {len(complaints) - 4} more" if len(complaints) > 4 else ""
        raise CheckpointError(
            f"{checkpoint.path}: its metadata and its tensors disagree: {'; '.join(complaints[:4])}{more}; if it was "
            "converted, convert it again with its `config` metadata kept"
        )


def _weight_kinds(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], spec: ComfySpec) -> tuple[str, ...]:
    """The dtypes and quantised formats that occur among the weights as they are held, sorted."""
    blocks = {} if spec.gguf is None else spec.gguf.formats
    held = {str(dtypes.get(name, tensor.dtype)) for name, tensor in tensors.items() if name not in blocks}
    kinds = {name.removeprefix("torch.") for name in held}
    kinds |= {found.type.name for found in blocks.values()}
    # What a quantised layer says of itself, JSON in bytes.
    kinds |= {bytes(tensor.tolist()).decode() for name, tensor in tensors.items() if name.endswith(".comfy_quant")}
    return tuple(sorted(kinds))


def _conversions(
    base_model: BaseModel, tensors: Mapping[str, Tensor], file_tensors: Mapping[str, Tensor], spec: ComfySpec
) -> dict[str, torch.dtype]:
    """The dtype of each tensor that is not in the file as ComfyUI would hold it in memory.

    ComfyUI copies weights into parameters of the dtype that it has chosen; shared weights are taken as they are, so they
    have to be converted before. Quantised layers are as the file has them, and their plain neighbours in the dtype that
    they are computed in. Of a GGUF file, layers convert what they use, and the rest is converted or dequantised here.
    """
    parameters = dict(base_model.diffusion_model.named_parameters())
    modules = dict(base_model.diffusion_model.named_modules())
    conversions = {}
    if spec.gguf is not None:
        for name, parameter in parameters.items():
            owner = modules[name.rpartition(".")[0]]
            used_as_is = name not in spec.gguf.formats and hasattr(owner, "comfy_cast_weights")
            if name not in tensors:
                continue
            if not used_as_is and not keeps_blocks(owner, name) and tensors[name].dtype != parameter.dtype:
                conversions[name] = parameter.dtype
        return conversions
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or is_quantised(name, tensors) or name not in file_tensors:
            continue
        if name in parameters:
            wanted = parameters[name].dtype
        elif name.endswith(".weight") and hasattr(modules.get(name[: -len(".weight")]), "factory_kwargs"):
            wanted = modules[name[: -len(".weight")]].factory_kwargs["dtype"]  # a plain layer among quantised ones
        else:
            continue
        if wanted != tensor.dtype:
            conversions[name] = wanted
    return conversions
