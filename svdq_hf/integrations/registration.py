"""Registration with other libraries: what `import svdq_hf` adds to each of them once it is imported.

torch gets the ops `torch.ops.svdq`, transformers the quantization method "svdq", PEFT its layer for LoRA on
quantized layers, sentence-transformers the dtype of a model whose embedding is packed. No library is imported
for it. Not here: how imports are followed (`integrations.after_import`).
"""

import sys
from typing import Any

from svdq_hf.integrations.after_import import AfterImport
from svdq_hf.integrations.peft import patches as peft
from svdq_hf.integrations.sentence_transformers import patches as sentence_transformers

QUANTIZERS = "transformers.quantizers.auto"
"""The module with the lists of methods; all of transformers that loads models imports it."""


def register() -> None:
    """Register with libraries that are imported already now, with others later; may be called repeatedly."""
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
    """Put "svdq" into transformers' lists of quantization methods, if they exist already.

    Importing the quantizer needs modules of transformers that may be importing these lists at the moment, so
    the entry is a function that imports the quantizer when a model is loaded.
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
        config: the model's SVDQConfig.
        kwargs: arguments that transformers passes to every quantizer.
    """
    from svdq_hf.integrations.transformers.quantizer import SVDQHfQuantizer

    return SVDQHfQuantizer(config, **kwargs)
