"""PEFT at the edge: adapter slots in a live model, and adapter folders. Nothing else imports peft.

One base model stays in memory with one slot per rank. `write` copies an adapter into its slot,
`activate` makes that slot the one that runs and trains; nothing is reloaded between clients.

Everywhere an update is `(out, in)`, also for the transposed weights of `Conv1D` (GPT-2).
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key, prepare_model_for_kbit_training
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fedhl.data.locate import nearest
from fedhl.errors import UserError
from fedhl.lora import LoRA

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASK_TYPES = {"sequence-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
# Heads that PEFT itself wraps, for these tasks, by the end of the module's name.
_AUTOMATIC_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}


@dataclass(frozen=True, eq=False)
class Slots:
    """A model with LoRA layers: one slot per rank, every lookup done once.

    `model` is the transformers model itself, changed in place; `modules` are its adapted layers by
    name, sorted; `order` their names as the model defines them, from its input to its output;
    `factors[rank][name]` are the parameters (A, B) of a slot; `scales[rank]` is PEFT's scaling; `head`
    are the parameters that are trained whole, shared by all slots.
    """

    model: PreTrainedModel
    modules: Mapping[str, LoraLayer]
    order: Sequence[str]
    factors: Mapping[int, Mapping[str, tuple[nn.Parameter, nn.Parameter]]]
    scales: Mapping[int, float]
    head: Mapping[str, nn.Parameter]


# --- attaching ----------------------------------------------------------------------------------


def attach(
    model: PreTrainedModel,
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
    _check_ranks(model, names, slots)
    if getattr(model, "is_loaded_in_4bit", False):
        # Layer norms and the other parameters that stayed unquantised go to float32.
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    configs = {
        _slot(rank): LoraConfig(
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
        tuner = LoraModel(model, config, first)
        for name, config in rest:
            tuner.peft_config[name] = config
            tuner.inject_adapter(model, name)
    model.train(model.training)  # also the dropout that PEFT has put in, which is born training
    return _index(model, names, sorted(slots), head)


def _index(
    model: PreTrainedModel, names: Sequence[str], ranks: Sequence[int], head: Sequence[str]
) -> Slots:
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    modules = {name: adapted[name] for name in sorted(adapted)}
    if list(modules) != sorted(names):
        surplus = sorted(set(modules) ^ set(names))
        raise UserError(f"PEFT did not adapt the layers that were asked for: {', '.join(surplus)}")
    factors: dict[int, dict[str, tuple[nn.Parameter, nn.Parameter]]] = {}
    scales: dict[int, float] = {}
    for rank in ranks:
        slot = _slot(rank)
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
        _train_in_float32(model.get_submodule(owner))
    parameters = {n: model.get_parameter(n) for n in head}
    return Slots(model, modules, [*adapted], factors, scales, parameters)


def _train_in_float32(module: nn.Module) -> None:
    """A head of a narrower base in float32, as adapters are; its inputs follow."""
    if all(p.dtype == torch.float32 for p in module.parameters(recurse=False)):
        return
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.float()
    module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))


def _slot(rank: int) -> str:
    return f"rank{rank}"


def find_targets(
    model: nn.Module, targets: Sequence[str] | Literal["all-linear"], head: Sequence[str] = ()
) -> list[str]:
    """The names, sorted, of the layers of an un-adapted `model` that `targets` mean.

    Modules that hold parameters of `head` are never among them: those are trained whole.
    Raises UserError for a target that matches nothing, or a layer that is not linear.
    """
    whole = {name.rpartition(".")[0] for name in head}
    modules = {n: m for n, m in model.named_modules() if n and n not in whole}
    output = _output_embedding(model)
    linear = [n for n, m in modules.items() if _is_linear(m) and m is not output]
    if targets == "all-linear":
        if not linear:
            raise UserError(f"{type(model).__name__} has no linear layer that could be adapted")
        return sorted(linear)
    if isinstance(targets, str) or not targets:
        raise UserError(f"LoRA targets must be 'all-linear' or a list of names, got {targets!r}")
    found: set[str] = set()
    for target in targets:
        matched = [n for n in modules if n == target or n.endswith("." + target)]
        if not matched:
            raise UserError(_no_such_target(model, target, linear))
        for name in matched:
            if not _is_linear(modules[name]):
                raise UserError(
                    f"LoRA target {target!r}: {name} is a {type(modules[name]).__name__}, and only "
                    f"linear layers can be adapted; choose from {_suffixes(linear)}"
                )
            if modules[name] is output and _is_tied(model, modules[name]):
                raise UserError(
                    f"LoRA target {target!r}: {name} shares its weight with the input embedding, so "
                    f"an update of one would change the other; choose from {_suffixes(linear)}"
                )
        found.update(matched)
    return sorted(found)


def _no_such_target(model: nn.Module, target: str, linear: Sequence[str]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in linear})
    return (
        f"LoRA target {target!r} matches no layer of {type(model).__name__}{nearest(target, ends)}; "
        f"choose from {', '.join(ends)}, or 'all-linear'"
    )


def _suffixes(linear: Sequence[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in linear}))


def _output_embedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None  # pyright: ignore[reportReturnType]


def _is_tied(model: nn.Module, output: nn.Module) -> bool:
    embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return getattr(embedding, "weight", None) is output.weight


def _is_linear(module: nn.Module) -> bool:
    # bitsandbytes' Linear4bit is an nn.Linear too.
    return isinstance(module, nn.Linear | Conv1D)


def is_conv1d(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether the first of these layers holds its weight transposed, (in, out), as in GPT-2."""
    module = model.get_submodule(next(iter(names)))
    return isinstance(module.get_base_layer() if isinstance(module, LoraLayer) else module, Conv1D)


