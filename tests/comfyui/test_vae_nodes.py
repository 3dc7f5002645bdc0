"""VAEs on the workers in a real ComfyUI server: its own nodes, and ours for older graphs, against its own Load VAE."""

from __future__ import annotations

import pytest
from comfy_checkout import find_comfyui
from comfy_models import save_tiny_bundle, save_tiny_checkpoint, save_tiny_vae
from comfy_scenarios import SAMPLING_TOLERANCE
from comfy_server import PromptFailed, Server
from comfy_workflows import HEIGHT, WIDTH, Workflow, error_of, ksampler

VERSION = "LTX-2.3"
BUNDLE = "bundle.safetensors"


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    base = tmp_path_factory.mktemp("vae nodes")
    models = base / "models"
    for folder in ("checkpoints", "diffusion_models", "vae"):
        (models / folder).mkdir(parents=True)
    save_tiny_bundle(models / "checkpoints" / BUNDLE, VERSION)
    save_tiny_checkpoint(models / "diffusion_models" / f"{VERSION}.safetensors", VERSION)
    for kind in ("convolutions", "sound"):
        save_tiny_vae(models / "vae" / f"{kind}.safetensors", kind)
    save_tiny_vae(models / "checkpoints" / "sound.safetensors", "sound")
    server = Server(find_comfyui(), base)
    yield server
    server.stop()


def whole_vae(work, kind):
    return work.add("VAELoader", vae_name=f"{kind}.safetensors")[0]


def ray_vae(work, kind, **more):
    """RAY_VAE and VAE."""
    return work.add("RayVAELoader", vae_name=f"{kind}.safetensors", ray_actors_init=work.init(2), **more)


def decode(work, vae):
    return {"pixels": work.add("VAEDecode", samples=work.video, vae=vae)[0]}


def decode_tiled(work, vae):
    numbers = {"tile_size": 128, "overlap": 32, "temporal_size": 8, "temporal_overlap": 4}
    return {"pixels": work.add("VAEDecodeTiled", samples=work.video, vae=vae, **numbers)[0]}


def encode(work, vae):
    image = work.add("TestImage", seed=4, width=32 * WIDTH, height=32 * HEIGHT, count=9)[0]
    return {"latent": work.add("VAEEncode", pixels=image, vae=vae)[0]}


def encode_tiled(work, vae):
    image = work.add("TestImage", seed=4, width=32 * WIDTH, height=32 * HEIGHT, count=17)[0]
    numbers = {"tile_size": 128, "overlap": 32, "temporal_size": 8, "temporal_overlap": 8}
    return {"latent": work.add("VAEEncodeTiled", pixels=image, vae=vae, **numbers)[0]}


def image_to_video(work, vae):
    image = work.add("TestImage", seed=4, width=32 * WIDTH, height=32 * HEIGHT, count=1)[0]
    made = work.add("LTXVImgToVideoInplace", vae=vae, image=image, latent=work.video, strength=1.0, bypass=False)
    return {"latent": made[0]}


def save(work, kept, name):
    if "pixels" in kept:
        work.add("TestSaveImage", image=kept["pixels"], name=name)
    else:
        work.save(kept["latent"], name)


def test_without_workers_it_is_said_what_to_connect(server):
    """The first graph of this server."""
    work = Workflow(VERSION)
    vae = work.add("RayVAELoader", vae_name="convolutions.safetensors")[1]
    save(work, decode(work, vae), "never")
    with pytest.raises(PromptFailed) as error:
        server.run(work.nodes)
    assert "no workers run that could take it" in error.value.message


@pytest.mark.parametrize("use", [decode, decode_tiled, encode, encode_tiled, image_to_video], ids=lambda f: f.__name__)
def test_standard_nodes_take_the_vae(server, use):
    for name, load in (("whole", whole_vae), ("shared", lambda work, kind: ray_vae(work, kind)[1])):
        work = Workflow(VERSION)
        save(work, use(work, load(work, "convolutions")), f"{use.__name__}, {name}")
        server.run(work.nodes)
    error = error_of(server, f"{use.__name__}, shared", f"{use.__name__}, whole")
    assert error <= (2e-6 if use is decode else 0.0)


