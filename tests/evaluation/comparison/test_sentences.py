"""Sentences: where a text is cut, what embeddings differ by, labels without right answers."""

import letters
import pytest
import torch
from letters import KINDS, QUICK

from svdq_hf.evaluation.comparison.answers import Reference
from svdq_hf.evaluation.comparison.sentences import (
    SentenceEmbeddings,
    SentenceLabels,
    beside,
    encoded,
    sentences_of,
)


def test_as_many_sentences_as_the_tokens_allow_and_none_too_long():
    texts = sentences_of(QUICK)
    assert len(texts) == 2
    both = encoded(texts * 3, letters.tokenizer(), limit=100, longest=40)
    assert [one["input_ids"].shape[1] for one in both] == [40, 25]  # a third would not fit
    assert encoded(texts, letters.tokenizer(), limit=1, longest=40)[0]["input_ids"].shape == (1, 40)


def test_embeddings_differ_by_cosine_similarity_and_nearest():
    known = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    turned = torch.tensor([[0.0, 1.0], [0.0, 2.0], [1.0, 0.0]])
    found = beside(known, turned)
    half = 0.5**0.5
    torch.testing.assert_close(found.cosine, torch.tensor([0.0, 1.0, half], dtype=torch.float64))
    # similarities were 0, half, half (01, 02, 12) and are 1, 0, 0
    expected = torch.tensor([1 + half, 1 + half, 2 * half], dtype=torch.float64) / 2
    torch.testing.assert_close(found.similarity, expected)
    assert found.same.tolist() == [False, False, True]
    assert found.block.tolist() == [0, 1, 2]


def test_embeddings_of_the_reference_are_its_own():
    known = torch.randn(7, 5)
    found = beside(known, known)
    assert found.same.all()
    assert found.similarity.tolist() == [0.0] * 7
    torch.testing.assert_close(found.cosine, torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("first", [False, True])
def test_a_sentence_is_its_first_token_or_the_mean(first, tmp_path):
    model_class, config = KINDS["embeddings"]
    torch.manual_seed(0)
    model = model_class(config()).eval()
    inputs = encoded(["The quick brown fox jumps."], letters.tokenizer(ends=True), 400, 40)
    reference = Reference(tmp_path)
    assert SentenceEmbeddings(inputs, first, reference)(model).n == 1
    with torch.no_grad():
        state = model(**inputs[0]).last_hidden_state[0]
    torch.testing.assert_close(reference.known(0)[0], state[0] if first else state.mean(0))


def test_a_model_that_gives_numbers_is_refused(tmp_path):
    model_class, config = KINDS["labels"]
    told = config()
    told.num_labels = 1
    with pytest.raises(ValueError, match="gives each text a number, no label"):
        SentenceLabels([], Reference(tmp_path))(model_class(told))
