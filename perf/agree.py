"""Does our reading of a GGUF file compute what llama.cpp computes from it? `python -m perf.agree`.

llama.cpp's kernels for quantised weights also quantise activations, so its logits are off by tenths and near ties
may fall either way. So the f32 engine continues each built-in prompt greedily, and where its best two logits were
never closer than `--lead`, llama.cpp must choose the very same tokens. Then both read the same text (teacher
forcing) and logits are compared; once more with the file dequantised to float32 by llama.cpp, which leaves nothing
but rounding. Ends with exit code 1 when a sure continuation differs or too few are sure.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from perf import machine, results
from perf.llamacpp import LlamaCpp
from perf.peers import Fewfire, Request
from perf.prompts import PROMPTS
from perf.spread import rounded
from perf.table import table


def compare(ours: Fewfire, theirs: LlamaCpp, exact: LlamaCpp, prompt: str, tokens: int) -> dict[str, Any]:
    """Both engines on one prompt and on our continuation of it."""
    ids = ours.model.tokenizer.encode(prompt)
    continuation, lead = ours.greedy(ids, tokens)
    other, _ = theirs.greedy(ids, tokens)
    text = ids + continuation
    mine, its = ours.logits(text), theirs.logits(text)
    return {
        "prompt": prompt,
        "continuation": ours.model.tokenizer.decode(continuation),
        "least_lead": rounded(lead),
        "same_tokens": next((i for i, (a, b) in enumerate(zip(continuation, other, strict=True)) if a != b), tokens),
        "largest_difference": rounded(float(np.abs(mine - its).max())),
        "mean_difference": rounded(float(np.abs(mine - its).mean())),
        "same_choices": rounded(float((mine.argmax(axis=1) == its.argmax(axis=1)).mean())),
        "largest_difference_f32": rounded(float(np.abs(mine - exact.logits(text)).max())),
    }


def verdict(rows: list[dict[str, Any]], lead: float, tokens: int) -> dict[str, Any]:
    """What follows from all prompts."""
    sure = [row for row in rows if row["least_lead"] >= lead]
    return {
        "sure_prompts": len(sure),
        "sure_and_same": sum(row["same_tokens"] == tokens for row in sure),
        "largest_difference": max(row["largest_difference"] for row in rows),
        "largest_difference_f32": max(row["largest_difference_f32"] for row in rows),
        "mean_difference": rounded(float(np.mean([row["mean_difference"] for row in rows]))),
        "same_choices": rounded(float(np.mean([row["same_choices"] for row in rows]))),
    }


def agree_table(result: dict[str, Any]) -> str:
    """All prompts in Markdown, the sure ones first."""
    rows = [
        [
            repr(row["prompt"][-32:]),
            f"{row['least_lead']:.2f}",
            f"{row['same_tokens']} of {result['tokens']}",
            f"{row['largest_difference']:.2f}",
            f"{row['largest_difference_f32']:.4f}",
        ]
        for row in sorted(result["prompts"], key=lambda row: -row["least_lead"])
    ]
    return table(["prompt", "least lead", "same tokens", "largest difference", "as float32"], rows)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options = _options(argv)
    request = Request(options.model, options.threads, 256)
    path = request.gguf_path()
    ours = Fewfire("fewfire:f32", "f32", request)
    theirs = LlamaCpp("llama.cpp:original", "original", request)
    exact = LlamaCpp("llama.cpp:F32", "F32", request)
    rows = [compare(ours, theirs, exact, prompt, options.tokens) for prompt in PROMPTS]
    found = verdict(rows, options.lead, options.tokens)
    result = {
        "machine": machine.describe(),
        "model": options.model,
        "file": path.name,
        "tensors": theirs.details["tensors"],
        "tokens": options.tokens,
        "lead": options.lead,
        **found,
        "prompts": rows,
    }
    print(agree_table(result))
    print(
        f"\n{found['sure_and_same']} of {found['sure_prompts']} prompts where the lead is never under {options.lead}"
        f" continue the same for {options.tokens} tokens.\nWith the same tokens before,"
        f" {found['same_choices']:.1%} of the next ones are the same, logits differ by {found['mean_difference']:.3f}"
        f" on average and {found['largest_difference']:.2f} at most;"
        f"\nby at most {found['largest_difference_f32']:.4f} when llama.cpp dequantises the file to float32 first."
    )
    results.finish(options.name, "agree", result)
    if found["sure_and_same"] < found["sure_prompts"] or found["sure_prompts"] < options.need:
        raise SystemExit(1)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.agree", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="smollm2", help="an alias of a GGUF file, or one (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=20, help="of a continuation (default: %(default)s)")
    parser.add_argument("--lead", type=float, default=0.5, help="what counts as sure (default: %(default)s)")
    parser.add_argument("--need", type=int, default=3, help="sure prompts that there must be (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="agree", help="of the result; - keeps none (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
