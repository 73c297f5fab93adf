"""From a config to rows: every row has one owner, and nobody is tested on what was trained on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.characters import characters

from fedhl.config import Config
from fedhl.data import shards
from fedhl.data.shards import Shards
from fedhl.errors import UserError
from fedhl.task.examples import IGNORED, Example

TOKENIZER = characters()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """120 rows: three labels, four sites of unequal size, two languages, each text once."""
    rows = [
        {
            "text": f"text {k}",
            "label": ("bad", "fair", "good")[k % 3],
            "site": f"site {'abbcccdddd'[k % 10]}",
            "language": ("en", "de")[k % 4 == 0],
            "year": 2020 + k % 2,
        }
        for k in range(120)
    ]
    return write(tmp_path / "rows.jsonl", rows)


def config(source: str, **settings: Any) -> Config:
    """A classification config on this source; `data`, `task` and `evaluation` add to theirs."""
    base: dict[str, Any] = {
        "name": "test",
        "model": {"source": "none"},
        "task": {"kind": "sequence-classification"} | settings.pop("task", {}),
        "data": {"source": source, "held_out": {"fraction": 0.1}} | settings.pop("data", {}),
        "partition": {"kind": "iid", "clients": 4},
        "evaluation": settings.pop("evaluation", {}),
    }
    return Config.model_validate(base | settings)


def completions(source: str, **settings: Any) -> Config:
    return config(source, task={"kind": "causal-lm", "max_length": 12}, **settings)


def texts(data: Shards, part: Any) -> list[str]:
    return [data.rows[k]["text"] for k in part]


PARTITIONS: dict[str, dict[str, Any]] = {
    "iid": {"kind": "iid", "clients": 7},
    "dirichlet": {"kind": "dirichlet", "clients": 5, "alpha": 0.5, "min_examples": 4},
    "by language": {
        "kind": "dirichlet",
        "clients": 5,
        "alpha": 0.5,
        "by": "language",
        "min_examples": 4,
    },
    "by column": {"kind": "by-column", "column": "site"},
}


@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS)
@pytest.mark.parametrize("own", [0.0, 0.25])
@pytest.mark.parametrize("held", [None, {"fraction": 0.1}, {"count": 17}])
def test_every_row_has_exactly_one_place(
    source: str, partition: dict[str, Any], own: float, held: dict[str, Any] | None
) -> None:
    data = shards.read(
        config(
            source,
            partition=partition,
            data={"held_out": held},
            evaluation={"client_fraction": own},
        )
    )
    placed = [text for part in data.clients.values() for text in texts(data, part)]
    placed += [text for part in data.client_held_out.values() for text in texts(data, part)]
    placed += [row["text"] for row in data.held_out]
    assert sorted(placed) == sorted(f"text {k}" for k in range(120))
    assert len(data.held_out) == {None: 0, "fraction": 12, "count": 17}[held and next(iter(held))]
    assert data.labels == ["bad", "fair", "good"]
    assert list(data.clients) == sorted(data.clients)
    for name, part in data.clients.items():
        kept_back = len(data.client_held_out.get(name, ()))
        assert kept_back == round(own * (len(part) + kept_back))
    assert bool(data.client_held_out) == bool(own)


def test_the_held_out_rows_are_stratified(source: str) -> None:
    data = shards.read(config(source, data={"held_out": {"count": 12}}))
    assert Counter(row["label"] for row in data.held_out) == {"bad": 4, "fair": 4, "good": 4}


def test_a_client_per_value(source: str) -> None:
    settings = {"data": {"held_out": None}, "evaluation": {"client_fraction": 0}}
    data = shards.read(config(source, partition=PARTITIONS["by column"], **settings))
    sizes = {name: len(part) for name, part in data.clients.items()}
    assert sizes == {"site a": 12, "site b": 24, "site c": 36, "site d": 48}
    for name, part in data.clients.items():
        assert {data.rows[k]["site"] for k in part} == {name}


def test_the_skew_is_that_of_the_field_asked_for(source: str) -> None:
    """With α = 0.01 nearly all rows of a value go to one client; other fields stay mixed."""
    rule = {"kind": "dirichlet", "clients": 2, "alpha": 0.01, "min_examples": 10}
    for field, other in (("language", "label"), ("label", "year")):
        data = shards.read(config(source, partition=rule | {"by": field}))
        first, second = (
            Counter(data.rows[k][field] for k in part) for part in data.clients.values()
        )
        lopsided = [max(first[v], second[v]) / (first[v] + second[v]) for v in first | second]
        assert min(lopsided) > 0.9
        for part in data.clients.values():
            assert len({data.rows[k][other] for k in part}) > 1


def test_language_models_need_a_field_to_skew_by(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{k}", "completion": "c", "kind": k % 2} for k in range(20)]
    source = write(tmp_path / "lm.jsonl", rows)
    rule = {"kind": "dirichlet", "clients": 2, "alpha": 1.0}
    with pytest.raises(UserError, match=r"partition\.by"):
        shards.read(completions(source, partition=rule))
    data = shards.read(completions(source, partition=rule | {"by": "kind"}))
    assert data.labels is None and len(data.clients) == 2


# where and limit


def test_where(source: str) -> None:
    data = shards.read(config(source, data={"where": {"language": "de", "year": 2020}}))
    assert {(row["language"], row["year"]) for row in data.rows} == {("de", 2020)}
    two = shards.read(config(source, data={"where": {"site": ["site a", "site c"]}}))
    assert Counter(row["site"] for row in two.rows) == {"site a": 12, "site c": 36}
    with pytest.raises(UserError, match=r"data\.where: no row of .* has language fr; .* de, en$"):
        shards.read(config(source, data={"where": {"language": "fr"}}))
    with pytest.raises(UserError, match=r"langauge.*language"):
        shards.read(config(source, data={"where": {"langauge": "en"}}))


def test_limit_is_a_seeded_sample(source: str) -> None:
    def sample(seed: int, limit: int = 30) -> list[str]:
        data = shards.read(config(source, seed=seed, data={"limit": limit}))
        return [row["text"] for row in data.rows]

    first = sample(0)
    assert len(set(first)) == 30 and first == sample(0) and first != sample(1)
    assert first != [f"text {k}" for k in range(30)], "not the first rows"
    assert len(sample(0, limit=1000)) == 120
    both = shards.read(config(source, data={"limit": 20, "where": {"language": "de"}}))
    assert len(both.rows) == 20 and {row["language"] for row in both.rows} == {"de"}


def test_held_out_from_a_source_of_its_own(tmp_path: Path, source: str) -> None:
    rows = [{"text": f"other {k}", "label": "good"} for k in range(9)]
    other = write(tmp_path / "other.jsonl", rows)
    data = shards.read(config(source, data={"held_out": {"source": other, "count": 5}}))
    assert [row["text"] for row in data.held_out] == [f"other {k}" for k in range(5)]
    assert sum(len(part) for part in data.clients.values()) == 120
    write(tmp_path / "other.jsonl", rows[:8])
    again = shards.read(config(source, data={"held_out": {"source": other, "count": 5}}))
    assert again.hash != data.hash, "a resumed run must notice other held-out rows"


# Reproducible, and independent draws


@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS)
def test_the_same_config_gives_the_same_shards(source: str, partition: dict[str, Any]) -> None:
    def read(seed: int) -> tuple[Any, ...]:
        data = shards.read(
            config(source, seed=seed, partition=partition, evaluation={"client_fraction": 0.25})
        )
        parts = [data.clients, data.client_held_out]
        return [{n: p.tolist() for n, p in part.items()} for part in parts], data.held_out

    assert read(0) == read(0)
    assert read(0) != read(1)


def test_settings_that_have_nothing_to_do_with_a_draw_leave_it_alone(source: str) -> None:
    base = shards.read(config(source))
    for other in (
        config(source, rounds=3, lora={"ranks": 2}, training={"steps": 5}),
        config(source, partition=PARTITIONS["dirichlet"]),
    ):
        assert shards.read(other).held_out == base.held_out
    own = shards.read(config(source, evaluation={"client_fraction": 0.25}))
    for name, part in base.clients.items():
        whole = np.concatenate([own.clients[name], own.client_held_out[name]])
        assert sorted(whole) == part.tolist()


# Tokenised


def test_tokenised_rows_are_those_of_the_shards(source: str) -> None:
    settings = config(source, task={"max_length": 6}, evaluation={"client_fraction": 0.25})
    data = shards.read(settings)
    got = shards.tokenise(settings, data, TOKENIZER)
    labels = data.labels or []

    def expected(row: dict[str, Any]) -> Example:
        ids = TOKENIZER(row["text"])["input_ids"]
        assert isinstance(ids, list)
        return Example(ids[:6], labels.index(row["label"]))

    for parts, tokenised in (
        (data.clients, got.train),
        (data.client_held_out, got.client_held_out),
    ):
        for name, part in parts.items():
            assert tokenised[name] == [expected(data.rows[k]) for k in part]
    assert got.held_out == [expected(row) for row in data.held_out]
    assert got.dropped == 0
    assert got.count == len(data.rows)  # training, the clients' and the server's held-out rows
    everything = [*data.rows]
    assert got.truncated == sum(len(TOKENIZER(row["text"])["input_ids"]) > 6 for row in everything)
    share = got.truncated / got.count
    said = f"{got.truncated} of {got.count} rows ({share:.0%}) cut to task.max_length = 6 tokens"
    assert [*shards.losses(settings, got)] == [said]
    roomy = config(source, task={"max_length": 500})
    assert [*shards.losses(roomy, shards.tokenise(roomy, shards.read(roomy), TOKENIZER))] == []


def lm_rows(lengths: dict[str, list[int]]) -> list[dict[str, Any]]:
    """Rows by client with prompts of these lengths, and 20 short ones without a client's trouble."""
    return [
        {"prompt": "p" * length, "completion": "c", "who": who}
        for who, ls in lengths.items()
        for length in ls
    ]


