"""The weightings: formulas by hand, invariances, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import dense as reference

from fedhl import WEIGHTINGS, Cohort, get_weighting
from fedhl.lora import truncate
from fedhl.seeds import generator
from fedhl.weighting import data_share, relative_error

everyone = pytest.mark.parametrize("name", WEIGHTINGS)


@st.composite
def cohorts(draw: st.DrawFn) -> Cohort:
    """Up to 6 clients and 3 layers; no layer lacks more than it holds."""
    K, L = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    energy = draw(st.lists(st.floats(1e-6, 1e6), min_size=L, max_size=L))
    share = st.lists(st.floats(0, 1), min_size=L, max_size=L)
    error = [[s * e for s, e in zip(draw(share), energy, strict=True)] for _ in range(K)]
    examples = draw(st.lists(st.integers(0, 1000), min_size=K, max_size=K).filter(any))
    return Cohort(examples, error, energy, losses=[1.0] * K, norms=[1.0] * K, bounds=[1.0] * K)


def small(error: list[float], examples: list[float] | None = None) -> Cohort:
    """One layer of energy 1, so that the errors are the relative ones."""
    return Cohort(examples or [1.0] * len(error), [[e] for e in error], [1.0])


# All of them


@everyone
@given(cohort=cohorts())
def test_weights_are_a_distribution(name: str, cohort: Cohort):
    p = get_weighting(name)(cohort)
    assert p.shape == (len(cohort.examples),) and p.dtype == torch.float64
    assert bool((p >= 0).all())
    # Six quotients and a sum of six.
    assert abs(float(p.sum()) - 1) <= 20 * torch.finfo(torch.float64).eps


@everyone
@given(cohort=cohorts())
def test_order_of_clients_is_order_of_weights(name: str, cohort: Cohort):
    weighting = get_weighting(name)
    columns = {
        key: torch.as_tensor(getattr(cohort, key)).flip(0)
        for key in ("examples", "error", "norms", "losses", "bounds")
    }
    turned = Cohort(energy=cohort.energy, **columns)
    assert torch.allclose(weighting(turned), weighting(cohort).flip(0), rtol=1e-12, atol=0)


@everyone
def test_the_cohort_is_not_touched(name: str):
    examples, error = torch.tensor([1.0, 2.0]), torch.tensor([[0.1], [0.2]])
    get_weighting(name)(Cohort(examples, error, [1.0]))
    assert examples.tolist() == [1.0, 2.0] and error.equal(torch.tensor([[0.1], [0.2]]))


@everyone
def test_a_single_client_has_all_the_weight(name: str):
    assert get_weighting(name)(small([0.3])).tolist() == [1.0]


# One by one


def test_uniform():
    assert get_weighting("uniform")(small([0.0, 0.9, 0.1, 0.1])).tolist() == [0.25] * 4


def test_examples():
    p = get_weighting("examples")(small([0.0, 0.9, 0.1], examples=[10, 30, 60]))
    assert p.tolist() == pytest.approx([0.1, 0.3, 0.6])


def test_examples_without_any_is_an_error():
    with pytest.raises(ValueError, match="no client has any training row"):
        get_weighting("examples")(small([0.1, 0.2], examples=[0, 0]))


def test_a_client_without_examples_has_no_weight():
    assert get_weighting("examples")(small([0.1, 0.2], examples=[0, 5])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("power", "inverse"),
    [
        (2, [1 / 0.1, 1 / (0.01 + 0.1), 1 / (0.25 + 0.1)]),  # as printed: 1/(ê² + ε)
        (1, [1 / 0.1, 1 / (0.1 + 0.1), 1 / (0.5 + 0.1)]),
        (0, [1.0, 1.0, 1.0]),
    ],
)
def test_truncation_by_hand(power: float, inverse: list[float]):
    p = get_weighting("truncation", power=power, epsilon=0.1)(small([0.0, 0.1, 0.5]))
    assert p.tolist() == pytest.approx([x / sum(inverse) for x in inverse])


def test_truncation_equals_the_reference_over_real_layers():
    g = generator(0, "layers")
    layers = [torch.randn(m, n, generator=g, dtype=torch.float64) for m, n in ((8, 6), (5, 9))]
    ranks = [1, 2, 4, 5]
    error = [[float((W - truncate(W, r).delta()).square().sum()) for W in layers] for r in ranks]
    cohort = Cohort([1] * 4, error, [float(W.square().sum()) for W in layers])
    for power, epsilon in ((2, 1e-3), (1, 0.05)):
        p = get_weighting("truncation", power=power, epsilon=epsilon)(cohort)
        assert p.tolist() == pytest.approx(
            reference.truncation_weights(layers, ranks, power, epsilon), rel=1e-10
        )


def test_the_error_is_one_number_over_all_layers():
    """`Σ_l e_il / Σ_l ||W_l||²`: a ratio of sums; the mean of the ratios would be 0.5 for client 0."""
    cohort = Cohort([1, 1], error=[[1.0, 0.0], [0.5, 49.5]], energy=[1.0, 99.0])
    assert relative_error(cohort).tolist() == pytest.approx([0.01, 0.5])


@given(cohort=cohorts(), factor=st.floats(1e-3, 1e3), power=st.sampled_from([1.0, 2.0]))
def test_truncation_does_not_depend_on_the_scale_of_W(cohort: Cohort, factor: float, power: float):
    """W -> cW multiplies errors and energies by c²: weights do not move as training proceeds."""
    error, energy = torch.as_tensor(cohort.error), torch.as_tensor(cohort.energy)
    grown = Cohort(cohort.examples, factor**2 * error, factor**2 * energy)
    weighting = get_weighting("truncation", power=power)
    assert torch.allclose(weighting(grown), weighting(cohort), rtol=1e-9, atol=0)


@given(cohort=cohorts(), epsilon=st.floats(1e-9, 10.0), power=st.sampled_from([1.0, 2.0]))
def test_epsilon_caps_the_imbalance(cohort: Cohort, epsilon: float, power: float):
    p = get_weighting("truncation", power=power, epsilon=epsilon)(cohort)
    assert float(p.max() / p.min()) <= (1 + epsilon) / epsilon * (1 + 1e-9)


def test_truncation_is_uniform_before_W_has_moved():
    cohort = Cohort([5, 1, 1], torch.zeros(3, 2), [0.0, 0.0])
    assert relative_error(cohort).tolist() == [0.0] * 3
    assert get_weighting("truncation")(cohort).tolist() == pytest.approx([1 / 3] * 3)


def test_data_shares_play_no_part_in_truncation():
    one = get_weighting("truncation")(small([0.1, 0.2], examples=[1, 1]))
    two = get_weighting("truncation")(small([0.1, 0.2], examples=[1, 99]))
    assert torch.equal(one, two)


def test_data_share():
    assert data_share(small([0.1, 0.2], examples=[1, 3])).tolist() == [0.25, 0.75]


# What is refused


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"'truncaton'; did you mean 'truncation'\?.*uniform"):
        get_weighting("truncaton")
    with pytest.raises(ValueError, match=r"known: .*examples"):
        get_weighting("qqqqq")


def test_an_unknown_hyperparameter_is_named():
    with pytest.raises(ValueError, match="no hyperparameter 'eps'; it has: power, epsilon"):
        get_weighting("truncation", eps=1e-3)
    with pytest.raises(ValueError, match="'uniform' has no hyperparameter 'x'; it has none"):
        get_weighting("uniform", x=1)


@pytest.mark.parametrize(
    ("hyperparameters", "field"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": -1e-3}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"epsilon": float("inf")}, "epsilon"),
        ({"power": -1.0}, "power"),
        ({"power": float("nan")}, "power"),
    ],
)
def test_hyperparameters_out_of_range(hyperparameters: dict[str, float], field: str):
    with pytest.raises(ValueError, match=f"truncation: {field} must be"):
        get_weighting("truncation", **hyperparameters)


GOOD: dict[str, Any] = {"examples": [1, 2], "error": [[0.1, 0.2], [0.3, 0.4]], "energy": [1, 2]}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"error": [[0.1, -0.2], [0.3, 0.4]]}, "error has a negative"),
        ({"error": [[0.1, float("nan")], [0.3, 0.4]]}, "error has a negative or non-finite"),
        ({"energy": [1, float("inf")]}, "energy has a negative or non-finite"),
        ({"examples": [1, -2]}, "examples has a negative"),
        ({"losses": [1, float("nan")]}, "losses has a negative or non-finite"),
        ({"error": [[0.1, 0.2]]}, r"error must be of shape \(2, 2\), got \(1, 2\)"),
        ({"error": [0.1, 0.2]}, "error must be of shape"),
        ({"energy": [1, 2, 3]}, "error must be of shape"),
        ({"norms": [1, 2, 3]}, r"norms must be of shape \(2,\), got \(3,\)"),
        ({"losses": [1]}, "losses must be of shape"),
        ({"bounds": [[1, 2]]}, "bounds must be of shape"),
        ({"examples": [], "error": torch.zeros(0, 2)}, "no client arrived"),
    ],
)
def test_a_wrong_cohort_is_refused(change: dict[str, Any], match: str):
    Cohort(**GOOD)
    with pytest.raises(ValueError, match=match):
        Cohort(**(GOOD | change))


def test_a_loss_may_be_negative():
    Cohort(**GOOD, losses=[-0.5, 0.5])
