"""What the original model predicts, on disk: the k largest logits after each token of the training windows.

A window is computed when it is first asked for and read from then on, so a second pass over the text, or a second run
with the same text, costs nothing. What is asked for is always what is on disk, so that it is the same both times.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewfire.errors import FewfireError
from fewfire.train.losses import TopLogits, top_logits
from fewfire.train.network import Network

_AT_ONCE = 256  # tokens whose logits over the whole vocabulary are in memory


class TeacherCache:
    """The top logits of N windows of T tokens, in three arrays of a directory: float16, int32 and float32.

    Belongs to a key, which says all that they depend on; made anew if another is there.
    """

    def __init__(self, directory: Path, network: Network, windows: np.ndarray, k: int, key: str) -> None:
        self.network, self._windows = network, windows
        self._k = min(k, network.config.vocab_size)
        count, T = windows.shape
        directory.mkdir(parents=True, exist_ok=True)
        about = directory / "about.json"
        wanted = {"key": key, "windows": count, "tokens": T, "k": self._k}
        try:
            same = json.loads(about.read_text()) == wanted
        except (OSError, ValueError):
            same = False
        mode = "r+" if same else "w+"
        if not same:
            about.unlink(missing_ok=True)
        try:
            self._values = _map(directory / "values.f16", mode, np.float16, (count, T, self._k))
            self._ids = _map(directory / "ids.i32", mode, np.int32, (count, T, self._k))
            self._totals = _map(directory / "totals.f32", mode, np.float32, (count, T))
            self._there = _map(directory / "there.u8", mode, np.uint8, (count,))
        except (OSError, ValueError) as error:
            raise FewfireError(f"cannot use the teacher's cache {directory} ({error}): delete it") from None
        about.write_text(json.dumps(wanted))

    def logits(self, chosen: np.ndarray) -> TopLogits:
        """Of the windows of these numbers, `(len(chosen), T, k)`."""
        missing = np.array([i for i in chosen if not self._there[i]], np.int64)
        if len(missing):
            self._compute(missing)
        device = self.network.embed.weight.device
        values = torch.from_numpy(self._values[chosen].astype(np.float32)).to(device)
        ids = torch.from_numpy(self._ids[chosen].astype(np.int64)).to(device)
        return TopLogits(values, ids, torch.from_numpy(self._totals[chosen]).to(device))

    @torch.no_grad()
    def _compute(self, chosen: np.ndarray) -> None:
        device = self.network.embed.weight.device
        ids = torch.from_numpy(self._windows[chosen].astype(np.int64)).to(device)
        hidden = self.network.hidden(ids)
        found = [self._top(part) for part in hidden.flatten(0, 1).split(_AT_ONCE)]
        shape = (*ids.shape, self._k)
        self._values[chosen] = torch.cat([f.values for f in found]).reshape(shape).cpu().numpy()
        self._ids[chosen] = torch.cat([f.ids for f in found]).reshape(shape).cpu().numpy()
        self._totals[chosen] = torch.cat([f.total for f in found]).reshape(ids.shape).cpu().numpy()
        self._there[chosen] = 1  # last, so that a killed run leaves no window that only seems to be there

    def _top(self, hidden: Tensor) -> TopLogits:
        """Shifted by the largest, so that what float16 rounds is small."""
        found = top_logits(self.network.logits(hidden).float(), self._k)
        largest = found.values[:, :1]
        return TopLogits(found.values - largest, found.ids, found.total - largest[:, 0])


def _map(path: Path, mode: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(path, dtype, mode=mode, shape=shape)  # type: ignore[call-overload]
