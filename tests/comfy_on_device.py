"""A worker's model of ComfyUI on the device in disguise, for the tests."""

from __future__ import annotations

import comfy_scenarios as scenarios
import torch
from comfy_models import CONFIGS, quantise, save_tiny_checkpoint

from rayltx.expansion.comfyui_gguf.checkpoint import open_model_file
from rayltx.expansion.comfyui_gguf.convert import convert

BASES = ["float32", "bfloat16", "fp8", "fp8 scaled", "Q8_0"]
PLENTY = 1 << 40
SAME = 1e-6  # of a forward with the same numbers


class Device:
    """A worker's model on the device in disguise."""

    def __init__(self, patcher, given, management):
        self.patcher, self.given, self.management = patcher, given, management
        self.model = patcher.model.diffusion_model
        self.size = patcher.model_size()

    def load(self, free, patcher=None):
        """As a worker does before it samples, with so many bytes free."""
        import disguised_device as disguise

        self.management.free_bytes = free
        with disguise.active():
            self.management.load_models_gpu([patcher or self.patcher], memory_required=0, minimum_memory_required=0)

    def unload(self):
        import disguised_device as disguise

        with disguise.active():
            for loaded in list(self.management.current_loaded_models):
                loaded.model_unload()
                self.management.current_loaded_models.remove(loaded)

    def bytes_there(self):
        import disguised_device as disguise

        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(x.nbytes for x in tensors if x.device.type == disguise.NAME)

    def is_shared_again(self):
        """Every parameter is the view that it was."""
        parameters = dict(self.model.named_parameters())
        return all(
            parameters[name].device.type == "cpu" and _address(parameters[name]) == _address(tensor)
            for name, tensor in self.given.items()
            if name in parameters
        )

    def forward(self):
        import disguised_device as disguise

        from rayltx.comfy_dist import self_test

        with disguise.active():
            args, kwargs = self_test.forward_arguments(self.model, self_test.CASES[0], disguise.DEVICE)
            out = self.model(*args, **kwargs)
        return out.inner.clone()

    def layer_outputs(self, inputs=None):
        """What each linear layer gives, by name, and was given; for its own inputs in a forward, or for these."""
        import disguised_device as disguise

        layers = {name: m for name, m in self.model.named_modules() if "Linear" in type(m).__name__}
        if inputs is not None:
            with disguise.active():
                return {name: disguise.bare(layers[name](x)) for name, x in inputs.items()}
        seen, hooks = {}, []
        for name, layer in layers.items():

            def keep(layer, args, out, name=name):
                seen[name] = args[0].clone(), disguise.bare(out).clone()

            hooks.append(layer.register_forward_hook(keep))
        self.forward()
        for hook in hooks:
            hook.remove()
        return {name: x for name, (x, _) in seen.items()}, {name: out for name, (_, out) in seen.items()}


def _address(tensor):
    return getattr(tensor, "_qdata", tensor).data_ptr()


def with_lora(device):
    import comfy.sd

    return comfy.sd.load_lora_for_models(device.patcher, None, scenarios.make_lora(CONFIGS["LTX-Video"]), 1.0, 0)[0]


def taking_the_disguise(tmp_path, monkeypatch):
    """Let the ComfyUI of this process take the disguise for its GPU. Returns get(base) -> Device."""
    import comfy.model_management as management
    import disguised_device as disguise
    from comfy.cli_args import args

    from rayltx.comfy_dist.main_process.detection import detect
    from rayltx.comfy_dist.worker_process.model_on_shared_weights import build_on
    from rayltx.distributed_worker.weights import map_file

    def free_memory(device=None, torch_free_too=False):
        free = management.free_bytes
        return (free, free) if torch_free_too else free

    monkeypatch.setattr(args, "disable_pinned_memory", True)
    monkeypatch.setattr(management, "free_bytes", PLENTY, raising=False)
    monkeypatch.setattr(management, "get_free_memory", free_memory)
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(management, "current_loaded_models", [])

    def get(base, version="LTX-Video", take=map_file, **changes):
        path = tmp_path / f"{base}.safetensors"
        save_tiny_checkpoint(path, version, dtype=torch.bfloat16 if base == "bfloat16" else torch.float32, **changes)
        if base.startswith("fp8"):
            quantise(path, scaled=base == "fp8 scaled")
        if base == "Q8_0":
            convert(path, tmp_path / "model.gguf", base)
            path = tmp_path / "model.gguf"
        checkpoint = open_model_file(path)
        detected = detect(checkpoint)
        given = take(checkpoint, tuple(checkpoint.tensors), detected.dtypes)
        monkeypatch.setattr(management, "get_torch_device", lambda: disguise.DEVICE)
        return Device(build_on(dict(given), detected.spec), given, management)

    return get
