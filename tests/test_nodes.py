"""The nodes' schema against what shared workflow files hold, and the logic behind them that needs no ComfyUI."""

from __future__ import annotations

import inspect
import logging
import sys

import pytest
import torch

from rayltx.comfy_dist.main_process.attention_names import attention_arguments, warn_if_ring_replaces
from rayltx.comfy_dist.main_process.ksampler import SamplingRange
from rayltx.errors import InputError
from rayltx.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from rayltx.nodes.initializers import RayInitializer, RayInitializerAdvanced
from rayltx.nodes.log_lines import name_log_lines
from rayltx.nodes.simple import RayLTX
from rayltx.sequence_parallel.partition import DEGREES, ParallelConfig

# The widgets of Raylight 1.5.1, by whose order files store values.
INITIALIZER = [
    "ray_cluster_address", "ray_cluster_namespace", "GPU", "ulysses_degree", "ring_degree", "cfg_degree", "dp_degree",
    "sync_ulysses", "clear_vram_after_sampling", "FSDP", "FSDP_CPU_OFFLOAD", "XFuser_attention", "skip_comm_test", "use_mmap",
]  # fmt: skip
ADVANCED = [
    "ray_cluster_address", "ray_cluster_namespace", "GPU", "GPU_SELECT", "ulysses_degree", "ring_degree",
    "clear_vram_after_sampling", "cfg_degree", "dp_degree", "sync_ulysses", "FSDP", "FSDP_CPU_OFFLOAD", "XFuser_attention",
    "skip_comm_test", "use_mmap", "ray_object_store_gb", "ray_dashboard_address", "torch_dist_address",
]  # fmt: skip
ATTENTION_OF_EVERY_STATE = [
    "TORCH", "TORCH_FLASH", "TORCH_EFFICIENT", "TORCH_MATH", "TORCH_CUDNN", "FA", "FLASH_ATTN", "FA3", "FLASH_ATTN_3",
    "SAGE_AUTO_DETECT", "SAGE_FP16_TRITON", "SAGE_FP16_CUDA", "SAGE_FP8_CUDA", "SAGE_FP8_SM90", "AITER", "AITER_ROCM",
]  # fmt: skip


def widgets(node):
    groups = node.INPUT_TYPES()
    return [*groups["required"], *groups["optional"]]


@pytest.mark.parametrize("node, order", [(RayInitializer, INITIALIZER), (RayInitializerAdvanced, ADVANCED)])
def test_files_store_values_in_this_order(node, order):
    assert widgets(node)[: len(order)] == order


def test_an_api_file_of_any_state_has_what_is_required():
    """Those of January 2026 have neither dp_degree nor what came later; the advanced node's order differs."""
    oldest = {
        "ray_cluster_address", "ray_cluster_namespace", "GPU", "ulysses_degree", "ring_degree", "cfg_degree", "sync_ulysses",
        "FSDP", "FSDP_CPU_OFFLOAD", "XFuser_attention",
    }  # fmt: skip
    for node in (RayInitializer, RayInitializerAdvanced):
        assert set(node.INPUT_TYPES()["required"]) <= oldest
        assert set(ATTENTION_OF_EVERY_STATE) <= set(node.INPUT_TYPES()["optional"]["XFuser_attention"][0])


def test_bounds_are_fixed_numbers_and_cfg_degree_takes_an_old_boolean():
    for node in (RayInitializer, RayInitializerAdvanced):
        for group in node.INPUT_TYPES().values():
            assert all(isinstance(definition[1].get("max", 0), (int, float)) for definition in group.values())
    cfg = RayInitializer.INPUT_TYPES()["required"]["cfg_degree"][1]
    assert cfg["min"] <= int(False) and cfg["max"] >= 2


def test_a_shifted_value_is_named_with_the_order():
    message = RayInitializer.VALIDATE_INPUTS(XFuser_attention=False)
    assert "XFuser_attention=False" in message and ", ".join(INITIALIZER) in message
    assert RayInitializer.VALIDATE_INPUTS(XFuser_attention="SAGE_FP8_CUDA") is True


