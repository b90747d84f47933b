"""The methods that decide which weights a token needs: one file per family, all with the same result, a `Selection`."""

from fewfire.selectors.selection import Columns, Predictor, Screen, Selection

__all__ = ["Columns", "Predictor", "Screen", "Selection"]
