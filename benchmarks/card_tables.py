"""What README.md and docs/performance.md say of a graphics card, from the results of card.py.

A page has `<!-- card NAME -->` ... `<!-- /card -->`; `make docs` replaces what is between them by
`TEXTS[NAME]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from card import PARTS, RESULTS, read

Result = dict[str, Any]
Results = Mapping[str, Result]
PAGES = ("README.md", "docs/performance.md")
MARKED = re.compile(r"(<!-- card ([\w-]+) -->)(.*?)(<!-- /card -->)", re.DOTALL)


def results(folder: Path = RESULTS) -> dict[str, Result]:
    """Those of the parts that were run. Raises ValueError for those of a dry run: they measured nothing."""
    found = {part: read(folder / f"{part}.json") for part in PARTS}
    found = {part: result for part, result in found.items() if result}
    if folder == RESULTS and any(result["dry run"] for result in found.values()):
        raise ValueError(f"{folder} holds results of a dry run")
    return found


def steps(result: Result) -> dict[str, Result]:
    """The steps that have figures."""
    return {n: s for n, s in result["steps"].items() if not s["status"].startswith("left out")}


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [[*head], ["---"] * len(head), *([shown(x) for x in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(x: Any) -> str:
    return f"{x:.3g}" if isinstance(x, float) else str(x)


# --- README -------------------------------------------------------------------------------------


def cuda(found: Results) -> str:
    tested = "The tests run every method, the server and clients on a device with CUDA's rules about where "
    tested += "tensors are (kernels of the CPU)"
    if "a" not in found:
        ready = (
            "[one command](benchmarks/CARD.md) tries and measures everything once there is a card"
        )
        return f"**never run yet**, and nothing measured: no accelerator was at hand. {tested}; {ready}"
    a = found["a"]
    others = [f"{part} {word(result)}" for part, result in found.items() if part != "a"]
    return (
        f"every method, the server and a federation against the CPU on one {a['device']} (commit "
        f"{a['commit']}): **{a['status']}**. [Measured](docs/performance.md#on-a-graphics-card): "
        f"{', '.join(others) or 'nothing yet'}. {tested}"
    )


def four_bit(found: Results) -> str:
    if "e" not in found or found["e"]["status"].startswith("left out"):
        return (
            "written against the libraries' interfaces; **never run yet**, only refusals are tested"
        )
    e = found["e"]
    return f"**{e['status']}**, a small model on one {e['device']} (commit {e['commit']})"


def word(result: Result) -> str:
    return result["status"].partition(":")[0]


# --- docs/performance.md ------------------------------------------------------------------------


def tables(found: Results) -> str:
    if not found:
        return "**Never run yet**: no accelerator was at hand, and nothing was measured there."
    parts = [overview(found)]
    parts += [part(found[letter]) for letter, part in PAGE.items() if letter in found]
    return "\n\n".join(text for text in parts if text)


def overview(found: Results) -> str:
    rows = [
        (
            *(letter, r["title"], r["status"].replace("|", "/"), f"{r['seconds']:.0f} s"),
            *(r["device"], r["versions"].get("torch", "none"), r["commit"]),
        )
        for letter, r in found.items()
    ]
    head = ("part", "what", "result", "time", "device", "torch", "commit")
    return table(head, rows)


def differences(result: Result) -> str:
    rows = [
        (name, c["what"], c["difference"], c["tolerance"])
        for name, step in steps(result).items()
        for c in step.get("checks", [])
    ]
    return table(("step", "the largest", "difference", "tolerance"), rows) if rows else ""


def server(result: Result) -> str:
    rows = [
        (
            " x ".join(map(str, r["shape"])) if "shape" in r else r["model"],
            r["clients"],
            r["copy of W, s"],
            r.get("copy, GB/s", ""),
            r["bare product, s"],
            r.get("product, TFLOP/s", ""),
            r["step, s"],
            r["step / (product + copy)"],
        )
        for step in steps(result).values()
        for r in step.get("rows", [])
    ]
    head = ("layer", "clients", "copy of `W`, s", "GB/s", "bare product, s", "TFLOP/s", "step, s")
    return table((*head, "step / (product + copy)"), rows) if rows else ""


def clients(result: Result) -> str:
    done = [s for s in steps(result).values() if "rounds per hour" in s]
    speed = table(
        ("config", "precision", "rounds per hour", "in forward, backward, optimizer", "card, GB"),
        [
            (
                *(s["config"], s["precision"], f"{s['rounds per hour']:.0f}"),
                *(f"{s['share in forward, backward, optimizer']:.1%}", s["card, GB"]),
            )
            for s in done
        ],
    )
    ratios = [(n, s) for n, s in steps(result).items() if "verdict" in s]
    together = table(
        ("model", "rows per client and step", "ranks", "one by one / together", "difference"),
        [
            (
                *(r["model"], r["rows per client and step"], ", ".join(map(str, r["ranks"]))),
                *(r["ratio"], r["relative difference"]),
            )
            for _, s in ratios
            for r in s["rows"]
        ],
    )
    verdicts = " ".join(f"{n.partition(',')[0]}: {s['verdict']}." for n, s in ratios)
    texts = [speed] * bool(done) + [together, f"Several clients in one batch, {verdicts}"] * bool(
        ratios
    )
    return "\n\n".join(texts)


def seven_billion(result: Result) -> str:
    (step,) = steps(result).values() or ({},)
    if "seconds" not in step or not isinstance(step.get("phases"), dict):
        return ""
    sizes = (
        f"{step['base parameters'] / 1e9:.2f} billion frozen parameters in bfloat16, "
        f"{step['adapted matrices']} adapted matrices, clients of ranks {step['ranks']}, "
        f"{step['steps of a client']} steps of {step['tokens of a step']} tokens: "
        f"{step['tokens per second']:.0f} tokens a second in training, "
        f"{step['card, GB']:.1f} GB of the card, {step['host, GB']:.1f} GB of the host."
    )
    return sizes + "\n\n" + table(("phase", "seconds, of all"), [*step["phases"].items()])


def narrow(result: Result) -> str:
    rows = [
        (r["bits"], r["card, GB"], r["seconds of a round"], ", ".join(map(shown, r["losses"])))
        for step in steps(result).values()
        for r in step.get("rows", [])
    ]
    return (
        table(("bits of the base", "card, GB", "seconds of a round", "losses"), rows)
        if rows
        else ""
    )


def tasks(result: Result) -> str:
    rows = []
    for name, step in steps(result).items():
        losses = [*step.get("losses", {}).items()]
        if losses:
            (_, first), (last, loss) = losses[0], losses[-1]
            row = (
                name,
                f"{step['rounds']} of {step['planned']}",
                first,
                f"{loss:.3g} (round {last})",
            )
            rows.append((*row, step["seconds of all rounds"], step["bytes"] / 1e6))
    head = ("task", "rounds", "loss before", "loss after", "seconds", "MB moved")
    return table(head, rows) if rows else ""


PAGE: dict[str, Callable[[Result], str]] = {
    "a": differences,
    "b": server,
    "c": clients,
    "d": seven_billion,
    "e": narrow,
    "f": tasks,
}
TEXTS: dict[str, Callable[[Results], str]] = {"cuda": cuda, "4-bit": four_bit, "tables": tables}


def written(page: str, found: Results) -> str:
    """The page with what the results say between its markers."""

    def text(match: re.Match[str]) -> str:
        begin, name, old, end = match.groups()
        new = TEXTS[name](found)
        return f"{begin}\n{new}\n{end}" if "\n" in old else f"{begin}{new}{end}"

    return MARKED.sub(text, page)
