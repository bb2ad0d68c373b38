"""Top-k positions of a matrix: how many entries are kept, and which.

The positions are (row, column), sorted by row and then by column, because a slice of rows (tensor
parallelism) or a stack of matrices (fused q, k, v) then is a slice or a concatenation of positions.
Not here: what makes an entry worth keeping (`core.saliency`).
"""

import torch
from torch import Tensor


def salient_count(k: int | float, out: int, in_features: int) -> int:
    """Number of salient entries of a matrix `[out, in]`, never more than it has.

    Args:
        k: a count, or (a float below 1) a share of `out * in`.
        out: rows.
        in_features: columns.

    >>> salient_count(256, 768, 768), salient_count(0.01, 100, 50), salient_count(256, 2, 3)
    (256, 50, 6)
    """
    numel = out * in_features
    return min(numel, round(k * numel) if isinstance(k, float) and k < 1 else int(k))


def top_positions(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Positions of the k highest scores.

    Among equal scores the first in reading order win, so the choice depends neither on the number
    of threads nor on the library's version.

    Args:
        scores: `[out, in]`.
        k: how many, at most `out * in`.

    Returns:
        Rows `[k]` and columns `[k]`, int32, sorted by row, then by column.

    Raises:
        ValueError: a score is NaN.

    >>> rows, columns = top_positions(torch.tensor([[1.0, 5.0], [5.0, 5.0]]), 2)
    >>> rows.tolist(), columns.tolist()
    ([0, 1], [1, 0])
    """
    if torch.isnan(scores).any():
        raise ValueError("a score is NaN: scores must be numbers, the larger the more salient")
    flat = scores.reshape(-1)
    if k == 0:
        chosen = torch.empty(0, dtype=torch.int64, device=scores.device)
    else:
        threshold = _kth_largest(flat, k)
        above = (flat > threshold).nonzero().squeeze(1)
        ties = (flat == threshold).nonzero().squeeze(1)
        chosen = torch.cat([above, ties[: k - above.numel()]]).sort().values
    columns_per_row = scores.shape[1]
    return (chosen // columns_per_row).int(), (chosen % columns_per_row).int()


def _kth_largest(flat: Tensor, k: int) -> Tensor:
    """The k-th largest of `flat` `[n]`, a 0-d tensor; a sample first discards most entries before sorting."""
    stride = max(1, flat.numel() // 65536)
    sample = flat[::stride]
    # The guess is too low on purpose: about 2 k entries are above it.
    rank = min(sample.numel(), 2 * k // stride + 64)
    guess = sample.topk(rank, sorted=False).values.min()
    candidates = flat[flat >= guess]
    pool = candidates if candidates.numel() >= k else flat
    return pool.topk(k, sorted=False).values.min()
