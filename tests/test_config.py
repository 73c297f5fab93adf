"""The configuration: strict, explained, and the same after a round trip through its file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from support.tiny import causal, classification, merged

from fedhl.config import Config, dump_config, load_config
from fedhl.config.conduct import Participation, TrainingConfig
from fedhl.config.inputs import LoRAConfig
from fedhl.config.ranks import RankByClient, RankShares
from fedhl.errors import UserError
from fedhl.strict import help_of


def load(tmp_path: Path, config: dict[str, Any] | str, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return load_config(path, overrides)


def refuse(tmp_path: Path, config: dict[str, Any] | str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(tmp_path, config, *overrides)
    return str(error.value)


def models(kind: Any) -> set[type[BaseModel]]:
    """All the models that a type mentions, and those that they mention."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        inner = (models(field.annotation) for field in kind.model_fields.values())
        return {kind}.union(*inner)
    return set().union(*(models(part) for part in get_args(kind)))


def test_every_setting_is_explained() -> None:
    found = models(Config)
    assert len(found) > 12
    chosen = {"kind", "name", "root"}  # the class of these explains itself
    for model in found:
        for name, field in model.model_fields.items():
            grouped = models(field.annotation)
            explained = help_of(model).get(name) or (grouped and all(m.__doc__ for m in grouped))
            assert explained or (name in chosen and model.__doc__), f"{model.__name__}.{name}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.lr=1", "training.lr: unknown key 'lr'; did you mean 'learning_rate'?"),
        ("lr=1", "lr: unknown key 'lr'; did you mean training.learning_rate?"),
        ("learning_rate=1", "unknown key 'learning_rate'; did you mean training.learning_rate?"),
        ("data.held_out={count:9}", "YAML needs a blank after the colon: count: 9"),
        ("lora.r=8", "lora.r: unknown key 'r'; did you mean 'ranks'?"),
        ("lora.target_modules=[query]", "unknown key 'target_modules'; did you mean 'targets'?"),
        ("num_clients=3", "did you mean partition.clients or federation.clients?"),
        ("max_seq_length=9", "did you mean task.max_length?"),
        ("lora.ranks={shares: {4: .inf}}", "lora.ranks.shares.4: input should be a finite number"),
        (
            "lora.ranks={shares: {4: 1e308, 8: 1e308}}",
            "the sum of the shares is beyond all numbers",
        ),
        ("training.learning_rate=.inf", "learning_rate: input should be a finite number, got inf"),
        ("method=fedavg", "method: unknown method 'fedavg'; did you mean 'fedit'?"),
        ("method=FedAvg", "did you mean 'fedit'?"),
        ("partition={kind: iid, clients: 2, alpha: 1}", "'alpha' (known: kind, clients)"),
    ],
)
def test_what_others_write(change: str, said: str, tmp_path: Path) -> None:
    assert said in refuse(tmp_path, classification(), change)


def test_every_name_of_others_means_something_here() -> None:
    from fedhl.config.text import settings
    from fedhl.methods import METHODS
    from fedhl.names import CALLED

    here = {path.rpartition(".")[2] for path in settings(Config)}
    assert {"learning_rate", "method", "weighting", "shares"} <= here
    assert set(CALLED.values()) <= here | set(METHODS)
    assert not set(CALLED) & (here | set(METHODS))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nmodel:\n\tsource: x\n", "line begins with a tab, which YAML does not allow"),
        ("name: a\nmodel:\n  source: x\n\ttask: x\n", "line begins with a tab"),
        ("name: 2024-13-45\n", "is not valid YAML: month must be in 1..12"),
        ("rounds: " + "9" * 5000, "is not valid YAML: Exceeds the limit"),
        ("a: " + "[" * 5000 + "]" * 5000, "is not valid YAML: it is nested too deeply"),
        ("a: \x00", "is not valid YAML: unacceptable character"),
    ],
)
def test_yaml_that_cannot_be_read(text: str, said: str, tmp_path: Path) -> None:
    assert said in refuse(tmp_path, text)


def test_a_value_that_cannot_be_read(tmp_path: Path) -> None:
    for value in ("2024-13-45", "9" * 5000, "[" * 5000):
        said = refuse(tmp_path, classification(), f"name={value}")
        assert said.startswith("--set 'name=") and "the value is not valid YAML" in said


def test_shares_that_do_not_sum_to_1_are_told_as_they_are_taken() -> None:
    said = "lora.ranks.shares sum to 0.8, not to 1; they are taken as 75% of rank 4, 25% of rank 64"
    assert RankShares(shares={4: 0.6, 64: 0.2}).remark() == said
    assert RankShares(shares={4: 0.7, 8: 0.2, 64: 0.1}).remark() == ""
    assert "sum to 4" in RankShares(shares={4: 3, 64: 1}).remark()


