"""Ray reads its settings when it is first imported, whichever test does that: they are set before any test module."""

from __future__ import annotations

import os

from service import launcher

os.environ.update(launcher.RAY_ENVIRONMENT)
os.environ["RAY_AUTH_MODE"] = "token"
