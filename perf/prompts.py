"""Texts that the harness feeds to engines: built in, so that a run needs no file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: Natural beginnings, many of them of texts that a small model knows by heart, so that it is sure of each next token.
PROMPTS = (
    "The capital of France is",
    "One, two, three, four, five, six,",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10,",
    "A B C D E F G H",
    "Monday, Tuesday, Wednesday,",
    "January, February, March, April,",
    "The planets of the solar system are Mercury, Venus,",
    "To be, or not to be, that is the question:",
    "We the People of the United States, in Order to form a more perfect Union,",
    "Four score and seven years ago our fathers brought forth",
    "We hold these truths to be self-evident, that all men are created equal,",
    "I have a dream that one day",
    "It was the best of times, it was the worst of times,",
    "Twinkle, twinkle, little star, how I wonder",
    "Mary had a little lamb, its fleece was white as snow,",
    "Our Father which art in heaven, Hallowed be thy name.",
    "In the beginning God created the heaven and the earth.",
    "2, 4, 6, 8, 10, 12, 14, 16,",
    "10, 20, 30, 40, 50, 60,",
    "red, orange, yellow, green, blue,",
    "for i in range(10):\n    print(i)\n\nfor j in range(10):\n",
    "x = 1\ny = 2\nz = 3\nprint(x)\nprint(y)\n",
    "apple apple apple apple apple apple apple apple",
    "yes no yes no yes no yes no yes no",
    "Q: What is 1 + 1?\nA: 2\nQ: What is 2 + 2?\nA: 4\nQ: What is",
    "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy dog. The quick",
    "Water freezes at 0 degrees Celsius and boils at 100 degrees Celsius. Water freezes at",
    "<ul>\n<li>one</li>\n<li>two</li>\n<li>three</li>\n",
    "a = 1, b = 2, c = 3, d = 4,",
    "Hello, my name is",
)

_PROSE = """\
The lighthouse stood at the end of a long spit of gravel, and whoever wanted to reach it had to wait for low water.
In winter the keeper counted the days by the colour of the sea. He wrote them down in a ledger, together with the
height of the barometer, the direction of the wind and the names of ships that passed near enough to be read through
the glass. Once a month a boat came from the town with oil, flour, lamp wicks, letters and a newspaper that was
already three weeks old. Nobody on board ever stayed for longer than the tide allowed. When engineers replaced the
old lamp with an electric one, they found forty years of ledgers in the store, and a scientist who happened to read
them noticed that storms came in pairs about nine days apart. She spent the following summer comparing the figures
with those of other stations along the coast: of 212 pairs, 168 agreed within a day.
"""


def prose(encode: Callable[[str], Sequence[int]], count: int) -> list[int]:
    """`count` token ids of ordinary text, repeated as often as it takes."""
    ids = encode(_PROSE)
    return [ids[i % len(ids)] for i in range(count)]