def test_the_path_of_a_config_may_be_text(tmp_path: Path) -> None:
    config = load(tmp_path, classification())
    assert load_config(str(tmp_path / "config.yaml")) == config
    with pytest.raises(UserError, match=r"config file none\.yaml does not exist"):
        load_config("none.yaml")


def test_a_fresh_head_needs_a_head(tmp_path: Path) -> None:
    config = causal(model={"source": "x", "fresh_head": True})
    assert "model.fresh_head: causal-lm trains no head; leave" in refuse(tmp_path, config)


@pytest.mark.parametrize(
    "config",
    [
        classification(),
        causal(),
        classification(lora={"ranks": {"shares": {4: 0.6, 64: 0.4}}}),
        classification(partition={"kind": "by-column", "column": "site"}, method="flexlora"),
        causal(weighting="uniform", data={"held_out": None, "where": {"year": [1999, "1e5"]}}),
        causal(name="1e3", training={"learning_rate": 1e-5, "max_grad_norm": None}),
        causal(data={"source": "räume/ñ.jsonl", "where": {"a": "null", "b": "0x10", "c": "yes"}}),
    ],
)
def test_a_saved_config_loads_as_it_was(config: dict[str, Any], tmp_path: Path) -> None:
    before = Config.model_validate(config)
    (tmp_path / "saved.yaml").write_text(dump_config(before), encoding="utf-8")
    weighted = before.model_copy(update={"weighting": before.weighting_used})
    assert load_config(tmp_path / "saved.yaml") == weighted


@given(st.text())
def test_any_text_survives_the_file(text: str) -> None:
    from fedhl.config import dump_config
    from fedhl.config.text import ConfigLoader

    config = Config.model_validate(causal(data={"where": {"field": text}}))
    assert yaml.load(dump_config(config), Loader=ConfigLoader)["data"]["where"] == {"field": text}


def test_numbers_are_written_as_people_write_them(tmp_path: Path) -> None:
    text = yaml.safe_dump(classification()) + "\n"
    text = text.replace("learning_rate: 0.01", "learning_rate: 1e-3")
    text = text.replace("epsilon: 0.1", "epsilon: 2E-2")
    config = load(tmp_path, text, "training.weight_decay=1e-2", "lora.alpha=1e1")
    assert config.training.learning_rate == 1e-3
    assert config.weighting_used.hyperparameters["epsilon"] == 0.02
    assert config.training.weight_decay == 0.01
    assert config.lora.alpha == 10.0


# --- overrides ----------------------------------------------------------------------------------


def test_overrides_change_nest_and_create(tmp_path: Path) -> None:
    base = merged(classification(), {"method": "flexlora"})
    del base["training"], base["lora"]
    config = load(
        tmp_path,
        base,
        "training.steps=20",
        "lora.ranks=[1, 2, 3, 4, 5, 6]",
        "lora.ranks={clients: {client-0: 2}, default: 1}",
        "method=fedit",
        "weighting.power=1",
        "weighting.epsilon=0.5",
        "data.held_out.count=7",
        "evaluation.client_fraction=0",
        "model.source=some=where",
    )
    assert config.training.steps == 20
    assert config.lora.ranks == RankByClient(clients={"client-0": 2}, default=1)
    assert config.method.name == "fedit"
    assert config.weighting_used.hyperparameters == {"power": 1, "epsilon": 0.5, "share": None}
    assert config.data.held_out is not None and config.data.held_out.count == 7
    assert config.evaluation.client_fraction == 0
    assert config.model.source == "some=where"


def test_clients_evaluate_where_the_server_has_no_rows(tmp_path: Path) -> None:
    base = classification()
    del base["evaluation"]
    for data, more, fraction in (
        ({}, {}, 0.0),
        ({"held_out": None}, {}, 0.1),
        ({"held_out": None}, {"evaluation": None}, 0.1),
        ({"held_out": None}, {"evaluation": {"every": 2}}, 0.1),
        ({"held_out": None}, {"evaluation": {"client_fraction": 0}}, 0.0),
    ):
        found = load(tmp_path, {**base, "data": base["data"] | data, **more})
        assert found.evaluation.client_fraction == fraction
    assert load(tmp_path, base, "data.held_out=null").evaluation.client_fraction == 0.1


