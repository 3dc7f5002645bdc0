"""ComfyUI's own LTX models on a rank's slice of the video tokens: the seam.

For the time of one forward, four of the model instance's methods are wrapped and its attention modules are told which
role they play. Everything that treats tokens by themselves then runs on the rank's tokens: block replacements, LoRA,
quantised layers and whatever else the user's ComfyUI does. Nothing is changed at class level, and nothing is left on
the model afterwards.

The seam knows ComfyUI by the names and shapes below, which change every few weeks. `comfy_dist.self_test` therefore
tries it on a tiny model of the installed version before it is trusted.

This module imports nothing of ComfyUI: it works on the instance that it is given.

Letters in shapes: B batch, n video tokens of this rank, N all video tokens (behind the grid mask of guides), D model
width, H heads, E head width, R rows of timesteps.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rayltx.diffusion_models.lightricks.feed_forward import AUTOMATIC, UNASKED, chunked_feed_forward
from rayltx.diffusion_models.lightricks.guide_masks import self_attention_mask_of
from rayltx.diffusion_models.lightricks.input_scales import agreed_input_scales, rounds_by_all_tokens
from rayltx.diffusion_models.lightricks.kept_tables import KeptTables
from rayltx.diffusion_models.lightricks.kept_text import KeptText, is_plain
from rayltx.diffusion_models.lightricks.known_code import has_comfyuis, is_comfyuis, is_untouched
from rayltx.diffusion_models.lightricks.projected_exchange import (
    SKIPPED,
    attend_while_projecting,
    is_known,
    kernel_of,
)
from rayltx.diffusion_models.lightricks.replaced import replaced
from rayltx.diffusion_models.lightricks.roles import TEXT_ROLES, AttentionRole
from rayltx.diffusion_models.lightricks.sharded_attention import ShardedSequence
from rayltx.diffusion_models.lightricks.sound_ahead import SoundAhead
from rayltx.diffusion_models.lightricks.timestep_rows import TimestepRows
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.masks import GroupedMask, SelfAttentionMask
from rayltx.sequence_parallel.partition import Partition
from rayltx.sequence_parallel.ulysses import all_gather_tokens, gather_tokens

# What the seam puts on ComfyUI's objects, for the time of a forward:
# - in the transformer options, under a key of ComfyUI's: what is called in place of the attention kernel;
OVERRIDE = "optimized_attention_override"
# - in the options of one attention call: its AttentionRole, the SelfAttentionMask of the whole sequence, and the attention
#   that the layer asks for itself;
ROLE = "rayltx_role"
MASK = "rayltx_self_attention_mask"
PREFERRED = "rayltx_preferred_attention"
# - `rayltx_index`, on timesteps that ComfyUI keeps compressed: (n,) int64, the row of each token of this rank;
# - on the model: the methods that `_ShardedForward.wrappers` names, and the one that makes tables of positions; on
#   `patchify_proj`, each `block.ff`, `block.attn1` and the layers that make the text's keys and values: `forward`; on the sound's
#   own attention, too, with hooks on the block (see `sound_ahead`);
# - forward hooks, on the attention modules (a block's attributes that `AttentionRole` names) and on `proj_out`;
# - `input_scale` and a forward hook, on NVFP4 layers without one (see `input_scales`).


_TABLES = "_precompute_freqs_cis"  # the model's method that makes them of positions
# LTX-2.5 adds something to the tokens of keyframes, by a method of the model that asks another which they are.
_MARKING, _MARK = "apply_keyframes_abs_pos_embedding", "keyframes_abs_pos_mask"
_QUERIES_STAY = (AttentionRole.VIDEO_TEXT, AttentionRole.AUDIO_TO_VIDEO)  # a rank attends with its own queries alone
_QUERY_BY_QUERY = ("attention_comfy_kitchen_int8",)  # of the kernels that a layer may ask for
# In the options, where patches stand that run in the middle of blocks, and can write to what goes from one to the next.
_PATCHES_INSIDE = ("patches", "patches_replace")


@contextlib.contextmanager
def sharded(
    diffusion_model: Any,
    group: SequenceParallelGroup,
    feed_forward_chunks: int = UNASKED,
    gathered: Collection[str] = (),
    as_projected: bool = True,
    scales_of: SequenceParallelGroup | None = None,
    kept_text: KeptText | None = None,
    kept_tables: KeptTables | None = None,
) -> Iterator[None]:
    """Let a ComfyUI LTX model run on this rank's tokens within the `with`.

    diffusion_model: an LTXVModel or LTXAVModel. Its forward, called with whole inputs on every rank, returns the whole
    answer on rank 0, and something of the same shape elsewhere.
    feed_forward_chunks: see `chunked`.
    gathered: modules of blocks, by name, that are shown all tokens, because a patch made them look at more than one at a
    time: attention modules and `ff`. What they compute is not shared.
    as_projected: let video self-attention that is known send each part as soon as it is projected. On one rank it holds less.
    scales_of: the ranks whose inputs are quantised by one scale; None: the group's.
    kept_text: what is known of the text's keys and values by steps before, of known attention with plain layers.
    kept_tables: of positions, by the last step; used where the model makes them as its class does.
    Collective: every rank of the group calls the model with the same inputs.
    """
    if kept_tables is not None and not is_comfyuis(diffusion_model, _TABLES):
        kept_tables.forget()
        kept_tables = None
    forward = _ShardedForward(group, diffusion_model, kept_tables)
    gathered = {*gathered, *_with_queries_together(diffusion_model)}
    with contextlib.ExitStack() as scope:
        if kept_tables is not None:
            scope.enter_context(kept_tables.in_forward())
            make = getattr(diffusion_model, _TABLES)
            tables = functools.partial(kept_tables.tables, make, diffusion_model)
            scope.enter_context(replaced(diffusion_model, _TABLES, tables))
        for name, wrapper in forward.wrappers().items():
            original = getattr(diffusion_model, name, None)
            if original is not None:  # guide masks came later than the rest
                scope.enter_context(replaced(diffusion_model, name, functools.partial(wrapper, original)))
        scope.enter_context(agreed_input_scales(diffusion_model, scales_of or group))
        # Behind the scales, which others' rows have a part in, and before the modules are wrapped: neither is taken for plain.
        if kept_text is not None and not kept_text.is_off:
            layers = _layers_of_text(diffusion_model, gathered)
            scope.enter_context(kept_text.in_forward(layers))
            for layer in layers:
                project = functools.partial(forward.project_text, kept_text, layer, layer.forward)
                scope.enter_context(replaced(layer, "forward", project))
        sound_may_go_ahead = as_projected and not gathered and group.world is not None
        for number, block in enumerate(diffusion_model.transformer_blocks):
            sound = None
            if sound_may_go_ahead and SoundAhead.can_go_ahead(block):
                sound = SoundAhead(block)
                scope.enter_context(sound.installed())
            scope.callback(block.register_forward_pre_hook(functools.partial(_at_block, group)).remove)
            for role in AttentionRole:
                attention = getattr(block, role.value, None)
                name = f"transformer_blocks.{number}.{role.value}"
                preferred = preferred_attention(attention)
                if attention is None or (name in gathered and preferred is None):
                    continue
                tag = _tag_preferred if name in gathered else functools.partial(_tag_role, role)
                scope.callback(attention.register_forward_pre_hook(tag, with_kwargs=True).remove)
                if as_projected and role is AttentionRole.VIDEO_SELF and name not in gathered and is_known(attention):
                    projecting = functools.partial(forward.project_and_attend, attention, attention.forward, sound)
                    scope.enter_context(replaced(attention, "forward", projecting))
        scope.callback(diffusion_model.proj_out.register_forward_hook(forward.gather_output).remove)
        scope.enter_context(chunked(diffusion_model, feed_forward_chunks, gathered))
        for name in gathered:
            module = diffusion_model.get_submodule(name)
            on_all = functools.partial(forward.on_all_tokens, module.forward, name.rpartition(".")[2])
            scope.enter_context(replaced(module, "forward", on_all))
        yield


def _with_queries_together(diffusion_model: Any) -> Iterator[str]:
    """Attention that is to be shown all queries, though a rank has its own alone: as its own kernel wants it."""
    for number, block in enumerate(diffusion_model.transformer_blocks):
        for role in _QUERIES_STAY:
            if not keeps_queries_apart(preferred_attention(getattr(block, role.value, None))):
                yield f"transformer_blocks.{number}.{role.value}"


def _layers_of_text(diffusion_model: Any, gathered: Collection[str]) -> list[nn.Module]:
    """Those that make keys and values of the text, and nothing else."""
    found = []
    for number, block in enumerate(diffusion_model.transformer_blocks):
        for role in TEXT_ROLES:
            attention = getattr(block, role.value, None)
            is_whole = f"transformer_blocks.{number}.{role.value}" in gathered
            if attention is not None and not is_whole and is_known(attention):
                found += [layer for layer in (attention.to_k, attention.to_v) if is_plain(layer)]
    return found


def _at_block(group: SequenceParallelGroup, *_: object) -> None:
    group.at_block()


@contextlib.contextmanager
def chunked(diffusion_model: Any, chunks: int, whole: Collection[str] = ()) -> Iterator[None]:
    """Run the video feed-forwards in chunks of tokens within the `with`. Works on any LTX model, sharded or not.

    chunks: a number, or AUTOMATIC, SAVING or UNASKED.
    whole: modules by name, that are called once in any case. So are those with a layer that rounds by all tokens.
    """
    with contextlib.ExitStack() as scope:
        for number, block in enumerate(diffusion_model.transformer_blocks):
            feed_forward = getattr(block, "ff", None)  # a patch's block may have none
            if chunks == 1 or feed_forward is None or f"transformer_blocks.{number}.ff" in whole:
                continue
            layers = list(feed_forward.modules())
            if any(map(rounds_by_all_tokens, layers)) or (chunks < AUTOMATIC and not all(map(is_untouched, layers))):
                continue
            in_chunks = functools.partial(_chunked_forward, feed_forward.forward, layers, chunks)
            scope.enter_context(replaced(feed_forward, "forward", in_chunks))
        yield


def _chunked_forward(
    at_once: Callable[..., Tensor], layers: list[nn.Module], chunks: int, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    if args or kwargs or (chunks == UNASKED and any(_makes_its_weight(layer, x.device) for layer in layers)):
        return at_once(x, *args, **kwargs)
    return chunked_feed_forward(at_once, x, max(chunks, AUTOMATIC))


def _makes_its_weight(layer: nn.Module, device: torch.device) -> bool:
    """Whether each call takes long beside the product: GGUF's blocks, patches that are added at use, and copies from the host."""
    weight = getattr(layer, "weight", None)
    is_elsewhere = isinstance(weight, Tensor) and weight.device != device
    names = ("block_format", "weight_function", "bias_function")
    return is_elsewhere or any(getattr(layer, name, None) for name in names)


