"""The PEFT edge, on tiny real models: m != n layers, grouped-query attention, and Conv1D."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.peft_models import IDS, TINY, gpt2, llama
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from fedhl.errors import UserError
from fedhl.lora import LoRA
from fedhl.model import adapters, peft, targets

# PEFT asks transformers for a property that a newer transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

HEAD = ("classifier.weight", "classifier.bias")


def bert() -> PreTrainedModel:
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(**TINY, **size, num_attention_heads=4))


MODELS = {"bert": bert, "llama": llama, "gpt2": gpt2}


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def head_of(model: PreTrainedModel) -> tuple[str, ...]:
    return HEAD if isinstance(model, BertForSequenceClassification) else ()


def attach(model: PreTrainedModel, ranks: dict[int, float] | None = None, **kw: Any) -> peft.Slots:
    return peft.attach(model, ranks or {2: 4, 4: 4}, "all-linear", head=head_of(model), **kw)


def random_adapter(slots: peft.Slots, rank: int, seed: int = 1) -> dict[str, LoRA]:
    draw = torch.Generator().manual_seed(seed)
    scale = peft.scale(slots, rank)
    return {
        name: LoRA(
            torch.randn(rank, n, generator=draw) / 8,
            torch.randn(m, rank, generator=draw) / 8,
            scale,
        )
        for name, (m, n) in peft.layers(slots).items()
    }


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_layers_have_base_names_and_shapes(model: PreTrainedModel) -> None:
    modules = {n: m for n, m in model.named_modules() if "." in n}
    slots = attach(model)
    found = peft.layers(slots)
    assert list(found) == sorted(found)
    assert found.keys() <= modules.keys() and "lm_head" not in found and "classifier" not in found
    for name, shape in found.items():
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        expected = weight.shape if not isinstance(model, GPT2LMHeadModel) else weight.T.shape
        assert shape == tuple(expected)
    assert any(m != n for m, n in found.values())


def test_write_then_read(model: PreTrainedModel) -> None:
    slots = attach(model)
    adapters = {rank: random_adapter(slots, rank) for rank in (2, 4)}
    for rank, adapter in adapters.items():
        peft.write(slots, rank, adapter)
    for rank, adapter in adapters.items():
        got = peft.read(slots, rank)
        assert list(got) == list(peft.layers(slots))
        for name, lora in got.items():
            assert torch.equal(lora.A, adapter[name].A) and torch.equal(lora.B, adapter[name].B)
            assert lora.scale == adapter[name].scale and not lora.A.requires_grad
    taken = peft.read(slots, 2)
    peft.write(slots, 2, random_adapter(slots, 2, seed=2))
    name = next(iter(taken))
    assert torch.equal(taken[name].A, adapters[2][name].A), "a copy, not a view of the slot"


@pytest.mark.parametrize("rslora", [False, True])
def test_deltas_are_those_of_peft(model: PreTrainedModel, rslora: bool) -> None:
    slots = attach(model, {3: 5.0}, rslora=rslora)
    assert peft.scale(slots, 3) == pytest.approx(5 / 3**0.5 if rslora else 5 / 3)
    adapter = random_adapter(slots, 3)
    peft.write(slots, 3, adapter)
    for name, module in slots.modules.items():
        expected = module.get_delta_weight("rank3")  # pyright: ignore
        expected = expected.T if isinstance(model, GPT2LMHeadModel) else expected
        torch.testing.assert_close(adapter[name].delta(), expected)


def test_write_refuses_anything_but_an_exact_fit(model: PreTrainedModel) -> None:
    slots = attach(model)
    before = peft.read(slots, 2)
    good = random_adapter(slots, 2)
    name = sorted(good)[3]
    lora = good[name]
    cases = {
        rf"layer {name}: missing": {k: v for k, v in good.items() if k != name},
        r"layer nowhere: unknown": good | {"nowhere": lora},
        rf"layer {name}: expected A .* got A": good
        | {name: LoRA(lora.A[:1], lora.B[:, :1], lora.scale)},
        rf"layer {name}: expected scale 2.0, got 1.0": good | {name: LoRA(lora.A, lora.B, 1.0)},
    }
    for message, adapter in cases.items():
        with pytest.raises(ValueError, match=message):
            peft.write(slots, 2, adapter)
    with pytest.raises(ValueError, match=r"no slot of rank 3; there are \[2, 4\]"):
        peft.write(slots, 3, good)
    after = peft.read(slots, 2)
    assert all(torch.equal(before[n].A, after[n].A) for n in before), "nothing was copied"


@pytest.mark.parametrize("train", [{"A", "B"}, {"B"}, {"A"}])
def test_activate_leaves_exactly_these_trainable(model: PreTrainedModel, train: set[str]) -> None:
    slots = attach(model)
    for rank, head in ((4, True), (2, True), (2, False)):
        parameters = peft.activate(slots, rank, frozenset(train), head=head)
        factors = [
            p
            for A, B in slots.factors[rank].values()
            for k, p in (("A", A), ("B", B))
            if k in train
        ]
        expected = factors + (list(slots.head.values()) if head else [])
        assert [id(p) for p in parameters] == [id(p) for p in expected]
        trainable = {id(p) for p in model.parameters() if p.requires_grad}
        assert trainable == {id(p) for p in expected}
    with pytest.raises(ValueError, match="subset"):
        peft.activate(slots, 2, frozenset({"C"}))


def test_only_the_active_slot_runs_and_learns(model: PreTrainedModel) -> None:
    reference = logits(model)
    slots = attach(model)
    peft.write(slots, 2, random_adapter(slots, 2))
    peft.activate(slots, 2)
    small = logits(model)
    peft.activate(slots, 4)  # fresh: B = 0
    torch.testing.assert_close(logits(model), reference)
    parameters = peft.activate(slots, 2)
    torch.testing.assert_close(logits(model), small)
    assert not torch.allclose(small, reference)
    model(IDS).logits.square().sum().backward()
    assert all(p.grad is not None for p in parameters)
    assert all(p.grad is None for pair in slots.factors[4].values() for p in pair)


def test_attaching_leaves_the_random_state_alone(model: PreTrainedModel) -> None:
    before = torch.random.get_rng_state()
    attach(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_offset_is_the_merged_weight_and_is_undone_to_the_bit(model: PreTrainedModel) -> None:
    merged = copy.deepcopy(model)
    slots = attach(model)
    transposed = isinstance(model, GPT2LMHeadModel)
    draw = torch.Generator().manual_seed(3)
    deltas = {n: torch.randn(s, generator=draw) / 16 for n, s in peft.layers(slots).items()}
    for name, delta in deltas.items():
        merged.get_submodule(name).weight.data += delta.T if transposed else delta  # pyright: ignore
    before = {n: p.clone() for n, p in model.named_parameters()}
    plain = logits(model)
    with peft.offset(slots, deltas):
        torch.testing.assert_close(logits(model), logits(merged))
    assert torch.equal(logits(model), plain)
    with pytest.raises(RuntimeError, match="inside"), peft.offset(slots, deltas):
        raise RuntimeError("inside")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    name = next(iter(deltas))
    for bad, message in (
        ({name: deltas[name][:1]}, f"layer {name}: expected"),
        ({"nowhere": deltas[name]}, "layer nowhere: not an adapted layer"),
    ):
        with pytest.raises(ValueError, match=message), peft.offset(slots, bad):
            pass


def test_offset_on_a_narrow_base_is_not_rounded_away(model: PreTrainedModel) -> None:
    """1 + 1e-4 is 1 in bfloat16, yet the layer's output must change by 1e-4."""
    slots = attach(model.to(torch.bfloat16))  # pyright: ignore[reportArgumentType]
    name, (m, n) = next(iter(peft.layers(slots).items()))
    layer = slots.modules[name].get_base_layer()
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, 1.0 if parameter.ndim == 2 else 0.0)
    x = torch.zeros(1, n, dtype=torch.bfloat16)
    x[0, :2] = torch.tensor([1.0, -1.0])  # which the layer maps to zero
    delta = torch.zeros(m, n)
    delta[:, 0] = 1e-4
    with torch.no_grad():
        with peft.offset(slots, {name: delta}):
            torch.testing.assert_close(
                layer(x).float(), torch.full((1, m), 1e-4), atol=0, rtol=4e-3
            )
        assert not layer(x).any()


