"""The pack in a real ComfyUI server: whole graphs, on the workers and with ComfyUI's own loader, in the same server."""

from __future__ import annotations

import time

import pytest
from comfy_checkout import find_comfyui
from comfy_models import CONFIGS, VERSIONS, save_tiny_bundle, save_tiny_checkpoint
from comfy_scenarios import SAMPLING_TOLERANCE
from comfy_server import PromptFailed, Server
from comfy_workflows import HEIGHT, STEPS, WIDTH, Workflow, error_of, ksampler, sampler_custom
from safetensors.torch import save_file
from slow_cases import slow

from rayltx.expansion.comfyui_gguf.convert import convert

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    import comfy_scenarios as scenarios

    from rayltx.comfy_dist.tiny_checkpoints import known_versions

    base = tmp_path_factory.mktemp("comfyui base")
    models = base / "models"
    (models / "diffusion_models").mkdir(parents=True)
    (models / "loras").mkdir()
    (models / "unet").mkdir()
    (models / "checkpoints").mkdir()
    for version in known_versions():
        save_tiny_bundle(models / "checkpoints" / f"{version} with VAE.safetensors", version)
        save_tiny_checkpoint(models / "diffusion_models" / f"{version}.safetensors", version)
        quantised = models / "unet" / f"{version}.gguf"
        convert(models / "diffusion_models" / f"{version}.safetensors", quantised, "Q8_0")
        convert(quantised, models / "diffusion_models" / f"{version} of Q8_0.safetensors")
        save_file(scenarios.make_lora(CONFIGS[version]), models / "loras" / f"{version}.safetensors")
    server = Server(find_comfyui(), base, "--preview-method", "latent2rgb")
    yield server
    server.stop()


def sampler_custom_advanced(work, model, latent=None, cfg=3.0, sampler="euler"):
    guider = work.add("CFGGuider", model=model, positive=work.positive, negative=work.negative, cfg=cfg)[0]
    chosen = work.add("KSamplerSelect", sampler_name=sampler)[0]
    noise = work.add("RandomNoise", noise_seed=5)[0]
    return work.add(
        "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=chosen, sigmas=work.sigmas(),
        latent_image=latent or work.latent(),
    )[0]  # fmt: skip


def with_image(work):
    image = work.add("TestImage", seed=4, width=32 * WIDTH, height=32 * HEIGHT, count=1)[0]
    vae = work.add("TestVAE")[0]
    work.video = work.add("LTXVImgToVideoInplace", vae=vae, image=image, latent=work.video, strength=1.0, bypass=False)[
        0
    ]
    return work.latent()


def with_mask(work):
    work.video = work.add("TestMasked", latent=work.video)[0]
    return work.latent()


def with_guide(work):
    image = work.add("TestImage", seed=4, width=32 * WIDTH, height=32 * HEIGHT, count=1)[0]
    guide = work.add(
        "LTXVAddGuide", positive=work.positive, negative=work.negative, vae=work.add("TestVAE")[0], latent=work.video,
        image=image, frame_idx=8, strength=0.5,
    )  # fmt: skip
    work.positive, work.negative, work.video = guide[0], guide[1], guide[2]
    return work.latent()


def compare(server, version, build, workers=2, ring=1, **options):
    """Sample with ComfyUI's own loader and with ours, in one prompt each."""
    outputs = []
    for kind in ("whole", "workers"):
        work = Workflow(version, **options)
        latent = build(work, work.whole() if kind == "whole" else work.actors(workers, ring)[1])
        outputs.append(f"{kind}-{len(list(server.output.iterdir()))}")
        work.save(latent, outputs[-1])
        server.run(work.nodes)
    assert error_of(server, outputs[1], outputs[0]) <= SAMPLING_TOLERANCE


