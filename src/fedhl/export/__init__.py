"""Adapter folders, merged models and their cards; merging adapters."""

from __future__ import annotations

from fedhl.export.merging import (
    Merge,
    export_adapter,
    export_merged,
    merge_adapters,
    merge_folders,
    model_card,
)

__all__ = [
    "Merge",
    "export_adapter",
    "export_merged",
    "merge_adapters",
    "merge_folders",
    "model_card",
]
