"""Client-level privacy: what one client can move, the noise over it, and what is said of both."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny
from support.small_federation import BASE, federate
from support.small_server import (
    CLIENTS,
    FEDHL,
    HEAD,
    SEED,
    SHAPES,
    begun,
    exact,
    louder,
    reply,
    same,
    start,
)
from torch import Tensor

from fedhl import METHODS, LoRA, dense, get_method, server
from fedhl.config import Config, load_config
from fedhl.errors import UserError
from fedhl.federation.engine import run_round
from fedhl.federation.federation import initial_state
from fedhl.lora import initial
from fedhl.run import resume_run, start_run
from fedhl.run.folder import secret_of
from fedhl.run.loop import refuse_second_noise
from fedhl.server import Client, Reply, ServerState, measures, rounds
from fedhl.server.accounting import epsilon
from fedhl.server.layers import Layers
from fedhl.server.privacy import Mechanism, normals, uniforms, why_not
from fedhl.watch import Watcher

dp_accounting = pytest.importorskip("dp_accounting")  # an extra
rdp = pytest.importorskip("dp_accounting.rdp")
pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")

SECRET = bytes(range(32))
TINY = 1e-30
"""A noise multiplier so small that the noise is below rounding."""
ALLOWED = [name for name in METHODS if why_not(METHODS[name]()) is None]


def mechanism(noise: float = TINY, clip: float = 2.0, clients: int = 4) -> Mechanism:
    return Mechanism(clip, noise, 0.75, clients, SECRET)


def release(
    state: ServerState, replies: Sequence[Reply], private: Mechanism, method: Any = FEDHL
) -> ServerState:
    return server.release(private, method, state, replies, SEED)[0]


def moved(before: ServerState, after: ServerState, method: Any = FEDHL) -> list[Tensor]:
    """The change of every layer's delta, and of the head, in float64."""
    pairs = [
        tuple(dense(method.delta(s.layers[name])).double() for s in (after, before))
        for name in SHAPES
    ]
    pairs += [(after.head[name].double(), before.head[name].double()) for name in HEAD]
    return [a - b for a, b in pairs]


def norm(parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts))


@pytest.fixture(scope="module")
def state() -> ServerState:
    return begun()


# --- sensitivity --------------------------------------------------------------------------------


@given(
    size=st.floats(-12, 12).map(lambda x: 10**x),
    seed=st.integers(0, 9),
    who=st.integers(0, 3),
    head=st.sampled_from([0.0, 1.0, 1e20]),
)
def test_one_client_moves_the_sum_by_at_most_c_over_d(
    state: ServerState, size: float, seed: int, who: int, head: float
) -> None:
    """Whatever it returns: all layers and the head together, against the round without it."""
    private = mechanism()
    answers = [reply(state, client, seed=seed) for client in CLIENTS]
    wild = louder(answers[who], size)
    wild = replace(wild, head={name: h * head for name, h in wild.head.items()})
    others = [answer for k, answer in enumerate(answers) if k != who]
    sums = []
    for cohort in (others, [*others, wild]):
        accepted, _, checks = rounds.guarded(
            rounds.Guard(clip=private.clip), Layers(FEDHL, state, SEED), cohort
        )
        assert len(accepted) == len(cohort)
        parts = []
        for name, layer in state.layers.items():
            p = torch.ones(len(accepted), dtype=torch.float64)
            updates = Layers(FEDHL, state, SEED).layer(name).updates(accepted, p)
            terms = [(c.factor, u) for c, u in zip(checks, updates, strict=True)]
            released = private.released(FEDHL, layer, terms, 1, name)
            parts.append(exact(released.lora) - exact(released.sent.lora))
        heads = [(c.factor, reply.head) for c, reply in zip(checks, accepted, strict=True)]
        following = private.released_head(state.head, heads, 1)
        parts += [following[name].double() - h.double() for name, h in state.head.items()]
        sums.append(parts)
    difference = norm([a - b for a, b in zip(*sums, strict=True)])
    # the sums are kept in float32, beside adapters and a head of norm 10 or so
    assert difference <= private.clip / private.denominator * (1 + 1e-4) + 1e-5


