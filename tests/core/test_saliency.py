import inspect

import numpy as np
import pytest
import torch

from svdq_hf.core import saliency
from svdq_hf.core.saliency import NEEDS, Scored, check_name, register_saliency, saliency_names, score
from svdq_hf.core.topk import top_positions

INPUTS = {"rank": 8, "seed": 0, "group": 64}
"""What a score can have without data; a score that asks for more has tests of its own."""


def needs(name):
    parameters = inspect.signature(saliency._SCORES[name]).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


DATA_FREE = [name for name in saliency_names() if needs(name) <= INPUTS.keys()]
every_score = pytest.mark.parametrize("name", DATA_FREE)


@pytest.fixture
def _registry(monkeypatch):
    monkeypatch.setattr(saliency, "_SCORES", dict(saliency._SCORES))


def test_the_scores_of_the_readme_are_registered():
    assert {"svd", "magnitude", "relative", "random"} <= set(DATA_FREE)
    assert saliency_names() == sorted(saliency_names())


@every_score
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (40, 9), (20, 128)])
def test_a_score_is_one_finite_number_a_weight(name, shape, device):
    weight = torch.randn(shape, device=device)
    before = weight.clone()
    scores = score(name, weight, INPUTS).scores
    assert scores.shape == shape
    assert scores.device == weight.device
    assert torch.isfinite(scores).all()
    assert torch.equal(weight, before)


@every_score
def test_a_score_is_the_same_every_time(name):
    weight = torch.randn(20, 70)
    assert torch.equal(score(name, weight, INPUTS).scores, score(name, weight, INPUTS).scores)


@every_score
@pytest.mark.parametrize("kind", ["zeros", "huge", "outlier", "tiny", "one row of zeros"])
def test_a_score_of_a_strange_weight_is_finite(name, kind):
    weight = {
        "zeros": torch.zeros(20, 70),
        "huge": torch.randn(20, 70) * 1e37,
        "outlier": torch.randn(20, 70).index_put_((torch.tensor(2), torch.tensor(69)), torch.tensor(1e4)),
        "tiny": torch.randn(20, 70) * 1e-38,
        "one row of zeros": torch.randn(20, 70) * (torch.arange(20) != 3).unsqueeze(1),
    }[kind]
    assert torch.isfinite(score(name, weight, INPUTS).scores).all()


