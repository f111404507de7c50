"""The old way in: ``python main.py VERB …`` is ``tunejob VERB …``."""

import sys

from launcher.cli import main

if __name__ == "__main__":
    sys.exit(main())
