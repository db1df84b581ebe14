"""The examples are scripts that share code: they find it beside them, also when imported as `examples.NAME`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
