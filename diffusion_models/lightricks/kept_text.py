"""The text's keys and values, which no step changes.

A layer's text attention projects the same text at every step of a run, and so does every rank, whose tokens all look at the
whole of it: on 8 ranks that is 6 % of LTX-2's work at 121 frames. Where there is room they are kept from the first step on.
They are taken for a text that has the same numbers, never for one of the same shape or of the next step, so that the answer
is bit for bit the one without. LTX-2.3 modulates its text by the step's noise, layer by layer, and has nothing to keep.

Whoever owns a `KeptText` has it forget as soon as a weight may be another.

Letters in shapes: B batch, L text tokens, D width of the text, K width of the keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_MOST_TEXTS = 4  # of a run, for each stream: what a sampler gives in turn
# Of the memory that is left next to a step, a text gets one part in so many; on the CPU all ranks have the same memory.
_PARTS, _PARTS_ON_CPU = 4, 32


# Where the classes of linear layers are defined: torch's, ComfyUI's, and those of GGUF's blocks.
_LAYERS_OF = ("torch.nn.", "comfy.ops", "rayltx.comfy_dist.gguf_operations")


@dataclass(eq=False)
class _Text:
    numbers: Tensor  # (B, L, D), a copy: what it was made from may be written to
    projected: dict[nn.Module, Tensor] = field(default_factory=dict)  # (B, L, K), by the layer that made it


class KeptText:
    """What layers have made of a text."""

    def __init__(
        self, left_bytes: Callable[[], float], are_equal: Callable[[Tensor, Tensor], bool] = torch.equal
    ) -> None:
        """left_bytes: what is left of the device's memory next to a step, asked before a text is kept."""
        self._left_bytes, self._are_equal = left_bytes, are_equal
        self._layers: Sequence[nn.Module] = ()
        self._texts: list[_Text] = []
        self._met: list[tuple[Tensor, _Text | None]] = []  # in this forward; held, for no other to get their address
        self.is_off = False  # each layer has a text of its own, until it forgets

    @property
    def num_bytes(self) -> int:
        """Of the device's memory."""
        tensors = [tensor for text in self._texts for tensor in (text.numbers, *text.projected.values())]
        return sum(tensor.nbytes for tensor in tensors)

    def forget(self) -> None:
        """Before a weight changes, and when the memory is wanted."""
        self._texts, self._met, self.is_off = [], [], False

    @contextlib.contextmanager
    def in_forward(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """A forward of the model runs within the `with`. layers: all that `project` is called for."""
        self._layers, self._met = layers, []
        with contextlib.ExitStack() as failed:
            failed.callback(self.forget)  # the memory may be what was lacking
            yield
            failed.pop_all()
        self._met = []

    def project(self, layer: nn.Module, product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`product(x)`, or what it was for the same numbers. The caller does not write to it.

        layer: whose product it is. x: (B, L, D). Returns (B, L, K).
        """
        text = None if self.is_off else self._text_of(x)
        if text is None:
            return product(x)
        if layer not in text.projected:
            text.projected[layer] = product(x)
        return text.projected[layer]

    def _text_of(self, x: Tensor) -> _Text | None:
        for tensor, text in self._met:
            if tensor is x:
                return text
        widths = {met.shape[-1] for met, _ in self._met}
        if len(self._met) >= _MOST_TEXTS * len(widths | {x.shape[-1]}):  # each layer has a text of its own
            self.forget()
            self.is_off = True
            return None
        known = next((text for text in self._texts if self._is_of(text, x)), None) or self._begin(x)
        self._met.append((x, known))
        return known

    def _is_of(self, text: _Text, x: Tensor) -> bool:
        kept = text.numbers
        alike = (kept.shape, kept.dtype, kept.device) == (x.shape, x.dtype, x.device)
        return alike and self._are_equal(kept, x)  # waits for the device, once a forward

    def _begin(self, x: Tensor) -> _Text | None:
        """Keep another text, in place of the oldest of its kind where there are many; None where there is no room."""
        alike = [text for text in self._texts if text.numbers.shape[-1] == x.shape[-1]]
        if len(alike) >= _MOST_TEXTS:
            self._texts.remove(alike[0])
        outputs = sum(out_features for inputs, out_features in map(_widths, self._layers) if inputs == x.shape[-1])
        num_bytes = x.shape[:-1].numel() * outputs * x.element_size() + x.nbytes
        if num_bytes > part_for_text(self._left_bytes(), x.device.type == "cpu"):
            return None
        text = _Text(x.clone())
        self._texts.append(text)
        return text


def part_for_text(left_bytes: float, on_cpu: bool) -> float:
    """Bytes that the keys of one text may take, of what a step leaves of a device's memory."""
    return left_bytes / (_PARTS_ON_CPU if on_cpu else _PARTS)


def _widths(layer: Any) -> tuple[int, int]:
    return layer.in_features, layer.out_features


def is_plain(layer: nn.Module) -> bool:
    """Whether a linear layer gives the same for the same at every step, and nothing that may write to it looks at what it gives.

    One of a patch is not, whatever it is: it can go by the step. Nor is one whose weight goes through functions of others.
    """
    own = layer.__dict__
    is_known = type(layer).__name__ == "Linear" and type(layer).__module__.startswith(_LAYERS_OF)
    is_changed = "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]
    has_functions = any(getattr(layer, name, None) for name in ("weight_function", "bias_function"))
    return is_known and not is_changed and not has_functions
