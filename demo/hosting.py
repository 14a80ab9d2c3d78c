"""The programs that start the host live with the tests; the demo's own programs find them here."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from host import launcher, server

__all__ = ["launcher", "server"]
