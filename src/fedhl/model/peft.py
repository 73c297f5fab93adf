"""PEFT at the edge: adapter slots in a live model. Only `fedhl.model` imports peft.

One base model stays in memory with one slot per rank. `write` copies an adapter into its slot,
`activate` makes that slot the one that runs and trains; nothing is reloaded between clients.

Updates are `(out, in)` everywhere, also for the transposed weights of `Conv1D` (GPT-2).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fedhl.errors import UserError, in_one_line
from fedhl.lora import LoRA
from fedhl.model.adapters import cpu_copy
from fedhl.model.targets import check_ranks, find_targets, is_conv1d, layer_shape, left_out


@dataclass(frozen=True, eq=False)
class Slots:
    """A model with LoRA layers: one slot per rank, every lookup done once.

    `model` is the module itself, of transformers or anybody's own, changed in place; `modules` are its
    adapted layers by name, sorted; `order` their names as the model defines them, from its input to its
    output; `factors[rank][name]` are the parameters (A, B) of a slot; `scales[rank]` is PEFT's scaling;
    `head` are the parameters that are trained whole, shared by all slots; `left_out` are the layers that
    "all-linear" passes over, and why.
    """

    model: Any
    modules: Mapping[str, LoraLayer]
    order: Sequence[str]
    factors: Mapping[int, Mapping[str, tuple[nn.Parameter, nn.Parameter]]]
    scales: Mapping[int, float]
    head: Mapping[str, nn.Parameter]
    left_out: Mapping[str, str]


# --- attaching ----------------------------------------------------------------------------------


def attach(
    model: nn.Module,
    slots: Mapping[int, float],
    targets: Sequence[str] | Literal["all-linear"],
    *,
    rslora: bool = False,
    dropout: float = 0.0,
    head: Sequence[str] = (),
) -> Slots:
    """Give `model` one LoRA slot for every `rank: alpha` of `slots`, on the layers `targets`.

    A target is a layer's name or the end of it ("query"); "all-linear" is every linear layer but
    the output embedding and the head. Every parameter is frozen; the first slot is active.
    Raises UserError for a target that does not exist or cannot be adapted, and for a rank that
    does not fit a layer; ValueError if the model has slots already.
    """
    if not slots:
        raise ValueError("no slots to attach: give at least one rank")
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError("the model has LoRA layers already; load a fresh one")
    names = find_targets(model, targets, head)
    lacking = left_out(model, targets, head)
    check_ranks(model, names, slots)
    if getattr(model, "is_loaded_in_4bit", False):
        # Layer norms and the other parameters that stayed unquantised go to float32.
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    configs = {
        slot_name(rank): LoraConfig(
            r=rank,
            lora_alpha=slots[rank],  # pyright: ignore[reportArgumentType]
            target_modules=list(names),
            lora_dropout=dropout,
            use_rslora=rslora,
            fan_in_fan_out=is_conv1d(model, names),
        )
        for rank in sorted(slots)
    }
    # PEFT draws the A of a slot; it is overwritten before use, so the draw must not be noticed.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.default_generator.manual_seed(0)
        # A model with both Linear and Conv1D targets: PEFT sets this right, layer by layer.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        (first, config), *rest = configs.items()
        try:
            tuner = LoraModel(model, config, first)
            for name, config in rest:
                tuner.peft_config[name] = config
                tuner.inject_adapter(model, name)
        except Exception as error:  # whatever PEFT says of the user's model
            raise UserError(
                f"PEFT cannot adapt the layers of lora.targets in a {type(model).__name__}: "
                f"{in_one_line(error)}"
            ) from error
    model.train(model.training)  # also the dropout that PEFT has put in, which is born training
    return index_slots(model, names, sorted(slots), head, lacking)


def index_slots(
    model: nn.Module,
    names: Sequence[str],
    ranks: Sequence[int],
    head: Sequence[str],
    lacking: Mapping[str, str],
) -> Slots:
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    modules = {name: adapted[name] for name in sorted(adapted)}
    if list(modules) != sorted(names):
        surplus = sorted(set(modules) ^ set(names))
        raise UserError(
            f"PEFT did not adapt the layers of lora.targets alone; the difference: {', '.join(surplus)}"
        )
    factors: dict[int, dict[str, tuple[nn.Parameter, nn.Parameter]]] = {}
    scales: dict[int, float] = {}
    for rank in ranks:
        slot = slot_name(rank)
        factors[rank] = {}
        for name, module in modules.items():
            A, B = module.lora_A[slot].weight, module.lora_B[slot].weight
            assert isinstance(A, nn.Parameter) and isinstance(B, nn.Parameter)
            A.data, B.data = A.data.float(), B.data.float()  # in float32, whatever the base is
            factors[rank][name] = A, B
        found = {module.scaling[slot] for module in modules.values()}
        assert len(found) == 1, found
        scales[rank] = float(found.pop())
    model.requires_grad_(False)
    for owner in sorted({name.rpartition(".")[0] for name in head}):
        train_in_float32(model.get_submodule(owner))
    parameters = {n: model.get_parameter(n) for n in head}
    return Slots(model, modules, [*adapted], factors, scales, parameters, lacking)


def train_in_float32(module: nn.Module) -> None:
    """A head of a narrower base in float32, as adapters are; its inputs follow."""
    if all(p.dtype == torch.float32 for p in module.parameters(recurse=False)):
        return
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.float()
    module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))


def slot_name(rank: int) -> str:
    return f"rank{rank}"


# --- using the slots ----------------------------------------------------------------------------


def layers(slots: Slots) -> dict[str, tuple[int, int]]:
    """Name of every adapted layer, sorted, and its shape (m, n) = (out, in)."""
    return {name: layer_shape(module.get_base_layer()) for name, module in slots.modules.items()}


def scale(slots: Slots, rank: int) -> float:
    """PEFT's scaling of a slot: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    require_slot(slots, rank)
    return slots.scales[rank]


