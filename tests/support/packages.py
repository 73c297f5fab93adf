"""Packages that bring models and data."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def package(name: str) -> Path:
    """Where an installed package is; it need not be importable."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"the package {name} is not installed")
    return Path(found.submodule_search_locations[0])
