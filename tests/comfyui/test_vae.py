"""VAEs on the workers: tiles bit for bit as ComfyUI's on one device, whole videos to rounding."""

from __future__ import annotations

import contextlib
import copy
import json
from unittest import mock

import pytest
import torch
from comfy_models import VIDEO_VAES, save_tiny_vae

from rayltx.errors import CheckpointError, UnsupportedError
from rayltx.sequence_parallel.partition import ParallelConfig

from rank_pool import RankPool

KINDS = list(VIDEO_VAES)


@pytest.fixture(scope="module")
def vaes(cluster, tmp_path_factory):
    """vaes(kind) -> (ComfyUI's VAE, the one on the workers, path)"""
    import comfy.sd
    import comfy.utils

    from rayltx.comfy_dist.main_process.auxiliary_link import KeptAuxiliary
    from rayltx.comfy_dist.main_process.remote_vae import get_vae

    folder = tmp_path_factory.mktemp("vae")
    found, kept = {}, []

    def get(kind):
        if kind not in found:
            if kind == "diffusion":
                pytest.importorskip("comfy.ldm.lightricks.vae.na_diffusion_decoder", reason="ComfyUI before LTX-2.5")
            path = folder / f"{kind}.safetensors"
            save_tiny_vae(path, kind)
            tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
            kept.append(KeptAuxiliary())
            found[kind] = (
                comfy.sd.VAE(sd=tensors, metadata=metadata),
                get_vae(str(path), "auto", cluster.request, kept[-1]),
                path,
            )
        return found[kind]

    return get


@pytest.fixture
def ranks(cluster):
    """ranks(n) -> the cluster's group has so many ranks from here on"""
    yield lambda n: cluster.group.form(ParallelConfig(n, 1))


def a_latent(frames=3, height=5, width=9, batch=1):
    return torch.randn(batch, 128, frames, height, width, generator=torch.Generator().manual_seed(3))


def a_video(frames=17, height=96, width=160):
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(3))


@contextlib.contextmanager
def from_seed(seed=7):
    torch.manual_seed(seed)
    with torch.inference_mode():
        yield


def assert_same_bits(found, expected, kind):
    """But for products of matrices on the CPU: torch itself gives other last bits for the same in two processes."""
    if kind == "diffusion":
        assert (found - expected).abs().max() <= 5e-7
    else:
        assert torch.equal(found, expected)


