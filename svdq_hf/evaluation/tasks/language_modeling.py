"""Language models, causal and masked, evaluated on a text: loss, perplexity, and KL from the dense model.

Not here: windows and scores (`evaluation.tasks.perplexity`).
"""

import copy
from typing import Any

import torch
from torch import Tensor

from svdq_hf.evaluation.tasks.perplexity import TextScore, causal_score, masked_score, token_ids


def twin(model: Any) -> Any:
    """A copy of a model that shares its tensors: replacing layers of one leaves the other as it was.

    Args:
        model: the model.
    """
    shared = {id(one): one for one in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


class PerplexityEvaluator:
    """Scores causal or masked models on one text; the first model is the reference for the others.

    Args:
        text: the text.
        tokenizer: of the models.
        context: tokens a model sees at once.
        limit: most tokens to score.
        calibration_tokens: tokens at the *end* of the text that are not scored but kept for scores that need
            data.
    """

    def __init__(
        self, text: str, tokenizer: Any, *, context: int, limit: int, calibration_tokens: int = 8192
    ) -> None:
        self.bos: int | None = tokenizer.bos_token_id
        # In the name, so that cells of older runs, which had none, are not taken for these.
        self.task = f"perplexity, context {context}" + ("" if self.bos is None else ", with bos")
        self.tokenizer = tokenizer
        self.context = context
        self.reference: Any = None
        ids = token_ids(text, tokenizer)
        held = min(calibration_tokens, ids.numel() // 4)
        self.ids, self.rest = ids[: ids.numel() - held][:limit], ids[ids.numel() - held :]

    def __call__(self, model: Any) -> dict[str, Any]:
        """The results of a cell: n (tokens), metrics, loss and KL; there are no right answers to count."""
        found = self._score(model)
        if self.reference is None:
            self.reference = twin(model)
        nothing = dict.fromkeys(("right", "correct", "majority"))
        each = None if found.kl is None else [float(f"{one:.4g}") for one in found.kl.tolist()]
        return {
            "n": found.tokens,
            "metrics": {"perplexity": found.perplexity},
            "loss": found.loss,
            "kl": None if found.kl is None else float(found.kl.mean()),
            "kl_each": each,
            **nothing,
        }

    def _score(self, model: Any) -> TextScore:
        if not model.can_generate():
            return masked_score(
                model, self.ids, self.tokenizer, context=self.context, reference=self.reference
            )
        stride = max(1, self.context // 2)
        return causal_score(
            model, self.ids, context=self.context, stride=stride, bos=self.bos, reference=self.reference
        )

    def calibration(self) -> list[dict[str, Tensor]]:
        """Windows of the end of the text, as batches of token ids `[1, tokens]`, int64."""
        lead = self.rest.new_tensor([] if self.bos is None else [self.bos])
        parts = torch.split(self.rest, self.context - len(lead))
        return [{"input_ids": torch.cat([lead, part])[None]} for part in parts if part.numel() > 1]
