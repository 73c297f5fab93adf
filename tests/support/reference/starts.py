"""What a client of some rank starts from, `base + ΔW(lora)`: dense, in float64, from the state alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedhl import LoRA, Method, dense
from support.reference.dense import truncation

Start = Callable[[Method[Any], Any, int], Tensor]
"""(method, state, rank) -> what the client starts from."""


def whole(method: Method[Any], state: Any, rank: int) -> Tensor:
    """`delta`, whatever the rank."""
    delta = method.delta(state)
    assert delta is not None
    return dense(delta).double()


def truncated(method: Method[Any], state: Any, rank: int) -> Tensor:
    """`T_r(delta)`."""
    return truncation(whole(method, state, rank), rank)


def prefix(method: Method[Any], state: Any, rank: int) -> Tensor:
    """`Σ_{j<=r} s b_j a_jᵀ` of the global adapter."""
    lora = method.delta(state)
    assert isinstance(lora, LoRA)
    pairs = zip(lora.B.T.double()[:rank], lora.A.double()[:rank], strict=True)
    return torch.stack([lora.scale * torch.outer(b, a) for b, a in pairs]).sum(dim=0)


def fedhera(method: Any, state: Any, rank: int) -> Tensor:
    """`T_t(delta)` with `t = download · r`."""
    return truncation(whole(method, state, rank), method.download * rank)


def fedsa_lora(method: Method[Any], state: LoRA, rank: int) -> Tensor:
    """`s B0 A`, for a client that has no B of its own yet."""
    return state.scale * state.B.double() @ state.A.double()


STARTS: dict[str, Start] = {
    "truncation": truncated,
    "whole": whole,
    "prefix": prefix,
    "mean": whole,
}
"""The references of the names in `fedhl.method.STARTS`, but for "other"."""
OWN: dict[str, Start] = {"fedhera": fedhera, "fedsa_lora": fedsa_lora}
"""Those of the methods that name "other"."""