def base_weight(slots: Slots, name: str) -> Tensor:
    """The frozen weight W0 (out, in) of an adapted layer: a float32 copy on the CPU.

    Raises UserError for a weight that is not of floating-point numbers, as in a 4-bit base.
    """
    base = slots.modules[name].get_base_layer()
    weight = base.weight
    assert isinstance(weight, nn.Parameter)
    if not weight.is_floating_point():
        raise UserError(
            f"the weight of {name} is held as {weight.dtype} and cannot be read; load the base model in a "
            "floating-point type"
        )
    weight = cpu_copy(weight)
    return weight.T.contiguous() if isinstance(base, Conv1D) else weight


def write(slots: Slots, rank: int, adapter: Mapping[str, LoRA]) -> None:
    """Copy `adapter` into the slot of `rank`, in place.

    Raises ValueError, before anything is copied, unless it has exactly the layers, shapes and
    scale (to 1e-6) of the slot.
    """
    require_slot(slots, rank)
    factors, scaling = slots.factors[rank], slots.scales[rank]
    require_keys("layer", adapter, factors)
    for name, (A, B) in factors.items():
        lora = adapter[name]
        if lora.A.shape != A.shape or lora.B.shape != B.shape:
            raise ValueError(
                f"layer {name}: expected A {tuple(A.shape)} and B {tuple(B.shape)}, "
                f"got A {tuple(lora.A.shape)} and B {tuple(lora.B.shape)}"
            )
        if not math.isclose(lora.scale, scaling, rel_tol=1e-6):
            raise ValueError(f"layer {name}: expected scale {scaling}, got {lora.scale}")
    with torch.no_grad():
        for name, (A, B) in factors.items():
            A.copy_(adapter[name].A)
            B.copy_(adapter[name].B)


def read(slots: Slots, rank: int) -> dict[str, LoRA]:
    """The adapter in the slot of `rank`: float32 copies on the CPU, by layer name, sorted."""
    require_slot(slots, rank)
    scaling = slots.scales[rank]
    return {n: LoRA(cpu_copy(A), cpu_copy(B), scaling) for n, (A, B) in slots.factors[rank].items()}