@pytest.mark.parametrize("name", ALLOWED)
def test_without_noise_it_is_the_clipped_sum_over_a_constant(name: str) -> None:
    """`W + 1/D Σ c_i (ΔW_i - ΔW(sent_i))`, for every method that may be used."""
    method, private = get_method(name), mechanism()
    state = start(method)
    for round in range(2):
        answers = [louder(reply(state, c, method), k + 1) for k, c in enumerate(CLIENTS[:3])]
        following, outcome = server.release(private, method, state, answers, SEED)
        factors = [c["clip"] for c in outcome.clients]
        assert min(factors) < 1
        assert {c["weight"] for c in outcome.clients} == {1 / private.denominator} == {1 / 3}
        got = moved(state, following, method)
        want = [torch.zeros_like(x) for x in got]
        for c, answer in zip(factors, answers, strict=True):
            sent = server.broadcast(method, state, answer.client, SEED)
            for k, n in enumerate(SHAPES):
                want[k] += c / 3 * (exact(answer.adapter[n]) - exact(sent[n].lora))
            for k, n in enumerate(HEAD, start=len(SHAPES)):
                want[k] += c / 3 * (answer.head[n].double() - state.head[n].double())
        assert norm([a - b for a, b in zip(got, want, strict=True)]) <= 1e-4 * norm(want)
        assert round or norm(want) <= private.clip
        state = following


def test_what_a_release_reports(state: ServerState) -> None:
    """Of each client the weight `1/D` of the sum, D not being the number of those who arrived; and of
    all of them the numbers of an equal mean, against their shares of the rows."""
    answers = [reply(state, client) for client in CLIENTS[:3]]
    private = mechanism(clients=8)
    _, outcome = server.release(private, FEDHL, state, answers, SEED)
    assert [c["weight"] for c in outcome.clients] == [1 / (0.75 * 8)] * 3
    assert [c["drift"] for c in outcome.clients] == [None] * 3
    norms = measures.change_norms(Layers(FEDHL, state, SEED), answers)
    assert [c["norm"] for c in outcome.clients] == norms
    assert [c["clip"] for c in outcome.clients] == [min(1, private.clip / x) for x in norms]
    whole = sum(float(x.W.double().square().sum()) for x in state.layers.values())
    errors = []
    for client in CLIENTS[:3]:
        sent = server.broadcast(FEDHL, state, client, SEED)
        lost = [x.W.double() - exact(sent[name].lora) for name, x in state.layers.items()]
        errors.append(sum(float(x.square().sum()) for x in lost) / whole)
    assert [c["error"] for c in outcome.clients] == pytest.approx(errors, rel=1e-5)
    rows = [client.examples for client in CLIENTS[:3]]
    q = [x / sum(rows) for x in rows]
    assert outcome.diagnostics == {
        "effective_clients": pytest.approx(3),
        "chi2": pytest.approx(sum((1 / 3 - x) ** 2 / x for x in q)),
        "weighted_error": pytest.approx(sum(errors) / 9, rel=1e-5),
    }


def test_the_denominator_does_not_depend_on_who_arrived(state: ServerState) -> None:
    """Half of the clients, half of the sum: no renormalising."""
    answers = [reply(state, client, step=1e-2) for client in CLIENTS]
    private = mechanism(clip=1e6)
    both, one, other = (
        moved(state, release(state, part, private)) for part in (answers, answers[:2], answers[2:])
    )
    gap = [x - y - z for x, y, z in zip(both, one, other, strict=True)]
    assert norm(gap) <= 1e-4 * norm(both)


