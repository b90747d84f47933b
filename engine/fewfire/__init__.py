"""fewfire: a CPU engine that runs language models by reading only the weights of the neurons that fire."""

from fewfire.errors import CheckpointError, ContextFullError, FewfireError, SourceError
from fewfire.generate import Completion, Piece, Stats, Stream
from fewfire.model import Model, load
from fewfire.sampling import Sampling
from fewfire.session import Session

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Completion",
    "ContextFullError",
    "FewfireError",
    "Model",
    "Piece",
    "Sampling",
    "Session",
    "SourceError",
    "Stats",
    "Stream",
    "load",
]
