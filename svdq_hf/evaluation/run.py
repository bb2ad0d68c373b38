"""Run of one evaluation, from the models' folders to the report.

The libraries of the extra `evaluate` are imported when it runs, so that the rest of the package works
without them. Not here: the request and its checks (`evaluation.request`), and the cells themselves
(`evaluation.sweep`).
"""

import os
import time
from pathlib import Path
from typing import Any

from svdq_hf.calibration.texts import read_text
from svdq_hf.config.choices import QUANT_METHOD
from svdq_hf.evaluation.request import EvaluationRequest, EvaluationResult
from svdq_hf.evaluation.sweep.defaults import PERPLEXITY
from svdq_hf.hub.client import local_folder


def evaluate(request: EvaluationRequest) -> EvaluationResult:
    """Run the cells of an evaluation that are not computed yet, and write its report.

    Args:
        request: the models, the task, and the ways to quantize that are compared.

    Returns:
        How many cells were computed, in how many seconds, and the files of the report.

    Raises:
        ImportError: the extra `evaluate` is not installed.
        TypeError: `request` is no EvaluationRequest.
        ValueError: the request, the data or a model is wrong; the message says which.
    """
    if not isinstance(request, EvaluationRequest):
        raise TypeError(f"evaluate takes an EvaluationRequest, not {type(request).__name__}")
    folders = _folders(request)
    from datasets import disable_progress_bars

    from svdq_hf.evaluation.report.report import write_report
    from svdq_hf.evaluation.sweep.store import check_inputs, model_facts

    disable_progress_bars()  # one bar, that of the cells, is enough
    out, started = Path(request.out), time.perf_counter()
    models = {name: model_facts(folder) for name, folder in folders.items()}
    check_inputs(out, request.task, _data_facts(request), models)
    cells = sum(_run_model(request, name, folder) for name, folder in folders.items())
    seconds = time.perf_counter() - started
    return EvaluationResult(cells, seconds, write_report(out))


def _run_model(request: EvaluationRequest, name: str, folder: Path) -> int:
    from svdq_hf.evaluation.sweep.cell import run_stored
    from svdq_hf.evaluation.sweep.run import Sweep

    model, evaluator = _load(request, folder)
    if getattr(model, "quantization_method", None) == QUANT_METHOD:
        return run_stored(model, name, evaluator, Path(request.out))
    try:
        return Sweep(model, name, evaluator, request.plan, Path(request.out)).run()
    except ValueError as error:
        if "padding token" not in str(error):  # transformers' words, of a model that finds a text's end by it
            raise
        remedy = (
            f"set pad_token_id in its config.json, to {evaluator.tokenizer.pad_token_id}, the tokenizer's"
        )
        raise ValueError(f"{folder}: {str(error).rstrip('.')}; {remedy}") from error


def _data_facts(request: EvaluationRequest) -> dict[str, Any]:
    """Hashes that identify the text or the examples; training examples only where a score needs them."""
    from svdq_hf.core.saliency import data_needs
    from svdq_hf.evaluation.sweep.store import digest

    if request.task == PERPLEXITY:
        return {"text": digest([_text(request)]), "tokens": request.tokens}
    from svdq_hf.evaluation.tasks.classification import CALIBRATION_TEXTS
    from svdq_hf.evaluation.tasks.glue import load_split

    facts = {"dev examples": digest(map(str, load_split(request.task, "dev", request.data)))}
    if any(data_needs(method) for method in request.saliency) or _needs_data(request):
        train = load_split(request.task, "train", request.data)
        seen = train.select(range(min(CALIBRATION_TEXTS, len(train))))
        facts["train examples"] = digest(map(str, seen))
    return facts


def _needs_data(request: EvaluationRequest) -> bool:
    """Whether a whole config that is compared needs data."""
    return any(one.needs_batches for one in request.plan.contestants.values())


def _text(request: EvaluationRequest) -> str:
    if request.text is None or not Path(request.text).is_file():
        found = "" if request.text is None else f" {request.text}: no such file"
        raise ValueError(f"--text{found}: perplexity needs a text file")
    return read_text(request.text)


def _folders(request: EvaluationRequest) -> dict[str, Path]:
    """Name and folder of each model; a wrong text or model is refused before anything is loaded."""
    if request.task == PERPLEXITY:
        _text(request)
    given: dict[str, str | Path] = {}
    for model in request.model:
        name = Path(os.path.abspath(model)).name
        if name in given:
            raise ValueError(
                f"--model {given[name]} and {model}: both are called {name}, and cells go by that name; "
                "rename one of the folders"
            )
        given[name] = model
    return {name: local_folder(str(model)) for name, model in given.items()}


def _load(request: EvaluationRequest, folder: Path) -> tuple[Any, Any]:
    """A model and its evaluator."""
    from transformers import AutoTokenizer

    if request.task == PERPLEXITY:
        return _load_language_model(request, folder, AutoTokenizer.from_pretrained(folder))
    from svdq_hf.evaluation.tasks.classification import GlueEvaluator, classifier

    model = classifier(folder, request.task)
    tokenizer = _tokenizer(folder, model)
    return model, GlueEvaluator(request.task, tokenizer, request.data, script=request.metric_script)


def _load_language_model(request: EvaluationRequest, folder: Path, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    from svdq_hf.checkpoint.load import load_complete
    from svdq_hf.evaluation.tasks.language_modeling import PerplexityEvaluator
    from svdq_hf.evaluation.tasks.perplexity import context_of

    names = AutoConfig.from_pretrained(folder).architectures or []
    kind = AutoModelForMaskedLM if any("MaskedLM" in name for name in names) else AutoModelForCausalLM
    try:
        model, _ = load_complete(kind, folder, heads=False)  # a head that is missing would be random
    except ValueError as error:
        if "would be random" not in str(error):
            raise
        told = "a model without an output head has no perplexity, and svdq compare measures it"
        raise ValueError(f"{error} ({told})") from error
    context = context_of(model, request.context)
    return model, PerplexityEvaluator(_text(request), tokenizer, context=context, limit=request.tokens)


def _tokenizer(folder: Path, model: Any) -> Any:
    """The model's tokenizer; refused where it does not fit the model's vocabulary or cannot pad a batch."""
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
