"""Clients whose optimum is known, served by the methods of the library: what the other programs here share.

One layer W (m, n) and least squares: with d rows X_i (d, n) and `H_i = X_iᵀ X_i / d`,
`f_i(W) = ½ ||(W - W_i*) X_iᵀ||² / d` has the gradient `(W - W_i*) H_i`, and `F = Σ q_i f_i` is least at the W
with `Σ q_i (W - W_i*) H_i = 0`. The layer has the library's orientation: A reads the inputs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedhl import LoRA, Update
from fedhl.files import sha256, sha256_of, write_text
from fedhl.lora import dense, initial, pad, plus, squared_norm
from fedhl.method import Broadcast, Method, Remembering, Truncating
from fedhl.report.statistics import mean_interval
from fedhl.run.commit import commit
from fedhl.seeds import generator
from fedhl.server import diagnostics
from fedhl.server.ledger import after, base_of
from fedhl.subspace import energy
from fedhl.weighting import Cohort, Weighting

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent.parent / "docs"
CELLS = HERE.parent.parent / "runs" / "theory"
RANKS = (4, 4, 4, 4, 8, 8, 16, 16, 32, 64)
SIDE = 80
FAR = 1e3
"""A factor of a larger norm, or one that is not a number, has diverged: all optima have norms near 1."""

# --- the problem --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Problem:
    """`H (N, n, n)`, `optima (N, m, n)` and the data shares `q (N,)` of N clients, in float64."""

    H: Tensor
    optima: Tensor
    q: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.optima.shape[1], self.optima.shape[2]

    def float(self) -> Problem:
        """The same in float32, in which clients train."""
        return Problem(self.H.float(), self.optima.float(), self.q.float())

    def gradients(self, W: Tensor) -> Tensor:
        """`∇f_i(W_i) = (W_i - W_i*) H_i` of every client, (N, m, n); W is (m, n) or (N, m, n)."""
        return (W - self.optima) @ self.H

    def gradient(self, W: Tensor) -> Tensor:
        """`∇F(W)`, (m, n)."""
        return torch.einsum("i,imn->mn", self.q, self.gradients(W))

    def loss(self, W: Tensor) -> Tensor:
        """`F(W) = Σ q_i ½ tr((W - W_i*) H_i (W - W_i*)ᵀ)`."""
        return 0.5 * torch.einsum("i,imn,imn->", self.q, self.gradients(W), W - self.optima)

    def optimum(self) -> Tensor:
        """The W with `W Σ q_i H_i = Σ q_i W_i* H_i`."""
        H = torch.einsum("i,ikn->kn", self.q, self.H)
        right = torch.einsum("i,imn->mn", self.q, self.optima @ self.H)
        return torch.linalg.solve(H, right, left=False)

    def smoothness(self) -> float:
        """L: the largest eigenvalue of any client's H."""
        return float(torch.linalg.eigvalsh(self.H).max())


def draw(
    seed: int, apart: float, side: int = SIDE, count: int = len(RANKS), q: Tensor | None = None
) -> Problem:
    """A problem whose clients have `W_i* = W° + apart · Z_i`, with `||W°|| = ||Z_i|| = 1`.

    W° has singular values `j^(-1/2)`, so full rank and a heavy tail; Z_i is a random matrix. `apart = 0`:
    clients are alike, with one optimum and one H. Otherwise each has inputs X_i of its own.
    """
    g = generator(seed, "laboratory", side, count)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    U, V = (torch.linalg.qr(normal(side, side)).Q for _ in "UV")
    S = torch.arange(1, side + 1, dtype=torch.float64) ** -0.5
    centre = (U * (S / S.norm())) @ V.T
    X = normal(count, 4 * side, side)
    H = X.mT @ X / X.shape[1]
    Z = normal(count, side, side)
    Z /= torch.linalg.matrix_norm(Z)[:, None, None]
    if apart == 0:
        H = H.mean(0).expand(count, -1, -1).contiguous()
    shares = torch.full((count,), 1 / count, dtype=torch.float64) if q is None else q
    return Problem(H, centre + apart * Z, shares)


