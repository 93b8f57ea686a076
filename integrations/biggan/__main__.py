"""``python -m distopt.integrations.biggan`` is ``distopt-biggan``."""

import sys

from distopt.integrations.biggan.cli import main

if __name__ == "__main__":
    sys.exit(main())
