"""Which layers get an adapter where some cannot: shared weights, refusals of PEFT, experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedhl.errors import UserError
from fedhl.lora import LoRA
from fedhl.model import peft
from fedhl.run.overview import without_adapter

SIZE: dict[str, Any] = {
    **{"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24},
    **{"num_hidden_layers": 2, "max_position_embeddings": 32, "initializer_range": 0.2},
}
IDS = torch.arange(6, 18).reshape(2, 6)


def zamba2() -> PreTrainedModel:
    """Two blocks of attention that share all their weights, beside adapters of their own."""
    sizes: dict[str, Any] = SIZE | {"num_hidden_layers": 4, "mamba_headdim": 8}
    config = transformers.Zamba2Config(
        **sizes,
        mamba_d_state=8,
        n_mamba_heads=4,
        num_key_value_heads=2,
        layers_block_type=["mamba", "hybrid"] * 2,
        num_mem_blocks=1,
        mamba_ngroups=1,
        adapter_rank=2,
        chunk_size=8,
    )
    return transformers.Zamba2ForCausalLM(config)


def mamba() -> PreTrainedModel:
    config = transformers.MambaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4
    )
    return transformers.MambaForCausalLM(config)


def albert() -> PreTrainedModel:
    """One block, run twice."""
    return transformers.AlbertForMaskedLM(transformers.AlbertConfig(**SIZE, embedding_size=8))


def mixtral() -> PreTrainedModel:
    experts: dict[str, Any] = {"num_key_value_heads": 1, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZE, **experts))


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZE))


def tied_bert() -> PreTrainedModel:
    """Two modules with one parameter."""
    model = bert()
    first, second = model.bert.encoder.layer
    second.attention.self.query.weight = first.attention.self.query.weight
    return model


def twice_named_bert() -> PreTrainedModel:
    """One module with two names."""
    model = bert()
    first, second = model.bert.encoder.layer
    second.attention.self.query = first.attention.self.query
    return model


def embedding_bert() -> PreTrainedModel:
    """A linear layer that is not the output embedding, on the weight of the input embedding."""
    model = bert()
    model.bert.encoder.layer[1].attention.self.query = nn.Linear(16, 32)
    model.bert.encoder.layer[
        1
    ].attention.self.query.weight = model.bert.embeddings.word_embeddings.weight
    return model


def build(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


@torch.no_grad()
def logits(slots: peft.Slots) -> Tensor:
    return slots.model(input_ids=IDS).logits


@pytest.mark.parametrize("make", [zamba2, mamba, albert, tied_bert, twice_named_bert, mixtral])
def test_an_adapter_and_its_update_in_the_base_are_one_model(make: Any) -> None:
    slots = peft.attach(build(make), {2: 2}, "all-linear")
    draw = torch.Generator().manual_seed(0)
    adapter = {
        name: LoRA(
            torch.randn(2, n, generator=draw) / 4, torch.randn(m, 2, generator=draw) / 4, 1.0
        )
        for name, (m, n) in peft.layers(slots).items()
    }
    peft.write(slots, 2, adapter)
    peft.activate(slots, 2)
    adapted = logits(slots)
    with peft.base_only(slots):
        plain = logits(slots)
        with peft.offset(slots, {name: lora.delta() for name, lora in adapter.items()}):
            shifted = logits(slots)
    assert (adapted - plain).abs().max() > 0.1
    torch.testing.assert_close(shifted, adapted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "target", "message"),
    [
        (
            zamba2,
            "o_proj",
            r"layers\.1\.shared_transformer\.self_attn\.o_proj shares its weight with model\.layers\.3\.",
        ),
        (
            tied_bert,
            "query",
            r"0\.attention\.self\.query shares its weight with bert\.encoder\.layer\.1\.",
        ),
        (
            twice_named_bert,
            "query",
            r"0\.attention\.self\.query shares its weight with bert\.encoder\.la",
        ),
        (
            embedding_bert,
            "query",
            r"1\.attention\.self\.query shares its weight with .*word_embeddings",
        ),
        (
            bert,
            "decoder",
            r"predictions\.decoder shares its weight with bert\.embeddings\.word_embeddings",
        ),
        (mamba, "out_proj", r"out_proj cannot be adapted by PEFT: .*incompatible with Mamba"),
    ],
)
def test_a_layer_that_cannot_be_adapted_is_refused_by_name(
    make: Any, target: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        peft.attach(build(make), {2: 2}, [target])


def test_one_block_run_twice_is_one_set_of_layers() -> None:
    """ALBERT calls the same modules again, which is no sharing: every call sees the adapter."""
    slots = peft.attach(build(albert), {2: 2}, ["query"])
    assert len(slots.modules) == 1 and not slots.left_out


def test_check_says_what_all_linear_leaves_out() -> None:
    slots = peft.attach(build(mamba), {2: 2}, "all-linear")
    assert {name.rpartition(".")[2] for name in slots.modules} == {"in_proj", "x_proj", "dt_proj"}
    said = "\n".join(without_adapter(slots))
    assert "left out of all-linear: backbone.layers.*.mixer.out_proj (2 layers); backbone.l" in said
    left = peft.attach(build(zamba2), {2: 2}, "all-linear").left_out
    assert {name.split(".")[2] for name in left} == {"1", "3"}  # both names of each
    assert all("shared_transformer" in name for name in left)


def test_check_says_that_experts_stay_frozen() -> None:
    slots = peft.attach(build(mixtral), {2: 2}, "all-linear")
    (said,) = without_adapter(slots)
    frozen = 2 * (4 * 48 * 16 + 4 * 16 * 24 + 4 * 16)  # gate and up, down, the router; two layers
    assert said == (
        f"{frozen:,} parameters get no adapter and stay frozen, since they are in no linear layer: "
        "model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.experts.down_proj, "
        "model.layers.*.mlp.gate.weight"
    )
    assert list(without_adapter(peft.attach(build(bert), {2: 2}, ["query"]))) == []


def test_a_trial_with_peft_changes_nothing() -> None:
    model = build(mamba)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = torch.random.get_rng_state()
    with pytest.raises(UserError):
        peft.attach(model, {2: 2}, ["out_proj"])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(p.requires_grad for p in model.parameters())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in build(mamba).named_modules()]
