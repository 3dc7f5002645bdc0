"""`rayltx bench dequant`: the time of dequantisation, against that of copying a tensor of the result's size.

For each type: ours, the gguf package's (numpy, on the CPU) and, where a checkout of ComfyUI-GGUF is given, its torch functions;
each computes in float32, of the same random blocks. The copy is into memory that is there already; the others have to find
theirs.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from rayltx.cli.bench.measurements import Clock, Measurement
from rayltx.cli.bench.report import Output, at_least, in_turn, reporting
from rayltx.devices import CPU, automatic
from rayltx.errors import InputError
from rayltx.expansion.comfyui_gguf.block_layouts import LAYOUTS
from rayltx.expansion.comfyui_gguf.dequantisation import dequantise
from rayltx.expansion.comfyui_gguf.quant_types import SCALE_OFFSETS

_COLUMNS = 4096


@dataclass(frozen=True)
class DequantOptions:
    types: Sequence[str]
    elements: int
    rounds: int
    threads: int
    dtype: str
    comfyui_gguf: Path | None


def parse_types(text: str) -> list[str]:
    """Names from "Q8_0,Q4_K", or all that there are from "all". Raises InputError."""
    known = [type.name for type in LAYOUTS]
    names = known if text == "all" else [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"types={', '.join(unknown)} must be of {', '.join(known)}, separated by commas, or all")
    return names


def run_dequant(options: DequantOptions, output: Output) -> None:
    """Print. Raises InputError."""
    at_least(rounds=(options.rounds, 1), threads=(options.threads, 1), elements=(options.elements, _COLUMNS))
    theirs = None if options.comfyui_gguf is None else _comfyui_gguf(options.comfyui_gguf)
    dtype = getattr(torch, options.dtype)
    with reporting("dequant", vars(options), output, options.threads) as report:
        torch.set_num_threads(options.threads)
        for device in dict.fromkeys((CPU, automatic())):
            for name in options.types:
                type = GGMLQuantizationType[name]
                shape = (options.elements // _COLUMNS, _COLUMNS)
                blocks = _random_blocks(type, shape[0])
                ways = _ways(type, blocks, shape, device, dtype, theirs)
                copy, source = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
                timed = {"a copy": _timed(lambda: copy.copy_(source), device)}  # noqa: B023  (called in this round)
                timed |= {way: _timed(run, device) for way, run in ways.items()}
                arms = in_turn(timed, options.rounds)
                what = f"{name} to {options.dtype}, {shape[0] * _COLUMNS} elements, on {device}"
                report.measurements.append(Measurement(what, "ms", Clock.WALL, arms))
                ours = ways["RayLTX"]()
                others = {way: torch.equal(ours, run()) for way, run in ways.items() if way != "RayLTX"}
                report.found |= {f"{name} on {device}: the same bits as {way}": same for way, same in others.items()}


def _ways(
    type: GGMLQuantizationType,
    blocks: np.ndarray,
    shape: tuple[int, int],
    device: str,
    dtype: torch.dtype,
    theirs: ModuleType | None,
) -> dict[str, Callable[[], Tensor]]:
    data = torch.from_numpy(blocks).to(device)
    ways: dict[str, Callable[[], Tensor]] = {"RayLTX": lambda: dequantise(data, type, shape, dtype)}
    if device == CPU:
        ways["gguf"] = lambda: torch.from_numpy(gguf.quants.dequantize(blocks, type)).to(dtype)
    if theirs is not None:
        ways["ComfyUI-GGUF"] = lambda: theirs.dequantize(data, type, shape, dtype=torch.float32).to(dtype)
    return ways


def _timed(run: Callable[[], object], device: str) -> Callable[[], float]:
    def milliseconds() -> float:
        started = time.perf_counter()
        run()
        if device != CPU:
            getattr(torch, device).synchronize()
        return (time.perf_counter() - started) * 1e3

    return milliseconds


def _random_blocks(type: GGMLQuantizationType, rows: int) -> np.ndarray:
    """(rows, bytes of _COLUMNS elements) uint8 with scales near 0.01."""
    block_size, type_size = GGML_QUANT_SIZES[type]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (rows * _COLUMNS // block_size, type_size), dtype=np.uint8)
    for offset in SCALE_OFFSETS.get(type, ()):
        scales = generator.normal(0, 0.01, (len(blocks), 1)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def _comfyui_gguf(folder: Path) -> ModuleType:
    """Its `dequant.py`, which needs nothing else of it."""
    path = folder / "dequant.py"
    if not path.is_file():
        raise InputError(f"comfyui-gguf={folder}: there is no ComfyUI-GGUF in that folder (no dequant.py)")
    spec = importlib.util.spec_from_file_location("comfyui_gguf_dequant", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
