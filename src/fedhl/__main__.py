"""`python -m fedhl` is `fedhl`."""

from __future__ import annotations

from fedhl.cli import main

if __name__ == "__main__":
    main()
