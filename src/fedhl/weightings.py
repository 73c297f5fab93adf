"""The names of the weightings; what each is, and its maths, is in `fedhl.weighting`."""

from __future__ import annotations

from fedhl.names import Table

WEIGHTINGS = Table(
    {
        "uniform": "fedhl.weighting:Uniform",
        "examples": "fedhl.weighting:Examples",
        "truncation": "fedhl.weighting:Truncation",
        "balanced": "fedhl.weighting:Balanced",
        "norm": "fedhl.weighting:Norm",
        "loss": "fedhl.weighting:Loss",
        "generalization_bound": "fedhl.weighting:GeneralizationBound",
    }
)
"""Name -> class. A class is imported at its first use: a wrong name can be refused without torch."""
