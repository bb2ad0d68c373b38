"""DistributedDataParallel and FSDP2 around a quantized model: two processes on a CPU (`sharding.py`)."""

import socket

import pytest
import sharding
import torch
import torch.multiprocessing

pytestmark = pytest.mark.slow

every_case = pytest.mark.parametrize("case", sharding.CHOICES)
every_rank = pytest.mark.parametrize("rank", range(sharding.WORLD))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    sharding.build("plain").save_pretrained(folder / "quantized")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(sharding.work, (port, str(folder)), nprocs=sharding.WORLD)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(sharding.WORLD)]


@every_rank
@every_case
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_forward_and_training_are_those_of_one_process(wrapper, case, rank, found):
    here = found[rank][f"{wrapper}, {case}"]
    assert here["equal"]
    first, first_alone, second, second_alone = here["losses"]
    assert first == first_alone
    assert second == pytest.approx(second_alone, abs=1e-5)
    assert second < first
    assert here["salient"] >= 14


@every_case
def test_the_gathered_state_is_the_original_and_then_the_trained_one(case, found):
    for rank, ranks in enumerate(found):
        here = ranks[f"fsdp, {case}"]
        assert here["gathered"] == here["trained"] == []
        assert here["names"]
        assert bool(here["moved"]) == (case != "nothing salient"), rank
        assert 0.4 < here["share"] < 0.6  # packed bytes are sharded as all parameters are


@every_rank
def test_mixed_precision_rounds_salient_weights_in_the_forward_pass_alone(rank, found):
    mixed = found[rank]["mixed"]
    assert mixed["equal"]
    assert mixed["stored"] == "torch.float32"
    assert mixed["gradient"] > 0


@every_rank
@pytest.mark.parametrize(
    ("attempt", "remedy"),
    [
        ("head by itself", "leave it to the group of the module that holds it and the embedding"),
        ("saved as it is", "gather it on all ranks, get_model_state_dict"),
        ("tensor parallel", "is not sharded while it loads (distributed_config, tp_plan)"),
        ("quantized while sharded", "quantize it before it is sharded"),
    ],
)
def test_what_does_not_work_is_said_with_the_remedy(attempt, remedy, rank, found):
    assert remedy in found[rank]["refused"][attempt]
