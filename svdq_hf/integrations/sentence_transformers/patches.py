"""Every change that svdq_hf makes to sentence-transformers (6.0 to 6.2), and why.

Made for the whole process when sentence-transformers is imported, or now if it is; for what is not ours it
answers as before.

Module.parameters, of sentence_transformers.base.modules.module
    Why: SentenceTransformer casts the modules behind the first (a Dense, a pooling) to the dtype of its
    first parameter. With embeddings=True that is one of packed bytes, and to integers nothing is cast.
    Here the first is one of the model's own dtype; the others follow in their order.
    Fails when not needed: `test_sentence_transformers_casts_to_the_dtype_of_packed_bytes`.
BaseModel.dtype, of sentence_transformers.base.model
    Why: it is that of the first parameter too. Fails: the same.

No upstream issue is known. Not here: the folders of such models (`checkpoint.companion_files`).
"""

import functools
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

MODULE, MODEL = "sentence_transformers.base.modules.module", "sentence_transformers.base.model"
WATCHED = (MODULE, MODEL)


def register() -> None:
    """Change what is imported of the two; a second call does nothing."""
    module = getattr(sys.modules.get(MODULE), "Module", None)
    if module is not None and not hasattr(module.parameters, "knows_svdq"):
        wrapper = functools.wraps(module.parameters)(_floats_first(module.parameters))
        wrapper.knows_svdq = True  # type: ignore[attr-defined]
        module.parameters = wrapper
    model = getattr(sys.modules.get(MODEL), "BaseModel", None)
    own = getattr(model, "dtype", None)
    if isinstance(own, property) and own.fget is not None and not hasattr(own.fget, "knows_svdq"):
        answer = functools.wraps(own.fget)(_main_dtype(own.fget))
        answer.knows_svdq = True  # type: ignore[attr-defined]
        model.dtype = property(answer)  # type: ignore[union-attr]  # it has one


def _floats_first(default: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The parameters, of which the first says what dtype the model is of."""

    def parameters(module: Any, recurse: bool = True) -> Iterator[Any]:
        found = default(module, recurse)
        first = next(found, None)
        if first is None or first.is_floating_point():
            return found if first is None else chain([first], found)
        rest = [first, *found]
        dtype = _dtype_of(module)
        told = next((one for one in rest if one.dtype == dtype), first)
        return iter([told, *(one for one in rest if one is not told)])

    return parameters


def _main_dtype(default: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The model's dtype, where the first parameter does not say it."""

    def dtype(model: Any) -> Any:
        first = default(model)
        return first if first is None or first.is_floating_point else _dtype_of(model)

    return dtype


def _dtype_of(module: Any) -> Any:
    """The dtype of a module that has packed parameters; None where no parameter is a float."""
    from svdq_hf.integrations.transformers.patches import main_dtype

    floats = (one for _, one in module.named_parameters() if one.is_floating_point())
    return None if next(floats, None) is None else main_dtype(module)
