"""Seeds by name: the same in every process, and unrelated where a name differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from fedhl.seeds import derive, generator

# blake2b of the names as Python writes them, cut to 63 bits: frozen here, because another value means
# that runs of an earlier version can neither be reproduced nor resumed.
KNOWN = {
    (0,): 6197007067532723406,
    (0, "cohort", 1): 2327455820560319898,
    (7, "training", 3, "client-2"): 1080871047510009023,
    (2**40, "layer", "ein Wörtchen"): 4124753024582833836,
}


def test_known_values() -> None:
    assert {path: derive(*path) for path in KNOWN} == KNOWN


def test_the_same_in_another_process_with_other_hashes() -> None:
    program = (
        "import json, sys; from fedhl.seeds import derive\n"
        "print(json.dumps([derive(*path) for path in json.loads(sys.argv[1])]))"
    )
    paths = [list(path) for path in KNOWN]
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(paths)],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout) == list(KNOWN.values())


def test_every_part_of_the_path_counts() -> None:
    paths = [
        *((root, "cohort", k) for root in range(10) for k in range(10)),
        *((0, "cohort", str(k)) for k in range(10)),  # a client named "1" is not round 1
        *((0, f"cohort{k}") for k in range(10)),
        *((0, k, "cohort") for k in range(10)),
        (0, "a", "b"),
        (0, "ab"),
        (0, "a', 'b"),
        (0, "a", "b", ""),
    ]
    seeds = [derive(*path) for path in paths]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_neighbouring_streams_are_independent() -> None:
    """Correlation of two independent uniform samples of size n has standard deviation 1/√n."""
    n = 10_000
    draws = torch.stack([torch.rand(n, generator=generator(0, "round", k)) for k in range(20)])
    correlation = torch.corrcoef(draws)
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 5 / n**0.5  # 190 pairs: beyond 5σ once in ten thousand
    assert abs(draws.mean() - 0.5) < 5 / (12 * draws.numel()) ** 0.5


def test_a_generator_repeats_and_leaves_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    first, again = (torch.randn(5, generator=generator(3, "x", 1)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), before)