def test_the_method_sees_the_sum_alone(state: ServerState) -> None:
    """Two cohorts with one sum: what is sent next is the same to rounding."""
    (answer,) = [reply(state, client) for client in CLIENTS[1:2]]
    sent = server.broadcast(FEDHL, state, answer.client, SEED)
    private = mechanism(clip=1e6)
    twin = Client("twin", answer.client.rank, answer.client.scale, 999)
    half = {n: LoRA(x.A, (x.B + sent[n].lora.B) / 2, x.scale) for n, x in answer.adapter.items()}
    half = {n: LoRA(sent[n].lora.A, x.B, x.scale) for n, x in half.items()}  # linear in B
    whole = {n: LoRA(sent[n].lora.A, x.B, x.scale) for n, x in answer.adapter.items()}
    head = {n: (h + state.head[n]) / 2 for n, h in answer.head.items()}
    part = replace(answer, adapter=half, head=head)
    cohorts = [replace(answer, adapter=whole)], [part, replace(part, client=twin)]
    one, two = (release(state, cohort, private) for cohort in cohorts)
    assert norm([a - b for a, b in zip(moved(state, one), moved(state, two), strict=True)]) < 1e-4
    for name in SHAPES:
        a, b = (server.broadcast(FEDHL, s, CLIENTS[0], SEED)[name].lora for s in (one, two))
        assert (exact(a) - exact(b)).norm() <= 1e-3 * exact(a).norm()


def test_who_is_refused_might_as_well_have_been_absent(state: ServerState) -> None:
    answers = [reply(state, client) for client in CLIENTS]
    broken = replace(answers[1], loss=math.nan)
    private = mechanism(noise=1.0)
    after, outcome = server.release(private, FEDHL, state, [answers[0], broken, *answers[2:]], SEED)
    assert [r["id"] for r in outcome.refused] == ["bob"]
    assert same(after, release(state, [answers[0], *answers[2:]], private))


# --- noise --------------------------------------------------------------------------------------


def test_whether_a_client_counts_does_not_depend_on_the_others(state: ServerState) -> None:
    """A comparison would let one client move the sum by more than its own clipped update."""
    answers = [louder(reply(state, client), 1e8) for client in CLIENTS]
    for cohort in (answers[:1], answers, [answers[0], reply(state, CLIENTS[1])]):
        _, outcome = server.release(mechanism(), FEDHL, state, cohort, SEED)
        assert not outcome.refused and len(outcome.clients) == len(cohort)


def test_the_noise_has_the_variance_that_was_promised(state: ServerState) -> None:
    """On the delta and the head, entry by entry, when nobody arrived, too; new in every round."""
    private = Mechanism(clip=0.5, noise=1.2, rate=0.25, clients=20, secret=SECRET)
    sigma = 1.2 * 0.5 / 5
    assert private.deviation == pytest.approx(sigma)
    quiet = replace(private, noise=TINY)
    answers = [reply(state, client, step=1e-2) for client in CLIENTS]
    for cohort in ([], answers):
        draws: list[Tensor] = []
        for round in range(60):
            now = replace(state, round=round)
            sent = [replace(answer, round=round + 1) for answer in cohort]
            loud, still = (moved(now, release(now, sent, m)) for m in (private, quiet))
            noise = [(a - b).flatten() / sigma for a, b in zip(loud, still, strict=True)]
            draws.append(torch.cat(noise))
        z = torch.stack(draws)
        count = z.numel()
        assert count == 60 * (13 * 9 + 7 * 11 + 9 * 8 + 21 + 3)
        # five standard deviations of a mean, of a mean square and of a covariance
        assert abs(float(z.mean())) < 5 / count**0.5
        assert abs(float(z.square().mean()) - 1) < 5 * (2 / count) ** 0.5
        assert abs(float((z[1:] * z[:-1]).mean())) < 5 / (count - z.shape[1]) ** 0.5
        assert float((z.square().mean(0) - 1).abs().max()) < 6 * (2 / 60) ** 0.5


def test_the_noise_follows_from_the_secret_alone(state: ServerState) -> None:
    assert str(SECRET) not in repr(mechanism()), "no log shows it"
    one, again = (release(state, [], mechanism(noise=1.0)) for _ in range(2))
    assert same(one, again)
    other = release(state, [], replace(mechanism(noise=1.0), secret=bytes(32)))
    for name in SHAPES:
        assert not torch.isclose(one.layers[name].W, other.layers[name].W).any()


