"""The activations below the first adapted layer, computed once for each row.

A model is a stack of layers `h_1, ..., h_K` between embeddings and a head. Where the first L layers have no
adapter and nothing else that is trained, what leaves them,

    x(row) = h_L(... h_1(embed(row))),    shape (sequences, tokens, width),

is the same in every step of every client and in every evaluation. It is computed when the row is first read,
and kept on the CPU in the type that the layers give it. From then on `h_1, ..., h_{L-1}` pass on what they
are given, and `h_L` hands out `x`; everything else, such as masks, positions and heads, is the model's own.

Rows of one length are read together, in groups that follow from the rows alone. So nothing is padded, and `x`
does not depend on the batch in which a row is first drawn: a resumed run has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from fedhl.errors import UserError, in_one_line
from fedhl.model.peft import Slots
from fedhl.model.training import training_mode
from fedhl.record import Unit
from fedhl.seeds import seeded
from fedhl.task.objective import Objective
from fedhl.task.texts import in_batches

ROWS, TOKENS = 16, 128
"""The most rows of one length, and the most tokens of these, that are read together when one of the rows is
first drawn: short rows together are read faster than one by one, and few of them may never be drawn."""
TOLERANCE = 2e-2
"""The distance, relative to the norm, from which on activations are not the same but for rounding, which is
that of bfloat16 over many layers at its most."""
SETTING = "compute.cache_activations"


class Filled(NamedTuple):
    """A batch with its activations (sequences, tokens, width); None: rows that the cache was never told of,
    which the whole model reads."""

    inputs: Any
    activations: Tensor | None


class Reached(Exception):
    """Ends a forward pass at the layer whose output is wanted."""


@dataclass(frozen=True)
class Frozen:
    """The layers `h_1, ..., h_L` of a model that never change, and `last`, the last layer of their stack."""

    below: Sequence[nn.Module]
    last: nn.Module


def frozen_layers(slots: Slots) -> Frozen:
    """The layers of the model below the first one that is trained. Raises UserError if there are none, and if
    the model does not keep its layers in one list."""
    lists = [name for name, m in slots.model.named_modules() if isinstance(m, nn.ModuleList)]
    holding = [name for name in lists if any(under(layer, name) for layer in slots.modules)]
    # a layer may have lists of its own, e.g. of experts
    stacks = [name for name in holding if not any(under(name, other) for other in holding)]
    if len(stacks) != 1:
        found = f"several of them: {', '.join(stacks)}" if stacks else "none"
        raise UserError(
            f"{SETTING}: expected the adapted layers of a {type(slots.model).__name__} in one list of layers "
            f"(torch.nn.ModuleList), found {found}; leave {SETTING} out"
        )
    (stack,) = stacks
    trained = [name for name in (*slots.modules, *slots.head) if under(name, stack)]
    at = min(trained, key=lambda name: place_in(stack, name))
    first = place_in(stack, at)
    if first == 0:
        raise UserError(
            f"{SETTING}: {at} is trained, which is in the first layer of the model, so that every layer "
            f"changes; give lora.targets that are in the last layers only, or leave {SETTING} out"
        )
    members = list(slots.model.get_submodule(stack))
    return Frozen(members[:first], members[-1])


def under(name: str, owner: str) -> bool:
    return name.startswith(f"{owner}.")


def place_in(stack: str, name: str) -> int:
    """The index of the member of this list of layers that holds the module or parameter `name`."""
    return int(name[len(stack) + 1 :].split(".")[0])


class CachedObjective:
    """An objective (see `fedhl.task.objective.Objective`) whose batches bring their activations, so that the
    model does not compute them again.

    `lists`: all rows that may be drawn, in lists that know nothing of each other, such as those of one client
    each; `length`: the number of tokens of a row.
    Raises UserError for a model or rows that cannot be served, see `frozen_layers` and `check`.
    """

    def __init__(
        self,
        objective: Objective,
        slots: Slots,
        lists: Sequence[Sequence[Any]],
        length: Callable[[Any], int],
        autocast: Callable[[], AbstractContextManager[Any]],
        device: torch.device,
    ):
        self.objective, self.slots, self.frozen = objective, slots, frozen_layers(slots)
        self.autocast, self.device = autocast, device
        groups = [group for rows in lists for group in in_groups(rows, length)]
        # rows are told apart as objects, which stay alive in their groups
        self.group = {id(row): group for group in groups for row in group}
        self.activations: dict[int, Tensor] = {}
        self.bytes = 0
        """The memory of all activations, once every row has been read."""
        if groups:
            short, *_, long = sorted((group[0] for group in [groups[0], *groups]), key=length)
            check(self, short, long)
            everything = sum(len(group) * length(group[0]) for group in groups)
            self.bytes = everything * self.of_rows([long]).nbytes // length(long)

    @property
    def metric(self) -> str:
        return self.objective.metric

    @property
    def greater(self) -> bool:
        return self.objective.greater

    @property
    def unit(self) -> Unit:
        return self.objective.unit

    def batch(self, rows: Sequence[Any]) -> Filled:
        known = all(id(row) in self.group for row in rows)
        return Filled(self.objective.batch(rows), self.of_rows(rows) if known else None)

    def terms(self, batch: Filled) -> int:
        return self.objective.terms(batch.inputs)

    def loss(self, model: Any, batch: Filled) -> Tensor:
        with self.handed_out(batch.activations):
            return self.objective.loss(model, batch.inputs)

    def outputs(self, model: Any, batch: Filled) -> Any:
        with self.handed_out(batch.activations):
            return self.objective.outputs(model, batch.inputs)

    def score(self, outputs: Any, batch: Filled) -> Any:
        return self.objective.score(outputs, batch.inputs)

    def parts(self, rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
        return self.objective.parts(rows, size)

    def tokens(self, batch: Filled) -> int | None:
        return self.objective.tokens(batch.inputs)

    def of_rows(self, rows: Sequence[Any]) -> Tensor:
        """The activations of these rows, padded on the right with zeros to the longest: of B rows with k
        sequences each, sequence j of row i is the one at j B + i."""
        for row in rows:
            if id(row) not in self.activations:
                self.read(self.group[id(row)])
        found = [self.activations[id(row)] for row in rows]
        k, _, *width = found[0].shape
        x = found[0].new_zeros(k, len(rows), max(a.shape[1] for a in found), *width)
        for i, a in enumerate(found):
            x[:, i, : a.shape[1]] = a
        return x.flatten(0, 1)

    def read(self, rows: Sequence[Any]) -> None:
        """Compute the activations of rows of one length, and keep them."""
        x = self.leaving(self.frozen.below[-1], self.objective.batch(rows)).cpu()
        for i, row in enumerate(rows):
            self.activations[id(row)] = x[i :: len(rows)]

    @torch.no_grad()
    def leaving(self, layer: nn.Module, inputs: Any) -> Tensor:
        """What leaves this layer of the model for a batch (sequences, tokens, width); nothing behind the
        layer is computed."""
        found: list[Any] = []

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output)
            raise Reached

        hook = layer.register_forward_hook(stop)
        try:
            with suppress(Reached), self.autocast():
                self.objective.outputs(self.slots.model, send_to_device(inputs, self.device))
        finally:
            hook.remove()
        if not isinstance(found[0], Tensor):
            raise TypeError(f"a layer returns a {type(found[0]).__name__}, expected one tensor")
        return found[0]

    @contextmanager
    def handed_out(self, activations: Tensor | None) -> Iterator[None]:
        """Inside the block the frozen layers compute nothing: the last of them hands out `activations`. None:
        they compute as always."""
        if activations is None:
            yield
            return
        *others, last = self.frozen.below
        with ExitStack() as undo:
            for layer in others:
                undo.enter_context(forward(layer, passed_on))
            undo.enter_context(forward(last, partial(remembered, activations)))
            yield


@contextmanager
def forward(layer: nn.Module, function: Callable[..., Tensor]) -> Iterator[None]:
    """Inside the block the layer computes this function instead of its own."""
    before = vars(layer).get("forward")  # where a library has replaced it already
    layer.forward = function
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


def passed_on(*args: Any, **kwargs: Any) -> Tensor:
    """The activations that a layer is given, as it is."""
    return args[0] if args else kwargs["hidden_states"]


def remembered(activations: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`activations`, of the shape that the layer is given."""
    expected = passed_on(*args, **kwargs).shape
    if activations.shape != expected:
        raise ValueError(f"activations of {tuple(activations.shape)}, expected {tuple(expected)}")
    return activations


