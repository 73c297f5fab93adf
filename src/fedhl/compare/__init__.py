"""Many runs of one config: methods by seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedhl.lazy import lazy

if TYPE_CHECKING:
    from fedhl.compare.study import compare

__all__ = ["compare"]

__getattr__, __dir__ = lazy(__name__, {"compare": "fedhl.compare.study"})
