"""Result of a bench: each variant's figures, round by round, with their medians and ratios.

A figure is the median of the rounds; a ratio is the median of the rounds' own ratios. Not here: the measuring
(`evaluation.speed.bench`).
"""

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

DECODE = "decode"
"""The name of the figure of decoding; the others' names are their numbers of tokens."""
REFERENCE = "fp32"
"""The word of the variant by which the others are divided, where it is there."""


@dataclass
class Measured:
    """One variant's figures.

    Attributes:
        name: for users.
        load_seconds: time of `from_pretrained`; None where users would load it otherwise.
        load_peak_bytes: most resident memory while loading; None as above, or where not told.
        run_peak_bytes: most resident memory while running, the model's included.
        rates: tokens a second, by figure ("decode", "8", ...), a number for each round.
        maps_dense: whether its memory may count pages of the dense model's file: it was quantized while it
            loaded.
    """

    name: str
    load_seconds: float | None
    load_peak_bytes: int | None
    run_peak_bytes: int | None = None
    rates: dict[str, list[float]] = field(default_factory=dict)
    maps_dense: bool = False

    def rate(self, figure: str) -> float | None:
        """The median of the rounds; None where the figure was not measured.

        Args:
            figure: its name.
        """
        return median(self.rates[figure]) if self.rates.get(figure) else None

    def ratio(self, figure: str, other: "Measured") -> float | None:
        """How many times as fast as another variant; None where one of them was not measured.

        Args:
            figure: its name.
            other: the variant to divide by.
        """
        pairs = list(zip(self.rates.get(figure, ()), other.rates.get(figure, ()), strict=False))
        return median(one / two for one, two in pairs) if pairs else None


@dataclass(frozen=True)
class BenchResult:
    """What was measured.

    Attributes:
        model: as it was given.
        kind: its class.
        parameters: its weights, packed ones counted as what they stand for.
        stored_bytes: of its safetensors files.
        threads: of torch.
        figures: names of the figures, "decode" first where the model writes.
        variants: by word; the folder's own model first.
        shares: of the time by kind of module, of prefill and decoding, of the first variant.
        paths: of the first variant's quantized layers (`KernelPath`).
        missing: why variants were not measured, by name.
        rounds: how many.
    """

    model: str
    kind: str
    parameters: int
    stored_bytes: int
    threads: int
    figures: list[str]
    variants: dict[str, Measured]
    shares: dict[str, dict[str, float] | None]
    paths: list[dict[str, Any]]
    missing: dict[str, str]
    rounds: int

    def ratios(self, word: str) -> dict[str, float]:
        """A variant's ratios to dense FP32, by figure; none where that is missing.

        Args:
            word: of the variant.
        """
        base = self.variants.get(REFERENCE)
        found = {} if base is None else {one: self.variants[word].ratio(one, base) for one in self.figures}
        return {figure: ratio for figure, ratio in found.items() if ratio is not None}

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has, with each variant's medians and ratios."""
        told = asdict(self)
        for word, one in self.variants.items():
            rates = {figure: one.rate(figure) for figure in self.figures}
            told["variants"][word] |= {"tokens_per_second": rates, "times_dense_fp32": self.ratios(word)}
        return told