def test_rows_without_room_are_dropped_and_counted(tmp_path: Path) -> None:
    lengths = {"one": [3, 30, 4, 5], "two": [30, 2, 30, 2]}
    source = write(tmp_path / "lm.jsonl", lm_rows(lengths))
    held = write(tmp_path / "held.jsonl", lm_rows({"server": [2, 30, 40]}))
    settings = completions(
        source,
        data={"held_out": {"source": held}},
        partition={"kind": "by-column", "column": "who"},
    )
    got = shards.tokenise(settings, shards.read(settings), TOKENIZER)
    assert {name: len(rows) for name, rows in got.train.items()} == {"one": 3, "two": 2}
    assert len(got.held_out) == 1
    assert got.dropped == 3 + 2
    read = shards.read(settings)
    lengths_kept = {k: [len(read.rows[j]["prompt"]) for j in v] for k, v in got.rows.items()}
    assert lengths_kept == {"one": [3, 4, 5], "two": [2, 2]}
    (warning,) = shards.losses(settings, got)
    assert warning.startswith("warning: 5 rows dropped: their prompts leave no room")
    for example in got.train["one"]:  # prompt, completion and end of text
        assert isinstance(example.labels, list)
        assert [label == IGNORED for label in example.labels] == [True] * (
            len(example.labels) - 2
        ) + [False] * 2


