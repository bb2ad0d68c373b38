"""Names of layers without the part that all of them start with: for tables and pictures."""

from collections.abc import Sequence
from itertools import takewhile


def short_names(layers: Sequence[str]) -> list[str]:
    """Names without the parts that all of them start with.

    >>> short_names(["encoder.layer.0.query", "encoder.layer.0.key", "encoder.layer.10.key"])
    ['0.query', '0.key', '10.key']
    """
    parts = [layer.split(".") for layer in layers]
    same = takewhile(lambda column: len(set(column)) == 1, zip(*(part[:-1] for part in parts), strict=False))
    shared = len(list(same)) if len(parts) > 1 else 0
    return [".".join(part[shared:]) for part in parts]
