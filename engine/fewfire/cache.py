"""Where fewfire keeps what it can make again: downloads, packed models, compiled kernels."""

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """The user's cache directory for fewfire; `FEWFIRE_CACHE` overrides it. Not created here."""
    if override := os.environ.get("FEWFIRE_CACHE"):
        return Path(override).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fewfire"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fewfire"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewfire"