def test_the_numbers_are_uniform_and_normal() -> None:
    u = uniforms(SECRET, 20_000, "test")
    assert float(u.min()) > 0 and float(u.max()) < 1
    halves = 2.0**53 * u[u < 0.5]  # above, a float64 has no room for the half
    assert torch.equal(halves % 1, torch.full_like(halves, 0.5)), "never 0, which has no logarithm"
    ordered, grid = u.sort().values, torch.arange(1, 20_001).double() / 20_000
    assert float((ordered - grid).abs().max()) < 1.95 / 20_000**0.5  # Kolmogorov's 0.1 % bound
    z = normals(SECRET, torch.Size((101, 99)), "test")
    assert z.shape == (101, 99) and z.dtype == torch.float64
    ordered = torch.special.ndtr(z.flatten()).sort().values
    grid = torch.arange(1, 10_000).double() / 9_999
    assert float((ordered - grid).abs().max()) < 1.95 / 9_999**0.5
    assert not torch.equal(z, normals(SECRET, torch.Size((101, 99)), "another"))


def test_every_number_of_the_noise_is_drawn_on_its_own() -> None:
    """No two entries of one draw have anything in common, by sign or by size: a half that repeats the
    other would pass as normal, and could be subtracted from it."""
    count, size = 4000, 23  # an odd one, so that the last pair is cut
    z = torch.stack([normals(SECRET, torch.Size((size,)), "test", k) for k in range(count)])
    assert len(z.unique()) == count * size
    different = ~torch.eye(size, dtype=torch.bool)
    for x in (z, (z.square() - 1) / 2**0.5):  # each entry of mean 0 and variance 1
        covariance = (x.T @ x / count)[different]
        # of independent entries it has mean 0 and variance 1/count: six standard deviations, for the
        # squares' tails are heavy and there are 253 pairs
        assert float(covariance.abs().max()) < 6 / count**0.5


def test_no_two_layers_nor_rounds_share_their_noise() -> None:
    """Layers and head parameters of one shape, in two rounds: eight draws, no number twice."""
    shape, private = (6, 5), Mechanism(1.0, 1.0, 1.0, 1, SECRET)
    layer = FEDHL.init(initial(*shape, 2, 1.0, seed=0))
    head = {name: torch.zeros(shape, dtype=torch.float64) for name in "ab"}
    drawn: list[Tensor] = []
    for round in (1, 2):
        drawn += private.released_head(head, [], round).values()
        for name in "ab":
            released = private.released(FEDHL, layer, [], round, name)
            drawn.append(exact(released.lora) - exact(released.sent.lora))
    z = torch.stack([x.flatten() for x in drawn])
    near = torch.isclose(z[:, None, :, None], z[None, :, None, :], rtol=1e-6, atol=0)
    assert int(near.sum()) == z.numel(), "each is near itself alone"


# --- the cohort ---------------------------------------------------------------------------------


def test_clients_take_part_on_their_own() -> None:
    """With probability q each, whoever else does; by the secret, not by the seed of the config."""
    private = Mechanism(1.0, 1.0, 0.3, 2, SECRET)
    draws = torch.tensor(
        [[float(private.takes_part(id, round)) for id in ("ada", "bob")] for round in range(2000)]
    )
    deviation = (0.3 * 0.7 / 2000) ** 0.5
    assert (draws.mean(0) - 0.3).abs().max() < 5 * deviation
    both = float(draws.prod(1).mean())
    assert abs(both - 0.09) < 5 * (0.09 * 0.91 / 2000) ** 0.5
    assert all(replace(private, rate=1.0).takes_part("ada", round) for round in range(100))


def test_a_round_without_a_cohort_still_has_its_noise() -> None:
    federation = federate("bert", method="fedhl")
    state = initial_state(federation)
    rounds = []
    for secret in (bytes([k] * 32) for k in range(64)):
        private = Mechanism(1.0, 1.0, 0.2, 4, secret)
        now = replace(federation, privacy=private)
        if not now.cohort(1):
            rounds.append(run_round(now, state))
            break
    ((after, outcome),) = rounds
    assert outcome.clients == outcome.refused == [] and after.round == 1
    for name, before in state.layers.items():
        assert not torch.equal(after.layers[name].W, before.W)
    assert all(not torch.equal(after.head[name], h) for name, h in state.head.items())


