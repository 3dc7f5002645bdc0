"""How long a second prompt takes before its first step: weights, workers and patches are where the first left them.

    PYTHON_OF_COMFYUI benchmarks/second_prompt.py --comfyui FOLDER [--workers 2] [--rounds 3]

Runs a real ComfyUI server on CPU ranks, with the pack in it, and listens to what it tells a browser. Prints, for the
first prompt and for later ones (another seed each), the time from the prompt's start to its first step's, in seconds and
as a share of a step; and the same with ComfyUI's own loader in one process.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "importable"), str(ROOT / "tests")]

from comfy_models import save_tiny_checkpoint, set_up_comfyui  # noqa: E402
from comfy_server import Graph, Server  # noqa: E402

WIDTH, HEADS, LAYERS = 1024, 16, 8
LATENT = {"seed": 3, "batch": 1, "channels": 128, "frames": 9, "height": 16, "width": 16}
STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    set_up_comfyui(str(arguments.comfyui))
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models" / "diffusion_models"
        models.mkdir(parents=True)
        save_tiny_checkpoint(
            models / "model.safetensors", "LTX-Video", num_layers=LAYERS, num_attention_heads=HEADS,
            attention_head_dim=WIDTH // HEADS, cross_attention_dim=WIDTH,
        )  # fmt: skip
        server = Server(arguments.comfyui, Path(folder))
        try:
            for name, workers in ((f"{arguments.workers} workers", arguments.workers), ("ComfyUI alone", 0)):
                starts, steps = zip(*(_times(server, workers, seed) for seed in range(arguments.rounds + 1)))
                step, later = statistics.median(steps), statistics.median(starts[1:])
                print(f"{name}: a step {step:.2f} s; before the first step of the first prompt {starts[0]:.2f} s, of the "
                      f"second {later:.3f} s = {later / step:.1%} of a step", flush=True)  # fmt: skip
        finally:
            server.stop()


def _times(server: Server, workers: int, seed: int) -> tuple[float, float]:
    """Seconds from the prompt's start to its first step's, and of a step."""
    graph, progress, started = _graph(workers, seed), [], []

    def listen(kind: str, data: dict) -> None:
        if kind == "execution_start":
            started.append(time.monotonic())
        elif kind == "progress" and data["max"] == STEPS and data["value"] > 0:
            progress.append(time.monotonic())

    server.watch(graph.nodes, listen)
    step = statistics.median(b - a for a, b in itertools.pairwise(progress))
    return max(0.0, progress[0] - started[0] - step), step


def _graph(workers: int, seed: int) -> Graph:
    graph = Graph()
    text = graph.add("TestConditioning", seed=1, width=48, masked=3)[0]
    latent = graph.add("TestLatent", **LATENT)[0]
    if workers:
        init = graph.add(
            "RayInitializer", ray_cluster_address="local", ray_cluster_namespace="default", GPU=workers,
            ulysses_degree=workers, ring_degree=1, cfg_degree=1, device="cpu",
        )[0]  # fmt: skip
        loader = graph.add("RayUNETLoader", unet_name="model.safetensors", weight_dtype="default", ray_actors_init=init)
        model = loader[1]
    else:
        model = graph.add("UNETLoader", unet_name="model.safetensors", weight_dtype="default")[0]
    sampled = graph.add(
        "KSampler", model=model, seed=seed, steps=STEPS, cfg=1.0, sampler_name="euler", scheduler="simple", positive=text,
        negative=text, latent_image=latent, denoise=1.0,
    )[0]  # fmt: skip
    graph.add("TestSave", latent=sampled, name="benchmark")
    return graph


if __name__ == "__main__":
    main()
