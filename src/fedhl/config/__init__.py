"""The configuration of a run: one YAML file, strictly checked before anything is loaded or trained."""

from __future__ import annotations

from fedhl.config.schema import Config
from fedhl.config.text import dump_config, load_config

__all__ = ["Config", "dump_config", "load_config"]