STANDARD = {
    "KSampler": ksampler,
    "KSampler, cfg 1": lambda work, model: ksampler(work, model, cfg=1.0),
    "SamplerCustom uni_pc": lambda work, model: sampler_custom(work, model, sampler="uni_pc"),
    "SamplerCustomAdvanced ancestral": lambda work, model: sampler_custom_advanced(
        work, model, sampler="euler_ancestral"
    ),
    "image to video": lambda work, model: ksampler(work, model, with_image(work)),
    "inpainting": lambda work, model: ksampler(work, model, with_mask(work)),
    "guide": lambda work, model: sampler_custom_advanced(work, model, with_guide(work)),
    "LoRA": lambda work, model: ksampler(
        work,
        work.add("LoraLoaderModelOnly", model=model, lora_name=f"{work.version}.safetensors", strength_model=0.8)[0],
    ),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", STANDARD)
def test_standard_nodes_on_two_workers(server, version, case):
    compare(server, version, STANDARD[case])


@pytest.mark.parametrize("version", ["LTX-Video", "LTX-2.3"])
def test_a_batch_of_two(server, version):
    compare(server, version, ksampler, batch=2)


@pytest.mark.parametrize("version", VERSIONS)
def test_ring(server, version):
    compare(server, version, ksampler, ring=2)


# ---- one file for all


def bundled(version, kind):
    """A graph on a checkpoint in one file, image to video and back to pixels, with either loader."""
    work = Workflow(version)
    name = f"{version} with VAE.safetensors"
    if kind == "whole":
        loader = work.add("CheckpointLoaderSimple", ckpt_name=name)
    else:
        loader = work.add("RayCheckpointLoader", ckpt_name=name, ray_actors_init=work.init())
    image = work.add("TestImage", seed=4, width=32 * WIDTH, height=32 * HEIGHT, count=1)[0]
    work.video = work.add(
        "LTXVImgToVideoInplace", vae=loader[2], image=image, latent=work.video, strength=1.0, bypass=False
    )[0]
    latent = ksampler(work, loader[0], work.latent())
    work.save(latent, f"{kind} of {name}")
    video = work.add("LTXVSeparateAVLatent", av_latent=latent)[0] if work.has_audio else latent
    pixels = work.add("VAEDecode", samples=video, vae=loader[2])[0]
    work.save(work.add("VAEEncode", pixels=pixels, vae=loader[2])[0], f"{kind} of {name}, decoded")
    return work


@pytest.mark.parametrize("version", VERSIONS)
def test_a_checkpoint_in_one_file_takes_the_place_of_comfyuis_loader(server, version):
    told = "with VAE.safetensors, LTX"
    before = server.log().count(told)
    for kind in ("whole", "workers"):
        server.run(bundled(version, kind).nodes)
    for end in ("", ", decoded"):
        names = [f"{kind} of {version} with VAE.safetensors{end}" for kind in ("workers", "whole")]
        assert error_of(server, *names) <= (SAMPLING_TOLERANCE if not end else 1e-4), end
    assert server.log().count(told) == before + 1


def test_what_else_is_in_the_file_is_read_once(server):
    """Also when the loader runs again: for a LoRA, or another dtype of the model."""
    work = bundled("LTX-2.3", "workers")
    server.run(work.nodes)
    read = "with VAE.safetensors, VAE ("
    before = server.log().count(read)
    loader = next(node for node in work.nodes.values() if node["class_type"] == "RayCheckpointLoader")
    lora = work.add("RayLoraLoader", lora_name="LTX-2.3.safetensors", strength_model=0.5)[0]
    loader["inputs"]["lora"] = lora
    server.run(work.nodes)
    assert before > 0 and server.log().count(read) == before


# ---- the XFuser nodes


def xfuser_ksampler(work, actors, sigmas=None):
    extra = {} if sigmas is None else {"sigmas": sigmas}
    return work.add(
        "XFuserKSampler", ray_actors=actors, seed=5, steps=STEPS, cfg=3.0, sampler_name="euler", scheduler="simple",
        positive=work.positive, negative=work.negative, latent_image=work.latent(), denoise=1.0, **extra,
    )[0]  # fmt: skip


def xfuser_advanced(
    work, actors, latent=None, start=0, end=10000, noise="enable", leftover="disable", steps=STEPS, **more
):
    return work.add(
        "XFuserKSamplerAdvanced", add_noise=noise, noise_seed=5, steps=steps, cfg=3.0, sampler_name="euler",
        scheduler="simple", ray_actors=actors, positive=work.positive, negative=work.negative,
        latent_image=latent or work.latent(), start_at_step=start, end_at_step=end, return_with_leftover_noise=leftover,
        **more,
    )[0]  # fmt: skip


def ksampler_advanced(work, model, latent=None, start=0, end=10000, noise="enable", leftover="disable", steps=STEPS):
    return work.add(
        "KSamplerAdvanced", add_noise=noise, noise_seed=5, steps=steps, cfg=3.0, sampler_name="euler",
        scheduler="simple", model=model, positive=work.positive, negative=work.negative,
        latent_image=latent or work.latent(), start_at_step=start, end_at_step=end, return_with_leftover_noise=leftover,
    )[0]  # fmt: skip


def xfuser_custom(work, actors):
    chosen = work.add("KSamplerSelect", sampler_name="euler")[0]
    return work.add(
        "XFuserSamplerCustom", ray_actors=actors, add_noise=True, noise_seed=5, cfg=3.0, positive=work.positive,
        negative=work.negative, sampler=chosen, sigmas=work.sigmas(), latent_image=work.latent(),
    )[0]  # fmt: skip


def xfuser_custom_advanced(guider, **settings):
    def build(work, actors):
        chosen = work.add("KSamplerSelect", sampler_name="euler")[0]
        named = {name: getattr(work, value) if isinstance(value, str) and hasattr(work, value) else value
                 for name, value in settings.items()}  # fmt: skip
        guided = work.add(f"Ray{guider}", ray_actors=actors, **named)[0]
        return work.add(
            "XFuserSamplerCustomAdvanced", add_noise=True, noise_seed=5, guider=guided, sampler=chosen,
            sigmas=work.sigmas(), latent_image=work.latent(),
        )[0]  # fmt: skip

    return build


def custom_advanced(guider, **settings):
    def build(work, model):
        chosen = work.add("KSamplerSelect", sampler_name="euler")[0]
        named = {name: getattr(work, value) if isinstance(value, str) and hasattr(work, value) else value
                 for name, value in settings.items()}  # fmt: skip
        guided = work.add(guider, model=model, **named)[0]
        noise = work.add("RandomNoise", noise_seed=5)[0]
        return work.add(
            "SamplerCustomAdvanced", noise=noise, guider=guided, sampler=chosen, sigmas=work.sigmas(),
            latent_image=work.latent(),
        )[0]  # fmt: skip

    return build


GUIDERS = {
    "BasicGuider": {"conditioning": "positive"},
    "CFGGuider": {"positive": "positive", "negative": "negative", "cfg": 3.0},
    "DualCFGGuider": {"cond1": "positive", "cond2": "negative", "negative": "negative", "cfg_conds": 2.0,
                      "cfg_cond2_negative": 1.5, "style": "regular"},
}  # fmt: skip


def shifted(work, actors, name):
    kind = "ray_actors" if name.startswith("Ray") else "model"
    return work.add(name, **{kind: actors}, max_shift=2.05, base_shift=0.95, latent=work.video)[0]


XFUSER = {
    "XFuserKSampler": (xfuser_ksampler, ksampler),
    "XFuserKSampler with sigmas": (
        lambda work, actors: xfuser_ksampler(work, actors, work.sigmas()),
        sampler_custom,
    ),
    "XFuserKSamplerAdvanced": (xfuser_advanced, ksampler_advanced),
    "XFuserKSamplerAdvanced, part of the steps": (
        lambda work, actors: xfuser_advanced(work, actors, start=1, end=2, leftover="enable"),
        lambda work, model: ksampler_advanced(work, model, start=1, end=2, leftover="enable"),
    ),
    "XFuserKSamplerAdvanced without noise": (
        lambda work, actors: xfuser_advanced(work, actors, start=1, noise="disable"),
        lambda work, model: ksampler_advanced(work, model, start=1, noise="disable"),
    ),
    "XFuserSamplerCustom": (xfuser_custom, sampler_custom),
    **{
        f"XFuserSamplerCustomAdvanced, Ray{name}": (xfuser_custom_advanced(name, **s), custom_advanced(name, **s))
        for name, s in GUIDERS.items()
    },
    "RayModelSamplingLTXV": (
        lambda work, actors: xfuser_ksampler(work, shifted(work, actors, "RayModelSamplingLTXV")),
        lambda work, model: ksampler(work, shifted(work, model, "ModelSamplingLTXV")),
    ),
}


@pytest.mark.parametrize("case", [*list(XFUSER)[:5], *slow(*list(XFUSER)[5:])])
@pytest.mark.parametrize("version", ["LTX-2", *slow("LTX-Video", "LTX-2.3", "LTX-2.5")])
def test_xfuser_nodes(server, version, case):
    ours, standard = XFUSER[case]
    expected, found = Workflow(version), Workflow(version)
    expected.save(standard(expected, expected.whole()), "expected")
    found.save(ours(found, found.actors()[0]), "found")
    server.run(expected.nodes)
    server.run(found.nodes)
    assert error_of(server, "found", "expected") <= SAMPLING_TOLERANCE


@pytest.mark.parametrize("version", ["LTX-Video", "LTX-2"])
def test_two_passes_on_sigmas_are_one(server, version):
    one, two = Workflow(version), Workflow(version)
    one.save(xfuser_advanced(one, one.actors()[0], steps=4, sigmas=one.sigmas(4)), "one pass")
    actors, sigmas = two.actors()[0], two.sigmas(4)
    first = xfuser_advanced(two, actors, end=2, leftover="enable", steps=4, sigmas=sigmas)
    second = xfuser_advanced(two, actors, first, start=2, noise="disable", steps=4, sigmas=sigmas)
    two.save(second, "two passes")
    server.run(one.nodes)
    server.run(two.nodes)
    assert error_of(server, "two passes", "one pass") <= SAMPLING_TOLERANCE


def test_sigmas_win_over_steps_with_a_warning(server):
    work = Workflow("LTX-Video")
    work.save(xfuser_advanced(work, work.actors()[0], steps=7, sigmas=work.sigmas(STEPS)), "found")
    server.run(work.nodes)
    assert "steps=7 is not used: the sigmas that are connected make 3 steps" in server.log()
    expected = Workflow("LTX-Video")
    expected.save(sampler_custom(expected, expected.whole()), "expected")
    server.run(expected.nodes)
    assert error_of(server, "found", "expected") <= SAMPLING_TOLERANCE


@pytest.mark.slow
def test_every_sampler_name_runs(server):
    names = server.get("/object_info/XFuserKSamplerAdvanced")["XFuserKSamplerAdvanced"]["input"]["required"][
        "sampler_name"
    ]
    names = names[0] if isinstance(names[0], list) else names[1]["options"]
    assert len(names) > 30
    for name in names:
        work = Workflow("LTX-Video")
        latent = xfuser_advanced(work, work.actors()[0], sigmas=work.sigmas())
        work.nodes[latent[0]]["inputs"]["sampler_name"] = name
        work.save(latent, f"sampler {name}")
        server.run(work.nodes)
        assert (server.output / f"sampler {name}.safetensors").is_file()


def test_lora_nodes_give_the_same(server):
    name = "LTX-2.safetensors"
    standard, ours = Workflow("LTX-2"), Workflow("LTX-2")
    model = standard.whole()
    for strength in (0.7, -0.3):
        model = standard.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)[0]
    standard.save(ksampler(standard, model), "expected")
    first = ours.add("RayLoraLoader", lora_name=name, strength_model=0.7)[0]
    second = ours.add("RayLoraLoader", lora_name=name, strength_model=-0.3, prev_ray_lora=first)[0]
    ours.save(ksampler(ours, ours.actors(lora=second)[1]), "found")
    server.run(standard.nodes)
    server.run(ours.nodes)
    assert error_of(server, "found", "expected") <= SAMPLING_TOLERANCE


