"""The embedded host: `diffusers`' LTX transformers on a rank's own slice of the video tokens.

Everything in these models but attention treats each token by itself. So a rank runs the untouched model on its slice
of tokens, positions and timesteps, and attention processors bring in what the other ranks hold.

Letters in shapes: B batch, C channels, F, H, W latent frames, rows, columns, n video tokens of this rank, N all video
tokens, L text tokens, A audio tokens, R rows of timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_ltx import apply_rotary_emb
from diffusers.models.transformers.transformer_ltx2 import apply_split_rotary_emb
from torch import Tensor, nn

from rayltx.device_copies import DeviceCopies
from rayltx.devices import KINDS
from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel
from rayltx.diffusion_models.lightricks.feed_forward import chunked_feed_forward
from rayltx.diffusion_models.lightricks.inputs import ForwardInputs
from rayltx.diffusion_models.lightricks.kept_tables import KeptTables
from rayltx.diffusion_models.lightricks.kept_text import KeptText
from rayltx.diffusion_models.lightricks.latent_shape import LatentShape, video_positions
from rayltx.diffusion_models.lightricks.roles import TEXT_ROLES, AttentionRole
from rayltx.diffusion_models.lightricks.sharded_attention import ShardedSequence
from rayltx.diffusion_models.lightricks.timestep_rows import TimestepRows
from rayltx.errors import InputError, UnsupportedError
from rayltx.sequence_parallel.batch_rows import RowShare
from rayltx.sequence_parallel.group import SequenceParallelGroup
from rayltx.sequence_parallel.masks import DenseMask
from rayltx.sequence_parallel.ulysses import gather_tokens

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Modules that turn the timesteps of video tokens into modulations, and are therefore run on rows.
_VIDEO_TIMESTEP_MODULES = ("time_embed", "av_cross_attn_video_scale_shift", "av_cross_attn_video_a2v_gate")
_TABLES = ("rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope")  # modules that make them of positions


class DiffusersHost:
    """One model on one rank. Built without memory; parameters are then assigned, and stay what they were given."""

    def __init__(self, model: DiffusersModel, device: str = "cpu") -> None:
        self.model = model
        self.kept_text = KeptText(lambda: KINDS[self.device.type].free_bytes(self.device.index or 0))
        self.kept_tables = KeptTables()
        self.device = torch.device(device)
        self._transformer = model.build()
        self._official = {official: name for name, official in model.names.items()}
        self._dtype: torch.dtype | None = None
        self._copies = DeviceCopies(self.device)  # of what steps are sent; each goes with what it was made of
        # Of the forward that is running; the hooks and processors below read them.
        self._sequence: ShardedSequence | None = None
        self._rows: TimestepRows | None = None
        self._feed_forward_chunks = 1
        self._install()

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Take some of the parameters, by official name. On CPU they stay the tensors that they are, uncopied.

        Raises UnsupportedError unless all have one dtype of float32, bfloat16 and float16.
        """
        found = {}
        for official, tensor in tensors.items():
            name = self._official.get(official)
            if name is None:
                continue  # of the text connector, which is not part of diffusers' transformer
            if tensor.dtype not in COMPUTE_DTYPES or self._dtype not in (None, tensor.dtype):
                raise UnsupportedError(
                    f"{official} is {tensor.dtype}, other parameters are {self._dtype}: the embedded host computes in "
                    "one dtype of float32, bfloat16 and float16; ask for one with dtype, or run the file in ComfyUI"
                )
            self._dtype = tensor.dtype
            self.kept_text.forget()
            found[name] = tensor.to(self.device)
        self._transformer.load_state_dict(found, strict=False, assign=True)

    def finish_loading(self) -> None:
        missing = [name for name, parameter in self._transformer.named_parameters() if parameter.is_meta]
        assert not missing, f"parameters were never assigned: {missing[:5]}"
        self._transformer.requires_grad_(False)

    def parameters(self) -> dict[str, Tensor]:
        """By official name."""
        return {self.model.names[name]: tensor for name, tensor in self._transformer.state_dict().items()}

    def module(self, name: str) -> nn.Module:
        """One of the transformer's modules, by diffusers' name."""
        return self._transformer.get_submodule(name)

    def close(self) -> None:
        """Nothing but this object holds the model."""
        self.kept_text.forget()
        self.kept_tables.forget()
        self._copies.clear()

    def forward(self, group: SequenceParallelGroup, inputs: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Predict the velocity.

        inputs: the fields of `ForwardInputs`, whole, the same on every rank.
        Returns on rank 0 {"video": (B, C, F, H, W)}, and {"audio": (B, 8, A, 16)} if audio came in, in the latent's
        dtype; None on other ranks.
        Collective. Raises InputError and UnsupportedError, alike on every rank.
        """
        checked = ForwardInputs.from_mapping(inputs, self.model.has_audio, self.model.channels)
        self.model.check_context(checked.context, checked.audio_context)
        share = RowShare.of(group, checked.latent.shape[0])
        with torch.inference_mode():
            answer = self._forward(share.group, checked.cut(share))
            whole = {name: share.gather(rows) for name, rows in (answer or self._no_answer(share, checked)).items()}
            return {name: rows for name, rows in whole.items() if rows is not None} or None

    # ---- one forward

    def _no_answer(self, share: RowShare, inputs: ForwardInputs) -> dict[str, Tensor]:
        """In the place of what another rank of the rows has: its streams, with nothing in them that is looked at."""
        streams = {"video": inputs.latent, "audio": inputs.audio_latent}
        rows = share.local.stop - share.local.start
        return {
            name: torch.zeros(1, dtype=inputs.latent.dtype, device=self.device).expand(rows, *stream.shape[1:])
            for name, stream in streams.items()
            if stream is not None
        }

    def _forward(self, group: SequenceParallelGroup, inputs: ForwardInputs) -> dict[str, Tensor] | None:
        assert self._dtype is not None, "no parameters were assigned"
        latent = inputs.latent
        shape = LatentShape(*latent.shape[2:])
        mask = inputs.self_attention_mask
        sequence = ShardedSequence.of(
            group, shape.num_tokens, None if mask is None else DenseMask(self._to_compute(mask))
        )
        rows = TimestepRows.of_tokens(inputs.timestep.to(self.device, torch.float32), shape, sequence.local)
        tokens = self._to_compute(latent.flatten(2)[:, :, sequence.local].transpose(1, 2))
        positions = video_positions(shape, inputs.frame_rate, self.model.causal, sequence.local, self.device)
        arguments: dict[str, Any] = {
            "hidden_states": tokens,
            "encoder_hidden_states": self._to_compute(inputs.context),
            "encoder_attention_mask": self._mask(inputs.context_mask),
            "timestep": rows.values * self.model.timestep_scale,
            "video_coords": positions[None].expand(latent.shape[0], -1, -1, -1),
            "return_dict": False,
        }
        if self.model.has_audio:
            arguments.update(self._audio_video_arguments(inputs, shape, sequence))
        else:
            bounds = arguments["video_coords"]
            arguments["video_coords"] = bounds.mean(-1) if self.model.use_middle_positions else bounds[..., 0]

        self._sequence, self._rows, self._feed_forward_chunks = sequence, rows, inputs.feed_forward_chunks
        try:
            with self.kept_text.in_forward(self._layers_of_text()), self.kept_tables.in_forward():
                video_local, *audio = self._transformer(**arguments)
        finally:
            self._sequence = self._rows = None
        video = gather_tokens(video_local, sequence.partition.tokens, group.world)
        if video is None:
            return None
        answer = {"video": video.transpose(1, 2).unflatten(2, latent.shape[2:]).to(latent.dtype)}
        if inputs.audio_latent is not None:
            # The audio stream ran on every rank; rank 0's copy is the one that counts.
            answer["audio"] = audio[0].unflatten(2, (8, 16)).transpose(1, 2).to(latent.dtype)
        return answer

    def _audio_video_arguments(
        self, inputs: ForwardInputs, shape: LatentShape, sequence: ShardedSequence
    ) -> dict[str, Any]:
        batch = inputs.latent.shape[0]
        scale = self.model.timestep_scale
        sigma = inputs.timestep.to(self.device, torch.float32).reshape(batch, -1).amax(1)
        if inputs.audio_latent is None:
            audio = torch.zeros(batch, 0, int(self.model.arguments["audio_in_channels"]))
            audio_context = torch.zeros(batch, 1, self.model.context_widths()[1])
            audio_context_mask = None
        else:
            assert inputs.audio_context is not None
            audio, audio_context = inputs.audio_latent.transpose(1, 2).flatten(2), inputs.audio_context
            audio_context_mask = inputs.audio_context_mask
        audio_sigma = audio_timestep = sigma
        if inputs.audio_timestep is not None and inputs.audio_latent is not None:
            audio_timestep = inputs.audio_timestep.to(self.device, torch.float32)
            audio_sigma = audio_timestep.reshape(batch, -1).amax(1)
            if audio_timestep.numel() not in (batch, batch * audio.shape[1]):
                raise InputError(
                    f"audio_timestep has the shape {tuple(audio_timestep.shape)}: it must hold 1 or {audio.shape[1]} "
                    "(one an audio token) values for each of the batch"
                )
        position = torch.arange(shape.num_tokens, device=self.device)[sequence.local]
        single_pixel_frame = (position < shape.tokens_per_frame)[None, :, None].expand(batch, -1, -1)
        return {
            "audio_hidden_states": self._to_compute(audio),
            "audio_encoder_hidden_states": self._to_compute(audio_context),
            "audio_encoder_attention_mask": self._mask(audio_context_mask),
            "audio_timestep": audio_timestep * scale,
            "audio_num_frames": audio.shape[1],
            "sigma": sigma * scale,
            "audio_sigma": audio_sigma * scale,
            "use_cross_timestep": self.model.cross_timestep,
            "isolate_modalities": inputs.isolate_modalities or inputs.audio_latent is None,
            "spatio_temporal_guidance_blocks": list(inputs.spatio_temporal_guidance_blocks),
            "video_keyframes_mask": single_pixel_frame,
        }

    def _to_compute(self, tensor: Tensor) -> Tensor:
        return self._copies.of(tensor, self._dtype)

    def _mask(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else self._copies.of(mask)

    def _layers_of_text(self) -> list[nn.Module]:
        """Those that make keys and values of the text."""
        blocks, roles = self._transformer.transformer_blocks, [role.value for role in TEXT_ROLES]
        attentions = [getattr(block, role) for block in blocks for role in roles if hasattr(block, role)]
        return [layer for attention in attentions for layer in (attention.to_k, attention.to_v)]

    # ---- what is put into the model, once

    def _install(self) -> None:
        processor_class = _AudioVideoProcessor if self.model.has_audio else _VideoProcessor
        for block in self._transformer.transformer_blocks:
            block.register_forward_pre_hook(self._at_block)
            for role in AttentionRole:
                attention = getattr(block, role.value, None)
                if attention is not None:
                    attention.set_processor(processor_class(self, role))
            self._chunk(block.ff)
        for name in _VIDEO_TIMESTEP_MODULES:
            from_other_stream = self.model.cross_timestep and name != "time_embed"
            if hasattr(self._transformer, name) and not from_other_stream:
                getattr(self._transformer, name).register_forward_hook(self._expand_rows)
        for name in _TABLES:
            if hasattr(self._transformer, name):
                self._keep_tables(getattr(self._transformer, name))

    def _chunk(self, feed_forward: nn.Module) -> None:
        at_once = feed_forward.forward
        feed_forward.forward = lambda x: chunked_feed_forward(at_once, x, self._feed_forward_chunks)

    def _keep_tables(self, rope: nn.Module) -> None:
        """Let steps with the same positions have the same tables.

        diffusers' cannot be made for no tokens; `_rotate` does not look at them then.
        """
        make = rope.forward

        def of_positions(positions: Tensor, *args: Any, **kwargs: Any) -> Any:
            return None if positions.shape[2] == 0 else self.kept_tables.tables(make, rope, positions, *args, **kwargs)

        def of_video(tokens: Tensor, *args: Any) -> Any:
            """LTX-Video's, whose positions come last. Of the tokens it takes the device."""
            *sizes, positions = args

            def make_of(positions: Tensor, *sizes: Any) -> Any:
                return make(tokens, *sizes, positions)

            return self.kept_tables.tables(make_of, rope, positions, *sizes)

        rope.forward = of_positions if self.model.has_audio else of_video

    def _expand_rows(self, module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert self._rows is not None
        return tuple(self._rows.expand(rows) for rows in output)

    def _at_block(self, *_: object) -> None:
        self.sequence.group.at_block()

    @property
    def sequence(self) -> ShardedSequence:
        assert self._sequence is not None, "outside of a forward"
        return self._sequence


def _dispatch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The attention backend that is chosen in diffusers."""
    return dispatch_attention_fn(query, key, value, attn_mask=mask)


class _VideoProcessor:
    """Attention of LTX-Video. Does what diffusers' own processor does, with `ShardedSequence` for the attention itself.

    For video self-attention each projection leaves for the other ranks as soon as it is there.
    """

    _attention_backend = None  # diffusers looks for these two on every processor
    _parallel_config = None

    def __init__(self, host: DiffusersHost, role: AttentionRole) -> None:
        self._host, self._role = host, role

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        out = self._attend(attn, hidden_states, context, attention_mask, image_rotary_emb, image_rotary_emb)
        return self._project_out(attn, out)

    def _attend(
        self, attn: Any, x: Tensor, context: Tensor, mask: Tensor | None, query_rotary: Any, key_rotary: Any
    ) -> Tensor:
        """(B, tokens, H, E)"""
        if self._role is AttentionRole.VIDEO_SELF:
            sequence = self._host.sequence
            exchange = sequence.self_exchange(attn.heads, x.shape[0])
            sent_value = exchange.send(_heads(attn, attn.to_v(context)))
            sent_query = exchange.send(_heads(attn, _rotate(attn, attn.norm_q(attn.to_q(x)), query_rotary)))
            sent_key = exchange.send(_heads(attn, _rotate(attn, attn.norm_k(attn.to_k(context)), key_rotary)))
            return exchange.attend(sent_query, sent_key, sent_value, _dispatch, mask=sequence.self_attention_mask)
        query = _heads(attn, _rotate(attn, attn.norm_q(attn.to_q(x)), query_rotary))
        key = _heads(attn, _rotate(attn, attn.norm_k(self._of_context(attn.to_k, context)), key_rotary))
        value = _heads(attn, self._of_context(attn.to_v, context))
        if mask is not None:
            mask = mask[:, None]  # (B, 1, 1, L): the same for all heads
        return self._host.sequence.attend(self._role, query, key, value, _dispatch, mask)

    def _of_context(self, layer: nn.Module, context: Tensor) -> Tensor:
        is_text = self._role in TEXT_ROLES
        product: Tensor = self._host.kept_text.project(layer, layer, context) if is_text else layer(context)
        return product

    @staticmethod
    def _project_out(attn: Any, out: Tensor) -> Tensor:
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class _AudioVideoProcessor(_VideoProcessor):
    """Attention of LTX-2 and later: two sets of positions, gates by head, spatio-temporal guidance."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if all_perturbed:  # spatio-temporal guidance: the values pass through
            out = _heads(attn, attn.to_v(context))
        else:
            key_rotary = query_rotary_emb if key_rotary_emb is None else key_rotary_emb
            out = self._attend(attn, hidden_states, context, attention_mask, query_rotary_emb, key_rotary)
        if attn.to_gate_logits is not None:
            out = out * (2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))).unsqueeze(-1)
        return self._project_out(attn, out)


def _heads(attn: Any, x: Tensor) -> Tensor:
    return x.unflatten(2, (attn.heads, -1))


def _rotate(attn: Any, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    if rotary is None or x.shape[1] == 0:
        return x
    if getattr(attn, "rope_type", "interleaved") == "split":
        return apply_split_rotary_emb(x, rotary)
    return apply_rotary_emb(x, rotary)
