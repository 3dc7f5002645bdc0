"""What ranks run to see whether tables of positions are kept, in ComfyUI's models. A module of its own, imported by name."""

import torch
from comfy_models import tiny_model
from counting_tables import CountingTables

from rayltx.diffusion_models.lightricks.comfyui_rows import shared
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.partition import ParallelConfig

CPU = torch.device("cpu")


def answers_by_case(path, version, degrees):
    """By case: whether each of three calls gives the bits of one that keeps nothing, and the tables made in each."""
    model = tiny_model(path, version)
    from rayltx.comfy_dist import self_test

    config = ParallelConfig(*degrees)
    group = SequenceParallelGroup.create(config) if config.world_size > 1 else SequenceParallelGroup.single()
    found = {}
    kept = CountingTables()
    for case in self_test.cases_for(model, group):
        with self_test.own_attention_of(model, case), torch.inference_mode():
            with shared(model, group):
                plain = self_test.call(model, case, CPU)
            calls = []
            for _ in range(3):
                before = kept.made
                with shared(model, group, kept_tables=kept):
                    answer = self_test.call(model, case, CPU)
                calls.append((all(map(torch.equal, answer, plain)), kept.made - before))
            found[case.name] = calls
    return found


def tables_made(path):
    """By what another call differs in: the tables that it makes, and whether its answer is that of a model that keeps none."""
    model = tiny_model(path, "LTX-2")
    from rayltx.comfy_dist import self_test

    group, kept = SequenceParallelGroup.single(), CountingTables()
    args, kwargs = self_test.forward_arguments(model, self_test.CASES[0], CPU)

    def call(**given):
        before = kept.made
        with torch.inference_mode():
            with shared(model, group, kept_tables=kept):
                answer = self_test.answer(model, args, {**kwargs, **given})
            made = kept.made - before
            with shared(model, group):
                plain = self_test.answer(model, args, {**kwargs, **given})
        return made, all(map(torch.equal, answer, plain))

    def writing(arguments, extra):
        out = extra["original_block"](arguments)
        arguments["v_pe"][0][0].mul_(0.5)  # of the tables, which later blocks then see
        return out

    options = kwargs.get("transformer_options", {})
    written = {**options, "patches_replace": {"dit": {("double_block", 0): writing}}}
    found = {"first": call(), "the same": call(), "another frame rate": call(frame_rate=50), "back": call()}
    found["a patch that writes"] = call(transformer_options=written)
    found["after it"] = call()
    model.positional_embedding_max_pos = [10, 1024, 1024]
    found["another setting of the model"] = call()
    found["and the same again"] = call()
    own = type(model)._precompute_freqs_cis
    model._precompute_freqs_cis = lambda *args, **kwargs: own(model, *args, **kwargs)
    found["another's method"] = call()
    return found