@pytest.mark.parametrize("version", VERSIONS)
def test_a_gguf_file_with_a_lora(server, version):
    """Against ComfyUI's own loader on the same values."""
    expected, found = Workflow(version), Workflow(version)
    model = expected.add("UNETLoader", unet_name=f"{version} of Q8_0.safetensors", weight_dtype="default")[0]
    lora = {"lora_name": f"{version}.safetensors", "strength_model": 0.8}
    expected.save(ksampler(expected, expected.add("LoraLoaderModelOnly", model=model, **lora)[0]), "expected")
    found.save(ksampler(found, found.gguf(lora=found.add("RayLoraLoader", **lora)[0])), "found")
    server.run(expected.nodes)
    server.run(found.nodes)
    assert error_of(server, "found", "expected") <= SAMPLING_TOLERANCE


# ---- what happens around the sampling


def loads(server):
    return server.log().count(" workers in ")


def test_weights_are_loaded_once(server):
    """Another LoRA, other degrees, another seed: the model stays where it is."""

    def run(strength, ring, seed):
        work = Workflow("LTX-Video")
        lora = work.add("RayLoraLoader", lora_name="LTX-Video.safetensors", strength_model=strength)[0]
        latent = ksampler(work, work.actors(ring=ring, lora=lora)[1])
        work.nodes[latent[0]]["inputs"]["seed"] = seed
        work.save(latent, "again")
        server.run(work.nodes)

    run(0.5, 1, 1)
    before = loads(server)
    assert before > 0
    run(0.5, 1, 2)
    run(0.6, 1, 2)
    run(0.6, 2, 2)
    assert loads(server) == before


