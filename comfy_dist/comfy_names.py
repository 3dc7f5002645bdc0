"""The names of ComfyUI's that RayLTX calls, reads and takes the place of: what has changed is told by its name, at the start.

ComfyUI's inner names come and go. Without this, one that is gone would be an AttributeError in the middle of a run, and a
method of ours that takes the place of one that is no longer called would be silently dead.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

# Used by name. `tests/comfyui/test_comfy_names.py` compares this with the source.
USED = (
    "comfy.cli_args.args.cpu",
    "comfy.cli_args.args.cuda_malloc",
    "comfy.cli_args.args.disable_pinned_memory",
    "comfy.hooks.EnumHookMode.MinVram",
    "comfy.ldm.lightricks.av_model",
    "comfy.ldm.lightricks.latent_upsampler.LatentUpsampler.from_config",
    "comfy.ldm.lightricks.model",
    "comfy.ldm.modules.attention.attention_pytorch",
    "comfy.lora.calculate_weight",
    "comfy.lora.load_lora",
    "comfy.lora.model_lora_keys_unet",
    "comfy.lora_convert.convert_lora",
    "comfy.memory_management",
    "comfy.model_detection.model_config_from_unet",
    "comfy.model_management.LoadedModel",
    "comfy.model_management.OOM_EXCEPTION",
    "comfy.model_management.cast_to",
    "comfy.model_management.cleanup_models",
    "comfy.model_management.current_loaded_models",
    "comfy.model_management.current_stream",
    "comfy.model_management.device_supports_non_blocking",
    "comfy.model_management.get_free_memory",
    "comfy.model_management.get_offload_stream",
    "comfy.model_management.get_torch_device",
    "comfy.model_management.load_models_gpu",
    "comfy.model_management.reset_cast_buffers",
    "comfy.model_management.soft_empty_cache",
    "comfy.model_management.sync_stream",
    "comfy.model_management.throw_exception_if_processing_interrupted",
    "comfy.model_management.unet_dtype",
    "comfy.model_management.unet_manual_cast",
    "comfy.model_management.unet_offload_device",
    "comfy.model_management.unload_all_models",
    "comfy.model_management.vae_dtype",
    "comfy.model_management.vae_offload_device",
    "comfy.model_patcher.CallbacksMP.ON_DETACH",
    "comfy.model_patcher.LowVramPatch",
    "comfy.model_patcher.ModelPatcher",
    "comfy.nested_tensor.NestedTensor",
    "comfy.ops.disable_weight_init",
    "comfy.ops.fp8_ops.Linear",
    "comfy.ops.manual_cast.Linear",
    "comfy.options",
    "comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL",
    "comfy.quant_ops.QuantizedTensor",
    "comfy.sample.sample_custom",
    "comfy.samplers.KSampler.SAMPLERS",
    "comfy.samplers.KSampler.SCHEDULERS",
    "comfy.samplers.sampler_object",
    "comfy.sd.CLIPType.LTXV",
    "comfy.sd.VAE",
    "comfy.sd.load_checkpoint_guess_config",
    "comfy.sd.load_clip",
    "comfy.utils.ProgressBar",
    "comfy.utils.calculate_parameters",
    "comfy.utils.convert_old_quants",
    "comfy.utils.get_attr",
    "comfy.utils.load_torch_file",
    "comfy.utils.set_attr",
    "comfy.utils.set_attr_param",
    "comfy.utils.tiled_scale_multidim",
    "comfy.utils.weight_dtype",
    "comfy.weight_adapter.lora.LoRAAdapter",
    "comfy_extras.nodes_custom_sampler",
    "comfy_extras.nodes_lt",
    "folder_paths.folder_names_and_paths",
    "folder_paths.get_filename_list",
    "folder_paths.get_folder_paths",
    "folder_paths.get_full_path",
    "folder_paths.get_full_path_or_raise",
    "folder_paths.get_user_directory",
    "nodes.VAELoader",
    "nodes.common_ksampler",
)
# Methods in whose place ours are, on MODELs and on the workers' patchers: each has to be called under this name. Besides, in
# some versions, `model_mmap_residency` and `model_state_dict_for_saving`.
REPLACED = tuple(
    f"comfy.model_patcher.ModelPatcher.{name}"
    for name in (
        "add_object_patch", "add_wrapper_with_key", "clean_hooks", "cleanup", "current_loaded_device", "detach",
        "eject_model", "get_combined_hook_patches", "get_free_memory", "get_key_patches", "inject_model", "load",
        "loaded_size", "lowvram_patch_counter", "model_size", "model_state_dict", "partially_load",
        "partially_unload", "patch_cached_hook_weights", "patch_hook_weight_to_device", "patch_hooks", "patch_model",
        "patch_weight_to_device", "pre_run", "state_dict_for_saving", "unpatch_hooks", "unpatch_model",
    )
)  # fmt: skip
# The seam: methods of LTX models, with the parameters that it reads.
SEAM = {
    "comfy.ldm.lightricks.model.LTXVModel._process_input": ("x",),
    "comfy.ldm.lightricks.model.LTXVModel._prepare_timestep": ("timestep", "batch_size", "hidden_dtype"),
    "comfy.ldm.lightricks.model.LTXVModel._process_transformer_blocks": ("x", "transformer_options"),
    "comfy.ldm.lightricks.model.LTXVModel._forward": ("x", "timestep", "context"),
    "comfy.ldm.lightricks.av_model.LTXAVModel._process_input": ("x",),
    "comfy.ldm.lightricks.av_model.LTXAVModel._prepare_timestep": ("timestep", "batch_size", "hidden_dtype"),
    "comfy.ldm.lightricks.av_model.LTXAVModel._process_transformer_blocks": ("x", "transformer_options"),
    "comfy.ldm.lightricks.av_model.LTXAVModel.preprocess_text_embeds": (),
    "comfy.ldm.lightricks.model.CrossAttention.forward": ("x", "context", "mask", "transformer_options"),
}


def missing_names() -> list[str]:
    """What the installed ComfyUI does not have of it, or has otherwise. Imports what it looks at."""
    absent, other = [], []
    for name in (*USED, *REPLACED, *SEAM):
        try:
            found = _find(name)
        except Exception:  # importing raises anything
            absent.append(name)
            continue
        other += [f"{name}({parameter}=)" for parameter in _missing_parameters(found, SEAM.get(name, ()))]
    return absent + other


def _missing_parameters(function: Any, wanted: tuple[str, ...]) -> list[str]:
    if not wanted:
        return []
    found = inspect.signature(function).parameters
    kinds = {each.kind for each in found.values()}
    if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds:
        return []  # another pack's, which passes all on
    return [parameter for parameter in wanted if parameter not in found]


def _find(name: str) -> object:
    """The object of a dotted name. Raises ImportError or AttributeError."""
    module, *rest = name.split(".")
    found: object = importlib.import_module(module)
    for part in rest:
        module = f"{module}.{part}"
        if not hasattr(found, part):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                raise AttributeError(name) from error
        found = getattr(found, part)
    return found
