"""Functions of Python's standard library as data for a language model.

Every top-level function, and method of a top-level class, that has a docstring becomes a row
{"package", "name", "prompt", "completion"}: the prompt is its signature and docstring, the
completion the rest of its body. Rows come in the order of the source, so they are the same
whenever the interpreter is the same.

    python examples/stdlib_functions.py functions.jsonl --max-per-package 100
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGES = (
    "asyncio",
    "collections",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
)
COMPLETION_CHARACTERS = range(20, 1201)
MAX_PROMPT_CHARACTERS = 1600

Function = ast.FunctionDef | ast.AsyncFunctionDef
Row = dict[str, str]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, metavar="NAME")
    parser.add_argument("--max-per-package", type=int, metavar="N", help="N spread over the source")
    args = parser.parse_args(argv)
    if args.max_per_package is not None and args.max_per_package < 1:
        parser.error("--max-per-package must be at least 1")
    library = Path(sysconfig.get_paths()["stdlib"])
    try:
        tables = {
            name: spread(rows_of(library, name), args.max_per_package) for name in args.packages
        }
    except FileNotFoundError as error:
        parser.error(str(error))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8", newline="\n") as file:
        for rows in tables.values():
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for name, rows in tables.items():
        print(f"{name:<16}{len(rows):>6}")
    total = sum(map(len, tables.values()))
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"{'total':<16}{total:>6}  from Python {version} -> {args.out}")


def rows_of(library: Path, package: str) -> list[Row]:
    """All rows of one package (a folder or a single module), each different from the others."""
    root = library / package
    files = sorted(root.rglob("*.py")) if root.is_dir() else [root.with_suffix(".py")]
    rows: dict[tuple[str, str], Row] = {}
    for path in files:
        parts = path.relative_to(library).with_suffix("").parts
        if {"test", "tests"}.isdisjoint(parts):
            module = ".".join(part for part in parts if part != "__init__")
            for name, prompt, completion in functions(path.read_text(encoding="utf-8")):
                row = {"package": package, "name": f"{module}.{name}"}
                row |= {"prompt": prompt, "completion": completion}
                # Copies of one function must not end up on both sides of a held-out split.
                rows.setdefault((prompt, completion), row)
    return list(rows.values())


def spread(rows: list[Row], count: int | None) -> list[Row]:
    """At most `count` rows, evenly spaced."""
    if count is None or len(rows) <= count:
        return rows
    return [rows[index * len(rows) // count] for index in range(count)]


def functions(source: str) -> Iterator[tuple[str, str, str]]:
    """(qualified name, prompt, completion) of every suitable function in a source text."""
    tree = ast.parse(source)
    # Not splitlines(): it also splits at form feeds, which the parser does not.
    lines = [line + "\n" for line in source.split("\n")]
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for member in members:
            if isinstance(member, Function) and (halves := halve(member, lines)):
                yield prefix + member.name, *halves


def halve(node: Function, lines: list[str]) -> tuple[str, str] | None:
    """A function's text up to its docstring, and after it; None when it does not qualify."""
    if ast.get_docstring(node) is None or len(node.body) < 2:
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    middle = node.body[0].end_lineno or 0
    if node.body[1].lineno == middle:  # a statement on the docstring's last line
        return None
    prompt = unindent(lines[first - 1 : middle], node.col_offset)
    completion = unindent(lines[middle : node.end_lineno], node.col_offset).strip("\n")
    if len(prompt) > MAX_PROMPT_CHARACTERS or len(completion) not in COMPLETION_CHARACTERS:
        return None
    try:
        ast.parse(prompt + completion)
    except SyntaxError:  # text that moving to the margin breaks
        return None
    return prompt, completion


def unindent(lines: list[str], width: int) -> str:
    """Move lines `width` columns left; a line indented less (in a string) goes to the margin."""
    return "".join(line[width:] if not line[:width].strip() else line.lstrip() for line in lines)


if __name__ == "__main__":
    main()