def test_progress_and_previews_arrive(server):
    work = Workflow("LTX-Video")
    work.save(ksampler(work, work.actors()[1]), "watched")
    work.nodes["4"]["inputs"]["seed"] = int(time.time())  # nothing of it is cached
    seen = server.watch(work.nodes)
    sampler = next(number for number, node in work.nodes.items() if node["class_type"] == "KSampler")
    steps = [data["value"] for kind, data in seen if kind == "progress" and data["node"] == sampler]
    assert steps == [1, 2, 3] or steps == [0, 1, 2, 3]
    assert sum(kind == "preview" for kind, _ in seen) >= STEPS


def test_a_cancel_takes_a_moment_and_the_queue_goes_on(server):
    work = Workflow("LTX-2")
    latent = ksampler(work, work.actors()[1])
    work.nodes[latent[0]]["inputs"].update(steps=2000, seed=int(time.time()))
    work.save(latent, "cancelled")
    asked = []

    def cancel(kind, data):
        if kind == "progress" and data["node"] == latent[0] and data["value"] == 3 and not asked:
            asked.append(time.monotonic())
            server.post("/interrupt", {})

    seen = server.watch(work.nodes, cancel)
    took = time.monotonic() - asked[0]
    assert seen[-1][0] == "execution_interrupted"
    assert took < 3.0, took
    compare(server, "LTX-2", ksampler)


