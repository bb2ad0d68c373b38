"""`svdq evaluate`: its arguments, and the run from a model's folder to the report.

The libraries of the extra `evaluate` are imported when it runs, so that the rest of the command line
works without them.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from svdq_hf.checkpoint import local_folder

KS: Final = (1, 16, 64, 256, 1024, 4096)
METHODS: Final = ("svd", "magnitude", "awq", "spqr", "random", "relative")
GRID_NAMES: Final = {"default": "default", "group": "group 64, mse", "tensor": "tensor, absmax"}
EXAMPLE: Final = "svdq evaluate --task rte --model rte-seed0 rte-seed1 --data glue --k 64 1024 --out report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `svdq evaluate`."""
    add = parser.add_argument
    add("--task", required=True, help="cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, or perplexity")
    add("--model", required=True, nargs="+", help="dense models to quantize and evaluate, e.g. one per seed")
    add("--out", required=True, help="folder of the cells and the report; a run that stopped goes on there")
    add("--data", help="folder with TASK/train.jsonl and TASK/dev.jsonl (or tsv, csv, parquet) (the Hub)")
    add("--text", help="perplexity: a text file")
    add("--context", type=int, help="perplexity: tokens the model sees at once (1024), or all that it can")
    add("--tokens", type=int, default=16384, help="perplexity: tokens of the text that are scored (16384)")
    add("--k", nargs="+", type=number, default=KS, help=f"salient weights, or shares below 1 {_shown(KS)}")
    add("--saliency", nargs="+", default=METHODS, help=f"scores to compare {_shown(METHODS)}")
    add("--grid", nargs="+", choices=GRID_NAMES, default=["default"], help="of scales: that of "
        "SVDQConfig(), group (64 columns, linear) or tensor (one scale, the paper's) (default)")  # fmt: skip
    add("--bits", nargs="+", type=int, choices=(4, 3, 8), default=[4], help="of codes, on each grid (4)")
    add("--rank", nargs="+", type=int, default=[8], help="ranks of the svd score (8)")
    add("--seeds", type=int, default=3, help="seeds of the random choice (3)")
    add(
        "--metric-script",
        help="a local copy of the evaluate library's metric 'glue', to compute the scores (our own code)",
    )


def _shown(values: Sequence[object]) -> str:
    return f"({' '.join(map(str, values))})"


def number(text: str) -> int | float:
    """A count, or a share: what k may be."""
    return int(text) if text.lstrip("-").isdigit() else float(text)


def run(options: argparse.Namespace) -> dict[str, object]:
    """Run what is not finished and write the report; what was done.

    Raises:
        ImportError: the extra `evaluate` is not installed.
        ValueError: whatever is wrong with the arguments, the data or the model.
    """
    from datasets import disable_progress_bars

    from svdq_hf.evaluation.kept import check_inputs, model_facts
    from svdq_hf.evaluation.plan import Plan, with_bits
    from svdq_hf.evaluation.report import write_report

    folders = _folders(options)
    disable_progress_bars()  # one bar, that of the cells, is enough
    plan = Plan(
        ks=options.k,
        methods=options.saliency,
        grids=[with_bits(GRID_NAMES[grid], bits) for bits in options.bits for grid in options.grid],
        seeds=options.seeds,
        ranks=options.rank,
    )
    out, started, cells = Path(options.out), time.perf_counter(), 0
    models = {name: model_facts(folder) for name, folder in folders.items()}
    check_inputs(out, options.task, _data_facts(options, plan), models)
    for name, folder in folders.items():
        cells += _run_model(options, name, folder, plan, out)
    seconds = time.perf_counter() - started
    written = [str(file) for file in write_report(out)]
    return {"cells": cells, "seconds": seconds, "report": written}


def _run_model(options: argparse.Namespace, name: str, folder: Path, plan: Any, out: Path) -> int:
    from svdq_hf.evaluation.grid import GridRun

    model, evaluator = _load(options, folder)
    try:
        return GridRun(model, name, evaluator, plan, out).run()
    except ValueError as error:
        if "padding token" not in str(error):  # transformers' words, of a model that finds a text's end by it
            raise
        remedy = (
            f"set pad_token_id in its config.json, to {evaluator.tokenizer.pad_token_id}, the tokenizer's"
        )
        raise ValueError(f"{folder}: {str(error).rstrip('.')}; {remedy}") from error


def _data_facts(options: argparse.Namespace, plan: Any) -> dict[str, Any]:
    """What the text or the examples are known by; those of calibration only where a score asks for them."""
    from svdq_hf.evaluation.kept import digest
    from svdq_hf.saliency import data_needs

    if options.task == "perplexity":
        return {"text": digest([_text(options)]), "tokens": options.tokens}
    from svdq_hf.evaluation.glue import load_split
    from svdq_hf.evaluation.trainer import CALIBRATION_TEXTS

    facts = {"dev examples": digest(map(str, load_split(options.task, "dev", options.data)))}
    if any(data_needs(method) for method in plan.methods):
        train = load_split(options.task, "train", options.data)
        seen = train.select(range(min(CALIBRATION_TEXTS, len(train))))
        facts["train examples"] = digest(map(str, seen))
    return facts


def _text(options: argparse.Namespace) -> str:
    return Path(options.text).read_text(encoding="utf-8")


def _folders(options: argparse.Namespace) -> dict[str, Path]:
    """Name and folder of each model: a wrong task, text or model is told before anything is loaded."""
    if options.task != "perplexity":
        from svdq_hf.evaluation.glue import task_of

        task_of(options.task)
    elif options.text is None or not Path(options.text).is_file():
        found = "" if options.text is None else f" {options.text}: no such file"
        raise ValueError(f"--text{found}: perplexity needs a text file")
    given: dict[str, str] = {}
    for model in options.model:
        name = Path(os.path.abspath(model)).name
        if name in given:
            raise ValueError(
                f"--model {given[name]} and {model}: both are called {name}, and cells go by that name; "
                "rename one of the folders"
            )
        given[name] = model
    return {name: local_folder(model) for name, model in given.items()}


def _load(options: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
    """A dense model and what evaluates it."""
    from transformers import AutoTokenizer

    if options.task == "perplexity":
        return _load_language_model(options, folder, AutoTokenizer.from_pretrained(folder))
    from svdq_hf.evaluation.trainer import GlueEvaluator, classifier

    model = classifier(folder, options.task)
    tokenizer = _tokenizer(folder, model)
    return model, GlueEvaluator(options.task, tokenizer, options.data, script=options.metric_script)


def _load_language_model(options: argparse.Namespace, folder: Path, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    from svdq_hf.evaluation.perplexity import PerplexityEvaluator, context_of

    names = AutoConfig.from_pretrained(folder).architectures or []
    kind = AutoModelForMaskedLM if any("MaskedLM" in name for name in names) else AutoModelForCausalLM
    model = kind.from_pretrained(folder)
    context = context_of(model, options.context)
    return model, PerplexityEvaluator(_text(options), tokenizer, context=context, limit=options.tokens)


def _tokenizer(folder: Path, model: Any) -> Any:
    """The model's tokenizer, if it fits the model's vocabulary and can fill a batch."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise ValueError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {known}")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"{folder}: the tokenizer has no padding token, which a batch of texts needs; set pad_token in "
            "its tokenizer_config.json, and pad_token_id in config.json"
        )
    return tokenizer
