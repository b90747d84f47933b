"""Training models to fire less. Needs torch (`pip install 'fewfire[train]'`), as nothing else of the engine does."""

from __future__ import annotations

from fewfire.errors import FewfireError

try:
    import torch  # noqa: F401
except ImportError:
    raise FewfireError("training needs torch: pip install 'fewfire[train]'") from None
