"""Models with random weights in the shapes of well-known ones: `python -m perf.synthetic SHAPE`.

Makes a directory with the model packed for fewfire (`q4/`, `q8/`), the same weights as GGUF for llama.cpp, and
`synthetic.json`, which says what they are: fit for measuring speed, and for nothing else. All harness commands take the
directory as a model. Everything is streamed, so that a model needs far less memory than its size; the bfloat16
checkpoint is removed once it has been packed.

The FFN is a ReLU one of which a chosen share of neurons fires (measured with the reference, not assumed). llama.cpp has
only SiLU in this architecture; dense, that costs the same.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fewfire.cache import cache_dir
from fewfire.config import Rope
from fewfire.families import FAMILIES, canonical_to, read_config
from fewfire.gguf import NAMES as GGUF_NAMES
from fewfire.pack import pack
from fewfire.quantize import FORMATS
from perf import shapes
from perf.randomweights import RandomWeights, firing, to_bf16
from perf.spread import rounded

_ROWS = 4096  # made at a time
_SHARD = 4 * 10**9  # bytes
CHECKPOINT, ABOUT = "checkpoint", "synthetic.json"


def is_made(source: str | Path) -> bool:
    """Whether a directory is what this command makes."""
    return (Path(source) / ABOUT).is_file()


def label(directory: str | Path) -> str:
    """What tables call such a model: that its weights are random, and how many neurons fire."""
    about = json.loads((Path(directory) / ABOUT).read_text(encoding="utf-8"))
    return f"{about['shape']} shape, random weights, {about['share_firing']:.1%} of neurons fire"


def write_checkpoint(weights: RandomWeights, config: dict[str, Any], directory: Path) -> None:
    """A directory in the Hugging Face layout: bfloat16, in shards."""
    directory.mkdir(parents=True)
    names = {name: canonical_to(FAMILIES["Llama"].names, name) for name in weights}
    shards: list[list[str]] = [[]]
    room = _SHARD
    for name, shape in weights.config.shapes().items():
        if shards[-1] and room < 2 * math.prod(shape):
            shards.append([])
            room = _SHARD
        shards[-1].append(name)
        room -= 2 * math.prod(shape)
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files |= {names[name]: file for name in shard}
        with (directory / file).open("wb") as out:
            _write_shard(out, weights, {names[name]: name for name in shard})
    total = sum(2 * math.prod(shape) for shape in weights.config.shapes().values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (directory / "tokenizer.json").write_text(shapes.tokenizer_json(), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(shapes.tokenizer_config(), encoding="utf-8")


def _write_shard(out: BinaryIO, weights: RandomWeights, names: dict[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for stored, name in names.items():
        shape = weights.config.shapes()[name]
        end = at + 2 * math.prod(shape)
        header[stored] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for name in names.values():
        for rows in _runs(weights, name):
            out.write(to_bf16(rows).data)


def write_gguf(weights: RandomWeights, path: Path, kind: str) -> None:
    """A file for llama.cpp: matrices as Q8_0, Q4_0, F16 or BF16, one tensor in memory at a time."""
    import gguf

    c, quantization = weights.config, gguf.GGMLQuantizationType[kind]
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    writer = gguf.GGUFWriter(temporary, "llama")
    try:
        _write_metadata(writer, weights)
        block, size = gguf.GGML_QUANT_SIZES[quantization]
        for name, shape in c.shapes().items():
            used = quantization if len(shape) == 2 else gguf.GGMLQuantizationType.F32
            stored = (*shape[:-1], shape[-1] // block * size) if len(shape) == 2 else shape
            dtype = np.dtype(np.uint8) if len(shape) == 2 else np.dtype(np.float32)
            nbytes = math.prod(stored) * dtype.itemsize
            writer.add_tensor_info(canonical_to(GGUF_NAMES, name), stored, dtype, nbytes, raw_dtype=used)
        factors = _rope_factors(c.rope, c.head_dim)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, shape in c.shapes().items():
            parts = [gguf.quants.quantize(r, quantization) if len(shape) == 2 else r for r in _permuted(weights, name)]
            writer.write_tensor_data(np.concatenate(parts).view(np.uint8 if len(shape) == 2 else np.float32))
        if factors is not None:
            writer.write_tensor_data(factors)
        writer.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_metadata(writer: Any, weights: RandomWeights) -> None:
    import gguf

    c = weights.config
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab_size)
    assert c.rope
    writer.add_rope_freq_base(c.rope.theta)
    tokens = shapes.vocabulary()
    special = (tokens[shapes.BEGIN], tokens[shapes.END])
    kinds = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(tokens))]
    spare = range(len(tokens), c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *(f"[{i}]" for i in spare)])
    writer.add_token_types([*kinds, *(gguf.TokenType.UNUSED for _ in spare)])
    writer.add_token_merges([" ".join(shapes.MERGED)])
    writer.add_bos_token_id(special[0])
    writer.add_eos_token_id(special[1])
    writer.add_add_bos_token(False)


def _rope_factors(rope: Rope | None, head_dim: int) -> np.ndarray | None:
    """What llama.cpp divides each frequency by."""
    if rope is None or rope.scaling == "none":
        return None
    return Rope(rope.theta).inverse_frequencies(head_dim) / rope.inverse_frequencies(head_dim)


def _runs(weights: RandomWeights, name: str) -> Iterator[np.ndarray]:
    rows = weights.config.shapes()[name][0]
    for start in range(0, rows, _ROWS):
        yield weights.read(name, start, min(rows, start + _ROWS))


def _permuted(weights: RandomWeights, name: str) -> Iterator[np.ndarray]:
    """Rows in runs; those of q and k in llama.cpp's order, where RoPE turns neighbours."""
    if not name.endswith((".q.weight", ".k.weight")):
        yield from _runs(weights, name)
        return
    rows, half = weights.read(name), weights.config.head_dim // 2
    yield np.ascontiguousarray(rows.reshape(-1, 2, half, rows.shape[1]).swapaxes(1, 2)).reshape(rows.shape)