@every_score
@pytest.mark.parametrize("power", [-20, 13])
def test_the_unit_of_the_weights_does_not_change_the_choice(name, power):
    weight = torch.randn(20, 130)
    for one, other in zip(
        top_positions(score(name, weight, INPUTS).scores, 50),
        top_positions(score(name, weight * 2.0**power, INPUTS).scores, 50),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_svd_is_the_size_of_the_rank_r_part():
    weight = torch.randn(30, 50)
    u, s, vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    scored = score("svd", weight, INPUTS | {"rank": 3})
    # Float32's rounding of entries of about 1.
    np.testing.assert_allclose(scored.scores.numpy(), np.abs((u[:, :3] * s[:3]) @ vt[:3]), rtol=0, atol=1e-5)
    assert scored.facts == {"sigma_ratio": pytest.approx(s[3] / s[2], abs=1e-5)}


def test_svd_takes_any_rank():
    weight = torch.randn(5, 9)
    scores = score("svd", weight, INPUTS | {"rank": 99}).scores
    torch.testing.assert_close(scores, weight.abs(), rtol=0, atol=1e-5)  # the whole matrix, in float32


def test_magnitude_is_the_size_of_the_weight():
    weight = torch.tensor([[1.0, -2.0], [0.0, 0.5]])
    assert score("magnitude", weight, {}).scores.tolist() == [[1.0, 2.0], [0.0, 0.5]]


def test_random_depends_on_the_seed_and_on_nothing_else():
    one = score("random", torch.randn(6, 7), {"seed": 3}).scores
    assert torch.equal(one, score("random", torch.zeros(6, 7), {"seed": 3}).scores)
    assert not torch.equal(one, score("random", torch.zeros(6, 7), {"seed": 4}).scores)
    assert (one >= 0).all()
    assert (one < 1).all()
    torch.manual_seed(5)
    assert torch.equal(one, score("random", torch.randn(6, 7), {"seed": 3}).scores)


@pytest.mark.parametrize(("in_features", "group"), [(128, 64), (70, 64), (70, 8), (20, 64), (20, 20)])
def test_relative_is_the_size_over_the_typical_size_of_the_group(in_features, group):
    weight = torch.randn(4, in_features)
    weight[1, 3], weight[2, in_features - 1] = 40.0, -90.0
    expected = np.empty(weight.shape)
    for row, values in enumerate(weight.double().abs().numpy()):
        for start in range(0, in_features, group):
            members = values[start : start + group]
            typical = np.sqrt(np.mean(members**2))
            inliers = members[members <= 3 * typical]  # OUTLIER
            expected[row, start : start + group] = members / np.sqrt(np.mean(inliers**2))
    # Float32's rounding over a sum of 64 terms, with a margin.
    np.testing.assert_allclose(score("relative", weight, {"group": group}).scores, expected, rtol=1e-5)


def test_an_unknown_score_is_refused_with_the_known_ones():
    message = "saliency='svdd': must be one of .*'magnitude'.*'svd'.*register_saliency"
    with pytest.raises(ValueError, match=message):
        check_name("svdd")
    with pytest.raises(ValueError, match=message):
        score("svdd", torch.ones(2, 2), INPUTS)


@pytest.mark.usefixtures("_registry")
def test_a_registered_score_gets_what_it_asks_for_and_no_more():
    @register_saliency("mine")
    def mine(weight, *, group, rank):
        return Scored(weight * group, {"rank": rank})

    assert "mine" in saliency_names()
    scored = score("mine", torch.ones(2, 3), INPUTS)
    assert scored.scores.tolist() == [[64.0] * 3] * 2
    assert scored.facts == {"rank": 8}
    assert mine(torch.ones(1, 1), group=2, rank=1).scores.tolist() == [[2.0]]  # still a plain function


@pytest.mark.usefixtures("_registry")
def test_a_taken_name_is_refused_unless_replacing():
    with pytest.raises(ValueError, match="saliency 'svd' is registered already; pass replace=True"):
        register_saliency("svd")(torch.abs)
    register_saliency("svd", replace=True)(lambda weight: -weight)
    assert score("svd", torch.ones(1, 2), INPUTS).scores.tolist() == [[-1.0, -1.0]]


@pytest.mark.usefixtures("_registry")
def test_a_score_that_asks_for_the_unknown_is_refused():
    def needy(weight, *, moon):
        return weight * moon

    with pytest.raises(
        ValueError, match=r"'needy' asks for \['moon'\]; a score may ask for \['rank'"
    ) as error:
        register_saliency("needy")(needy)
    assert all(need in str(error.value) for need in NEEDS)
    assert "needy" not in saliency_names()


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (torch.ones(3), r"returned \(3,\)"),
        (torch.ones(3, 2), r"returned \(3, 2\)"),
        (None, "returned <class 'NoneType'>"),
        (Scored(torch.ones(1), {}), r"returned \(1,\)"),
    ],
)
def test_a_score_that_is_not_one_number_a_weight_is_refused(returned, said):
    register_saliency("odd")(lambda weight: returned)
    with pytest.raises(ValueError, match=said + r" for a weight \(2, 3\)"):
        score("odd", torch.ones(2, 3), INPUTS)


def test_registering_without_a_name_says_how():
    with pytest.raises(TypeError, match=r'write @register_saliency\("name"\)'):
        register_saliency(lambda weight: weight)


def _by_data(weight):
    weight.data.mul_(2)


def _by_numpy(weight):
    weight.numpy()[0, 0] += 1


def _by_sorting(weight):
    weight.numpy().sort()


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize("change", [_by_data, _by_numpy, _by_sorting])
def test_a_score_that_changes_the_weight_out_of_torchs_sight_is_refused(change):
    @register_saliency("sly")
    def sly(weight):
        scores = weight.abs()
        change(weight)
        return scores

    with pytest.raises(ValueError, match="saliency 'sly' changed the weight in place; work on a copy"):
        score("sly", torch.randn(4, 6), INPUTS)


@pytest.mark.usefixtures("_registry")
def test_a_score_of_the_users_that_leaves_the_weight_alone_is_taken():
    register_saliency("honest")(lambda weight: weight.abs())
    weight = torch.randn(6, 4, dtype=torch.bfloat16).T
    assert torch.equal(score("honest", weight, INPUTS).scores, weight.abs().float())


@every_score
def test_a_weight_of_inference_mode_is_scored(name):
    with torch.inference_mode():
        weight = torch.randn(4, 6)
        assert score(name, weight, INPUTS).scores.shape == (4, 6)
