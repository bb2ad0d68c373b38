"""What `model.dtype` answers where salient weights come first among a model's parameters.

transformers takes the first floating parameter's dtype, writes it into config.json and loads by it. Where
the embedding is packed that would be a salient weight, which is FP32 whatever the model's dtype, and a
bfloat16 model would come back in FP32. transformers has no hook here, so the property is replaced by one
that passes salient weights over; for a model without any it answers as before.
"""

from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel

from svdq_hf.format.names import is_salient_values


def patch_main_dtype() -> None:
    """Replace `PreTrainedModel.dtype`; a second call changes nothing."""
    PreTrainedModel.dtype = property(main_dtype)


def main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating parameter that is no salient weight, if there is one.

    >>> values, scale = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    >>> main_dtype(torch.nn.ParameterDict({"salient_values": values, "weight": scale}))
    torch.bfloat16
    """
    floating = ((name, one.dtype) for name, one in model.named_parameters() if one.is_floating_point())
    first = next(floating)
    return next((dtype for name, dtype in chain([first], floating) if not is_salient_values(name)), first[1])
