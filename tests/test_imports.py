"""The arrows of the design, read from the source: who may import whom.

`lora <- method <- methods <- server <- simulation <- {node, run} <- flower <- cli`; the rest are leaves or
sides with rules of their own. A module that no rule names is free.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedhl

SOURCE = Path(fedhl.__file__).parent

CORE = {"lora", "method", "methods", "payload", "weighting", "seeds", "subspace"}
ENGINES = {"server", "simulation", "flower", "run", "cli"}
FRONT = {"run", "cli"}

ONLY: dict[str, set[str]] = {
    # part -> the only parts of fedhl that it may import
    "errors": set(),
    "seeds": {"errors"},
    "weighting": {"errors"},
    "subspace": {"seeds"},
    "lora": {"seeds", "subspace"},
    "method": {"lora", "seeds"},
    "payload": {"lora", "method"},
    "message": set(),
    "robust": {"lora", "method"},
    "privacy": {"lora", "method", "robust"},
    "accounting": {"errors"},
    "methods": {"lora", "method", "weighting", "seeds", "subspace"},
    "catalogue": {"lora", "method", "methods", "weighting"},
    "tasks": {"seeds"},
    "participation": {"lora", "method", "seeds"},
    "channel": {"diagnostics", "lora", "method"},
    "diagnostics": {"lora", "method", "subspace"},
    "shelf": {"lora", "method"},
    "report": {"errors"},
}
NEVER: dict[str, set[str]] = {
    # part -> the parts of fedhl that it must not import
    "server": {"simulation", "flower"} | FRONT,
    "simulation": {"flower"} | FRONT,
    "node": {"flower"} | FRONT,
    "run": {"flower", "cli"},
    "flower": {"cli"},
    "training": ENGINES,
    "evaluation": ENGINES | CORE - {"lora", "seeds", "subspace"},  # knows nothing of federation
    "data": ENGINES,
    "locate": ENGINES,
    "model": ENGINES,
    "peft": ENGINES,
    "export": FRONT,
    "config": ENGINES,
    "checkpoint": {"simulation", "flower"} | FRONT,
    "wire": {"simulation", "flower"} | FRONT,
}
ONE_HOME = {"peft": "peft", "flwr": "flower", "dp_accounting": "accounting"}
"""Third-party package -> the one part that may import it."""


def part(module: str) -> str:
    """The part of the design a module belongs to: its first name below fedhl. `report_plots` is
    `report`: a part may spill over into files of its own name."""
    _, _, rest = module.partition(".")
    name = rest.split(".")[0]
    return "report" if name.startswith("report_") else name


def modules() -> dict[str, Path]:
    """Every module below src/fedhl by its dotted name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        names = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


MODULES = modules()
every_module = pytest.mark.parametrize("module", MODULES)


def imports(module: str) -> set[str]:
    """The dotted names a module imports, anywhere in it: at the top, in functions, for types only."""
    return imported(MODULES[module].read_text(encoding="utf-8"), module, MODULES)


def imported(source: str, module: str, known: dict[str, Path]) -> set[str]:
    package = (
        module if known.get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]
    )
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = package.split(".")
                above = above[: len(above) - node.level + 1]
                origin = ".".join([*above, *([node.module] if node.module else [])])
            # `from fedhl import server` names a module, `from fedhl.server import x` does not.
            for alias in node.names:
                whole = f"{origin}.{alias.name}"
                names.add(whole if whole in known else origin)
    return names


def inside(module: str) -> set[str]:
    """The parts of fedhl that a module imports, without its own; "" is the package itself."""
    own = {name for name in imports(module) if name.split(".")[0] == "fedhl"}
    return {part(name) for name in own} - {part(module)}


def outside(module: str) -> set[str]:
    """The third-party packages that a module imports."""
    tops = {name.split(".")[0] for name in imports(module)}
    return tops - set(sys.stdlib_module_names) - {"fedhl"}


@every_module
def test_arrows_point_one_way(module: str):
    reached = inside(module)
    if part(module) in ONLY:
        assert reached <= ONLY[part(module)], (
            f"{module} may import {ONLY[part(module)] or 'nothing'}"
        )
    assert not reached & NEVER.get(part(module), set())


@every_module
def test_nobody_imports_the_command_line(module: str):
    if part(module) != "__main__":
        assert "cli" not in inside(module)


@every_module
def test_third_party_packages_have_one_home(module: str):
    for package, home in ONE_HOME.items():
        assert package not in outside(module) or part(module) == home, (
            f"only fedhl/{home} imports {package}"
        )


@every_module
def test_the_maths_needs_torch_alone(module: str):
    if part(module) in CORE | {"catalogue"}:
        assert outside(module) <= {"torch"}


def test_reports_read_files_only():
    for module in MODULES:
        if part(module) == "report":
            assert outside(module) <= {"matplotlib", "rich"}, f"{module} only reads files and draws"


def test_every_part_of_the_maths_exists():
    """A rule about a module that was renamed would be a rule about nothing."""
    assert {part(module) for module in MODULES} >= CORE | {"errors"}


def test_the_reader_sees_every_way_to_import():
    known = {name: Path() for name in ("fedhl", "fedhl.server", "fedhl.data.loading")}
    known["fedhl.data"] = Path("__init__.py")
    for source, want in {
        "import fedhl.server": {"fedhl.server"},
        "from fedhl import server, LoRA": {"fedhl.server", "fedhl"},
        "from fedhl.server import x": {"fedhl.server"},
        "def f():\n    import peft.tuners": {"peft.tuners"},
        "from ..server import x": {"fedhl.server"},
        "from .. import server": {"fedhl.server"},
        "from . import x": {"fedhl.data"},
    }.items():
        assert imported(source, "fedhl.data.loading", known) == want, source
    assert imported("from .loading import x", "fedhl.data", known) == {"fedhl.data.loading"}


def test_import_fedhl_is_light():
    """`import fedhl` brings torch and no other big library."""
    heavy = ["transformers", "peft", "flwr", "datasets", "pydantic", "matplotlib", "typer", "rich"]
    code = f"import sys, fedhl; print('torch' in sys.modules, set({heavy!r}) & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True set()"