def test_free_unloads_and_the_next_prompt_samples(server):
    compare(server, "LTX-Video", ksampler)
    before = loads(server)
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.0)
    compare(server, "LTX-Video", ksampler)
    assert loads(server) > before  # the host's memory had been given back, too


@pytest.mark.parametrize("node, cfg", [("RayKill", 2.0), ("StopRayWorkers", 2.5)])
def test_ending_the_workers_and_sampling_again(server, node, cfg):
    """cfg: of the second graph, that ComfyUI has no answer to from before."""
    work = Workflow("LTX-Video")
    actors, model = work.actors()
    if node == "RayKill":
        work.add(node, ray_actors=actors, kill_mode="Kill Entire Cluster")
    else:
        work.add(node, after=ksampler(work, model))
    server.run(work.nodes)
    brought_back = server.log().count("the Ray workers do not have this MODEL any more")
    again = Workflow("LTX-Video")
    again.save(ksampler(again, again.actors()[1], cfg=cfg), f"after {node}")
    server.run(again.nodes)
    assert server.log().count("the Ray workers do not have this MODEL any more") == brought_back + 1
    expected = Workflow("LTX-Video")
    expected.save(ksampler(expected, expected.whole(), cfg=cfg), f"expected after {node}")
    server.run(expected.nodes)
    assert error_of(server, f"after {node}", f"expected after {node}") <= SAMPLING_TOLERANCE


