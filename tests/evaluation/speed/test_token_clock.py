"""A clock for `generate`: one time for each new token, and no token is stopped."""

import tiny_models as tiny
import torch

from svdq_hf.evaluation.speed.token_clock import TokenClock


def test_each_token_has_a_time_and_none_stops():
    begun = []
    clock = TokenClock(lambda: begun.append(True))
    model = tiny.llama().eval()
    given = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found = model.generate(torch.tensor([[1, 2, 3]]), stopping_criteria=[clock], **given)
    assert found.shape == (1, 8)
    assert len(clock.times) == 5
    assert clock.times == sorted(clock.times)
    assert begun == [True]
