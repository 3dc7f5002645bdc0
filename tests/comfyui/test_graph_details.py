"""What graphs depend on besides the picture."""

from __future__ import annotations

import importlib
import inspect
import json

import comfy_scenarios as scenarios
import pytest
import torch
from comfy_models import CONFIGS
from safetensors import safe_open
from safetensors.torch import save_file

from rayltx.diffusion_models.lightricks.relative_error import relative_error

pytestmark = pytest.mark.comfyui


def test_a_lora_brings_its_metadata_as_comfyuis_loader_does(models, tmp_path):
    """Nodes for IC-LoRAs read the reference's scale there."""
    import comfy.sd
    import comfy.utils

    from rayltx.comfy_dist.main_process.lora_files import LoraFile
    from rayltx.comfy_dist.main_process.loras import with_loras

    if "lora_metadata" not in inspect.signature(comfy.sd.load_lora_for_models).parameters:
        pytest.skip("this ComfyUI's loader leaves a LoRA's metadata in the file")
    whole, twin, _ = models("LTX-Video")
    path = tmp_path / "ic-lora.safetensors"
    save_file(scenarios.make_lora(CONFIGS["LTX-Video"]), path, metadata={"reference_downscale_factor": "2"})
    tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    reference = comfy.sd.load_lora_for_models(whole, None, tensors, 1.0, 0.0, lora_metadata=metadata)[0]
    ours = with_loras(twin, [LoraFile(str(path), 1.0)])
    assert ours.get_attachment("lora_metadata") == reference.get_attachment("lora_metadata") == metadata
    assert twin.get_attachment("lora_metadata") is None


def test_sigmas_that_are_connected_stay_as_they_are(models):
    """ComfyUI's uni_pc writes into the sigmas that it is given, which the graph keeps for the next run."""
    from rayltx.comfy_dist.main_process.ksampler import CUSTOM_SAMPLING, call_node, sample_custom

    _, twin, _ = models("LTX-Video")
    work = scenarios.Workspace("LTX-Video", CONFIGS["LTX-Video"])
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0])
    sampler = call_node(CUSTOM_SAMPLING, "KSamplerSelect", sampler_name="uni_pc")[0]
    with torch.inference_mode():
        outs = [
            sample_custom(twin, True, 1, 3.0, work.positive, work.negative, sampler, sigmas, work.latent())["samples"]
            for _ in range(2)
        ]
    assert sigmas.tolist() == torch.tensor([1.0, 0.7, 0.3, 0.0]).tolist()
    assert torch.equal(*outs)


def test_files_whose_text_is_projected_elsewhere_load(models, cluster, tmp_path):
    """As the official LTX-2.3: where modules would be that project captions, ComfyUI has functions that do nothing."""
    import comfy.sd
    from comfy_models import save_tiny_checkpoint

    from rayltx.comfy_dist.main_process.placement import Placement
    from rayltx.comfy_dist.main_process.twin import load_twin
    from rayltx.diffusion_models.lightricks.relative_error import relative_error
    from rayltx.sequence_parallel.partition import ParallelConfig

    path = tmp_path / "model.safetensors"
    save_tiny_checkpoint(path, "LTX-2.3", caption_projection_first_linear=False)
    twin = load_twin(str(path), Placement(cluster.request, ParallelConfig(2, 1)))
    with torch.inference_mode():
        whole = comfy.sd.load_diffusion_model(str(path))
        out, reference = (
            scenarios.tensors_of(scenarios.euler(m, "LTX-2.3", CONFIGS["LTX-2.3"]))[0] for m in (twin, whole)
        )
    assert relative_error(out, reference) <= 5e-6


@pytest.mark.parametrize("version", ["LTX-2", "LTX-2.3"])
def test_nodes_can_call_the_modules_that_prepare_text(models, version):
    """As nodes for negative guidance do: bring the module to the device, call it, bring it back."""
    whole, twin, _ = models(version)
    ours, theirs = twin.model.diffusion_model, whole.model.diffusion_model
    text = torch.randn(1, 7, theirs.caption_channels if version == "LTX-2" else theirs.cross_attention_dim)
    with torch.inference_mode():
        ours.video_embeddings_connector.to("cpu")
        out = ours.video_embeddings_connector(text)[0]
        ours.video_embeddings_connector.to("meta")
        reference = theirs.video_embeddings_connector(text)[0]
    assert out.shape == reference.shape and (out - reference).norm() <= 1e-5 * reference.norm()
    assert isinstance(ours.video_embeddings_connector, type(theirs.video_embeddings_connector))


