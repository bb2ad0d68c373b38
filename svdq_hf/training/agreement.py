"""Agreement of several processes on what decays, so that every one adds the same gradient.

Data differ between processes, and so do the peaks of layers; rounding may, too. Without a process group
nothing is done.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from svdq_hf.core.svd import Principal


def are_several() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agree(triplets: Mapping[str, Principal], shares: dict[str, Tensor], ratios: dict[str, float]) -> None:
    """In several processes: the first one's triplets for all, shares as means, ratios as maxima, in place.

    Args:
        triplets: by layer, contiguous.
        shares: PCDR `[k_max]` by layer, of this process's data.
        ratios: outlier ratios by layer, likewise.
    """
    if not are_several():
        return
    for name, found in triplets.items():
        for part in (found.u, found.s, found.v):
            dist.broadcast(part, 0)
        dist.all_reduce(shares[name])
        shares[name] /= dist.get_world_size()
    largest = torch.tensor(list(ratios.values()), device=next(iter(shares.values())).device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    ratios.update(zip(ratios, largest.tolist(), strict=True))
