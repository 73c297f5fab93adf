"""A run simulated by Flower on Ray, with a ClientApp of the tests: `python -m support.simulate
CONFIG FOLDER MODULE:APP`."""

import sys
from functools import partial
from importlib import import_module
from pathlib import Path

from fedhl.config import load_config
from fedhl.flower.ray import simulate
from fedhl.watch import Watcher

if __name__ == "__main__":
    config, folder, client = sys.argv[1:]
    module, name = client.split(":")
    watcher = Watcher(say=partial(print, flush=True))
    app = getattr(import_module(module), name)
    simulate(load_config(Path(config)), Path(folder), watcher, 2, app)
