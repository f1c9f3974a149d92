"""`python -m resae`: the same as the command `resae`."""

import sys

from resae.cli import main

sys.exit(main())
