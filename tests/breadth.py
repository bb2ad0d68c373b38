"""Walks the model types of transformers: each is built tiny, quantized, saved, reloaded, dequantized.

`python tests/breadth.py [TYPE ...]` walks those or all of them and writes what it found (breadth.json, and
the README's block between the two comments); `test_breadth.py` walks them too and compares. A type is
walked once, as the first class that the tasks below name for it.
"""

import json
import re
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from made_up_inputs import Inputs, complete, made_up_inputs
from tiny_configs import tiny_config
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from svdq_hf import SVDQConfig, footprint
from svdq_hf.nn.inventory import svdq_layers

FOUND = Path(__file__).with_name("breadth.json")
README = Path(__file__).parents[1] / "docs" / "models.md"
START, END = "<!-- breadth: python tests/breadth.py -->\n", "<!-- end of breadth -->"
MOST = 4_000_000
"""Weights of a model that is still tiny."""
PASSES = "passes"

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


def outcome(model_type: str) -> Outcome:
    """Walk a model type. A check of ours that does not hold is an AssertionError; what stops us, an error."""
    named = class_of(model_type)
    assert named is not None
    try:
        model = _built(model_type, getattr(hf, named[1]))
    except Exception as error:  # of any kind: transformers' own, with a config that it may not allow
        return Outcome(*named, _reason(error))
    if model is None:
        return Outcome(*named, "too large when tiny")
    with tempfile.TemporaryDirectory() as folder:
        return Outcome(*named, *_walked(model, Path(folder)))


def _built(model_type: str, kind: type[hf.PreTrainedModel]) -> hf.PreTrainedModel | None:
    with torch.device("meta"):
        empty = kind(tiny_config(model_type, kind.config_class))
    if sum(parameter.numel() for parameter in empty.parameters()) > MOST:
        return None
    torch.manual_seed(0)
    return kind(tiny_config(model_type, kind.config_class)).eval()


def _reason(error: Exception) -> str:
    package = re.search(r"requires the (\w+) library", str(error))
    return f"needs {package[1]}" if package else f"no tiny config: {type(error).__name__}"


def _walked(dense: hf.PreTrainedModel, folder: Path) -> tuple[str, bool, int]:
    """Result, ran, share of `Outcome`."""
    load, config = type(dense).from_pretrained, SVDQConfig(k=8)
    dense.save_pretrained(folder / "dense")
    try:
        quantized, first = load(folder / "dense", quantization_config=config, output_loading_info=True)
    except ValueError as error:
        if "has no linear layer to quantize" in str(error):
            return "no linear layer outside its heads", False, 0
        raise
    except (AttributeError, OSError):
        with pytest.raises((AttributeError, OSError)):
            load(folder / "dense", output_loading_info=True)
        return "does not load without quantization", False, 0
    quantized.save_pretrained(folder / "quantized")
    reloaded, second = load(folder / "quantized", output_loading_info=True)
    assert [tiny.problems(first), tiny.problems(second)] == [{}, {}]
    assert tiny.different_tensors(reloaded, quantized) == []
    inputs, expected = inputs_of(dense)
    if inputs is not None:
        ours = answer(quantized, inputs)
        assert torch.equal(answer(reloaded, inputs), ours)
        assert near(ours, expected, 0.7)  # CpmAnt, with large random weights: 0.76
    _check_dequantized(reloaded.dequantize(), quantized, dense)
    if inputs is not None:
        assert near(answer(reloaded, inputs), ours, 0.999)
    return PASSES, inputs is not None, _share(quantized, dense)


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


# What was found, in a file and as text.


def read() -> dict[str, Outcome]:
    """What was found, by model type."""
    return {name: Outcome(*values) for name, values in json.loads(FOUND.read_text()).items()}


def write(found: dict[str, Outcome]) -> None:
    """The file, one model type a line, and the README's block."""
    lines = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in sorted(found.items())]
    FOUND.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    before, _, rest = README.read_text().partition(START)
    README.write_text(before + START + as_text(found) + END + rest.partition(END)[2])


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
    left = sorted(set(MODEL_TYPES) - set(found))
    if left:
        failing.append(f"| not walked yet | {len(left)} | {', '.join(left)} |")
    table = ["| as | pass | of them run |", "|---|---|---|", *rows, total]
    others = ["| not walked | | model types |", "|---|---|---|", *failing]
    lists = [
        f"* {task}: {', '.join(n for n in sorted(passing) if passing[n].task == task)}" for task in TASKS
    ]
    folded = ["<details><summary>Which pass</summary>", "", *lists, "", "</details>"]
    return "\n".join([*table, "", *others, "", *folded, ""])


if __name__ == "__main__":
    hf.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found = {}
    for name in sys.argv[1:] or MODEL_TYPES:
        try:
            found[name] = outcome(name)
        except (AssertionError, RuntimeError, ValueError) as error:
            print(f"{name}: {error!r}", file=sys.stderr)  # ours to mend, and not to be written down
    write({**(read() if sys.argv[1:] else {}), **found})