# --- the clients --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Local:
    """K steps of a client: on its factors with a rate for each (`lora`), or in W itself (`full`), as
    convergence proofs idealise it. Gradients have Gaussian noise of mean square norm `noise²`."""

    rate: float
    ratio: float = 1.0
    """The rate of B over that of A; `rate` is their geometric mean."""
    steps: int = 5
    noise: float = 0.0
    full: bool = False


def train(
    problem: Problem,
    starts: Sequence[Broadcast],
    bases: Sequence[Tensor | None],
    local: Local,
    g: torch.Generator,
) -> list[LoRA]:
    """What the clients return. All train at once, their factors padded to one rank: a component whose row of
    A and column of B are zero has no gradient, so the padding stays zero."""
    zero = torch.zeros(problem.shape)
    base = torch.stack([zero if M is None else M.float() for M in bases])
    top = max(sent.lora.rank for sent in starts)
    padded = [pad(sent.lora, top) for sent in starts]
    A, B = torch.stack([x.A for x in padded]), torch.stack([x.B for x in padded])
    s = torch.tensor([x.scale for x in padded])[:, None, None]
    here = base + s * (B @ A)
    spread = local.noise / zero.numel() ** 0.5

    def gradients(W: Tensor) -> Tensor:
        exact = problem.gradients(W)
        if not local.noise:
            return exact
        return exact + spread * torch.randn(exact.shape, generator=g)

    if local.full:
        W = here
        for _ in range(local.steps):
            W = W - local.rate * gradients(W)
        return [plus(sent.lora, Z) for sent, Z in zip(starts, W - here, strict=True)]
    rate_A, rate_B = local.rate / local.ratio**0.5, local.rate * local.ratio**0.5
    for _ in range(local.steps):
        G = gradients(base + s * (B @ A))
        A, B = A - rate_A * s * (B.mT @ G), B - rate_B * s * (G @ A.mT)
    ranks = [sent.lora.rank for sent in starts]
    return [LoRA(A[i, :r], B[i, :, :r], float(s[i])) for i, r in enumerate(ranks)]


# --- the server ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Round:
    """A round as it was played: W before and after it (m, n), float64; the updates; the weights `p (N,)` and
    the errors `e (N,)`, `e_i = ||W - start_i||²`."""

    before: Tensor
    after: Tensor
    updates: list[Update]
    p: Tensor
    e: Tensor


def change(method: Method[Any], state: Any) -> Tensor:
    """W (m, n), the server's change of the layer."""
    delta = method.delta(state)
    assert delta is not None, "a method without a global model has no distance to an optimum"
    return dense(delta)


def lost(method: Method[Any], state: Any, W: Tensor, rank: int, sent: Broadcast) -> float:
    """`||W - start||²` of a client of this rank."""
    if sent.lost is not None:
        return sent.lost
    if isinstance(method, Truncating):
        return method.lost(state, rank)
    return diagnostics.truncation_error(W, sent)


def play(
    problem: Problem,
    method: Method[Any],
    weighting: Weighting,
    local: Local,
    rounds: int,
    seed: int,
    ranks: Sequence[int] = RANKS,
    scales: Sequence[float] | None = None,
) -> Iterator[Round]:
    """The rounds of a federation in which all clients take part; ends early if a client
    diverges."""
    scales = [1.0] * len(ranks) if scales is None else scales
    single = problem.float()
    top = max(ranks)
    scale = scales[list(ranks).index(top)]
    state = method.init(initial(*problem.shape, top, scale, seed), seed)
    held: list[Tensor | None] = [None] * len(ranks)
    g = generator(seed, "noise")
    for _ in range(rounds):
        W = change(method, state)
        sent, e = broadcasts(method, state, W, held, ranks, scales)
        bases = [base_of(M, there) for M, there in zip(held, sent, strict=True)]
        found = train(single, sent, bases, local, g)
        if not all(float(x.norm()) < FAR for lora in found for x in (lora.A, lora.B)):
            return
        p = weighting(cohort(problem, W, e, found))
        triples = zip(sent, found, p.tolist(), strict=True)
        updates = [Update(there, lora, weight) for there, lora, weight in triples]
        state = method.aggregate(state, updates)
        if isinstance(method, Remembering):
            held = remembered(held, sent)
        yield Round(W.double(), change(method, state).double(), updates, p, e)


