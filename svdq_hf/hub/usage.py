"""Usage snippet of a model card: Python lines that run this kind of model, not just load it.

Sentence encoders go through sentence-transformers, models of a pipeline's task through a pipeline, where what
reads their input (tokenizer, processor) stands beside them. Not here: the card (`hub.card`).
"""

from pathlib import Path
from typing import NamedTuple

import transformers
from transformers.models.auto import modeling_auto

from svdq_hf.hub.module_list import is_sentence_transformer

_AUTO_CLASSES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForCTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}


class Task(NamedTuple):
    """A pipeline's task, and a call of it."""

    name: str
    call: str


_SPEECH = Task("automatic-speech-recognition", 'run("speech.wav")')
_TASKS = {
    "AutoModel": Task("feature-extraction", 'run("It rains.")'),
    "AutoModelForCausalLM": Task("text-generation", 'run("The weather today is", max_new_tokens=20)'),
    "AutoModelForMaskedLM": Task("fill-mask", 'run(f"The weather is {run.tokenizer.mask_token}.")'),
    "AutoModelForSequenceClassification": Task("text-classification", 'run("I like it.")'),
    "AutoModelForTokenClassification": Task("token-classification", 'run("Ada lives in London.")'),
    "AutoModelForImageClassification": Task("image-classification", 'run("picture.jpg")'),
    "AutoModelForSpeechSeq2Seq": _SPEECH,
    "AutoModelForCTC": _SPEECH,
    "AutoModelForImageTextToText": Task(
        "image-text-to-text", 'run(images="picture.jpg", text="<image>What is it?")'
    ),
}
_CHAT = 'run([{"role": "user", "content": "Why is the sky blue?"}], max_new_tokens=99)'
_READERS = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def auto_class(architecture: str) -> str:
    """The Auto class that loads an architecture of transformers; without one, the architecture itself.

    Args:
        architecture: name of a model class.

    >>> auto_class("BertForMaskedLM")
    'AutoModelForMaskedLM'
    """
    for auto, mappings in _AUTO_CLASSES.items():
        for names in getattr(modeling_auto, mappings).values():
            if architecture in ((names,) if isinstance(names, str) else names):
                return auto
    return architecture if hasattr(transformers, architecture) else "AutoModel"


def usage(folder: str | Path, architecture: str, repo_id: str | None) -> str:
    """The lines of Python that load and run a model.

    Args:
        folder: of the model.
        architecture: name of its class.
        repo_id: its name on the Hub; None: not known yet.
    """
    name = repo_id or "user/model"
    note = "" if repo_id else "  # the name of this repository, or a folder"
    first = 'import svdq_hf  # registers "svdq" with transformers'
    if is_sentence_transformer(folder):
        return (
            f"{first}\nfrom sentence_transformers import SentenceTransformer\n\n"
            f'model = SentenceTransformer("{name}"){note}\n'
            'print(model.similarity(model.encode("It rains."), model.encode("It is wet outside.")))'
        )
    auto = auto_class(architecture)
    task = _TASKS.get(auto) if any(Path(folder, file).is_file() for file in _READERS) else None
    if task is None:
        return f'{first}\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained("{name}"){note}'
    call = _CHAT if auto == "AutoModelForCausalLM" and _chats(Path(folder)) else task.call
    return (
        f"{first}\nfrom transformers import {auto}, pipeline\n\n"
        f'model = {auto}.from_pretrained("{name}"){note}\n'
        f'run = pipeline("{task.name}", model="{name}")  # with what reads its input\n'
        f"print({call})"
    )


def _chats(folder: Path) -> bool:
    """Whether a tokenizer has a chat template."""
    config = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file():
        return True
    return config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8", errors="replace")