def test_a_weighting_named_by_a_word_takes_settings(tmp_path: Path) -> None:
    base = merged(classification(), {"weighting": "truncation"}) | {"weighting": "truncation"}
    config = load(tmp_path, base, "weighting.epsilon=0.25")
    assert config.weighting_used.name == "truncation"
    assert config.weighting_used.hyperparameters == {"power": 2, "epsilon": 0.25, "share": None}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rounds", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("rounds=[1", "the value is not valid YAML"),
        ("rounds.x=1", "rounds is a single value, not a group"),
        ("training.stps=3", "training.stps: unknown key 'stps'; did you mean 'steps'?"),
    ],
)
def test_a_bad_override_is_named(override: str, said: str, tmp_path: Path) -> None:
    assert said in refuse(tmp_path, classification(), override)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ronds": 3}, "ronds: unknown key 'ronds'; did you mean 'rounds'?"),
        ({"partition": {"alfa": 1}}, "partition.alfa: unknown key 'alfa'; did you mean 'alpha'?"),
        ({"task": {"txt": "x"}}, "task.txt: unknown key 'txt'; did you mean 'text'?"),
        (
            {"data": {"held_out": {"cont": 1}}},
            "data.held_out.cont: unknown key 'cont'; did you mean 'count'?",
        ),
        ({"method": "fedhk"}, "did you mean 'fedhl'?"),
        ({"weighting": "truncaton"}, "did you mean 'truncation'?"),
        ({"weighting": {"name": "truncation", "pwr": 2}}, "pwr"),
        ({"weighting": {"name": "truncation", "epsilon": -1}}, "epsilon"),
        ({"lora": {"ranks": 0}}, "lora.ranks"),
        ({"lora": {"ranks": [4, 0, 4, 4, 4, 4]}}, "lora.ranks: expected ranks of at least 1"),
        ({"lora": {"ranks": "many"}}, "lora.ranks: expected ranks of at least 1"),
        ({"lora": {"targets": "query"}}, "lora.targets: expected a list of module names"),
        (
            {"weighting": {"name": "truncation", "epsilon": "a"}},
            "epsilon should be a valid number, got 'a'",
        ),
        ({"method": {"name": "fedhl", "exact": "no"}}, "exact should be a valid boolean, got 'no'"),
        ({"method": {"name": "fedsvd", "period": True}}, "period should be a valid integer"),
        ({"method": "FedHK"}, "did you mean 'fedhl'?"),
        (
            {"method": {"name": "fedhl", "weighting": "uniform"}},
            "has no hyperparameter 'weighting'",
        ),
        ({"task": {"kind": "classification"}}, "task.kind: unknown kind 'classification'; did you"),
        (
            {"partition": {"kind": None}},
            "partition.kind: required, one of iid, dirichlet, by-column",
        ),
        ({"robust": {"reject": {"factor": 3}}}, "reject.kind: required, one of median, trimmed"),
        ({"model": "bert"}, "model: input should be a group of settings, got 'bert'"),
        ({"data": {"where": {"a": [1, None]}}}, "data.where: expected a value of the field 'a'"),
        ({"lora": {"alpha": "r2"}}, "lora.alpha: expected a number above 0, or a multiple"),
        ({"lora": {"alpha": "-2r"}}, "multiple of the rank such as 2r, got '-2r'"),
        ({"lora": {"alpha": 0}}, "lora.alpha"),
        ({"report_to": "tensorbord"}, "report_to: unknown tracker 'tensorbord'; did you mean"),
        ({"report_to": ["wandb", "wandb"]}, "report_to: wandb is given twice"),
        ({"report_to": [{"project": "x"}]}, "report_to: a tracker has no name; give one of"),
        ({"report_to": [3]}, "report_to.0: input should be a valid dictionary"),
        (
            {"report_to": {"name": "wandb", "projct": "x"}},
            "report_to.0.projct: unknown key 'projct'; did you mean 'project'?",
        ),
        ({"report_to": {"name": "mlflow", "uri": "mlruns"}}, "uri: expected a URI, e.g. http://"),
        (
            {
                "report_to": {"name": "wandb", "clients": True},
                "privacy": {"clip": 1, "noise": 1},
                "weighting": "uniform",
            },
            "report_to would give it to wandb; leave clients: true out",
        ),
        ({"rounds": 0}, "rounds: input should be greater than 0, got 0"),
        ({"rounds": "ten"}, "rounds: input should be a valid integer"),
        ({"participation": {"count": 2}}, "participation: give exactly one of fraction and count"),
        ({"training": {"epochs": 1}}, "training: give steps or epochs, not both"),
        ({"training": {"accumulation": 3}}, "batch_size 16 cannot be split"),
        ({"data": {"held_out": {"fraction": 0.1}}}, "give exactly one of count, fraction"),
        (
            {"task": {"kind": "translation"}},
            "task.kind: unknown kind 'translation' (known: sequence-classification, ",
        ),
        ({"partition": {"kind": "iid"}}, "partition.clients: required, but not given"),
        ({"name": "../elsewhere"}, "name: string should match"),
        ({"compute": {"device": "gpu"}}, "'auto', 'cpu', 'cuda' or 'mps', got 'gpu'"),
        ({"checkpoints": {"keep": 1}}, "checkpoints.keep"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    message = refuse(tmp_path, merged(classification(), change))
    assert said in message
    assert len(message.splitlines()) == 1, message


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    config = merged(classification(), {"rounds": 0, "sed": 1})
    del config["model"]
    lines = refuse(tmp_path, config).splitlines()
    assert len(lines) == 3
    assert "model: required, but not given" in "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [a", "is not valid YAML"),
        ("", "must hold a mapping of settings, got NoneType"),
        ("- a\n- b\n", "must hold a mapping of settings, got list"),
        ("name: a\nseed: 1\nname: b\n", "'name' is given twice"),
        ("? [a, b]\n: 1\n", "config"),
    ],
)
def test_a_file_that_is_no_config(text: str, said: str, tmp_path: Path) -> None:
    assert said in refuse(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)


