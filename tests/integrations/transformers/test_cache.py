"""The quantized KV cache in transformers: exact where nothing is packed, near where all is; and errors."""

from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import llama, llama_config
from torch import Tensor

from svdq_hf import SVDQCache
from svdq_hf.config.choices import CACHE_BITS
from svdq_hf.integrations.transformers.cache import FORMATS, cache_keyword
from svdq_hf.integrations.transformers.cache_layer import PackedLayer
from svdq_hf.integrations.transformers.sliding_layer import PackedSlidingLayer

WINDOW = 12
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NOTHING_PACKED = 10_000
"""Recent tokens; with so many, a cache must do what a DynamicCache does, bit for bit."""


def wide_llama() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).eval()


def gemma() -> Any:
    """Layers of sliding and of full attention, and a window that a test passes."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    torch.manual_seed(0)
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SIZES, sliding_window=WINDOW, layer_types=kinds)).eval()


MODELS = {"llama": wide_llama, "gemma": gemma, "llama, heads of 16": llama}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def prompt(batch: int = 2, tokens: int = 20) -> dict[str, Tensor]:
    """The first sequence is padded on its left."""
    ids = torch.randint(3, 96, (batch, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if batch > 1:
        ids[0, :6], mask[0, :6] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, cache: Any, batch: int = 2, **choices: Any) -> Tensor:
    choices = {"do_sample": False, "max_new_tokens": 40, **choices}
    return model.generate(**prompt(batch), **{cache_keyword(): cache}, **choices)


def dynamic(model: Any) -> hf.DynamicCache:
    return hf.DynamicCache(config=model.config)


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several answers": {"num_beams": 4, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 4, "batch": 1},
}


@pytest.mark.oldest
@pytest.mark.parametrize("way", WAYS)
def test_with_nothing_packed_it_is_the_dynamic_cache(model, way):
    expected = generated(model, dynamic(model), **WAYS[way])
    assert torch.equal(generated(model, SVDQCache(model, recent=NOTHING_PACKED), **WAYS[way]), expected)


@pytest.mark.oldest
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [8, 4.5])
def test_every_way_of_generating_runs_packed(model, way, bits):
    cache = SVDQCache(model, bits=bits, recent=0)
    found = generated(model, cache, **WAYS[way])
    assert found.shape[1] > 20
    assert cache.get_seq_length() >= found.shape[1] - 2
    assert any(states.packed is not None for layer in cache.layers for states in layer.states)


def test_assisted_decoding_gives_the_tokens_of_greedy():
    """The draft of a smaller model is dropped again and again: `crop`, also in the assistant's own cache."""
    model, assistant = wide_llama(), wide_llama()
    assistant.model.layers = assistant.model.layers[:2]
    assistant.config.num_hidden_layers = 2
    greedy = generated(model, dynamic(model), batch=1, max_new_tokens=20)
    choices = {"batch": 1, "max_new_tokens": 20, "assistant_model": assistant}
    for bits in (8, 4.5):
        cache = SVDQCache(model, bits, NOTHING_PACKED)
        assert torch.equal(generated(model, cache, **choices), greedy)
    packed = SVDQCache(model, 8, 0)
    assert generated(model, packed, **choices).shape[1] > 20


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.02), (4.5, 0.2), (4, 0.25), (2, 1.2)])
def test_logits_are_near_and_nearer_with_more_bits(model, bits, bound):
    """Relative error of the logits after 128 packed tokens, in steps of 32."""
    ids = prompt(2, 160)["input_ids"].clamp(min=3)
    exact, packed = dynamic(model), SVDQCache(model, bits=bits, recent=0)
    with torch.inference_mode():
        for piece in ids.split(32, 1):
            expected, found = (model(piece, **{cache_keyword(): cache}).logits for cache in (exact, packed))
    assert 0 < (found - expected).norm() < bound * expected.norm()


def states(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 2, tokens, 64, generator=torch.Generator().manual_seed(seed)).unbind(0)


def packed_layer(recent: int = 8, **choices: Any) -> PackedLayer:
    layer = (
        PackedSlidingLayer(FORMATS[4.5], recent, **choices) if choices else PackedLayer(FORMATS[4.5], recent)
    )
    layer.update(*states(100))
    return layer


