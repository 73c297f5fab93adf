"""How clients are weighted: one number p_i per client and round, over all layers at once.

Separate from the methods because the weights need every layer, and because any weighting can go
with any method that has a global change. Weights depend on the server's state and on ranks and
data shares alone, so they are known before any update arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Cohort:
    """What a weighting may ask about the K clients whose updates arrived, over L layers.

    `examples` (K,): training rows. `error` (K, L): `e_il = ||W_l - base - ΔW(sent_il)||_F²`, what
    client i's start lacks of the global change. `energy` (L,): `||W_l||_F²`. Optional, (K,):
    `norms` of the updates, `losses` reported by clients, `bounds` they estimate.
    Raises ValueError if the shapes disagree or a value is negative or not finite.
    """

    examples: Tensor | Sequence[float]
    error: Tensor | Sequence[Sequence[float]]
    energy: Tensor | Sequence[float]
    norms: Tensor | Sequence[float] | None = None
    losses: Tensor | Sequence[float] | None = None
    bounds: Tensor | Sequence[float] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                value = torch.as_tensor(value, dtype=torch.float64)
                object.__setattr__(self, field.name, value)
                if not value.isfinite().all() or (field.name != "losses" and (value < 0).any()):
                    raise ValueError(f"cohort: {field.name} has a negative or non-finite value")
        K, L = torch.as_tensor(self.examples).numel(), torch.as_tensor(self.energy).numel()
        if K == 0:
            raise ValueError("cohort: no client arrived, so there is nothing to weight")
        for field in fields(self):
            value = getattr(self, field.name)
            expected = {"error": (K, L), "energy": (L,)}.get(field.name, (K,))
            if value is not None and value.shape != expected:
                raise ValueError(
                    f"cohort of {K} clients and {L} layers: {field.name} must be of shape {expected}, "
                    f"got {tuple(value.shape)}"
                )


def relative_error(cohort: Cohort) -> Tensor:
    """`ê_i = Σ_l e_il / Σ_l ||W_l||_F²`, shape (K,), in float64; 0 where `W = 0`."""
    error, energy = torch.as_tensor(cohort.error), torch.as_tensor(cohort.energy).sum()
    if energy == 0:
        return torch.zeros(error.shape[0], dtype=torch.float64)
    return error.sum(dim=1) / energy


def data_share(cohort: Cohort) -> Tensor:
    """`q_i`, each client's share of the training rows, shape (K,). Raises ValueError if all are 0."""
    examples = torch.as_tensor(cohort.examples)
    if examples.sum() == 0:
        raise ValueError("weights by examples: no client has any training row")
    return examples / examples.sum()


class Weighting(Protocol):
    """A frozen dataclass whose call gives the weights, shape (K,), non-negative, summing to 1."""

    def __call__(self, cohort: Cohort) -> Tensor: ...


@dataclass(frozen=True)
class Uniform:
    """Every client counts the same: `p_i = 1/K`."""

    def __call__(self, cohort: Cohort) -> Tensor:
        K = len(cohort.examples)
        return torch.full((K,), 1 / K, dtype=torch.float64)


@dataclass(frozen=True)
class Examples:
    """FedAvg's weights: `p_i = q_i`, the share of training rows."""

    def __call__(self, cohort: Cohort) -> Tensor:
        return data_share(cohort)


@dataclass(frozen=True)
class Truncation:
    """FedHL's weights: clients that start further from the global model count less.

    `p_i ∝ 1/(ê_i^power + ε)` with ê_i the relative *squared* truncation error in [0, 1].
    power 2 is the rule as printed (arXiv 2505.18494, Eq. 15 as reported by others), the fourth power of
    the distance; power 1, the square of the distance, is what minimises the drift term `Σ p_i² ê_i`.
    ε is relative because ê is: no weight exceeds another by more than a factor `(1 + ε)/ε`, 21 as it is
    set here. The papers' ε is not known to us.

    Limitation: data shares play no part, and a small ε gives nearly all the weight to the clients
    of the largest rank as soon as W has rank (watch the effective number of clients `1/Σp²`).
    """

    power: float = 2.0
    epsilon: float = 0.05

    def __post_init__(self) -> None:
        if not self.power >= 0:
            raise ValueError(f"truncation: power must be >= 0, got {self.power}")
        if not 0 < self.epsilon < float("inf"):
            raise ValueError(f"truncation: epsilon must be > 0 and finite, got {self.epsilon}")

    def __call__(self, cohort: Cohort) -> Tensor:
        p = 1 / (relative_error(cohort) ** self.power + self.epsilon)
        return p / p.sum()


WEIGHTINGS: dict[str, type[Any]] = {
    "uniform": Uniform,
    "examples": Examples,
    "truncation": Truncation,
}


def build(
    kind: str, table: dict[str, type[Any]], name: str, hyperparameters: dict[str, Any]
) -> Any:
    """`table[name](**hyperparameters)`; ValueError names what is unknown and what is nearest."""
    if name not in table:
        near = get_close_matches(name, table, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown {kind} {name!r}; {hint}known: {', '.join(sorted(table))}")
    return construct(kind, name, table[name], hyperparameters)


def construct(kind: str, name: str, cls: type[Any], hyperparameters: dict[str, Any]) -> Any:
    """`cls(**hyperparameters)`; ValueError for hyperparameters that it does not have."""
    known = [field.name for field in fields(cls)]
    unknown = sorted(set(hyperparameters) - set(known))
    if unknown:
        raise ValueError(
            f"{kind} {name!r} has no hyperparameter {unknown[0]!r}; "
            + (f"it has: {', '.join(known)}" if known else "it has none")
        )
    try:
        return cls(**hyperparameters)
    except TypeError as error:  # a value of the wrong type, or one that is missing
        given = ", ".join(f"{key}={value!r}" for key, value in hyperparameters.items()) or "nothing"
        raise ValueError(f"{kind} {name!r} cannot be made from {given}: {error}") from error


def get_weighting(name: str, **hyperparameters: Any) -> Weighting:
    """A weighting by name, e.g. `get_weighting("truncation", power=2, epsilon=1e-3)`.

    Raises ValueError for an unknown name (suggesting the nearest) or an unknown hyperparameter.
    """
    return build("weighting", WEIGHTINGS, name, hyperparameters)
