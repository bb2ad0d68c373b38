"""Walks the model types of transformers: each is built tiny, quantized, saved, reloaded, dequantized.

`python tests/helpers/breadth.py [TYPE ...]` walks those or all of them and writes what it found: the record
of the transformers release at hand (breadth-RELEASE.json, in which a release after the first has only what
differs from the one before it; null: the type is gone), and from the newest record the block of the page
between the two comments. `test_breadth.py` walks them too and compares. A type is walked once, as the first
class that the tasks below name for it.
"""

import copy
import json
import re
import sys
import tempfile
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from made_up_inputs import Inputs, complete, made_up_inputs
from packaging.version import Version
from places import ROOT
from tiny_configs import tiny_config
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from svdq_hf import SVDQConfig, footprint, quantize_model
from svdq_hf.nn.inventory import svdq_layers

RECORDS = Path(__file__).parent
RELEASE = hf.__version__
README = ROOT / "docs" / "models.md"
START, END = "<!-- breadth: python tests/helpers/breadth.py -->\n", "<!-- end of breadth -->"
MOST = 4_000_000
"""Weights of a model that is still tiny."""
PASSES = "passes"
CHEAP = SVDQConfig(k=8, saliency="magnitude")
"""What is stored looks the same whatever the score."""

TASKS = {
    "text to text": "SEQ_TO_SEQ_CAUSAL_LM",
    "audio": "SPEECH_SEQ_2_SEQ CTC RNNT TDT AUDIO_CLASSIFICATION AUDIO_FRAME_CLASSIFICATION AUDIO_XVECTOR "
    "TEXT_TO_SPECTROGRAM TEXT_TO_WAVEFORM",
    "causal": "CAUSAL_LM",
    "masked": "MASKED_LM",
    "sequence classification": "SEQUENCE_CLASSIFICATION",
    "vision": "IMAGE_CLASSIFICATION SEMANTIC_SEGMENTATION UNIVERSAL_SEGMENTATION INSTANCE_SEGMENTATION "
    "IMAGE_SEGMENTATION OBJECT_DETECTION ZERO_SHOT_OBJECT_DETECTION DEPTH_ESTIMATION NORMAL_ESTIMATION "
    "MASK_GENERATION MASKED_IMAGE_MODELING IMAGE_TO_IMAGE IMAGE_MATTING KEYPOINT_DETECTION "
    "KEYPOINT_MATCHING POSE_ESTIMATION POINTMAP_ESTIMATION VIDEO_CLASSIFICATION TABLE_RECOGNITION "
    "TEXT_RECOGNITION CAUSAL_IMAGE_MODELING BACKBONE IMAGE",
    "pictures or sounds with text": "IMAGE_TEXT_TO_TEXT MULTIMODAL_LM ZERO_SHOT_IMAGE_CLASSIFICATION "
    "VISUAL_QUESTION_ANSWERING DOCUMENT_QUESTION_ANSWERING RETRIEVAL",
    "other": "TEXT_ENCODING QUESTION_ANSWERING TOKEN_CLASSIFICATION TABLE_QUESTION_ANSWERING "
    "TIME_SERIES_PREDICTION TIME_SERIES_CLASSIFICATION TIME_SERIES_REGRESSION DECISION PRETRAINING",
}
"""Tasks, as the README names them: transformers' own, the first that has a model type is taken."""


class Outcome(NamedTuple):
    """What became of a model type.

    result: `PASSES`, or why it was not walked. ran: whether inputs could be made up for it. share: of its
    weights in matrices, without embeddings and convolutions, the percentage that is quantized.
    """

    task: str
    model: str
    result: str
    ran: bool = False
    share: int = 0


def class_of(model_type: str) -> tuple[str, str] | None:
    """The task and the class that a model type is walked as; None where it has none: part of a model."""
    for task, mappings in TASKS.items():
        names = [f"MODEL_FOR_{mapping}_MAPPING_NAMES" for mapping in mappings.split()]
        for name in names:
            found = getattr(modeling_auto, name).get(model_type)
            if found:
                return task, found if isinstance(found, str) else found[0]
    return None


MODEL_TYPES = [model_type for model_type in CONFIG_MAPPING_NAMES if class_of(model_type)]


