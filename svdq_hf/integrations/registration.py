"""What `import svdq_hf` makes known to other libraries, each when it is imported: not before, and not it.

torch gets the ops `torch.ops.svdq`, transformers the quantization method "svdq", PEFT its layer for LoRA on
quantized layers, sentence-transformers the dtype of a model whose embedding is packed. Not here: how imports
are followed (`after_import`).
"""

import sys
from typing import Any

from svdq_hf.integrations.after_import import AfterImport
from svdq_hf.integrations.peft import patches as peft
from svdq_hf.integrations.sentence_transformers import patches as sentence_transformers

QUANTIZERS = "transformers.quantizers.auto"
"""The module with the lists of methods; all of transformers that loads models imports it."""


def register() -> None:
    """Register with what is imported already now, with the rest later; may be called more than once."""
    AfterImport(("torch",), define_ops).install()
    AfterImport((QUANTIZERS,), register_method).install()
    AfterImport(peft.WATCHED, peft.register).install()
    AfterImport(sentence_transformers.WATCHED, sentence_transformers.register).install()


def define_ops() -> None:
    """Define `torch.ops.svdq`: a program made by torch.export needs the ops and nothing else of svdq_hf."""
    import svdq_hf.kernels.embedding_op
    import svdq_hf.kernels.experts_op
    import svdq_hf.kernels.linear_op  # noqa: F401


def register_method() -> None:
    """Put "svdq" into the lists of transformers, where it has them yet.

    Importing the quantizer needs modules of transformers that may just be importing these lists, so what
    stands there is a function that imports it when a model is loaded.
    """
    lists: Any = sys.modules.get(QUANTIZERS)
    if lists is not None:
        from svdq_hf.config import SVDQConfig
        from svdq_hf.config.choices import QUANT_METHOD

        lists.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, SVDQConfig)
        lists.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, make_quantizer)


def make_quantizer(config: Any, **kwargs: Any) -> Any:
    """The SVDQHfQuantizer of a model that is to be loaded.

    Args:
        config: its SVDQConfig.
        kwargs: what transformers hands to every quantizer.
    """
    from svdq_hf.integrations.transformers.quantizer import SVDQHfQuantizer

    return SVDQHfQuantizer(config, **kwargs)