def _shape(base: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; a 4-bit weight does not have it as its own shape."""
    if isinstance(base, nn.Linear):
        return base.out_features, base.in_features
    assert isinstance(base, Conv1D)
    return base.nf, base.nx


def _check_ranks(model: nn.Module, names: Sequence[str], ranks: Mapping[int, float]) -> None:
    for name in names:
        m, n = _shape(model.get_submodule(name))
        for rank in sorted(ranks):
            if not 1 <= rank <= min(m, n):
                raise UserError(
                    f"rank {rank} does not fit layer {name} of shape {m} x {n}: expected a rank from "
                    f"1 to {min(m, n)}; lower the rank or leave this layer out of the targets"
                )


# --- using the slots ----------------------------------------------------------------------------


def layers(slots: Slots) -> dict[str, tuple[int, int]]:
    """Name of every adapted layer, sorted, and its shape (m, n) = (out, in)."""
    return {name: _shape(module.get_base_layer()) for name, module in slots.modules.items()}


def scale(slots: Slots, rank: int) -> float:
    """PEFT's scaling of a slot: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    _require_slot(slots, rank)
    return slots.scales[rank]


def write(slots: Slots, rank: int, adapter: Mapping[str, LoRA]) -> None:
    """Copy `adapter` into the slot of `rank`, in place.

    Raises ValueError, before anything is copied, unless it has exactly the layers, shapes and
    scale (to 1e-6) of the slot.
    """
    _require_slot(slots, rank)
    factors, scaling = slots.factors[rank], slots.scales[rank]
    _require_keys("layer", adapter, factors)
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
    _require_slot(slots, rank)
    scaling = slots.scales[rank]
    return {n: LoRA(_copy(A), _copy(B), scaling) for n, (A, B) in slots.factors[rank].items()}


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
    _require_slot(slots, rank)
    by_layer = train if isinstance(train, Mapping) else dict.fromkeys(slots.modules, train)
    for name, factors in by_layer.items():
        if name not in slots.modules:
            raise ValueError(f"layer {name}: not an adapted layer of this model")
        if not factors <= {"A", "B"}:
            raise ValueError(f"train must be a subset of {{'A', 'B'}}, got {sorted(factors)}")
    slot = _slot(rank)
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
    """The head: float32 copies on the CPU, by parameter name."""
    return {name: _copy(parameter) for name, parameter in slots.head.items()}


def write_head(slots: Slots, head: Mapping[str, Tensor]) -> None:
    """Copy `head` into the model, in place. Raises ValueError unless names and shapes are exact."""
    _require_keys("head parameter", head, slots.head)
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
        expected = _shape(slots.modules[name].get_base_layer())
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
                hook = _adds(delta.to(weight.device, dtype))
                undo.callback(base.register_forward_hook(hook).remove)
        yield


def shifted(base: nn.Module, delta: Tensor) -> Tensor:
    """A new tensor `W0 + delta`, in the layout and dtype of the weight of the linear layer `base`.

    Raises ValueError unless `base` is an un-adapted linear layer and `delta` is (out, in).
    """
    if not isinstance(base, nn.Linear | Conv1D):
        raise ValueError(f"expected an un-adapted linear layer, got a {type(base).__name__}")
    if tuple(delta.shape) != _shape(base):
        raise ValueError(f"expected an update of shape {_shape(base)}, got {tuple(delta.shape)}")
    weight = base.weight.detach()
    delta = delta.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    return (weight + (delta.T if isinstance(base, Conv1D) else delta)).to(weight.dtype)


def _adds(delta: Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + F.linear(args[0].to(delta.dtype), delta).to(output.dtype)

    return hook


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
            hook = _adds_directions(A, B, alphas[name])
            undo.callback(base.register_forward_hook(hook).remove)
        yield alphas


def _adds_directions(A: Tensor, B: Tensor, alpha: nn.Parameter) -> Any:
    rank = len(A) // len(alpha)

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        along = F.linear(args[0].to(A.dtype), A) * alpha.repeat_interleave(rank)
        return output + F.linear(along, B).to(output.dtype)

    return hook


def output_layer(slots: Slots) -> str:
    """The layer of the head that makes the logits: the last in the model. Raises UserError unless its
    parameters have a row for each label."""
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
    """Inside the block the model knows no other labels: their logits are -inf, without a gradient."""
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
    """Inside the block no slot contributes; the head is as it is."""
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


def _copy(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)


def _require_slot(slots: Slots, rank: int) -> None:
    if rank not in slots.factors:
        raise ValueError(f"no slot of rank {rank}; there are {sorted(slots.factors)}")


def _require_keys(what: str, got: Mapping[str, object], expected: Mapping[str, object]) -> None:
    if got.keys() == expected.keys():
        return
    for name in expected:
        if name not in got:
            raise ValueError(f"{what} {name}: missing; expected {len(expected)}, got {len(got)}")
    surplus = next(name for name in got if name not in expected)
    raise ValueError(f"{what} {surplus}: unknown; expected {len(expected)}, got {len(got)}")


# --- adapter folders ----------------------------------------------------------------------------


class AdapterFolder(NamedTuple):
    """What a PEFT LoRA folder holds: the adapter, the head trained beside it, and its config."""

    adapter: dict[str, LoRA]
    head: dict[str, Tensor]
    config: LoraConfig


def save_adapter(
    folder: Path,
    adapter: Mapping[str, LoRA],
    head: Mapping[str, Tensor],
    *,
    base: str,
    task_type: str | None,
    fan_in_fan_out: bool = False,
    revision: str | None = None,
) -> None:
    """Write the PEFT adapter folder of `adapter` and `head`; ranks may differ between layers.

    The scale goes into B, and `lora_alpha = r`, so that PEFT's own scaling is 1 in every layer.
    `base` and `revision` say which model it belongs to, `task_type` is PEFT's (see TASK_TYPES).
    """
    ranks = {name: adapter[name].rank for name in sorted(adapter)}
    if not ranks or min(ranks.values()) < 1:
        empty = [name for name, rank in ranks.items() if rank < 1]
        raise ValueError(f"an adapter needs at least one component in every layer; none in {empty}")
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # Anchored, or PEFT would take the pattern for any layer that ends in this name.
    pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        base_model_name_or_path=base,
        revision=revision,
        task_type=task_type,
        inference_mode=True,
        r=usual,
        lora_alpha=usual,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=list(ranks),
        modules_to_save=_head_modules(head) or None,
        fan_in_fan_out=fan_in_fan_out,
    )
    config.target_modules = list(ranks)  # PEFT made it a set; in order, the same file every time
    tensors: dict[str, Tensor] = {}
    for name in ranks:
        lora = adapter[name]
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = _copy(lora.A).contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = _copy(lora.B * lora.scale).contiguous()
    for name in sorted(head):
        tensors[_PREFIX + name] = _copy(head[name]).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


def _head_modules(head: Mapping[str, Tensor]) -> list[str]:
    """The modules that PEFT must save whole to cover these parameters, none inside another."""
    modules: set[str] = set()
    for name in head:
        parts = name.split(".")[:-1]
        if not parts:
            raise ValueError(f"head parameter {name} belongs to no module, PEFT cannot save it")
        ends = [i for i, part in enumerate(parts, 1) if part.endswith(("classifier", "score"))]
        modules.add(".".join(parts[: ends[0] if ends else len(parts)]))
    return sorted(m for m in modules if not any(m.startswith(other + ".") for other in modules))


def load_adapter(folder: Path) -> AdapterFolder:
    """The contents of a PEFT LoRA folder, in float32, without loading its base model.

    Raises UserError for anything that plain LoRA on linear layers cannot express, and for any
    tensor that is missing, unknown or of a shape that contradicts the config.
    """
    config = _read_config(folder)
    if not (folder / _WEIGHTS).is_file():
        raise UserError(
            f"{folder} holds no {_WEIGHTS}; expected a PEFT adapter folder (pickled .bin weights are "
            "not read: load and save the adapter again with a recent PEFT)"
        )
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {folder / _WEIGHTS}: {error}; is it complete?") from error
    factors: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    for key in sorted(tensors):
        name = key.removeprefix(_PREFIX)
        tensor = tensors[key].float()
        if name == key:
            raise UserError(f"{folder}: tensor {key!r} does not start with {_PREFIX!r}")
        if name.endswith((".lora_A.weight", ".lora_B.weight")):
            layer, factor = name.removesuffix(".weight").rsplit(".lora_", 1)
            factors.setdefault(layer, {})[factor] = tensor
        elif _is_head(name, config):
            head[name] = tensor
        else:
            raise UserError(
                f"{folder}: tensor {name!r} is neither a LoRA factor of a linear layer nor in "
                f"modules_to_save ({config.modules_to_save}); such adapters are not supported"
            )
    if not factors:
        raise UserError(f"{folder}: {_WEIGHTS} holds no LoRA factors")
    adapter = {layer: _read_layer(folder, layer, factors[layer], config) for layer in factors}
    return AdapterFolder(adapter, head, config)


def _read_layer(
    folder: Path, layer: str, factors: Mapping[str, Tensor], config: LoraConfig
) -> LoRA:
    if factors.keys() != {"A", "B"}:
        raise UserError(f"{folder}: layer {layer} has only lora_{next(iter(factors))}, not both")
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), layer), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), layer), config.lora_alpha)
    A, B = factors["A"], factors["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != rank or B.shape[1] != rank:
        raise UserError(
            f"{folder}: layer {layer}: the config says rank {rank}, "
            f"but A is {tuple(A.shape)} and B is {tuple(B.shape)}"
        )
    return LoRA(A, B, float(alpha / (math.sqrt(rank) if config.use_rslora else rank)))


def _is_head(name: str, config: LoraConfig) -> bool:
    saved = (*(config.modules_to_save or ()), *_AUTOMATIC_HEADS.get(str(config.task_type), ()))
    parts = name.split(".")[:-1]
    return any(".".join(parts[:i]).endswith(saved) for i in range(1, len(parts) + 1))


# What must be unset for an adapter to be plain LoRA on linear layers.
_PLAIN = (
    *("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "arrow_config"),
    *("use_bdlora", "kasa_config", "velora_config", "monteclora_config", "megatron_config"),
    *("target_parameters", "trainable_token_indices", "layer_replication"),
)
# Initialisations that leave the base weights as they were; others (PiSSA, OLoRA, ...) change them.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def _read_config(folder: Path) -> LoraConfig:
    path = folder / _CONFIG
    if not path.is_file():
        raise UserError(f"{folder} holds no {_CONFIG}; expected the folder of a PEFT adapter")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind = raw["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if kind != "LORA":
        raise UserError(f"{folder} is a {kind} adapter; only LORA is supported")
    used = [name for name in _PLAIN if raw.get(name)]
    if raw.get("bias", "none") != "none":
        used.append("bias")
    if raw.get("init_lora_weights", True) not in _PLAIN_INITS:
        used.append(f"init_lora_weights={raw['init_lora_weights']}")
    if used:
        raise UserError(
            f"{folder} uses {', '.join(used)}: its update is not a plain LoRA of the base model; "
            "convert it with PEFT first (convert_to_lora), or train it without"
        )
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    assert isinstance(config, LoraConfig)
    return config
