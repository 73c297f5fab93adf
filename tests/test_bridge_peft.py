"""The same through real PEFT modules: what PEFT computes is what we aggregate, and the other way round.

Every case runs for `nn.Linear`, square and not, and for the `Conv1D` of GPT-2, which keeps its
weight transposed: there PEFT's own dense update is (in, out), ours is always (out, in).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from support.contract import change
from support.reference import dense as reference
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedhl import LoRA, Update, get_method
from fedhl.methods.fedhl import FedHL
from fedhl.seeds import generator

EPS32 = torch.finfo(torch.float32).eps
LAYERS = {
    "linear": lambda: nn.Linear(7, 11),
    "square": lambda: nn.Linear(9, 9),
    "conv1d": lambda: Conv1D(11, 7),  # (out, in)
    "square conv1d": lambda: Conv1D(9, 9),
}
MIXED = [  # (rank, alpha, rsLoRA): scales 8, 4, 16/√3 and 0.5
    (2, 16, False),
    (4, 16, False),
    (3, 16, True),
    (4, 2, False),
]
ALIKE = [(4, 16, False)] * 3

layers = pytest.mark.parametrize("kind", LAYERS)


class Tiny(nn.Module):
    """A model of one adapted layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Federation:
    """One base layer with one PEFT adapter per client, as on a server that simulates them."""

    def __init__(self, kind: str, clients: list[tuple[int, int, bool]]) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = LAYERS[kind]()
            self.transposed = isinstance(base, Conv1D)
            self.weight = base.weight.detach().clone()
            self.model: PeftModel | None = None
            for k, (r, alpha, rslora) in enumerate(clients):
                config = LoraConfig(
                    r=r,
                    lora_alpha=alpha,
                    use_rslora=rslora,
                    target_modules=["layer"],
                    fan_in_fan_out=self.transposed,
                )
                if self.model is None:
                    self.model = get_peft_model(Tiny(base), config, adapter_name="0")
                else:
                    self.model.add_adapter(str(k), config)
        assert self.model is not None
        layer = self.model.get_submodule("base_model.model.layer")
        assert isinstance(layer, LoraLayer)
        self.layer: Any = layer
        self.count = len(clients)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.layer.out_features, self.layer.in_features

    def read(self, k: int) -> LoRA:
        """The adapter of client k."""
        A, B = self.layer.lora_A[str(k)].weight, self.layer.lora_B[str(k)].weight
        return LoRA(A.detach().clone(), B.detach().clone(), self.layer.scaling[str(k)])

    def write(self, k: int, lora: LoRA) -> None:
        with torch.no_grad():
            self.layer.lora_A[str(k)].weight.copy_(lora.A)
            self.layer.lora_B[str(k)].weight.copy_(lora.B)

    def peft_delta(self, k: int) -> Tensor:
        """PEFT's own dense update of client k, brought to (out, in)."""
        delta = self.layer.get_delta_weight(str(k)).detach()
        return delta.T if self.transposed else delta

    def train(self, k: int) -> None:
        """Three SGD steps of client k on its own regression task, through PEFT's forward pass."""
        assert self.model is not None
        self.model.set_adapter(str(k))
        g = generator(0, "task", k)
        m, n = self.shape
        x, y = torch.randn(16, n, generator=g), torch.randn(16, m, generator=g)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=0.02)
        for _ in range(3):
            optimizer.zero_grad()
            (self.model(x) - y).square().mean().backward()
            optimizer.step()

    def play(self, method: Any, state: Any, p: list[float]) -> list[Update]:
        """One round: broadcast into PEFT's slots, train there, read back."""
        updates = []
        for k, weight in enumerate(p):
            slot = self.read(k)
            sent = method.broadcast(state, slot.rank, slot.scale)
            self.write(k, sent.lora)
            before = self.peft_delta(k)
            self.train(k)
            assert not torch.equal(self.peft_delta(k), before)
            updates.append(Update(sent, self.read(k), weight))
        return updates


def weights(count: int) -> list[float]:
    return [(k + 1) / (count * (count + 1) / 2) for k in range(count)]


def fresh(federation: Federation) -> LoRA:
    """PEFT's own initial adapter of the largest rank: A random, B = 0."""
    return max((federation.read(k) for k in range(federation.count)), key=lambda x: x.rank)


def close(x: Tensor, y: Tensor, *sized: Tensor) -> bool:
    """Equal up to the rounding in float32 of products and SVDs of at most 11 x 11."""
    return float((x - y).norm()) <= 100 * EPS32 * sum(float(z.norm()) for z in (x, y, *sized))


