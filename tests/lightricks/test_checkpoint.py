"""What a file is said to be, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayltx.diffusion_models.lightricks.checkpoint import PREFIXES, open_checkpoint
from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
from rayltx.diffusion_models.lightricks.safetensors_files import SAFETENSORS_DTYPES
from rayltx.diffusion_models.lightricks.tiny_configs import TRANSFORMER_CONFIGS
from rayltx.diffusion_models.lightricks.tiny_models import save_tiny_checkpoint
from rayltx.errors import CheckpointError, UnsupportedError


@pytest.fixture
def saved(tmp_path):
    """saved(version, change) -> path of a tiny checkpoint, its tensors and config changed by `change`."""

    def save(version="LTX-Video", change=None, metadata=True):
        path = tmp_path / "model.safetensors"
        save_tiny_checkpoint(path, version)
        if change is not None or not metadata:
            tensors, config = load_file(path), dict(TRANSFORMER_CONFIGS[version])
            if change is not None:
                change(tensors, config)
            save_file(tensors, path, {"config": json.dumps({"transformer": config})} if metadata else None)
        return path

    return save


@pytest.mark.parametrize("version", list(TRANSFORMER_CONFIGS))
def test_versions_are_told_apart_by_what_they_hold(saved, version):
    checkpoint = open_checkpoint(saved(version))
    assert checkpoint.version == version
    assert checkpoint.num_blocks == 2
    assert sorted(name for names in checkpoint.portions for name in names) == sorted(checkpoint.tensors)
    assert len(checkpoint.portions) == 3  # what is outside of blocks, and each block


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_every_prefix_that_files_have_is_understood(tmp_path, prefix):
    path = tmp_path / "model.safetensors"
    save_tiny_checkpoint(path, "LTX-2", prefix=prefix)
    checkpoint = open_checkpoint(path)
    assert checkpoint.prefix == prefix
    DiffusersModel.of_checkpoint(checkpoint)
    with checkpoint.open() as reader:
        assert reader.read("patchify_proj.weight").shape == (96, 128)


def test_other_models_in_the_file_are_left_alone(saved):
    def add_vae(tensors, config):
        tensors["vae.decoder.conv_in.weight"] = torch.zeros(3)
        tensors["text_encoders.shared.weight"] = torch.zeros(3)

    checkpoint = open_checkpoint(saved(change=add_vae))
    assert not any("vae" in name or "text" in name for name in checkpoint.tensors)


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.safetensors"])
def test_pickles_are_refused_by_name_and_by_content(tmp_path, name):
    path = tmp_path / name
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="a pickle can run code"):
        open_checkpoint(path)


@pytest.mark.parametrize("keep", [4, 100, 0.5, 0.99])
def test_a_cut_file(saved, tmp_path, keep):
    content = saved().read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        open_checkpoint(path)


@pytest.mark.parametrize("tail", [b"\0", b"more bytes behind the last tensor"])
def test_bytes_behind_a_whole_file_are_left_alone(saved, tmp_path, tail):
    path = saved()
    longer = tmp_path / "longer.safetensors"
    longer.write_bytes(path.read_bytes() + tail)
    whole, found = open_checkpoint(path), open_checkpoint(longer)
    assert (found.prefix, dict(found.tensors), found.metadata) == (whole.prefix, dict(whole.tensors), whole.metadata)
    with whole.open() as expected, found.open() as reader:
        for name in whole.tensors:
            assert torch.equal(reader.read(name), expected.read(name))
        reader.read("proj_out.bias").zero_()  # a mapping of one's own
    with open_checkpoint(longer).open() as reader:
        assert reader.read("proj_out.bias").any()


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [4, 8]},  # a hole in front of it
        {"data_offsets": [0, 4_000_000]},
        {"data_offsets": [0, -4]},
        {"shape": [-1, -1]},
        {"shape": [1.0]},
        {"shape": [2]},
        {"shape": ["1"]},
        {"dtype": "F33"},
        {"data_offsets": None},
    ],
)
def test_bytes_behind_a_damaged_header(tmp_path, entry):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}).encode()
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4) + b"tail")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["F8_E8M0", "F8_E4M3", "F8_E5M2"])
def test_eight_bit_dtypes_are_read_as_they_are(tmp_path, name):
    dtype = SAFETENSORS_DTYPES[name]
    path = tmp_path / "model.safetensors"
    save_tiny_checkpoint(path, "LTX-2")
    tensors = {**load_file(path), "model.diffusion_model.scale": torch.arange(1, 5, dtype=torch.float32).to(dtype)}
    save_file(tensors, path)
    checkpoint = open_checkpoint(path)
    with checkpoint.open() as reader:
        assert torch.equal(
            reader.read("scale").view(torch.uint8), tensors["model.diffusion_model.scale"].view(torch.uint8)
        )


def test_an_empty_file(tmp_path):
    path = tmp_path / "empty.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        open_checkpoint(path)


def test_another_model(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"not an LTX transformer.*double_blocks.0"):
        open_checkpoint(path)


def test_a_file_without_config_is_not_guessed_at(saved):
    with pytest.raises(CheckpointError, match="no `config` metadata"):
        DiffusersModel.of_checkpoint(open_checkpoint(saved(metadata=False)))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, c: c.update(num_attention_heads=5), r"disagree: .* is \[\d+.* and should be"),
        (lambda t, c: c.update(num_layers=3), "num_layers=3, the file holds 2 transformer blocks"),
        (lambda t, c: t.pop("model.diffusion_model.proj_out.bias"), "proj_out.bias is missing"),
        (lambda t, c: t.update({"model.diffusion_model.more": torch.zeros(1)}), "more has no place in the model"),
    ],
)
def test_metadata_and_tensors_that_disagree(saved, change, message):
    with pytest.raises(CheckpointError, match=message):
        DiffusersModel.of_checkpoint(open_checkpoint(saved(change=change)))


def test_a_config_that_diffusers_cannot_build_is_refused_by_name(saved):
    path = saved(change=lambda tensors, config: config.update(positional_embedding_theta=5000.0))
    with pytest.raises(UnsupportedError, match=r"positional_embedding_theta=5000\.0"):
        DiffusersModel.of_checkpoint(open_checkpoint(path))


def test_config_that_is_not_json(tmp_path, saved):
    path = saved()
    save_file(load_file(path), path, {"config": "{"})
    with pytest.raises(CheckpointError, match="is not JSON"):
        open_checkpoint(path)


def test_other_dtypes_are_refused_by_the_embedded_host(saved):
    from rayltx.diffusion_models.lightricks.diffusers_host import DiffusersHost

    checkpoint = open_checkpoint(saved())
    host = DiffusersHost(DiffusersModel.of_checkpoint(checkpoint))
    weight = torch.zeros(96, 128)
    with pytest.raises(UnsupportedError, match="float8_e4m3fn"):
        host.assign({"patchify_proj.weight": weight.to(torch.float8_e4m3fn)})
    host.assign({"patchify_proj.weight": weight})
    with pytest.raises(UnsupportedError, match=r"bfloat16, other parameters are torch.float32"):
        host.assign({"proj_out.weight": weight.to(torch.bfloat16)})
