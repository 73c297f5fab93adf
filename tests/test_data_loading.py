"""Where data is, how it is read, and what is said when it is wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhl.data.loading import fingerprint, hold_out, load_rows
from fedhl.errors import UserError
from fedhl.locate import locate
from fedhl.task.rows import column

ROWS = [{"text": "good film", "label": "1"}, {"text": 'a "bad",\nlong one', "label": "0"}]
Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file into the (temporary) current folder; gives its name back."""
    monkeypatch.chdir(tmp_path)

    def to(name: str, text: str) -> str:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return name

    return to


# locate


def test_locate_path_and_hub_id(write: Write) -> None:
    name = write("data/train.jsonl", "{}")
    assert locate(name) == Path(name)
    assert locate("data") == Path("data")
    for hub_id in ("imdb", "openai/gsm8k", "openai/gsm8k:main", "Qwen/Qwen2.5-0.5B"):
        assert locate(hub_id) is None


def test_a_local_folder_goes_before_the_hub(write: Write) -> None:
    write("owner/name/config.json", "{}")
    assert locate("owner/name") == Path("owner/name")


def test_locate_inside_a_package_without_importing_it(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("site/some_reviews/__init__.py", "raise RuntimeError('imported')")
    write("site/some_reviews/data/train.csv", "a\n1\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    root = tmp_path / "site" / "some_reviews"
    assert locate("package:some_reviews/data/train.csv") == root / "data" / "train.csv"
    assert locate("package:some_reviews") == root
    with pytest.raises(UserError, match=r"data/trian\.csv.*did you mean 'train\.csv'"):
        locate("package:some_reviews/data/trian.csv")
    with pytest.raises(UserError, match=r"no 'dta' in .*did you mean 'data'"):
        locate("package:some_reviews/dta/train.csv")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data/trian.jsonl", r"'data/trian\.jsonl' \(did you mean 'train\.jsonl'\?\).*owner/name"),
        ("dta/train.jsonl", r"there is no 'dta' in the current folder.*did you mean 'data'"),
        ("./nothing", r"no file or folder 'nothing'; the current folder has data"),
        ("data/train.jsonl/deeper.csv", r"'data/train\.jsonl' is a file"),
        ("", "the source is empty"),
        ("~nobody-of-this-name/rows.jsonl", "no path on this machine: .*home directory"),
        (300 * "long" + ".csv", "'(long)+' is no path on this machine: .*too long"),
        ("package:no_such_package_here/x", r"pip install no-such-package-here"),
        ("package:numpyy/x", r"did you mean 'numpy'.*pip install"),
        ("package:numpy.linalg/x", "not the import name"),
        ("package:this/x", "single module"),
        ("package:numpy/../../x", r"leaves the package; leave out the '\.\.'"),
        ("package:numpy/..", "leaves the package"),
        ("package:numpy/linalg/../__init__.py", "leaves the package"),
    ],
)
def test_locate_says_what_is_missing(write: Write, source: str, message: str) -> None:
    write("data/train.jsonl", "{}")
    with pytest.raises(UserError, match=message):
        locate(source)


# load_rows

JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'text,label\ngood film,1\n"a ""bad"",\nlong one",0\n'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", JSONL),
        ("rows.ndjson", "\n" + JSONL.replace("\n", "\r\n\r\n")),
        ("rows.jsonl.gz", JSONL),
        ("rows.json", json.dumps(ROWS, indent=1)),
        ("rows.json.gz", "\ufeff" + json.dumps(ROWS)),
        ("rows.csv", CSV),
        ("ROWS.CSV", "\ufeff" + CSV),
        ("rows.csv.gz", CSV),
        ("rows.tsv", 'text\tlabel\ngood film\t1\n"a ""bad"",\nlong one"\t0\n'),
    ],
)
def test_formats(write: Write, name: str, text: str) -> None:
    assert load_rows(write(name, text)) == ROWS
    assert load_rows(name, limit=1) == ROWS[:1]
    assert load_rows(name, limit=9) == ROWS


