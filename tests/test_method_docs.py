"""The docs on methods are true: the tables are generated, the example is run."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import contract

import docs
from fedhl import LAWS, METHODS, WEIGHTINGS, Method, get_method

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def test_the_tables_are_those_of_the_methods():
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert page == docs.with_methods(page), "write it anew: make docs"


def test_every_method_and_weighting_is_described():
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    prose = page[: page.index(BEGIN)] + page[page.index(END) :]
    for name in (*METHODS, *WEIGHTINGS):
        assert f"`{name}`" in prose, f"docs/methods.md does not describe {name}"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_described_with_its_paper(name: str):
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if re.match(rf"(\||-) `{name}` ", line)]
    assert any(METHODS[name].reference.name in line for line in lines)


# Links and the worked example


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
    contract.check_start(example)
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
