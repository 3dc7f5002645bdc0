"""The chunked feed-forward on a MODEL of ComfyUI's own loader."""

from __future__ import annotations

import functools

import comfy_scenarios as scenarios
import pytest
import torch
from comfy_models import CONFIGS, VERSIONS, save_tiny_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from rayltx.diffusion_models.lightricks.feed_forward import SAVING, UNASKED
from rayltx.diffusion_models.lightricks.relative_error import TOLERANCE, relative_error
from rayltx.errors import InputError
from rayltx.sequence_parallel.group import SequenceParallelGroup

pytestmark = pytest.mark.comfyui
CHUNKS = 4


@pytest.fixture
def model(comfy, tmp_path, request):
    import comfy.sd

    version = request.param
    save_tiny_checkpoint(tmp_path / "model.safetensors", version)
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors")), version


def large(version):
    """A latent of 2,304 video tokens: a chunk has at least 512."""
    work = scenarios.Workspace(version, CONFIGS[version])
    work.video = {"samples": work.randn(1, 128, 4, 24, 24)}
    return work


class LargestTensor(TorchDispatchMode):
    """The largest tensor that an operation makes, in elements, and what all feed-forwards keep alive at once is its share."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                LargestTensor.largest = max(LargestTensor.largest, tensor.untyped_storage().nbytes())
        return out


def feed_forward_peak(model, version):
    """Bytes of the largest tensor made within the video feed-forwards of one sampling."""
    LargestTensor.largest = 0
    inner = model.model.diffusion_model
    hooks = []
    for block in inner.transformer_blocks:
        first = block.ff.net[0]
        mode = LargestTensor()
        hooks.append(first.register_forward_pre_hook(lambda module, args, mode=mode: mode.__enter__() and None))
        hooks.append(first.register_forward_hook(lambda module, args, out, mode=mode: mode.__exit__(None, None, None)))
    out = scenarios.tensors_of(scenarios.ksampler(model, large(version), cfg=1.0))
    for hook in hooks:
        hook.remove()
    return LargestTensor.largest, out


@pytest.mark.parametrize("model", VERSIONS, indirect=True)
def test_the_same_result_with_a_share_of_the_memory(model):
    from rayltx.comfy_dist.main_process.feed_forward_patch import with_chunked_feed_forward

    model, version = model
    names = list(model.model.diffusion_model.state_dict())
    with torch.inference_mode():
        at_once, expected = feed_forward_peak(model, version)
        chunked_model = with_chunked_feed_forward(model, CHUNKS)
        in_chunks, found = feed_forward_peak(chunked_model, version)
        bypassed, again = feed_forward_peak(model, version)
    assert max(map(relative_error, found, expected)) <= TOLERANCE
    assert in_chunks <= at_once / CHUNKS * 1.12  # a chunk is a multiple of 64 tokens
    assert bypassed == at_once and all(torch.equal(a, b) for a, b in zip(again, expected))
    assert list(model.model.diffusion_model.state_dict()) == names
    assert "forward" not in vars(model.model.diffusion_model.transformer_blocks[0].ff)


@pytest.mark.parametrize("model", ["LTX-Video"], indirect=True)
def test_twice_is_once_with_the_last_number(model):
    from rayltx.comfy_dist.main_process.feed_forward_patch import with_chunked_feed_forward
    from rayltx.diffusion_models.lightricks.feed_forward import CHUNKS_OPTION

    model, version = model
    with torch.inference_mode():
        twice = with_chunked_feed_forward(with_chunked_feed_forward(model, 2), CHUNKS)
        peak, _ = feed_forward_peak(twice, version)
        at_once, _ = feed_forward_peak(model, version)
    assert twice.model_options["transformer_options"][CHUNKS_OPTION] == CHUNKS
    assert CHUNKS_OPTION not in model.model_options["transformer_options"]
    assert peak <= at_once / CHUNKS * 1.12


class Doubled(torch.nn.Module):
    """A pack's layer in the place of ComfyUI's."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


def our_hook():
    from rayltx.comfy_dist.worker_process.low_rank_patches import LowRankAtUse

    return LowRankAtUse([], [], torch.device("cpu"))


def of_a_pack(original):
    @functools.wraps(original)
    def forward(self, x):
        return original(self, x)

    return forward