def in_groups(rows: Sequence[Any], length: Callable[[Any], int]) -> list[Sequence[Any]]:
    """The rows in groups of one length, at most `ROWS` rows and `TOKENS` tokens, but at least one row."""
    by_length: dict[int, list[Any]] = {}
    for row in rows:
        by_length.setdefault(length(row), []).append(row)
    return [
        group
        for tokens, alike in by_length.items()
        for group in in_batches(alike, ROWS, lambda _, tokens=tokens: TOKENS // tokens)
    ]


# --- whether a model goes with it ---------------------------------------------------------------


def check(cache: CachedObjective, short: Any, long: Any) -> None:
    """Raises UserError unless the activations of these two rows are the same in training and in evaluation,
    in a batch and alone, and the model computes with them what it computes without."""
    model, frozen, device = cache.slots.model, cache.frozen, cache.device
    batches = [cache.objective.batch(rows) for rows in ([short], [long], [short, long])]
    try:
        with first_trained(cache.slots) as early:
            read = [cache.leaving(frozen.below[-1], inputs) for inputs in batches]
        if early:
            raise UserError(
                f"{SETTING}: {early[0]} is trained and runs before the first adapted layer; choose other "
                f"lora.targets, or leave {SETTING} out"
            )
        with training_mode(model), seeded(0, device):
            trained = [cache.leaving(frozen.below[-1], inputs) for inputs in batches]
        if not all(map(torch.equal, read, trained)):
            raise UserError(
                f"{SETTING}: the layers below the first adapted one compute something else in training, such "
                f"as a dropout; set model.dropout: 0.0, or leave {SETTING} out"
            )
        for rows, inputs, x in zip(([short], [long], [short, long]), batches, read, strict=True):
            y = cache.of_rows(rows).to(device)
            whole = cache.leaving(frozen.last, inputs)
            with cache.handed_out(y):
                quick = cache.leaving(frozen.last, inputs)
            real = y != 0  # 0 where rows are padded
            pairs = ((x, y), (whole, quick))
            if not all(distance(*(z.where(real, 0) for z in p)) <= TOLERANCE for p in pairs):
                raise ValueError("it computes something else than without the cache")
    except UserError:
        raise
    except Exception as error:  # whatever somebody's model says of a layer that does nothing
        raise UserError(
            f"{SETTING}: a {type(model).__name__} cannot go on from what leaves its frozen layers "
            f"({in_one_line(error)}); leave {SETTING} out"
        ) from error


def distance(a: Tensor, b: Tensor) -> float:
    """`‖a - b‖ / ‖a‖`."""
    return float((a.float() - b.float()).norm() / a.float().norm())


@contextmanager
def first_trained(slots: Slots) -> Iterator[list[str]]:
    """Gives a list that takes the name of every trained module that runs inside the block."""
    ran: list[str] = []
    heads = {id(parameter) for parameter in slots.head.values()}
    with ExitStack() as undo:
        for name, module in slots.model.named_modules():
            own = module.parameters(recurse=False)
            if name in slots.modules or any(id(parameter) in heads for parameter in own):
                hook = module.register_forward_hook(lambda *_, name=name: ran.append(name))
                undo.callback(hook.remove)
        yield ran
