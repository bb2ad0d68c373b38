"""Kinds of models: found by the class, whatever the family."""

import pytest
import torch
import transformers as hf
from letters import KINDS

from svdq_hf.evaluation.comparison.kinds import kind_of


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_found_by_its_class(kind):
    model_class, config = KINDS[kind]
    with torch.device("meta"):
        assert kind_of(model_class(config()), "here") == kind


@pytest.mark.parametrize(
    ("model_class", "kind"),
    [
        (hf.WhisperForConditionalGeneration, "speech"),
        (hf.Wav2Vec2ForCTC, "frames"),
        (hf.BartForConditionalGeneration, "halves"),
        (hf.Gemma3ForConditionalGeneration, "causal"),
        (hf.GPT2ForSequenceClassification, "labels"),
        (hf.MPNetModel, "embeddings"),
    ],
)
def test_families_that_no_test_builds(model_class, kind):
    model = model_class.__new__(model_class)  # the class alone tells
    assert kind_of(model, "here") == kind


def test_what_has_no_measure_is_refused_by_name():
    model = hf.ViTModel.__new__(hf.ViTModel)
    with pytest.raises(ValueError, match="pictures: a ViTModel reads or answers what svdq compare has no"):
        kind_of(model, "pictures")