OPERATIONS = {
    "reorder": (lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])), lambda x: x[[2, 0, 0]]),
    "repeat": (lambda layer: layer.batch_repeat_interleave(2), lambda x: x.repeat_interleave(2, 0)),
    "select": (lambda layer: layer.batch_select_indices(torch.tensor([1])), lambda x: x[[1]]),
    "select by booleans": (
        lambda layer: layer.batch_select_indices(torch.tensor([True, False, True])),
        lambda x: x[[0, 2]],
    ),
    "crop recent": (lambda layer: layer.crop(-3), lambda x: x[:, :, :-3]),
    "crop packed": (lambda layer: layer.crop(-60), lambda x: x[:, :, :-60]),
    "crop none": (lambda layer: layer.crop(0), lambda x: x),
    "crop all": (lambda layer: layer.crop(-500), lambda x: x[:, :, :0]),
    "offload": (lambda layer: (layer.offload(), layer.prefetch()), lambda x: x),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_the_dense_states(name):
    layer = packed_layer()
    keys, values = layer.keys, layer.values
    operation, expected = OPERATIONS[name]
    operation(layer)
    assert torch.equal(layer.keys, expected(keys))
    assert torch.equal(layer.values, expected(values))
    assert layer.get_seq_length() == expected(keys).shape[2]
    new = [
        each[: layer.keys.shape[0]].repeat(2, 1, 1, 1)[: layer.keys.shape[0]] for each in states(1, seed=5)
    ]
    more = layer.update(*new)
    assert torch.equal(more[0], torch.cat([expected(keys), new[0]], 2))


def test_reset_begins_anew():
    layer = packed_layer()
    first = layer.keys
    layer.reset()
    assert layer.keys is None
    assert layer.get_seq_length() == layer.nbytes == 0
    layer.update(*states(100))
    assert torch.equal(layer.keys, first)


@pytest.mark.oldest
@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_sliding_layer_is_transformers_own(seed, record):
    """Lengths, masks and states over random pieces, crops among them where the past is recorded."""
    from transformers.cache_utils import DynamicSlidingWindowLayer

    theirs = DynamicSlidingWindowLayer(WINDOW)
    ours = PackedSlidingLayer(FORMATS[4.5], NOTHING_PACKED, WINDOW)
    pieces = torch.randint(1, 20, (8,), generator=torch.Generator().manual_seed(seed)).tolist()
    if record:
        theirs.activate_past_recording()
        ours.activate_past_recording()
    for at, piece in enumerate(pieces):
        new = states(piece, seed=at)
        assert ours.get_mask_sizes(piece) == theirs.get_mask_sizes(piece)
        for found, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(found, expected)
        if record:
            dropped = -min(at % 3, piece - 1)
            ours.crop(dropped)
            theirs.crop(dropped)
            assert torch.equal(ours.keys, theirs.keys)
        assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_max_length() == theirs.get_max_length()


def test_a_packed_sliding_layer_holds_its_window_alone():
    layer = packed_layer(recent=0, sliding_window=41)
    assert layer.keys.shape[2] == 40
    assert len(layer.states[0]) == 40
    assert layer.states[0].packed.shape[2] == 32
    for at in range(100):
        keys, _ = layer.update(*states(1, seed=at))
        assert keys.shape[2] == 41
        assert len(layer.states[0]) == 40
    assert layer.get_seq_length() == 200
    with pytest.raises(ValueError, match="activate_past_recording"):
        layer.crop(-1)


@pytest.mark.parametrize(("dropped", "fits"), [(0, True), (2, True), (3, False), (20, False), (32, True)])
def test_a_sliding_layer_is_cropped_as_far_as_its_window_is_there(dropped, fits):
    """Of 32 tokens the last 2 are recorded: the 15 before them are the window's, and all may go."""
    layer = PackedSlidingLayer(FORMATS[4.5], 0, 16)
    layer.update(*states(30))
    layer.activate_past_recording()
    layer.update(*states(2))
    if not fits:
        with pytest.raises(ValueError, match=rf"crop\(-{dropped}\): at most 2 tokens can be dropped"):
            layer.crop(-dropped)
        dropped = 0
    else:
        layer.crop(-dropped)
    assert layer.get_seq_length() == 32 - dropped
    assert layer.update(*states(1))[0].shape[2] == min(16, 33 - dropped)


