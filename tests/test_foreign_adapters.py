"""Adapters from anywhere: what they hold is checked before it is used, and nothing in them can hang."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from support.tiny import LLAMA
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from fedhl.errors import UserError
from fedhl.export import merge_folders
from fedhl.model import adapter_config
from fedhl.model.adapter_config import patterns
from fedhl.model.adapters import load_adapter
from fedhl.model.loading import load_model

# PEFT asks transformers for a property that a newer transformers has renamed.
RENAMED = "`is_gradient_checkpointing` is deprecated"
pytestmark = pytest.mark.filterwarnings(f"ignore:{RENAMED}")
NAN, INFINITE = float("nan"), float("inf")
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A sound adapter as PEFT saves it, with the output layer trained whole."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(LlamaForCausalLM(LlamaConfig(**LLAMA)), config).save_pretrained(
        str(tmp_path / "a")
    )
    return tmp_path / "a"


def spoil(folder: Path, ending: str, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    (key,) = [key for key in tensors if key.endswith(ending)]
    save_file(tensors | {key: change(tensors[key])}, file)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def one_number(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor[0, 1] = value
    return tensor


@pytest.mark.parametrize(
    "ending", [f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight", "lm_head.weight"]
)
@pytest.mark.parametrize("value", [NAN, INFINITE, -INFINITE])
def test_numbers_that_are_not_finite(adapter: Path, ending: str, value: float) -> None:
    load_adapter(adapter)
    spoil(adapter, ending, lambda tensor: one_number(tensor, value))
    with pytest.raises(
        UserError, match=f"^{re.escape(str(adapter))}: tensor .*{ending}.* NaN or infinite"
    ):
        merge_folders([str(adapter)], [1.0], None, adapter.parent / "out")


def test_numbers_that_are_too_large(adapter: Path) -> None:
    """Finite factors whose product is not, or whose sum is not."""
    edit(adapter, lora_alpha=1e41)
    spoil(adapter, f"{LAYER}.lora_B.weight", torch.ones_like)
    with pytest.raises(UserError, match=f"layer {LAYER}: .*infinite in float32; check lora_alpha"):
        load_adapter(adapter)
    edit(adapter, lora_alpha=2)
    with pytest.raises(
        UserError, match=r"layer .* is not finite in float32; choose smaller weights"
    ):
        merge_folders([str(adapter)], [1e200], None, adapter.parent / "out", normalize=False)


def test_a_base_that_is_not_finite(tmp_path: Path) -> None:
    model = BertForMaskedLM(BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
    model.bert.embeddings.word_embeddings.weight.data[3, 3] = NAN
    model.save_pretrained(tmp_path)
    from support.tiny import save_tokenizer

    save_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"weight bert.embeddings.word_embeddings.weight holds NaN"):
        load_model(str(tmp_path), "sequence-classification", labels=["a", "b"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": "2"}, "r: Input should be a valid integer, got '2'"),
        ({"r": True}, "r: Input should be a valid integer"),
        ({"r": 0}, "r: Input should be greater than 0"),
        ({"lora_alpha": None}, "lora_alpha: Input should be a valid number"),
        ({"lora_alpha": NAN}, "lora_alpha: Input should be a finite number"),
        ({"use_rslora": "yes"}, "use_rslora: Input should be a valid boolean"),
        ({"rank_pattern": [2]}, "rank_pattern: Input should be a valid dictionary"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern.q_proj: Input should be a valid integer"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern.q_proj: Input should be a valid number"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: Input should be a valid list"),
        ({"modules_to_save": [1]}, "modules_to_save.0: Input should be a valid string"),
        ({"task_type": "FOO"}, "task_type: 'FOO' is not a valid TaskType"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path: Input should be a valid string"),
        ({"peft_type": ["LORA"]},  r"is a \['LORA'\] adapter"),
        ({"ensure_weight_tying": True}, "uses ensure_weight_tying"),
        ({"init_lora_weights": {}}, "uses init_lora_weights"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: '\\(' cannot be matched"),
        ({"alpha_pattern": {"(((a{999}){999}){999})": 2}}, "alpha_pattern: .* cannot be matched"),
        ({"alpha_pattern": {f"q.*{k}": 2 for k in range(1001)}}, "more than 1000 regular expressions"),
        ({"rank_pattern": {"(" * 600 + ")" * 600: 2}}, "one of more than 1000 characters"),
    ],
)  # fmt: skip
def test_settings_of_a_wrong_type(adapter: Path, changes: dict[str, Any], message: str) -> None:
    edit(adapter, **changes)
    with pytest.raises(UserError, match=message) as error:
        load_adapter(adapter)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["[1]", "", "null", '{"peft_type": "LORA", "r": ' + "[" * 10**5, '{"x": "\\ud800"}']
)
def test_settings_that_are_no_object(adapter: Path, text: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter_config\.json: "):
        load_adapter(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.long(), r"holds torch\.int64, expected floating-point numbers"),
        (lambda tensor: tensor[..., None], "the config says rank 2, but A is"),
        (lambda tensor: tensor[:, :0], "is empty: A is"),
    ],
)
def test_tensors_of_a_wrong_kind(adapter: Path, change: Any, message: str) -> None:
    spoil(adapter, f"{LAYER}.lora_A.weight", lambda tensor: change(tensor).contiguous())
    with pytest.raises(UserError, match=message):
        load_adapter(adapter)


def test_patterns_mean_what_they_mean_to_peft() -> None:
    layers = [
        *(f"model.layers.{i}.self_attn.q_proj" for i in range(12)),
        *(f"model.layers.{i}.mlp.up" for i in range(12)),
        *("q_proj", "transformer.h.1.q_proj", "model.layers.1"),
    ]  # fmt: skip
    given = [
        *("layers.1.self_attn.q_proj", "^q_proj", "1.self_attn.q_proj", r".*\.[0-3]\.mlp\.up"),
        *("^model.layers.11", "up|layers.4.*", "q_proj", r"layers\.\d+\.mlp\.up", "proj", "rs.1"),
    ]  # fmt: skip
    for order in (given, given[::-1], given[4:] + given[:4]):
        theirs = {text: k for k, text in enumerate(order)}
        ours = patterns("", theirs)
        for layer in layers:
            assert ours.of(layer, -1) == theirs.get(get_pattern_key(list(theirs), layer), -1), layer


@pytest.mark.timeout(60)
def test_no_pattern_hangs_and_no_number_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's engine would need longer than the age of the world for the first."""
    assert patterns("", {"(a+)+b": 2}).of("a" * 200, 1) == 1
    names = {f"^model.layers.{k}.q_proj": k for k in range(100_000)}
    ours = patterns("", names)
    assert all(ours.of(name[1:], -1) == k for name, k in names.items())
    monkeypatch.setattr(adapter_config, "PATIENCE", 0.2)
    slow = patterns("adapter: rank_pattern", {f"(.*q){{50}}{k}": 2 for k in range(1000)})
    with pytest.raises(UserError, match="adapter: rank_pattern: its regular expressions take more"):
        for name in names:
            slow.of(name[1:] + "q" * 100, -1)


# --- the output embedding -----------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_adapters_of_the_output_embedding_are_summed(tied: bool, tmp_path: Path) -> None:
    """PEFT saves the frozen weight, too. As an adapter the sum is right also where the output embedding
    shares its weight with the input embedding, which stays as it is."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied)).eval()
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config, adapter_name="one")
    model.add_adapter("two", config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(tmp_path))
    model.add_weighted_adapter(["one", "two"], [0.25, 0.75], "sum", combination_type="cat")
    model.set_adapter("sum")
    ids = torch.arange(3, 9).reshape(1, 6)
    with torch.no_grad():
        expected = model(input_ids=ids).logits

    folders = [str(tmp_path / name) for name in ("one", "two")]
    merge_folders(folders, [1, 3], None, tmp_path / "merged")
    fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    merged = PeftModel.from_pretrained(fresh, str(tmp_path / "merged")).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)

    spoil(tmp_path / "two", "lm_head.base_layer.weight", lambda weight: weight + 1)
    with pytest.raises(UserError, match=r"two and .*one were trained on other weights of lm_head"):
        merge_folders(folders, None, None, tmp_path / "other")
