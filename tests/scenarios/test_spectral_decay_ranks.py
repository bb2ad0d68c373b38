"""Spectral decay under DistributedDataParallel and FSDP2: two processes on a CPU (`spectral_ranks.py`)."""

import socket

import pytest
import spectral_ranks as ranks
import torch
import torch.multiprocessing

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(ranks.work, (port, str(folder)), nprocs=ranks.WORLD)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(ranks.WORLD)]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_training_is_that_of_one_process(wrapper, found):
    here, alone = found[0][wrapper], found[0]["alone"]
    assert here["flagged"] == alone["flagged"] != []
    for name, tensor in alone["weights"].items():
        torch.testing.assert_close(here["weights"][name], tensor, atol=2e-5, rtol=1e-4)


def test_ranks_with_data_of_their_own_stay_equal_bit_for_bit(found):
    one, other = (here["ddp, own data"] for here in found)
    assert one["flagged"] == other["flagged"]
    for name, tensor in one["weights"].items():
        assert torch.equal(tensor, other["weights"][name]), name


def test_columns_that_are_sharded_are_refused(found):
    assert "takes rows sharded by FSDP2's fully_shard" in found[0]["refused"]
