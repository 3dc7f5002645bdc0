"""Merge attention over parts of the keys into attention over all of them.

Softmax over a union of key sets is the mean of the softmaxes over the sets, weighted by the exponentials of their
log-sum-exps. All sums are kept in float32 at least.
Source: online softmax, arXiv 1805.02867; as used in Ring Attention, arXiv 2310.01889.

Letters in shapes: B batch, T query tokens, H heads, E head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SoftmaxAccumulator:
    """Adds up partial attentions, in the order in which they are given."""

    def __init__(self) -> None:
        self._weighted: Tensor | None = None  # (B, T, H, E): sum of exp(lse - peak) * out
        self._weight: Tensor | None = None  # (B, T, H, 1): sum of exp(lse - peak)
        self._peak: Tensor | None = None  # (B, T, H, 1): largest lse so far

    def add(self, out: Tensor, lse: Tensor) -> None:
        """Add attention over one part of the keys.

        out: (B, T, H, E), any float dtype. lse: (B, H, T), float32 or float64; -inf where no key was visible.
        """
        lse = lse.transpose(1, 2).unsqueeze(-1)
        wide = out.to(lse.dtype)
        if self._peak is None or self._weighted is None or self._weight is None:
            # exp(lse - peak) of the first part is 1, or 0 where it saw no key.
            self._peak = lse
            self._weight = torch.isfinite(lse).to(lse.dtype)
            self._weighted = wide * self._weight
            return
        peak = torch.maximum(self._peak, lse)
        finite_peak = peak.masked_fill(
            peak == -torch.inf, 0.0
        )  # -inf - -inf would be NaN; the weights are 0 either way
        keep, new = torch.exp(self._peak - finite_peak), torch.exp(lse - finite_peak)
        added = wide * new if wide is out else wide.mul_(new)  # what was handed in is not ours
        self._weighted.mul_(keep).add_(added)
        self._weight = self._weight * keep + new
        self._peak = peak

    def result(self, dtype: torch.dtype) -> Tensor:
        """(B, T, H, E). A query that saw no key at all gets zeros, as attention over no keys does."""
        assert self._weighted is not None and self._weight is not None, "nothing was added"
        return (self._weighted / self._weight.masked_fill(self._weight == 0.0, 1.0)).to(dtype)
