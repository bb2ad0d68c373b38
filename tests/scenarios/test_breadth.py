"""Breadth: every model type of transformers, built tiny, is quantized, or it is known why not.

Every fourth type goes through files, as a user's model does: quantized while loading, saved, reloaded,
dequantized. The others are quantized in memory and run, unless `make breadth` takes all through files
(SVDQ_BREADTH=files).

What each came to is recorded by release. On a release that has a record, a type that fares worse fails here,
and so does one that fares better, until `python tests/helpers/breadth.py` has written it down. On another
release the newest record is looked at: a type that passes there must not fail in our code here; what else
differs (a new type, one that this release cannot build) is told as a skipped test.
"""

import os
from contextlib import nullcontext

import breadth
import pytest
import torch
import transformers as hf
from breadth import PASSES, Outcome
from tiny_configs import tiny_config
from torch import nn
from torch.nn import functional as F

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.nn.inventory import svdq_layers
from svdq_hf.quantize.code_inspection import is_linear, layers_read

RECORDS = breadth.read()
NEWEST = list(RECORDS.values())[-1]
EXPECTED = RECORDS.get(breadth.RELEASE, NEWEST)
EACH = 1 if os.environ.get("SVDQ_BREADTH") == "files" else 4
"""One type of so many goes through files; nearly sorted by name, which families share."""
THROUGH_FILES = {
    name
    for place, name in enumerate(breadth.MODEL_TYPES)
    if place % EACH == 0 or name not in EXPECTED or EXPECTED[name].result != PASSES
}


def compare(model_type, expected, found, *, recorded):
    """Hold an outcome, or the error in its place, against the one on record.

    Raises:
        The error, or AssertionError: worse than on record, or, with `recorded`, another.
    """
    passed = expected is not None and expected.result == PASSES
    if isinstance(found, Exception) and (recorded or passed):
        raise found
    if recorded:
        assert found == expected
    elif isinstance(found, Exception) or found.result != (expected and expected.result):
        before = expected.result if expected else "not there"
        now = repr(found) if isinstance(found, Exception) else found.result
        pytest.skip(f"of transformers {breadth.RELEASE} there is no record: {model_type} {now} ({before})")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # a hundred families' own
@pytest.mark.parametrize("model_type", breadth.MODEL_TYPES)
def test_a_model_type_fares_as_on_record(model_type):
    try:
        found = breadth.outcome(model_type, through_files=model_type in THROUGH_FILES)
    except Exception as error:
        found = error
    recorded = breadth.RELEASE in RECORDS
    compare(model_type, EXPECTED.get(model_type), found, recorded=recorded)


def test_about_a_fourth_of_what_passes_goes_through_files():
    there = passing(EXPECTED) & {*breadth.MODEL_TYPES}
    assert 4.5 * len(THROUGH_FILES & there) >= len(there) >= 150


def passing(found):
    return {name for name, one in found.items() if one.result == PASSES}


def test_a_record_has_every_model_type_of_its_release():
    assert sorted(RECORDS.get(breadth.RELEASE, breadth.MODEL_TYPES)) == sorted(breadth.MODEL_TYPES)


GOOD, BAD, NONE = Outcome("causal", "A", PASSES), Outcome("causal", "A", "needs timm"), None
WORSE = AssertionError("ours")
UNLIKE = (AssertionError,)
TOLD = (pytest.skip.Exception,)


@pytest.mark.parametrize(
    ("expected", "found", "on_record", "elsewhere"),
    [
        (GOOD, GOOD, (), ()),
        (GOOD, BAD, UNLIKE, TOLD),
        (GOOD, WORSE, UNLIKE, UNLIKE),
        (BAD, GOOD, UNLIKE, TOLD),
        (BAD, WORSE, UNLIKE, TOLD),
        (NONE, GOOD, UNLIKE, TOLD),
        (NONE, BAD, UNLIKE, TOLD),
        (NONE, WORSE, UNLIKE, TOLD),
    ],
)
def test_what_differs_from_a_record_fails_or_is_told(expected, found, on_record, elsewhere):
    for recorded, raised in ((True, on_record), (False, elsewhere)):
        with pytest.raises(raised) if raised else nullcontext():
            compare("a", expected, found, recorded=recorded)


