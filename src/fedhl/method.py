"""The contract of an aggregation method: how the updates of one layer are combined, and what is sent back.

The aggregation-broadcast view (arXiv 2508.01348) with a server memory: a method turns a state and
a cohort's updates into the next state, and a state into each client's start. Methods are
frozen dataclasses whose fields are the hyperparameters; states are frozen dataclasses of tensors,
numbers and LoRAs, so that a checkpoint can hold them. A method is abstract (`Method`, or a family in
`fedhl.methods`) or final. A complete one, averaging dense updates:

>>> from dataclasses import dataclass
>>> from typing import ClassVar
>>> import torch
>>> from fedhl.lora import LoRA, add_products, dense, initial, prefix, truncate
>>> @dataclass(frozen=True)
... class Mean(Method[LoRA]):
...     mixed_ranks: ClassVar[bool] = True
...     laws: ClassVar[frozenset[str]] = frozenset({"gauge", "one client"})
...     per_client: ClassVar[bool] = False
...     starts: ClassVar[str] = "prefix"
...     def init(self, lora, seed=0):
...         return lora
...     def broadcast(self, state, rank, scale, key=0):
...         return Broadcast(prefix(state, rank, scale))
...     def aggregate(self, state, updates):
...         terms = ((u.weight, u.lora) for u in checked(updates, state.shape))
...         return truncate(add_products(torch.zeros(state.shape), terms), state.rank)
...     def delta(self, state):
...         return state
>>> method = Mean()
>>> state = method.init(initial(m=6, n=4, rank=2, scale=1.0, seed=0))
>>> sent = method.broadcast(state, rank=2, scale=1.0)
>>> trained = LoRA(sent.lora.A, torch.ones(6, 2), scale=1.0)
>>> state = method.aggregate(state, [Update(sent, trained, weight=1.0)])
>>> torch.allclose(dense(method.delta(state)), trained.delta(), atol=1e-6)
True
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from fedhl.lora import LoRA, concat

State = TypeVar("State")

LAWS = {
    "exact mean": "from any state, delta becomes delta + Σ p_i (ΔW_i - ΔW(sent_i))",
    "rounded mean": "the same of what arrived, where narrow numbers (wire.payload) were rounded on the way",
    "no-op": "if every client returns what it was sent, delta does not move",
    "gauge": "(B G, G⁻¹ A) in place of (B, A) changes nothing",
    "one client": "with one client of full rank, delta is its update",
}
"""The laws that not every method satisfies; each method claims its own, and both ways are tested."""

STARTS = {
    "truncation": "T_r(delta), its best approximation of the client's rank r",
    "whole": "delta, whatever the client's rank",
    "prefix": "the first r components of delta, which is an adapter",
    "mean": "delta on average over the keys, whatever the client's rank",
    "other": "what a reference of the method's own says",
}
"""A client's start, `base + ΔW(lora)`, by name; each method names one, and a dense reference tests it."""


@dataclass(frozen=True, eq=False)
class Broadcast:
    """The broadcast to one client, its start of a round: the model `W0 + base + ΔW(lora)`.

    `train`: the factors the client trains; `keep`: the factors that never leave it; `index`: the
    components of the server's state that are sent, for methods that do not send a prefix.
    `past`: k frozen directions of equal rank, one after the other, and `magnitudes` (k,): the number
    α_k that the client trains for each. They add `s Σ_k α_k D_k` to the model.

    `merged`: a part of the base that travels as components; the start is
    `W0 + base + ΔW(merged) + ΔW(lora)`. To a client that remembers (see `Remembering` and `Growing`), base
    None stands for what it holds. It adds `merged` to that for good, and if `absorbed` the adapter as it was
    sent, too.
    `lost`: `||delta - start||_F²`, if it is known already; the client is not told.

    `drawn`: the seed below 2⁵³ from which the client draws `lora` itself, `initial(m, n, r, s, drawn)`, so
    that it need not travel; None if it travels.
    """

    lora: LoRA
    base: Tensor | None = None
    train: frozenset[str] = frozenset({"A", "B"})
    keep: frozenset[str] = frozenset()
    index: Tensor | None = None
    past: LoRA | None = None
    magnitudes: Tensor | None = None
    merged: LoRA | None = None
    absorbed: bool = False
    lost: float | None = None
    drawn: int | None = None

    @property
    def whole(self) -> LoRA:
        """The adapter, frozen directions included."""
        return with_past(self.lora, self.past, self.magnitudes)


