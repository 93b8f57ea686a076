"""``python -m distopt.integrations.tokenizers`` is ``distopt-tokenizers``."""

import sys

from distopt.integrations.tokenizers.cli import main

if __name__ == "__main__":
    sys.exit(main())