class _ShardedForward:
    """The wrappers of the model's methods. Each takes the original first."""

    def __init__(self, group: SequenceParallelGroup, model: Any, kept_tables: KeptTables | None = None) -> None:
        self._group, self._model, self._kept_tables = group, model, kept_tables
        self._sequence: ShardedSequence | None = None
        self._override: Callable[..., Tensor] | None = None  # this one's, where there was none before
        self._is_unwatched = False

    def wrappers(self) -> dict[str, Callable[..., Any]]:
        """By the name of ComfyUI's method."""
        return {
            "_process_input": self.process_input,
            "_prepare_timestep": self.prepare_timestep,
            "_build_guide_self_attention_mask": self.build_guide_self_attention_mask,
            "_process_transformer_blocks": self.process_transformer_blocks,
        }

    @property
    def sequence(self) -> ShardedSequence:
        assert self._sequence is not None, "the model attends before it has processed its input"
        return self._sequence

    def process_input(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Keep this rank's tokens and positions, before any table is made of them."""
        self._sequence = None
        with self._projecting_own_tokens(original):
            tokens, coordinates, additional = original(*args, **kwargs)
        video = tokens[0] if isinstance(tokens, (list, tuple)) else tokens
        if self._sequence is None:
            # A copy, so that the whole is freed.
            video = video[:, self._cut_sequence(video.shape[1]).local].clone()
        local = self.sequence.local
        if isinstance(tokens, (list, tuple)):
            return [video, *tokens[1:]], [_cut(coordinates[0], local), *coordinates[1:]], additional
        return video, _cut(coordinates, local), additional

    def _cut_sequence(self, num_tokens: int) -> ShardedSequence:
        self._sequence = ShardedSequence.of(self._group, num_tokens)
        if 0 in self._sequence.partition.tokens.sizes:
            # With so few tokens every rank does all of it: kernels do not take empty inputs.
            self._sequence = ShardedSequence.of(SequenceParallelGroup.single(), num_tokens)
        return self._sequence

    @contextlib.contextmanager
    def _projecting_own_tokens(self, process_input: Callable[..., Any]) -> Iterator[None]:
        """Within the `with` no more than this rank's tokens are brought to the model's width, where all that looks at them is
        ComfyUI's: of all of them that would be the most that a rank of eight holds in a step.
        """
        model = self._model
        layer: Any = getattr(model, "patchify_proj", None)
        mark = getattr(model, _MARK, None)
        is_known = isinstance(layer, nn.Module) and is_untouched(layer) and not rounds_by_all_tokens(layer)
        # Which has the wrapper before it on the model.
        is_methods = getattr(process_input, "__self__", None) is model and has_comfyuis(type(model), "_process_input")
        marks_as_known = not hasattr(model, _MARKING) or all(is_comfyuis(model, name) for name in (_MARKING, _MARK))
        if not (is_known and is_methods and marks_as_known):
            yield
            return
        with contextlib.ExitStack() as scope:
            project = functools.partial(self._project_own_tokens, layer.forward)
            scope.enter_context(replaced(layer, "forward", project))
            if mark is not None:
                scope.enter_context(
                    replaced(model, _MARK, lambda *args, **kwargs: mark(*args, **kwargs)[:, self.sequence.local])
                )
            yield

    def _project_own_tokens(self, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return original(x[:, self._cut_sequence(x.shape[1]).local].contiguous())

    def prepare_timestep(
        self, original: Callable[..., Any], timestep: Tensor, batch_size: int, hidden_dtype: torch.dtype, **kwargs: Any
    ) -> Any:
        """Compute modulations for the different timesteps of this rank's tokens, and no others."""
        if timestep.numel() <= batch_size:
            return original(timestep, batch_size, hidden_dtype, **kwargs)  # one row, which broadcasts
        by_token = _timestep_by_token(timestep, batch_size, kwargs)
        num_tokens = self.sequence.partition.num_tokens
        assert by_token.shape[1] == num_tokens, f"{by_token.shape[1]} timesteps for {num_tokens} tokens"
        rows = TimestepRows.compress(by_token[:, self.sequence.local])
        index = torch.zeros(self.sequence.num_local, dtype=torch.int64, device=timestep.device)
        index = index if rows.index is None else rows.index
        # The text's modulation and the gates between the streams take the largest timestep of all tokens: it comes along
        # as one more row, which no token takes.
        by_row = torch.cat([rows.values, by_token.amax(1, keepdim=True)], dim=1)
        if kwargs.get("orig_shape") is not None:
            # Each row is a frame of one token.
            kwargs["orig_shape"] = [*kwargs["orig_shape"][:2], by_row.shape[1], 1, 1]
            kwargs["has_spatial_mask"] = False
        kwargs["grid_mask"] = None
        timestep = by_row.reshape(*by_row.shape, *[1] * (timestep.ndim - 2))
        prepared, embedded, *rest = original(timestep, batch_size, hidden_dtype, **kwargs)
        if isinstance(prepared, (list, tuple)):  # audio-video: [video, audio, [a, VIDEO, VIDEO, a], prompts ...]
            prepared, embedded = list(prepared), list(embedded)
            prepared[0], embedded[0] = _rows_to_tokens(prepared[0], index), _rows_to_tokens(embedded[0], index)
            if len(prepared[2]) == 4:
                between = list(prepared[2])
                between[1], between[2] = _rows_to_tokens(between[1], index), _rows_to_tokens(between[2], index)
                prepared[2] = between
        else:
            prepared, embedded = _rows_to_tokens(prepared, index), _rows_to_tokens(embedded, index)
        return prepared, embedded, *rest

    def build_guide_self_attention_mask(self, original: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        """Guide masks are of the whole sequence: show the method a sequence of full length, which holds no memory."""
        video = x[0] if isinstance(x, (list, tuple)) else x
        batch, _, width = video.shape
        whole = video.new_empty(1).expand(batch, self.sequence.partition.num_tokens, width)
        return original([whole, *x[1:]] if isinstance(x, (list, tuple)) else whole, *args, **kwargs)

    def process_transformer_blocks(
        self, original: Callable[..., Any], *args: Any, transformer_options: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Bring the exchange into the blocks' attention."""
        options = dict(transformer_options or {})
        before = options.get(OVERRIDE)
        options[OVERRIDE] = functools.partial(self.attend, before)
        self._override = options[OVERRIDE] if before is None else None
        self._is_unwatched = before is None and not any(options.get(name) for name in _PATCHES_INSIDE)
        if self._kept_tables is not None and not self._is_unwatched:
            self._kept_tables.forget()  # a patch can write to them
        return original(*args, transformer_options=options, **kwargs)

    def attend(
        self,
        chained: Callable[..., Tensor] | None,
        kernel: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """What ComfyUI calls in place of its kernel. chained: an override that was there before.

        q, k, v: (B, tokens, H E). Returns (B, queries, H E).
        """

        options = kwargs.get("transformer_options") or {}
        role = options.get(ROLE)
        own_mask: SelfAttentionMask | None = options.get(MASK)
        # As ComfyUI has it: an override goes before what a layer asks for, and that before the choice for all.
        preferred = options.get(PREFERRED) if chained is None else None
        run = preferred or (kernel if chained is None else functools.partial(chained, kernel))
        if role is None:  # attention of something that a patch brought in
            return run(q, k, v, heads, mask=mask, **kwargs)
        plain = {**kwargs, "transformer_options": _plain(options, chained)}
        local = functools.partial(_local, run, plain, own_mask)
        query, key, value = (x.unflatten(2, (heads, x.shape[2] // heads)) for x in (q, k, v))
        sequence = self.sequence
        if role is AttentionRole.VIDEO_SELF:
            sequence = ShardedSequence(sequence.group, sequence.partition, own_mask)
        # Another pack's override can be anything: it is shown whole attentions, not parts to be merged.
        is_plain = chained is None and preferred is None
        together = not keeps_queries_apart(preferred)
        out = sequence.attend(
            role, query, key, value, local, mask, mergeable=is_plain, queries_together=together, in_groups=is_plain
        )
        return out.flatten(2)

    def project_and_attend(
        self,
        attention: Any,
        original: Callable[..., Tensor],
        sound: SoundAhead | None,
        x: Tensor,
        *args: Any,
        pe: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The forward of video self-attention's module, which is known. original: ComfyUI's, for what is not written here.

        sound: the block's, if it can go ahead.
        """
        options = transformer_options or {}
        rest = [*args, *(value for value in kwargs.values() if value is not None)]
        is_ours = self._override is not None and options.get(OVERRIDE) is self._override
        is_plain = MASK in options and options.get(PREFERRED) is None and not options.get(SKIPPED)
        group = self.sequence.group
        is_traded = group.ulysses is not None or group.world is None  # a ring alone keeps what it has
        if rest or not is_ours or not is_plain or not is_traded:
            return original(x, *args, pe=pe, transformer_options=transformer_options, **kwargs)
        own_mask: SelfAttentionMask | None = options[MASK]
        plain = {"attn_precision": attention.attn_precision, "transformer_options": _plain(options, None)}
        local = functools.partial(_local, kernel_of(attention), plain, own_mask)
        sequence = ShardedSequence(group, self.sequence.partition, own_mask)
        meanwhile = sound.go if sound is not None and self._is_unwatched else None
        return attend_while_projecting(attention, sequence, x, pe, local, meanwhile)

    def project_text(
        self, kept_text: KeptText, layer: nn.Module, original: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        """The forward of a layer of `_layers_of_text`."""
        return kept_text.project(layer, original, x) if self._is_unwatched else original(x)

    def on_all_tokens(
        self, original: Callable[..., Tensor], module_name: str, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """A module's forward, shown all video tokens. Returns what it gives for this rank's; for audio's queries, for all."""
        world, tokens = self.sequence.group.world, self.sequence.partition.tokens
        if world is None or module_name in (AttentionRole.AUDIO_SELF.value, AttentionRole.AUDIO_TEXT.value):
            return original(x, *args, **kwargs)
        gather = functools.partial(_gather_rows, self.sequence.num_local, tokens, world)
        if module_name == AttentionRole.VIDEO_TO_AUDIO.value:
            whole = {name: gather(value) if name in ("context", "k_pe") else value for name, value in kwargs.items()}
            return original(x, *map(gather, args), **whole)
        whole = {name: gather(value) if name == "pe" else value for name, value in kwargs.items()}
        return original(gather(x), *args, **whole)[:, self.sequence.local].contiguous()

    def gather_output(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Collect the predicted tokens on rank 0, where they are narrowest. Elsewhere the shape is kept."""
        whole = gather_tokens(output, self.sequence.partition.tokens, self.sequence.group.world)
        if whole is None:
            whole = output.new_zeros(1).expand(output.shape[0], self.sequence.partition.num_tokens, output.shape[2])
        return whole


def _plain(options: dict[str, Any], chained: Callable[..., Tensor] | None) -> dict[str, Any]:
    """The transformer options without what the seam has put there."""
    plain = {key: value for key, value in options.items() if key not in (OVERRIDE, ROLE, MASK, PREFERRED)}
    return plain if chained is None else {**plain, OVERRIDE: chained}


def _local(
    run: Callable[..., Tensor],
    arguments: dict[str, Any],
    own_mask: SelfAttentionMask | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_piece: Tensor | None,
) -> Tensor:
    """ComfyUI's kernel, as the exchange calls it. query, key, value: (B, tokens, H, E)."""
    flat = [x.flatten(2) for x in (query, key, value)]
    if mask_piece is not None and isinstance(own_mask, GroupedMask):
        arguments = {**arguments, "low_precision_attention": False}  # as ComfyUI calls it for guides
    return run(*flat, query.shape[2], mask=mask_piece, **arguments).unflatten(2, query.shape[2:])


def _gather_rows(num_local: int, tokens: Partition, world: ProcessGroup, value: Any) -> Any:
    """Tensors with a dimension of this rank's tokens, behind the batch, with all tokens there; also inside of tuples.

    Positions are (B, n, H, ...), and in other versions (B, n, D) or (B, H, n, ...).
    """
    if isinstance(value, (list, tuple)):
        return type(value)(_gather_rows(num_local, tokens, world, item) for item in value)
    if not isinstance(value, Tensor) or num_local not in value.shape[1:]:
        return value
    dimension = 1 + list(value.shape[1:]).index(num_local)
    return all_gather_tokens(value.movedim(dimension, 1), tokens, world).movedim(1, dimension)


def _cut(coordinates: Tensor, local: slice) -> Tensor:
    """Coordinates are (B, 3, N) or (B, 3, N, 2)."""
    return coordinates[:, :, local].clone()


def _timestep_by_token(timestep: Tensor, batch_size: int, kwargs: dict[str, Any]) -> Tensor:
    """(B, N), as the model would use them.

    Without a spatial mask an audio-video model takes the first token's timestep for its whole frame.
    """
    by_token = timestep.reshape(batch_size, -1)
    shape = kwargs.get("orig_shape")
    if "has_spatial_mask" in kwargs and not kwargs["has_spatial_mask"] and shape is not None:
        per_frame = shape[3] * shape[4]
        if by_token.shape[1] % per_frame == 0:
            first = by_token.view(batch_size, -1, per_frame)[:, :, :1]
            by_token = first.expand(-1, -1, per_frame).reshape(batch_size, -1)
    grid_mask = kwargs.get("grid_mask")
    return by_token if grid_mask is None else by_token[:, grid_mask]


def _rows_to_tokens(value: Any, index: Tensor) -> Any:
    """Give tokens their rows: at once for a tensor, on use for what ComfyUI keeps compressed.

    value: a tensor (B, R, C), or a CompressedTimestep of it.
    """
    if isinstance(value, Tensor):
        return value if value.shape[1] == 1 else value.index_select(1, index)
    if not hasattr(value, "expand_for_computation"):
        raise TypeError(f"a timestep of type {type(value).__name__}, which is not known here")
    if value.data.shape[1] == 1:
        return value
    ragged: Any = object.__new__(_ragged_class(type(value)))  # type: ignore[arg-type]
    for name in ("batch_size", "num_frames", "patches_per_frame", "feature_dim", "data"):
        setattr(ragged, name, getattr(value, name))
    ragged.rayltx_index = index
    return ragged


@functools.cache
def _ragged_class(compressed: Any) -> Any:
    """A CompressedTimestep whose frames have as many tokens as this rank holds of them."""

    class RaggedTimestep(compressed):
        __slots__ = ("rayltx_index",)

        def expand(self) -> Tensor:
            return super().expand().index_select(1, self.rayltx_index)

        def expand_for_computation(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            rows = super().expand_for_computation(*args, **kwargs)
            return tuple(row.index_select(1, self.rayltx_index) for row in rows)

    return RaggedTimestep


def preferred_attention(attention: nn.Module | None) -> Callable[..., Tensor] | None:
    """What a checkpoint or a LoRA has chosen for one layer, in newer versions; None: what all use.

    ComfyUI passes it to its kernels next to the call, and an override does not get it.
    """
    return getattr(getattr(attention, "comfy_attention", None), "function", None)


def keeps_queries_apart(kernel: Callable[..., Tensor] | None) -> bool:
    """Whether a layer's own kernel gives a query the same answer whichever others it comes with.

    One that leaves out blocks does not. What is not known is taken for such a one.
    """
    return kernel is None or getattr(kernel, "__name__", "") in _QUERY_BY_QUERY


def _tag_role(role: AttentionRole, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Tell the override, by the options of this one call, which attention it serves.

    The mask of video self-attention is of the whole sequence, and one of its kinds would be cut by the positions of the
    local tokens: it goes with the options instead.
    """
    args, kwargs = _tag_preferred(module, args, kwargs)
    options = kwargs["transformer_options"] = {**kwargs["transformer_options"], ROLE: role}
    if role is AttentionRole.VIDEO_SELF:
        options[MASK] = self_attention_mask_of(kwargs.get("mask"))
        kwargs["mask"] = None
    return args, kwargs


def _tag_preferred(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Tell the override what the layer asks for."""
    options = {**(kwargs.get("transformer_options") or {}), PREFERRED: preferred_attention(module)}
    return args, {**kwargs, "transformer_options": options}
