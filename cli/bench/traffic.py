"""What torch.distributed moves, counted at the calls themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from rayltx.sequence_parallel.sharded_keys import ALL_GATHER

# What a forward by Ulysses does not call, and is not counted.
_OTHERS = (
    "all_reduce", "broadcast", "all_gather", "gather", "scatter", "reduce_scatter_tensor", "isend", "irecv",
    "batch_isend_irecv", "all_to_all",
)  # fmt: skip


@dataclass
class Traffic:
    """Of this rank."""

    received_bytes: int = 0  # from other ranks
    collectives: int = 0


class _Done:
    """A collective that is under way, and brings nothing."""

    def wait(self) -> None:
        pass


@contextlib.contextmanager
def counted_traffic(is_carried: bool = True) -> Iterator[Traffic]:
    """Count the collectives that are called within the `with`. Raises AssertionError for one that it does not know.

    is_carried: False where there are no other ranks: nothing is sent then.
    """
    traffic = Traffic()
    real = {name: getattr(dist, name) for name in ("all_to_all_single", ALL_GATHER)}

    def carried(name: str, *args: Any, **kwargs: Any) -> Any:
        if is_carried:
            return real[name](*args, **kwargs)
        return _Done() if kwargs.get("async_op") else None

    def all_to_all(
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: Any = None,
        **kwargs: Any,
    ) -> Any:
        assert output_split_sizes is not None
        traffic.collectives += 1
        here = output_split_sizes[dist.get_rank(group)]
        traffic.received_bytes += (sum(output_split_sizes) - here) * output.element_size()
        return carried("all_to_all_single", output, input, output_split_sizes, input_split_sizes, group, **kwargs)

    def all_gather(output: Tensor, input: Tensor, **kwargs: Any) -> Any:
        traffic.collectives += 1
        traffic.received_bytes += (output.numel() - input.numel()) * output.element_size()
        return carried(ALL_GATHER, output, input, **kwargs)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective that is not counted")

    counting: dict[str, Callable[..., Any]] = {"all_to_all_single": all_to_all, ALL_GATHER: all_gather}
    with contextlib.ExitStack() as scope:
        for name, function in {**dict.fromkeys(_OTHERS, refuse), **counting}.items():
            scope.enter_context(mock.patch.object(dist, name, function))
        yield traffic