# --- epsilon ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate, noise, rounds", [(0.05, 0.8, 9), (0.5, 3.0, 30), (0.01, 0.6, 500)])
def test_epsilon_is_between_a_lower_bound_and_that_of_moments(
    rate: float, noise: float, rounds: int
) -> None:
    """The lower bound: privacy losses rounded downwards; the upper one: Rényi's (arXiv 1908.10530)."""
    once = pld.from_gaussian_mechanism(
        noise, sampling_prob=rate, pessimistic_estimate=False, value_discretization_interval=1e-4
    )
    lower = once.self_compose(rounds).get_epsilon_for_delta(1e-5)
    moments = rdp.RdpAccountant()
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    moments.compose(event, rounds)
    assert lower <= epsilon(rate, noise, rounds, 1e-5) < 1.01 * lower
    assert epsilon(rate, noise, rounds, 1e-5) < moments.get_epsilon(1e-5)


@given(noise=st.floats(1, 30), rounds=st.integers(1, 50), delta=st.sampled_from([1e-3, 1e-6]))
def test_epsilon_of_everybody_is_that_of_one_gaussian(
    noise: float, rounds: int, delta: float
) -> None:
    """T rounds are one of noise z / √T, for which `δ = Φ(1/2z - ε z) - e^ε Φ(-1/2z - ε z)` (arXiv
    1805.06530, Theorem 5)."""
    z = noise / rounds**0.5
    eps = epsilon(1.0, noise, rounds, delta)

    def spent(eps: float) -> float:
        def below(x: float) -> float:
            return math.erfc(-x / 2**0.5) / 2

        return below(1 / (2 * z) - eps * z) - math.exp(eps) * below(-1 / (2 * z) - eps * z)

    assert spent(eps) <= delta * (1 + 1e-6)
    assert eps <= 0.01 or spent(0.99 * eps - 0.002) > delta


def test_epsilon_grows_with_rounds_and_rate_and_falls_with_noise() -> None:
    assert epsilon(0.1, 1.0, 0, 1e-5) == 0
    assert 0 < epsilon(0.1, 1.0, 10, 1e-5) < epsilon(0.1, 1.0, 100, 1e-5)
    assert epsilon(0.1, 2.0, 10, 1e-5) < epsilon(0.1, 1.0, 10, 1e-5) < epsilon(0.5, 1.0, 10, 1e-5)


