"""The tables of docs/theory.md, from the result files of the theory laboratory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedhl.report.statistics import mean_interval

MINUS = "\N{MINUS SIGN}"
RESULTS = Path(__file__).resolve().parent.parent / "experiments" / "theory"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def number(x: float) -> str:
    """Three digits that count, without an exponent where that reads well."""
    if abs(x) < 1e-15:
        return "0"
    if 1e-3 <= abs(x) < 1e4:
        digits = f"{x:.3g}"
        return f"{float(digits):g}".replace("-", MINUS)
    return f"{x:.1e}".replace("e-0", f"e{MINUS}").replace("e-", f"e{MINUS}").replace("e+0", "e")


def pair(interval: dict[str, Any] | None) -> str:
    """A mean with the half-width of its 95% interval."""
    if interval is None or interval["mean"] is None:
        return "diverged"
    half = interval["half"]
    return number(interval["mean"]) + ("" if half is None else f" ± {number(half)}")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def optimum() -> str:
    variants = read("optimum")["variants"]
    settings = list(dict.fromkeys(v["setting"] for v in variants))
    found = {(v["setting"], v["method"]): v for v in variants}
    shown = [s.replace("~ 1/sqrt(r)", "∝ 1/√r") for s in settings]
    rows = []
    for method in dict.fromkeys(v["method"] for v in variants):
        rows.append([method, *(pair(found[s, method]["end"]["distance"]) for s in settings)])
    return table(["distance to the optimum", *shown], rows)


def optimum_why() -> str:
    rows = []
    for v in read("optimum")["variants"]:
        if v["setting"] == "unlike, s ~ 1/sqrt(r)":
            continue
        end = v["end"]
        parts = ("truncated", "gradient", "unseen", "start", "aggregation", "moved")
        clients = v["setting"].split(",")[0]
        rows.append([clients, v["method"], number(v["rate"]), *(pair(end[p]) for p in parts)])
    head = ["clients", "method", "rate", "distance of `T_64(W)`", "‖∇F‖", "of it unseen"]
    return table([*head, "start lacks", "‖e_t‖", "W moves by"], rows)


def rate() -> str:
    result = read("rate")
    rows = [
        [
            r["case"],
            r["clients"],
            *map(pair, r["gradient"]),
            pair(r["slope"]),
            pair(r["last slope"]),
        ]
        for r in result["rows"]
    ]
    times = [f"T = {T:,}" for T in result["horizons"]]
    return table(["method, local steps", "clients", *times, "slope", "last slope"], rows)


def weights() -> str:
    parts = ("effective clients, mean", "low ranks' weight", "excess loss")
    found = {(r["data"], r["weights"]): r for r in read("weights")["rows"]}
    rows = []
    for (data, name), r in found.items():
        mine, uniform = (found[data, x]["excess loss"]["values"] for x in (name, "uniform"))
        mean, half = mean_interval([a - b for a, b in zip(mine, uniform, strict=True)])
        paired = "" if name == "uniform" else pair({"mean": mean, "half": half})
        rows.append([data, name, *(pair(r[part]) for part in parts), paired, pair(r["few"])])
    head = ["clients", "weights", "effective clients", "weight of rank 4", "excess loss"]
    return table([*head, "minus uniform's", "distance in the last 8 inputs"], rows)


def terms() -> str:
    parts = ("gradient", "first", "noise", "drift", "weights", "starts", "aggregation")
    rows = [
        [r["case"], *(pair(r["average"][part]) for part in parts), pair(r["bound over gradient"])]
        for r in read("terms")["rows"]
    ]
    head = ["method", "‖∇F‖²", "first", "noise", "drift", "weights", "starts", "aggregation"]
    return table([*head, "bound / ‖∇F‖²"], rows)


def lora_plus() -> str:
    result = read("lora_plus")
    found = {(r["clients"], r["method"], r["ratio"]): r for r in result["rows"]}
    rows = []
    for clients, method in dict.fromkeys((r["clients"], r["method"]) for r in result["rows"]):
        those = [found[clients, method, ratio] for ratio in result["ratios"]]
        cells = [
            pair(r["distance"]) + (f" ({number(r['rate'])})" if r["rate"] else "") for r in those
        ]
        rows.append([clients, method, *cells])
    return table(["clients", "method", *(f"ratio {number(x)}" for x in result["ratios"])], rows)


def sums() -> str:
    rows = []
    for r in read("sums")["rows"]:
        products, factors = r["sum of products"], r["product of sums"]
        rows.append(
            [
                r["data"],
                str(r["rank"]),
                str(r["epochs"]),
                f"{pair(products['last'])} ({number(products['rate'])})",
                f"{pair(factors['last'])} ({number(factors['rate'])})",
                pair(r.get("difference")),
                pair(products["mismatch of products"]),
                pair(factors["mismatch of sums"]),
            ]
        )
    head = ["clients", "r", "epochs", "sum of products (rate)", "product of sums (rate)"]
    return table([*head, "difference", "mismatch of products", "mismatch of sums"], rows)


def signatures() -> str:
    parts = {
        "excess loss": "excess loss",
        "norm over optimum's": "‖W‖ / ‖W*‖",
        "effective rank": "`effective_rank`",
        "tail share": "energy beyond rank 4",
        "tail share beyond the top rank": "beyond rank 32",
        "effective clients": "`effective_clients`",
        "error of rank 4": "`error`, rank 4",
        "drift": "`drift`",
        "moved": "W moves by",
    }
    rows = []
    for r in read("signatures")["rows"]:
        early, late = r["rounds"][1], r["rounds"][-1]
        cells = [f"{number(early[p]['mean'])} → {pair(late[p])}" for p in parts]
        rows.append([r["case"], *cells])
    return table(["case", *parts.values()], rows)


def named() -> str:
    parts = {"agreement": "agreement", "cut": "cut", "starts lack": "starts lack"}
    rows = []
    for r in read("signatures")["rows"]:
        early, late = r["rounds"][1], r["rounds"][-1]
        cells = [f"{number(early[p]['mean'])} → {pair(late[p])}" for p in parts]
        names = [
            f"{name}: {', '.join('–' if t is None else str(t) for t in rounds)}"
            for name, rounds in r["named"].items()
        ]
        rows.append([r["case"], *cells, "; ".join(names) or "nothing"])
    return table(["case", *parts.values(), "named in round, by seed"], rows)


TABLES = {
    "optimum": optimum,
    "optimum why": optimum_why,
    "rate": rate,
    "weights": weights,
    "terms": terms,
    "lora_plus": lora_plus,
    "sums": sums,
    "signatures": signatures,
    "signatures named": named,
}
"""Name of the place in the page -> its table."""