def test_a_refused_crop_changes_no_layer():
    model = gemma()
    cache = SVDQCache(model, recent=0)
    with torch.inference_mode():
        model(**prompt(1), **{cache_keyword(): cache})
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-1)
    assert [layer.get_seq_length() for layer in cache.layers] == [20, 20, 20]


def test_several_turns_go_on_where_the_last_ended():
    model, cache = wide_llama(), SVDQCache(wide_llama(), recent=NOTHING_PACKED)
    first = generated(model, cache, batch=1, max_new_tokens=5)
    more = torch.cat([first, prompt(1, 7)["input_ids"]], 1)
    arguments = {"do_sample": False, "max_new_tokens": 5, "attention_mask": torch.ones_like(more)}
    found = model.generate(more, **{cache_keyword(): cache}, **arguments)
    assert torch.equal(found, model.generate(more, **arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_come_out_in_the_dtype_in_which_they_came(dtype):
    layer = PackedLayer(FORMATS[4.5], 0)
    layer.update(*(each.to(dtype) for each in states(64)))
    keys, values = layer.update(*(each.to(dtype) for each in states(1)))
    assert keys.dtype == values.dtype == dtype
    assert (keys[:, :, :64].float() - states(64)[0]).norm() < 0.1 * states(64)[0].norm()


def test_what_is_packed_and_what_is_not():
    model = gemma()
    cache = SVDQCache(model)
    assert [type(layer) for layer in cache.layers] == [PackedSlidingLayer, PackedLayer, PackedSlidingLayer]
    assert cache.is_sliding == [True, False, True]
    assert cache.unpacked == {}
    assert cache.nbytes == 0
    assert cache.is_croppable
    generated(model, cache)
    assert cache.nbytes > 0
    assert repr(cache) == "SVDQCache(bits=4.5, recent=32, layers=3, tokens=59)"


def test_layers_of_other_kinds_stay_as_they_are():
    config = hf.Qwen3NextConfig(
        **{**SIZES, "num_hidden_layers": 4}, layer_types=["linear_attention"] * 3 + ["full_attention"]
    )
    cache = SVDQCache(config)
    assert set(cache.unpacked) == {0, 1, 2}
    assert set(cache.unpacked.values()) == {"LinearAttentionLayer"}


def test_an_untouched_layer_is_empty():
    layer = PackedLayer(FORMATS[4], 0)
    assert layer.keys is None
    layer.crop(-1)
    layer.reorder_cache(torch.tensor([0]))
    assert layer.get_seq_length() == 0
    assert layer.get_mask_sizes(3) == (3, 0)


@pytest.mark.parametrize("bits", [5, 0, 1, 16, "4", None, True, 8.5, [4], {}, torch.ones(2)])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"bits=.*packed in one of 2, 2.5, 3, 3.5, 4, 4.5, 8"):
        SVDQCache(llama_config(), bits=bits)


def test_the_command_line_knows_the_bits():
    assert sorted(CACHE_BITS) == sorted(FORMATS)


@pytest.mark.parametrize("recent", [-1, 1.5, True, "32"])
def test_no_number_of_tokens_is_refused(recent):
    with pytest.raises(ValueError, match=r"recent=.*a number of tokens"):
        SVDQCache(llama_config(), recent=recent)


def test_models_without_what_it_packs_are_refused():
    with pytest.raises(ValueError, match="t5 has an encoder"):
        SVDQCache(hf.T5Config())
    with pytest.raises(TypeError, match="str is neither a model"):
        SVDQCache("some/model")
    with pytest.raises(ValueError, match="mamba has no attention layers"):
        SVDQCache(hf.MambaConfig(num_hidden_layers=2))


def test_heads_that_cannot_be_packed_are_refused_when_they_come():
    odd = [torch.zeros(1, 1, 1, 24)] * 2
    with pytest.raises(ValueError, match=r"heads of 24 channels: packed are multiples of 16; bits=4 takes"):
        PackedLayer(FORMATS[4.5], 0).update(*odd)
    PackedLayer(FORMATS[4], 0).update(*odd)


def test_a_crop_by_a_positive_number_is_refused():
    with pytest.raises(ValueError, match=r"crop\(3\): minus the number of tokens to drop, as crop\(-3\)"):
        packed_layer().crop(3)
