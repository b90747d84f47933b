"""What training has added to a matrix, in few bits: six levels for a weight, three weights in a byte.

What was added needs far fewer bits than a weight does: one (BitDelta, 2402.10193) for large models, here 2.7. A line,
all weights of one neuron in the matrix, has a scale of its own: weight = scale * (code - 2.5) with codes 0 to 5, and a
byte holds code + 6 * code + 36 * code. Knows nothing of files.
"""

from __future__ import annotations

import numpy as np

LEVELS = 6
IN_A_BYTE = 3
_MIDDLE = np.float32((LEVELS - 1) / 2)
#: Scales that are tried, as shares of a line's root mean square: 0.73 is best if weights are normally distributed.
_SCALES = np.linspace(0.4, 1.0, 13, dtype=np.float32)


def width(weights: int) -> int:
    """Bytes of a line."""
    return -(-weights // IN_A_BYTE)


def encode(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes `(lines, width)` and scales `(lines,)` float32 of `(lines, weights)`: the scale with the least error."""
    lines = np.ascontiguousarray(lines, np.float32)
    size = np.sqrt(np.square(lines).mean(axis=1, keepdims=True))
    least, scales = np.full(size.shape, np.inf, np.float32), np.zeros_like(size)
    for share in _SCALES:
        scale = share * size
        error = np.square(lines - scale * (_codes(lines, scale) - _MIDDLE)).mean(axis=1, keepdims=True)
        better = error < least
        least, scales = np.where(better, error, least), np.where(better, scale, scales)
    codes = np.zeros((len(lines), width(lines.shape[1]) * IN_A_BYTE), np.uint8)
    codes[:, : lines.shape[1]] = _codes(lines, scales)
    a, b, c = codes.reshape(len(lines), -1, IN_A_BYTE).transpose(2, 0, 1)
    return a + LEVELS * b + LEVELS**2 * c, scales[:, 0]


def _codes(lines: np.ndarray, scales: np.ndarray) -> np.ndarray:
    steps = np.divide(lines, scales, out=np.zeros_like(lines), where=scales != 0)
    return np.clip(np.rint(steps + _MIDDLE), 0, LEVELS - 1)


def decode(packed: np.ndarray, scales: np.ndarray, weights: int) -> np.ndarray:
    """Lines `(lines, weights)` float32 of what `encode` gave. Raises `ValueError` for a byte that stands for nothing.

    packed: `(lines, width(weights))` uint8; scales: `(lines,)` float32.
    """
    if packed.max(initial=0) >= LEVELS**IN_A_BYTE:
        raise ValueError(f"a byte is {packed.max()}, expected less than {LEVELS**IN_A_BYTE}")
    codes = np.stack([packed // LEVELS**i % LEVELS for i in range(IN_A_BYTE)], axis=2).reshape(len(packed), -1)
    return scales[:, None] * (codes[:, :weights] - _MIDDLE)