# ---- three workers: another cluster in the place of the first


@pytest.mark.parametrize("ring", [1, *slow(3)])
@pytest.mark.parametrize("version", VERSIONS)
def test_three_workers(server, version, ring):
    compare(server, version, ksampler, workers=3, ring=ring)


def test_the_memory_nodes(server):
    expected = Workflow("LTX-2")
    expected.save(ksampler(expected, expected.whole()), "expected")
    server.run(expected.nodes)
    for name, inputs in (
        ("TensorParallelAttentionV2", {"num_gpus": 2, "primary_gpu": 0, "parallelize_ffn": True, "ffn_chunks": 4}),
        ("TensorParallelV5Node", {"num_gpus": 3}),
        ("TensorParallelV3Node", {"ffn_chunks": 4}),
    ):
        work = Workflow("LTX-2")
        model = work.add(name, model=work.actors(workers=3)[1], verbose=1, **inputs)
        work.save(ksampler(work, model[0]), "found")
        work.add("PreviewAny", source=model[1])
        server.run(work.nodes)
        assert error_of(server, "found", "expected") <= SAMPLING_TOLERANCE


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_workers_that_map_the_file_itself(server, kind):
    """A cluster of its own, without the object store for weights. The values of both files are the same."""
    expected, found = Workflow("LTX-2"), Workflow("LTX-2")
    model = expected.add("UNETLoader", unet_name="LTX-2 of Q8_0.safetensors", weight_dtype="default")[0]
    expected.save(ksampler(expected, model), "expected")
    if kind == "gguf":
        model = found.gguf(settings={"use_mmap": True})
    else:
        model = found.add(
            "RayUNETLoader", unet_name="LTX-2 of Q8_0.safetensors", weight_dtype="default",
            ray_actors_init=found.init(use_mmap=True),
        )[1]  # fmt: skip
    found.save(ksampler(found, model), "found")
    server.run(expected.nodes)
    server.run(found.nodes)
    assert error_of(server, "found", "expected") <= SAMPLING_TOLERANCE


# ---- what is refused, in the words of ComfyUI's error dialog


def refusal(server, build):
    work = Workflow("LTX-Video")
    build(work)
    with pytest.raises(PromptFailed) as error:
        server.run(work.nodes)
    return error.value.message


def with_init(**settings):
    def build(work):
        inputs = {
            "ray_cluster_address": "local", "ray_cluster_namespace": "default", "GPU": 2, "ulysses_degree": 2,
            "ring_degree": 1, "cfg_degree": 1, "device": "cpu", **settings,
        }  # fmt: skip
        init = work.add("RayInitializer", **inputs)[0]
        loader = work.add(
            "RayUNETLoader", unet_name="LTX-Video.safetensors", weight_dtype="default", ray_actors_init=init
        )
        work.save(ksampler(work, loader[1]), "refused")

    return build


