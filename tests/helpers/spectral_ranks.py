"""What two processes do with spectral decay, for `test_spectral_decay_ranks.py`. gloo, on a CPU."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import tiny_models as tiny
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from svdq_hf import SpectralDecay

WORLD = 2
CHOICES = {"tau": 0.2, "every": 2, "strength": 0.1}


def build() -> Any:
    return tiny.FAMILIES["llama-untied"].loud_model()


def three_steps(wrapped: Any, decay: SpectralDecay, seed: int) -> None:
    """Three steps on made-up tokens."""
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    for step in range(3):
        generator = torch.Generator().manual_seed(100 * seed + step)
        ids = torch.randint(3, 90, (2, 9), generator=generator)
        wrapped(input_ids=ids, labels=ids).loss.backward()
        decay.step()
        optimizer.step()
        optimizer.zero_grad()


def alone() -> dict[str, Any]:
    model = build()
    decay = SpectralDecay(model, **CHOICES)
    three_steps(model, decay, seed=0)
    return {"weights": model.state_dict(), "flagged": sorted(decay.flagged)}


def with_ddp(same_data: bool) -> dict[str, Any]:
    model = build()
    decay = SpectralDecay(model, **CHOICES)
    three_steps(DistributedDataParallel(model), decay, seed=0 if same_data else dist.get_rank())
    return {"weights": model.state_dict(), "flagged": sorted(decay.flagged)}


def with_fsdp() -> dict[str, Any]:
    model = build()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    decay = SpectralDecay(model, **CHOICES)
    three_steps(model, decay, seed=0)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {"weights": weights, "flagged": sorted(decay.flagged)}


def tensor_parallel() -> str:
    """What is said of columns that are sharded."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    mesh = init_device_mesh("cpu", (WORLD,))
    model[0].weight = torch.nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(1)]))
    try:
        SpectralDecay(model)
    except ValueError as error:
        return str(error)
    return "nothing"


def work(rank: int, port: int, folder: str) -> None:
    """All of it, in one process of two."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    found: dict[str, Any] = {"alone": alone()}  # before there is a group
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    found["ddp"], found["ddp, own data"] = with_ddp(same_data=True), with_ddp(same_data=False)
    found["fsdp"] = with_fsdp()
    found["refused"] = tensor_parallel()
    torch.save(found, Path(folder) / f"found-{rank}.pt")
    dist.destroy_process_group()
