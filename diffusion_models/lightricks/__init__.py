"""What is particular to LTX, and the hosts that bring its transformers under the parallel layer.

`roles` names the six kinds of attention, `sharded_attention` says what each needs when the video tokens are spread
over ranks, `timestep_rows` keeps modulations one row a frame, `feed_forward` bounds the largest activation.
`checkpoint` reads files; `diffusers_model` and `diffusers_host` run them without ComfyUI.
"""