TILES = [
    {"tile_x": 4, "tile_y": 3, "overlap": 1, "tile_t": 2, "overlap_t": 1},
    {"tile_x": 5, "tile_y": 5, "overlap": 2},
    {"tile_x": 64, "tile_y": 64, "overlap": 16},  # one tile
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiles", TILES)
def test_a_tiled_decode_has_the_same_bits(vaes, kind, tiles):
    whole, shared, _ = vaes(kind)
    latent = a_latent()
    with from_seed():
        expected = whole.decode_tiled(latent, **tiles)
        drawn_next = torch.randn(3)
    with from_seed():
        found = shared.decode_tiled(latent, **tiles)
        assert torch.equal(torch.randn(3), drawn_next), "what comes next is drawn otherwise"
    assert_same_bits(found, expected, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiled_encode_has_the_same_bits(vaes, kind):
    whole, shared, _ = vaes(kind)
    video = a_video()
    tiles = {"tile_x": 64, "tile_y": 64, "overlap": 32, "tile_t": 8, "overlap_t": 8}
    with from_seed():
        expected = whole.encode_tiled(video, **tiles)
        found = shared.encode_tiled(video, **tiles)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_encode_has_the_same_bits(vaes, kind):
    whole, shared, _ = vaes(kind)
    with from_seed():
        assert torch.equal(shared.encode(a_video(9)), whole.encode(a_video(9)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, height, width", [(1, 4, 6), (2, 4, 9), (3, 13, 6), (4, 5, 17)])
def test_a_whole_decode_is_that_of_one_device(vaes, ranks, kind, n, height, width):
    whole, shared, _ = vaes(kind)
    latent = a_latent(3, height, width)
    with from_seed():
        expected = whole.decode(latent)
        drawn_next = torch.randn(3)
    ranks(n)
    with from_seed():
        found = shared.decode(latent)
        assert torch.equal(torch.randn(3), drawn_next)
    assert found.shape == expected.shape
    error = (found - expected).abs().max()
    assert error <= 2e-6 * max(1.0, float(expected.abs().max())), error
    together = f"decoded by {n} workers together"
    said = shared.first_stage_model.rayltx_link._told
    assert n == 1 or any(together in message for message in said), said


def test_the_noise_that_is_injected_counts(vaes):
    """Without which the tests above would not see it."""
    whole, _, _ = vaes("convolutions with noise")
    model = whole.first_stage_model
    found = []
    with mock.patch.object(model, "decode_noise_scale", 0.0):
        for seed in (1, 2):
            with from_seed(seed):
                found.append(whole.decode(a_latent()))
    assert (found[0] - found[1]).abs().max() > 0.05


@pytest.mark.parametrize("shares", [(3, 1), (1, 5)])
def test_unlike_workers_decode_together(vaes, cluster, shares):
    whole, shared, _ = vaes("diffusion")
    latent = a_latent(1, 2, 26)
    cluster.group.form(ParallelConfig(2, 1, shares=shares))
    with from_seed():
        assert (shared.decode(latent) - whole.decode(latent)).abs().max() <= 2e-6


def test_chunks_of_frames_are_those_of_one_device(vaes, ranks, comfy):
    """With each of which noise is drawn anew."""
    from comfy.ldm.lightricks.vae import causal_video_autoencoder as autoencoder

    whole, shared, _ = vaes("convolutions with noise")
    ranks(3)
    link = shared.first_stage_model.rayltx_link
    found = {}
    for chunk_bytes in (2**15 + 3, 2**22):
        link._draws.clear()
        link._chunk_bytes = chunk_bytes
        with mock.patch.object(autoencoder, "get_max_chunk_size", lambda device, size=chunk_bytes: size), from_seed():
            found[chunk_bytes] = whole.decode(a_latent(4))
            following = torch.randn(3)
        with from_seed():
            assert (shared.decode(a_latent(4)) - found[chunk_bytes]).abs().max() <= 2e-6
            assert torch.equal(torch.randn(3), following)
    few, many = found.values()
    assert (few - many).abs().max() > 2e-5  # ten times what the others may
    link._chunk_bytes = autoencoder.get_max_chunk_size(torch.device("cpu"))
    link._draws.clear()


def test_a_batch_is_decoded(vaes, ranks):
    whole, shared, _ = vaes("convolutions")
    ranks(3)
    latent = a_latent(2, 4, 6, batch=2)
    with from_seed():
        assert (shared.decode(latent) - whole.decode(latent)).abs().max() <= 2e-6


def test_a_latent_with_too_few_columns_is_decoded_by_one(vaes, ranks, caplog):
    whole, shared, _ = vaes("diffusion")
    ranks(4)
    caplog.set_level("INFO", "rayltx")
    latent = a_latent(2, 4, 10)
    with from_seed():
        assert_same_bits(shared.decode(latent), whole.decode(latent), "diffusion")
    assert "10 latents give 4 ranks fewer than the 4 that a window needs" in caplog.text


def test_sound(vaes):
    whole, shared, _ = vaes("sound")
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(1, 8, 12, 16, generator=generator)
    waveform = torch.rand(1, 16000, 2, generator=generator)
    with from_seed():
        assert torch.equal(shared.decode(latent), whole.decode(latent))
        assert torch.equal(shared.encode(waveform), whole.encode(waveform))
    for name in ("latent_channels", "latent_frequency_bins", "output_sample_rate", "latents_per_second"):
        assert getattr(shared.first_stage_model, name) == getattr(whole.first_stage_model, name)


def test_statistics_are_there_for_nodes_that_use_them(vaes):
    whole, shared, _ = vaes("convolutions")
    ours, theirs = shared.first_stage_model.per_channel_statistics, whole.first_stage_model.per_channel_statistics
    assert torch.equal(ours.un_normalize(a_latent()), theirs.un_normalize(a_latent()))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_settings_of_a_copy_reach_the_workers(vaes, copied):
    """As the node Set VAE Decoder Noise of the LTX pack sets them."""
    whole, shared, _ = vaes("convolutions with noise")
    before = whole.first_stage_model.decode_noise_scale, whole.first_stage_model.decode_timestep
    answers = []
    for vae in (whole, shared):
        changed = copied(vae)
        changed.first_stage_model.decode_noise_scale, changed.first_stage_model.decode_timestep = 0.5, 0.3
        with from_seed():
            answers.append(changed.decode_tiled(a_latent(), tile_x=4, tile_y=4, overlap=1))
        vae.first_stage_model.decode_noise_scale, vae.first_stage_model.decode_timestep = before
        with from_seed():
            answers.append(vae.decode_tiled(a_latent(), tile_x=4, tile_y=4, overlap=1))
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])
    assert not torch.equal(answers[0], answers[1])


def test_what_cannot_reach_the_workers_is_refused(vaes):
    _, shared, _ = vaes("convolutions")
    with pytest.raises(UnsupportedError, match="cannot be saved"):
        shared.get_sd()
    decoder = copy.deepcopy(shared.first_stage_model)
    changed = copy.copy(shared)
    changed.first_stage_model = decoder
    decoder.decoder.conv_act = torch.nn.ReLU()
    with pytest.raises(UnsupportedError, match="has changed the modules"):
        changed.decode(a_latent())
    decoder = copy.deepcopy(shared.first_stage_model)
    changed.first_stage_model = decoder
    decoder.decoder.causal = not decoder.decoder.causal
    with pytest.raises(UnsupportedError, match="has changed the modules"):
        changed.decode(a_latent())
    patched = copy.copy(shared)
    patched.patcher = shared.patcher.clone()
    with torch.inference_mode():
        patched.decode(a_latent())
    patched.patcher.add_object_patch("decoder.causal", True)
    with pytest.raises(UnsupportedError, match="has patched this VAE"):
        patched.decode(a_latent())
    with pytest.raises(UnsupportedError, match="writes into the weight"), torch.no_grad():
        shared.first_stage_model.decoder.conv_in.conv.weight.mul_(2)


def test_weights_are_in_memory_once(vaes, cluster):
    _, shared, path = vaes("convolutions")
    remote = shared.first_stage_model.rayltx_link.remote
    assert len(set(remote.digest().values())) == 1
    assert all(parameter.is_meta for parameter in shared.first_stage_model.parameters())


def test_the_same_file_is_loaded_once(vaes, cluster):
    """And what a node sets on one of its VAEs is not set on another."""
    from rayltx.comfy_dist.main_process.remote_vae import get_vae

    _, shared, path = vaes("convolutions")
    another = get_vae(str(path), "video", cluster.request)
    assert another.first_stage_model.rayltx_link is shared.first_stage_model.rayltx_link
    another.first_stage_model.decode_timestep = 0.7
    assert shared.first_stage_model.decode_timestep != 0.7


def test_a_cancel_ends_a_decode_and_the_next_is_right(vaes, ranks, comfy):
    import comfy.model_management as management

    whole, shared, _ = vaes("convolutions")
    ranks(2)
    for call in (lambda vae: vae.decode(a_latent()), lambda vae: vae.decode_tiled(a_latent(), **TILES[0])):
        with torch.inference_mode():
            management.interrupt_current_processing(True)
            with pytest.raises(management.InterruptProcessingException):
                call(shared)
            management.interrupt_current_processing(False)
            assert (call(shared) - call(whole)).abs().max() <= 2e-6


@pytest.mark.parametrize("tiled", [False, True])
def test_a_worker_that_dies_costs_no_picture(vaes, ranks, cluster, tiled):
    import os
    import signal
    import threading

    whole, shared, _ = vaes("convolutions")
    ranks(2)
    latent = a_latent(4, 7, 10)

    def decode(vae):
        return vae.decode_tiled(latent, **TILES[0]) if tiled else vae.decode(latent)

    with torch.inference_mode():
        expected = decode(whole)
        decode(shared)
        victim = cluster.workers()[1].pid
        timer = threading.Timer(0.1, os.kill, (victim, signal.SIGKILL))
        timer.start()
        found = decode(shared)
        timer.join()
        assert (found - expected).abs().max() <= 2e-6
        assert (decode(shared) - expected).abs().max() <= 2e-6
    assert cluster.workers()[1].pid != victim


def test_files_that_hold_no_vae_are_refused(models, cluster, tmp_path):
    from safetensors.torch import load_file, save_file

    from rayltx.comfy_dist.main_process.remote_vae import get_vae

    _, _, path = models("LTX-2.3")
    with pytest.raises(CheckpointError, match="no VAE of LTX among its"):
        get_vae(str(path), "auto", cluster.request)
    save_tiny_vae(tmp_path / "vae.safetensors", "convolutions")
    with pytest.raises(CheckpointError, match="no VAE of sound"):
        get_vae(str(tmp_path / "vae.safetensors"), "audio", cluster.request)
    tensors = load_file(tmp_path / "vae.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(CheckpointError, match="other tensors than its `config`"):
        get_vae(str(tmp_path / "bare.safetensors"), "auto", cluster.request)
    del tensors["encoder.conv_in.conv.weight"]
    save_file(tensors, tmp_path / "cut.safetensors", {"config": json.dumps({"vae": VIDEO_VAES["convolutions"]})})
    with pytest.raises(CheckpointError, match=r"1 parameters .* missing \(encoder.conv_in.conv.weight"):
        get_vae(str(tmp_path / "cut.safetensors"), "auto", cluster.request)


@pytest.fixture(scope="module")
def rank_pool():
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_border_that_is_not_shown_is_seen(comfy, rank_pool, kind):
    """What the small video that is decoded before the first real one is for."""
    from comfy_checkout import find_comfyui
    from comfy_ranks import slab_error

    if kind == "diffusion":
        pytest.importorskip("comfy.ldm.lightricks.vae.na_diffusion_decoder", reason="ComfyUI before LTX-2.5")
    right, wrong = (rank_pool.run(2, slab_error, str(find_comfyui()), kind, blind)[0] for blind in (False, True))
    assert right <= 2e-6
    assert wrong > 0.02


@pytest.mark.parametrize("kind", ["convolutions", "diffusion"])
def test_work_and_memory_fall_with_the_ranks(comfy, rank_pool, kind):
    """What is shared anew at each border is counted, too."""
    from comfy_checkout import find_comfyui
    from comfy_ranks import decode_cost

    if kind == "diffusion":
        pytest.importorskip("comfy.ldm.lightricks.vae.na_diffusion_decoder", reason="ComfyUI before LTX-2.5")
    shape = (1, 128, 4, 6, 32)
    path = str(find_comfyui())
    (flops, peak, _), *_ = rank_pool.run(1, decode_cost, path, kind, shape)
    for n in (2, 4):
        costs = rank_pool.run(n, decode_cost, path, kind, shape)
        assert max(cost[0] for cost in costs) <= 1.2 / n * flops, [cost[0] / flops for cost in costs]
        if (
            kind != "diffusion"
        ):  # whose noise, drawn for the whole picture, is most of what one with so few channels holds
            assert max(cost[1] for cost in costs) <= 1.15 / n * peak, [cost[1] / peak for cost in costs]
