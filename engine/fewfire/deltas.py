"""What training has added to a matrix, in few bits: whole steps, whose codes zlib's Huffman coder packs.

What was added needs far fewer bits than a weight does: one (BitDelta, 2402.10193) for large models, here about 2.6. A
line, all weights of one neuron in the matrix, has a step of its own, a share of its root mean square, so that lines
have codes alike. Equal steps and an entropy coder need a quarter of a bit more than the best code there could be
(Gish and Pierce, 1968); six levels of one length, as many bits, lose 0.058 instead of 0.041. Knows nothing of files.
"""

from __future__ import annotations

import zlib

import numpy as np

#: A step as a share of a line's root mean square: 2.6 bits for normally distributed weights, an error of 0.041.
STEP = np.float32(0.7)
_LARGEST = 127


def encode(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes `(n,)` and steps `(lines,)` float32 of `(lines, weights)`."""
    lines = np.asarray(lines, np.float32)
    steps = STEP * np.sqrt(np.square(lines).mean(axis=1))
    codes = np.divide(lines, steps[:, None], out=np.zeros_like(lines), where=steps[:, None] != 0)
    codes = np.clip(np.rint(codes), -_LARGEST, _LARGEST).astype(np.int8)
    coder = zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)
    return np.frombuffer(coder.compress(codes.tobytes()) + coder.flush(), np.uint8), steps


def decode(packed: np.ndarray, steps: np.ndarray, weights: int) -> np.ndarray:
    """Lines `(lines, weights)` float32 of what `encode` gave. Raises `ValueError` for bytes that do not hold them."""
    count, coder = len(steps) * weights, zlib.decompressobj()
    try:
        codes = coder.decompress(packed.tobytes(), max(1, count))
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(codes) != count or not coder.eof or coder.unused_data:
        raise ValueError(f"its bytes do not hold {count} codes")
    return steps[:, None] * np.frombuffer(codes, np.int8).reshape(-1, weights).astype(np.float32)
