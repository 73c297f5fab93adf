"""The report: every number comes from the files, and nothing but the files decides its bytes."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError
from support.fake_run import EVIL, Json, Page, evil, evil_metric, fake_run

import fedhl.report
from fedhl.errors import UserError
from fedhl.names import size
from fedhl.report import final_table, write_report
from fedhl.report.files import best, read_run
from fedhl.report.plots import spread
from fedhl.report.render import TEMPLATES


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fake_run(tmp_path / "demo")


def report(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def tiles(html: str) -> dict[str, Page]:
    """The page's tiles by their label."""
    start = html.index('<div class="tiles">')
    parts = html[start : html.index("<section>", start)].split('<div class="tile">')[1:]
    pages = {part[part.index("<h3>") + 4 : part.index("</h3>")]: part for part in parts}
    return {label: Page(part[: part.index("</div>")]) for label, part in pages.items()}


def rewrite(run: Path, change: Any) -> None:
    """Apply `change` to every line of a run's metrics."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        change(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that no test changes, and its page."""
    run = fake_run(tmp_path_factory.mktemp("shared") / "demo")
    return run, report(run)


def test_page_is_well_formed_and_self_contained(demo: tuple[Path, str]) -> None:
    _, html = demo
    page = Page(html)
    assert page.open == []
    for tag, attrs in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "base"}
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attrs.get(name) or "#").startswith(("#", "data:"))
    assert "http:" not in html.replace("http-equiv", "") and "https:" not in html
    assert "@import" not in html and "url(http" not in html
    assert {"h1", "svg", "table", "details"} <= {tag for tag, _ in page.tags}


