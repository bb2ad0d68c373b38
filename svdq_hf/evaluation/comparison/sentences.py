"""Sentences of a text, for models that give each of them a vector, a label, or a label for each token.

Nothing has to be labelled: what is compared is whether the answers stay the reference's. Not here: tasks with
right answers (`evaluation.comparison.classifier`).
"""

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from svdq_hf.evaluation.comparison.answers import Answers, Observed, Reference, check_same_size, run_over

WORDS = 4
"""Least words of a sentence: shorter ones are headings and numbers."""
LONGEST = 256
"""Tokens that a sentence is cut to."""


def sentences_of(text: str) -> list[str]:
    r"""The sentences of a text that have at least four words, each once.

    >>> sentences_of("One two three four. Yes!\n\nOne two three four.  And so it goes on?")
    ['One two three four.', 'And so it goes on?']
    """
    pieces = re.split(r"(?<=[.!?:])\s+|\n\s*\n", text)
    flat = (" ".join(piece.split()) for piece in pieces)
    return list(dict.fromkeys(piece for piece in flat if len(piece.split()) >= WORDS))


def encoded(sentences: list[str], tokenizer: Any, limit: int, longest: int) -> list[dict[str, Tensor]]:
    """Sentences as a model's inputs, one by one, as many as fit into a number of tokens.

    Args:
        sentences: the texts.
        tokenizer: of the model.
        limit: most tokens of all together.
        longest: tokens that a sentence is cut to.

    Returns:
        Token ids and masks `[1, tokens]`, int64.
    """
    found: list[dict[str, Tensor]] = []
    for sentence in sentences:
        one = dict(tokenizer(sentence, return_tensors="pt", truncation=True, max_length=longest))
        limit -= one["input_ids"].numel()
        if limit < 0 and len(found) > 1:
            break
        found.append(one)
    return found


class SentenceLabels:
    """Sentences that a classifier labels: each whole, or token by token.

    Args:
        inputs: as `encoded` returns them.
        reference: keeps the first model's answers.
    """

    counted = "labels"

    def __init__(self, inputs: list[dict[str, Tensor]], reference: Reference) -> None:
        self.inputs = inputs
        self.reference = reference
        self.about = f"{len(inputs)} sentences"

    def __call__(self, model: Any) -> Observed:
        """KL and labels of a model.

        Raises:
            ValueError: it gives numbers, not labels.
        """
        if model.config.num_labels == 1:
            raise ValueError("it gives each text a number, no label: measure it with --task and --data")
        return self.reference.observe(run_over(model, self.inputs, _labels))


def _labels(model: Any, inputs: dict[str, Tensor]) -> Answers:
    logits = model(**inputs).logits[0]
    return Answers(logits.view(-1, logits.shape[-1]), None, block=LONGEST)


class SentenceEmbeddings:
    """Sentences that an encoder gives a vector, as their similarity is computed.

    Args:
        inputs: as `encoded` returns them.
        first: whether a sentence's vector is that of its first token; else it is the mean over its tokens.
        reference: keeps the first model's vectors.
    """

    counted = "sentences"

    def __init__(self, inputs: list[dict[str, Tensor]], first: bool, reference: Reference) -> None:
        self.inputs, self.first, self.reference = inputs, first, reference
        self.about = "vectors of the first token" if first else "mean vectors"

    @torch.no_grad()
    def __call__(self, model: Any) -> Observed:
        """Cosines and similarities of a model.

        Raises:
            ValueError: a NaN, or vectors of another length than the reference's.
        """
        states = [model(**one).last_hidden_state[0].float() for one in self.inputs]
        vectors = torch.stack([state[0] if self.first else state.mean(0) for state in states])
        if torch.isnan(vectors).any():
            raise ValueError("its embeddings have a NaN; is it damaged, or in too narrow a dtype?")
        if not self.reference.complete:
            self.reference.keep(0, vectors)
            self.reference.complete = True
        known = self.reference.known(0)
        check_same_size(known, vectors)
        return beside(known, vectors)


def beside(known: Tensor, vectors: Tensor) -> Observed:
    """What embeddings differ by from a reference's.

    Args:
        known: `[sentences, width]`, of the reference.
        vectors: `[sentences, width]`, of another model.

    Returns:
        Of each sentence: the cosine of its two vectors; the mean change of its similarity to the others;
        whether its nearest other sentence is the same.
    """
    ours, theirs = (F.normalize(one.double(), dim=1) for one in (vectors, known))
    similarities, before = ours @ ours.T, theirs @ theirs.T
    others = max(1, len(ours) - 1)
    nearest = [one.clone().fill_diagonal_(-2).argmax(1) for one in (similarities, before)]
    return Observed(
        torch.arange(len(ours)),
        same=nearest[0] == nearest[1],
        cosine=(ours * theirs).sum(1).clamp(max=1),
        similarity=(similarities - before).fill_diagonal_(0).abs().sum(1) / others,
    )
