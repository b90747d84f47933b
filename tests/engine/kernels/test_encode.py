"""The fitting of q4 groups against its twin in `perf/kernel_table.py`."""

from __future__ import annotations

import numpy as np
import pytest

from perf.kernel_table import TABLE


@pytest.mark.parametrize("groups", [1, 7, 500])
def test_fit_q4(groups: int, random: np.random.Generator) -> None:
    TABLE["fit_q4"](random, groups=groups).check()
