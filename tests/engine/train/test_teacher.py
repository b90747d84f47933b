"""The cache has what the network would say, and computes each window once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fewfire.train.network import Network
from fewfire.train.teacher import TeacherCache
from learning import Learned


class Counting:
    """A network that counts the windows that it reads."""

    def __init__(self, network: Network) -> None:
        self._network, self.read = network, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._network, name)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        self.read += len(ids)
        return self._network.hidden(ids)


def cache(learned: Learned, directory: Path, key: str = "a", k: int = 8) -> tuple[TeacherCache, Counting]:
    network = Counting(learned.network)
    return TeacherCache(directory, network, learned.corpus.windows, k, key), network  # type: ignore[arg-type]


def test_it_has_what_the_network_says(learned: Learned, tmp_path: Path) -> None:
    chosen = np.array([5, 0, 11])
    found = cache(learned, tmp_path)[0].logits(chosen)
    with torch.no_grad():
        logits = learned.network(torch.from_numpy(learned.corpus.windows[chosen].astype(np.int64)))
    log_p = logits.log_softmax(-1)
    assert found.values.shape == (3, learned.corpus.windows.shape[1], 8)
    assert (found.values - found.total[..., None] - log_p.gather(-1, found.ids)).abs().max() < 0.02  # float16
    assert (log_p.gather(-1, found.ids).sum(-1) - log_p.topk(8).values.sum(-1)).abs().max() < 1e-5


def test_each_window_is_computed_once_even_by_another_process(learned: Learned, tmp_path: Path) -> None:
    first, network = cache(learned, tmp_path)
    one = first.logits(np.array([1, 2, 3]))
    assert network.read == 3
    again, network = cache(learned, tmp_path)
    two = again.logits(np.array([3, 4, 1]))
    assert network.read == 1
    assert torch.equal(one.values[2], two.values[0])
    assert torch.equal(one.total[0], two.total[2])


@pytest.mark.parametrize(("key", "k"), [("b", 8), ("a", 4)])
def test_another_key_begins_anew(learned: Learned, tmp_path: Path, key: str, k: int) -> None:
    cache(learned, tmp_path)[0].logits(np.array([1, 2]))
    again, network = cache(learned, tmp_path, key, k)
    again.logits(np.array([1, 2]))
    assert network.read == 2
