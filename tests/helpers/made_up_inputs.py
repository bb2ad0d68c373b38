"""Inputs made up for any model: random tokens, pictures and sounds of the sizes that its config says."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

Inputs = dict[str, Tensor]


def made_up_inputs(model: PreTrainedModel) -> Iterator[Inputs]:
    """Guesses at what a model takes, the fullest first; the caller tries them."""
    config, takes = model.config, inspect.signature(model.forward).parameters
    texts = _named(takes, "input_ids", [_tokens(config, length) for length in (16, 9)])
    for other in _patches(config, takes) + _pictures(config, takes) + _sounds(config, takes):
        yield from ({**text, **other} for text in texts + _marked(config, takes))
        yield other
    yield from texts


def complete(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """With a mask, and a start for the decoder, where there is one that wants it."""
    takes = inspect.signature(model.forward).parameters
    if "attention_mask" in takes and "input_ids" in inputs:
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    if model.config.is_encoder_decoder and "decoder_input_ids" in takes:
        inputs = {**inputs, "decoder_input_ids": _tokens(model.config, 5)}
    return inputs


def _marked(config: PreTrainedConfig, takes: Any) -> list[Inputs]:
    """Texts in which a picture or sound has its place, of a few lengths."""
    names = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
    marks = [mark for name in names for mark in find(config, name) if isinstance(mark, int)]
    texts = [
        _tokens(config, 70).index_fill(1, torch.arange(n), mark)
        for mark in marks[:1]
        for n in (16, 8, 4, 17, 1, 64)
    ]
    return _named(takes, "input_ids", texts)


def _named(takes: Any, name: str, values: list[Tensor]) -> list[Inputs]:
    return [{name: value} for value in values] if name in takes else []


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _tokens(config: PreTrainedConfig, length: int) -> Tensor:
    """Low numbers: special tokens of tiny configs are the highest."""
    generator = torch.Generator().manual_seed(7)
    high = min([60, *(size for size in find(config, "vocab_size") if size > 8)])
    return torch.randint(4, high, (2, length), generator=generator)


def find(config: PreTrainedConfig, name: str) -> list[Any]:
    """The values of a choice, of the config and all nested ones, outermost first."""
    values = [getattr(config, name)] if getattr(config, name, None) is not None else []
    nested = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return values + [value for inner in nested for value in find(inner, name)]


def _patches(config: PreTrainedConfig, takes: Any) -> list[Inputs]:
    """Pictures that are cut already, as Siglip 2 takes them."""
    if "spatial_shapes" not in takes:
        return []
    side = next(iter(find(config, "patch_size")), 8)
    shapes, mask = torch.tensor([[4, 4], [4, 4]]), torch.ones(2, 16, dtype=torch.long)
    patches = {"pixel_values": _random(2, 16, 3 * side * side), "spatial_shapes": shapes}
    return [{**patches, "pixel_attention_mask": mask}] if "pixel_attention_mask" in takes else [patches]


def _pictures(config: PreTrainedConfig, takes: Any) -> list[Inputs]:
    channels = next((c for c in find(config, "num_channels") if isinstance(c, int)), 3)
    sizes = [size for size in find(config, "image_size") if isinstance(size, int)]
    squares = dict.fromkeys([*sizes, 32, 64])
    flat = [_random(2, channels, size, size) for size in squares]
    films = [
        _random(2, frames, channels, size, size)
        for frames in (2, *find(config, "num_frames"))
        for size in squares
    ]
    return _named(takes, "pixel_values", flat + films) + _named(takes, "pixel_values_videos", films)


def _sounds(config: PreTrainedConfig, takes: Any) -> list[Inputs]:
    bins = next(
        (
            b
            for name in ("num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim")
            for b in find(config, name)
        ),
        80,
    )
    frames = [2 * length for length in find(config, "max_source_positions")] + [64]
    spectra = [_random(2, *shape) for length in frames for shape in ((bins, length), (length, bins))]
    waves = [_random(2, 2000), _random(2, 1, 2000), _random(2, 12000)]
    return _named(takes, "input_features", spectra) + _named(takes, "input_values", waves + spectra)
