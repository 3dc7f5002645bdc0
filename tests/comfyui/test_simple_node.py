"""The node for a first graph in a real ComfyUI server: what comes out of it, and what a user reads."""

from __future__ import annotations

import pytest
from comfy_checkout import find_comfyui
from comfy_models import VAE_CONFIG, save_tiny_bundle, save_tiny_checkpoint
from comfy_scenarios import SAMPLING_TOLERANCE
from comfy_server import PromptFailed, Server
from comfy_workflows import HEIGHT, WIDTH, Workflow, error_of, ksampler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rayltx.expansion.comfyui_gguf.convert import convert

pytestmark = pytest.mark.comfyui
VERSION = "LTX-2.3"
BUNDLE, ALONE, QUANTISED, VAE = (
    "with VAE.safetensors",
    f"{VERSION}.safetensors",
    "blocks.gguf",
    "of its own.safetensors",
)


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    base = tmp_path_factory.mktemp("simple node")
    models = base / "models"
    for folder in ("checkpoints", "diffusion_models", "vae"):
        (models / folder).mkdir(parents=True)
    bundle = models / "checkpoints" / BUNDLE
    save_tiny_bundle(bundle, VERSION)
    save_tiny_checkpoint(models / "diffusion_models" / ALONE, VERSION)
    convert(models / "diffusion_models" / ALONE, models / "diffusion_models" / QUANTISED, "Q8_0")
    convert(models / "diffusion_models" / QUANTISED, models / "diffusion_models" / "of its values.safetensors")
    with safe_open(bundle, "pt") as file:
        metadata = file.metadata()
    vae = {name[4:]: tensor for name, tensor in load_file(bundle).items() if name.startswith("vae.")}
    assert vae and VAE_CONFIG["_class_name"] in metadata["config"]
    save_file(vae, models / "vae" / VAE, metadata=metadata)
    server = Server(find_comfyui(), base)
    yield server
    server.stop()


def simple(work, model_name=BUNDLE, gpus=2, **more):
    return work.add("RayLTX", model_name=model_name, gpus=gpus, device="cpu", **more)


def sampled(server, name, load):
    """A latent by `load(work)`, which gives a MODEL; what ComfyUI tells of the run."""
    work = Workflow(VERSION)
    work.save(ksampler(work, load(work)), name)
    return server.watch(work.nodes)


def test_the_model_is_comfyuis_whatever_the_number_of_gpus(server):
    """Changing `gpus` exchanges the workers, and neither the picture nor the graph behind the node changes."""
    sampled(server, "expected", lambda work: work.add("CheckpointLoaderSimple", ckpt_name=BUNDLE)[0])
    for gpus, shared in ((2, "ulysses 1 x ring 1 x cfg 2"), (3, "ulysses 3 x ring 1"), (1, "ulysses 1 x ring 1")):
        seen = sampled(server, f"on {gpus}", lambda work, gpus=gpus: simple(work, gpus=gpus)[0])
        assert error_of(server, f"on {gpus}", "expected") <= SAMPLING_TOLERANCE
        workers = "1 worker (cpu)" if gpus == 1 else f"{gpus} workers (cpu)"
        assert (
            f"RayLTX: {BUNDLE} on {workers}: {shared}; VAE from the file, no text encoder in the file" in server.log()
        )
        on_the_node = [data for kind, data in seen if kind == "preview"]
        assert any(f"{workers}:\n{shared}".encode() in data for data in on_the_node)
    assert server.log().count("exact on") == 2  # two ranks, three: one has nothing to compare


def test_a_changed_input_is_no_leak(server):
    """The MODEL of the run before is gone by then, and its model is not: ComfyUI would report that in every later run."""
    before = len(server.log())
    for cfg, gigabytes in enumerate((0.0, 1.0, 1.0, 0.0, 2.0, 2.0)):  # with changes of the sampler alone between
        work = Workflow(VERSION)
        work.save(ksampler(work, simple(work, max_vram_gb=gigabytes)[0], cfg=2.0 + cfg), f"changed {cfg}")
        server.run(work.nodes)
    assert "memory leak" not in server.log()[before:]


