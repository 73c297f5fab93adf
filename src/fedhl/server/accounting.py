"""What a run has spent of its privacy: epsilon, by the Rényi accountant of `dp-accounting`."""

from __future__ import annotations

from functools import cache

from fedhl.errors import UserError

ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)
"""Orders of the Rényi divergence; each gives a valid epsilon, of which the least is taken. Whole ones
only: at rates below 1 their moments are finite sums, the others' are series that may not converge."""


def check_installed() -> None:
    """Raises UserError unless the accountant is there, before anything is trained."""
    try:
        import dp_accounting.rdp  # noqa: F401
    except ImportError:
        raise UserError(
            "privacy: the accountant is not installed; `pip install 'fedhl[dp]'` brings it"
        ) from None


@cache
def epsilon(rate: float, noise: float, rounds: int, delta: float) -> float:
    """ε of so many rounds at this δ: each samples every client with probability `rate`, on its own, and
    adds Gaussian noise of `noise` times what one client can move (add or remove one client).

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