def activate(
    slots: Slots,
    rank: int,
    train: frozenset[str] | Mapping[str, frozenset[str]] = frozenset({"A", "B"}),
    *,
    head: bool = True,
) -> list[nn.Parameter]:
    """Make the slot of `rank` the one that runs, and exactly these of its factors trainable.

    `train`: the factors, of every layer alike, or by layer (a layer that is not named trains none).
    Returns the trainable parameters: factors in the order of the layers, then (if `head`) the head.
    """
    require_slot(slots, rank)
    by_layer = train if isinstance(train, Mapping) else dict.fromkeys(slots.modules, train)
    for name, factors in by_layer.items():
        if name not in slots.modules:
            raise ValueError(f"layer {name}: not an adapted layer of this model")
        if not factors <= {"A", "B"}:
            raise ValueError(f"train must be a subset of {{'A', 'B'}}, got {sorted(factors)}")
    slot = slot_name(rank)
    for module in slots.modules.values():
        if module.active_adapters != [slot]:
            module.set_adapter(slot, inference_mode=True)
    for pairs in slots.factors.values():
        for pair in pairs.values():
            for parameter in pair:
                parameter.requires_grad_(False)
    parameters: list[nn.Parameter] = []
    for name, (A, B) in slots.factors[rank].items():
        parameters += [p for key, p in (("A", A), ("B", B)) if key in by_layer.get(name, ())]
    parameters += slots.head.values() if head else ()
    for parameter in slots.head.values():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def read_head(slots: Slots) -> dict[str, Tensor]:
    """The parameters of the head: float32 copies on the CPU, by name."""
    return {name: cpu_copy(parameter) for name, parameter in slots.head.items()}


def write_head(slots: Slots, head: Mapping[str, Tensor]) -> None:
    """Copy `head` into the model, in place. Raises ValueError unless names and shapes are exact."""
    require_keys("head parameter", head, slots.head)
    for name, parameter in slots.head.items():
        if head[name].shape != parameter.shape:
            raise ValueError(
                f"head parameter {name}: expected shape {tuple(parameter.shape)}, "
                f"got {tuple(head[name].shape)}"
            )
    with torch.no_grad():
        for name, parameter in slots.head.items():
            parameter.copy_(head[name])


