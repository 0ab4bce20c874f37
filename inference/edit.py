"""Edit images: `latentdiff edit` from a checkout of the source."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("latentdiff") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latentdiff.cli.edit import main

if __name__ == "__main__":
    sys.exit(main())