@dataclass(frozen=True, eq=False)
class Update:
    """One client's update: the broadcast that it was sent, the adapter that it trained, its weight p_i; and
    its magnitudes of the frozen directions, if it was sent any.

    The server normalises the weights over the updates that arrived; a method never does.
    """

    sent: Broadcast
    lora: LoRA
    weight: float
    magnitudes: Tensor | None = None

    @property
    def components(self) -> Tensor:
        """The components of the server's adapter that the update is of, shape (r,)."""
        index = self.sent.index
        return torch.arange(self.lora.rank) if index is None else index

    @property
    def whole(self) -> LoRA:
        """The adapter, frozen directions included."""
        return with_past(self.lora, self.sent.past, self.magnitudes)


def with_past(lora: LoRA, past: LoRA | None, magnitudes: Tensor | None) -> LoRA:
    """`ΔW(lora) + s Σ_k α_k D_k` as one adapter; `lora` itself if there are no frozen directions."""
    frozen = directions(past, magnitudes)
    return lora if frozen is None else concat([(1.0, frozen), (1.0, lora)])


def directions(past: LoRA | None, magnitudes: Tensor | None) -> LoRA | None:
    """`s Σ_k α_k D_k` as an adapter; None if there are no frozen directions."""
    if past is None or magnitudes is None or not len(magnitudes):
        return None
    alpha = magnitudes.repeat_interleave(past.rank // len(magnitudes)).to(past.B)
    return LoRA(past.A, past.B * alpha, past.scale)


class Traffic(NamedTuple):
    """Numbers (not bytes) that cross the wire for one client, one layer and one round; the mean over
    rounds where rounds differ."""

    down: float
    up: float


class Formula(NamedTuple):
    """`Traffic` in letters: r is the client's rank, R_c the largest and Σr the sum of the cohort's."""

    down: str
    up: str


@dataclass(frozen=True)
class Reference:
    """Where a method was published, and where to read it."""

    name: str
    url: str

    @classmethod
    def arxiv(cls, number: str) -> Reference:
        return cls(f"arXiv {number}", f"https://arxiv.org/abs/{number}")


class Method(Protocol[State]):
    """The contract of every aggregation method, on one layer; see the toy in the module's docstring.

    A part that has a value here may be left out. It is inherited from here or from a family of
    `fedhl.methods`; `fedhl.get_method` completes a class that inherits from neither.
    """

    mixed_ranks: ClassVar[bool]
    """Whether clients may have different ranks or scales."""
    laws: ClassVar[frozenset[str]]
    """The names of `LAWS` that the method claims."""
    weighting: ClassVar[str] = "examples"
    """The weighting of its paper, taken when a run names none."""
    per_client: ClassVar[bool] = True
    """Whether a broadcast depends on the client's key, so that the server builds one for each client. False:
    clients of one rank and scale are sent the same broadcast, which the server builds once."""
    starts: ClassVar[str] = "other"
    """The name in `STARTS` of a client's start."""
    formula: ClassVar[Formula] = Formula(down="r (m + n)", up="r (m + n)")
    """The formula of `traffic` at the default hyperparameters, for the tables."""
    reference: ClassVar[Reference] = Reference("unpublished", "")

    @abstractmethod
    def init(self, lora: LoRA, seed: int = 0) -> State:
        """The state before round 1, from the initial adapter at the server's top rank."""

    @abstractmethod
    def broadcast(self, state: State, rank: int, scale: float, key: int = 0) -> Broadcast:
        """The broadcast to a client of this rank and scale; the same for the same state and key.

        Raises ValueError for a rank or scale that the method cannot serve.
        """

    @abstractmethod
    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """The next state. `updates` may be lazy, and may be iterated more than once.

        Raises ValueError for an empty cohort, wrong shapes and non-finite values.
        """

    @abstractmethod
    def delta(self, state: State) -> LoRA | Tensor | None:
        """The global change of this layer in effective units; None without a global model."""

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        """Numbers down and up for one client of `rank` in a cohort of these ranks."""
        return Traffic(down=rank * (m + n), up=rank * (m + n))


@runtime_checkable
class SelfPruning(Protocol):
    """The part of a method whose clients may prune their own rank while they train."""

    def penalty(self, lora: LoRA) -> Tensor:
        """A differentiable 0-d term that the client adds to its loss, for one layer."""
        ...

    def pruned_rank(self, before: Mapping[str, LoRA], after: Mapping[str, LoRA]) -> int:
        """The client's next rank, from its adapters before and after training."""
        ...


@runtime_checkable
class Truncating(Protocol):
    """The part of a method that knows how much of the global change a client of some rank is not sent, so
    that the server need not form the difference, a dense matrix for every rank."""

    def lost(self, state: Any, rank: int) -> float:
        """`||delta - base - ΔW(sent)||_F²`, in float64."""
        ...


@runtime_checkable
class Remembering(Protocol):
    """The part of a method whose clients remember: each holds M, the sum of all that it was ever sent, in its
    frozen base. After a broadcast it holds `M + ΔW(merged) + ΔW(lora)`, with the adapter as it was sent.

    `Method.broadcast` is for a client that holds nothing, M = 0: a newcomer, or a client that has lost
    its memory.
    """

    def catch_up(
        self, state: Any, held: Tensor, rank: int, scale: float, key: int = 0
    ) -> Broadcast:
        """The broadcast to a client that holds `held` (m, n), relative to it: the start is
        `W0 + held + ΔW(merged) + ΔW(lora)`. Raises ValueError as `Method.broadcast` does."""
        ...


@runtime_checkable
class Growing(Protocol):
    """The part of a method whose broadcasts have a `base` that grows by a few components in a round. A
    client that took part in the last round holds that round's base, and is sent `grown` as `merged` in place
    of the base; every other client is sent the whole base."""

    def grown(self, state: Any) -> LoRA | None:
        """The base of this round less that of the last one; None if a matrix (m, n) has fewer numbers."""
        ...


def if_fewer(components: LoRA) -> LoRA | None:
    """Components, if there are any and they are fewer numbers than their product: `0 < r (m + n) < m n`."""
    m, n = components.shape
    return components if 0 < components.rank * (m + n) < m * n else None


def remembers(method: Method[Any]) -> bool:
    """Whether the clients of a method hold something in their base from one round to the next."""
    return isinstance(method, Remembering | Growing)


@runtime_checkable
class TaskSequence(Protocol[State]):
    """The part of a method that changes its state when new labels arrive."""

    def next_task(self, state: State) -> State:
        """The state in which the next task begins; it must leave `delta` as it is."""
        ...


@runtime_checkable
class FromBase(Protocol[State]):
    """The part of a method that looks at the frozen weight of its layer before round 1."""

    def from_base(self, state: State, W0: Tensor, seed: int = 0) -> State:
        """The first state, from the state that `init` gave and the layer's frozen weight W0 (m, n); it must
        leave `delta` as it is. `seed` names what has to be drawn."""
        ...


def check_broadcast(rank: int, scale: float, top: int) -> None:
    """Raises ValueError unless `rank` is in 1..top and `scale` is positive and finite."""
    if not 1 <= rank <= top:
        raise ValueError(f"rank must be in 1..{top} (the server's top rank), got {rank}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, got {scale}")


def check_alike(method: str, rank: int, scale: float, state: LoRA) -> None:
    """Raises ValueError unless `rank` and `scale` are those of `state`, for a method without mixed ranks."""
    if rank != state.rank or abs(scale - state.scale) > 1e-6 * state.scale:
        raise ValueError(
            f"{method} needs rank {state.rank} and scale {state.scale:g} of every client, got rank "
            f"{rank} and scale {scale:g}; use fedhl for mixed ranks"
        )


def finite(lora: LoRA) -> bool:
    """Whether every value of both factors is finite. One pass over the norm finds any non-finite value; since
    the norm of finite values may overflow, a second pass follows if it is not finite."""
    return all(
        math.isfinite(float(torch.linalg.vector_norm(x))) or bool(x.isfinite().all())
        for x in (lora.A, lora.B)
    )


def checked(updates: Iterable[Update], shape: tuple[int, int]) -> Iterator[Update]:
    """The updates one by one, each checked as it is read.

    Raises ValueError for an empty cohort, a layer shape other than `shape`, a non-finite value and
    a weight that is negative or not finite; TypeError for anything that is not an adapter.
    """
    k = -1
    for k, update in enumerate(updates):
        if not isinstance(update.lora, LoRA):
            raise TypeError(f"update {k} holds a {type(update.lora).__name__}, expected a LoRA")
        if update.lora.shape != shape:
            raise ValueError(
                f"update {k} is for a layer of shape {update.lora.shape}, expected {shape}"
            )
        if not finite(update.lora):
            raise ValueError(f"update {k} has a non-finite value")
        if not (math.isfinite(update.lora.scale) and update.lora.scale > 0):
            raise ValueError(
                f"update {k} has scale {update.lora.scale}, expected a positive number"
            )
        if not (math.isfinite(update.weight) and update.weight >= 0):
            raise ValueError(f"update {k} has weight {update.weight}, expected a number >= 0")
        yield update
    if k < 0:
        raise ValueError(
            "the cohort is empty, expected at least one update; after a round without updates keep the state"
        )


def scaled(update: Update, c: float) -> Update:
    """The update with `ΔW ← ΔW(sent) + c (ΔW - ΔW(sent))`, as an adapter of both ranks together; for
    methods that sum products, since factors have no such step."""
    return replace(update, lora=concat([(c, update.lora), (1 - c, update.sent.lora)]))


def changes(updates: Iterable[Update]) -> Iterator[tuple[float, LoRA]]:
    """The terms of `Σ p_i (ΔW_i - ΔW(sent_i))`: every adapter with its weight, and then each broadcast,
    once for all clients that were sent the same object, with minus the sum of their weights."""
    held: dict[int, tuple[float, Broadcast]] = {}  # by identity
    for update in updates:
        yield update.weight, update.lora
        weight, sent = held.get(id(update.sent), (0.0, update.sent))
        held[id(sent)] = weight - update.weight, sent
    yield from ((weight, sent.lora) for weight, sent in held.values())


def flatten(state: Any) -> dict[str, Tensor]:
    """A state as named tensors, for safetensors; numbers become 0-d float64 or int64 tensors.

    Raises TypeError if the state is not made of tensors, numbers and dataclasses of them.
    """
    if isinstance(state, Tensor):
        return {"": state.contiguous()}
    if isinstance(state, bool | int | float):
        return {"": torch.tensor(state, dtype=torch.float64 if isinstance(state, float) else None)}
    if not is_dataclass(state):
        raise TypeError(
            f"a state holds tensors, numbers and dataclasses, not {type(state).__name__}"
        )
    return {
        f"{field.name}.{name}".rstrip("."): tensor
        for field in fields(state)
        for name, tensor in flatten(getattr(state, field.name)).items()
    }


def unflatten(like: State, tensors: dict[str, Tensor]) -> State:
    """The state that `flatten` wrote, with the structure of `like` (say, `method.init(...)`).

    Raises KeyError if a tensor is missing.
    """
    if isinstance(like, Tensor):
        return tensors[""]  # type: ignore[return-value]
    if isinstance(like, bool | int | float):
        return type(like)(tensors[""].item())  # type: ignore[return-value]
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        parts.setdefault(head, {})[rest] = tensor
    return replace(
        like,  # type: ignore[type-var]
        **{f.name: unflatten(getattr(like, f.name), parts[f.name]) for f in fields(like)},  # type: ignore[arg-type]
    )
