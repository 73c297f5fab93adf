"""Files that people have: what is wrong in them is told with the place, and what can be read is read."""

from __future__ import annotations

import codecs
import datetime
import gzip
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhl.config import Config
from fedhl.config.inputs import DataConfig
from fedhl.data.loading import load_rows
from fedhl.errors import UserError
from fedhl.task import KINDS
from fedhl.task.labels import named_labels
from fedhl.task.rows import DEEPEST, Row, column, text_column


def jsonl(*rows: str) -> bytes:
    return "".join(row + "\n" for row in rows).encode()


def refused(path: Path, field: str | None = None, **settings: Any) -> str:
    """The one line that is said of the file, or of the texts in its field `field`."""
    with pytest.raises(UserError) as caught:
        rows = load_rows(str(path), **settings)
        text_column(rows, field or "", path.name)
    said = str(caught.value)
    assert path.name in said and "\n" not in said
    return said


# --- whatever a reader raises -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.jsonl",
            jsonl('{"a": 1}', '{"a": ' + "9" * 5000 + "}"),
            "line 2 cannot be read (Exceeds",
        ),
        (
            "b.jsonl",
            jsonl("", '{"a": ' + "[" * 99_999 + "]" * 99_999 + "}"),
            "line 2 cannot be read",
        ),
        ("c.jsonl", jsonl('{"a": ' + "[" * 99_999), "line 1"),
        ("d.json", b'[{"a": ' + b"9" * 5000 + b"}]", "cannot be read (Exceeds"),
        ("e.json", b"[" * 99_999 + b"]" * 99_999, "cannot be read (it is nested too deeply)"),
        (
            "twice.jsonl",
            jsonl('{"a": 1, "b": 2}', '{"a": 1, "b": {"x": 1, "x": 2}}'),
            "line 2 cannot be read (the key 'x' stands twice in one object)",
        ),
        (
            "twice.json",
            b'[{"a": 1, "b": 2, "a": 3}]',
            "cannot be read (the key 'a' stands twice in one object)",
        ),
        ("f.csv", b'a,b\n1,2\n3,"4"5\n', "bad quoting near line 3"),
        ("g.parquet", b"PAR1 no more PAR1", "g.parquet: "),
    ],
)
def test_what_a_reader_cannot_hold(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert said in refused(tmp_path / name)


@pytest.mark.parametrize(
    ("values", "type"),
    [
        (pyarrow.array([0, 2**50]), pyarrow.timestamp("s")),
        (pyarrow.array([0, 0]), pyarrow.timestamp("s", "No/Where")),
        (pyarrow.array([0, 5_000_000], pyarrow.int32()), pyarrow.date32()),
    ],
)
def test_dates_that_python_cannot_hold(values: Any, type: Any, tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b"], "when": values.cast(type)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    said = refused(tmp_path / "a.parquet")
    assert re.search(r"row [01] \(counted from 0\): the .* in 'when' cannot be read", said)


def test_columns_of_one_name_in_parquet(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "column 'text' more than once" in refused(tmp_path / "a.parquet")


def test_a_limit_beyond_all_numbers_of_rows(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(jsonl('{"a": 1}', '{"a": 2}'))
    for name in ("a.parquet", "b.jsonl"):
        assert len(load_rows(str(tmp_path / name), limit=10**30)) == 2


def whole_files() -> dict[str, bytes]:
    """A sound file of two rows for each kind of file."""
    table = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x", "é"], "b": [[1], None]}), table)
    lines, cells = jsonl('{"a": "x"}', '{"a": "\\u00e9"}'), 'a,b\n1,"é, y"\n2,"z""q"\n'.encode()
    return {
        **{"f.jsonl": lines, "f.jsonl.gz": gzip.compress(lines), "f.json": b'[{"a": 1}, {"a": 2}]'},
        **{"f.csv": cells, "f.tsv.gz": gzip.compress(cells)},
        "f.parquet": table.getvalue().to_pybytes(),
    }


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from([*whole_files()]),
    place=st.integers(0, 2**16),
    lost=st.integers(0, 9),
    put=st.binary(max_size=4),
    encoding=st.sampled_from(["utf-8", "utf-16", "shift_jis", "idna", "utf-7"]),
)
def test_damaged_files_are_read_or_refused(
    name: str,
    place: int,
    lost: int,
    put: bytes,
    encoding: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data, path = whole_files()[name], tmp_path_factory.getbasetemp() / name
    place %= len(data) + 1
    path.write_bytes(data[:place] + put + data[place + lost :])
    try:
        assert all(isinstance(row, Row) for row in load_rows(str(path), encoding=encoding))
    except UserError as error:
        assert name in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("text", ['"\\ud83d tail"', '["a", {"b": "x\\udc00"}]', '{"\\ud83d": 1}'])
def test_half_a_surrogate_pair_is_no_text(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl('{"a": "fine", "b": 1}', '{"a": ' + text + ', "b": 2}'))
    rows = load_rows(str(path))
    with pytest.raises(UserError, match=r"a: row 1 \(counted from 0, line 2\): field 'a' has half"):
        column(rows, "a", "a")
    assert column(rows, "b", "a") == [1, 2]  # a field that is not used does no harm


def test_whole_pairs_and_deep_messages() -> None:
    rows = load_rows_of(json.dumps({"a": "\U0001f600"}))
    assert column(rows, "a", "a") == ["\U0001f600"]
    deep: Any = "x"
    for _ in range(DEEPEST + 5):
        deep = [deep]
    with pytest.raises(UserError, match=r"row 0 .*field 'a' is nested more than \d+ levels"):
        column([{"a": deep}], "a", "a")


def load_rows_of(text: str) -> list[dict[str, Any]]:
    from fedhl.data.files import json_lines

    return [*json_lines([text], "a")]


# --- the place of a row -------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": lambda p: p.write_bytes(jsonl("", *[json.dumps({"n": i}) for i in range(5)])),  # type: ignore
    "a.csv": lambda p: p.write_text('n,m\n\n"0","\n"\n1,\n2,\n\n3,\n4,\n'),  # type: ignore
    "a.json": lambda p: p.write_text(json.dumps([{"n": i} for i in range(5)])),  # type: ignore
    "a.parquet": lambda p: pyarrow.parquet.write_table(pyarrow.table({"n": range(5)}), p),
}
PLACES = {
    "a.jsonl": ("row 1 (counted from 0, line 3)", "line 4, line 5, line 6"),
    "a.csv": ("row 1 (counted from 0, line 5)", "line 6, line 8, line 9"),
    "a.json": ("row 1 (counted from 0)", "row 2, row 3, row 4"),
    "a.parquet": ("row 1 (counted from 0)", "row 2, row 3, row 4"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_keep_their_place_when_some_are_chosen(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    rows = load_rows(str(tmp_path / name))[1:]
    first, others = PLACES[name]
    with pytest.raises(UserError) as caught:
        column(rows, "text", name)
    said = str(caught.value)
    assert said.startswith(f"{name}: {first}: the row has no field 'text'; its fields: n")
    assert said.endswith(f"(3 further rows are wrong in this way: {others})")
    again: Row = pickle.loads(pickle.dumps(rows[0]))
    assert isinstance(again, Row) and again == rows[0] and again.number == 1


def test_at_most_ten_rows_and_ten_labels_are_named() -> None:
    rows = [Row({"a": None}, number, number + 2) for number in range(500)]
    with pytest.raises(UserError) as caught:
        column([*rows], "a", "a.csv")
    assert str(caught.value).endswith(
        "line 3, line 4, line 5, line 6, line 7, line 8, line 9, line 10, line 11, line 12 and 489 more)"
    )
    with pytest.raises(UserError, match=r"known labels: (\d+, ){9}\d+ and 90 more$"):
        named_labels(["x"], [{}], "a", [str(i) for i in range(100)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_cannot_be_encoded_is_named_by_its_place(kind: str) -> None:
    from support.styles import style

    task = KINDS[kind].model_validate({"kind": kind})
    wrong = {"text": "", "label": "a", "labels": ["a"], "prompt": 1, "completion": 1, "image": b"a"}
    rows = [Row(wrong, 41, 57)]
    with pytest.raises(
        UserError, match=r"f\.jsonl: row 41 \(counted from 0, line 57\): (the|field) "
    ):
        task.encode([*rows], "f.jsonl", style("byte-level"), ["a", "b"])


# --- encodings and separators -------------------------------------------------------------------

TEXT = "text,label\ngut,1\nschön für Löwen,0\n"
ROWS = [{"text": "gut", "label": "1"}, {"text": "schön für Löwen", "label": "0"}]


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        *(("utf-8", b""), ("utf-8", codecs.BOM_UTF8), ("UTF8", codecs.BOM_UTF8), ("U8", b"")),
        *(("latin-1", b""), ("cp1252", b""), ("utf-16", b""), ("utf-16-le", b"")),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "csv.gz", "json"])
def test_encodings(encoding: str, mark: bytes, ending: str, tmp_path: Path) -> None:
    text = TEXT if ending != "json" else json.dumps(ROWS, ensure_ascii=False)
    data = mark + text.encode(encoding)
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    assert load_rows(str(path), encoding=encoding) == ROWS


def test_bytes_of_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(TEXT.encode("cp1252"))
    said = refused(path)
    assert "line 3 is not UTF-8 text" in said and "byte 0xf6" in said and "data.encoding" in said
    path.write_bytes(TEXT.encode("utf-16"))
    assert "line 1 is not UTF-8 text" in (said := refused(path))
    assert "set data.encoding: utf-16" in said
    assert "a.csv: " in refused(path, encoding="ascii")
    path.write_bytes(b"odd")
    assert "not utf-16 text" in refused(path, encoding="utf-16")


@pytest.mark.parametrize("name", ["utf-9", "hex", "rot13", "", "undefined", "x\0"])
def test_names_that_are_no_encoding(name: str) -> None:
    with pytest.raises(ValueError, match="expected the name of a text encoding"):
        DataConfig(source="x", encoding=name)


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_are_recognised_by_the_header(
    separator: str, ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_text(f'text{separator}"the label"\r\n"a; b, c\td"{separator}1\r\n', newline="")
    assert load_rows(str(path)) == [{"text": "a; b, c\td", "the label": "1"}]


words = st.text(st.sampled_from('ab;,\t"\n é'), max_size=6)


@given(rows=st.lists(st.tuples(words, words), min_size=1, max_size=5), data=st.data())
def test_every_table_is_read_as_it_was_written(
    rows: list[tuple[str, str]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import csv

    separator = data.draw(st.sampled_from([",", ";", "\t"]))
    path = tmp_path_factory.getbasetemp() / "table.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(["text", "label"])
        writer.writerows(rows)
    got = [(row["text"] or "", row["label"] or "") for row in load_rows(str(path))]
    assert got == rows


def test_the_encoding_of_a_config_reaches_all_its_files(tmp_path: Path) -> None:
    from support.tiny import classification

    from fedhl.data.shards import client_shards, read

    lines = "".join(f"gelée {k},{'ab'[k % 2]}\n" for k in range(20))
    path = tmp_path / "a.csv"
    path.write_bytes(f"text,label\n{lines}".encode("cp1252"))
    config = Config.model_validate(
        classification(
            data={"source": str(path), "encoding": "cp1252", "held_out": {"source": str(path)}},
            partition={"kind": "iid", "clients": 2},
            evaluation={"client_fraction": 0.0},
        )
    )
    shards = read(config)
    assert shards.rows == shards.held_out and shards.rows[3]["text"] == "gelée 3"
    assert client_shards(config, "one", str(path)).rows == shards.rows


def test_dates_in_a_text_field_are_named(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [datetime.date(2024, 1, 2)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "field 'text' is date datetime.date(2024, 1, 2), expected text" in refused(
        tmp_path / "a.parquet", "text"
    )
