"""`python -m vitkernels`."""

import sys

from vitkernels.cli import main

sys.exit(main())
