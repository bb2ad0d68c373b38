"""What `svdq bench` prints: tables of at most 60 columns, and the kernels in sentences.

Not here: the figures (`evaluation.speed.bench_result`).
"""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from svdq_hf.cli.tables import console, plain
from svdq_hf.evaluation.speed.bench_result import DECODE, REFERENCE, BenchResult, Measured

MEGABYTE = 10**6
LEAST_SHARE = 0.005
"""Shares that are not rounded to 0 %."""


def show_bench(result: BenchResult) -> None:
    """Print a bench: speeds, memory, shares of the time, kernels, and a verdict.

    Args:
        result: what was measured.
    """
    screen = console()
    size, weights = result.stored_bytes / MEGABYTE, result.parameters / 1e6
    screen.print(plain(f"{result.model}: {result.kind}"))
    threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
    told = f"{weights:.0f} M weights, {size:.0f} MB on disk; {threads}, {_times(result.rounds)}"
    screen.print(plain(told))
    for table in (_speeds(result), _memory(result), _shares(result)):
        screen.print(table)
    for line in (*kernel_lines(result.paths), *_notes(result), verdict(result)):
        screen.print(plain(line))


def _times(rounds: int) -> str:
    return "one round" if rounds == 1 else f"medians of {rounds} rounds in turn"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _speeds(result: BenchResult) -> Table:
    """Tokens a second, and below each the ratio to dense FP32."""
    heads = [one if one == DECODE else f"{one} tokens" for one in result.figures]
    table = _table("tokens a second (and times dense FP32)", *heads)
    for word, one in result.variants.items():
        table.add_row(one.name, *(_number(one.rate(figure)) for figure in result.figures))
        ratios = result.ratios(word) if word != REFERENCE else {}
        if ratios:
            table.add_row("", *(f"{ratios[one]:.2f}x" if one in ratios else "-" for one in result.figures))
    return table


def _memory(result: BenchResult) -> Table:
    table = _table("memory above the interpreter's own, and time", "loading", "running", "to load")
    for one in result.variants.values():
        table.add_row(one.name, *_memory_cells(one))
    return table


def _memory_cells(one: Measured) -> Iterable[str]:
    for size in (one.load_peak_bytes, one.run_peak_bytes):
        yield "-" if size is None else f"{size / MEGABYTE:.0f} MB"
    yield "-" if one.load_seconds is None else f"{one.load_seconds:.1f} s"


def _shares(result: BenchResult) -> Table:
    """Shares of the time, by kind of module."""
    runs = {name: shares for name, shares in result.shares.items() if shares is not None}
    first = next(iter(result.variants.values())).name
    table = _table(f"where the time of {first} goes", *runs)
    for kind in dict.fromkeys(kind for shares in runs.values() for kind in shares):
        found = [shares.get(kind, 0.0) for shares in runs.values()]
        if max(found) >= LEAST_SHARE:
            table.add_row(kind, *(f"{share:.0%}" for share in found))
    return table


def _number(rate: float | None) -> str:
    if rate is None:
        return "-"
    return f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"


def kernel_lines(paths: list[dict[str, Any]]) -> Iterable[str]:
    """The kernels in words: for each shape which path at which numbers of tokens, then why not a better one.

    Args:
        paths: each as `KernelPath.to_dict` gives it.
    """
    for same in _grouped(paths):
        shapes = ", ".join(f"{one['out']} x {one['in_features']} ({one['layers']})" for one in same)
        yield f"kernels of {shapes}:"
        yield from (f"  {line}" for line in _ways(same[0]["ways"]))
    why = dict.fromkeys(reason for one in paths for reason in one["why_not_better"])
    if why:
        yield f"  not faster, since {'; '.join(why)}"


def _grouped(paths: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Shapes that take the same paths, together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in paths:
        groups.setdefault(repr((one["ways"], one["why_not_better"])), []).append(one)
    return list(groups.values())


def _ways(ways: dict[str, str]) -> Iterable[str]:
    """Neighbouring numbers of tokens with one path in one line."""
    for way, numbers in groupby(ways, key=lambda tokens: ways[tokens]):
        tokens = list(numbers)
        yield f"{', '.join(map(str, tokens))} token{'' if tokens in (['1'], [1]) else 's'}: {way}"


def _notes(result: BenchResult) -> Iterable[str]:
    if any(one.maps_dense for one in result.variants.values()):
        yield (
            "memory: a model quantized while it loads counts pages of the dense file as well; save it, and "
            "bench that folder"
        )
    yield from (f"not measured: {name} ({why})" for name, why in result.missing.items())


def verdict(result: BenchResult) -> str:
    """One sentence: the first variant against dense FP32.

    Args:
        result: what was measured.
    """
    word, one = next(iter(result.variants.items()))
    ratios = result.ratios(word)
    if word == REFERENCE or not ratios:
        return "Nothing to compare with: dense FP32 was not measured beside a quantized model."
    told = [
        f"{'decoding' if figure == DECODE else f'reading {figure} tokens'} {ratio:.2f} times"
        for figure, ratio in ratios.items()
    ]
    mine, dense = one.run_peak_bytes, result.variants[REFERENCE].run_peak_bytes
    share = f", in {mine / dense:.0%} of its memory" if mine and dense and not one.maps_dense else ""
    return f"{one.name}, times as fast as dense FP32: {', '.join(told)}{share}."
