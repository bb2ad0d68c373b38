"""What two processes do to a quantized model, for `test_distributed.py`: each writes down what it found.

A file of its own, since spawned processes import it by name. gloo, on a CPU.
"""

import copy
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import tiny_models as tiny
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from svdq_hf import SVDQConfig, quantize_model

WORLD = 2
CHOICES = {
    "plain": {"k": 15},  # which two processes cannot halve
    "nothing salient": {"k": 0},
    "head and embedding": {"k": 16, "lm_head": True, "embeddings": True},
    "tied": {"k": 16, "lm_head": True},
    "8 bits": {"k": 16, "bits": 8},
}


def build(case: str) -> Any:
    family = "llama-tied" if case == "tied" else "llama-untied"
    return quantize_model(tiny.FAMILIES[family].loud_model(), SVDQConfig(**{"rank": 2, **CHOICES[case]}))


def shard(model: Any, **choices: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, **choices)
    fully_shard(model, **choices)
    return model


def two_steps(wrapped: Any, model: Any, reference: Any) -> dict[str, Any]:
    """Forward, backward and a step of both, twice; what differs."""
    ids, found = tiny.tokens(), {"logits": [], "losses": []}
    for step in range(2):
        for each, mine in ((wrapped, model), (reference, reference)):
            out = each(ids, labels=ids)
            out.loss.backward()
            found["losses"].append(out.loss.item())
            found["logits"].append(out.logits.detach())
            trained = [parameter for parameter in mine.parameters() if parameter.requires_grad]
            if step == 0:
                torch.optim.SGD(trained, lr=0.1).step()
    one, other, *_ = found.pop("logits")
    salient = [name for name, parameter in model.named_parameters() if "salient_values" in name]
    return {**found, "equal": torch.equal(one, other), "salient": len(salient)}


def with_ddp(case: str) -> dict[str, Any]:
    model = build(case)
    return two_steps(DistributedDataParallel(model), model, copy.deepcopy(model))


def with_fsdp(case: str) -> dict[str, Any]:
    model = build(case)
    reference = copy.deepcopy(model)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    shard(model)
    local = sum(p.to_local().nbytes for p in model.parameters())
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    found = two_steps(model, model, reference)
    after = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    theirs = reference.state_dict()
    found["gathered"] = [n for n in before if dist.get_rank() == 0 and not torch.equal(whole[n], before[n])]
    found["names"] = dist.get_rank() > 0 or whole.keys() == before.keys()
    found["trained"] = [
        n for n in theirs if dist.get_rank() == 0 and not torch.allclose(after[n], theirs[n], atol=1e-6)
    ]
    found["moved"] = [n for n in theirs if "salient_values" in n and not torch.equal(theirs[n], before[n])]
    found["share"] = local / sum(p.nbytes for p in reference.parameters())
    return found


def with_mixed_precision(case: str) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = build(case)
    reference = copy.deepcopy(model)
    for name, parameter in reference.named_parameters():  # what the policy lets the forward see
        if parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
            if "salient_values" in name:
                parameter.data = parameter.data.float()
    out, ids = shard(model, mp_policy=policy)(tiny.tokens(), labels=tiny.tokens()), tiny.tokens()
    out.loss.backward()
    values = model.model.layers[0].mlp.up_proj.salient_values
    with torch.no_grad():
        equal = torch.equal(out.logits, reference(ids).logits)
    return {"equal": equal, "stored": str(values.dtype), "gradient": float(values.grad.full_tensor().norm())}


def refusals(folder: str) -> dict[str, Any]:
    """What is said of what does not work."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    said = {}
    alone = build("tied")
    fully_shard(alone.lm_head)
    parallel = DistributedConfig(tp_size=WORLD, tp_plan="auto")
    attempts = {
        "head by itself": lambda: alone(tiny.tokens()),
        "saved as it is": lambda: shard(build("plain")).save_pretrained(f"{folder}/sharded"),
        "tensor parallel": lambda: LlamaForCausalLM.from_pretrained(
            f"{folder}/quantized", distributed_config=parallel
        ),
        "quantized while sharded": lambda: quantize_model(
            shard(tiny.FAMILIES["llama-untied"].loud_model()), SVDQConfig()
        ),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)
    return said


def work(rank: int, port: int, folder: str) -> None:
    """All of it, in one process of two: starting them takes longer than what they do."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    found: dict[str, Any] = {}
    for case in CHOICES:
        found[f"ddp, {case}"] = with_ddp(case)
        found[f"fsdp, {case}"] = with_fsdp(case)
    found["mixed"] = with_mixed_precision("plain")
    found["refused"] = refusals(folder)
    torch.save(found, Path(folder) / f"found-{rank}.pt")
    dist.destroy_process_group()