def test_all_that_comfyui_sees_is_one_worker_where_there_is_no_gpu(server):
    work = Workflow(VERSION)
    loader = work.add("RayLTX", model_name=BUNDLE, gpus=0)
    work.save(ksampler(work, loader[0]), "by itself")
    info = work.add("PreviewAny", source=loader[3])
    history = server.run(work.nodes)
    assert error_of(server, "by itself", "expected") <= SAMPLING_TOLERANCE
    text = "".join(history["outputs"][info.number]["text"])
    assert text.splitlines() == [f"{BUNDLE} on 1 worker (cpu): ulysses 1 x ring 1",
                                 "VAE from the file, no text encoder in the file"]  # fmt: skip


def decoded(work, latent, vae, name):
    video = work.add("LTXVSeparateAVLatent", av_latent=latent)[0]
    pixels = work.add("VAEDecode", samples=video, vae=vae)[0]
    work.save(work.add("VAEEncode", pixels=pixels, vae=vae)[0], name)


def test_the_vae_is_the_files_or_the_chosen_one(server):
    cases = {
        "the file's": (BUNDLE, {}),
        "one of its own": (BUNDLE, {"vae_name": VAE}),
        "for a file without one": (ALONE, {"vae_name": VAE}),
    }
    work = Workflow(VERSION)
    decoded(work, work.latent(), work.add("CheckpointLoaderSimple", ckpt_name=BUNDLE)[2], "ComfyUI's")
    server.run(work.nodes)
    for name, (file, more) in cases.items():
        work = Workflow(VERSION)
        decoded(work, work.latent(), simple(work, file, **more)[1], name)
        server.run(work.nodes)
        assert error_of(server, name, "ComfyUI's") <= 2e-6, name


def decode(work, vae):
    decoded(work, work.latent(), vae, "refused")


def image_to_video(work, vae):
    image = work.add("TestImage", seed=4, width=32 * WIDTH, height=32 * HEIGHT, count=1)[0]
    video = work.add("LTXVImgToVideoInplace", vae=vae, image=image, latent=work.video, strength=1.0, bypass=False)[0]
    work.save(video, "refused")


@pytest.mark.parametrize("use", [decode, image_to_video], ids=lambda use: use.__name__)
@pytest.mark.parametrize("file", [ALONE, QUANTISED])
def test_a_file_without_a_vae_is_told_when_its_vae_is_used(server, use, file):
    work = Workflow(VERSION)
    use(work, simple(work, file)[1])
    with pytest.raises(PromptFailed) as error:
        server.run(work.nodes)
    assert f"{file} holds no VAE" in error.value.message and "vae_name" in error.value.message


def test_a_file_without_a_vae_samples(server):
    sampled(server, "alone", lambda work: simple(work, ALONE)[0])
    sampled(server, "alone, whole", lambda work: work.whole())
    assert error_of(server, "alone", "alone, whole") <= SAMPLING_TOLERANCE


def test_a_gguf_file(server):
    sampled(server, "blocks", lambda work: simple(work, QUANTISED)[0])
    sampled(server, "values", lambda work: work.add("UNETLoader", unet_name="of its values.safetensors",
                                                    weight_dtype="default")[0])  # fmt: skip
    assert error_of(server, "blocks", "values") <= SAMPLING_TOLERANCE
    with pytest.raises(PromptFailed) as error:
        work = Workflow(VERSION)
        work.save(ksampler(work, simple(work, QUANTISED, weight_dtype="bf16")[0]), "refused")
        server.run(work.nodes)
    assert "set weight_dtype to default" in error.value.message


def test_the_same_file_is_read_once(server):
    """Also where another input changes; other workers have to read it."""
    run = lambda gpus: sampled(server, "again", lambda work: simple(work, gpus=gpus)[0])  # noqa: E731
    run(2)
    texts = (f"{BUNDLE}, VAE (VideoVAE)", f"{BUNDLE}, LTX-2.3", "do not have this VAE any more")
    before = [server.log().count(text) for text in texts]
    assert before[0] > 0 and before[1] > 0
    run(2)
    sampled(server, "again", lambda work: simple(work, gpus=2, max_vram_gb=1.0)[0])
    assert [server.log().count(text) for text in texts] == before
    run(1)
    assert server.log().count(texts[2]) == before[2] + 1


def test_a_gpu_that_is_not_there_is_told_by_the_names_of_this_node(server):
    work = Workflow(VERSION)
    loader = work.add("RayLTX", model_name=BUNDLE, gpus=2, device="cuda")
    work.save(ksampler(work, loader[0]), "refused")
    with pytest.raises(PromptFailed) as error:
        server.run(work.nodes)
    assert "gpus=2" in error.value.message and "no CUDA device" in error.value.message
