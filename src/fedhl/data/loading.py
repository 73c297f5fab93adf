"""Read labelled text from a file, an installed package or the hub, and hold rows out."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedhl.data.locate import locate
from fedhl.errors import UserError
from fedhl.files import sha256
from fedhl.task.rows import Rows

T = TypeVar("T")
Indices = NDArray[np.int64]


def load_rows(source: str, *, split: str | None = None, limit: int | None = None) -> Rows:
    """The rows of a data source as dictionaries, in the order of the file.

    Files: .jsonl, .ndjson, .json (an array of objects), .csv and .tsv (with a header), all of them
    also with .gz, and .parquet. Anything in a CSV is text; an empty cell is None. A hub id
    (`owner/name` or `owner/name:config`) is read with `datasets`; `split` defaults to "train".
    `limit` keeps the first rows only, which are no random sample.

    Raises UserError for a missing, unreadable, malformed (with its line) or empty source.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}, expected at least 1; leave it out for all rows")
    path = locate(source)
    if path is None:
        return read_hub(source, split or "train", limit)
    if split is not None:
        raise UserError(
            f"{source}: a local file has no splits; remove split: {split!r}, or name another file"
        )
    read = reader_of(path, source)
    try:
        rows = read(path, source, limit)
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 text ({error}); convert it first") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{source}: a damaged gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error})") from error
    if not rows:
        raise UserError(f"{source}: no rows in this file")
    return rows


def fingerprint(source: str) -> str:
    """The identity of the data: "sha256:..." of a local file, "hub:" and the revision for a hub id."""
    path = locate(source)
    if path is None:
        return f"hub:{hub_revision(source)}"
    reader_of(path, source)
    return f"sha256:{sha256(path)}"


def hold_out(
    n: int,
    *,
    fraction: float | None = None,
    count: int | None = None,
    seed: int,
    strata: Sequence[Any] | None = None,
) -> tuple[Indices, Indices]:
    """Split row indices 0..n-1 at random into (training, held out), both sorted.

    `fraction` or `count` says how many rows are held out. With `strata` (a value per row) every
    value gives its share, rounded by largest remainder, so that the total is exact; ties are
    broken by the seed.

    Raises UserError when either side would be empty.
    """
    if (fraction is None) == (count is None):
        raise UserError("hold out either a fraction of the rows or a count of rows, not both")
    if strata is not None and len(strata) != n:
        raise ValueError(f"strata has {len(strata)} values for {n} rows")
    if fraction is not None and not 0 < fraction < 1:
        raise UserError(f"the held-out fraction is {fraction}, expected between 0 and 1")
    held_count = round(fraction * n) if fraction is not None else int(count or 0)
    if not 0 < held_count < n:
        raise UserError(
            f"holding out {held_count} of {n} rows leaves nothing "
            f"{'to evaluate' if held_count <= 0 else 'to train on'}; "
            f"hold out between 1 and {n - 1}, or use more data"
        )
    names = [""] * n if strata is None else [str(value) for value in strata]
    _, group, sizes = np.unique(names, return_inverse=True, return_counts=True)
    rng = np.random.default_rng(seed)
    held = np.concatenate(
        [
            rng.permutation(np.flatnonzero(group == index))[:quota]
            for index, quota in enumerate(apportion(sizes, held_count, rng))
        ]
    )
    held.sort()
    return np.setdiff1d(np.arange(n), held), held


def apportion(sizes: NDArray[np.int64], total: int, rng: np.random.Generator) -> Indices:
    """Integers that sum to `total`, proportional to `sizes` by largest remainder."""
    # Exact integers: with floats, equal remainders would differ by rounding.
    quotas, remainders = np.divmod(sizes * total, sizes.sum())
    surplus = total - int(quotas.sum())
    order = np.lexsort((rng.random(len(sizes)), -remainders))
    quotas[order[:surplus]] += 1
    return quotas


# --- local files --------------------------------------------------------------------------------