def test_sound_is_decoded_and_encoded(server):
    for name in ("whole", "shared"):
        work = Workflow(VERSION)
        if name == "shared":
            vae = ray_vae(work, "sound")[1]
        else:
            vae = work.add("LTXVAudioVAELoader", ckpt_name="sound.safetensors")[0]
        sound = work.add("TestSound", seconds=1)[0]
        latent = work.add("LTXVAudioVAEEncode", audio=sound, audio_vae=vae)[0]
        work.save(latent, f"sound, {name}")
        heard = work.add("LTXVAudioVAEDecode", samples=latent, audio_vae=vae)[0]
        work.save(work.add("LTXVAudioVAEEncode", audio=heard, audio_vae=vae)[0], f"heard, {name}")
        server.run(work.nodes)
    assert error_of(server, "sound, shared", "sound, whole") <= 1e-6
    assert error_of(server, "heard, shared", "heard, whole") <= 1e-5


def test_the_node_of_older_graphs_gives_comfyuis_tiles(server):
    numbers = {"tile_size": 128, "overlap": 32, "temporal_size": 8, "temporal_overlap": 4}
    work = Workflow(VERSION)
    save(work, decode_tiled(work, whole_vae(work, "convolutions")), "tiles, whole")
    server.run(work.nodes)
    work = Workflow(VERSION)
    actors, _ = work.actors(2)
    for name, more in (("by name", {}), ("by RAY_VAE", {"ray_vae": ray_vae(work, "convolutions")[0]})):
        pixels = work.add(
            "RayVAEDecodeDistributed", ray_actors=actors, samples=work.video, vae_name="convolutions.safetensors",
            **numbers, **more,
        )[0]  # fmt: skip
        save(work, {"pixels": pixels}, f"tiles, {name}")
    server.run(work.nodes)
    for name in ("by name", "by RAY_VAE"):
        assert error_of(server, f"tiles, {name}", "tiles, whole") == 0.0


def test_a_whole_graph_of_one_file_runs_on_the_workers(server):
    for name in ("whole", "shared"):
        work = Workflow(VERSION, audio=False)
        if name == "whole":
            loaded = work.add("CheckpointLoaderSimple", ckpt_name=BUNDLE)
        else:
            loaded = work.add("RayCheckpointLoader", ckpt_name=BUNDLE, ray_actors_init=work.init(2))
        image = work.add("TestImage", seed=4, width=32 * WIDTH, height=32 * HEIGHT, count=1)[0]
        start = work.add(
            "LTXVImgToVideoInplace", vae=loaded[2], image=image, latent=work.video, strength=0.8, bypass=False
        )[0]
        audio = work.add("TestAudioLatent", batch=1, tokens=11)[0]
        both = work.add("LTXVConcatAVLatent", video_latent=start, audio_latent=audio)[0]
        video = work.add("LTXVSeparateAVLatent", av_latent=ksampler(work, loaded[0], both))[0]
        save(work, {"pixels": work.add("VAEDecode", samples=video, vae=loaded[2])[0]}, f"graph, {name}")
        server.run(work.nodes)
    assert error_of(server, "graph, shared", "graph, whole") <= 4 * SAMPLING_TOLERANCE


def test_a_vae_outlives_its_workers(server):
    """Kill Ray in between: the next decode starts workers, and brings the VAE there."""
    work = Workflow(VERSION)
    save(work, decode(work, ray_vae(work, "convolutions")[1]), "before")
    server.run(work.nodes)
    end = Workflow(VERSION)
    end.add("RayKill", ray_actors=end.actors()[0], kill_mode="Kill Entire Cluster")
    server.run(end.nodes)
    again = Workflow(VERSION)
    save(again, decode(again, ray_vae(again, "convolutions")[1]), "after")
    server.run(again.nodes)
    assert error_of(server, "after", "before") <= 2e-6
