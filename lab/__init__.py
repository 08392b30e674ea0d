"""Code that the commands (train.py, sample.py, compare.py, runs.py) share, one concern per file."""

import sys
from importlib.util import find_spec

# Every command imports this package first, so that missing dependencies are reported here, in one line.
NEEDED = ("torch", "numpy", "tiktoken", "matplotlib", "tyro", "rich", "safetensors", "jinja2")
missing = [name for name in NEEDED if find_spec(name) is None]
if missing:
    print(f"error: this Python lacks {', '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
    sys.exit(2)
