"""What the tests of the environments share: a screen that is not there, and the variants that every contract covers."""

import os

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
