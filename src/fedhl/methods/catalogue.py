"""The methods and their costs as tables, from class attributes, traffic and docstrings.

`fedhl methods` prints them and docs/methods.md holds them. A method's docstring has paragraphs that
begin with the words in `SECTIONS`, each on a line of its own; the tables show their first
sentence.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from fedhl.lora import initial
from fedhl.method import LAWS, Method, Traffic, flatten
from fedhl.methods import METHODS
from fedhl.names import unknown
from fedhl.weighting import WEIGHTINGS

SECTIONS = ("Cost", "Client", "Nearest neighbour", "Limitation")

MODELS: dict[str, list[tuple[int, int]]] = {
    "MiniLM-L6": 6 * 2 * [(384, 384)],
    "SmolLM2-135M": 30
    * [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)],
}
"""The shapes (m, n) of the adapted matrices of two real models: query and value of 6 layers; q, k,
v, o, gate, up and down of 30 layers."""
RANK = 8
COHORT = (4, 4, 4, 4, 8, 8, 16, 16, 32, 64)
"""The client whose traffic is shown, and the ranks of its cohort."""

SHEETS: dict[str, tuple[str, ...]] = {
    "Laws and weights": ("method", "idea", "mixed ranks", *LAWS, "weighting"),
    "Traffic": (
        *("method", "numbers down", "numbers up"),
        *(f"{model} MiB {way}" for model in MODELS for way in ("down", "up")),
    ),
    "Cost": ("method", "state", "server work", "client", "hyperparameters"),
}
"""Title -> columns, each of them a fact of `Row`."""
NOTES = {
    "Laws and weights": (
        "idea: `fedhl methods NAME` prints it in full. weighting: the weighting of its paper, which a run "
        "takes if its config names none."
    ),
    "Traffic": (
        "Per client and round. Numbers are of one layer of shape (m, n): r is the client's rank, "
        "R_c the largest and Σr the sum of the cohort's. MiB are of float32 and of all adapted layers "
        "(MiniLM-L6: query and value; SmolLM2-135M: all linear layers), for a client of rank "
        f"{RANK} in a cohort of ranks {', '.join(map(str, COHORT))}; for methods without mixed "
        f"ranks, in one of {len(COHORT)} clients of rank {RANK}. `florist` downloads less, depending on "
        "the data: the figure is its upper bound."
    ),
    "Cost": (
        "state: the matrices of one layer that the server keeps between rounds, as they are "
        "before round 1, with R its top rank. server work: per layer and round. client: what it keeps "
        "between rounds, and what it gets in addition to its adapter."
    ),
}


@dataclass(frozen=True)
class Row:
    """One method: `facts` maps each column of `SHEETS` to text; `mib` is its traffic per model."""

    name: str
    facts: dict[str, str]
    mib: dict[str, Traffic]


def rows() -> list[Row]:
    """One row per method of METHODS. Raises ValueError for a docstring without a section."""
    return [row(name) for name in METHODS]


def row(name: str) -> Row:
    """The row of one method. Raises ValueError for a docstring without a section."""
    cls = METHODS[name]
    method: Method[Any] = cls()
    for title in SECTIONS:
        section(cls, title)
    mib = {model: mebibytes(method, shapes) for model, shapes in MODELS.items()}
    sizes = {
        f"{model} MiB {way}": size(getattr(traffic, way))
        for model, traffic in mib.items()
        for way in ("down", "up")
    }
    facts = {
        "method": name,
        "idea": idea(cls),
        "mixed ranks": yes(cls.mixed_ranks),
        **{law: yes(law in cls.laws) for law in LAWS},
        "weighting": cls.weighting,
        "numbers down": cls.formula.down,
        "numbers up": cls.formula.up,
        **sizes,
        "state": state_of(method),
        "server work": sentence(section(cls, "Cost")),
        "client": sentence(section(cls, "Client")),
        "hyperparameters": hyperparameters(cls),
    }
    return Row(name, facts, mib)


def markdown() -> str:
    """All sheets for a page of the docs: per sheet a title, its note and its table."""
    made = rows()
    parts = []
    for title, columns in SHEETS.items():
        lines = [columns, ["---"] * len(columns)]
        for one in made:
            _, *cells = (one.facts[column].replace("|", "\\|") for column in columns)
            lines.append([f"`{one.name}`", *cells])
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"### {title}\n\n{NOTES[title]}\n\n{table}")
    return "\n\n".join(parts)


def weighting(name: str) -> dict[str, str]:
    """The facts of one weighting."""
    cls = WEIGHTINGS[name]
    return {"weighting": name, "idea": idea(cls), "hyperparameters": hyperparameters(cls)}


def describe(name: str) -> str:
    """The full description of one method or weighting.

    Raises ValueError for an unknown name, suggesting the nearest.
    """
    if name in METHODS:
        cls = METHODS[name]
        source = {"reference": f"{cls.reference.name}, {cls.reference.url}"}
        facts = source | row(name).facts
        facts |= {law: f"{facts[law]:<4} {meaning}" for law, meaning in LAWS.items()}
        kind, doc, note = "method", inspect.getdoc(METHODS[name]), [NOTES["Traffic"]]
    elif name in WEIGHTINGS:
        facts, note = weighting(name), []
        kind, doc = "weighting", inspect.getdoc(WEIGHTINGS[name])
    else:
        raise ValueError(unknown("method or weighting", name, [*METHODS, *WEIGHTINGS]))
    for said in (kind, "idea", "server work", "client"):  # in full, in the docstring
        facts.pop(said, None)
    width = max(map(len, facts))
    lines = [f"{column:<{width}}  {value}" for column, value in facts.items()]
    return "\n\n".join([f"{kind}: {name}", doc or "", "\n".join(lines), *note])


# --- text ---------------------------------------------------------------------------------------


def idea(cls: type[Any]) -> str:
    """The first line of the docstring."""
    return (cls.__doc__ or "").strip().splitlines()[0]


def section(cls: type[Any], title: str) -> str:
    """The paragraph of the docstring that begins with `title:`, on one line and without the title.

    It ends at an empty line or where the next section begins. Raises ValueError if there is none.
    """
    end = "|".join(SECTIONS)
    found = re.search(
        rf"^{title}:(.*?)(?=\n\s*\n|\n(?:{end}):|\Z)", inspect.getdoc(cls) or "", re.M | re.S
    )
    if found is None or not found[1].strip():
        raise ValueError(f"the docstring of {cls.__name__} has no line that begins with '{title}:'")
    return " ".join(found[1].split())


def sentence(text: str) -> str:
    """The first sentence, without its full stop."""
    return re.split(r"(?<!e\.g)(?<!i\.e)\.(?= |$)", text, maxsplit=1)[0]


def hyperparameters(cls: type[Any]) -> str:
    """`name=default, ...`, or a dash."""
    named = (
        f.name if f.default is MISSING else f"{f.name}={f.default}" for f in fields(cls) if f.init
    )
    return ", ".join(named) or "-"


def yes(value: bool) -> str:
    return "yes" if value else "no"


def size(mebibytes: float) -> str:
    """Three digits, or all digits before the point."""
    return f"{mebibytes:.0f}" if mebibytes >= 100 else f"{mebibytes:.3g}"


# --- numbers ------------------------------------------------------------------------------------


def mebibytes(method: Method[Any], shapes: Sequence[tuple[int, int]]) -> Traffic:
    """Float32 MiB of one round of a client of rank RANK, in COHORT, or among clients of its own rank."""
    cohort = COHORT if method.mixed_ranks else len(COHORT) * (RANK,)
    each = [method.traffic(m, n, RANK, cohort) for m, n in shapes]
    down, up = (4 / 2**20 * sum(numbers) for numbers in zip(*each, strict=True))
    return Traffic(down, up)


def state_of(method: Method[Any]) -> str:
    """The matrices of the method's first state, with their shapes in letters."""
    m, n, R = 61, 43, 5
    letters = {m: "m", n: "n", R: "R", 2 * R: "2 R"}
    held = flatten(method.init(initial(m, n, R, 1.0, seed=0)))
    return ", ".join(
        f"{name} ({', '.join(letters.get(size, str(size)) for size in tensor.shape)})"
        for name, tensor in held.items()
        if tensor.numel() > 1
    )
