"""The weights of the clients: one number p_i per client and round, over all layers at once.

Separate from the methods because the weights need every layer, and because any weighting can go
with any method that has a global change. There are two kinds:

- `uniform`, `examples`, `truncation` and `balanced` depend on the server's state, on ranks and on
  data shares alone: they are known before any update arrives, and no update changes them.
- `norm`, `loss` and `generalization_bound` need the numbers that a client sends in this round: its
  update, its losses, its bounds. A client that lies about them picks its own weight, and every other
  client's with it. They need each client's numbers in the clear, so they do not go with secure aggregation,
  nor with differential privacy that accounts for the clipped updates alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fedhl.names import build
from fedhl.weightings import WEIGHTINGS


@dataclass(frozen=True, eq=False)
class Cohort:
    """The facts about the K clients whose updates arrived, over L layers, that a weighting may use.

    `examples` (K,): training rows. `error` (K, L): `e_il = ||W_l - base - ΔW(sent_il)||_F²`, the
    part of the global change that client i's start lacks. `energy` (L,): `||W_l||_F²`. Optional, (K,):
    `norms` of the updates, `||ΔW_i||_F` over all layers; the training `losses` that clients report;
    the `bounds` they estimate, upper minus lower (see `moment_bounds`).
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
            raise ValueError("cohort: expected at least one client, got none")
        for field in fields(self):
            value = getattr(self, field.name)
            expected = {"error": (K, L), "energy": (L,)}.get(field.name, (K,))
            if value is not None and value.shape != expected:
                raise ValueError(
                    f"cohort of {K} clients and {L} layers: {field.name} must be of shape {expected}, "
                    f"got {tuple(value.shape)}"
                )


def relative_error(cohort: Cohort) -> Tensor:
    """`ê_i = Σ_l e_il / Σ_l ||W_l||_F²`, shape (K,), in float64; 0 where `W = 0`. At most 1: a start
    that is further from W than zero is (as a random sketch may be) counts as zero."""
    error, energy = torch.as_tensor(cohort.error), torch.as_tensor(cohort.energy).sum()
    if energy == 0:
        return torch.zeros(error.shape[0], dtype=torch.float64)
    return (error.sum(dim=1) / energy).clamp(max=1)


def data_share(cohort: Cohort) -> Tensor:
    """`q_i`, each client's share of the training rows, shape (K,). Raises ValueError if all are 0."""
    examples = torch.as_tensor(cohort.examples)
    if examples.sum() == 0:
        raise ValueError("weights by examples: no client has any training row")
    return examples / examples.sum()


def reported(weighting: str, cohort: Cohort, field: str) -> Tensor:
    """An optional field of the cohort, shape (K,). Raises ValueError if it is missing."""
    value = getattr(cohort, field)
    if value is None:
        raise ValueError(
            f"{weighting}: the cohort has no {field}; give one number for every client"
        )
    return torch.as_tensor(value)


class Weighting(Protocol):
    """A frozen dataclass whose call gives the weights, shape (K,), non-negative, summing to 1.

    Raises ValueError if the cohort lacks a field that it needs.
    """

    norms: ClassVar[bool] = True
    """Whether it uses the norms of the updates, which cost the server a pass over all of them."""

    def __call__(self, cohort: Cohort) -> Tensor: ...


# --- weights that no update changes -------------------------------------------------------------


@dataclass(frozen=True)
class Uniform:
    """Every client counts the same: `p_i = 1/K`."""

    norms: ClassVar[bool] = False

    def __call__(self, cohort: Cohort) -> Tensor:
        K = len(cohort.examples)
        return torch.full((K,), 1 / K, dtype=torch.float64)


@dataclass(frozen=True)
class Examples:
    """FedAvg's weights: `p_i = q_i`, the share of training rows."""

    norms: ClassVar[bool] = False

    def __call__(self, cohort: Cohort) -> Tensor:
        return data_share(cohort)


@dataclass(frozen=True)
class Truncation:
    """FedHL's weights: clients that start further from the global model count less.

    `p_i ∝ 1/(ê_i^power + ε)` with ê_i the relative *squared* truncation error in [0, 1].
    power 2 is the rule as printed (arXiv 2505.18494, Eq. 15 as reported by others), the fourth
    power of the distance; power 1, the square of the distance, is what minimises the drift term
    `Σ p_i² ê_i`. ε is relative because ê is: no weight exceeds another by more than a factor
    `(1 + ε)/ε`, 21 as it is set here. The papers' ε is not known to us.

    With `share`, ε is raised in each round to the smallest value at which the effective number of
    clients `N_eff = 1/Σp²` is at least `share · K`. There is one below share 1, which is the limit
    ε → ∞, since N_eff only grows with ε: with `w_i = 1/(ê_i^power + ε)`, `dw_i/dε = -w_i²`, so
    `d log N_eff/dε = 2 Σw³/Σw² - 2 Σw²/Σw`, and `(Σw²)² <= Σw Σw³` by Cauchy-Schwarz.

    Limitation: data shares play no part, and a small ε gives nearly all the weight to the clients
    of the largest rank as soon as W has rank (watch `N_eff`, or set `share`).
    """

    power: float = 2.0
    epsilon: float = 0.05
    share: float | None = None

    norms: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.power >= 0:
            raise ValueError(f"truncation: power must be >= 0, got {self.power}")
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"truncation: epsilon must be > 0 and finite, got {self.epsilon}")
        check_share("truncation", self.share)

    def __call__(self, cohort: Cohort) -> Tensor:
        error = relative_error(cohort) ** self.power

        def weights(epsilon: float) -> Tensor:
            return inverse(error + epsilon, torch.ones_like(error))

        if self.share is None:
            return weights(self.epsilon)
        return weights_for_share(weights, self.epsilon, float(error.max()), self.share)


