"""The local training of one client: a plain loop over its rows. Knows nothing of federation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedhl.seeds import derive, generator, seeded
from fedhl.task.objective import Objective

if TYPE_CHECKING:
    from fedhl.config.conduct import TrainingConfig


SHORT = 64
"""The most tokens of a row whose attention is computed by plain products, in bfloat16 on a CPU."""


class Trained(NamedTuple):
    """The result of a training: the loss of each step, and the seconds in forward, backward and optimizer."""

    losses: list[float]
    seconds: float

    @property
    def loss(self) -> float:
        """The mean over the steps."""
        return sum(self.losses) / len(self.losses)

    @property
    def steps(self) -> int:
        return len(self.losses)


def learning_rate(config: TrainingConfig, rounds: int, progress: float) -> float:
    """The rate when `progress` of `rounds` rounds are done (a number in [0, rounds]).

    Linear warm-up over `warmup_rounds`, then constant, linear to 0, or a half cosine to 0.
    """
    warmup = config.warmup_rounds
    if progress < warmup:
        return config.learning_rate * progress / warmup
    done = (progress - warmup) / max(rounds - warmup, 1)
    match config.schedule:
        case "constant":
            return config.learning_rate
        case "linear":
            return config.learning_rate * (1 - done)
        case "cosine":
            return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


def batches(examples: int, size: int, seed: int) -> Iterator[list[int]]:
    """Row indices, `size` at a time, from one shuffled pass after another, without end."""
    size, epoch, held = min(size, examples), 0, []
    while True:
        while len(held) < size:
            order = torch.randperm(examples, generator=generator(seed, "epoch", epoch))
            held += order.tolist()
            epoch += 1
        yield held[:size]
        held = held[size:]


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in training mode, afterwards in evaluation mode. A model that is in
    training mode already stays so: to visit all its modules takes longer than to copy an adapter.
    """
    if model.training:
        yield
        return
    model.train()
    try:
        yield
    finally:
        model.eval()


def train(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    rows: Sequence[Any],
    config: TrainingConfig,
    *,
    objective: Objective,
    steps: int,
    rate: Callable[[int], float],
    autocast: Callable[[], AbstractContextManager[Any]],
    seed: int,
    on_step: Callable[[], None] = lambda: None,
    penalty: Callable[[], Tensor] | None = None,
) -> Trained:
    """`steps` optimizer steps on `parameters`, with a fresh optimizer; step k runs at `rate(k)`.

    `penalty` is a term added to the loss, which the reported losses leave out.
    Row order and dropout follow from `seed`, and the global random state is left as it was.
    """
    device = parameters[0].device
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.SGD(parameters, lr=1.0, weight_decay=config.weight_decay)
    order = batches(len(rows), config.batch_size, seed)
    losses, seconds = [], 0.0
    with training_mode(model), seeded(derive(seed, "dropout"), device):
        for step in range(steps):
            drawn = [rows[k] for k in next(order)]
            size = -(-len(drawn) // config.accumulation)
            micro = [
                send_to_device(objective.batch(drawn[k : k + size]), device)
                for k in range(0, len(drawn), size)
            ]
            start = perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            # The loss is a mean, so each part counts by what it is a mean over.
            counts = [objective.terms(batch) for batch in micro]
            total = 0.0
            for batch, count in zip(micro, counts, strict=True):
                # also where a backward pass recomputes
                with attention(objective.tokens(batch), device, autocast):
                    with autocast():
                        loss = objective.loss(model, batch) * (count / sum(counts))
                    loss.backward()
                total += float(loss.detach())
            if penalty is not None:
                penalty().backward()
            if config.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds += perf_counter() - start
            losses.append(total)
            on_step()
    return Trained(losses, seconds)


def attention(
    tokens: int | None, device: torch.device, autocast: Callable[[], AbstractContextManager[Any]]
) -> AbstractContextManager[Any]:
    """The kernels of attention for a batch whose longest row has so many tokens (None: rows are not texts):
    all that torch has, but plain products for short rows in bfloat16 on a CPU, where the backward pass of the
    fused kernel takes up to ten times as long."""
    if device.type != "cpu" or tokens is None or tokens > SHORT:
        return nullcontext()
    with autocast():
        narrow = torch.is_autocast_enabled("cpu")
    return sdpa_kernel(SDPBackend.MATH) if narrow else nullcontext()
