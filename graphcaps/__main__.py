"""`python -m graphcaps` is `graphcaps`."""

import sys

from graphcaps.cli import main

sys.exit(main())
