"""Names of modules that stay dense: what transformers matches, components too, and no name takes for ever."""

import logging
import re
import time

import pytest
import tiny_models as tiny
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.quantizers.quantizers_utils import should_convert_module

from svdq_hf import SVDQConfig
from svdq_hf.quantize.kept_dense import KeptDense
from svdq_hf.quantize.selection import layers_to_convert

MODULES = [
    "model.vision_tower.layers.0.self_attn.q_proj",
    "layers.1.mlp.gate_proj",
    "layers.11.mlp.up",
    "lm_head",
    "aa_b.1",
    "a",
]
PIECES = [
    *(
        "layers",
        r"\.",
        ".",
        "0",
        "1",
        r"\d+",
        "mlp",
        ".*",
        "[a-c]",
        "[^.]",
        "q_proj",
        "(?:x|layers)",
        "(a|b)",
    ),
    *("?", "+", "*", "{1,2}", "^", "$", r"\b", r"\B", r"\w", r"\W", r"\s", "(?=l)", "(?!m)", r"(?<=\.)"),
    *("(?<!s)", "up", "|", "(", "(?:", ")", "-", "a", "b"),
]


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=7).map("".join))
def test_a_name_keeps_what_transformers_keeps(pattern):
    try:
        re.compile(pattern)
        kept = KeptDense([pattern])
    except (re.error, ValueError):
        assume(False)
    for module in MODULES:
        theirs = not should_convert_module(module, [pattern])
        assert kept.keeps(module) >= theirs
        if pattern not in kept.plain:
            assert kept.keeps(module) == theirs


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("vision_tower", [0]),
        ("self_attn", [0]),
        ("layers.0", [0]),
        ("layers.1", [1]),
        ("mlp", [1, 2]),
        ("proj", [0, 1]),  # the end of a name, as ever
        ("tower", []),
        ("0", []),
        ("vision_tower.0", []),
    ],
)
def test_a_plain_name_keeps_whole_components(name, kept):
    asked = KeptDense([name])
    assert [at for at, module in enumerate(MODULES) if asked.keeps(module)] == kept


def test_thousands_of_plain_names_are_looked_up():
    asked = KeptDense([f"model.layers.{layer}.block.q{layer % 7}" for layer in range(5000)])
    start = time.process_time()
    found = [asked.keeps(f"model.layers.{layer}.block.q{layer % 5}") for layer in range(1000)]
    assert found == [layer % 7 == layer % 5 for layer in range(1000)]
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "pattern",
    [
        "(([a-z_.0-9])+)+!",
        "(.*)*(.*)*(.*)*!",
        "((((a?){90}){90}){90}){90}!",
        "(?=.*(?=.*(?=.*(?=.*(?=.*!)))))",
        "(a|a)*(a|a)*!",
        "(?:" * 18 + "[a-z.]+" + ")+" * 18 + "!",
    ],
)
def test_no_pattern_runs_for_ever(pattern):
    asked = KeptDense([pattern])
    start = time.process_time()
    assert not asked.keeps("model.layers.10.self_attn.q_proj." + 30 * "a")
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("(", "no regular expression"),
        (r"(a)\1", "GROUPREF"),
        ("(?i)mlp.*", "flags"),
        ("(?i:mlp).*", "SUBPATTERN"),
        ("a" * 2000 + "+", "2001 characters"),
        ("(" * 30 + "a" + ")" * 30, "inside of each other"),
        ("(?<=a*)b", "no fixed width"),
    ],
    ids=str,
)
def test_a_pattern_that_is_not_matched_is_refused(name, told):
    with pytest.raises(ValueError, match=told):
        KeptDense(["mlp", name])


def test_patterns_are_not_without_number():
    with pytest.raises(ValueError, match="300 regular expressions: at most 256"):
        KeptDense([f"layers.{layer}.*" for layer in range(300)])


def test_which_layers_a_name_keeps_is_said(caplog):
    config = SVDQConfig(k=9, modules_to_not_convert=["vision_tower", "layers.0"])
    with caplog.at_level(logging.INFO, logger="svdq_hf"):
        chosen = layers_to_convert(tiny.llama(), config)
    assert not any(".layers.0." in name for name in chosen)
    assert "'layers.0' keeps 7 dense: model.layers.0.self_attn.q_proj, " in caplog.text
    assert "'vision_tower' matches no linear layer" in caplog.text
