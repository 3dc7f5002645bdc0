"""Which GGUF files are an LTX transformer, and what comes out of them."""

import logging

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from gguf_files import random_blocks, write_gguf

from rayltx.diffusion_models.lightricks.checkpoint import LTX_MARKS
from rayltx.errors import CheckpointError
from rayltx.expansion.comfyui_gguf.dequantisation import QuantisedTensor
from rayltx.expansion.comfyui_gguf.loader import gguf_sd_loader


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_the_prefix_is_taken_off(tmp_path, prefix):
    state_dict, extra = gguf_sd_loader(write_gguf(tmp_path / "m.gguf", prefix=prefix))
    assert sorted(state_dict) == sorted(LTX_MARKS)
    assert extra["arch_str"] == "ltxv"


def test_values_and_metadata(tmp_path):
    blocks = random_blocks(GGMLQuantizationType.Q5_K, 8).reshape(4, -1)
    tensors = {"a.weight": (GGMLQuantizationType.Q5_K, blocks), "a.bias": np.ones(4, np.float16)}
    path = write_gguf(tmp_path / "m.gguf", tensors, [("config", "{}", GGUFValueType.STRING)])
    state_dict, extra = gguf_sd_loader(path)
    assert isinstance(state_dict["a.weight"], QuantisedTensor)
    assert state_dict["a.weight"].shape == (4, 512)
    assert torch.equal(state_dict["a.bias"], torch.ones(4, dtype=torch.float16))
    assert extra["metadata"]["config"] == "{}"


def test_tensors_of_other_models_are_left_out_and_said(tmp_path, caplog):
    prefix = "model.diffusion_model."
    tensors = {prefix + mark: np.ones((4, 32), np.float32) for mark in LTX_MARKS}
    path = write_gguf(tmp_path / "m.gguf", {**tensors, "vae.conv_in.weight": np.ones(3, np.float32)})
    with caplog.at_level(logging.WARNING):
        state_dict, _ = gguf_sd_loader(path)
    assert sorted(state_dict) == sorted(LTX_MARKS)
    assert "1 tensors without the prefix" in caplog.text
    assert "vae.conv_in.weight" in caplog.text


@pytest.mark.parametrize("architecture", ["ltxv", "ltxav", "ltx2"])
def test_architectures_of_ltx(tmp_path, architecture):
    path = write_gguf(tmp_path / "m.gguf", {"a": np.ones(3, np.float32)}, architecture=architecture)
    assert gguf_sd_loader(path)[1]["arch_str"] == architecture


@pytest.mark.parametrize("architecture", [None, "pig"])
def test_an_unknown_architecture_is_judged_by_its_tensors(tmp_path, architecture):
    assert gguf_sd_loader(write_gguf(tmp_path / "m.gguf", architecture=architecture))[1]["arch_str"] == architecture
    path = write_gguf(tmp_path / "other.gguf", {"a": np.ones(3, np.float32)}, architecture=architecture)
    with pytest.raises(CheckpointError, match="has no adaln_single"):
        gguf_sd_loader(path)


@pytest.mark.parametrize("architecture", ["t5", "t5encoder", "llama", "gemma3", "qwen2vl"])
def test_text_encoders(tmp_path, architecture):
    path = write_gguf(tmp_path / "m.gguf", architecture=architecture)
    with pytest.raises(CheckpointError, match=rf"m.gguf: a text encoder \(architecture {architecture}\).*CLIPLoader"):
        gguf_sd_loader(path)


@pytest.mark.parametrize("architecture", ["flux", "sd1", "wan", "hyvid"])
def test_other_models(tmp_path, architecture):
    path = write_gguf(tmp_path / "m.gguf", architecture=architecture)
    with pytest.raises(CheckpointError, match=rf"architecture {architecture}, not LTX.*Unet Loader \(GGUF\)"):
        gguf_sd_loader(path)


def test_a_part_of_a_split_file(tmp_path):
    fields = [("split.count", 3, GGUFValueType.UINT16), ("split.no", 1, GGUFValueType.UINT16)]
    with pytest.raises(CheckpointError, match="part 2 of 3"):
        gguf_sd_loader(write_gguf(tmp_path / "m.gguf", fields=fields))
