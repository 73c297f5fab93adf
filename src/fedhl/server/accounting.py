"""The ε that a run has spent, by the Rényi accountant of `dp-accounting`."""

from __future__ import annotations

from functools import cache

from fedhl.errors import UserError

ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)
"""Orders of the Rényi divergence; each gives a valid ε, and the least is taken. Whole orders only: at rates
below 1 the moments of whole orders are finite sums, those of other orders are series that may not
converge."""


def check_installed() -> None:
    """Raises UserError unless the accountant is installed."""
    try:
        import dp_accounting.rdp  # noqa: F401
    except ImportError:
        raise UserError(
            "privacy: the accountant is not installed; install it with `pip install 'fedhl[dp]'`"
        ) from None


@cache
def epsilon(rate: float, noise: float, rounds: int, delta: float) -> float:
    """ε of this number of rounds at this δ. Each round samples every client on its own with probability
    `rate`, and adds Gaussian noise of `noise` times the distance by which one client can move the sum (add
    or remove one client).

    Source: Rényi accounting of the sampled Gaussian mechanism, arXiv 1908.10530.
    Raises UserError if the accountant is not installed.
    """
    check_installed()
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(ORDERS, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    once = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    if rounds:
        accountant.compose(once, rounds)
    return float(accountant.get_epsilon(delta))