@dataclass(frozen=True)
class Balanced:
    """Small drift without abandoning the data: between FedAvg's weights and inverse error.

    `p_i ∝ q_i/(λ + q_i ê_i)`, the minimiser of `Σ p_i² ê_i + λ χ²(p‖q)`, q the data shares and ê
    the relative squared truncation errors. λ → ∞ is `examples`, λ → 0 is `1/ê_i`. Derived for this
    project; no ratio `p_i/q_i` exceeds another by more than a factor `1 + 1/λ`. With ê_i <= 1,
    `q_i ê_i` is about 1/K or less: λ = 1 is near FedAvg, smaller ones make a difference.

    With `share`, λ is raised in each round to the smallest value at which the effective number of
    clients `N_eff = 1/Σp²` is at least `share · K`. Unlike in `truncation` there may be none: N_eff
    grows with λ only while p_i and `p_i/q_i` correlate positively under p, and its limit is that of
    the data shares. It falls with λ where errors hold the largest data shares back. So the whole
    range of λ is searched, in steps of an eighth of an octave, for the first to reach the share; if
    none does, the λ whose N_eff is largest serves, be it the given one or ∞.

    Limitation: a client without rows has no weight, however good its start.
    """

    lam: float = 1.0
    share: float | None = None

    norms: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.lam < math.inf:
            raise ValueError(f"balanced: lam must be > 0 and finite, got {self.lam}")
        check_share("balanced", self.share)

    def __call__(self, cohort: Cohort) -> Tensor:
        q = data_share(cohort)
        error = q * relative_error(cohort)

        def weights(lam: float) -> Tensor:
            return inverse(error + lam, q)

        if self.share is None:
            return weights(self.lam)
        return weights_for_share(weights, self.lam, float(error.max()), self.share)


