"""Windows of a text: each token once, the model's own loss."""

import letters
import pytest
import tiny_models as tiny
import torch
from letters import KINDS

from svdq_hf.calibration.texts import read_text
from svdq_hf.evaluation.comparison.answers import Reference
from svdq_hf.evaluation.comparison.windows import (
    OWN_TEXT,
    CausalWindows,
    HalvedWindows,
    windows_of,
)


@pytest.mark.parametrize("first", [None, 1])
@pytest.mark.parametrize("context", [4, 7, 100])
def test_windows_hold_each_token_once_and_none_is_longer(first, context):
    ids = torch.arange(10, 43)
    found = windows_of(ids, context, first)
    lead = [] if first is None else [first]
    assert all(window[0, : len(lead)].tolist() == lead for window in found)
    inside = torch.cat([window[0, len(lead) :] for window in found]).tolist()
    assert inside == ids.tolist()[: len(inside)]
    assert len(ids) - len(inside) <= 1  # a last one of a single token has nothing to predict
    assert max(window.numel() for window in found) <= context


@pytest.mark.parametrize("first", [None, 1])
def test_loss_of_a_causal_model_is_its_own(first, tmp_path):
    ids, model = torch.randint(4, 96, (50,), generator=torch.Generator().manual_seed(3)), tiny.llama()
    measure = CausalWindows(ids, 16, first, Reference(tmp_path))
    found = measure(model)
    total, n = 0.0, 0
    with torch.no_grad():
        for window in measure.windows:
            count = window.numel() - 1
            total, n = total + float(model(input_ids=window, labels=window).loss) * count, n + count
    assert found.n == n == 50 - (first is None) * len(measure.windows)
    assert float(found.loss.mean()) == pytest.approx(total / n, rel=1e-5)
    assert measure.about == "context 16"


def test_loss_of_an_encoder_with_a_decoder_is_its_own(tmp_path):
    model_class, config = KINDS["halves"]
    torch.manual_seed(0)
    model, ids = model_class(config()).eval(), torch.randint(4, 96, (16,))
    found = HalvedWindows(ids, 16, Reference(tmp_path))(model)
    with torch.no_grad():
        expected = float(model(input_ids=ids[None, :8], labels=ids[None, 8:]).loss)
    assert found.n == 8
    assert float(found.loss.mean()) == pytest.approx(expected, rel=1e-5)


def test_text_of_json_lines(tmp_path):
    file = tmp_path / "c4.jsonl"
    file.write_text('{"text": "one"}\n{"a": "two", "b": "three"}\n')
    assert read_text(file) == "one\n\ntwothree"


def test_the_text_that_comes_along_is_long_enough_and_of_several_kinds():
    text = read_text(OWN_TEXT)
    assert len(text.split()) > 3000
    assert all(sign in text for sign in ("def moving_average", "| June |", "Nebel", "boulanger", "Q: ", '"'))
    assert len(letters.tokenizer()(text)["input_ids"]) == len(text)