def test_parquet_keeps_python_types(write: Write) -> None:
    rows = [{"text": "a", "n": 1, "messages": [{"role": "user"}]}, {"text": None, "n": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "rows.parquet")
    assert load_rows("rows.parquet") == [rows[0], rows[1] | {"messages": None}]
    assert load_rows("rows.parquet", limit=1) == rows[:1]


def test_line_separators_inside_json_strings_end_no_line(write: Write) -> None:
    row = {"text": "one\u2028two\u0085three\x0c"}
    assert load_rows(write("a.jsonl", json.dumps(row, ensure_ascii=False))) == [row]


def test_csv_is_text_and_empty_cells_are_none(write: Write) -> None:
    long = "x" * 200_000
    rows = load_rows(write("a.csv", f"a,b\n007,\n\n1.5,{long}\n"))
    assert rows == [{"a": "007", "b": None}, {"a": "1.5", "b": long}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', r"a\.jsonl: line 3 is not JSON .*column 6"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2 is an array; expected one JSON object per line"),
        ("a.jsonl", "\n\n", "no rows"),
        ("a.json", "", "no rows"),
        ("a.json", "[]", "no rows"),
        ("a.json", JSONL, r"name it \.jsonl"),
        ("a.json", '{"train": [], "test": []}', "an object with keys train, test; expected"),
        ("a.json", '[{"a": 1}, 3]', r"row 1 \(counted from 0\) is a number"),
        ("a.csv", "", "no rows"),
        ("a.csv", "a,b\n", "no rows"),
        ("a.csv", "a,b\n1,2\n3\n", r"line 3 has 1 cells, but the header has 2 \(a, b\)"),
        ("a.csv", "a,a\n1,2\n", "column 'a' more than once"),
        ("a.csv", 'a,b\n"1,2\n', "bad quoting near line 2"),
        ("a.parquet", "PAR", "not a Parquet file"),
        ("a.txt", "x", r"cannot read \.txt; expected \.jsonl, .*\.parquet"),
        ("a.parquet.gz", "x", r"cannot read \.gz"),
        ("data/a.csv", "x", r"data: a folder; name one file in it \(a\.csv\)"),
    ],
)
def test_bad_files(write: Write, name: str, text: str, message: str) -> None:
    write(name, text)
    with pytest.raises(UserError, match=message):
        load_rows(name if not name.startswith("data/") else "data")


