"""`python -m dpmed` is the command line."""

from __future__ import annotations

from dpmed.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