@contextmanager
def offset(slots: Slots, deltas: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the base weights are `W0 + delta`, deltas (out, in); afterwards `W0`, to the bit.

    A weight narrower than float32 (bfloat16, 4-bit) would round a small delta away: such a layer
    keeps it, and adds `x deltaᵀ` to its output instead.
    Raises ValueError for an unknown layer or a wrong shape.
    """
    for name, delta in deltas.items():
        if name not in slots.modules:
            raise ValueError(f"layer {name}: not an adapted layer of this model")
        expected = layer_shape(slots.modules[name].get_base_layer())
        if tuple(delta.shape) != expected:
            raise ValueError(f"layer {name}: expected {expected}, got {tuple(delta.shape)}")
    with ExitStack() as undo:
        for name, delta in deltas.items():
            base = slots.modules[name].get_base_layer()
            weight = base.weight
            assert isinstance(weight, nn.Parameter)
            if weight.dtype in (torch.float32, torch.float64):
                undo.callback(setattr, weight, "data", weight.data)
                weight.data = shifted(base, delta)
            else:
                dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
                hook = adding_hook(delta.to(weight.device, dtype))
                undo.callback(base.register_forward_hook(hook).remove)
        yield


def shifted(base: nn.Module, delta: Tensor) -> Tensor:
    """A new tensor `W0 + delta`, in the layout and dtype of the weight of the linear layer `base`.

    Raises ValueError unless `base` is an un-adapted linear layer and `delta` is (out, in).
    """
    if not isinstance(base, nn.Linear | Conv1D):
        raise ValueError(f"expected an un-adapted linear layer, got a {type(base).__name__}")
    if tuple(delta.shape) != layer_shape(base):
        raise ValueError(
            f"expected an update of shape {layer_shape(base)}, got {tuple(delta.shape)}"
        )
    weight = base.weight.detach()
    delta = delta.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    return (weight + (delta.T if isinstance(base, Conv1D) else delta)).to(weight.dtype)


def adding_hook(delta: Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + F.linear(args[0].to(delta.dtype), delta).to(output.dtype)

    return hook


@contextmanager
def changes(slots: Slots, names: Iterable[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Inside the block each of these layers adds `x Dᵀ` to its output. Gives the D (out, in), zero and at
    least float32, by layer: trained, they are a full fine-tuning of these layers."""
    found: dict[str, nn.Parameter] = {}
    with ExitStack() as undo:
        for name in names:
            base = slots.modules[name].get_base_layer()
            weight = base.weight
            assert isinstance(weight, nn.Parameter)
            wide = weight.dtype == torch.float64
            D = torch.zeros(layer_shape(base), dtype=torch.float64 if wide else torch.float32)
            found[name] = nn.Parameter(D.to(weight.device))
            undo.callback(base.register_forward_hook(adding_hook(found[name])).remove)
        yield found


@contextmanager
def directions(
    slots: Slots, past: Mapping[str, LoRA], magnitudes: Mapping[str, Tensor]
) -> Iterator[dict[str, nn.Parameter]]:
    """Inside the block each layer of `past` adds `s Σ_k α_k D_k x` to its output. Gives the α, started
    at `magnitudes`, by layer: they can be trained with the rest."""
    alphas: dict[str, nn.Parameter] = {}
    with ExitStack() as undo:
        for name, lora in past.items():
            base = slots.modules[name].get_base_layer()
            weight = base.weight
            assert isinstance(weight, nn.Parameter)
            A, B, alpha = (
                x.to(weight.device, torch.float32, copy=True)
                for x in (lora.A, lora.scale * lora.B, magnitudes[name])
            )
            alphas[name] = nn.Parameter(alpha)
            hook = direction_hook(A, B, alphas[name])
            undo.callback(base.register_forward_hook(hook).remove)
        yield alphas


def direction_hook(A: Tensor, B: Tensor, alpha: nn.Parameter) -> Any:
    rank = len(A) // len(alpha)

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        along = F.linear(args[0].to(A.dtype), A) * alpha.repeat_interleave(rank)
        return output + F.linear(along, B).to(output.dtype)

    return hook


def output_layer(slots: Slots) -> str:
    """The layer of the head that computes the logits: the last in the model. Raises UserError unless its
    parameters have one row for each label."""
    name = [name for name, _ in slots.model.named_parameters() if name in slots.head][-1]
    owner, labels = name.rpartition(".")[0], slots.model.config.num_labels
    if len(slots.head[name]) != labels:
        raise UserError(
            f"the last layer of this model's head, {owner}, has {len(slots.head[name])} rows for "
            f"{labels} labels; such a head cannot be trained label by label"
        )
    return owner


def label_rows(slots: Slots, labels: Sequence[int]) -> dict[str, list[int]]:
    """The rows of the head that belong to these labels, by parameter; hidden layers have none."""
    owner = output_layer(slots)
    return {name: list(labels) for name in slots.head if name.rpartition(".")[0] == owner}


@contextmanager
def only_labels(slots: Slots, labels: Sequence[int]) -> Iterator[None]:
    """Inside the block the model knows only these labels: the logits of others are -inf, without a
    gradient."""
    output = output_layer(slots)
    weight = slots.head[f"{output}.weight"]
    others = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    others[list(labels)] = False
    hook = slots.model.get_submodule(output).register_forward_hook(
        lambda _, __, logits: logits.masked_fill(others, -math.inf)
    )
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def base_only(slots: Slots) -> Iterator[None]:
    """Inside the block no slot contributes; the head stays."""
    parameters = [p for slot in slots.factors.values() for pair in slot.values() for p in pair]
    trainable = [p.requires_grad for p in parameters]
    for module in slots.modules.values():
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in slots.modules.values():
            module.enable_adapters(True)
        for parameter, flag in zip(parameters, trainable, strict=True):
            parameter.requires_grad_(flag)


def require_slot(slots: Slots, rank: int) -> None:
    if rank not in slots.factors:
        raise ValueError(f"no slot of rank {rank}; there are {sorted(slots.factors)}")


def require_keys(what: str, got: Mapping[str, object], expected: Mapping[str, object]) -> None:
    if got.keys() == expected.keys():
        return
    for name in expected:
        if name not in got:
            raise ValueError(f"{what} {name}: missing; expected {len(expected)}, got {len(got)}")
    surplus = next(name for name in got if name not in expected)
    raise ValueError(f"{what} {surplus}: unknown; expected {len(expected)}, got {len(got)}")
