"""`svdq gguf`: a GGUF file of 16 bits -> one of 4.5 bits, for llama.cpp and Ollama.

Not here: the work itself (`integrations.gguf.quantize`).
"""

import argparse
import time
from typing import Any

from svdq_hf.cli.options import examples

MEGABYTE = 10**6


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser to those of `svdq`."""
    shown = examples(
        "svdq gguf model-f16.gguf model-IQ4_NL.gguf", "svdq gguf F16.gguf OUT.gguf --error-feedback"
    )
    parser: argparse.ArgumentParser = commands.add_parser(
        "gguf", help="a GGUF file of F16 or BF16 -> one of IQ4_NL for llama.cpp and Ollama", **shown
    )
    parser.add_argument("model", help="GGUF file of F16, BF16 or F32, by llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("out", help="GGUF file to write; must not be there")
    scale = "scale columns and fold it into the tensors before; off where a LoRA adapter will be put on (on)"
    parser.add_argument("--column-scale", action=argparse.BooleanOptionalAction, default=True, help=scale)
    feedback = "compensate errors by text that the model writes: better and slower, and needs transformers"
    parser.add_argument("--error-feedback", action="store_true", help=feedback)
    return parser


def run(options: argparse.Namespace) -> dict[str, object]:
    """Quantize, and print sizes and types; returns what `--json` prints."""
    from svdq_hf.integrations.gguf.quantize import quantize_gguf

    started = time.perf_counter()
    done = quantize_gguf(
        options.model,
        options.out,
        column_scale=options.column_scale,
        error_feedback=options.error_feedback,
    )
    seconds = time.perf_counter() - started
    if not options.json:
        types = ", ".join(f"{count} {name}" for name, count in done.types.items())
        print(f"tensors: {types}")
        if options.column_scale:
            print(f"column scales folded for {done.folded} of {done.matrices} matrices")
        before, after = done.bytes_before / MEGABYTE, done.bytes_after / MEGABYTE
        print(f"{options.out}: {before:.1f} MB -> {after:.1f} MB in {seconds:.1f} s")
    return {"seconds": seconds, **vars(done)}