INIT_REFUSALS = {
    "no GPU and the default device": ({"device": "cuda"}, ["GPU=2", "no CUDA device", "device", "cpu"]),
    "degrees that do not match": ({"GPU": 3, "ulysses_degree": 2}, ["GPU=3", "ulysses_degree=2", "must divide"]),
    "FSDP": ({"FSDP": True}, ["FSDP", "set FSDP to false", "XFuser_attention"]),
    "cfg_degree": ({"cfg_degree": 2}, ["cfg_degree=2", "= 4", "workers=2"]),
    "dp_degree": ({"dp_degree": 3}, ["dp_degree=3", "must divide workers=2"]),
    "a shifted value": ({"XFuser_attention": "False"}, ["XFuser_attention='False'", "put them into this order"]),
    "GPU indices": ({"gpu_indices": "a,b"}, ["gpu_indices", "numbers separated by commas"]),
    "more indices than GPUs": ({"gpu_indices": "0,1,2"}, ["GPU=2", "names 3"]),
}


@pytest.mark.parametrize("case", INIT_REFUSALS)
def test_settings_that_cannot_be(server, case):
    settings, words = INIT_REFUSALS[case]
    message = refusal(server, with_init(**settings))
    assert all(word in message for word in words), message


def test_text_of_another_version(server):
    def build(work):
        work.positive = work.add("TestConditioning", seed=1, width=33, masked=3)[0]
        work.save(ksampler(work, work.actors()[1]), "refused")

    message = refusal(server, build)
    assert "33 wide" in message and "text encoder of this LTX version" in message


def test_a_latent_of_the_wrong_channels(server):
    def build(work):
        work.video = work.add("TestLatent", seed=3, batch=1, channels=16, frames=3, height=5, width=7)[0]
        work.save(ksampler(work, work.actors()[1]), "refused")

    message = refusal(server, build)
    assert ", 16, 3, 5, 7)" in message and "128" in message


def test_an_audio_latent_on_a_video_model(server):
    def build(work):
        work.has_audio = True
        work.save(ksampler(work, work.actors()[1]), "refused")

    assert "has no audio" in refusal(server, build)


@pytest.mark.parametrize("name", ["TensorParallelAttentionV2", "TensorParallelV5Node"])
def test_a_model_that_is_not_ours(server, name):
    extra = {"primary_gpu": 0, "parallelize_ffn": True, "ffn_chunks": 8} if name.endswith("V2") else {}

    def build(work):
        model = work.add(name, model=work.whole(), num_gpus=2, verbose=1, **extra)[0]
        work.save(ksampler(work, model), "refused")

    assert "Load Diffusion Model (Ray)" in refusal(server, build)


def test_more_ranks_than_workers(server):
    def build(work):
        model = work.add("TensorParallelV5Node", model=work.actors()[1], num_gpus=4, verbose=1)[0]
        work.save(ksampler(work, model), "refused")

    message = refusal(server, build)
    assert "num_gpus=4" in message and "2 workers" in message


def test_after_all_that_the_queue_goes_on(server):
    compare(server, "LTX-Video", ksampler)


def test_every_input_has_a_tooltip_and_every_node_a_help_page(server):
    from rayltx.nodes import NODE_CLASS_MAPPINGS

    info = server.get("/object_info")
    for name in NODE_CLASS_MAPPINGS:
        assert info[name]["description"], name
        groups = [info[name]["input"].get(group, {}) for group in ("required", "optional")]
        for group in groups:
            for field, definition in group.items():
                assert definition[1]["tooltip"], (name, field)
        folder = info[name]["python_module"].removeprefix("custom_nodes.")
        page = (server.base / "custom_nodes" / folder / "web" / "docs" / f"{name}.md").read_text()
        assert page.startswith(f"# {info[name]['display_name']}\n")
        missing = [field for group in groups for field in group if f"`{field}`" not in page]
        assert not missing, (name, missing)


def test_the_scripts_are_served_from_a_folder_with_a_space(server):
    import urllib.request

    scripts = [path for path in server.get("/extensions") if path.endswith("widget_repair.js")]
    assert scripts == ["/extensions/rayltx/widget_repair.js"]
    with urllib.request.urlopen(server.url + scripts[0], timeout=10) as answer:
        assert b"registerExtension" in answer.read()
