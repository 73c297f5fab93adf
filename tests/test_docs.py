"""README and docs say what is so: examples run, links lead somewhere, the config reference is complete."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import config_page
import config_schema
import jsonschema
import pytest
import result_tables
import yaml
from pydantic import Field, PositiveInt

import docs
import experiments
from fedhl.config import Config, load_config
from fedhl.config.conduct import TasksConfig
from fedhl.config.inputs import LoRAConfig
from fedhl.config.text import ConfigLoader
from fedhl.methods import METHODS
from fedhl.strict import help_of

ROOT = Path(__file__).resolve().parent.parent
DEPLOYMENT = ROOT / "examples" / "deployment"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/CARD.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))

# --- the config reference -----------------------------------------------------------------------


def test_the_config_reference_is_what_the_code_says() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == config_page.config_page(), "write it anew: make docs"
    schema = (ROOT / "docs" / "config.schema.json").read_text(encoding="utf-8")
    assert schema == config_schema.config_schema(), "write it anew: make docs"


def test_every_setting_is_explained() -> None:
    for path, model in config_page.sections(Config):
        assert model.__doc__, f"{path} has no help"
        help = help_of(model)
        for name, field in model.model_fields.items():
            text = config_page.meaning(field, help.get(name))
            assert text or name == "kind", f"{path}.{name} has no help"


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        (bool, "true / false"),
        (PositiveInt | None, "whole number"),
        (Annotated[float, Field(gt=0)] | str, "number or text"),
        (Literal["a", "b"] | list[str] | None, "a / b or list"),
        (dict[str, Annotated[list[str], Field(min_length=1)]], "mapping"),
        (TasksConfig | None, "settings below"),
        (LoRAConfig.model_fields["ranks"].annotation, "whole number or list or settings below"),
        (Config.model_fields["weighting"].annotation, "name, or {name: ..., its hyperparameters}"),
    ],
)
def test_types_are_named_as_a_user_would(annotation: Any, said: str) -> None:
    assert config_page.type_name(annotation) == said


def test_a_type_without_a_word_is_an_error() -> None:
    with pytest.raises(TypeError, match="no word for the type"):
        config_page.type_name(list[str] | bytes)


def test_defaults_are_yaml() -> None:
    fields = Config.model_fields | LoRAConfig.model_fields
    found = {name: config_page.default(field) for name, field in fields.items()}
    assert found["data"] == "required" and found["training"] == "as below"
    assert (found["ranks"], found["rslora"], found["start"]) == ("`8`", "`false`", "`null`")
    assert (found["method"], found["participation"]) == ("`fedhl_ef`", "`{fraction: 1.0}`")


# --- the other pages ----------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("page", "said"),
    [("README.md", ["round 5/5", "64, 48"]), ("docs/python.md", ["round 5/5"])],
)
def test_the_examples_of_a_page_run(
    page: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    codes = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    for code, expected in zip(codes, said, strict=True):
        exec(compile(code, page, "exec"), {"__name__": "example"})
        assert expected in capsys.readouterr().out


def test_the_tables_of_results_are_those_of_the_result_files() -> None:
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert page == docs.with_results(page), "write it anew: make docs"


def test_differences_in_tables_are_paired_by_seed() -> None:
    """Two methods that move together with the seed: each varies, their difference does not."""

    def row(values: dict[int, float]) -> result_tables.Row:
        runs = {seed: {"final": {"full": {"accuracy": x}}} for seed, x in values.items()}
        return result_tables.Row({"variant": "x"}, "accuracy", 0.1, runs)

    first, other = row({0: 0.1, 1: 0.5, 2: 0.9}), row({2: 0.92, 0: 0.12, 1: 0.53})
    assert result_tables.score(first, first) == "50.0 ± 99.4%"  # t(0.975, 2) = 4.303, s = 40, n = 3
    assert result_tables.difference(other, first) == "**+2.3 ± 1.4**"
    assert result_tables.difference(first, first) == ""
    with pytest.raises(ValueError, match="other seeds"):
        result_tables.difference(row({0: 0.1, 1: 0.5}), first)


def test_the_readme_counts_the_methods() -> None:
    mixed = sum(METHODS[name].mixed_ranks for name in METHODS)
    readme, one = (ROOT / "README.md").read_text(), len(METHODS) - mixed
    assert f"[{len(METHODS) - 2} other methods" in readme
    assert (
        f"{len(METHODS)} aggregation methods ({mixed} for clients of different ranks, {one} for"
        in readme
    )


def tree_of_the_readme() -> tuple[set[str], set[str]]:
    """The files and the folders below src/fedhl that README's annotated tree names, as paths.

    Every level is two spaces further in; a line has names, several with commas between, and then a comment.
    """
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme[readme.index("```\nsrc/fedhl/\n") :].split("```")[1]
    files: set[str] = set()
    folders: set[str] = set()
    above: list[str] = []
    for line in block.removeprefix("\nsrc/fedhl/\n").splitlines():
        if line and not line.startswith(" "):
            break  # what stands beside src
        names = re.match(r"\s*((?:[\w.]+/?(?:, |(?=\s|$)))+)", line)
        if names is None:
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        for name in names[1].split(", "):
            path = "/".join([*above[: depth - 1], name.strip()])
            (folders if path.endswith("/") else files).add(path.rstrip("/"))
            above[depth - 1 :] = [name.strip("/ ")]
    return files, folders


def test_the_tree_of_the_readme_is_the_file_system() -> None:
    """Both ways, and below the root: each file has its line, and each line its file."""
    source = ROOT / "src" / "fedhl"
    files, folders = tree_of_the_readme()
    there = {path.relative_to(source).as_posix() for path in source.rglob("*.py")}
    assert files == {path for path in there if not path.endswith("__init__.py")}
    packages = {str(Path(path).parent) for path in there} - {"."}
    assert folders == packages | {"report/templates"}


def test_the_schema_knows_every_config_and_refuses_a_slip() -> None:
    """Editors read the schema at the place that each config names."""
    schema = json.loads((ROOT / "docs/config.schema.json").read_text(encoding="utf-8"))
    check = jsonschema.Draft202012Validator(schema)
    check.check_schema(schema)
    files = [*ROOT.glob("configs/*.yaml"), *ROOT.glob("experiments/*/*.yaml")]
    files.append(DEPLOYMENT / "own-data.yaml")
    for file in files:
        text = file.read_text(encoding="utf-8")
        (place,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)\n", text)
        assert (file.parent / place).resolve() == ROOT / "docs/config.schema.json", file
        raw = yaml.load(text, ConfigLoader)
        assert [error.message for error in check.iter_errors(raw)] == [], file
    raw = yaml.load((ROOT / "configs/demo.yaml").read_text(encoding="utf-8"), ConfigLoader)
    for slip in (
        {"method": "fedlh"},
        {"method": {"power": 2}},
        {"rounds": 0},
        {"roundz": 3},
        {"training": {"learning_rate": "fast"}},
        {"lora": {"ranks": {"shares": 3}}},
        {"task": {"kind": "translation"}},
        {"task": {"kind": "regression", "labl": "stars"}},
        {"report_to": ["tensorbord"]},
        {"report_to": {"name": "wandb", "mode": "on"}},
    ):
        assert not check.is_valid(raw | slip), slip
    for right in (
        {"method": "package.module:Class"},
        {"task": {"kind": "regression", "label": "stars"}},
        {"task": {"kind": "tags:TagTask", "words": "tokens"}},
        {"method": {"name": "fedsvd", "period": 4}},
        {"weighting": None},
        {"weighting": {"name": "balanced", "lam": 0.1}},
        {"lora": {"ranks": [4, 8]}},
        {"report_to": "tensorboard"},
        {"report_to": ["tensorboard", {"name": "wandb", "mode": "online"}]},
        {"report_to": None},
    ):
        assert check.is_valid(raw | right), right
    described = [
        s for group in schema["$defs"].values() for s in group.get("properties", {}).values()
    ]
    assert sum("description" in setting for setting in described) > 0.6 * len(described)


def test_every_threat_names_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "threats.md").read_text(encoding="utf-8")
    page = page.split("## What was measured")[0]
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    named = re.findall(r"`(test_\w+)::(test_\w+)` \|$", page, re.MULTILINE)
    headings = [line for line in rows if line.endswith("| test |")]
    assert len(named) == len(rows) - len(headings) > 20
    for file, name in named:
        code = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        assert f"def {name}(" in code, f"{file}::{name}"


def test_nodes_reach_the_gate_alone() -> None:
    """Whoever reaches the SuperLink can run any program on all nodes."""
    compose = yaml.safe_load((DEPLOYMENT / "compose.yaml").read_text())
    on = {name: set(service["networks"]) for name, service in compose["services"].items()}
    assert on.pop("gate") == {"server", "federation"} and on.pop("superlink") == {"server"}
    assert on and all(networks == {"federation"} for networks in on.values())
    assert [n for n, service in compose["services"].items() if "ports" in service] == ["gate"]
    unit = (DEPLOYMENT / "fedhl-superlink.service").read_text()
    (listens,) = re.findall(r"--host (\S+) --port (\d+)", unit)
    assert listens == ("127.0.0.1", "9000")
    assert "fedhl gate 127.0.0.1:9000 " in (DEPLOYMENT / "fedhl-gate.service").read_text()


def test_the_image_installs_what_is_tested() -> None:
    """Each package with a hash, in the version of constraints.txt."""

    def versions(text: str) -> dict[str, str]:
        found = re.findall(r"^([\w.-]+)==([\w.!+-]+)", text, re.MULTILINE)
        return {name.lower().replace("_", "-"): version for name, version in found}

    lock = (DEPLOYMENT / "requirements.lock").read_text()
    locked, tested = versions(lock), versions((ROOT / "constraints.txt").read_text())
    assert {"torch", "flwr", "hatchling", "dp-accounting"} <= locked.keys()
    assert {name: locked[name] for name in locked.keys() & tested.keys()} == {
        name: tested[name] for name in locked.keys() & tested.keys()
    }
    for block in re.split(r"^(?=\w)", lock, flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in block, block[:80]
    image = (DEPLOYMENT / "Dockerfile").read_text()
    assert "--require-hashes" in image and image.count("pip install") == 2


def test_no_container_sees_the_keys_of_another() -> None:
    """Each has at most its own private key; and git ignores them all."""
    services = yaml.safe_load((DEPLOYMENT / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        keys = {
            Path(volume.split(":")[0]).relative_to("keys")
            for volume in service["volumes"]
            if volume.startswith("./keys")
        }
        public = {key for key in keys if key.suffix in (".pub", ".crt", ".pem")}
        server = name in ("superlink", "gate")
        assert keys - public == {Path("server.key" if server else name)}
        asked = {Path(word).name for word in service["command"].split() if "/keys/" in word}
        assert asked <= {key.name for key in keys}
    assert "examples/deployment/keys/" in (ROOT / ".gitignore").read_text().splitlines()


CONFIGS = [*sorted((ROOT / "configs").glob("*.yaml")), ROOT / "examples/deployment/own-data.yaml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_configs_are_valid(path: Path) -> None:
    assert isinstance(load_config(path).lora, LoRAConfig)


def test_the_config_of_the_readme_is_valid(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "my.yaml").name == "my-run"


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_a_result_file_is_what_the_command_of_its_experiment_makes(name: str) -> None:
    """The variants, seeds and rates of the file are those that `make results/NAME` would run."""
    one = experiments.EXPERIMENTS[name]
    file = ROOT / "experiments" / one["result"]
    if not file.exists():
        said = (ROOT / "experiments/README.md").read_text("utf-8")
        planned = said.partition("## Planned")[2].partition("\n## ")[0]
        assert f"`{name}`" in planned, "it has no result, and is not planned, either"
        return
    result = json.loads(file.read_text("utf-8"))
    words = experiments.command(name)
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert [v["variant"] for v in result["variants"]] == given["--methods"].split(",")
    assert result["seeds"] == [int(seed) for seed in given["--seeds"].split(",")]
    rates = given.get("--rates", "")
    assert result["rates"] == [float(rate) for rate in rates.split(",") if rate]
    changes = [given["--set"]] if "--set" in given else []
    config = load_config(ROOT / words[1], changes)
    assert within(result["config"], config.model_dump(mode="json"))


def within(was: Any, now: Any) -> bool:
    """Whether all settings of then have these values still; there may be more of them now."""
    if isinstance(was, dict) and isinstance(now, dict):
        return all(key in now and within(value, now[key]) for key, value in was.items())
    return was == now
