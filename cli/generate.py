"""`rayltx generate`: the main job, on the embedded host or in ComfyUI's model."""

from __future__ import annotations

from rayltx.cli.conditioning import load_conditioning
from rayltx.cli.generate_options import GenerateOptions, Sides
from rayltx.cli.outputs import Outputs, check_outputs
from rayltx.cli.sampling_runs import Stages, console
from rayltx.demo.prompts import DEFAULT_PROMPT, parse_prompt, scene_context
from rayltx.demo.vae import CHECKPOINT, check_options, is_demo
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape
from rayltx.errors import InputError
from rayltx.expansion.comfyui_gguf.checkpoint import open_model_file


def run_generate(options: GenerateOptions) -> None:
    """Check everything that can be checked, then start workers, load, sample, decode and write."""
    shape = LatentShape.from_pixels(options.width, options.height, options.frames)
    options.check()
    checkpoint = open_model_file(options.checkpoint or CHECKPOINT)
    demo = is_demo(checkpoint)
    if demo:
        check_options(shape)
    check_outputs(options.outputs, has_pixels=options.has_vae(checkpoint.path) if options.comfyui else demo)
    sides = _conditioning(options, demo)
    request, config = options.cluster.resolve()
    stages = Stages()
    outputs = Outputs(options.outputs, options.frame_rate, _about(options, demo))
    # Imported here, not above: they take seconds, and the errors before this line should not.
    if options.comfyui:
        from rayltx.cli.generate_in_comfyui import generate_in_comfyui

        made = generate_in_comfyui(options, checkpoint, shape, sides, request, config, stages, outputs)
    else:
        from rayltx.cli.generate_on_diffusers import generate_on_diffusers

        assert sides is not None
        made = generate_on_diffusers(options, checkpoint, shape, sides, request, config, stages, outputs)
    outputs.write(made)
    console.print(stages.told())


def _conditioning(options: GenerateOptions, demo: bool) -> Sides | None:
    """Positive and negative; None where a text encoder makes them."""
    if options.conditioning is not None:
        positive, negative = load_conditioning(options.conditioning)
    elif demo:
        if options.text_encoders:
            raise InputError("text-encoder: the demo's model has no text encoder, but a vocabulary; leave it out")
        context, mask = scene_context(parse_prompt(DEFAULT_PROMPT if options.prompt is None else options.prompt))
        empty_context, empty_mask = scene_context(None)
        positive = {"context": context, "context_mask": mask}
        negative = {"context": empty_context, "context_mask": empty_mask}
    elif options.text_encoders:
        if options.prompt is None:
            raise InputError("prompt: say what is to be seen (--prompt TEXT)")
        return None
    else:
        raise InputError(
            "this checkpoint needs its text as the transformer takes it: give its text encoder (--text-encoder FILE, "
            "with --comfyui FOLDER and --prompt TEXT), or a file of conditioning (--conditioning)"
        )
    if options.cfg != 1.0 and negative is None:
        raise InputError(
            f"cfg={options.cfg} needs negative conditioning, and {options.conditioning} has none; add it, or use cfg=1"
        )
    frame_rate = {"frame_rate": options.frame_rate}
    return {**positive, **frame_rate}, None if negative is None else {**negative, **frame_rate}


def _about(options: GenerateOptions, demo: bool) -> dict[str, str]:
    """What a file is told to have been made from."""
    return {
        "prompt": options.prompt or (DEFAULT_PROMPT if demo and not options.conditioning else ""),
        **({"negative": options.negative} if options.negative else {}),
        "seed": str(options.seed),
        "cfg": str(options.cfg),
        **({"stochastic": "true"} if options.stochastic else {}),
        "frame_rate": str(options.frame_rate),
    }
