"""``python -m distopt.integrations.recipes`` is ``distopt-recipes``."""

import sys

from distopt.integrations.recipes.cli import main

if __name__ == "__main__":
    sys.exit(main())
