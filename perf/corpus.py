"""Makes text to train on (`fewfire train --text`): `python -m perf.corpus OUT --packages ... --samples TOKENS`.

Prose out of Debian's documentation packages, one file each, and what a model says by itself (said.txt), which is what
distillation asks for: text on which the original knows what it would say. Packages are fetched with `apt-get download`,
or taken from a directory in which they have been unpacked already (`--unpacked DIR`, with DIR/anarchism/usr/...). Of
each, pages are drawn at random until there are `--most` characters; the last is cut off. HTML becomes plain text, while
sources in reStructuredText or POD come in as they are, markup and all. Pieces of a file that have nothing to do with
each other have a form feed between them. Of what the model says, the beginnings are the first words of paragraphs of
the prose, the openings of `perf/sample.py`, and questions of these in the model's chat format. An interrupted run goes
on with the next piece.
"""

from __future__ import annotations

import argparse
import gzip
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import fewfire
from fewfire.team import default_threads
from fewfire.train.corpus import APART
from perf.sample import openings

#: Which files of a package have prose in English.
PACKAGES = {
    "anarchism": "usr/share/doc/anarchism/html/*.html",
    "apache2-doc": "usr/share/doc/apache2-doc/manual/en/**/*.html",
    "bash-doc": "usr/share/doc/bash/*.html",
    "cmake-doc": "usr/share/doc/cmake-data/html/_sources/*/*.rst.txt",
    "debian-handbook": "usr/share/doc/debian-handbook/html/en-US/*.html",
    "debian-policy": "usr/share/doc/debian-policy/policy.html/_sources/*.rst.txt",
    "debian-reference-en": "usr/share/debian-reference/*.html",
    "ghc-doc": "usr/share/doc/ghc-doc/html/users_guide/**/*.html",
    "gimp-help-en": "usr/share/gimp/2.0/help/en/*.html",
    "git-doc": "usr/share/doc/git-doc/*.html",
    "gnucash-docs": "usr/share/doc/gnucash-docs/gnucash-guide-en/*.html",
    "jargon-text": "usr/share/doc/jargon-text/*.txt.gz",
    "lilypond-doc-html": "usr/share/doc/lilypond/html/Documentation/*/*.html",
    "linux-doc-6.1": "usr/share/doc/linux-doc-6.1/html/_sources/*/*.rst.txt",
    "nodejs-doc": "usr/share/doc/nodejs/api/*.html",
    "octave-doc": "usr/share/doc/octave/octave.html/*.html",
    "perl-doc": "usr/share/perl/5.36.0/pod/*.pod",
    "postfix-doc": "usr/share/doc/postfix/html/*.html",
    "postgresql-doc-15": "usr/share/doc/postgresql-doc-15/html/*.html",
    "r-doc-html": "usr/share/R/doc/manual/*.html",
    "rust-doc": "usr/share/doc/rust-doc/html/reference/*.html",
    "sqlite3-doc": "usr/share/doc/sqlite3/*.html",
}
_BLOCKS = {"p", "div", "h1", "h2", "h3", "h4", "h5", "li", "tr", "br", "pre", "dt", "dd", "blockquote", "table", "ul"}
_SKIPPED = {"head", "script", "style"}
_LEAST = 200  # characters of a paragraph whose first words are a beginning
_WORDS = 12  # of a paragraph that are a beginning, at most


class _Text(HTMLParser):
    """The text of a page: a paragraph a line, but what is preformatted line by line."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skip: list[str] = []
        self._formatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        nested = bool(self._skip) and tag == self._skip[-1]
        if nested or tag in _SKIPPED or (tag == "ul" and ("class", "docnav") in attrs):
            self._skip.append(tag)
        if tag in _BLOCKS:
            self.parts.append("\n\n")
        self._formatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._skip and tag == self._skip[-1]:
            self._skip.pop()
        if tag in _BLOCKS:
            self.parts.append("\n\n")
        self._formatted -= tag == "pre"

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.parts.append(data if self._formatted else re.sub(r"\s+", " ", data))


def page_text(page: str) -> str:
    """The text of an HTML page."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    lines = [line.strip(" \t\r\xa0") for line in "".join(parser.parts).split("\n\n")]
    return "\n\n".join(line for line in lines if line.strip())


