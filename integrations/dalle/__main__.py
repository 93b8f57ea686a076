"""``python -m distopt.integrations.dalle`` is ``distopt-dalle``."""

import sys

from distopt.integrations.dalle.cli import main

if __name__ == "__main__":
    sys.exit(main())