def reader_of(path: Path, source: str) -> Callable[[Path, str, int | None], Rows]:
    if path.is_dir():
        files = sorted(entry.name for entry in path.iterdir() if file_kind(entry) in READERS)
        raise UserError(
            f"{source}: a folder; name one file in it"
            f"{' (' + ', '.join(files[:8]) + ')' if files else ', but it holds no data file'}"
        )
    kind = file_kind(path)
    if kind not in READERS:
        raise UserError(
            f"{source}: cannot read {kind or 'a file without an ending'}; "
            f"expected {', '.join(READERS)}, and .gz of the text formats"
        )
    return READERS[kind]


def file_kind(path: Path) -> str:
    """The file ending that names the format; ".gz" stays if the format inside cannot be unpacked."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower() if suffix == ".gz" else ""
    return inner if inner and inner != ".parquet" else suffix


def open_text(path: Path, newline: str | None = None) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def read_jsonl(path: Path, source: str, limit: int | None) -> Rows:
    # newline="\n": a line ends there alone, since other separators are legal inside JSON strings.
    with open_text(path, newline="\n") as file:
        return list(islice(json_lines(file, source), limit))


def json_lines(lines: Iterable[str], source: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            raise UserError(
                f"{source}: line {number} is not JSON ({error.msg} at column {error.colno}); "
                "expected one JSON object per line"
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{source}: line {number} is {json_type(row)}; expected one JSON object per line"
            )
        yield row


def read_json(path: Path, source: str, limit: int | None) -> Rows:
    with open_text(path) as file:
        text = file.read()
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; name it .jsonl if each line is an object" if error.msg == "Extra data" else ""
        raise UserError(
            f"{source}: not JSON at line {error.lineno}, column {error.colno} ({error.msg}){hint}"
        ) from error
    if not isinstance(rows, list):
        keys = f" with keys {', '.join(list(rows)[:8])}" if isinstance(rows, dict) else ""
        raise UserError(f"{source}: {json_type(rows)}{keys}; expected an array of objects")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(
                f"{source}: row {index} (counted from 0) is {json_type(row)}; expected an object"
            )
    return rows[:limit]


def json_type(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def read_csv(path: Path, source: str, limit: int | None) -> Rows:
    return read_delimited(path, source, limit, ",")


def read_tsv(path: Path, source: str, limit: int | None) -> Rows:
    return read_delimited(path, source, limit, "\t")


def read_delimited(path: Path, source: str, limit: int | None, delimiter: str) -> Rows:
    # The module refuses cells beyond 128 KiB, which long documents exceed; the limit is global.
    previous = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with open_text(path, newline="") as file:
            return list(islice(csv_rows(file, source, delimiter), limit))
    finally:
        csv.field_size_limit(previous)


def csv_rows(file: IO[str], source: str, delimiter: str) -> Iterator[dict[str, Any]]:
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            raise UserError(f"{source}: the header has column {repeated[0]!r} more than once")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{source}: the row that ends on line {reader.line_num} has {len(cells)} "
                    f"cells, but the header has {len(header)} ({', '.join(header[:8])})"
                )
            yield {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise UserError(f"{source}: bad quoting near line {reader.line_num} ({error})") from error


def read_parquet(path: Path, source: str, limit: int | None) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{source}: not a Parquet file ({error})") from error
    return table.slice(0, limit).to_pylist()


READERS: dict[str, Callable[[Path, str, int | None], Rows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}


# --- the hub ------------------------------------------------------------------------------------


def read_hub(source: str, split: str, limit: int | None) -> Rows:
    import datasets

    dataset = from_hub(
        source, lambda name, config: datasets.load_dataset(name, config, split=split)
    )
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    if not len(dataset):
        raise UserError(f"{source}: split {split!r} has no rows")
    return dataset.to_list()


def hub_revision(source: str) -> str:
    import datasets

    return from_hub(source, datasets.load_dataset_builder).hash or "unknown"


def from_hub(source: str, load: Callable[[str, str | None], T]) -> T:
    """`load(name, config)`. Raises UserError for an error between here and the hub."""
    from datasets.exceptions import DatasetsError

    name, _, config = source.partition(":")
    try:
        return load(name, config or None)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no file {source!r} here, and the hub dataset of that name cannot be loaded: "
            f"{' '.join(str(error).split())}"
        ) from error
