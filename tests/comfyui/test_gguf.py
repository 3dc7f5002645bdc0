"""GGUF files in ComfyUI's model on the workers, and LoRAs on quantised weights."""

from __future__ import annotations

import comfy_scenarios as scenarios
import pytest
import torch
from comfy_models import CONFIGS, VERSIONS, quantise, save_tiny_checkpoint
from comfy_scenarios import SAMPLING_TOLERANCE
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from slow_cases import slow

from rayltx.diffusion_models.lightricks.relative_error import relative_error
from rayltx.expansion.comfyui_gguf.convert import convert
from rayltx.sequence_parallel.partition import ParallelConfig

pytestmark = pytest.mark.comfyui
SAME_WEIGHTS = 1e-6  # of one that uses the same numbers from another file, on as many ranks


@pytest.fixture(scope="module")
def files(comfy, tmp_path_factory):
    """files(version, type) -> (GGUF file, safetensors file of the same values in float32)"""
    folder = tmp_path_factory.mktemp("gguf")

    def get(version, type):
        endings = (" source.safetensors", ".gguf", ".safetensors")
        source, quantised, plain = (folder / f"{version} {type}{ending}" for ending in endings)
        if not plain.exists():
            save_tiny_checkpoint(source, version)
            convert(source, quantised, type)
            convert(quantised, plain, "float32")
        return quantised, plain

    return get


@pytest.fixture
def load(cluster):
    from rayltx.comfy_dist.main_process.placement import Placement
    from rayltx.comfy_dist.main_process.twin import LoadOptions, load_twin

    def run(path, ranks=2, budget=0, **options):
        placement = Placement(cluster.request, ParallelConfig(ranks, 1), weight_budget=budget)
        return load_twin(str(path), placement, LoadOptions(**options))

    return run


def sample(model, version, scenario=scenarios.euler):
    with torch.inference_mode():
        return scenarios.tensors_of(scenario(model, version, CONFIGS[version]))


def placed_bytes(model):
    """What each rank has on its device of the weights."""
    from rayltx.comfy_dist.comfy_host import ComfyHost
    from rayltx.distributed_worker.worker_calls import ask

    placed = model.link.remote.call(ask(ComfyHost.placed_bytes), "measuring")
    return [placed[rank] for rank in sorted(placed)]


def difference(found, expected):
    assert all(torch.isfinite(tensor).all() for tensor in expected)
    return max(map(relative_error, found, expected))


def whole(path):
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(path))


@pytest.mark.parametrize("type", ["Q4_0", *slow("F16", "Q8_0")])
@pytest.mark.parametrize("version", VERSIONS)
def test_two_workers_equal_one_and_the_same_weights_dequantised(files, load, version, type):
    quantised, plain = files(version, type)
    twin = load(quantised)
    formats = twin.link.spec.gguf.formats
    assert bool(formats) == (type != "F16")
    # As blocks, in memory: a file of Q4_0 takes a fraction of float32.
    assert twin.link.remote.source.weight_bytes <= quantised.stat().st_size * 1.02
    two = sample(twin, version)
    assert difference(two, sample(twin.with_config(ParallelConfig(1, 1)), version)) <= SAMPLING_TOLERANCE
    assert difference(two, sample(load(plain), version)) <= SAME_WEIGHTS
    assert difference(two, sample(whole(plain), version)) <= SAMPLING_TOLERANCE


@pytest.mark.parametrize("type", slow("Q4_1", "Q5_0", "Q5_1", "BF16"))
def test_other_types(files, load, type):
    quantised, plain = files("LTX-2", type)
    assert difference(sample(load(quantised), "LTX-2"), sample(whole(plain), "LTX-2")) <= SAMPLING_TOLERANCE


def test_narrow_dequantisation_is_what_was_asked_for(files, load):
    quantised, _ = files("LTX-Video", "Q8_0")
    exact = sample(load(quantised), "LTX-Video")
    assert difference(sample(load(quantised, dequant_dtype="target"), "LTX-Video"), exact) == 0.0
    assert 1e-6 < difference(sample(load(quantised, dequant_dtype="bfloat16"), "LTX-Video"), exact) < 0.1


def test_a_file_without_its_metadata_is_refused(files, load, tmp_path):
    from rayltx.errors import CheckpointError, UnsupportedError

    _, plain = files("LTX-2", "Q8_0")
    save_file(load_file(plain), tmp_path / "bare.safetensors")
    convert(tmp_path / "bare.safetensors", tmp_path / "bare.gguf", "Q8_0")
    with pytest.raises((CheckpointError, UnsupportedError), match="metadata"):
        load(tmp_path / "bare.gguf")


