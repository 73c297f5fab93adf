"""The rows of banking77, where the configs look for them.

    python experiments/banking77_rows.py FOLDER [OUT]

FOLDER holds `train.csv` and `test.csv` of the published data set (CC-BY-4.0; it is not part of this
repository). Copies them to OUT, being `build/banking77` unless given.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def main(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("train.csv", "test.csv"):
        print(shutil.copyfile(folder / name, out / name))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else "build/banking77"))
