"""`python -m mlpext`."""

import sys

from mlpext.cli import main

sys.exit(main())