def test_a_client_or_a_server_left_without_rows(tmp_path: Path) -> None:
    by_who = {"kind": "by-column", "column": "who"}
    source = write(tmp_path / "lm.jsonl", lm_rows({"one": [3, 4, 5], "two": [30, 30]}))
    nobody = {"data": {"held_out": None}, "evaluation": {"client_fraction": 0}}
    settings = completions(source, partition=by_who, **nobody)
    with pytest.raises(UserError, match=r"client 'two' has no row left.*max_length = 12"):
        shards.tokenise(settings, shards.read(settings), TOKENIZER)

    held = write(tmp_path / "held.jsonl", lm_rows({"server": [30]}))
    good = write(tmp_path / "good.jsonl", lm_rows({"one": [3, 4], "two": [4, 5]}))
    settings = completions(good, data={"held_out": {"source": held}}, partition=by_who)
    with pytest.raises(UserError, match=r"no room|none of the rows"):
        shards.tokenise(settings, shards.read(settings), TOKENIZER)


def test_a_client_left_without_held_out_rows(tmp_path: Path) -> None:
    """Half of the rows fit; a seed is sought that holds out only rows that do not."""
    source = write(tmp_path / "lm.jsonl", lm_rows({"one": [3, 30], "two": [3, 4]}))
    for seed in range(20):
        settings = completions(
            source,
            seed=seed,
            data={"held_out": None},
            partition={"kind": "by-column", "column": "who"},
            evaluation={"client_fraction": 0.5},
        )
        data = shards.read(settings)
        if data.client_held_out["one"].tolist() == [1]:
            with pytest.raises(UserError, match=r"client_fraction: none of the 1 rows .* 'one'"):
                shards.tokenise(settings, data, TOKENIZER)
            return
    pytest.fail("no seed held out the long row")


# Bad input


def test_too_few_rows_to_keep_any_back(source: str) -> None:
    with pytest.raises(UserError, match=r"client_fraction: client 'client-0' has 27 rows"):
        shards.read(config(source, evaluation={"client_fraction": 0.01}))


def test_a_label_unseen_in_training(tmp_path: Path, source: str) -> None:
    rows = [{"text": "x", "label": label} for label in ("good", "excellent")]
    other = write(tmp_path / "other.jsonl", rows)
    settings = config(source, data={"held_out": {"source": other}})
    data = shards.read(settings)
    with pytest.raises(UserError, match=r"row 1 .* 'excellent'.*known labels: bad, fair, good"):
        shards.tokenise(settings, data, TOKENIZER)


def test_missing_fields_and_files(tmp_path: Path, source: str) -> None:
    cases = {
        "'kind'": config(source, task={"label": "kind"}),
        "'hospital'": config(source, partition={"kind": "by-column", "column": "hospital"}),
        "'age'": config(
            source, partition={"kind": "dirichlet", "clients": 2, "alpha": 1.0, "by": "age"}
        ),
        "3 rows cannot give 4 clients": config(source, data={"limit": 3, "held_out": None}),
        "leaves nothing to train on": config(source, data={"held_out": {"count": 120}}),
    }
    for message, settings in cases.items():
        with pytest.raises(UserError, match=message):
            shards.read(settings)
    settings = config(source, task={"text": "body"})
    with pytest.raises(UserError, match="no field 'body'"):
        shards.tokenise(settings, shards.read(settings), TOKENIZER)
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        shards.read(config(str(tmp_path / "nowhere.jsonl")))