def unwrapped(text: str) -> str:
    """Plain text with a paragraph a line."""
    blocks = re.split(r"\n\s*\n", text)
    return "\n\n".join(" ".join(block.split()) for block in blocks if block.strip())


def package_text(directory: Path, pattern: str, most: int, seed: int) -> str:
    """The prose of an unpacked package: pages drawn at random until there are so many characters, or all."""
    pieces: list[str] = []
    paths = sorted(directory.glob(pattern))
    for path in random.Random(seed).sample(paths, len(paths)):
        if sum(map(len, pieces)) >= most:
            break
        if path.suffix == ".gz":
            pieces.append(unwrapped(gzip.decompress(path.read_bytes()).decode("utf-8", "replace")))
        elif path.suffix == ".html":
            pieces.append(page_text(path.read_text("utf-8", errors="replace")))
        else:
            pieces.append(path.read_text("utf-8", errors="replace").replace(APART, " "))
    if not pieces:
        raise SystemExit(f"{directory} has no {pattern}: is the package unpacked there?")
    return APART.join(pieces)[:most]


def fetch(package: str, directory: Path) -> None:
    """Downloads and unpacks a package into a directory of its name."""
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run(["apt-get", "download", package], cwd=temporary, check=True)
        (found,) = Path(temporary).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", found, directory / package], check=True)


def beginnings(model: fewfire.Model, prose: list[str], seed: int) -> Iterator[str]:
    """Without end: texts for the model to go on from, with special tokens written out."""
    order, seeds = random.Random(seed), seed
    paragraphs = [p for text in prose for p in re.split(r"\n\s*\n|\f", text) if len(p) >= _LEAST and p[0].isalpha()]
    while True:
        for text, chat in openings(seeds):
            if chat and model.chat_template:
                yield model.chat_template.render([{"role": "user", "content": text}])
            else:
                yield text
            for paragraph in order.sample(paragraphs, min(2, len(paragraphs))):
                yield " ".join(paragraph.split()[: order.randint(1, _WORDS)])
        seeds += 1


def say(model: fewfire.Model, prose: list[str], out: Path, tokens: int, longest: int, seed: int) -> None:
    """Adds pieces to a file until it has so many tokens; a piece's number is its seed."""
    said = out.read_text(encoding="utf-8").split(APART)[:-1] if out.exists() else []
    count = sum(len(model.tokenizer.encode(piece, parse_special=True)) for piece in said)
    out.write_text("".join(piece + APART for piece in said), encoding="utf-8")  # without a piece that was cut off
    with out.open("a", encoding="utf-8") as file:
        for number, text in enumerate(beginnings(model, prose, seed)):
            if count >= tokens:
                break
            if number < len(said):
                continue
            sampling = fewfire.Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=seed * 1_000_003 + number)
            piece = model.generate(text, max_tokens=longest, sampling=sampling)
            count += len(piece.token_ids)
            file.write((text + piece.text).replace(APART, " ") + APART)
            file.flush()
            print(f"\r\033[K{count} of {tokens} tokens said", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m perf.corpus", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", type=Path, help="directory for the texts")
    parser.add_argument("--packages", nargs="*", default=list(PACKAGES), choices=list(PACKAGES))
    parser.add_argument("--unpacked", type=Path, help="where packages are unpacked already")
    parser.add_argument("--most", type=int, default=1_000_000, help="characters of a package (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=0, help="tokens that the model says (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=400, help="tokens of a piece (default: %(default)s)")
    parser.add_argument("--model", default="smollm2", help="as for fewfire.load (default: %(default)s)")
    parser.add_argument("--weights", default="q8", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    prose = []
    with tempfile.TemporaryDirectory() as temporary:
        unpacked = options.unpacked or Path(temporary)
        for package in options.packages:
            if not options.unpacked:
                fetch(package, unpacked)
            prose.append(package_text(unpacked / package, PACKAGES[package], options.most, options.seed))
            (options.out / f"{package}.txt").write_text(prose[-1], encoding="utf-8")
            print(f"{package}.txt: {len(prose[-1])} characters", file=sys.stderr)
    if options.samples:
        model = fewfire.load(options.model, weights=options.weights, threads=options.threads, dense=True)
        say(model, prose, options.out / "said.txt", options.samples, options.longest, options.seed)


if __name__ == "__main__":
    main()
