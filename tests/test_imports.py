"""The arrows of the design, read from the source: who may import whom.

Eight layers, each of which imports only from those below it and from its own. Parts of one layer may
import each other, but in no circle. `report` stands beside them: it reads files, and knows nothing of fedhl
but the ground floor.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import fedhl

SOURCE = Path(fedhl.__file__).parent

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "lazy", "seeds", "names", "files", "watch", "record", "strict", "locate"}),
    frozenset({"lora", "subspace", "weighting", "weightings", "method"}),
    frozenset({"methods", "server", "shelf", "task"}),
    frozenset({"config"}),
    frozenset({"data", "model"}),
    frozenset({"federation", "export"}),
    frozenset({"run", "network"}),
    frozenset({"flower", "compare", "bench", "demo", "draft", "cli", "__main__"}),
)
"""The parts of the source, from the ground up: modules and packages directly below fedhl."""
BESIDE = frozenset({"report"})
"""Parts that import only from the ground floor, and that any layer may import."""
TORCH_ALONE = frozenset(
    {"lazy", "seeds", "lora", "subspace", "weighting", "weightings", "method", "methods"}
)
"""Parts that import nothing from elsewhere but torch."""
ONE_HOME = {
    **{"peft": "model", "flwr": "flower", "dp_accounting": "server.accounting"},
    "lm_eval": "run.harness",
    **dict.fromkeys(("tensorboard", "wandb", "mlflow"), "run.trackers"),
}
"""Third-party package -> the one part, or module, that may import it."""


def part(module: str) -> str:
    """The part of the design a module belongs to: its first name below fedhl; "" is the package itself."""
    return module.partition(".")[2].split(".")[0]


def modules() -> dict[str, Path]:
    """Every module below src/fedhl by its dotted name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        names = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


MODULES = modules()
every_module = pytest.mark.parametrize("module", MODULES)


@cache  # many tests ask about the same module
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


def beyond(part: str) -> frozenset[str]:
    """The parts that `part` must not import: of the layers above its own."""
    if part in BESIDE:
        return frozenset().union(*LAYERS[1:])
    level = next(k for k, layer in enumerate(LAYERS) if part in layer)
    return frozenset().union(*LAYERS[level + 1 :])


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """The names along one circle of the graph; [] if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@every_module
def test_arrows_point_one_way(module: str):
    if part(module):  # the package itself has the public names
        assert not inside(module) & beyond(part(module))


def test_no_part_imports_itself_by_way_of_others():
    graph = {name: set[str]() for name in map(part, MODULES) if name}
    for module in MODULES:
        if part(module):
            graph[part(module)] |= inside(module) - {""}
    assert circles(graph) == []


def test_no_module_imports_itself_by_way_of_others():
    """Imports in functions and for types count, too: who needs them has a place that is not right."""
    graph = {module: (imports(module) & MODULES.keys()) - {module, "fedhl"} for module in MODULES}
    assert circles(graph) == []


def test_a_circle_is_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circles({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


def test_every_part_has_one_layer_and_every_layer_its_parts():
    named = [*BESIDE, *(name for layer in LAYERS for name in layer)]
    assert sorted(named) == sorted({part(module) for module in MODULES} - {""})


@every_module
def test_third_party_packages_have_one_home(module: str):
    for package, home in ONE_HOME.items():
        there = module == f"fedhl.{home}" or module.startswith(f"fedhl.{home}.")
        assert there or package not in outside(module), f"only fedhl.{home} imports {package}"


@pytest.mark.parametrize(("package", "home"), ONE_HOME.items())
def test_every_home_is_lived_in(package: str, home: str):
    at_home = [m for m in MODULES if m == f"fedhl.{home}" or m.startswith(f"fedhl.{home}.")]
    assert any(package in outside(module) for module in at_home)


@every_module
def test_the_maths_needs_torch_alone(module: str):
    if part(module) in TORCH_ALONE:
        assert outside(module) <= {"torch"}


def test_every_part_of_the_maths_exists():
    """A rule about a module that was renamed would be a rule about nothing."""
    assert {part(module) for module in MODULES} >= TORCH_ALONE


def test_reports_read_files_only():
    """A page is made of files: from fedhl it needs what reads them, and else what draws and lays out."""
    for module in MODULES:
        if part(module) in BESIDE:
            assert inside(module) <= {"errors", "names", "files", "watch", "record"}, module
            assert outside(module) <= {"matplotlib", "rich", "jinja2", "markupsafe"}, module


def test_statistics_know_nothing_of_pages():
    of_numbers = {"fedhl.report.files"}
    own = {name for name in imports("fedhl.report.statistics") if name.startswith("fedhl")}
    assert own <= of_numbers and outside("fedhl.report.statistics") == set()


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


HEAVY = {
    *("torch", "numpy", "transformers", "peft", "flwr", "datasets", "safetensors"),
    *("pydantic", "matplotlib", "typer", "rich"),
}


def test_import_fedhl_is_light():
    """`import fedhl` brings no big library; a public name brings torch (which brings NumPy) and no other."""
    steps: list[tuple[str, set[str]]] = [
        # in one process, since each that has torch takes seconds
        ("import fedhl; fedhl.__version__, dir(fedhl), fedhl.__all__", set()),
        ("'fedhl' in fedhl.METHODS, list(fedhl.WEIGHTINGS)", set()),
        ("from fedhl import LoRA", {"torch", "numpy"}),
        ("fedhl.METHODS['fedhl'], fedhl.WEIGHTINGS['norm']", {"torch", "numpy"}),
        ("from fedhl import *", {"torch", "numpy"}),
    ]
    show = f"import sys; print(sorted({HEAVY!r} & set(sys.modules)))"
    code = "\n".join(line for step, _ in steps for line in (step, show))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for (step, brought), said in zip(steps, run.stdout.splitlines(), strict=True):
        assert said == str(sorted(brought)), step


@pytest.mark.parametrize("name", ["fedhl", "fedhl.run", "fedhl.compare", "fedhl.export"])
def test_lazy_names_are_there(name: str):
    package = import_module(name)
    for public in package.__all__:
        assert getattr(package, public) is not None and public in dir(package)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nonsense'"):
        _ = package.nonsense
    with pytest.raises(ImportError):
        exec(f"from {name} import nonsense")
