"""`python -m transformerfam` is `fam`, and `accelerate launch -m transformerfam` is on many devices."""

from __future__ import annotations

import sys

from transformerfam.cli import main

if __name__ == "__main__":
    sys.exit(main())