def broadcasts(
    method: Method[Any],
    state: Any,
    W: Tensor,
    held: Sequence[Tensor | None],
    ranks: Sequence[int],
    scales: Sequence[float],
) -> tuple[list[Broadcast], Tensor]:
    """What each client is sent, and what its start lacks of W; clients of one rank, scale and memory share
    one broadcast."""
    built: dict[Any, tuple[Broadcast, float]] = {}
    keys = [(r, s, id(M)) for r, s, M in zip(ranks, scales, held, strict=True)]
    for key, M in zip(keys, held, strict=True):
        if key not in built:
            r, s, _ = key
            if M is not None and isinstance(method, Remembering):
                there = method.catch_up(state, M, r, s)
            else:
                there = method.broadcast(state, r, s)
            built[key] = there, lost(method, state, W, r, there)
    error = torch.tensor([built[key][1] for key in keys], dtype=torch.float64)
    return [built[key][0] for key in keys], error


def remembered(held: Sequence[Tensor | None], sent: Sequence[Broadcast]) -> list[Tensor | None]:
    """What each client holds after its broadcast, one tensor for clients that were sent the same."""
    known: dict[int, Tensor] = {}
    for M, there in zip(held, sent, strict=True):
        if id(there) not in known:
            known[id(there)] = after(M, there)
    return [known[id(there)] for there in sent]


def cohort(problem: Problem, W: Tensor, e: Tensor, found: Sequence[LoRA]) -> Cohort:
    norms = [squared_norm([(1.0, lora)]) ** 0.5 for lora in found]
    return Cohort(problem.q, e[:, None].clamp(min=0), [energy(W)], norms=norms)


def unseen(G: Tensor, updates: Sequence[Update]) -> float:
    """The share of `||G||²` that reaches no factor of any client, `||(I - P_B) G (I - P_A)||² / ||G||²`.

    P_B and P_A are the projections on the span of all columns of B, and of all rows of A, that were sent."""
    B = basis(torch.cat([u.sent.lora.B for u in updates], dim=1).double())
    A = basis(torch.cat([u.sent.lora.A for u in updates]).double().T)
    rest = G - B @ (B.T @ G)
    rest = rest - (rest @ A) @ A.T
    return energy(rest) / energy(G)


def basis(X: Tensor) -> Tensor:
    """Orthonormal columns that span those of X, up to a millionth of its largest singular value."""
    U, S, _ = torch.linalg.svd(X, full_matrices=False)
    return U[:, 1e-6 * S[0] < S] if S[0] > 0 else U[:, :0]


def rank_stabilised(ranks: Sequence[int] = RANKS) -> list[float]:
    """`s_i = √(R / r_i)`: then `r_i s_i²` is the same for all, and so is the mean step of a random start."""
    return [(max(ranks) / r) ** 0.5 for r in ranks]


# --- results ------------------------------------------------------------------------------------


@cache
def source(program: str) -> list[str]:
    """What was read of a program and of this file when it began."""
    return [sha256(Path(program)), sha256(Path(__file__))]


def cell(program: str, key: dict[str, Any], compute: Callable[[], Any]) -> Any:
    """What `compute` returns, as JSON has it; from runs/theory if these programs have computed it before."""
    name = sha256_of(json.dumps([key, source(program)], sort_keys=True))[:20]
    file = CELLS / Path(program).stem / f"{name}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"key": key, "value": rounded(compute())}))
        print(" ".join(f"{k}={v}" for k, v in key.items()), file=sys.stderr, flush=True)
    return json.loads(file.read_text(encoding="utf-8"))["value"]


def rounded(x: Any) -> Any:
    """The same with four significant digits."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def interval(values: Sequence[float]) -> dict[str, Any]:
    """The values, their mean, and the half-width of its 95% interval by Student's t."""
    mean, half = mean_interval(values)
    return {"mean": mean, "half": half, "values": list(values)}


def write(program: str, result: dict[str, Any]) -> None:
    """The result file beside the program, with the versions and the commit."""
    about = {
        "program": f"experiments/theory/{Path(program).name}",
        "commit": commit(),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "threads": torch.get_num_threads(),
    }
    text = json.dumps(rounded(about | result), indent=1, ensure_ascii=False) + "\n"
    write_text(Path(program).with_suffix(".json"), text)


def read(name: str) -> dict[str, Any]:
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