def outcome(model_type: str, *, through_files: bool = True) -> Outcome:
    """Walk a model type. A check of ours that does not hold is an AssertionError; what stops us, an error.

    Args:
        model_type: as transformers names it.
        through_files: whether it is quantized while loading, saved, reloaded and dequantized; else it is
            quantized in memory and runs, in a third of the time.
    """
    named = class_of(model_type)
    assert named is not None
    try:
        model = _built(model_type, getattr(hf, named[1]))
    except Exception as error:  # of any kind: transformers' own, with a config that it may not allow
        return Outcome(*named, _reason(error))
    if model is None:
        return Outcome(*named, "too large when tiny")
    try:
        if not through_files:
            return Outcome(*named, *_walked_in_memory(model))
        with tempfile.TemporaryDirectory() as folder:
            return Outcome(*named, *_walked(model, Path(folder)))
    except ValueError as error:
        if "has no linear layer to quantize" in str(error):
            return Outcome(*named, "no linear layer outside its heads")
        raise


def _built(model_type: str, kind: type[hf.PreTrainedModel]) -> hf.PreTrainedModel | None:
    config = tiny_config(model_type, kind.config_class)
    with torch.device("meta"):
        empty = kind(copy.deepcopy(config))  # some models change theirs
    if sum(parameter.numel() for parameter in empty.parameters()) > MOST:
        return None
    torch.manual_seed(0)
    return kind(config).eval()


def _reason(error: Exception) -> str:
    package = re.search(r"requires the (\w+) library", str(error))
    return f"needs {package[1]}" if package else f"no tiny config: {type(error).__name__}"


def _walked(dense: hf.PreTrainedModel, folder: Path) -> tuple[str, bool, int]:
    """Result, ran, share of `Outcome`."""
    dense.save_pretrained(folder / "dense")
    try:
        quantized, first = _load(dense, folder / "dense", quantization_config=CHEAP)
    except (AttributeError, OSError):
        with pytest.raises((AttributeError, OSError)):
            _load(dense, folder / "dense")
        return "does not load without quantization", False, 0
    quantized.save_pretrained(folder / "quantized")
    reloaded, second = _load(dense, folder / "quantized")
    assert [tiny.problems(first), tiny.problems(second)] == [{}, {}]
    assert tiny.different_tensors(reloaded, quantized) == []
    inputs, expected = inputs_of(dense)
    if inputs is not None:
        settle(quantized)
        settle(reloaded)
        ours = answer(quantized, inputs)
        assert torch.equal(answer(reloaded, inputs), ours)
        assert near(ours, expected, 0.7)  # CpmAnt, with large random weights: 0.76
    _check_dequantized(reloaded.dequantize(), quantized, dense)
    if inputs is not None:
        assert near(answer(reloaded, inputs), ours, 0.999)
    return PASSES, inputs is not None, _share(quantized, dense)


def _walked_in_memory(dense: hf.PreTrainedModel) -> tuple[str, bool, int]:
    """What `_walked` returns, without files."""
    inputs, expected = inputs_of(dense)
    quantized = quantize_model(copy.deepcopy(dense), CHEAP)
    if inputs is not None:
        assert near(answer(quantized, inputs), expected, 0.7)
    return PASSES, inputs is not None, _share(quantized, dense)


