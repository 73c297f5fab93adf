"""Many runs of one config: methods by seeds."""

from __future__ import annotations

from fedhl.compare.study import compare

__all__ = ["compare"]
