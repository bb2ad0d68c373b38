"""Other 4-bit methods, as transformers loads them, where their packages are installed.

They are measured beside svdq on the same model; nothing else here depends on them. Not here: how a layer of
theirs is made by hand (examples/linear_peers.py).
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Final, NamedTuple


class Peer(NamedTuple):
    """Another method: its name for users, the package it needs, and its config for `from_pretrained`."""

    name: str
    package: str
    config: Callable[[], Any]

    @property
    def missing(self) -> str | None:
        """Why it cannot be measured; None where its package is there."""
        there = importlib.util.find_spec(self.package) is not None
        return None if there else f"{self.package} is not installed"


def _nf4() -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def _int4() -> Any:
    from transformers import TorchAoConfig

    place = importlib.import_module("torchao.prototype.quantization.int4.inference_workflow")
    return TorchAoConfig(place.PrototypeInt4WeightOnlyConfig(group_size=64))  # the one that runs on a CPU


PEERS: Final = {
    "nf4": Peer("bitsandbytes NF4", "bitsandbytes", _nf4),
    "int4": Peer("torchao int4", "torchao", _int4),
}
"""By the word for `--only`. They compute in bfloat16, which is their faster dtype."""
