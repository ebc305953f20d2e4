"""The long versions of the tests of serving's and training's promises: `make soak`, or `python -m tests.soak --minutes 60`.

They use the drivers of the short ones, more often, longer and larger.
"""

from __future__ import annotations

import sys
from pathlib import Path

for _folder in ("unit/serve", "unit/data", "contract", "e2e"):
    sys.path.append(str(Path(__file__).parents[1] / _folder))
