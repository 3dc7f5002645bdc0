"""Time of dequantisation, as a multiple of copying a tensor of the result's size.

    python benchmarks/dequantisation.py [--elements 16777216] [--rounds 7] [--threads 1 2] [--comfyui-gguf PATH]

For every type: ours, the gguf package's (numpy, on the CPU) and, where a checkout of ComfyUI-GGUF is given, its torch
functions; each to float32, computed in float32, of the same random blocks. The arms run in turn; medians are printed.
The copy is into memory that is there already; the others have to find theirs. On a GPU, too, where there is one.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).resolve().parents[1] / "importable"))

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from rayltx.expansion.comfyui_gguf.block_layouts import LAYOUTS
from rayltx.expansion.comfyui_gguf.dequantisation import dequantise
from rayltx.expansion.comfyui_gguf.quant_types import SCALE_OFFSETS

COLUMNS = 4096


def random_blocks(type: GGMLQuantizationType, rows: int) -> np.ndarray:
    """(rows, bytes of COLUMNS elements) uint8 with scales near 0.01."""
    block_size, type_size = GGML_QUANT_SIZES[type]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (rows * COLUMNS // block_size, type_size), dtype=np.uint8)
    for offset in SCALE_OFFSETS.get(type, ()):
        scales = generator.normal(0, 0.01, (len(blocks), 1)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def load_comfyui_gguf(folder: Path) -> ModuleType:
    """Its `dequant.py`, which needs nothing else of it."""
    spec = importlib.util.spec_from_file_location("comfyui_gguf_dequant", folder / "dequant.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(arms: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, after one round that does not count.

    Run in turn, each round beginning with another: threads that one leaves spinning slow down the next.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        turn = list(arms.items())
        for name, run in turn[number % len(turn) :] + turn[: number % len(turn)]:
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def arms_of(
    type: GGMLQuantizationType, elements: int, device: torch.device, dtype: torch.dtype, theirs: ModuleType | None
) -> dict[str, Callable[[], object]]:
    shape = (elements // COLUMNS, COLUMNS)
    blocks = random_blocks(type, shape[0])
    data = torch.from_numpy(blocks).to(device)
    source, target = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
    arms: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "ours": lambda: dequantise(data, type, shape, dtype),
    }
    if device.type == "cpu":
        arms["gguf"] = lambda: torch.from_numpy(gguf.quants.dequantize(blocks, type)).to(dtype)
    if theirs is not None:
        arms["ComfyUI-GGUF"] = lambda: theirs.dequantize(data, type, shape, dtype=torch.float32).to(dtype)
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=2**24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--comfyui-gguf", type=Path)
    arguments = parser.parse_args()
    theirs = load_comfyui_gguf(arguments.comfyui_gguf) if arguments.comfyui_gguf else None
    dtype = getattr(torch, arguments.dtype)
    places = [(torch.device("cpu"), threads) for threads in dict.fromkeys(arguments.threads)]
    if torch.cuda.is_available():
        places.append((torch.device("cuda"), torch.get_num_threads()))
    for device, threads in places:
        torch.set_num_threads(threads)
        print(f"{device}, {threads} thread(s), {arguments.elements} elements to {arguments.dtype}; multiples of a copy")
        for type in LAYOUTS:
            medians = measure(arms_of(type, arguments.elements, device, dtype, theirs), arguments.rounds, device)
            copy = medians.pop("copy")
            shown = "  ".join(f"{name} {seconds / copy:6.2f}" for name, seconds in medians.items())
            print(f"  {type.name:7s} copy {copy * 1e3:7.2f} ms  {shown}", flush=True)


if __name__ == "__main__":
    main()