def test_ids_are_unique_and_references_resolve(demo: tuple[Path, str]) -> None:
    _, html = demo
    ids = [attrs["id"] for _, attrs in Page(html).tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    used = {
        attrs["href"] for _, attrs in Page(html).tags if (attrs.get("href") or "").startswith("#")
    }
    assert used and {f"#{name}" for name in ids} >= used


def test_plots_use_the_colours_of_the_page(demo: tuple[Path, str]) -> None:
    _, html = demo
    svgs = html[html.index("<svg") :]
    assert "#a9" not in svgs  # the reserved colours
    assert "var(--r0)" in svgs and "var(--t15)" in svgs
    style = html[: html.index("</style>")]
    assert style.count("--r15:") == style.count("--c4:") == 2  # light and dark


def test_tiles_show_the_numbers_of_the_files(demo: tuple[Path, str]) -> None:
    run, html = demo
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {label: tile.numbers() for label, tile in tiles(html).items()}
    first, last = lines[0]["evaluation"], lines[-1]["evaluation"]
    for label, kind in (("Accuracy, full W", "full"), ("Accuracy, T₆₄(W)", "truncated")):
        final, start = last[kind]["accuracy"], first[kind]["accuracy"]
        assert found[label] == [final, final - start]
    assert found["Best round"] == [summary["best"]["round"], summary["best"]["value"]]
    assert found["Sent to clients"] == [summary["bytes"]["down"]]
    assert found["Sent by clients"] == [summary["bytes"]["up"]]
    assert found["Wall time"] == [summary["seconds"]["total"]]
    assert found["Peak memory"] == [summary["peak_memory_bytes"]]
    compute = sum(line["seconds"]["compute"] for line in lines[1:])
    whole = sum(line["seconds"]["total"] - line["seconds"]["evaluate"] for line in lines[1:])
    assert found["Computing"] == [pytest.approx(compute / whole)]


def test_same_files_give_the_same_bytes(demo: tuple[Path, str], run: Path) -> None:
    assert report(run) == demo[1]


def test_names_from_files_are_escaped(run: Path) -> None:
    bad = '<script>alert("$x^{$")</script>&'
    rewrite(run, lambda line: [c.update(id=bad) for c in line["clients"] if c["id"] == "client-3"])
    rewrite(run, lambda line: [r.update(id=bad, reason=bad) for r in line["refused"]])
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"name": bad, "status": bad, "task": bad, "device": bad, "commit": bad}
    summary["method"] = {"name": bad, bad: bad}
    summary["versions"][bad] = bad
    summary["clients"][3] |= {"id": bad, "labels": {bad: 3}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.yaml").write_text(f"name: {bad}\n</pre>")
    html = report(run)
    assert html.count("<script>") == 1 and "alert(" in "".join(Page(html).text)
    assert Page(html).open == []
    final_table(run)


def test_an_unknown_metric_is_escaped_too(run: Path) -> None:
    bad = '"><b>[red]'
    path = run / "summary.json"
    path.write_text(
        path.read_text().replace('"metric": "accuracy"', f'"metric": {json.dumps(bad)}')
    )
    assert "<b>[red]" not in report(run).lower()
    final_table(run)


@pytest.mark.parametrize("clients", [3, 14])
def test_no_text_of_a_run_is_taken_for_markup(clients: int, tmp_path: Path) -> None:
    """Names, labels, a metric and whatever else is text with a tag in it, in every section and plot."""
    run = fake_run(tmp_path / "run", clients=clients, rounds=6, labels=3)
    evil_metric(run)

    def spoil(line: Json) -> None:
        for client in line["clients"]:
            client["id"] += EVIL
        for one in line["refused"]:
            one |= {"id": EVIL, "reason": EVIL}
        scores = line["evaluation"]
        scores["clients"] = {"by_client": {f"client-0{EVIL}": scores["full"]}}
        if "ranks" in scores:
            scores["ranks"][EVIL] = scores["full"]

    rewrite(run, spoil)
    summary = json.loads((run / "summary.json").read_text())
    for key in ("name", "status", "model", "data", "task", "device", "commit", "fedhl"):
        summary[key] = EVIL
    summary |= {group: {EVIL: EVIL} for group in ("seeds", "versions", "hashes")}
    summary |= {name: {"name": EVIL, EVIL: EVIL} for name in ("method", "weighting")}
    summary["tasks"] = {"labels": [[EVIL]], "accuracy": [[0.5]], "rounds": [6], "forgetting": 0.1}
    for client in summary["clients"]:
        client |= {"id": client["id"] + EVIL, "labels": {f"{k}{EVIL}": 3 for k in range(9)}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.yaml").write_text(f"name: {EVIL}")
    html = report(run)
    page = Page(html)
    assert page.open == [] and evil(html) == []
    titles = ["Quality", "Tasks", "Clients", "Spectrum of W", "Federation diagnostics"]
    titles += ["Bytes and seconds", "Missing or refused", "Provenance"]
    assert re.findall("<h2>(.*?)</h2>", html) == titles
    assert "".join(page.text).count(EVIL) > 30  # nothing is lost either
    final_table(run)


def test_the_policy_of_a_page_allows_its_own_script_alone(demo: tuple[Path, str]) -> None:
    _, html = demo
    script = html.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (a["content"] for t, a in Page(html).tags if t == "meta" and "http-equiv" in a)
    assert f"script-src 'sha256-{digest}'" in str(policy)
    assert "addEventListener" in script and "&" not in script.replace("&&", "")


def test_a_value_that_nobody_gave_is_an_error() -> None:
    template = TEMPLATES.get_template("run/tasks.html")
    assert template.render(tasks=None).strip() == ""
    with pytest.raises(UndefinedError, match="'tasks' is undefined"):
        template.render()
    with pytest.raises(UndefinedError, match="no attribute 'rows'"):
        template.render(tasks={})


def test_markup_stands_in_templates_alone() -> None:
    """But for the SVG that Matplotlib draws."""
    for path in Path(fedhl.report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and path.name != "plots.py":
                assert not re.search(r"</?[a-z]+[\s>]|&[a-z]+;", text), (path.name, text)


def test_a_hundred_clients_and_rounds_stay_small(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "big", clients=100, rounds=100, fraction=0.3, labels=12)
    path = write_report(run)
    assert path.stat().st_size < 1_500_000
    html = path.read_text(encoding="utf-8")
    assert "client-99" in html and "data:image/png;base64," in html and "5 others" in html


def test_loss_as_headline_metric(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "llm", clients=6, rounds=5, task="causal-lm")
    found = tiles(report(run))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["Loss, full W"].numbers()[0] == last["evaluation"]["full"]["loss"]
    (run / "summary.json").unlink()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert best(read_run(run))[1] == min(line["evaluation"]["full"]["loss"] for line in lines)


def test_without_server_data_the_clients_are_the_headline(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "silo", rounds=3, server_data=False)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    html = report(run)
    worst = last["evaluation"]["clients"]["worst"]["accuracy"]
    assert tiles(html)["Accuracy, worst client"].numbers()[0] == worst
    assert "Own accuracy" in html and "Own rows" in html
    assert "95% intervals (Wilson)" in html and "worst mean" not in html
    assert all(m["examples"] == 500 for m in last["evaluation"]["clients"]["by_client"].values())
    assert Page(html).numbers().count(500) == len(last["evaluation"]["clients"]["by_client"])
    assert "mean client" in str(final_table(run).columns[2].header)


@pytest.mark.parametrize(("clients", "words"), [(6, "Coloured by rank."), (40, "Mean and range")])
def test_each_client_has_its_own_curve_or_its_rank_a_band(
    clients: int, words: str, tmp_path: Path
) -> None:
    run = fake_run(tmp_path / "own", clients=clients, rounds=3, server_data=False)
    html = report(run)
    card = html[html.index("<h3>Own accuracy</h3>") : html.index("<h3>Weight</h3>")]
    assert words in card and "client-own" in card
    header = html[html.index("<h3>Who took part</h3>") :]
    assert header.index("Own accuracy") < header.index("Examples"), "what a site looks for first"
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (run / "metrics.jsonl").write_text(lines[-1] + "\n", encoding="utf-8")
    assert "<h3>Own accuracy</h3>" not in report(run), "one value makes no curve"


def test_round_zero_alone(tmp_path: Path) -> None:
    html = report(fake_run(tmp_path / "zero", rounds=0))
    assert "no curve to draw" in html and "no spectrum" in html
    assert len(tiles(html)["Accuracy, full W"].numbers()) == 1  # no change since round 0
    assert tiles(html)["Computing"].numbers() == []


def test_one_training_round(tmp_path: Path) -> None:
    assert Page(report(fake_run(tmp_path / "one", rounds=1, clients=1))).open == []


def test_an_unfinished_run_sums_its_rounds(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()[:5]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"status": "interrupted"}))
    html = report(run)
    assert "interrupted" in html and "not finished" in html and "4 of 12 rounds done" in html
    assert tiles(html)["Sent to clients"].numbers() == [
        sum(json.loads(line)["bytes"]["down"] for line in lines)
    ]


def test_missing_summary_and_config_are_said(run: Path) -> None:
    for name in ("summary.json", "config.yaml"):
        (run / name).unlink()
    html = report(run)
    assert "summary.json is missing" in html and "config.yaml is missing" in html
    assert len(final_table(run).rows) == 3


def test_nothing_but_round_numbers(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text('{"round": 0}\n{"round": 1}\n')
    html = report(run)
    assert Page(html).open == [] and "<svg" not in html


def test_every_value_null(run: Path) -> None:
    def blank(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: v if k in ("id", "round") else blank(v) for k, v in value.items()}
        return [blank(v) for v in value] if isinstance(value, list) else None

    rewrite(run, lambda line: line.update(blank(line)))
    (run / "summary.json").write_text(
        json.dumps(blank(json.loads((run / "summary.json").read_text())))
    )
    html = report(run)
    assert Page(html).open == [] and "<svg" not in html
    final_table(run)


def test_values_that_are_not_finite_are_left_out(run: Path) -> None:
    def spoil(line: Json) -> None:
        line["evaluation"]["full"] |= {"loss": math.nan, "accuracy": math.nan}
        line["diagnostics"] |= {"chi2": math.inf, "spectrum": [math.nan, 0.0, -1.0]}
        for client in line["clients"]:
            client |= {"weight": math.nan, "error": math.inf}

    rewrite(run, spoil)
    html = report(run)
    assert not re.search(r"\b(nan|inf)\b", "".join(Page(html).text).lower())
    assert "weights against data shares" in html  # named among what was not recorded


def test_skipped_evaluations_and_absent_clients(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "sparse", rounds=6, fraction=0.2)

    def skip(line: Json) -> None:
        if line["round"] % 3:
            line["evaluation"] = None

    rewrite(run, skip)
    assert Page(report(run)).open == []


def test_clients_of_unknown_rank_and_a_round_without_clients(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "odd", clients=14, rounds=4)

    def spoil(line: Json) -> None:
        line["clients"] = [] if line["round"] == 2 else line["clients"]
        for client in line["clients"][:2]:
            client["rank"] = None

    rewrite(run, spoil)
    (run / "summary.json").unlink()
    html = report(run)
    assert Page(html).open == [] and "data:image/png" in html


def test_a_client_that_gives_up_rank_counts_at_the_rank_it_had(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "pruned", clients=3, rounds=4)

    def prune(line: Json) -> None:
        for client in line["clients"]:
            if client["id"] == read.clients[-1].id and line["round"] > 2:
                client["rank"] = 2

    read = read_run(run)
    last = read.clients[-1]
    rewrite(run, prune)
    pruned = next(c for c in read_run(run).clients if c.id == last.id)
    assert pruned.rank == last.rank
    assert {n: rank for rank, n, _ in pruned.by_rank()} == {
        n: last.rank if n <= 2 else 2 for n in last.rounds
    }
    assert Page(report(run)).open == []


def test_a_torn_last_line_is_ignored(demo: tuple[Path, str], run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 13, "evalu')
    assert report(run) == demo[1]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"round": 2, ', "not JSON"),
        ("[1, 2]", 'integer "round"'),
        ('{"round": "2"}', 'integer "round"'),
        ('{"round": 1}', "round 1 after round 1"),
    ],
)
def test_a_malformed_line_is_named(run: Path, line: str, problem: str) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[2] = line
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=f"line 3: .*{problem}"):
        write_report(run)


