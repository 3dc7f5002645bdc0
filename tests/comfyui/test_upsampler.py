"""Upsamplers of latents on a worker: bit for bit as ComfyUI's own loader gives them, in its own node."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from comfy_models import save_tiny_upscaler, save_tiny_vae

from rayltx.errors import CheckpointError, UnsupportedError

KINDS = {
    "rows and columns": {},
    "by halves": {"spatial_scale": 1.5, "rational_resampler": True},
    "frames": {"spatial_upsample": False, "temporal_upsample": True},
}


@pytest.fixture(scope="module")
def upsamplers(cluster, tmp_path_factory):
    """upsamplers(kind) -> (ComfyUI's, the one on the workers, path)"""
    import comfy.model_management as management
    import comfy_extras.nodes_hunyuan as nodes
    import folder_paths

    from rayltx.comfy_dist.main_process.remote_upsampler import get_upsampler

    folder = tmp_path_factory.mktemp("upsamplers")
    folder_paths.add_model_folder_path("latent_upscale_models", str(folder))
    found = {}

    def get(kind):
        if kind not in found:
            path = folder / f"{kind}.safetensors"
            try:
                save_tiny_upscaler(path, **KINDS[kind])
            except TypeError:
                pytest.skip("ComfyUI before these upsamplers")
            loaded = nodes.LatentUpscaleModelLoader.execute(path.name)
            whole = loaded.args[0] if hasattr(loaded, "args") else loaded[0]
            model = getattr(whole, "model", whole)
            assert next(model.parameters()).dtype == management.vae_dtype(
                allowed_dtypes=[torch.bfloat16, torch.float32]
            )
            found[kind] = whole, get_upsampler(str(path), cluster.request), path
        return found[kind]

    return get


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    import comfy.sd
    import comfy.utils

    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_tiny_vae(path, "convolutions")
    tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    return comfy.sd.VAE(sd=tensors, metadata=metadata)


def upsampled(vae, upsampler):
    """By ComfyUI's own node."""
    import comfy_extras.nodes_lt_upsampler as nodes

    latent = torch.randn(1, 128, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    arguments = {"samples": {"samples": latent}, "upscale_model": upsampler, "vae": vae}
    with torch.inference_mode():
        if hasattr(nodes.LTXVLatentUpsampler, "execute"):
            return nodes.LTXVLatentUpsampler.execute(**arguments).args[0]["samples"]
        return nodes.LTXVLatentUpsampler().upsample_latent(**arguments)[0]["samples"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_gives_what_comfyui_gives(upsamplers, vae, kind):
    whole, shared, _ = upsamplers(kind)
    expected, found = upsampled(vae, whole), upsampled(vae, shared)
    assert found.shape == expected.shape != (1, 128, 3, 4, 6)
    assert torch.equal(found, expected)


def test_a_worker_that_died_is_replaced(upsamplers, vae, cluster):
    whole, shared, _ = upsamplers("rows and columns")
    victim = cluster.workers()[0].pid
    os.kill(victim, signal.SIGKILL)
    assert torch.equal(upsampled(vae, shared), upsampled(vae, whole))
    assert cluster.workers()[0].pid != victim


def test_two_loaders_of_a_file_share_it(upsamplers, cluster):
    from rayltx.comfy_dist.main_process.remote_upsampler import get_upsampler
    from rayltx.comfy_dist.marks import LINK

    _, first, path = upsamplers("rows and columns")
    second = get_upsampler(str(path), cluster.request)
    model, other = getattr(first, "model", first), getattr(second, "model", second)
    assert other is not model and getattr(other, LINK) is getattr(model, LINK)


def test_a_loader_that_runs_again_loads_nothing(upsamplers, cluster):
    """What it kept is all that keeps the workers' model when another run begins."""
    from rayltx.comfy_dist.main_process.auxiliary_link import KeptAuxiliary
    from rayltx.comfy_dist.main_process.releasing import wait_for_releases
    from rayltx.comfy_dist.main_process.remote_upsampler import get_upsampler
    from rayltx.comfy_dist.marks import LINK

    _, _, path = upsamplers("rows and columns")
    copy, kept = path.with_name("copy.safetensors"), KeptAuxiliary()
    shutil.copy(path, copy)
    model_ids = set()
    for _ in range(3):
        get_upsampler(str(copy), cluster.request, kept)
        wait_for_releases()  # after collecting what nobody holds
        model_ids.add(getattr(getattr(kept.model, "model", kept.model), LINK).remote.model_id)
    assert len(model_ids) == 1


def test_weights_are_not_here_and_cannot_be_read(upsamplers):
    _, shared, _ = upsamplers("rows and columns")
    model = getattr(shared, "model", shared)
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(UnsupportedError, match="with the Ray workers"):
        model.final_conv.weight.sum().item()


def test_other_files_are_told_apart(cluster, tmp_path):
    from safetensors.torch import load_file, save_file

    from rayltx.comfy_dist.main_process.remote_upsampler import get_upsampler

    def refused(words):
        with pytest.raises(CheckpointError, match=words):
            get_upsampler(str(path), cluster.request)

    path = tmp_path / "upsampler.safetensors"
    save_tiny_vae(path, "convolutions")
    refused("there is no upsampler of LTX's latents among its")
    save_tiny_upscaler(path)
    tensors = load_file(path)
    save_file(tensors, path)
    refused("no `config` in its metadata")
    save_file(tensors, path, {"config": json.dumps({"in_channels": 128, "mid_channels": 64, "dims": 3})})
    refused("not those of the upsampler.*newer ComfyUI")