def test_bytes_that_are_not_what_the_name_says(write: Write) -> None:
    Path("latin.csv").write_bytes("a\né\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_rows("latin.csv")
    Path("plain.jsonl.gz").write_text(JSONL)
    with pytest.raises(UserError, match="damaged gzip"):
        load_rows("plain.jsonl.gz")
    Path("cut.jsonl.gz").write_bytes(gzip.compress(JSONL.encode())[:-9])
    with pytest.raises(UserError, match="damaged gzip"):
        load_rows("cut.jsonl.gz")


def test_settings_that_cannot_apply(write: Write) -> None:
    name = write("rows.jsonl", JSONL)
    with pytest.raises(UserError, match="no splits; remove split: 'test'"):
        load_rows(name, split="test")
    with pytest.raises(UserError, match="limit is 0"):
        load_rows(name, limit=0)


def test_column() -> None:
    assert column(ROWS, "label", "f.csv") == ["1", "0"]
    with pytest.raises(
        UserError,
        match=r"f\.csv: row 0 .*'lable' \(did you mean 'label'\?\); .*wrong in this way: row 1\)$",
    ):
        column(ROWS, "lable", "f.csv")
    with pytest.raises(UserError, match=r"row 1 .*: the row has no field 'b'; its fields: a$"):
        column([{"a": 1, "b": 1}, {"a": 1}], "b", "f.csv")
    with pytest.raises(UserError, match=r"f\.csv: row 1 .*: field 'a' is empty; fill"):
        column([{"a": 0}, {"a": None}], "a", "f.csv")


def test_fingerprint_is_the_sha256_of_the_file(write: Write) -> None:
    name = write("rows.jsonl", JSONL)
    assert fingerprint(name) == "sha256:" + hashlib.sha256(JSONL.encode()).hexdigest()
    with pytest.raises(UserError, match="a folder"):
        fingerprint(".")


HUB = """
import sys
from pathlib import Path
import datasets
from datasets.arrow_writer import ArrowWriter
from fedhl.data.loading import fingerprint, load_rows
from fedhl.errors import UserError
from fedhl.task.rows import column

rows = datasets.Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": 0}])
revision = "0123456789" * 4
folder = Path(sys.argv[1], "owner___name", "default", "0.0.0", revision)
folder.mkdir(parents=True)
with ArrowWriter(path=str(folder / "name-train.arrow"), features=rows.features) as writer:
    for row in rows:
        writer.write(row)
    writer.finalize()
train = datasets.SplitInfo("train", num_examples=2, num_bytes=9, dataset_name="name")
datasets.DatasetInfo(
    features=rows.features, splits=datasets.SplitDict({"train": train}, dataset_name="name"),
    dataset_name="name", config_name="default", builder_name="parquet", version="0.0.0",
).write_to_directory(str(folder))

assert load_rows("owner/name") == rows.to_list()
assert load_rows("owner/name:default", split="train", limit=1) == rows.to_list()[:1]
assert fingerprint("owner/name") == f"hub:{revision}"
for source, split in [("owner/name", "test"), ("owner/name:other", None), ("owner/none", None)]:
    try:
        load_rows(source, split=split)
    except UserError as error:
        print(error)
"""


def test_hub_data_in_the_cache(tmp_path: Path) -> None:
    # A process of its own: datasets reads where its cache is when it is imported.
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HF_DATASETS_CACHE": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(tmp_path)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    split, config, missing = done.stdout.splitlines()
    assert "'owner/name'" in split and "['train']" in split
    assert "config 'other'" in config
    assert "no file 'owner/none' here" in missing


# hold_out


@given(
    strata=st.lists(st.integers(0, 4), min_size=2, max_size=80),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_hold_out_is_exact_stratified_and_seeded(
    strata: list[int], seed: int, data: st.DataObject
) -> None:
    n = len(strata)
    count = data.draw(st.integers(1, n - 1))
    train, held = hold_out(n, count=count, seed=seed, strata=strata)
    assert len(held) == count
    assert sorted([*train, *held]) == list(range(n))
    assert list(train) == sorted(train) and list(held) == sorted(held)
    values = np.asarray(strata)
    for value in set(strata):
        expected = count * (values == value).sum() / n
        assert abs((values[held] == value).sum() - expected) < 1
    again = hold_out(n, count=count, seed=seed, strata=strata)
    assert np.array_equal(held, again[1])


def test_hold_out_fraction_and_seeds() -> None:
    _, held = hold_out(1000, fraction=0.1, seed=0)
    _, other = hold_out(1000, fraction=0.1, seed=1)
    assert len(held) == 100 and held.dtype == np.int64
    assert not np.array_equal(held, other)


@pytest.mark.parametrize(
    ("n", "settings", "message"),
    [
        (10, {"fraction": 0.01}, "nothing to evaluate"),
        (10, {"count": 10}, "nothing to train on"),
        (1, {"fraction": 0.5}, "nothing to evaluate"),
        (10, {"fraction": 1.0}, "between 0 and 1"),
        (10, {}, "not both"),
        (10, {"fraction": 0.5, "count": 5}, "not both"),
    ],
)
def test_hold_out_refuses_an_empty_side(n: int, settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        hold_out(n, seed=0, **settings)  # pyright: ignore[reportArgumentType]