def test_base_only(model: PreTrainedModel) -> None:
    reference = logits(model)
    slots = attach(model)
    peft.write(slots, 2, random_adapter(slots, 2))
    peft.activate(slots, 2, frozenset({"B"}))
    adapted = logits(model)
    trainable = [p.requires_grad for p in model.parameters()]
    with peft.base_only(slots):
        torch.testing.assert_close(logits(model), reference)
    assert torch.equal(logits(model), adapted)
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_the_head_is_one_for_all_slots() -> None:
    slots = attach(bert())
    head = {name: torch.full_like(t, 0.5) for name, t in peft.read_head(slots).items()}
    peft.write_head(slots, head)
    for rank in (2, 4):
        peft.activate(slots, rank)
        assert all(torch.equal(t, head[n]) for n, t in peft.read_head(slots).items())
    with pytest.raises(ValueError, match=r"head parameter classifier.bias: missing"):
        peft.write_head(slots, {"classifier.weight": head["classifier.weight"]})
    with pytest.raises(ValueError, match=r"head parameter classifier.bias: expected shape \(2,\)"):
        peft.write_head(slots, head | {"classifier.bias": torch.zeros(3)})


# --- targets and ranks --------------------------------------------------------------------------


def test_targets_by_name() -> None:
    model = bert()
    names = targets.find_targets(model, ["query", "1.intermediate.dense"], HEAD)
    start = "bert.encoder.layer"
    assert names == [
        f"{start}.0.attention.self.query",
        f"{start}.1.attention.self.query",
        f"{start}.1.intermediate.dense",
    ]
    pooler = "bert.pooler.dense"
    assert pooler in targets.find_targets(model, ["dense"], HEAD)
    assert pooler not in targets.find_targets(model, ["dense"], (*HEAD, f"{pooler}.weight"))


