"""What a model is timed with: inputs for every family, tokens as they are counted."""

import pytest
import torch
from tiny_models import FAMILIES, bert, llama

from svdq_hf.evaluation.speed.workload import Workload, rows_seen

READ = {"whisper": 10, "vit": 5}
"""Positions of 20 frames of sound, and patches of a picture with its class token; others read text."""
WRITES = {"gpt2", "opt", "llama-tied", "llama-untied", "qwen3", "gemma3", "t5", "bart", "whisper"}


@pytest.mark.filterwarnings("ignore")  # what transformers says of generating with tiny configs
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_and_decoded(name):
    work = Workload(FAMILIES[name].build())
    inputs = work.inputs(12)
    read, written = work.prefill(inputs), work.decode(inputs, 3)
    assert read.tokens == READ.get(name, 12)
    assert read.seconds > 0
    assert (written is not None) == (name in WRITES)
    assert written is None or (written.tokens == 2 and written.seconds > 0)


def test_special_tokens_are_not_drawn():
    work = Workload(llama(vocab_size=8))
    drawn = work.inputs(30)["input_ids"]
    assert set(drawn.flatten().tolist()) == {3, 4, 5, 6, 7}  # 0, 1 and 2 pad, begin and end
    assert torch.equal(drawn, work.inputs(30)["input_ids"])


def test_a_length_is_cut_to_the_positions_that_a_model_has():
    assert Workload(bert()).longest(1000) == 38
    assert Workload(bert()).longest(1000, room=50) == 1
    assert Workload(bert()).longest(7) == 7
    assert Workload(FAMILIES["t5"].build()).longest(1000) == 1000


def test_a_model_that_takes_nothing_known_is_refused():
    model = bert()
    model.forward = lambda graph: graph
    with pytest.raises(ValueError, match="BertModel takes no input that could be made up"):
        Workload(model).inputs(4)


def test_a_prompt_asks_for_the_last_logits_alone():
    model = llama()
    with rows_seen(model.lm_head) as seen:
        work = Workload(model)
        inputs = work.inputs(12)
        seen.clear()
        work.prefill(inputs)
    assert seen == [1]