@layers
def test_our_delta_is_that_of_peft(kind: str):
    federation = Federation(kind, MIXED)
    for k, (r, alpha, rslora) in enumerate(MIXED):
        federation.train(k)
        lora = federation.read(k)
        assert lora.scale == pytest.approx(alpha / (r**0.5 if rslora else r))
        assert (lora.rank, lora.shape) == (r, federation.shape)
        assert close(lora.delta(), federation.peft_delta(k))
        assert lora.delta().any()


@layers
@pytest.mark.parametrize("name", ["fedhl", "flexlora"])
def test_the_first_round_is_the_weighted_sum_of_pefts_updates(kind: str, name: str):
    federation = Federation(kind, MIXED)
    method, p = get_method(name), weights(len(MIXED))
    state = method.init(fresh(federation))
    updates = federation.play(method, state, p)
    W = change(method, method.aggregate(state, updates))
    mean = sum(w * federation.peft_delta(k) for k, w in enumerate(p))
    assert isinstance(mean, Tensor) and mean.any() and close(W, mean)


@layers
@pytest.mark.parametrize("name", ["fedhl", "flexlora"])
def test_later_rounds_follow_their_equation(kind: str, name: str):
    federation = Federation(kind, MIXED)
    method, p = get_method(name), weights(len(MIXED))
    state = method.init(fresh(federation))
    for _ in range(3):
        before = change(method, state)
        state = method.aggregate(state, federation.play(method, state, p))
        want = torch.zeros(federation.shape)
        for k, w in enumerate(p):
            want += w * federation.peft_delta(k)
            if name == "fedhl":
                rank = federation.read(k).rank
                want += w * (before - reference.truncation(before, rank).float())
        assert close(change(method, state), want, before)


@layers
def test_fedit_is_the_product_of_pefts_mean_factors(kind: str):
    federation = Federation(kind, ALIKE)
    method, p = get_method("fedit"), weights(len(ALIKE))
    state = method.init(fresh(federation))
    for _ in range(2):
        updates = federation.play(method, state, p)
        state = method.aggregate(state, updates)
    W = change(method, state)
    clients = [
        reference.Client(w, lora.scale, lora.B, lora.A)
        for w, lora in ((w, federation.read(k)) for k, w in enumerate(p))
    ]
    assert close(W, reference.fedit(clients).float())
    mean = sum(w * federation.peft_delta(k) for k, w in enumerate(p))
    assert not close(W, torch.as_tensor(mean))  # the cross terms B_i A_j


@layers
def test_fedit_with_a_shared_A_is_the_mean_of_pefts_updates(kind: str):
    """Where only B has moved there are no cross terms."""
    federation = Federation(kind, ALIKE)
    method, p = get_method("fedit"), weights(len(ALIKE))
    state = method.init(fresh(federation))
    updates = []
    for k, w in enumerate(p):
        sent = method.broadcast(state, 4, 4.0)
        federation.write(k, sent.lora)
        federation.train(k)
        federation.write(k, LoRA(sent.lora.A, federation.read(k).B, 4.0))
        updates.append(Update(sent, federation.read(k), w))
    mean = sum(w * federation.peft_delta(k) for k, w in enumerate(p))
    W = change(method, method.aggregate(state, updates))
    assert close(W, torch.as_tensor(mean))


@layers
def test_a_broadcast_in_a_peft_slot_deploys_the_truncation(kind: str):
    """PEFT's forward pass with the broadcast in its slot is that of `W0 + T_r(W)`."""
    federation = Federation(kind, MIXED)
    method, p = FedHL(), weights(len(MIXED))
    state = method.init(fresh(federation))
    for _ in range(2):
        state = method.aggregate(state, federation.play(method, state, p))
    x = torch.randn(5, federation.shape[1], generator=generator(0, "x"))
    assert federation.model is not None
    for k in range(len(MIXED)):
        slot = federation.read(k)
        federation.write(k, method.broadcast(state, slot.rank, slot.scale).lora)
        want = reference.truncation(state.W, slot.rank).float()
        assert close(federation.peft_delta(k), want, state.W)

        federation.model.set_adapter(str(k))
        W0 = federation.weight.T if federation.transposed else federation.weight
        bias = federation.layer.base_layer.bias
        assert close(federation.model(x).detach(), x @ (W0 + want).T + bias, x @ W0.T)
