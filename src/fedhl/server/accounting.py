"""The ε that a run has spent, by the accountant of privacy losses of `dp-accounting`."""

from __future__ import annotations

from functools import cache

from fedhl.errors import UserError

STEP = 1e-3
"""The step to which privacy losses are rounded, upwards: ε is never too small, and too large by less than a
hundredth."""


def check_installed() -> None:
    """Raises UserError unless the accountant is installed."""
    try:
        import dp_accounting.pld  # noqa: F401
    except ImportError:
        raise UserError(
            "privacy: the accountant is not installed; install it with `pip install 'fedhl[dp]'`"
        ) from None


@cache
def epsilon(rate: float, noise: float, rounds: int, delta: float) -> float:
    """ε of this number of rounds at this δ. Each round samples every client on its own with probability
    `rate`, and adds Gaussian noise of `noise` times the distance by which one client can move the sum (add
    or remove one client).

    Source: the distribution of the privacy loss of the sampled Gaussian mechanism, rounded upwards and
    composed by FFT, arXiv 1906.03049.
    Raises UserError if the accountant is not installed.
    """
    check_installed()
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=STEP
    )
    once = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    if rounds:
        accountant.compose(once, rounds)
    return float(accountant.get_epsilon(delta))
