"""README and docs say what is so: examples run, links lead somewhere, the config reference is complete.

`python tests/test_docs.py --write` writes docs/config.md anew.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedhl.config import Config, LoRAConfig, load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/CARD.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))

INTRODUCTION = """# Configuration

A run is one YAML file. Unknown keys are errors; `--set key.sub=value` on the command line changes any key.
`fedhl check` shows what a config amounts to. Required keys have no default. `make docs` writes this page from
the code.
"""


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every group of settings below `model`, with the key that leads there, in order."""
    yield path, model
    for name, field in model.model_fields.items():
        key = f"{path}.{name}" if path else name
        for member in members(field.annotation):
            yield from sections(member, key)


def members(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation] if annotation.model_fields.keys() != {"name"} else []
    return [member for part in get_args(annotation) for member in members(part)]


def type_name(annotation: Any) -> str:
    """A type as a user would say it."""
    text = str(annotation) if not isinstance(annotation, type) else annotation.__name__
    choices = re.findall(r"Literal\[([^\]]*)\]", text)
    if choices:
        text = " or ".join(choice.replace("'", "").replace(", ", " / ") for choice in choices)
        return text + (" or a list" if "list" in str(annotation) else "")
    if members(annotation):
        return "see below"
    if text.startswith("dict"):
        return "mapping"
    names = {"int": "whole number", "float": "number", "str": "text", "bool": "true / false"}
    found = [
        names[kind] for kind in ("bool", "int", "float", "str") if re.search(rf"\b{kind}\b", text)
    ]
    found += [word for kind, word in (("list", "list"), ("dict", "mapping")) if kind in text]
    return " or ".join(found) or "name, or {name: ..., its hyperparameters}"


def default(model: type[BaseModel], name: str) -> str:
    field = model.model_fields[name]
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump(
            exclude_none=True, exclude_defaults="name" not in value.model_dump()
        )
        return f"`{value.get('name', value) or 'as below'}`".replace("`as below`", "as below")
    return (
        f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"
    )


def meaning(field: FieldInfo) -> str:
    """The help of a setting; of a group without one, that of its section."""
    (section, *others) = members(field.annotation) or [None]
    inherited = section.__doc__ if section is not None and not others else None
    return " ".join((field.description or inherited or "").split()).replace("|", "\\|")


def config_page() -> str:
    lines = [INTRODUCTION]
    for path, model in sections(Config):
        kind = model.model_fields.get("kind")
        title = path or "top level"
        if kind is not None:
            title += f" (kind: {get_args(kind.annotation)[0]})"
        lines.append(f"## {title}\n")
        if model.__doc__ and model.__doc__ != BaseModel.__doc__ and path:
            lines.append(f"{model.__doc__.strip()}\n")
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            lines.append(
                f"| `{name}` | {type_name(field.annotation)} | {default(model, name)} | {meaning(field)} |"
            )
        lines.append("")
    return "\n".join(lines)


def test_the_config_reference_is_what_the_code_says() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == config_page(), "write it anew: make docs"


def test_every_setting_is_explained() -> None:
    for path, model in sections(Config):
        for name, field in model.model_fields.items():
            assert meaning(field) or name == "kind", f"{path}.{name} has no help"


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "64, 48" in capsys.readouterr().out


def test_the_tree_of_the_readme_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme[readme.index("```\nsrc/fedhl/") :]
    for path in (ROOT / "src" / "fedhl").glob("*"):
        if path.name not in ("__init__.py", "py.typed", "__pycache__"):
            assert path.name in tree, f"README's tree does not name {path.name}"


CONFIGS = [*sorted((ROOT / "configs").glob("*.yaml")), ROOT / "examples/deployment/own-data.yaml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_configs_are_valid(path: Path) -> None:
    assert isinstance(load_config(path).lora, LoRAConfig)


def test_the_config_of_the_readme_is_valid(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "my.yaml").name == "my-run"


if __name__ == "__main__" and "--write" in sys.argv:
    (ROOT / "docs" / "config.md").write_text(config_page(), encoding="utf-8")