# --- ranks and scales ---------------------------------------------------------------------------


def test_alpha_is_a_number_or_follows_the_rank() -> None:
    assert [LoRAConfig().scale_of(r) for r in (1, 4, 64)] == [2.0, 2.0, 2.0]
    assert [LoRAConfig(alpha="0.5r").alpha_of(r) for r in (2, 8)] == [1.0, 4.0]
    assert [LoRAConfig(alpha=16).scale_of(r) for r in (4, 16)] == [4.0, 1.0]
    assert LoRAConfig(alpha=16, rslora=True).scale_of(4) == 8.0
    assert LoRAConfig(rslora=True).scale_of(16) == 8.0


CLIENTS = [f"client-{k}" for k in range(5)]


def ranks(rule: Any, clients: list[str] = CLIENTS, seed: int = 0) -> dict[str, int]:
    return LoRAConfig.model_validate({"ranks": rule}).ranks.assign(clients, seed)


def test_ranks_by_every_rule() -> None:
    assert ranks(3) == dict.fromkeys(CLIENTS, 3)
    assert list(ranks([1, 2, 3, 4, 5]).values()) == [1, 2, 3, 4, 5]
    by_name = ranks({"clients": {"client-3": 9}, "default": 2})
    assert by_name == {**dict.fromkeys(CLIENTS, 2), "client-3": 9}
    drawn = ranks({"shares": {4: 0.6, 64: 0.4}})
    assert Counter(drawn.values()) == {4: 3, 64: 2}
    assert drawn == ranks({"shares": {4: 0.6, 64: 0.4}})
    orders = {tuple(ranks({"shares": {4: 3, 64: 2}}, seed=s).values()) for s in range(20)}
    assert len(orders) > 3
    many = [f"{k:03}" for k in range(100)]
    counts = Counter(ranks({"shares": {1: 1, 2: 1, 3: 1}}, many).values())
    assert sorted(counts.values()) == [33, 33, 34]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ([4, 4], "the list has 2 ranks for 5 clients"),
        ({"clients": {"client-9": 4}, "default": 2}, "unknown client 'client-9'"),
        ({"clients": {"client-1": 4}}, "client 'client-0' has no rank"),
    ],
)
def test_a_rank_rule_that_does_not_fit_the_clients(rule: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        ranks(rule)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"share": {4: 1}}, "{shares: {rank: share, ...}} or {clients"),
        ({"shares": {0: 1}}, "lora.ranks.shares.0: input should be greater than 0"),
        ({"shares": {}}, "lora.ranks"),
        ({"shares": {4: -1}}, "lora.ranks"),
        ({"clients": {"a": 0}}, "lora.ranks"),
        ({"clients": {"a": 2}, "default": "x"}, "lora.ranks"),
    ],
)
def test_a_rank_rule_that_makes_no_sense(rule: Any, said: str, tmp_path: Path) -> None:
    config = classification()
    config["lora"]["ranks"] = rule
    message = refuse(tmp_path, config)
    assert said in message and len(message.splitlines()) == 1, message


def test_the_size_of_a_cohort_and_of_a_round() -> None:
    assert [Participation(fraction=f).size(10) for f in (0.01, 0.3, 1.0)] == [1, 3, 10]
    assert Participation(count=4).size(10) == 4
    assert Participation(count=4).size(3) == 3
    assert TrainingConfig(steps=7).steps_for(1) == 7
    assert TrainingConfig(epochs=0.5, batch_size=16).steps_for(64) == 2
    assert TrainingConfig(batch_size=16).steps_for(17) == 2
    assert TrainingConfig(epochs=0.01).steps_for(17) == 1
