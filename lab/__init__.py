"""What the drivers (train.py, sample.py, compare.py) share, one concern a file."""

import sys
from importlib.util import find_spec

# The first of our packages that every program imports: a missing one is said in a line, not in a traceback.
NEEDED = ("torch", "numpy", "tiktoken", "matplotlib", "tyro", "rich", "safetensors")
missing = [name for name in NEEDED if find_spec(name) is None]
if missing:
    print(f"error: this Python lacks {', '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
    sys.exit(2)