@pytest.mark.parametrize("damage", ["a NaN scale", "cut", "a text encoder"])
def test_a_file_that_cannot_be_is_refused_before_any_worker_allocates(files, load, cluster, tmp_path, damage):
    import gguf

    from rayltx.errors import CheckpointError

    quantised, _ = files("LTX-Video", "Q8_0")
    content, path = bytearray(quantised.read_bytes()), tmp_path / "bad.gguf"
    if damage == "a NaN scale":
        tensor = next(t for t in gguf.GGUFReader(quantised).tensors if t.tensor_type.name == "Q8_0")
        content[tensor.data_offset : tensor.data_offset + 2] = b"\xff\x7f"
        message = f"{tensor.name}.*scale"
    elif damage == "cut":
        del content[-1000:]
        message = "bad.gguf"
    else:
        writer = gguf.GGUFWriter(path, "t5encoder")
        writer.add_tensor("enc.blk.0.attn_q.weight", torch.zeros(32, 32).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        message = "text encoder"
    if damage != "a text encoder":
        path.write_bytes(content)
    held = cluster.held_bytes()
    with pytest.raises(CheckpointError, match=message):
        load(path)
    assert cluster.held_bytes() == held


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
@pytest.mark.parametrize("version", ["LTX-2.3", *slow("LTX-2", "LTX-2.5")])
def test_a_file_without_its_text_connector(load, tmp_path, version, kind):
    """As some publish them, with the connector next to the text encoder. Text that went through it is all that is needed."""
    from rayltx.errors import InputError

    save_tiny_checkpoint(tmp_path / "full.safetensors", version)
    with safe_open(tmp_path / "full.safetensors", "pt") as file:
        metadata = file.metadata()
    kept = {
        name: t for name, t in load_file(tmp_path / "full.safetensors").items() if "embeddings_connector" not in name
    }
    path = tmp_path / "transformer.safetensors"
    save_file(kept, path, metadata=metadata)
    twin = load(path)
    if kind == "gguf":
        convert(path, tmp_path / "transformer.gguf", "F16")
        convert(tmp_path / "transformer.gguf", path, "float32")
        twin = load(tmp_path / "transformer.gguf")
    config = CONFIGS[version]
    work = scenarios.Workspace(version, config)
    processed = {"LTX-2": 2 * config["caption_channels"]}.get(version, work.context_width)
    for side in (work.positive, work.negative):
        side[0][0] = work.randn(1, scenarios.TEXT_TOKENS, processed)
    with torch.inference_mode():
        expected, found = (scenarios.tensors_of(scenarios.ksampler(model, work)) for model in (whole(path), twin))
    assert difference(found, expected) <= SAMPLING_TOLERANCE
    raw = scenarios.Workspace(version, config)
    for side in (raw.positive, raw.negative):
        side[0] = [raw.randn(1, scenarios.TEXT_TOKENS, config["caption_channels"]), {"unprocessed_ltxav_embeds": True}]
    with torch.inference_mode(), pytest.raises(InputError, match="no text connector"):
        scenarios.ksampler(twin, raw)


# ---- LoRA


def adapters(config, kind, seed=7):
    """A LoRA file's tensors for two layers of a tiny model, and the same as differences of the weights, by hand."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator) * 0.15  # noqa: E731
    width = config["num_attention_heads"] * config["attention_head_dim"]
    layers = {
        "transformer_blocks.0.attn1.to_q": (width, width),
        "transformer_blocks.1.ff.net.0.proj": (4 * width, width),
    }
    tensors, deltas, scales = {}, {}, {}
    for layer, (rows, columns) in layers.items():
        name = f"diffusion_model.{layer}"
        if kind in ("lora", "dora"):
            up, down = randn(rows, 4), randn(4, columns)
            tensors |= {
                f"{name}.lora_up.weight": up,
                f"{name}.lora_down.weight": down,
                f"{name}.alpha": torch.tensor(2.0),
            }
            deltas[layer] = up @ down * (2.0 / 4)
            if kind == "dora":
                scales[layer] = tensors[f"{name}.dora_scale"] = randn(rows, 1).abs() + 1.0
        elif kind == "loha":
            parts = [randn(rows, 4), randn(4, columns), randn(rows, 4), randn(4, columns)]
            for part, suffix in zip(parts, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")):
                tensors[f"{name}.{suffix}"] = part
            tensors[f"{name}.alpha"] = torch.tensor(4.0)
            deltas[layer] = (parts[0] @ parts[1]) * (parts[2] @ parts[3])
        elif kind == "lokr":
            small, large = randn(4, 4), randn(rows // 4, columns // 4)
            tensors |= {f"{name}.lokr_w1": small, f"{name}.lokr_w2": large}
            deltas[layer] = torch.kron(small, large)
    return tensors, deltas, scales


def by_hand(weight, delta, scale, strength):
    """The weight that a LoRA means, to ComfyUI.

    DoRA (arXiv 2402.09353) divides by the norm of what it scales; ComfyUI takes the norm of the weight without the delta
    where the scale has one for each row. strength goes from the weight to the result.
    """
    if scale is None:
        return weight + strength * delta
    directed = (weight + delta) * (scale / weight.norm(dim=1, keepdim=True))
    return weight + strength * (directed - weight)


@pytest.fixture(scope="module")
def bases(files, tmp_path_factory):
    """bases(base) -> (file to load, the same weights in float32)"""
    folder = tmp_path_factory.mktemp("bases")
    version = "LTX-Video"

    def get(base):
        if base == "Q8_0":
            return files(version, "Q8_0")
        path, plain = folder / f"{base}.safetensors", folder / f"{base} plain.safetensors"
        save_tiny_checkpoint(path, version, dtype=torch.bfloat16 if base == "bf16" else torch.float32)
        if base.startswith("fp8"):
            quantise(path, scaled=base == "fp8 scaled")
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        values = {}
        for name, tensor in tensors.items():
            if name.endswith((".scale_weight", ".scale_input")) or "scaled_fp8" in name:
                continue
            scale = tensors.get(name.removesuffix("weight") + "scale_weight") if name.endswith(".weight") else None
            values[name] = tensor.float() * (1.0 if scale is None else scale.float())
        save_file(values, plain, metadata=metadata)
        return path, plain

    return get


@pytest.mark.parametrize("kind", ["lora", *slow("dora", "loha", "lokr")])
@pytest.mark.parametrize("base", ["float32", "bf16", "fp8", "fp8 scaled", "Q8_0"])
def test_a_lora_is_its_delta_on_the_weights(bases, load, tmp_path, base, kind):
    import comfy.sd

    version, strength = "LTX-Video", 0.7
    path, plain = bases(base)
    tensors, deltas, scales = adapters(CONFIGS[version], kind)
    twin = load(path)
    digest = twin.link.remote.digest()
    without = sample(twin, version)
    patched = comfy.sd.load_lora_for_models(twin, None, tensors, strength, 0)[0]
    found = sample(patched, version)

    values = load_file(plain)
    with safe_open(plain, "pt") as file:
        metadata = file.metadata()
    for layer, delta in deltas.items():
        name = next(key for key in values if key.endswith(f"{layer}.weight"))
        values[name] = by_hand(values[name].double(), delta.double(), scales.get(layer), strength).float()
    save_file(values, tmp_path / "by hand.safetensors", metadata=metadata)
    expected = sample(whole(tmp_path / "by hand.safetensors"), version)

    assert difference(found, expected) <= SAMPLING_TOLERANCE
    assert difference(found, without) > 1e-3
    again = sample(twin, version)
    assert all(torch.equal(a, b) for a, b in zip(again, without))
    assert twin.link.remote.digest() == digest


@pytest.mark.parametrize("base", ["Q8_0", "fp8"])
def test_several_loras_and_hooks_on_quantised_weights(bases, load, base):
    """Against the same on the dequantised file."""
    path, plain = bases(base)
    twin, expected = load(path), whole(plain)
    for scenario in (scenarios.two_loras, scenarios.hook_lora, scenarios.lora):
        assert (
            difference(sample(twin, "LTX-Video", scenario), sample(expected, "LTX-Video", scenario))
            <= SAMPLING_TOLERANCE
        )


@pytest.mark.parametrize("base", ["Q8_0", *slow("float32", "fp8", "fp8 scaled")])
def test_a_small_budget_streams_the_rest(bases, load, base):
    """As on a card that is too small: layers beyond the budget stay with the shared copy, and come when they are used."""
    path, _ = bases(base)
    twin = load(path)
    for scenario in (scenarios.euler, scenarios.lora, scenarios.hook_lora):
        expected = sample(twin, "LTX-Video", scenario)
        share = twin.link.remote.source.weight_bytes * 2 // 3
        small = load(path, budget=share)
        digest = small.link.remote.digest()
        for _ in range(2):  # a second run finds the layers where the first left them
            assert difference(sample(small, "LTX-Video", scenario), expected) <= SAME_WEIGHTS
        loaded = placed_bytes(small)
        assert all(0 < count <= share for count in loaded[:2]), (loaded, share)  # of the ranks that sampled
        small.link.memory.unload()
        assert difference(sample(small, "LTX-Video", scenario), expected) <= SAME_WEIGHTS
        assert small.link.remote.digest() == digest


def test_a_budget_that_is_lowered_counts_at_the_next_run(bases, load):
    import dataclasses

    path, _ = bases("Q8_0")
    twin = load(path)
    expected = sample(twin, "LTX-Video", scenarios.lora)
    share = twin.link.remote.source.weight_bytes * 2 // 3
    small = twin.placed(dataclasses.replace(twin.placement, weight_budget=share))
    assert difference(sample(small, "LTX-Video", scenarios.lora), expected) <= SAME_WEIGHTS
    assert all(0 < count <= share for count in placed_bytes(small)[:2])
    sample(twin, "LTX-Video")
    assert all(count > share for count in placed_bytes(small)[:2])


def test_a_lora_for_another_model_is_refused(bases, load):
    """The same names, other widths: ComfyUI would log an error for each layer, and sample without it."""
    import comfy.sd

    from rayltx.errors import InputError

    path, _ = bases("Q8_0")
    twin = load(path)
    wide = {**CONFIGS["LTX-Video"], "attention_head_dim": 48}
    patched = comfy.sd.load_lora_for_models(twin, None, adapters(wide, "lora")[0], 1.0, 0)[0]
    with pytest.raises(InputError, match=r"attn1.to_q.weight is made for 192x192, and the model has 96x96"):
        sample(patched, "LTX-Video")
    sample(twin, "LTX-Video")
