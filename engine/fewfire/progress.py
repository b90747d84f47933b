"""How the engine says how far it is: it never prints, it calls back."""

from collections.abc import Callable

#: Called with (what is being done, units done, units in all); 0 in all when that is not known.
#: The first argument is for people and changes when the next stage begins.
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """The progress callback of callers who want none."""