@pytest.mark.parametrize(
    ("make", "targets", "message"),
    [
        (
            bert,
            ["q_proj"],
            "'q_proj' matches no layer of Bert.*choose from dense, key, query, value",
        ),
        (llama, ["q_prj"], r"did you mean 'q_proj'\?"),
        (bert, ["word_embeddings"], "is a Embedding, and only linear layers"),
        (bert, ["classifier"], "'classifier' matches no layer"),
        (bert, "query", "must be 'all-linear' or a list of names"),
        (bert, [], "must be 'all-linear' or a list of names"),
        (gpt2, ["lm_head"], "shares its weight with transformer.wte"),
    ],
)
def test_impossible_targets(make: Any, targets: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        peft.attach(make(), {2: 2}, targets, head=HEAD if make is bert else ())


@pytest.mark.parametrize("rank", [0, 17])
def test_impossible_ranks(rank: int) -> None:
    message = rf"rank {rank} does not fit layer .*\.0\.self_attn\.k_proj of shape 16 x 32.* 1 to 16"
    with pytest.raises(UserError, match=message):
        peft.attach(llama(), {4: 4, rank: 8}, ["k_proj"])


def test_a_model_takes_slots_once() -> None:
    model = llama()
    attach(model)
    with pytest.raises(ValueError, match="already"):
        attach(model)


def test_factors_are_float32_on_a_bfloat16_base() -> None:
    model = llama().to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    slots = attach(model)
    peft.write(slots, 2, random_adapter(slots, 2))
    parameters = peft.activate(slots, 2)
    assert {p.dtype for p in parameters} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


# --- adapter folders ----------------------------------------------------------------------------


def peft_folder(folder: Path, make: Any = llama, **config: Any) -> Any:
    """A folder as PEFT itself saves it, with random factors; returns the PEFT model."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(make(), LoraConfig(**(defaults | config)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 10},
        {"r": 4, "lora_alpha": 10, "use_rslora": True},
        {
            **{"r": 4, "lora_alpha": 8, "use_rslora": True},
            **{"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 5}},
        },
    ],
)
def test_load_adapter_reads_what_peft_computes(tmp_path: Path, config: dict[str, Any]) -> None:
    model = peft_folder(tmp_path, **config)
    adapter, head, _, _ = adapters.load_adapter(tmp_path)
    assert head == {}
    assert len(adapter) == 4
    for name, lora in adapter.items():
        module = model.base_model.model.get_submodule(name)
        torch.testing.assert_close(lora.delta(), module.get_delta_weight("default"))
        assert lora.scale == pytest.approx(module.scaling["default"])
    if "rank_pattern" in config:
        assert {lora.rank for lora in adapter.values()} == {3, 4}


def test_load_adapter_finds_the_head(tmp_path: Path) -> None:
    saved: dict[str, Any] = {
        "task_type": "SEQ_CLS",
        "target_modules": ["query"],
        "modules_to_save": ["pooler"],
    }
    model = peft_folder(tmp_path, bert, **saved)
    head = adapters.load_adapter(tmp_path).head
    assert head.keys() == {*HEAD, "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    kept = model.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(head["classifier.weight"], kept)


def test_save_then_load(tmp_path: Path, model: PreTrainedModel) -> None:
    slots = attach(model)
    adapter = random_adapter(slots, 2)
    first = next(iter(adapter))
    adapter[first] = random_adapter(slots, 4)[first]
    adapters.save_adapter(
        tmp_path / "a", adapter, peft.read_head(slots), base="some/base", task_type="CAUSAL_LM"
    )
    loaded, head, config, _ = adapters.load_adapter(tmp_path / "a")
    assert loaded.keys() == adapter.keys() and head.keys() == set(head_of(model))
    for name, lora in loaded.items():
        assert lora.scale == 1.0
        torch.testing.assert_close(lora.delta(), adapter[name].delta())
    assert config.base_model_name_or_path == "some/base" and config.r == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "uses use_dora"),
        ({"init_lora_weights": "pissa"}, "uses init_lora_weights=pissa"),
        ({"trainable_token_indices": [1]}, "uses trainable_token_indices"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "neither a LoRA factor of a linear layer"),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_load_adapter_refuses_what_is_not_plain_lora(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    peft_folder(tmp_path, **config)
    with pytest.raises(UserError, match=message):
        adapters.load_adapter(tmp_path)


def test_load_adapter_refuses_a_folder_that_contradicts_itself(tmp_path: Path) -> None:
    def edit(**change: Any) -> None:
        raw = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(raw | change))

    with pytest.raises(UserError, match=r"holds no adapter_config.json"):
        adapters.load_adapter(tmp_path)
    peft_folder(tmp_path, r=4)
    edit(r=5)
    with pytest.raises(UserError, match="the config says rank 5"):
        adapters.load_adapter(tmp_path)
    edit(peft_type="LOHA")
    with pytest.raises(UserError, match="is a LOHA adapter"):
        adapters.load_adapter(tmp_path)
    edit(peft_type="LORA")
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match="is it complete"):
        adapters.load_adapter(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"holds no adapter_model.safetensors"):
        adapters.load_adapter(tmp_path)


def test_a_head_of_a_narrow_base_is_trained_in_float32() -> None:
    model = bert().bfloat16()
    slots = peft.attach(model, {2: 4.0}, ["query"], head=HEAD)
    parameters = peft.activate(slots, 2)
    assert all(p.dtype == torch.float32 for p in parameters)
    model(input_ids=IDS, labels=torch.tensor([1])).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters)
