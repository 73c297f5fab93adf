"""Readers of local files with rows. Whatever is wrong in a file, they say where."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from fedhl.errors import UserError, in_one_line
from fedhl.names import listed
from fedhl.task.rows import Row, Rows

logger = logging.getLogger(__name__)

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


class File(NamedTuple):
    """A file to read: `source` is its name in messages, `encoding` that of its text, `limit` the most rows
    that are read."""

    path: Path
    source: str
    limit: int | None
    encoding: str


def read_file(path: Path, source: str, limit: int | None, encoding: str) -> Rows:
    """The rows of a file. Raises UserError, with the line or the row, for whatever is wrong with it."""
    file, read = File(path, source, limit, encoding), reader_of(path, source)
    try:
        try:
            return read(file)
        except UnicodeError as error:
            raise UserError(not_text(file, error)) from error
    except UserError:
        raise
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{source}: a damaged gzip file ({error}); fetch it again") from error
    except Exception as error:  # the libraries raise nearly everything here
        raise UserError(f"{source}: cannot be read ({in_one_line(error)})") from error


def reader_of(path: Path, source: str) -> Callable[[File], Rows]:
    if path.is_dir():
        files = sorted(entry.name for entry in path.iterdir() if file_kind(entry) in READERS)
        raise UserError(
            f"{source}: a folder; name one file in it"
            f"{' (' + listed(files) + ')' if files else ', but it holds no data file'}"
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


# --- text ---------------------------------------------------------------------------------------


def open_text(file: File, newline: str | None = None) -> IO[str]:
    # "utf-8-sig" leaves out a byte order mark; "utf-16" and "utf-32" do so by themselves.
    encoding = "utf-8-sig" if is_utf8(file.encoding) else file.encoding
    open_any = gzip.open if file.path.suffix.lower() == ".gz" else open
    return open_any(file.path, "rt", encoding=encoding, newline=newline)


def is_utf8(encoding: str) -> bool:
    return encoding.lower().replace("_", "-") in ("utf-8", "utf8")


def not_text(file: File, error: UnicodeError) -> str:
    """What is said of a file that is not text in `data.encoding`: the line and the byte."""
    data = file.path.read_bytes()
    if file.path.suffix.lower() == ".gz":
        data = gzip.decompress(data)
    where = "not"
    try:
        data.decode(file.encoding)
    except UnicodeDecodeError as found:
        error = found
        with suppress(UnicodeError):
            line = data[: found.start].decode(file.encoding).count("\n") + 1
            where = f"line {line} is not"
    except UnicodeError as found:
        error = found
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) and is_utf8(file.encoding):
        advice = "the file begins as one in UTF-16 does: set data.encoding: utf-16"
    else:
        advice = "set data.encoding to the encoding of the file, often cp1252, or convert the file to UTF-8"
    name = "UTF-8" if is_utf8(file.encoding) else file.encoding
    return f"{file.source}: {where} {name} text ({in_one_line(error)}); {advice}"


# --- JSON ---------------------------------------------------------------------------------------


def read_jsonl(file: File) -> Rows:
    # newline="\n": a line ends there alone, since other separators are legal inside JSON strings.
    with open_text(file, newline="\n") as lines:
        return list(islice(json_lines(lines, file.source), file.limit))


def json_lines(lines: Iterable[str], source: str) -> Iterator[Row]:
    count = 0
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text.rstrip(), object_pairs_hook=unique)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{source}: line {line} is not JSON ({error.msg} at column {error.colno}); "
                "expected one JSON object per line"
            ) from error
        except (
            ValueError,
            RecursionError,
        ) as error:  # a number of too many digits, too many brackets
            raise UserError(
                f"{source}: line {line} cannot be read ({in_one_line(error)})"
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"{source}: line {line} is {json_type(row)}; expected one JSON object per line"
            )
        yield Row(row, count, line)
        count += 1


def read_json(file: File) -> Rows:
    source = file.source
    with open_text(file) as whole:
        text = whole.read()
    if not text.strip():
        return []
    try:
        rows = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        hint = "; name it .jsonl if each line is an object" if error.msg == "Extra data" else ""
        raise UserError(
            f"{source}: not JSON at line {error.lineno}, column {error.colno} ({error.msg}){hint}"
        ) from error
    if not isinstance(rows, list):
        keys = f" with keys {listed(rows)}" if isinstance(rows, dict) else ""
        raise UserError(f"{source}: {json_type(rows)}{keys}; expected an array of objects")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(
                f"{source}: row {index} (counted from 0) is {json_type(row)}; expected an object"
            )
    return [Row(row, number) for number, row in enumerate(rows[: file.limit])]


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values. Raises ValueError if a key stands twice: Python would keep the
    last value and drop the others without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = Counter(key for key, _ in pairs)
        raise ValueError(
            f"the key {max(seen, key=seen.__getitem__)!r:.40} stands twice in one object"
        )
    return found


def json_type(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


# --- CSV ----------------------------------------------------------------------------------------


def read_csv(file: File) -> Rows:
    return read_delimited(file, ",")


def read_tsv(file: File) -> Rows:
    return read_delimited(file, "\t")


def read_delimited(file: File, expected: str) -> Rows:
    # The module refuses cells beyond 128 KiB, which long documents exceed; the limit is global.
    previous = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with open_text(file, newline="") as lines:
            delimiter = delimiter_of(lines.readline(), expected)
        if delimiter != expected:
            logger.info("%s: its columns are parted by %s", file.source, DELIMITERS[delimiter])
        with open_text(file, newline="") as lines:
            return list(islice(csv_rows(lines, file.source, delimiter), file.limit))
    finally:
        csv.field_size_limit(previous)


def delimiter_of(header: str, expected: str) -> str:
    """What parts the columns of a header: the expected character, or if that gives one column, another."""
    for delimiter in (expected, *DELIMITERS):
        if len(next(csv.reader([header], delimiter=delimiter), ())) > 1:
            return delimiter
    return expected


def csv_rows(lines: IO[str], source: str, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    count = 0
    try:
        header = next(reader, [])
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            raise UserError(f"{source}: the header has column {repeated[0]!r} more than once")
        begin = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise UserError(
                    f"{source}: the row that ends on line {reader.line_num} has {len(cells)} "
                    f"cells, but the header has {len(header)} ({listed(header)})"
                )
            if cells:
                fields = {name: cell or None for name, cell in zip(header, cells, strict=True)}
                yield Row(fields, count, begin)
                count += 1
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{source}: bad quoting near line {reader.line_num} ({error})") from error


# --- Parquet ------------------------------------------------------------------------------------


def read_parquet(file: File) -> Rows:
    import pyarrow
    import pyarrow.parquet

    source = file.source
    try:
        table = pyarrow.parquet.ParquetFile(file.path).read()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{source}: not a Parquet file ({in_one_line(error)})") from error
    table, names = table.slice(0, file.limit), table.column_names
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{source}: the file has column {repeated[0]!r} more than once")
    columns = [cells_of(table[name], name, source) for name in names]
    return [
        Row(zip(names, cells, strict=True), number)
        for number, cells in enumerate(zip(*columns, strict=True))
    ]


def cells_of(column: Any, name: str, source: str) -> list[Any]:
    """The values of a column as Python has them. Raises UserError for one that Python cannot hold."""
    try:
        return column.to_pylist()
    except Exception:  # a date after the year 9999, a time zone that is not known
        for number, cell in enumerate(column):
            try:
                cell.as_py()
            except Exception as error:
                raise UserError(
                    f"{source}: row {number} (counted from 0): the {column.type} in {name!r} cannot be read "
                    f"({in_one_line(error)}); correct the value, or leave the column out of the file"
                ) from error
        raise


READERS: dict[str, Callable[[File], Rows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}