# --- weights by what the clients send -----------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """HetLoRA's weights: clients with larger updates count more.

    `p_i ∝ ||ΔW_i||_F`, over all layers: the root of the sum of the layers' squares. Uniform if all
    updates are zero.

    Source: arXiv 2401.06432, where the norm stands for how much an update holds ("sparsity
    weighted"). That it is the norm of the product is as in two re-implementations, of which one has
    weights per layer and one adds up the layers' norms; one number per client is our choice.
    Limitation: it rewards a large rank, many steps, a large learning rate and a large lie alike.
    The update is the whole `ΔW_i`, so what the client was sent counts too.
    """

    norms: ClassVar[bool] = True

    def __call__(self, cohort: Cohort) -> Tensor:
        return proportional(reported("norm", cohort, "norms"))


@dataclass(frozen=True)
class Loss:
    """Clients weighted by their training losses: down for large ones, or up with a positive tilt.

    `p_i ∝ q_i exp(tilt · (f_i - f̄))` with f_i the reported loss; any constant may serve as f̄.
    tilt < 0 discounts clients with large losses, which guards against corrupted data. tilt > 0
    gives them more, which guards against leaving a client behind: p is then the maximiser of
    `Σ p_i f_i - KL(p‖q)/tilt`, the worst mixture of the clients' distributions near q; tilt → ∞
    is agnostic federated learning (arXiv 1902.00146). 0 is FedAvg.

    Source: tilted empirical risk, arXiv 2007.01162: these are the weights of the gradients of
    `log(Σ q_i exp(tilt f_i)) / tilt`. Inferred: that they serve as weights of whole updates, and
    that the mean loss over a client's own steps stands for its loss at the global model.
    Limitation: a client with hard data is taken for a corrupted one (tilt < 0), a corrupted one for
    one that was left behind (tilt > 0). Losses of different kinds of task do not compare.
    """

    tilt: float = -1.0

    norms: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.tilt):
            raise ValueError(f"loss: tilt must be finite, got {self.tilt}")

    def __call__(self, cohort: Cohort) -> Tensor:
        losses, q = reported("loss", cohort, "losses"), data_share(cohort)
        if self.tilt == 0:
            return q
        # Relative to the client that gains most: no exponent is positive, and that client's is 0.
        favoured = losses[q > 0].max() if self.tilt > 0 else losses[q > 0].min()
        p = torch.where(q > 0, q * (self.tilt * (losses - favoured)).exp(), 0.0)
        return p / p.sum()


@dataclass(frozen=True)
class GeneralizationBound:
    """Clients weighted by how far apart the bounds of their loss under a shift of their data are.

    `p_i ∝ (upper_i - lower_i)^power`, bounds of the second moment of client i's loss over all
    distributions near its own (`moment_bounds`). Data shares play no part. Uniform if all widths
    are 0; with a negative power, clients of width 0 share the whole weight.

    Source: arXiv 2311.05936, of which we know the abstract alone: the bounds' disagreements are the
    "aggregation proportions". So power 1, as printed, which gives the *least* certain client the
    most weight; the abstract's aim, less harm from noisy data, may suggest the inverse, power -1.
    Inferred: the bounds themselves, see `moment_bounds`.
    Limitation: the spread of squared losses grows with the losses, so clients of large losses count
    more, be their data rare, hard or corrupted.
    """

    power: float = 1.0

    norms: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.power):
            raise ValueError(f"generalization_bound: power must be finite, got {self.power}")

    def __call__(self, cohort: Cohort) -> Tensor:
        return proportional(reported("generalization_bound", cohort, "bounds"), self.power)


def moment_bounds(losses: Iterable[float], radius: float = 1.0) -> tuple[float, float]:
    """Lower and upper bound of a client's `E[f²]` under a shift of its data, from its losses f.

    `mean(f²) ± sqrt(radius · var(f²))`, the lower one at least 0: by Cauchy-Schwarz they hold for
    every reweighting of the losses whose chi-square divergence from equal weights is at most
    `radius`, and attained where the extreme one has no negative weight. Inferred: the paper (arXiv
    2311.05936) bounds the same moment, in a way that we do not know. While no lower bound
    is cut off at 0, `radius` cancels in the weights, which are then the standard deviations of f².

    Limitation: a single loss has no variance, so its bounds coincide.
    Raises ValueError for no losses, one that is not finite or too large to square, or a radius
    that is negative or not finite.
    """
    if not 0 <= radius < math.inf:
        raise ValueError(f"moment_bounds: radius must be >= 0 and finite, got {radius}")
    squares = torch.tensor([*losses], dtype=torch.float64).square()
    if squares.numel() == 0:
        raise ValueError("moment_bounds: expected at least one loss, got none")
    mean, spread = float(squares.mean()), math.sqrt(radius * float(squares.var(correction=0)))
    if not math.isfinite(mean + spread):
        raise ValueError("moment_bounds: a loss is not finite, or too large to square twice")
    return max(0.0, mean - spread), mean + spread


# --- shared by several weightings ---------------------------------------------------------------


def proportional(x: Tensor, power: float = 1.0) -> Tensor:
    """`p_i ∝ x_i^power`, shape (K,); its limit where x_i is 0 and that has no value."""
    most = x.max() if power >= 0 else x.min()
    p = (x / most) ** power if most > 0 else (x == 0).to(x)
    return p / p.sum()


def inverse(x: Tensor, q: Tensor) -> Tensor:
    """`p_i ∝ q_i/x_i` for positive x, shape (K,).

    Relative to the least x that counts, so that no quotient overflows.
    """
    x = torch.where(q > 0, x, math.inf)
    p = q * (x.min() / x)
    return p / p.sum()


def check_share(weighting: str, share: float | None) -> None:
    """Raises ValueError unless `share` is None or in (0, 1]."""
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"{weighting}: share must be in (0, 1], got {share}")


def weights_for_share(
    weights: Callable[[float], Tensor], least: float, turning: float, share: float
) -> Tensor:
    """`weights(x)` at the smallest `x >= least` where `1/Σp² >= share · K`; if there is no such x, at the x
    where `1/Σp²` is largest.

    `turning`: the largest value to which the weights add x; at 2⁵³ times this value only the last bits of
    the weights still change. Up to there x grows by an eighth of an octave at a time; from the first x that
    suffices, bisection in log x finds the smallest, to rounding.
    """
    start = math.log2(least)
    end = min(math.log2(turning) + 53, 1023) if turning > 0 else start  # 2¹⁰²³ is a number yet

    def at(log: float) -> Tensor:
        return weights(least if log == start else 2.0**log)

    def effective(log: float) -> float:
        return 1 / float(at(log).square().sum())

    logs = [start + k / 8 for k in range(max(0, math.ceil(8 * (end - start))) + 1)]
    target = share * len(at(start))
    high = next((log for log in logs if effective(log) >= target), None)
    if high is None:
        return at(max(logs, key=effective))
    low = max(start, high - 1 / 8)
    for _ in range(53):
        middle = (low + high) / 2
        low, high = (low, middle) if effective(middle) >= target else (middle, high)
    return at(high)


def get_weighting(name: str, **hyperparameters: Any) -> Weighting:
    """A weighting by name, e.g. `get_weighting("truncation", power=2, epsilon=1e-3)`.

    Raises ValueError for an unknown name (suggesting the nearest) or an unknown hyperparameter.
    """
    return build("weighting", WEIGHTINGS, name, hyperparameters)
