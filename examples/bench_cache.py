"""What a quantized KV cache costs and saves: change of loss, memory, tokens a second at long contexts.

    python examples/bench_cache.py quality --model FOLDER --text FILE   # minutes: windows are read through it
    python examples/bench_cache.py memory --model FOLDER                # seconds: in processes of their own
    python examples/bench_cache.py speed --model FOLDER                 # a minute or two, on a quiet machine

Quality: windows of 512 tokens are fed 64 at a time; each feed reads all earlier tokens from the cache, which
keeps no recent ones (`recent=0`), so this is the most that packing costs. KL is from the same model with its
exact cache. "plain 4" is what rounding alone does: 16 levels between the least and the most of each token's
head, without outlier channels or rotation.

Memory: a process fills a cache with random states, a DynamicCache in bfloat16 or a packed one, and says what
it uses more than before. Speed: one token after a context of random states, the caches in turn, among them a
DynamicCache in the model's dtype; a figure is the median of the steps.
"""

import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from svdq_hf import SVDQCache
from svdq_hf.evaluation.speed.memory import Memory, memory_now
from svdq_hf.evaluation.tasks.perplexity import token_ids
from svdq_hf.integrations.transformers.cache import cache_keyword

WINDOWS, WINDOW, FEED = 8, 512, 64
BITS = (8, 4.5, 4, 3.5, 3, 2.5, 2)


class PlainLayer(DynamicLayer):
    """Keys and values rounded to 16 levels a token and head, and nothing else; kept dense."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states)
        new = key_states.shape[-2]
        for states in (self.keys, self.values):
            states[:, :, -new:] = _rounded(states[:, :, -new:])
        return torch.cat([keys[:, :, :-new], key_states], 2), torch.cat(
            [values[:, :, :-new], value_states], 2
        )


def _rounded(states: Tensor) -> Tensor:
    least, most = states.aminmax(dim=-1, keepdim=True)
    least, step = least.bfloat16().float(), ((most - least) / 15).bfloat16().float().clamp(min=1e-9)
    return ((states - least) / step).round().clamp(0, 15) * step + least


def quality(options: argparse.Namespace) -> None:
    """Print loss and KL of each way to cache."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with open(options.text) as file:
        ids = token_ids(file.read(200_000), tokenizer, options.windows * WINDOW).view(-1, WINDOW)
    if model.config.bos_token_id is not None and tokenizer("a").input_ids[0] == model.config.bos_token_id:
        ids = torch.cat([ids.new_full((len(ids), 1), model.config.bos_token_id), ids[:, :-1]], 1)
    ways: dict[str, Callable[[], Any]] = {
        f"{bits}": lambda bits=bits: SVDQCache(model, bits, 0) for bits in BITS
    }
    ways["plain 4"] = lambda: Cache(layers=[PlainLayer() for _ in range(model.config.num_hidden_layers)])
    asked = {name: ways[name] for name in options.only or ways}
    sums = {name: [0.0, 0.0] for name in ("exact", *asked)}
    with torch.inference_mode():
        for at, window in enumerate(ids, 1):
            _score(model, window[None], asked, sums)
            tokens = at * (WINDOW - 1)
            costs = {name: (loss - sums["exact"][0]) / tokens for name, (loss, _) in sums.items()}
            print(at, {name: round(cost, 4) for name, cost in costs.items()}, file=sys.stderr, flush=True)
    print(f"{options.model}: loss {sums['exact'][0] / tokens:.4f} over {tokens} tokens")
    for name, (_, kl) in sums.items():
        print(f"{name:8} change of loss {costs[name]:+.4f}  KL {kl / tokens:.5f}")


def _score(model: Any, window: Tensor, ways: dict[str, Any], sums: dict[str, list[float]]) -> None:
    """Add a window's loss and KL, of every way side by side: the exact logits need not be kept."""
    exact_cache, caches = DynamicCache(config=model.config), {name: make() for name, make in ways.items()}
    for start in range(0, WINDOW, FEED):
        fed, target = window[:, start : start + FEED], window[0, start + 1 : start + FEED + 1, None]

        def logs(cache: Any, fed: Tensor = fed, scored: int = len(target)) -> Tensor:
            return model(fed, **{cache_keyword(): cache}).logits[0, :scored].log_softmax(-1)

        exact = logs(exact_cache)
        for name, found in (("exact", exact), *((name, logs(cache)) for name, cache in caches.items())):
            sums[name][0] -= found.gather(-1, target).sum().item()
            sums[name][1] += (exact.exp() * (exact - found)).sum().item()


def memory(options: argparse.Namespace) -> None:
    """Print what processes use that fill a cache."""
    used = {}
    for bits in ("none", *(str(bits) for bits in (8, 4.5, 4))):
        command = [sys.executable, "-W", "ignore", __file__, "fill", "--model", options.model, "--bits", bits]
        command += ["--tokens", str(options.tokens)]
        used[bits] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        share = used[bits] / used["none"]
        print(
            f"{options.tokens} tokens, bits {bits:4}: {used[bits] / 1e6:8.1f} MB, {share:.3f} of bfloat16's"
        )


def fill(options: argparse.Namespace) -> None:
    """Print the bytes that this process uses more once a cache is full."""
    config = AutoConfig.from_pretrained(options.model).get_text_config(decoder=True)
    _filled(SVDQCache(config), config, 256)  # what the first calls of torch and of the library take
    before = _trimmed()
    cache = DynamicCache(config=config) if options.bits == "none" else SVDQCache(config, float(options.bits))
    _filled(cache, config, options.tokens)
    print((_trimmed() - before).anonymous)


def _trimmed() -> Memory:
    """What this process uses, once glibc has given back what is free between what is used."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    return memory_now()


def _filled(cache: Any, config: Any, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A cache with random states of so many tokens."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    torch.manual_seed(0)
    for start in range(0, tokens, 1024):
        size = (1, config.num_key_value_heads, min(1024, tokens - start), head_dim)
        for layer in range(config.num_hidden_layers):
            cache.update(*(torch.randn(size, dtype=dtype) for _ in range(2)), layer)
    return cache


def speed(options: argparse.Namespace) -> None:
    """Print tokens a second after contexts, with the caches in turn."""
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    config = model.config.get_text_config(decoder=True)
    for tokens in options.contexts:
        caches = {options.dtype: DynamicCache(config=config)}
        caches |= {str(bits): SVDQCache(model, bits) for bits in (8, 4.5, 4)}
        for cache in caches.values():
            _filled(cache, config, tokens, dtype)
        seconds: dict[str, list[float]] = {name: [] for name in caches}
        with torch.inference_mode():
            for _ in range(options.steps):
                for name, cache in caches.items():
                    started = time.perf_counter()
                    model(torch.tensor([[7]]), **{cache_keyword(): cache})
                    seconds[name].append(time.perf_counter() - started)
        steps = {name: statistics.median(each[2:]) for name, each in seconds.items()}
        for name, step in steps.items():
            ratio = steps[options.dtype] / step
            print(f"{tokens} tokens, {name:8}: {1 / step:6.1f} tokens/s, {ratio:.2f} x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("quality", "memory", "speed", "fill"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", help="of quality: a file of plain text")
    parser.add_argument("--only", nargs="+", help="of quality: some of the ways to cache")
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--tokens", type=int, default=8192, help="of memory: that the cache is filled with")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--dtype", default="bfloat16", help="of speed: the model's")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--bits", help="of fill")
    options = parser.parse_args()
    {"quality": quality, "memory": memory, "speed": speed, "fill": fill}[options.what](options)


if __name__ == "__main__":
    main()