CHANGES = {
    "nothing": lambda ff, patch: None,
    "a forward": lambda ff, patch: patch.setattr(ff, "forward", ff.forward, raising=False),
    "a layer's forward": lambda ff, patch: patch.setattr(ff.net[2], "forward", ff.net[2].forward),
    "a hook": lambda ff, patch: ff.net[0].register_forward_hook(lambda *args: None),
    "a hook of ours": lambda ff, patch: ff.net[2].register_forward_hook(our_hook()),
    "a patch at use": lambda ff, patch: patch.setattr(ff.net[2], "weight_function", [lambda weight: weight]),
    "a layer": lambda ff, patch: patch.setitem(ff.net[0]._modules, "proj", Doubled(ff.net[0].proj)),
    "the class's forward": lambda ff, patch: patch.setattr(type(ff), "forward", of_a_pack(type(ff).forward)),
    "a scale for all tokens": lambda ff, patch: patch.setattr(
        ff.net[2], "layout_type", "TensorCoreNVFP4Layout", raising=False
    ),
}


@pytest.mark.parametrize("chunks", [SAVING, UNASKED])
@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("model", ["LTX-2.3"], indirect=True)
def test_unasked_it_is_in_chunks_where_nobody_looks_at_all_tokens(model, change, chunks, monkeypatch):
    from rayltx.diffusion_models.lightricks import feed_forward
    from rayltx.diffusion_models.lightricks.comfyui_host import chunked

    blocks = model[0].model.diffusion_model.transformer_blocks
    ff = blocks[0].ff
    seen = []
    x = torch.randn(1, 1500, ff.net[2].out_features)
    monkeypatch.setattr(feed_forward, "AUTOMATIC_INNER_BYTES", 4 * x.nbytes // 3)
    CHANGES[change](ff, monkeypatch)
    with torch.inference_mode():
        expected = ff(x)
        with chunked(model[0].model.diffusion_model, chunks):
            # Too late to count.
            ff.net[0].proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
            found = ff(x)
    assert relative_error(found, expected) <= TOLERANCE
    in_chunks = {"nothing", "a hook of ours", *(["a patch at use"] if chunks == SAVING else [])}
    assert seen == ([512, 988] if change in in_chunks else [1500])
    seen.clear()
    with torch.inference_mode(), chunked(model[0].model.diffusion_model, 3):
        ff(x)
    assert seen == ([1500] if change == "a scale for all tokens" else [512, 988]), "asked for"
    seen.clear()
    with torch.inference_mode(), chunked(model[0].model.diffusion_model, 3, ["transformer_blocks.0.ff"]):
        ff(x)
    assert seen == [1500], "shown all tokens, whatever was asked for"


@pytest.mark.parametrize("saves_memory", [False, True])
@pytest.mark.parametrize("model", ["LTX-2.3"], indirect=True)
def test_a_worker_does_so_by_itself(comfy, model, saves_memory, monkeypatch):
    """And the answer is that of the whole; after a lack of memory where a patch makes a weight anew, too."""
    from rayltx.comfy_dist.self_test import Case, call
    from rayltx.diffusion_models.lightricks import feed_forward
    from rayltx.diffusion_models.lightricks.comfyui_rows import shared

    model = model[0].model.diffusion_model
    monkeypatch.setattr(feed_forward, "MIN_CHUNK_TOKENS", 8)
    monkeypatch.setattr(feed_forward, "CHUNK_MULTIPLE", 1)
    monkeypatch.setattr(feed_forward, "AUTOMATIC_INNER_BYTES", 4 * 15 * model.inner_dim * 4)
    ff, seen = model.transformer_blocks[0].ff, []
    monkeypatch.setattr(model.transformer_blocks[1].ff.net[2], "weight_function", [lambda weight: weight])
    chunks = {"feed_forward_chunks": SAVING} if saves_memory else {}
    with torch.inference_mode():
        expected = call(model, Case("text to video"), torch.device("cpu"))
        with shared(model, SequenceParallelGroup.single(), **chunks):
            for block in model.transformer_blocks[:2]:
                block.ff.net[0].proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
            found = call(model, Case("text to video"), torch.device("cpu"))
    assert max(map(relative_error, found, expected)) <= TOLERANCE
    assert seen == [15, 15, 15, *([15, 15, 15] if saves_memory else [45])]
    assert "forward" not in vars(ff)


def test_a_model_that_is_not_ltx(comfy):
    from rayltx.comfy_dist.main_process.feed_forward_patch import with_chunked_feed_forward

    class NotLTX:
        model = torch.nn.Module()

    with pytest.raises(InputError, match="not an LTX transformer"):
        with_chunked_feed_forward(NotLTX(), 2)
