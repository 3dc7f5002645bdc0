"""What the sound does by itself in a block, done while the picture's self-attention waits for the link.

ComfyUI's block of an audio-video model has the picture attend to itself and the text, and then the sound. Every rank does all of
the sound, which needs nothing of the picture until then: here it is done between the last parts that self-attention sends and the
first that it gets. The block's own code does it, called a second time for the sound alone, and what its attention modules gave is
given again where the block comes to them. The numbers are the same. It is done for a block whose code is known, where nobody
else looks on.

Letters in shapes: B batch, A audio tokens, Da audio width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from rayltx.diffusion_models.lightricks.known_code import has_known_forward, is_untouched
from rayltx.diffusion_models.lightricks.replaced import replaced

_KNOWN = (
    "3008a88b48203d45",  # `BasicAVTransformerBlock.forward`, 0.16 to 0.29
    "32fa7699385af44d",  # 0.30 to 0.33
)
# In the options, what a block does. For the sound by itself:
_SOUND_ALONE = {"run_vx": False, "a2v_cross_attn": False, "v2a_cross_attn": False}
_OWN_ATTENTION = ("audio_attn1", "audio_attn2")  # to itself and to the text, in this order
_METHODS = ("get_ada_values", "_apply_text_cross_attention")  # of the block, that are called again, too
_OPTIONS = "transformer_options"


class _Reached(Exception):
    """What comes behind needs the picture."""


class SoundAhead:
    """Of one block."""

    def __init__(self, block: Any) -> None:
        """block: for which `can_go_ahead` holds."""
        self._block = block
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # of the block, that is under way
        self._is_ahead = False
        self._given: dict[str, Tensor] = {}  # by the attention module

    @staticmethod
    def can_go_ahead(block: nn.Module) -> bool:
        """Whether a block is known, and nobody looks on at what of it is called twice.

        What is inside of these is called once, with what it is called with otherwise; so are hooks of the block.
        """
        called_twice = [getattr(block, name, None) for name in _OWN_ATTENTION]
        is_known = has_known_forward(block, _KNOWN) and not any(name in vars(block) for name in _METHODS)
        return is_known and all(isinstance(module, nn.Module) and is_untouched(module) for module in called_twice)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within the `with` the block's forwards can be told to `go`."""
        with contextlib.ExitStack() as scope:
            scope.callback(self._block.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            scope.callback(self._block.register_forward_hook(self._end).remove)
            for name in _OWN_ATTENTION:
                module = getattr(self._block, name)
                scope.enter_context(replaced(module, "forward", functools.partial(self._attend, name, module.forward)))
            yield

    def go(self) -> None:
        """Do what the block under way has the sound do by itself. It is given to the block when it gets there."""
        call, self._call = self._call, None
        if call is None or not call[0] or self._given:
            return
        (streams, *args), kwargs = call
        options = kwargs.get(_OPTIONS) or {}
        sound = streams[1]
        if sound.numel() == 0 or not options.get("run_ax", True):
            return
        self._is_ahead = True
        try:
            # The block writes to the streams that it is given.
            self._block.forward((streams[0], sound.clone()), *args, **{**kwargs, _OPTIONS: {**options, **_SOUND_ALONE}})
        except _Reached:
            pass
        finally:
            self._is_ahead = False

    def _begin(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call, self._given = (args, kwargs), {}

    def _end(self, *_: object) -> None:
        self._call, self._given = None, {}  # which hold memory

    def _attend(self, name: str, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """(B, A, Da)"""
        if not self._is_ahead and name in self._given:
            return self._given.pop(name)
        out = original(*args, **kwargs)
        if self._is_ahead:
            self._given[name] = out
            if name == _OWN_ATTENTION[-1]:
                raise _Reached
        return out