def settle(model: hf.PreTrainedModel) -> None:
    """Give every float tensor memory of its own.

    Some of torch's products round by the address of a tensor, and in a file's mapping that may be any.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def _load(like: hf.PreTrainedModel, folder: Path, **choices: Any) -> tuple[hf.PreTrainedModel, Any]:
    """A model from a folder, and what the loader says of it.

    A family that borrows another's class is loaded with its own config, as the auto classes do.
    """
    if type(like.config) is not like.config_class:
        choices["config"] = hf.AutoConfig.from_pretrained(folder)
    return type(like).from_pretrained(folder, output_loading_info=True, **choices)


def inputs_of(model: hf.PreTrainedModel) -> tuple[Inputs, Tensor] | tuple[None, None]:
    """Inputs that a model runs with, and its answer; None where none of those made up will do."""
    for inputs in made_up_inputs(model):
        inputs = complete(model, inputs)
        try:
            return inputs, answer(model, inputs)
        except Exception:  # guesses: whatever a family says to a wrong one
            continue
    return None, None


def answer(model: hf.PreTrainedModel, inputs: Inputs) -> Tensor:
    """Every number that a model answers with; what is random in it is the same each time."""
    torch.manual_seed(0)
    return tiny.outputs(model, inputs).nan_to_num()


def near(one: Tensor, other: Tensor, cosine: float) -> bool:
    """Whether two answers are alike; those that a model makes as long as it pleases cannot be compared."""
    size = other.abs().max()
    if one.shape != other.shape or size < torch.finfo(torch.float32).tiny:  # MobileViT's is 1e-45
        return True
    return tiny.cosine(one.double() / size, other.double() / size) > cosine  # Levit's is 1e-9


def _check_dequantized(ours: nn.Module, quantized: nn.Module, dense: nn.Module) -> None:
    assert not footprint(ours).layers
    for name, layer in svdq_layers(quantized):
        weight = ours.get_submodule(name).weight
        assert torch.equal(weight.T if layer.transposed else weight, layer.dequantize()), name
    shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (ours, dense)]
    assert shapes[0] == shapes[1]


def _share(quantized: nn.Module, dense: nn.Module) -> int:
    others = (nn.Embedding, nn.modules.conv._ConvNd)
    tables = {id(p) for module in dense.modules() if isinstance(module, others) for p in module.parameters()}
    matrices = [p.numel() for p in dense.parameters() if p.ndim in (2, 3) and id(p) not in tables]
    return round(100 * footprint(quantized).weights / sum(matrices))


# What was found, in files and as text.

Found = dict[str, Outcome]


def read() -> dict[str, Found]:
    """What was found, by release, the oldest first, and by model type."""
    records: dict[str, Found] = {}
    found: Found = {}
    for release in sorted(
        (file.stem.partition("-")[2] for file in RECORDS.glob("breadth-*.json")), key=Version
    ):
        for name, values in json.loads(_file(release).read_text()).items():
            found = (
                {**found, name: Outcome(*values)} if values else {n: o for n, o in found.items() if n != name}
            )
        records[release] = found
    return records


def write(records: dict[str, Found]) -> None:
    """The files, one model type a line, and the README's block."""
    ordered = [("", {}), *sorted(records.items(), key=lambda record: Version(record[0]))]
    for (_, before), (release, found) in pairwise(ordered):
        changes = differences(before, found)
        lines = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in changes.items()]
        _file(release).write_text("{\n" + ",\n".join(lines) + "\n}\n")
    above, _, rest = README.read_text().partition(START)
    newest = ordered[-1][1]
    README.write_text(above + START + as_text(newest) + END + rest.partition(END)[2])


def differences(before: Found, after: Found) -> dict[str, Outcome | None]:
    """By model type what is new or has changed; None where it is gone."""
    names = sorted({*before, *after})
    return {name: after.get(name) for name in names if before.get(name) != after.get(name)}


def _file(release: str) -> Path:
    return RECORDS / f"breadth-{release}.json"


def as_text(found: dict[str, Outcome]) -> str:
    """The README's block: how many pass, which, and why the others do not."""
    passing = {name: one for name, one in found.items() if one.result == PASSES}
    tasks = Counter(one.task for one in passing.values())
    ran = Counter(one.task for one in passing.values() if one.ran)
    rows = [f"| {task} | {tasks[task]} | {ran[task]} |" for task in TASKS]
    total = f"| **all** | **{len(passing)}** | **{sum(ran.values())}** |"
    reasons = defaultdict(list)
    for name, one in sorted(found.items()):
        if one.result != PASSES:
            reasons[one.result.partition(":")[0]].append(name)
    failing = [
        f"| {reason} | {len(names)} | {', '.join(names)} |" for reason, names in sorted(reasons.items())
    ]
    table = ["| as | pass | of them run |", "|---|---|---|", *rows, total]
    others = ["| not walked | | model types |", "|---|---|---|", *failing]
    lists = [
        f"* {task}: {', '.join(n for n in sorted(passing) if passing[n].task == task)}" for task in TASKS
    ]
    folded = ["<details><summary>Which pass</summary>", "", *lists, "", "</details>"]
    return "\n".join([*table, "", *others, "", *folded, ""])


def walk(names: list[str]) -> Found:
    """What those model types come to; one that is ours to mend is told, and not to be written down."""
    found = {}
    for name in names:
        try:
            found[name] = outcome(name)
        except (AssertionError, RuntimeError, ValueError) as error:
            print(f"{name}: {error!r}", file=sys.stderr)
    return found


if __name__ == "__main__":
    hf.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    records = read()
    kept = records.get(RELEASE, {}) if sys.argv[1:] else {}
    write({**records, RELEASE: {**kept, **walk(sys.argv[1:] or MODEL_TYPES)}})
