"""The demo's text: a small vocabulary, one context vector a word.

The demo checkpoint was trained without a text encoder. A prompt is three words, "red circle right", and each becomes
one context token: the one-hot vector of the word. The rest of the context is masked out, as a tokenizer's padding is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayltx.demo.clips import COLOURS, MOTIONS, SHAPES, Scene
from rayltx.errors import InputError

DEFAULT_PROMPT = "red-circle-right"
NUM_TOKENS = 8
CONTEXT_DIM = 64
VOCABULARY = (*COLOURS, *SHAPES, *MOTIONS)

PROMPTS: dict[str, Scene] = {
    "red-circle-right": Scene("red", "circle", "right"),
    "blue-square-left": Scene("blue", "square", "left"),
    "yellow-triangle-up": Scene("yellow", "triangle", "up"),
    "green-circle-down": Scene("green", "circle", "down"),
    "magenta-square-up": Scene("magenta", "square", "up"),
    "white-triangle-right": Scene("white", "triangle", "right"),
}


def parse_prompt(text: str) -> Scene:
    """The scene that a named prompt, or any "colour shape motion", asks for.

    Raises InputError with the vocabulary for anything else.
    """
    words = text.lower().replace("-", " ").split()
    kinds = (tuple(COLOURS), SHAPES, tuple(MOTIONS))
    if len(words) == 3 and all(word in kind for word, kind in zip(words, kinds)):
        return Scene(*words)
    raise InputError(
        f'prompt={text!r}: the demo checkpoint knows prompts of three words, "colour shape motion", with a colour of '
        f"{', '.join(COLOURS)}; a shape of {', '.join(SHAPES)}; a motion of {', '.join(MOTIONS)}"
    )


def scene_context(scene: Scene | None) -> tuple[Tensor, Tensor]:
    """Text context and mask of a scene; of the empty prompt for None.

    Returns context (1, 8, 64) float32 and mask (1, 8) int64, 1 for tokens that count.
    The empty prompt keeps one token of zeros: a mask without any token would leave nothing to attend to.
    """
    context = torch.zeros(1, NUM_TOKENS, CONTEXT_DIM)
    mask = torch.zeros(1, NUM_TOKENS, dtype=torch.int64)
    words = [scene.colour, scene.shape, scene.motion] if scene else []
    for position, word in enumerate(words):
        context[0, position, VOCABULARY.index(word)] = 8.0  # a vector of about unit variance, as a text encoder's is
    mask[0, : max(len(words), 1)] = 1
    return context, mask
