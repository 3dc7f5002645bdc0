"""The text's keys and values are kept over the steps of a run, with the same bits as without, and go when a weight changes."""

import dataclasses

import comfy_worker_model
import pytest
import torch
from comfy_checkout import find_comfyui
from comfy_kept_text import answers_by_case, products_of_patched
from comfy_models import CONFIGS

from rayltx.sequence_parallel.partition import ParallelConfig

LAYERS = {"LTX-Video": 2 * 2, "LTX-2": 2 * 4}  # of two blocks, whose keys and values are of the text


@pytest.mark.parametrize("degrees", [(1, 1), (2, 1), (1, 2), (2, 1, 2)])
@pytest.mark.parametrize("version", list(CONFIGS))
def test_calls_with_a_kept_text_are_bit_for_bit_those_without(comfy, ranks, version, degrees):
    world_size = ParallelConfig(*degrees).world_size
    for of_rank in ranks.run(world_size, answers_by_case, str(find_comfyui()), version, degrees):
        for case, calls in of_rank.items():
            assert all(same for same, _ in calls), case
            made = [products for _, products in calls]
            if version in LAYERS:  # others modulate the text, by each layer's table
                assert made[0] >= LAYERS[version] // 2 and made[1:] == [0, 0], (case, made)


def test_what_others_have_changed_is_not_kept(comfy, ranks):
    found = ranks.run(2, products_of_patched, str(find_comfyui()))[0]
    assert found == {
        "nothing": (0, 8),
        "another attention for all": (0, 0),
        "a replaced block": (0, 0),
        "another forward of one attention": (0, 6),
        "a hook on one layer": (0, 7),
        "a layer of a patch": (0, 7, 2),
    }


def test_a_worker_keeps_a_text_for_a_run_and_no_longer_than_the_weights_are_the_same(comfy, tmp_path):
    import comfy.model_management as management

    from rayltx.comfy_dist.wire import HookPatches, PatchState, SentPatches
    from rayltx.distributed_worker.messages import pack
    from rayltx.sequence_parallel.group import SequenceParallelGroup

    model, inputs = comfy_worker_model.loaded(tmp_path, "LTX-Video")
    group = SequenceParallelGroup.single()

    def answer(step=inputs):
        return model.forward(group, step)

    def kept():
        return model._kept_text.num_bytes

    plain = answer()
    assert kept() > 0
    assert torch.equal(answer(), plain), "with what was kept"
    for let_go in (model.end_run, model.unload):
        let_go()
        assert kept() == 0
        assert torch.equal(answer(), plain) and kept() > 0
    model.unload_bytes(1)
    assert kept() == 0
    assert torch.equal(answer(), plain) and kept() == 0, "some weights are elsewhere now"
    model.unload()

    name = "diffusion_model.transformer_blocks.1.attn2.to_v.weight"
    weight = model.diffusion_model.transformer_blocks[1].attn2.to_v.weight
    patches = {name: [(0.5, ("diff", (torch.ones_like(weight),)), 1.0, None, None)]}
    nothing = pack({"object_patches": {}, "injections": {}})

    model.keep_hooks(HookPatches("hook", patches))
    hooked = answer(dataclasses.replace(inputs, hooks_key="hook"))
    assert not torch.allclose(hooked, plain)
    assert torch.equal(answer(), plain)
    assert torch.equal(answer(dataclasses.replace(inputs, hooks_key="hook")), hooked)
    model.drop_hooks()
    assert torch.equal(answer(), plain)

    model.set_patches(SentPatches(PatchState(patches=patches, patches_uuid="lora"), nothing))
    patched = answer()
    assert torch.allclose(patched, hooked, rtol=1e-4, atol=1e-5)
    assert torch.equal(answer(), patched)
    model.set_patches(SentPatches(PatchState(patches_uuid="none"), nothing))
    assert torch.equal(answer(), plain) and kept() > 0
    for loaded in list(management.current_loaded_models):  # as ComfyUI does for another model
        loaded.model_unload()
        management.current_loaded_models.remove(loaded)
    assert kept() == 0

    norm = torch.nn.Identity()
    code = pack({"object_patches": {"diffusion_model.transformer_blocks.0.attn1.q_norm": norm}, "injections": {}})
    model.set_patches(SentPatches(PatchState(patches_uuid="code"), code))
    assert not torch.equal(answer(), plain)
    assert kept() == 0, "what runs inside of the model could write to the text"
    model.close()
    assert kept() == 0


def test_weights_that_have_no_room_keep_no_text_either(comfy, tmp_path):
    from rayltx.sequence_parallel.group import SequenceParallelGroup

    model, inputs = comfy_worker_model.loaded(tmp_path, "LTX-Video")
    group = SequenceParallelGroup.single()
    right = model.forward(group, inputs)
    little = dataclasses.replace(inputs, load=dataclasses.replace(inputs.load, weight_budget=model.placed_bytes() // 2))
    assert torch.equal(model.forward(group, little), right)
    assert model._kept_text.num_bytes == 0
    model.close()