def test_without_the_accountant_nothing_is_trained() -> None:
    code = (
        "import sys; sys.modules['dp_accounting'] = None\n"
        "from fedhl.server.accounting import check_installed\n"
        "from fedhl.errors import UserError\n"
        "try: check_installed()\n"
        "except UserError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'fedhl[dp]'" in run.stdout


# --- settings -----------------------------------------------------------------------------------

PRIVATE = {"privacy": {"clip": 1.0, "noise": 1.0}}
LABELS = {"kind": "sequence-classification"}


def test_weights_are_uniform_unless_said_otherwise() -> None:
    assert Config.model_validate(BASE | PRIVATE).weighting_used.name == "uniform"
    Config.model_validate(BASE | PRIVATE | {"weighting": "uniform"})


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_cannot_be_used_are_refused_by_name(name: str) -> None:
    if name in ALLOWED:
        Config.model_validate(BASE | PRIVATE | {"method": name})
        return
    with pytest.raises(ValueError, match=f"privacy: method '{name}' (does not|sends).*use method"):
        Config.model_validate(BASE | PRIVATE | {"method": name})


def test_which_methods_can_be_used() -> None:
    assert sorted(["fedhl_ef", "fedhl", "fedhera", "fed_plora"], key=list(METHODS).index) == ALLOWED
    assert "each other's adapters" in str(why_not(get_method("flora")))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"weighting": "examples"}, "privacy: weighting 'examples' would let one client"),
        ({"participation": {"stragglers": 0.1}}, "privacy: participation.stragglers cannot go"),
        ({"channel": {"kind": "air", "snr_db": 3}}, "privacy: channel cannot go with privacy"),
        ({"tasks": {"count": 2}, "task": LABELS}, "privacy: tasks cannot go with privacy"),
        ({"robust": {"clip": 2.0}}, "privacy: robust cannot go with privacy"),
        ({"privacy": {"clip": 1.0, "noise": 0}}, "greater than 0"),
        ({"privacy": {"clip": 1.0, "noise": 1, "delta": 1}}, "less than 1"),
        ({"privacy": {"noise": 1.0}}, "Field required"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate(BASE | PRIVATE | settings)


def test_values_that_cannot_be_meant() -> None:
    good = {"clip": 1.0, "noise": 1.0, "rate": 0.5, "clients": 4, "secret": SECRET}
    wrong: dict[str, Any] = {
        "clip": math.nan,
        "noise": 0.0,
        "rate": 1.5,
        "clients": 0,
        "secret": b"",
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"privacy: .*{name}"):
            Mechanism(**good | {name: value})


# --- whole runs ---------------------------------------------------------------------------------

SETTINGS = (
    "weighting=null",
    "privacy={clip: 0.5, noise: 0.8}",
    "rounds=3",
    "training.steps=2",
    "participation={fraction: 0.5}",
)


@pytest.fixture(scope="module")
def run(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished private run, with what it said in `said.txt`."""
    folder = tmp_path_factory.mktemp("private") / "run"
    overrides = [word for setting in SETTINGS for word in ("--set", setting)]
    done = tiny.fedhl(project, "run", "tiny.yaml", *overrides, "--quiet", "--out", folder)
    assert (done.code, done.err) == (0, ""), done
    (folder.parent / "said.txt").write_text(done.out)
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state_of(folder: Path, round: int = 3) -> bytes:
    return (folder / "state" / f"round-{round:06d}" / "state.safetensors").read_bytes()


def test_a_run_reports_what_it_spent(run: Path) -> None:
    spent = [line["diagnostics"]["epsilon"] for line in lines(run)]
    assert spent == [epsilon(0.5, 0.8, round, 1e-5) for round in range(4)]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["privacy"] == {
        **{"clip": 0.5, "noise": 0.8, "delta": 1e-5},
        **{"clients": 6, "rate": 0.5, "denominator": 3.0},
        **{"deviation": pytest.approx(0.8 * 0.5 / 3), "epsilon": spent[-1]},
    }
    assert summary["weighting"] == {"name": "uniform"}
    assert f"ε = {spent[-1]:.2f} at δ = 1e-05" in (run / "report.html").read_text("utf-8")
    for line in lines(run):
        for client in line["clients"]:
            assert client["weight"] == 1 / 3
            assert client["clip"] == min(1, 0.5 / client["norm"])


def test_the_secret_is_in_one_file_that_others_cannot_read(run: Path) -> None:
    file = run / "secret.key"
    assert file.stat().st_mode & 0o777 == 0o600
    secret = file.read_text().strip()
    assert len(bytes.fromhex(secret)) == 32
    for other in run.rglob("*"):
        if other.is_file() and other != file:
            found = other.read_bytes()
            assert secret.encode() not in found and bytes.fromhex(secret) not in found, other


def test_a_resumed_run_has_the_same_bytes(run: Path, tmp_path: Path, project: Path) -> None:
    """The noise of the last round is drawn again from the secret, and so is its cohort."""
    folder = tmp_path / "again"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "state" / "round-000003")
    done = tiny.fedhl(project, "resume", folder, "--quiet")
    assert (done.code, done.err) == (0, ""), done
    assert state_of(folder) == state_of(run)
    untimed = [[line | {"seconds": None} for line in lines(f)] for f in (folder, run)]
    assert untimed[0] == untimed[1]
    shutil.rmtree(folder / "state" / "round-000003")
    (folder / "secret.key").unlink()
    done = tiny.fedhl(project, "resume", folder, "--quiet")
    assert done.code == 2 and "secret.key is missing" in done.err


@pytest.mark.parametrize("loss", ["damaged", "deleted"])
def test_over_a_network_no_noise_is_drawn_twice(
    run: Path, tmp_path: Path, project: Path, loss: str
) -> None:
    """The clients' second replies would differ from the first."""
    folder = tmp_path / "again"
    shutil.copytree(run, folder)
    (folder / "run-id").write_text("over a network")
    last = folder / "state" / "round-000003"
    if loss == "damaged":
        (last / "state.safetensors").write_bytes(b"")
    else:
        shutil.rmtree(last)
    with pytest.raises(UserError, match="their noise would be added to the sums of other replies"):
        refuse_second_noise(folder, 2)
    done = tiny.fedhl(project, "resume", folder, "--quiet")
    assert done.code == 2 and "cannot be done again over a network" in done.err
    (folder / "run-id").unlink()
    refuse_second_noise(folder, 2)


def test_a_killed_run_goes_on_to_the_same_bytes(
    run: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is stopped within every round, but has the secret of the other."""
    monkeypatch.chdir(project)
    folder = tmp_path / "killed"

    class Killed(BaseException):
        pass

    def kill(phase: str, done: int, total: int) -> None:
        if "training" in phase and done == 1 and phase not in seen:
            seen.add(phase)
            raise Killed

    seen: set[str] = set()
    config = load_config(project / "tiny.yaml", SETTINGS)
    with pytest.raises(Killed):
        start_run(config, str(folder), Watcher(step=kill))
    # as if it had drawn the same secret at its start
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["round"] == 0
    assert (folder / "secret.key").read_text() != (run / "secret.key").read_text()
    shutil.rmtree(folder / "state")
    (folder / "state").mkdir()
    shutil.copy(run / "secret.key", folder / "secret.key")
    while True:
        try:
            resume_run(folder, Watcher(step=kill))
        except Killed:
            continue
        break
    assert seen and state_of(folder) == state_of(run)


def test_the_secret_of_a_folder(tmp_path: Path) -> None:
    first = secret_of(tmp_path, SECRET)
    assert first == SECRET == secret_of(tmp_path, bytes(32))
    (tmp_path / "secret.key").write_text("not a secret\n")
    with pytest.raises(UserError, match=r"secret\.key is damaged: expected 64 hexadecimal digits"):
        secret_of(tmp_path, SECRET)


def test_check_says_what_will_be_spent(project: Path) -> None:
    overrides = [word for setting in SETTINGS for word in ("--set", setting)]
    done = tiny.fedhl(project, "check", "tiny.yaml", *overrides)
    assert (done.code, done.err) == (0, ""), done
    said = " ".join(done.out.split())
    assert f"epsilon {epsilon(0.5, 0.8, 3, 1e-5):.2f} at delta 1e-05 after 3 rounds" in said
    assert (
        f"{epsilon(1.0, 0.8, 3, 1e-5):.2f} against an observer who sees which clients take part"
        in said
    )
    robust = "robust={clip: 2.0, reject: {kind: trimmed, share: 0.25}}"
    done = tiny.fedhl(project, "check", "tiny.yaml", "--set", robust)
    assert "the furthest 25% refused, clipped to 2" in " ".join(done.out.split())


def test_a_round_that_could_not_be_sent_ends_the_run_with_the_reason() -> None:
    """In float16 alone, whose largest number is 65,504: no client is left out for what it returned."""
    private = mechanism(noise=1e6, clip=1.0)
    for payload, fits in (("float32", True), ("bfloat16", True), ("float16", False)):
        state = start(FEDHL)
        answers = [reply(state, replace(client, payload=payload)) for client in CLIENTS]
        if fits:
            release(state, answers, private)
            continue
        with pytest.raises(
            UserError, match=r"round 1, with privacy: .*too large for float16.*bfloat16"
        ):
            release(state, answers, private)
        release(state, answers, mechanism())