def test_records_are_written_as_differences_and_read_whole(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(f"Before\n{breadth.START}old{breadth.END}\nafter")
    monkeypatch.setattr(breadth, "RECORDS", tmp_path)
    monkeypatch.setattr(breadth, "README", readme)
    first = {"a": GOOD, "b": GOOD, "c": BAD}
    records = {"5.9.0": first, "5.10.0": {"a": GOOD, "b": BAD, "d": GOOD}}
    breadth.write(records)
    assert breadth.read() == records
    assert list(breadth.read()) == ["5.9.0", "5.10.0"]
    lines = (tmp_path / "breadth-5.10.0.json").read_text().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["{", '"b"', '"c"', '"d"', "}"]
    between = {"5.9.1": {**first, "c": GOOD}}
    breadth.write({**records, **between})
    assert breadth.read() == {**records, **between}
    text = readme.read_text()
    assert text == f"Before\n{breadth.START}{breadth.as_text(records['5.10.0'])}{breadth.END}\nafter"


def test_the_readme_says_what_is_on_the_newest_record():
    assert breadth.as_text(NEWEST) in breadth.README.read_text()


def test_at_least_150_model_types_pass():
    assert len(passing(NEWEST)) >= 150


def test_an_outcome_tells_what_is_missing():
    assert breadth.outcome("timm_backbone").result == "needs timm"
    assert breadth.outcome("resnet").result == "no linear layer outside its heads"


# The walk's two lessons: subclasses that are linear, weights that are read.


class Spelled(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


class Routed(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class Masked(nn.Linear):
    def forward(self, x, mask):
        return super().forward(x) * mask


class Inherited(nn.Linear):
    pass


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (nn.Linear, True),
        (Inherited, True),
        (Spelled, True),
        (Doubled, False),
        (Routed, False),
        (Masked, False),
    ],
)
def test_a_subclass_that_answers_as_linear_is(kind, expected, bias, device):
    with torch.device(device):
        assert is_linear(kind(16, 8, bias=bias)) is expected


def test_a_subclass_with_a_tensor_more_is_not_linear():
    layer = Inherited(16, 8)
    layer.register_buffer("scale", torch.ones(1))
    assert not is_linear(layer)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("plain", "cast", "product", "twice", "guarded", "placed"):
            setattr(self, name, nn.Linear(16, 16))
        self.inner = nn.ModuleDict({"block": nn.ModuleDict({"out": nn.Linear(16, 16)})})

    def forward(self, x):
        x = self.plain(x.to(self.placed.weight.device))
        x = self.cast(x.to(self.cast.weight.dtype))
        x = x @ self.product.weight.T
        x = self.twice(x) if self.training else F.linear(x, self.twice.weight)
        return self.placed(self.careful(x))

    def careful(self, x):
        if self.guarded.weight.dtype != torch.int8:
            x = x.to(self.guarded.weight.dtype)
        return self.guarded(x)

    def rescale(self):
        inner = self.inner
        inner.block.out.weight.mul_(2)


def test_layers_are_dense_whose_weight_their_owner_reads():
    assert layers_read(Reader()) == ["cast", "inner.block.out", "product"]
    assert layers_read(nn.ModuleDict({"a": Reader()})) == ["a.cast", "a.inner.block.out", "a.product"]


def test_a_model_that_reads_weights_is_quantized_but_for_those():
    model = quantize_model(Reader(), SVDQConfig(k=8))
    quantized = {name for name, _ in svdq_layers(model)}
    assert quantized == {"plain", "twice", "guarded", "placed"}
    model.train()
    assert torch.isfinite(model(torch.randn(3, 16))).all()


def test_a_head_whose_weight_its_family_reads_is_not_quantized():
    """Mamba casts to `lm_head.weight.dtype`: with a packed head, to integers."""
    model = hf.MambaForCausalLM(tiny_config("mamba"))
    with pytest.raises(
        ValueError, match=r"MambaForCausalLM reads the weight of lm_head itself.*leave lm_head"
    ):
        quantize_model(model, SVDQConfig(k=8, lm_head=True))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.q_proj = nn.MultiheadAttention(16, 2), nn.Linear(16, 16)


def test_a_module_kept_dense_by_default_does_not_keep_those_that_end_like_it():
    model = quantize_model(Named(), SVDQConfig(k=8))
    assert [name for name, _ in svdq_layers(model)] == ["q_proj"]
