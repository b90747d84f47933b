"""Fresh random inputs for every run; a failure prints what to set to see it again."""

import os

import numpy as np
import pytest


@pytest.fixture
def random() -> np.random.Generator:
    """A generator with another seed each time, or with that of FEWFIRE_TEST_SEED."""
    seed = int(os.environ.get("FEWFIRE_TEST_SEED") or np.random.SeedSequence().generate_state(1)[0])
    print(f"to repeat: FEWFIRE_TEST_SEED={seed}")
    return np.random.default_rng(seed)