def test_every_node_has_a_name_and_says_what_it_does():
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in NODE_CLASS_MAPPINGS.values():
        assert node.DESCRIPTION and node.CATEGORY.startswith("Raylight")
        assert (
            len(node.RETURN_TYPES)
            == len(getattr(node, "OUTPUT_TOOLTIPS", ()))
            == len(getattr(node, "RETURN_NAMES", ()))
        )


def test_what_one_begins_with_is_found_by_what_it_is_for():
    found = {name for name, node in NODE_CLASS_MAPPINGS.items() if hasattr(node, "SEARCH_ALIASES")}
    assert found == {"RayLTX", "RayInitializer", "RayInitializerAdvanced"}
    for name in found:
        assert {"multi gpu", "parallel", "ltx", "ray"} <= set(NODE_CLASS_MAPPINGS[name].SEARCH_ALIASES)


def test_what_one_begins_with_is_listed_first_and_what_ends_everything_last():
    names = list(NODE_CLASS_MAPPINGS)
    assert (names[0], names[-1]) == ("RayLTX", "StopRayWorkers")


@pytest.mark.parametrize("name", ["StopRayWorkers", "RayKill"])
def test_what_ends_the_workers_runs_each_time(name):
    """Though its inputs are what they were: other nodes may have started them again."""
    state = NODE_CLASS_MAPPINGS[name].IS_CHANGED()
    assert state != state  # as ComfyUI compares


def test_nodes_for_graphs_of_other_packs_are_not_offered_for_new_ones():
    deprecated = {name for name, node in NODE_CLASS_MAPPINGS.items() if getattr(node, "DEPRECATED", False)}
    of_the_memory_nodes = {"TensorParallelAttentionV2", "TensorParallelV3Node", "TensorParallelV5Node"}
    assert deprecated == {*of_the_memory_nodes, "RayKill"}


# ---- what is shown at once


def shown(name):
    """The inputs that the frontend does not fold away."""
    groups = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
    inputs = {**groups["required"], **groups.get("optional", {})}
    return [field for field, definition in inputs.items() if not definition[1].get("advanced")]


