"""The versions of the stored format: numbers alone, so that a config is read without importing torch."""

FORMAT_VERSION = 4
"""The newest version of the stored format; a file of an older version loads for ever.

1: codes are -8..7. 2: may have levels of its own, a scale for each column, and groups' scales of 8 bits.
3: may have codes of 3 or 8 bits. 4: may have stacks of experts, k may differ from layer to layer, and an
embedding may be packed.
"""

EXPERTS_VERSION = 4
"""The oldest version that can say that a model has quantized experts."""
