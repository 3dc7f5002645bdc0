"""Host memory of several workers on ComfyUI's model: loaded, unloaded, loaded again, LoRA on and off.

    PYTHON_OF_COMFYUI benchmarks/comfyui_memory.py --comfyui FOLDER [--gib 1.1] [--workers 4] [--changes 10] [--type Q8_0]

Prints the workers' physical memory (PSS, which counts a shared page once among its users) at each point, as multiples of
the file above what the interpreters take. Runs on CPU ranks. Needs Linux, and a Python that can import that ComfyUI.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "importable"))

import torch

from rayltx.comfy_dist.main_process.headless import comfyui_cluster, sample_with_comfyui
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.expansion.comfyui_gguf.convert import convert
from rayltx.sequence_parallel.partition import ParallelConfig

WIDTH, HEADS = 2048, 32  # of LTX-Video 2B
BYTES = {"Q8_0": 34 / 32, "Q4_0": 18 / 32}  # a weight takes
SMALL_WIDTH = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--gib", type=float, default=1.1)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--changes", type=int, default=10)
    parser.add_argument("--type", help="of a GGUF file, such as Q8_0; without it, float32 in safetensors")
    arguments = parser.parse_args()
    request = ClusterRequest(workers=arguments.workers)
    with comfyui_cluster(arguments.comfyui, request) as cluster, tempfile.TemporaryDirectory() as folder:
        from rayltx.comfy_dist.main_process.placement import Placement
        from rayltx.comfy_dist.main_process.twin import load_twin
        from rayltx.comfy_dist.tiny_checkpoints import save_tiny_checkpoint

        path = Path(folder) / "model.safetensors"
        layers = -(-int(arguments.gib * 2**30) // int(16 * WIDTH**2 * BYTES.get(arguments.type, 4)))
        save_tiny_checkpoint(
            path, "LTX-Video", num_layers=layers, num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS,
            cross_attention_dim=WIDTH, dtype=torch.bfloat16 if arguments.type else torch.float32,
        )  # fmt: skip
        if arguments.type:
            convert(path, path.with_suffix(".gguf"), arguments.type)
            path.unlink()
            path = path.with_suffix(".gguf")
        size = path.stat().st_size
        # ComfyUI imports much of itself only when a model is first loaded and sampled: all of that is interpreter.
        small = Path(folder) / "small.safetensors"
        save_tiny_checkpoint(small, "LTX-Video")
        if arguments.type:
            convert(small, small.with_suffix(".gguf"), arguments.type)
            small = small.with_suffix(".gguf")
        config = ParallelConfig(arguments.workers, 1)
        twin = load_twin(str(small), Placement(cluster.request, config))
        _sample(_with_lora(twin, SMALL_WIDTH, 0))
        twin.link.remote.release()
        interpreters = sum(cluster.memory())
        print(
            f"file {size / 2**30:.2f} GiB, {arguments.workers} workers, interpreters {interpreters / 2**20:.0f} MiB",
            flush=True,
        )

        def report(when: str) -> None:
            pss = sum(cluster.memory())
            print(f"{when:28s} interpreters + {(pss - interpreters) / size:.3f} x the file", flush=True)

        twin = load_twin(str(path), Placement(cluster.request, config))
        digest = twin.link.remote.digest()
        report("loaded, every byte read")
        _sample(twin)
        report("sampled")
        twin.link.memory.unload()
        report("unloaded")
        _sample(twin)
        report("sampled again")
        for change in range(arguments.changes):
            _sample(_with_lora(twin, WIDTH, change))
            if change == 0:
                report("with a LoRA on 2 layers")
            _sample(twin)
        report(f"LoRA on and off {arguments.changes} times")
        unchanged = twin.link.remote.digest() == digest
        print(f"the shared bytes are {'unchanged' if unchanged else 'CHANGED'}")


def _sample(twin: object) -> None:
    generator = torch.Generator().manual_seed(0)
    side = {"context": torch.randn(1, 8, 48, generator=generator), "frame_rate": 25.0}
    noise = {"video": torch.randn(1, 128, 2, 4, 4, generator=generator)}
    sample_with_comfyui(twin, noise, torch.tensor([1.0, 0.5, 0.0]), side, None, 1.0, lambda step, latents: None)


def _with_lora(twin: object, width: int, seed: int) -> object:
    import comfy.sd

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_v"):
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(8, width, generator=generator) * 0.1
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(width, 8, generator=generator) * 0.1
    return comfy.sd.load_lora_for_models(twin, None, tensors, 1.0, 0)[0]


if __name__ == "__main__":
    main()
