"""Versions of the stored format, as plain numbers, so that a config is read without importing torch.

Not here: what each version stores (`format.parts`).
"""

FORMAT_VERSION = 5
"""The newest version of the stored format; a file of an older version loads for ever.

1: codes are -8..7. 2: allows tables of levels, a scale for each column, and group scales of 8 bits.
3: allows codes of 3 or 8 bits. 4: allows stacks of experts, a different k in each layer, and a packed
embedding. 5: allows layers that round their activations.
"""

EXPERTS_VERSION = 4
"""The oldest version that allows quantized experts."""

ACTIVATIONS_VERSION = 5
"""The oldest version that allows layers that round their activations."""
