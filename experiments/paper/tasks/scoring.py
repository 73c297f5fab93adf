"""What lm-eval's tasks of this folder are scored by: ROUGE-L, and programs that pass their tests."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SANDBOX = Path(__file__).with_name("sandbox.py")
PATIENCE = 30.0
"""Seconds for a program that sleeps, which costs no processor time."""


def rouge_l(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """ROUGE-L of an answer, `F = 2 P R / (P + R)`: with the longest common subsequence of the words of answer
    and reference, as a share of the answer's words, P, and of the reference's, R (Lin, 2004); words are runs
    of letters and digits, in lower case, without stemming."""
    answer, reference = words(results[0]), words(doc["completion"])
    common = longest_common_subsequence(answer, reference)
    return {"rougeL": 2 * common / (len(answer) + len(reference)) if common else 0.0}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, in time O(m n)."""
    before = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for j, against in enumerate(other):
            row.append(before[j] + 1 if word == against else max(before[j + 1], row[j]))
        before = row
    return before[-1]


def pass_at_1(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the function that a prompt of HumanEval begins passes the test that comes with it."""
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(passes(program))}


def passes(program: str) -> bool:
    """Whether a program comes to its end in the sandbox. Raises OSError where there is no sandbox."""
    token = secrets.token_hex(16)
    asked = json.dumps({"program": program, "token": token})
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(SANDBOX)],
            input=asked,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env={},
        )
    except subprocess.TimeoutExpired:
        return False
    if "no namespaces for a sandbox" in done.stderr:
        raise OSError(done.stderr.strip().splitlines()[-1])
    return done.stdout == token
