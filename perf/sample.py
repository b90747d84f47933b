"""Makes the sample text that `fewfire calibrate` uses by default: `python -m perf.sample --prose FILE ...`.

More than half of it is what the default model says by itself, at temperature 0.9, when it is given the openings below:
stories, encyclopedic articles, dialogue, news, letters, recipes, mathematics, code, and answers in a chat. It is what
the model meets when it generates. But what a model says surprises it less than what people write, and a calibration on
such text alone promises too much (perf/LOG.md, "a sample that people wrote"). So the rest are paragraphs of the files
given, evenly spaced, between the model's pieces. In the sample that ships they are from three texts in the public
domain: the Jargon File 4.4.7 (Debian's jargon-text), the Constitution and the Declaration of Independence of the United
States (Debian's miscfiles). The same model, format and seed on the same kind of CPU give the same text.
"""

from __future__ import annotations

import argparse
import gzip
import random
import re
import sys
from pathlib import Path

import fewfire
from fewfire.team import default_threads

OUT = Path(fewfire.__file__).parent / "sample.txt"
_TOPICS = (
    "a lighthouse", "the honey bee", "the city of Lisbon", "iron and steel", "learning to cook", "an old bicycle",
    "the French Revolution", "volcanoes", "a lost letter", "jazz music", "the moons of Jupiter", "growing tomatoes",
    "railways", "the human heart", "chess", "a village school", "the Amazon river", "saving money", "photography",
    "ancient Rome", "sailing boats", "vaccines", "a night in the mountains", "the price of bread",
)  # fmt: skip
_CONTINUED = (
    "{Topic}\n\nThe history of {topic} begins",
    "It was late in the evening, and nobody in the room wanted to talk about {topic}.",
    "\"Have you ever thought about {topic}?\" she asked.\n\n\"Not once,\" he said.",
    "According to a report published on Tuesday, {topic}",
    "Dear Margaret,\n\nThank you for your letter about {topic}.",
    "Chapter 3: {Topic}\n\nIn this chapter we will",
    "{Topic}: a review. Although many people know something about it,",
    "Researchers have long wondered about {topic}. In a new study,",
    "There once was a king who cared for nothing but {topic}.",
    "Five things that most people do not know about {topic}:\n\n1.",
    "INTERVIEWER: Today we talk about {topic}.\n\nGUEST:",
    "My grandfather used to tell us stories of {topic}, and",
    "The economic importance of {topic} lies in",
)  # fmt: skip
_ASKED = (
    "Explain {topic} to me in simple words.",
    "Write a short story in which {topic} plays a part.",
    "What are the most important facts about {topic}?",
    "I have to give a talk about {topic}. How should I structure it?",
    "Give me step by step advice on a project that has to do with {topic}.",
    "What would you say to somebody who thinks that {topic} is boring?",
)
_ALONE = (
    "def fibonacci(n):\n    \"\"\"Returns the n-th Fibonacci number.\"\"\"\n",
    "import json\n\nclass Account:\n    def __init__(self, owner, balance=0):\n",
    "# A function that reads a CSV file and prints the sum of each column\nimport csv\n\n",
    "SELECT customers.name, SUM(orders.total)\nFROM customers\n",
    "<html>\n<head>\n<title>My garden</title>\n</head>\n<body>\n",
    "for (int i = 0; i < rows; i++) {\n",
    "Problem: A train leaves at 9:15 and travels 180 km at 60 km/h. When does it arrive?\n\nSolution:",
    "Theorem. The square root of 2 is irrational.\n\nProof.",
    "To solve the equation 3x + 7 = 22, we first",
    "Ingredients:\n- 250 g flour\n- 3 eggs\n",
    "Terms and Conditions\n\n1. Definitions. In this agreement,",
    "Abstract. We study the problem of",
    "Minutes of the meeting of 14 March\n\nPresent:",
    "Question: Why is the sky blue?\nAnswer:",
    "The patient, a 54-year-old man, was admitted with",
    "Translate to French: \"Good morning, how are you?\"\n",
    "ROMEO: But soft, what light",
    "Installation\n\nTo install the package, run the following command:\n\n",
    "Roses are red,\nViolets are blue,\n",
    "In the second half, the home side",
)  # fmt: skip
_PROSE = 300  # characters that a paragraph has, or it is a title, a table, or a remark


def openings(seed: int) -> list[tuple[str, bool]]:
    """Texts to go on from and whether each is a chat message, in an order that mixes the kinds."""
    found = [(text, False) for text in _ALONE]
    for forms, chat in ((_CONTINUED, False), (_ASKED, True)):
        for number, form in enumerate(forms):
            for topic in _TOPICS[number % 3 :: 3]:
                found.append((form.format(topic=topic, Topic=topic[0].upper() + topic[1:]), chat))
    random.Random(seed).shuffle(found)
    return found


def paragraphs(path: Path, characters: int) -> list[str]:
    """Paragraphs of prose from a text file, perhaps gzipped, one a line; evenly spaced, about so many characters."""
    opened = gzip.open if path.suffix in (".gz", ".dz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", file.read())]
    prose = [re.sub(r"[{}]", "", block) for block in blocks if len(block) >= _PROSE and block[0].isalnum()]
    every = max(1, sum(len(block) for block in prose) // characters)
    return prose[::every]


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m perf.sample", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2", help="as for fewfire.load (default: %(default)s)")
    parser.add_argument("--weights", default="q8", help="default: %(default)s")
    parser.add_argument("--prose", type=Path, nargs="*", default=[], help="texts that people wrote, perhaps gzipped")
    parser.add_argument("--characters", type=int, default=120_000, help="of prose, in all (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="of each piece, at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    model = fewfire.load(options.model, weights=options.weights, threads=options.threads, dense=True)
    pieces, found = [], openings(options.seed)
    for number, (text, chat) in enumerate(found):
        print(f"\r\033[Kpiece {number + 1} of {len(found)}", end="", file=sys.stderr, flush=True)
        seed = options.seed * 1000 + number
        sampling = fewfire.Sampling(temperature=options.temperature, top_p=0.95, seed=seed)
        if chat:
            said = model.chat([{"role": "user", "content": text}], max_tokens=options.tokens, sampling=sampling).text
            pieces.append(f"{text}\n\n{said.strip()}")
        else:
            pieces.append(text + model.generate(text, max_tokens=options.tokens, sampling=sampling).text.rstrip())
    print(file=sys.stderr)
    prose = [each for path in options.prose for each in paragraphs(path, options.characters // len(options.prose))]
    random.Random(options.seed).shuffle(prose)
    for number, each in enumerate(prose):  # spread over the whole
        pieces.insert(number * (len(found) + len(prose)) // len(prose), each)
    text = "\n\n".join(pieces).replace("\ufffd", "") + "\n"  # pieces may end within a character
    options.out.write_text("".join(c for c in text if c.isprintable() or c in "\n\t"), encoding="utf-8")


if __name__ == "__main__":
    main()
