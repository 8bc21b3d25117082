"""``python -m modmoe``."""

import sys

from modmoe.cli import main

sys.exit(main())
