"""ComfyUI's own LTX models on a rank's rows of a batch: the seam, for groups of ranks that share a batch's rows.

ComfyUI puts positive and negative conditioning into one call where memory allows. Each group of ranks then calls the model on
its own rows, and shares their tokens by `comfyui_host.sharded`. Clips with masks of their own are shared by all ranks.

Letters in shapes: B rows of the batch.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rayltx.diffusion_models.lightricks.comfyui_host import sharded
from rayltx.diffusion_models.lightricks.feed_forward import UNASKED
from rayltx.diffusion_models.lightricks.kept_tables import KeptTables
from rayltx.diffusion_models.lightricks.kept_text import KeptText
from rayltx.diffusion_models.lightricks.replaced import replaced
from rayltx.sequence_parallel.batch_rows import RowShare
from rayltx.sequence_parallel.group import SequenceParallelGroup

# What ComfyUI's models are called with, and what of it is of the whole batch without being a tensor with B rows:
LATENT, OPTIONS = "x", "transformer_options"  # the latent, or a list of the video's and the audio's
OF_A_ROW = (LATENT, "context", "attention_mask")  # what may differ from row to row
REFERENCE_AUDIO = "ref_audio"  # a dictionary, whose "tokens" have one row or B
KINDS, NAMES = "cond_or_uncond", "uuids"  # in the options, one for as many rows as there are clips


@contextlib.contextmanager
def shared(
    diffusion_model: Any,
    group: SequenceParallelGroup,
    feed_forward_chunks: int = UNASKED,
    gathered: Collection[str] = (),
    as_projected: bool = True,
    rows_apart: bool = True,
    kept_text: KeptText | None = None,
    kept_tables: KeptTables | None = None,
) -> Iterator[None]:
    """Let a ComfyUI LTX model run on this rank's rows and tokens within the `with`. Otherwise as `sharded`.

    rows_apart: False to have all ranks share every row.
    """

    def on_tokens(of_rows: SequenceParallelGroup) -> contextlib.AbstractContextManager[None]:
        return sharded(
            diffusion_model, of_rows, feed_forward_chunks, gathered, as_projected, group, kept_text, kept_tables
        )

    if not group.row_groups or not rows_apart:
        with on_tokens(group):
            yield
        return
    forward = functools.partial(_forward_of_rows, diffusion_model._forward, group, on_tokens)
    with replaced(diffusion_model, "_forward", forward):
        yield


def _forward_of_rows(
    original: Callable[..., Any],
    group: SequenceParallelGroup,
    on_tokens: Callable[[SequenceParallelGroup], contextlib.AbstractContextManager[None]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The model's `_forward`, on the rows of this rank's group. Returns the whole answer on rank 0."""
    arguments = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
    arguments.update(arguments.pop("kwargs", {}))
    options = arguments.get(OPTIONS) or {}
    batch = batch_of(arguments[LATENT])
    kinds = max(1, len(options.get(KINDS) or ()))
    if batch % kinds == 0 and rows_are_alike(arguments):
        share = RowShare.of(group, batch, batch // kinds)
    else:
        share = RowShare.together(group, batch)
    if not share.is_whole:
        arguments = {name: _cut(share, name, value) for name, value in arguments.items()}
        arguments[OPTIONS] = _options_of_rows(share, options)
    with on_tokens(share.group):
        out = original(**arguments)
    return [_gather(share, each) for each in out] if isinstance(out, (list, tuple)) else _gather(share, out)


def batch_of(latent: Any) -> int:
    """Rows of a latent, or of a list of the video's and the audio's."""
    return int((latent[0] if isinstance(latent, (list, tuple)) else latent).shape[0])


def rows_are_alike(arguments: Mapping[str, Any]) -> bool:
    """Whether each row has the same timesteps, masks and positions, as the rows of one clip have. arguments: of `_forward`.

    From these ComfyUI's model takes some things of the first row for all, and the largest of all rows for each: what a group
    would not know of others' rows.
    """
    batch = batch_of(arguments[LATENT])
    tensors = [value for name, value in arguments.items() if name not in OF_A_ROW and isinstance(value, Tensor)]
    equal = [(value == value[:1]).all() for value in tensors if value.ndim and value.shape[0] == batch > 1]
    return not equal or bool(torch.stack(equal).all())  # waits for the device, once a call


def _cut(share: RowShare, name: str, value: Any) -> Any:
    """An argument's local rows. What is neither a tensor nor named above is the same for all rows."""
    if isinstance(value, Tensor):
        return share.cut(value)
    if isinstance(value, (list, tuple)) and all(isinstance(item, Tensor) for item in value):  # one for each stream
        return type(value)(map(share.cut, value))
    if name == REFERENCE_AUDIO and isinstance(value, dict):
        return {key: share.cut(item) if isinstance(item, Tensor) else item for key, item in value.items()}
    return value


def _options_of_rows(share: RowShare, options: dict[str, Any]) -> dict[str, Any]:
    """Patches look there at which rows are positive, and which negative."""
    cut = dict(options)
    for name in (KINDS, NAMES):
        entries = options.get(name)
        if entries and share.batch % len(entries) == 0:
            clips = share.batch // len(entries)
            cut[name] = entries[share.local.start // clips : -(-share.local.stop // clips)]
    return cut


def _gather(share: RowShare, answer: Tensor) -> Tensor:
    """The whole answer on rank 0; something of the same shape elsewhere."""
    whole = share.gather(answer)
    if whole is None:
        whole = answer.new_zeros(1).expand(share.batch, *answer.shape[1:])
    return whole
