"""Writes the Figures of the README from perf/results: `python -m perf.report`, or `--check` that they are up to date.

Figures in the README come from here and never out of a hand. Pictures are drawn where matplotlib is installed (the
`plot` extra); the text has those that are there.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perf import busy, decode, growth, kernels, methods, predictors, profile, quality, start, trained
from perf.results import BUSY, read_all

README = Path(__file__).parents[1] / "README.md"
PLOTS = Path(__file__).parent / "plots"
PICTURES = {  # by the endings of their names
    "": "speeds",
    "-context": "cost over context",
    "-size": "cost over model size",
    "-growth": "perplexity over speed",
    "-curve": "perplexity over sparsity",
}
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
Result = dict[str, Any]


def figures(measured: dict[str, Result]) -> str:
    """The text between the markers, from all results; a kind of result without a section is an error."""
    sections = []
    for kind, section in _SECTIONS.items():
        for name, result in measured.items():
            if result["kind"] == kind:
                sections += [section(result), *_pictures(name)]
    unknown = {result["kind"] for result in measured.values()} - set(_SECTIONS)
    if unknown:
        raise ValueError(f"no section for results of kind {', '.join(sorted(unknown))}")
    return "\n\n".join(sections)


def rewritten(readme: str, text: str) -> str:
    """The README with that text between its markers."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or END not in rest:
        raise ValueError(f"the README has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}" if text else f"{before}{BEGIN}\n{END}{after}"


def is_current(readme: Path = README) -> bool:
    """Whether the README shows what the results say."""
    text = readme.read_text(encoding="utf-8")
    return text == rewritten(text, figures(read_all()))


def _decode(result: Result) -> str:
    about = (
        f"Prompt of {result['prompt']} tokens, then {result['tokens']} decoded; {_plural(result['rounds'], 'round')}"
        " with all engines in turn; medians (lowest..highest). MB/token: the weights, keys and values that a token"
        " reads; of bandwidth: that times the speed, over what streaming reads reached in the same run."
    )
    tables = [decode.speed_table(result), decode.ratio_table(result, all_pairs=False)]
    starts = [_START, start.start_table(result["starts"])] if result.get("starts") else []
    line = decode.bandwidth_line(result)
    return _section(f"Speed, {result['model']}", about, *tables, line, *starts, result=result)


def _quality(result: Result) -> str:
    about = (
        f"{result['scored']:,} tokens of {result['text']} ({result['part']} of it) in windows of {result['window']},"
        " the same for all, scored from each engine's logits by the same code; ± is the standard error of the"
        " difference." + (" fewfire read one token at a time, as in generation." if result.get("decoded") else "")
    )
    return _section(f"Perplexity, {result['model']}", about, quality.quality_table(result), result=result)


def _start(result: Result) -> str:
    about = (
        f"{_START} Of {_plural(result['runs']['warm'], 'warm start')} and {result['runs']['cold']} of each cold kind,"
        f" with {_plural(result['threads'], 'thread')}."
    )
    table = start.start_table(result["contenders"])
    return _section(f"First token and memory, {result['model']}", about, table, result=result)


_START = (
    "Seconds from starting the process to the first byte of the answer, and memory after"
    f" {start.TOKENS} tokens, with the weights in it. fewfire: `fewfire generate`, warm, with no kernels compiled"
    " (the first start ever) and with no model packed either; other engines: the least code that loads a converted"
    " model and reads the same prompt, which is the same for every start."
)


def _agree(result: Result) -> str:
    about = (
        f"{result['sure_and_same']} of the {result['sure_prompts']} built-in prompts where the f32 engine's best two"
        f" logits are never closer than {result['lead']} continue with the same {result['tokens']} tokens in llama.cpp."
        f" Reading the same text, both would choose the same next token {result['same_choices']:.1%} of the time, and"
        f" logits differ by {result['mean_difference']:.2f} on average and {result['largest_difference']:.1f} at most,"
        " since llama.cpp quantises activations. On the same file dequantised to float32 the largest difference is"
        f" {result['largest_difference_f32']:.4f}."
    )
    return _section(f"Agreement with llama.cpp, {result['model']}", about, result=result)


def _kernels(result: Result) -> str:
    about = (
        f"Dot products (gather_dot) and scaled sums (gather_axpy) of listed rows out of {result['megabytes']} MB of"
        " them, by random lists that are new each time: GB/s over the bytes of the listed rows, its share of a"
        " streaming read in the same run, and of a gathered read, which loads one word of each cache line of the same"
        " rows and does nothing else. Of the formats and row lengths measured, the usual ones."
    )
    usual = result | {part: [r for r in result[part] if _is_usual(r)] for part in ("speeds", "full_lists")}
    lists = "What listing every row costs, over the same loop without a list, with one thread:"
    tables = kernels.density_table(usual), lists, kernels.list_table(usual)
    return _section("Kernels", about, *tables, kernels.bandwidth_line(result), result=result)


def _is_usual(row: dict[str, Any]) -> bool:
    return row["weights"] in ("q4", "q8") and row["columns"] in (2048, 4096)


def _profile(result: Result) -> str:
    about = (
        f"A token decoded by one thread at the end of a context of {result['context']} tokens, part by part, in the"
        " engine's own loop with probes in it; floor: the part's bytes over the bandwidth of a streaming read in the"
        f" same run; {_plural(result['rounds'], 'round')}, medians (lowest..highest)."
    )
    tables = profile.profile_table(result), profile.bandwidth_line(result)
    return _section(f"A token's time, {result['model']}, {result['weights']}", about, *tables, result=result)


def _methods(result: Result) -> str:
    about = (
        f"By how much perplexity grows and how many times as fast as dense decoding a token is, at a density: the share"
        f" read, by the kernels' own count, of the weights that the method may leave out, with its predictors and"
        " screens; where it cannot reach that, at the one that is given. Calibrated on the default sample, judged"
        f" token by token on {result['scored']:,} tokens of {result['text']} ({result['part']} of it), where dense has"
        f" a perplexity of {result['dense']['perplexity']:.2f}. {_plural(result['threads'], 'thread')}."
    )
    absent = [f"Absent: {name} ({why})." for name, why in result["absent"].items()]
    other = methods.baselines_table(result)
    beside = [_SPREADS, other] if other else []
    title = f"Methods, {result['model']}, {result['weights']}"
    return _section(title, about, methods.methods_table(result), *beside, *absent, result=result)


_SPREADS = (
    "Ways to spread a density over the layers: ours (spread) weighs a layer's error by what it was measured to do to"
    " the predictions; greedy takes step by step what adds the least error; uniform keeps the same share everywhere."
)


def _trained(result: Result) -> str:
    scored = ", ".join(f"{text['scored']:,} tokens of {text['label']}" for text in result["texts"])
    about = (
        f"Made from {result['model']} by training, or by leaving out without it, and judged beside it on {scored}, in"
        f" windows of {result['window']}, token by token. neurons left out: those of the FFNs, zero or not, whose down"
        " rows a token did not read, by the kernels' own count. tokens, hours: of the training."
    )
    parts = [trained.rows_table(result)]
    if speeds := trained.speeds_table(result):
        parts += ["Decoding the same text in turn, with times of each round; medians (lowest..highest).", speeds]
    if curve := trained.curve_table(result):
        parts += [f"{result['curve']['name']} with its thresholds higher and lower than it was trained with:", curve]
    return _section(f"Models that fire less, {result['model']}, {result['weights']}", about, *parts, result=result)


def _growth(result: Result) -> str:
    about = (
        f"Milliseconds for each of {_plural(result['tokens'], 'token')} decoded at the end of a context; floor: the"
        f" bytes that a token must read, over the bandwidth of streaming reads in the same run;"
        f" {_plural(result['rounds'], 'round')}, medians (lowest..highest)."
    )
    line = growth.bandwidth_line(result)
    return _section("Growth with context, threads and size", about, growth.growth_table(result), line, result=result)


def _busy(result: Result) -> str:
    about = (
        f"Decoding with {_plural(result['threads'], 'thread')} on {result['machine']['cores']} cores while other"
        " processes compute all the time; engines in turn, shares and ratios within each round."
    )
    tables = busy.busy_table(result), busy.ratio_table(result)
    return _section(f"Beside busy processes, {result['model']}", about, *tables, result=result)


def _predictors(result: Result) -> str:
    about = (
        f"Fitted to three quarters of {result['tokens']:,} tokens of {result['text']} ({result['part']} of it), judged"
        f" on the rest, on average over layers {', '.join(map(str, result['layers']))}. read: the predictor's bytes, of"
        " those of the whole FFN. By share of neurons kept: what is lost, in per mille of the energy of the residual"
        " stream, and how many are found of the neurons that the exact selection of that size keeps."
    )
    title = f"Predicting neurons, {result['model']}, {result['weights']}"
    return _section(title, about, predictors.predictor_table(result), result=result)


_SECTIONS: dict[str, Callable[[Result], str]] = {
    "decode": _decode,
    "growth": _growth,
    "busy": _busy,
    "methods": _methods,
    "trained": _trained,
    "profile": _profile,
    "kernels": _kernels,
    "quality": _quality,
    "start": _start,
    "agree": _agree,
    "predictors": _predictors,
}


def _section(title: str, *paragraphs: str, result: Result) -> str:
    parts = [part if part.startswith("|") else textwrap.fill(part, 118) for part in (*paragraphs, _where(result))]
    return "\n\n".join([f"### {title}", *parts])


def _pictures(name: str) -> list[str]:
    """The pictures of a result, as far as they have been drawn."""
    found = {PLOTS / f"{name}{ending}.png": about for ending, about in PICTURES.items()}
    return [f"![{name}: {about}](perf/plots/{path.name})" for path, about in found.items() if path.exists()]


def _where(result: Result) -> str:
    """What it was measured on, and how far that can be trusted."""
    m = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items() if name in _NAMED)
    line = f"{result['date']}; {m['cpu']} ({m['llvm_cpu']}), {m['cores']} cores, kernels {m['level']}; {versions}."
    others = result.get("used_by_others") or 0
    return line + (f" Others used {others:.0%} of the machine meanwhile." if others > BUSY else "")


_NAMED = ("fewfire", "numba", "llama-cpp-python", "ctranslate2", "torch", "transformers")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m perf.report", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the README is out of date")
    if parser.parse_args(argv).check:
        if not is_current():
            raise SystemExit("the README's figures are not those of perf/results: run python -m perf.report")
        return
    measured = read_all()
    try:
        from perf import plots
    except ImportError:
        print("no pictures: matplotlib is not installed (pip install '.[plot]')", file=sys.stderr)
    else:
        plots.draw(measured, PLOTS)
    README.write_text(rewritten(README.read_text(encoding="utf-8"), figures(measured)), encoding="utf-8")


if __name__ == "__main__":
    main()
