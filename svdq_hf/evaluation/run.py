"""`svdq evaluate`: its arguments, and the run from a model's folder to the report.

The libraries of the extra `evaluate` are imported when it runs, so that the rest of the command line
works without them.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from svdq_hf.evaluation.sweep.defaults import GRID_NAMES
from svdq_hf.hub.client import local_folder


def run(options: argparse.Namespace) -> dict[str, object]:
    """Run what is not finished and write the report; what was done.

    Raises:
        ImportError: the extra `evaluate` is not installed.
        ValueError: whatever is wrong with the arguments, the data or the model.
    """
    from datasets import disable_progress_bars

    from svdq_hf.evaluation.report.report import write_report
    from svdq_hf.evaluation.sweep.plan import SweepPlan, with_bits
    from svdq_hf.evaluation.sweep.store import check_inputs, model_facts

    folders = _folders(options)
    disable_progress_bars()  # one bar, that of the cells, is enough
    plan = SweepPlan(
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
    from svdq_hf.evaluation.sweep.run import Sweep

    model, evaluator = _load(options, folder)
    try:
        return Sweep(model, name, evaluator, plan, out).run()
    except ValueError as error:
        if "padding token" not in str(error):  # transformers' words, of a model that finds a text's end by it
            raise
        remedy = (
            f"set pad_token_id in its config.json, to {evaluator.tokenizer.pad_token_id}, the tokenizer's"
        )
        raise ValueError(f"{folder}: {str(error).rstrip('.')}; {remedy}") from error


def _data_facts(options: argparse.Namespace, plan: Any) -> dict[str, Any]:
    """What the text or the examples are known by; those of calibration only where a score asks for them."""
    from svdq_hf.core.saliency import data_needs
    from svdq_hf.evaluation.sweep.store import digest

    if options.task == "perplexity":
        return {"text": digest([_text(options)]), "tokens": options.tokens}
    from svdq_hf.evaluation.tasks.classification import CALIBRATION_TEXTS
    from svdq_hf.evaluation.tasks.glue import load_split

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
        from svdq_hf.evaluation.tasks.glue import task_of

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
    from svdq_hf.evaluation.tasks.classification import GlueEvaluator, classifier

    model = classifier(folder, options.task)
    tokenizer = _tokenizer(folder, model)
    return model, GlueEvaluator(options.task, tokenizer, options.data, script=options.metric_script)


def _load_language_model(options: argparse.Namespace, folder: Path, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    from svdq_hf.evaluation.tasks.perplexity import PerplexityEvaluator, context_of

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
