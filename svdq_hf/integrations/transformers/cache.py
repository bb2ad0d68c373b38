"""The quantized KV cache: a transformers `Cache` whose layers hold packed keys and values.

Give it to `generate` or to a model where a `DynamicCache` would go. It needs no data and changes no model:
states come after RoPE, are packed once, and are decoded when they are read. Layers of full and of sliding (or
chunked) attention are packed; others, as the recurrent states of linear attention, stay what transformers
makes them (`SVDQCache.unpacked`).

Not here: what a layer does (`integrations.transformers.cache_layer`), how a state becomes bytes
(`core.state_codes`).
"""

from numbers import Real
from typing import Any

import transformers
from packaging.version import Version
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from svdq_hf.core.state_codes import FIELDS, StateFormat
from svdq_hf.integrations.transformers.cache_layer import PackedLayer
from svdq_hf.integrations.transformers.sliding_layer import PackedSlidingLayer

RECENT = 32
"""Last tokens that stay as they came, by default."""

FORMATS = {
    bits + (0.5 if outliers else 0): StateFormat(bits, outliers)
    for bits in FIELDS
    for outliers in (False, True)
    if not (outliers and bits == 8)
}
"""Ways to pack by their bits a value, without scales: 2, 2.5, 3, 3.5, 4, 4.5 and 8."""


class SVDQCache(Cache):  # type: ignore[misc]  # transformers ships no types
    """KV cache in 8, 4.5, 4, 3.5, 3, 2.5 or 2 bits a value, for decoder models of transformers.

    `model.generate(..., cache=SVDQCache(model))`; before transformers 5.24 `past_key_values=`. Sampling,
    beams, assisted decoding, padded batches and several turns work as with `DynamicCache`. Gradients do not
    flow through packed tokens.

    Args:
        model: a model, or its config.
        bits: of a value, without its share of the scales: 8, 4, 3 or 2; 4.5, 3.5 and 2.5 give an eighth of
            the channels of each head, the largest, 4 bits more. With scales 4.5 are 4.875, where a head has
            64 channels or a multiple.
        recent: the least number of last tokens that stay as they came.

    Raises:
        ValueError: bits or recent are no such numbers; or the model has an encoder, or no attention.
        TypeError: the model is neither a model of transformers nor a config.
    """

    def __init__(self, model: Any, bits: float = 4.5, recent: int = RECENT) -> None:
        form = _form(bits)
        if not isinstance(recent, int) or isinstance(recent, bool) or recent < 0:
            raise ValueError(f"recent={recent!r}: a number of tokens, 0 or more")
        config = _decoder_config(model)
        layers = [_packed_layer(layer, form, recent) for layer in DynamicCache(config=config).layers]
        if not any(isinstance(layer, PackedLayer) for layer in layers):
            raise ValueError(f"{config.model_type} has no attention layers whose keys could be packed")
        super().__init__(layers=layers)
        self.bits, self.recent = bits, recent

    @property
    def unpacked(self) -> dict[int, str]:
        """Layers that hold states of their own which are not packed, by number: the class of each."""
        others = {at: layer for at, layer in enumerate(self.layers) if not isinstance(layer, PackedLayer)}
        kinds = {at: type(layer).__name__ for at, layer in others.items()}
        return {at: kind for at, kind in kinds.items() if kind != "DummyLayer"}  # of 5.24, and holds nothing

    @property
    def nbytes(self) -> int:
        """Bytes that the packed layers hold now, with their recent tokens."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, PackedLayer))

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens: of all layers, or of none where one cannot.

        Args:
            tokens_to_remove: minus their number, as transformers counts.

        Raises:
            ValueError: the number is positive; or tokens that have left a window would be needed again.
        """
        for layer in self.layers:
            if isinstance(layer, PackedLayer):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def __repr__(self) -> str:
        tokens = self.get_seq_length()
        return f"{type(self).__name__}(bits={self.bits}, recent={self.recent}, layers={len(self)}, {tokens=})"


def cache_keyword() -> str:
    """The name under which transformers takes a cache: "cache", or "past_key_values" before release 5.24."""
    return "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


def _form(bits: Any) -> StateFormat:
    """How states are packed in so many bits a value."""
    form = FORMATS.get(float(bits)) if isinstance(bits, Real) and not isinstance(bits, bool) else None
    if form is None:
        raise ValueError(f"bits={bits!r}: a cache is packed in one of {', '.join(map(str, sorted(FORMATS)))}")
    return form


def _decoder_config(model: Any) -> PreTrainedConfig:
    """The config of the layers whose keys are cached.

    Raises:
        TypeError: neither a model of transformers nor a config.
        ValueError: the model has an encoder.
    """
    config = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"{type(model).__name__} is neither a model of transformers nor the config of one")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{config.model_type} has an encoder, whose keys are cached apart: "
            "SVDQCache is for models that are a decoder alone"
        )
    return config.get_text_config(decoder=True)


def _packed_layer(layer: Any, form: StateFormat, recent: int) -> Any:
    """The packed layer for one of transformers' own; what is neither full nor sliding attention stays."""
    if type(layer) is DynamicLayer:
        return PackedLayer(form, recent)
    if type(layer) is DynamicSlidingWindowLayer:
        return PackedSlidingLayer(form, recent, layer.sliding_window)
    return layer