def make(shape: str, share: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is asked for and not there yet; returns what `synthetic.json` says."""
    config = shapes.config(shape)
    weights = RandomWeights(read_config(config)[1], share, seed)
    directory: Path = options.out / f"{shape}-{share:g}"
    directory.mkdir(parents=True, exist_ok=True)
    _say(f"{shape}: measuring the share of neurons that fire")
    shares, logits = firing(weights, options.tokens)
    about = {
        "shape": shape,
        "weights": "random; they serve speed only",
        "seed": seed,
        "parameters": sum(math.prod(s) for s in weights.config.shapes().values()),
        "share_asked_for": share,
        "share_firing": rounded(float(np.mean(shares))),
        "share_by_layer": [rounded(s) for s in shares],
        "tokens": options.tokens,
        "logits_spread": rounded(float(logits.std())),
    }
    missing = [form for form in options.weights if not (directory / form).exists()]
    checkpoint = directory / CHECKPOINT
    if not checkpoint.exists() and (missing or options.keep):
        _say(f"{shape}: writing the checkpoint")
        temporary = directory / f".{os.getpid()}-{CHECKPOINT}"
        try:
            write_checkpoint(weights, config, temporary)
            os.replace(temporary, checkpoint)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    for form in missing:
        _say(f"{shape}: packing as {form}")
        pack(checkpoint, directory / form, form, name=f"{shape} (random weights)")
    if not options.keep:
        shutil.rmtree(checkpoint, ignore_errors=True)
    for kind in options.gguf:
        path = directory / f"{shape}-{kind}.gguf"
        if not path.exists():
            _say(f"{shape}: writing {path.name}")
            write_gguf(weights, path, kind)
    (directory / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return about


_began = time.perf_counter()


def _say(text: str) -> None:
    print(f"{time.perf_counter() - _began:6.0f} s  {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options = _options(argv)
    for shape in options.shape:
        about = make(shape, options.share, options.seed, options)
        low, high = min(about["share_by_layer"]), max(about["share_by_layer"])
        print(
            f"{shape}: {about['parameters'] / 1e6:.0f} M random parameters; {about['share_firing']:.1%} of the neurons"
            f" fire ({low:.1%} to {high:.1%} by layer) over {about['tokens']} random tokens; logits spread by"
            f" {about['logits_spread']:.2f}"
        )
    _say("done")


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.synthetic", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("shape", nargs="+", choices=list(shapes.SHAPES))
    parser.add_argument("--share", type=float, default=0.1, help="of neurons that fire (default: %(default)s)")
    parser.add_argument("--weights", nargs="*", choices=FORMATS, default=["q4", "q8"], help="to pack as")
    kinds = ("Q8_0", "Q4_0", "F16", "BF16")
    parser.add_argument("--gguf", nargs="*", choices=kinds, default=["Q8_0"], help="perf.decode makes Q4_0 of Q8_0")
    parser.add_argument("--out", type=Path, default=cache_dir() / "perf" / "synthetic", help="where to")
    parser.add_argument("--keep", action="store_true", help="the bfloat16 checkpoint too")
    parser.add_argument("--tokens", type=int, default=48, help="to measure the share with (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