SHOWN = {
    "RayLTX": ["model_name", "gpus"],
    "RayInitializer": ["GPU", "gpu_indices"],
    "RayInitializerAdvanced": ["GPU", "gpu_indices"],
    "RayUNETLoader": ["unet_name", "weight_dtype", "ray_actors_init", "lora"],
    "RayCheckpointLoader": ["ckpt_name", "ray_actors_init", "lora"],
    "RayGGUFLoader": ["unet_name", "dequant_dtype", "patch_dtype", "ray_actors_init", "lora"],
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_one_need_not_know_is_folded_away(name, lists_of_names):
    assert shown(name) == SHOWN[name]


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("node", [RayInitializer, RayInitializerAdvanced])
def test_the_folded_defaults_go_with_every_number_of_gpus(node, workers):
    groups = node.INPUT_TYPES()
    defaults = {**groups["required"], **groups["optional"]}
    config = ParallelConfig.for_workers(workers, *(defaults[name][1]["default"] for name in DEGREES))
    assert config == ParallelConfig(ulysses_degree=workers)


def test_a_first_node_needs_a_file_and_nothing_else(lists_of_names):
    sys.modules["folder_paths"].get_filename_list = lambda folder: {
        "checkpoints": ["sd.safetensors", "ltx-2.safetensors"], "diffusion_models": ["a.safetensors", "ltx-2.safetensors"],
        "unet_gguf": ["LTX-2.gguf"], "vae": ["some.safetensors"],
    }[folder]  # fmt: skip
    schema = RayLTX.INPUT_TYPES()
    assert schema["required"]["model_name"][0] == ["ltx-2.safetensors", "LTX-2.gguf", "sd.safetensors", "a.safetensors"]
    assert schema["required"]["gpus"][1]["default"] == 0
    assert schema["optional"]["vae_name"][0] == ["from the file", "some.safetensors"]
    defaults = inspect.signature(RayLTX.load).parameters
    assert all(defaults[name].default == given[1]["default"] for name, given in schema["optional"].items())
    assert RayLTX.RETURN_TYPES == ("MODEL", "VAE", "CLIP", "STRING")


# ---- attention names


@pytest.mark.parametrize("name", ATTENTION_OF_EVERY_STATE)
def test_an_attention_name_chooses_one_kernel(name):
    arguments = attention_arguments(name)
    assert sum(arguments.values()) == 1


def test_what_is_not_installed_falls_back_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert attention_arguments("SAGE_FP8_CUDA")["use_pytorch_cross_attention"]
    assert "SAGE_FP8_CUDA" in caplog.text and "sageattention" in caplog.text
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert attention_arguments("SAGE_FP8_CUDA")["use_sage_attention"]
    assert attention_arguments("FLASH_ATTN_3")["use_flash_attention"]


def test_a_ring_says_by_name_that_it_cannot_use_a_kernel(monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for name, package in (("SAGE_AUTO_DETECT", "sageattention"), ("FLASH_ATTN", "flash_attn")):
        caplog.clear()
        warn_if_ring_replaces(attention_arguments(name), 1)
        warn_if_ring_replaces(attention_arguments("TORCH"), 2)
        assert not caplog.text
        warn_if_ring_replaces(attention_arguments(name), 2)
        assert "ring_degree=2" in caplog.text and package in caplog.text and "ulysses_degree" in caplog.text


def test_an_attention_name_that_never_was():
    with pytest.raises(InputError, match="XFuser_attention='local' must be one of TORCH"):
        attention_arguments("local")


# ---- external sigmas

SIGMAS = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(
    "part, expected",
    [
        (SamplingRange(), [1.0, 0.8, 0.6, 0.4, 0.0]),  # without leftover noise, to the end
        (SamplingRange(return_with_leftover_noise=True), [1.0, 0.8, 0.6, 0.4, 0.2]),
        (SamplingRange(1, 3), [0.8, 0.6, 0.0]),
        (SamplingRange(1, 3, return_with_leftover_noise=True), [0.8, 0.6, 0.4]),
        (SamplingRange(2), [0.6, 0.4, 0.0]),
        (SamplingRange(denoise=0.5), [0.6, 0.4, 0.0]),
        (SamplingRange(1, denoise=0.5), [0.4, 0.0]),  # the range counts within what denoise keeps
        (SamplingRange(4), [0.2]),  # nothing to sample
        (SamplingRange(7), []),
        (SamplingRange(denoise=0.0), [0.2]),
    ],
)
def test_the_part_of_external_sigmas_that_a_pass_samples(part, expected):
    assert part.of(SIGMAS).tolist() == pytest.approx(expected)
    assert SIGMAS[-1] == pytest.approx(0.2)  # the given ones stay


def test_two_passes_meet():
    first, second = SamplingRange(0, 2, return_with_leftover_noise=True).of(SIGMAS), SamplingRange(2).of(SIGMAS)
    assert first[-1] == second[0]


def test_messages_say_whose_they_are(monkeypatch, caplog):
    """In ComfyUI's process, whose handlers are the root's, as the tests' is."""
    monkeypatch.setattr(logging.getLogger("rayltx"), "handlers", [])
    for _ in range(2):
        name_log_lines()
    logging.getLogger("rayltx.some.module").warning("%d of %s", 3, "4 % more")
    logging.getLogger("rayltx").error("RayLTX lacks something")
    logging.getLogger("another.pack").warning("its own")
    assert caplog.messages == ["RayLTX: 3 of 4 % more", "RayLTX lacks something", "its own"]
