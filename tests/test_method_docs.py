"""The docs on methods are true: the table is generated, the example is run.

`python tests/test_method_docs.py --write` writes the table of docs/methods.md again.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import test_contract as contract
import torch

from fedhl import LAWS, METHODS, WEIGHTINGS, Method, get_method
from fedhl.lora import initial
from fedhl.method import flatten

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
REGENERATE = "python tests/test_method_docs.py --write"


# The table, from the methods themselves


def table() -> str:
    """One row per method: its ranks, its laws, its state, its traffic."""
    header = ["method", "mixed ranks", *LAWS, "state", "numbers down", "numbers up"]
    rows = [header, ["---"] * len(header)]
    for name, cls in METHODS.items():
        method = cls()
        laws = ["yes" if law in cls.laws else "no" for law in LAWS]
        ranks = "yes" if cls.mixed_ranks else "no"
        traffic = [formula(method, way) for way in ("down", "up")]
        rows.append([f"`{name}`", ranks, *laws, state_of(method), *traffic])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def state_of(method: Method[Any]) -> str:
    """What it remembers, with the shapes in letters."""
    m, n, R = 11, 7, 5
    letters = {m: "m", n: "n", R: "R"}
    state = method.init(initial(m, n, R, 1.0, seed=0))
    return ", ".join(
        f"{name} ({', '.join(letters[size] for size in tensor.shape)})" if tensor.ndim else name
        for name, tensor in flatten(state).items()
    )


def formula(method: Method[Any], way: str) -> str:
    """`traffic` as a formula: the polynomial in m, n, r and Σr that agrees with it everywhere we look."""
    names = ["mn", "rm", "rn", "Σr m", "Σr n", "r", "Σr", "r²", "1"]
    sizes, counts = [], []
    for m, n in ((11, 7), (5, 13), (31, 17), (8, 8)):
        for cohort in ([2, 5], [3, 3, 3], [1, 4, 5, 2], [5]):
            if not method.mixed_ranks and len(set(cohort)) > 1:
                continue
            for r in set(cohort):
                S = sum(cohort)
                sizes.append([m * n, r * m, r * n, S * m, S * n, r, S, r * r, 1])
                counts.append(getattr(method.traffic(m, n, r, cohort), way))
    x, y = (torch.tensor(v, dtype=torch.float64) for v in (sizes, counts))
    # The fewest terms that fit: at equal ranks Σr is a multiple of r, and more would be ambiguous.
    for columns in chain.from_iterable(combinations(range(len(names)), k) for k in range(4)):
        part = x[:, columns]
        coefficients = torch.linalg.lstsq(part, y[:, None], driver="gelsd").solution.flatten()
        whole = coefficients.round()
        if torch.equal(part @ whole, y) and bool((whole != 0).all()):
            return text(dict(zip([names[c] for c in columns], whole.int().tolist(), strict=True)))
    raise AssertionError(
        f"{method}: traffic {way} is not a polynomial of {names}; extend `formula`"
    )


def text(terms: dict[str, int]) -> str:
    """`{"rm": 1, "rn": 1}` as "r (m + n)"."""
    for prefix in ("r", "Σr "):
        both = terms.get(f"{prefix}m"), terms.get(f"{prefix}n")
        if both[0] is not None and both[0] == both[1]:
            terms = {k: v for k, v in terms.items() if k not in (f"{prefix}m", f"{prefix}n")}
            terms[f"{prefix.strip()} (m + n)"] = both[0]
    return " + ".join(k if v == 1 else f"{v} {k}" for k, v in terms.items()) or "0"


def written(page: str) -> str:
    """The page with the table of now between its markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def test_the_table_is_that_of_the_methods():
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert page == written(page), f"docs/methods.md is out of date; run: {REGENERATE}"


def test_every_method_and_weighting_is_described():
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    prose = page[: page.index(BEGIN)] + page[page.index(END) :]
    for name in (*METHODS, *WEIGHTINGS):
        assert f"`{name}`" in prose, f"docs/methods.md does not describe {name}"


# Links and the worked example


@pytest.mark.parametrize("page", ["maths.md", "methods.md", "adding-a-method.md"])
def test_links_lead_somewhere(page: str):
    source = (DOCS / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", source):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        there = DOCS / (name or page)
        assert there.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {h.lower().replace(" ", "-") for h in headings}, f"{page}: {target}"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Method[Any]]:
    """The method of docs/adding-a-method.md, imported by name as a user would."""
    page = (DOCS / "adding-a-method.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "tail_decay.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield get_method("tail_decay:TailDecay", rate=0.05)
    sys.modules.pop("tail_decay")


def test_the_example_fulfils_the_contract(example: Method[Any], tmp_path: Path):
    for law in LAWS:
        contract.check_law(example, law)
    for check in contract.UNIVERSAL:
        check(example)
    contract.check_round_trip(example, tmp_path)


def test_the_example_without_decay_is_fedhl(example: Method[Any]):
    plain = type(example)(rate=0.0)  # type: ignore[call-arg]
    for s in contract.scenarios(plain):
        one, two = (m.aggregate(s.state, s.updates).W for m in (plain, METHODS["fedhl"]()))
        assert float((one - two).norm()) <= 2 * contract.tolerance(s, one)


def test_the_example_refuses_a_wrong_hyperparameter(example: Method[Any]):
    with pytest.raises(ValueError, match="rate must be in"):
        get_method("tail_decay:TailDecay", rate=2.0)
    with pytest.raises(ValueError, match="no hyperparameter 'decay'; it has: rate"):
        get_method("tail_decay:TailDecay", decay=0.1)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {REGENERATE}")
    target = DOCS / "methods.md"
    target.write_text(written(target.read_text(encoding="utf-8")), encoding="utf-8")
