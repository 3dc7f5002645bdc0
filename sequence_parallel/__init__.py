"""Exact sequence parallelism for attention, on torch.distributed alone.

Read in this order: `partition` (who holds what), `group` (who talks to whom), `ulysses` (tokens for heads),
`ring` (keys and values around a ring), `self_attention` (the two together), `sharded_keys` (queries that everyone
has, keys that nobody has whole). `local_attention` and `softmax_merge` are what the ring and the sharded keys need.
"""