@pytest.mark.parametrize("with_sigmas", [False, True])
@pytest.mark.parametrize(
    "latent",
    [
        {"samples": torch.zeros(1, 16, 3, 5, 7)},  # empty, and of another model's channels
        {"samples": torch.full((2, 128, 3, 5, 7), 0.1), "batch_index": [3, 3]},
        {"samples": torch.full((1, 128, 3, 5, 7), 0.1), "noise_mask": torch.full((1, 1, 3, 5, 7), 0.5)},
        {"samples": torch.full((1, 128, 3, 5, 7), 0.1), "noise_mask": torch.ones(1, 160, 224), "more": "kept"},
    ],
)
def test_xfuser_samplers_take_every_latent_that_comfyuis_take(models, latent, with_sigmas):
    import comfy.samplers

    import nodes
    from rayltx.comfy_dist.main_process.ksampler import SamplingRange, sample_scheduled

    whole, twin, _ = models("LTX-Video")
    work = scenarios.Workspace("LTX-Video", CONFIGS["LTX-Video"])
    sigmas = None
    if with_sigmas:
        sigmas = comfy.samplers.KSampler(whole, 3, "cpu", "euler", "simple").sigmas
    with torch.inference_mode():
        expected = nodes.common_ksampler(whole, 5, 3, 3.0, "euler", "simple", work.positive, work.negative, latent)[0]
        out = sample_scheduled(
            twin, True, 5, 3, 3.0, "euler", "simple", work.positive, work.negative, latent, SamplingRange(), sigmas
        )
    assert out.keys() == expected.keys()
    assert relative_error(out["samples"], expected["samples"]) <= scenarios.SAMPLING_TOLERANCE


@pytest.mark.parametrize("by", ["checkpoint", "LoRA"])
def test_attention_that_layers_ask_for_travels(models, cluster, tmp_path, by):
    """In newer versions, by a checkpoint or a LoRA. Which kernel it gets is settled where it runs: here, none."""
    import comfy.sd
    from comfy.ldm.lightricks.model import CrossAttention
    from safetensors.torch import load_file

    from rayltx.comfy_dist.main_process.placement import Placement
    from rayltx.comfy_dist.main_process.twin import load_twin
    from rayltx.sequence_parallel.partition import ParallelConfig

    if not hasattr(CrossAttention(8, heads=1, dim_head=8, operations=torch.nn), "comfy_attention"):
        pytest.skip("this ComfyUI's layers ask for no attention of their own")
    whole, twin, path = models("LTX-Video")
    name = "diffusion_model.transformer_blocks.1.attn1.comfy_attention.config"
    wish = torch.tensor(list(json.dumps([{"attention": "comfy_kitchen_int8"}]).encode()), dtype=torch.uint8)
    with torch.inference_mode():
        if by == "LoRA":
            tensors = {**scenarios.make_lora(CONFIGS["LTX-Video"]), name: wish}
            whole, twin = (comfy.sd.load_lora_for_models(m, None, tensors, 1.0, 0.0)[0] for m in (whole, twin))
            assert name.removesuffix(".config") in twin.object_patches
        else:
            path = tmp_path / "model.safetensors"
            with safe_open(models("LTX-Video")[2], "pt") as file:
                metadata = file.metadata()
            save_file({**load_file(models("LTX-Video")[2]), f"model.{name}": wish}, path, metadata)
            whole = comfy.sd.load_diffusion_model(str(path))
            twin = load_twin(str(path), Placement(cluster.request, ParallelConfig(2, 1)))
        out, expected = (
            scenarios.tensors_of(scenarios.euler(m, "LTX-Video", CONFIGS["LTX-Video"])) for m in (twin, whole)
        )
    assert all(relative_error(a, b) <= scenarios.SAMPLING_TOLERANCE for a, b in zip(out, expected))


def test_torch_compile_is_said_to_have_no_effect(models, caplog):
    """On the MODEL of this process it would trace into the transport, and fail after minutes."""
    _, twin, _ = models("LTX-Video")
    node = importlib.import_module("comfy_extras.nodes_torch_compile").TorchCompileModel
    schema = {"backend": "inductor"} if "backend" in inspect.signature(node.execute).parameters else {}
    compiled = scenarios.node("comfy_extras.nodes_torch_compile", "TorchCompileModel")(model=twin, **schema)[0]
    old_way = compiled.clone()
    old_way.add_object_patch(
        "diffusion_model", torch.compile(twin.get_model_object("diffusion_model"))
    )  # as packs of long ago
    with torch.inference_mode():
        expected, *outs = (
            scenarios.euler(model, "LTX-Video", CONFIGS["LTX-Video"])["samples"] for model in (twin, compiled, old_way)
        )
    assert all(torch.equal(out, expected) for out in outs)
    assert caplog.text.count("torch.compile has no effect on a Ray MODEL") == 2