def test_missing_metrics_and_malformed_summary(run: Path) -> None:
    (run / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json: not JSON"):
        write_report(run)
    (run / "summary.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        write_report(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl not found"):
        final_table(run)


def test_labels_keep_their_distance_and_order() -> None:
    placed = spread([0.5, 0.5, 0.1, 0.52], 0.05)
    assert sorted(placed) == [placed[2], placed[1], placed[0], placed[3]]
    ordered = sorted(placed)
    assert all(b - a >= 0.05 - 1e-9 for a, b in pairwise(ordered))
    assert placed[2] == pytest.approx(0.1)  # alone, it stays where it belongs
    assert max(spread([1.0] * 5, 0.1)) <= 1.05 + 1e-9 and min(spread([0.0] * 5, 0.1)) >= 0.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.7, "1 kB"),
        (1500, "1.5 kB"),
        (12_345_678, "12.3 MB"),
        (5e15, "5,000 TB"),
    ],
)
def test_sizes(value: float, text: str) -> None:
    assert size(value) == text


def test_final_table_compares_start_best_and_final(run: Path) -> None:
    table = final_table(run)
    assert [str(cell) for cell in table.columns[0].cells] == ["start", "best", "final"]
    assert str(table.columns[2].header) == "accuracy full W"
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    shown = next(iter(table.columns[2].cells))
    assert shown == f"{100 * first['evaluation']['full']['accuracy']:.1f}%"
