"""Every format of weights: as close to ComfyUI as ComfyUI is to itself after a change of its input by 1e-7.

RAYLTX_WRITE_TABLES=FILE writes the table.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import comfy_scenarios as scenarios
import pytest
import torch
from comfy_models import CONFIGS, quantise, save_tiny_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from slow_cases import slow

from rayltx.diffusion_models.lightricks.relative_error import relative_error, worst_error
from rayltx.expansion.comfyui_gguf.convert import convert
from rayltx.sequence_parallel.partition import ParallelConfig

pytestmark = pytest.mark.comfyui
VERSION = "LTX-2.3"
# Wide enough for the blocks and groups of all formats.
WIDTHS = {
    "attention_head_dim": 64, "cross_attention_dim": 256, "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 256, "connector_attention_head_dim": 64, "audio_connector_attention_head_dim": 64,
}  # fmt: skip
CHANGE, CHANGES = 1e-7, 4
ROOM = 10  # times what such a change does: other sums change more inputs than one

# By name: what ComfyUI's `comfy_quant` says of a layer, and how its layout quantises.
QUANTISED = {
    "fp8 scaled, per layer": ({"format": "float8_e4m3fn"}, {}),
    "mxfp8": ({"format": "mxfp8"}, {}),
    "nvfp4": ({"format": "nvfp4"}, {}),
    "int8": ({"format": "int8_tensorwise"}, {"per_channel": True}),
    "int8-convrot": (
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
        {"per_channel": True, "convrot": True, "convrot_groupsize": 256},
    ),
    "convrot-w4a4": ({"format": "convrot_w4a4", "convrot_groupsize": 256}, {}),
    "asym-w4a8": ({"format": "asym_w4a8_int8"}, {}),
}
PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = ["mxfp8", "int8-convrot", *slow(
    *PLAIN, "fp8 raw", "fp8 scaled, one file", *(name for name in QUANTISED if name not in ("mxfp8", "int8-convrot")),
    "GGUF Q8_0", "GGUF Q5_1", "GGUF Q4_0",
)]  # fmt: skip


def save_in(path: Path, name: str) -> tuple[Path, Path]:
    """A tiny checkpoint in a format. Returns the file for us, and the one for ComfyUI's own loader."""
    config = {**CONFIGS[VERSION], **WIDTHS}
    save_tiny_checkpoint(path, VERSION, dtype=PLAIN.get(name, torch.float32), **{k: config[k] for k in WIDTHS})
    if name in QUANTISED:
        quantise_layers(path, *QUANTISED[name])
    elif name.startswith("fp8"):
        quantise(path, scaled="scaled" in name)
    elif name.startswith("GGUF"):
        gguf, plain = path.with_suffix(".gguf"), path.with_name("plain.safetensors")
        convert(path, gguf, name.split()[1])
        convert(gguf, plain, "float32")
        return gguf, plain
    return path, path


def quantise_layers(path: Path, about: dict, how: dict) -> None:
    """Make the blocks' matrices what ComfyUI calls a quantised layer."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    if about["format"] not in QUANT_ALGOS:
        pytest.skip(f"this ComfyUI has no {about['format']}")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors, layout = load_file(path), QUANT_ALGOS[about["format"]]["comfy_tensor_layout"]
    for name in [n for n in tensors if ".transformer_blocks." in n and n.endswith(".weight") and tensors[n].ndim == 2]:
        if "gate_logits" in name or "table" in name:
            continue
        try:
            quantised = QuantizedTensor.from_float(tensors[name], layout, **how)
        except (TypeError, ValueError) as error:
            pytest.skip(f"this comfy-kitchen cannot make it: {error}")
        tensors.update({key: tensor.contiguous() for key, tensor in quantised.state_dict(name).items()})
        mark = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
        tensors[name.removesuffix("weight") + "comfy_quant"] = mark
    save_file(tensors, path, metadata)


def moved(tensor: torch.Tensor, seed: int = 9) -> torch.Tensor:
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return tensor * (1 + CHANGE * noise)


def forward_moves(model) -> list[float]:
    """How far one forward of ComfyUI's own model moves, video and audio, when its inputs change by CHANGE."""
    from rayltx.comfy_dist.self_test import Case, answer, forward_arguments

    answers = []
    for change in (lambda tensor: tensor, moved):
        (x, timestep), kwargs = forward_arguments(model, Case("text to video"), torch.device("cpu"))
        kwargs["context"] = change(kwargs["context"])
        answers.append(answer(model, ([change(stream) for stream in x], timestep), kwargs))
    return [relative_error(b, a) for a, b in zip(*answers)]


def sample(model, change=lambda tensor: tensor):
    work = scenarios.Workspace(VERSION, {**CONFIGS[VERSION], **WIDTHS})
    for side in (work.positive, work.negative):
        side[0][0] = change(side[0][0])
    return scenarios.tensors_of(scenarios.ksampler(model, work))


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_as_close_as_it_is_to_itself(cluster, tmp_path, table, name):
    import comfy.sd

    from rayltx.comfy_dist.main_process.placement import Placement
    from rayltx.comfy_dist.main_process.twin import load_twin

    path, plain = save_in(tmp_path / "model.safetensors", name)
    with torch.inference_mode():
        whole = comfy.sd.load_diffusion_model(str(plain))
        expected = sample(whole)
        # Several: with few bits most changes move nothing, and some all.
        changes = [functools.partial(moved, seed=seed) for seed in range(9, 9 + CHANGES)]
        after_a_change = max(worst_error(sample(whole, change), expected) for change in changes)
        video, audio = forward_moves(whole.model.diffusion_model)
        twin = load_twin(str(path), Placement(cluster.request, ParallelConfig(2, 1)))
        error = worst_error(sample(twin), expected)
        twin.link.remote.release()
    row = f"| {name} | {video:.1e} | {audio:.1e} | {after_a_change:.1e} | {error:.1e} |"
    print(row)
    table.append(row)
    assert all(torch.isfinite(stream).all() for stream in expected)
    assert error <= max(scenarios.SAMPLING_TOLERANCE, ROOM * after_a_change)
