"""Breadth: every model type of transformers, built tiny, is quantized, or it is known why not.

What each came to is written down in breadth.json; one that fares worse fails here, and so does one that
fares better, until `python tests/breadth.py` has written it down.
"""

import breadth
import pytest
import torch
import transformers as hf
from tiny_configs import tiny_config
from torch import nn
from torch.nn import functional as F

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.nn.inventory import svdq_layers
from svdq_hf.quantize.code_inspection import is_linear, layers_read

FOUND = breadth.read()
same_release = pytest.mark.skipif(
    not hf.__version__.startswith("5.23."),
    reason=f"breadth.json is of transformers 5.23, not {hf.__version__}",
)


@same_release
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # a hundred families' own
@pytest.mark.parametrize("model_type", FOUND)
def test_a_model_type_fares_as_written_down(model_type):
    assert breadth.outcome(model_type) == FOUND[model_type]


@same_release
def test_every_model_type_is_written_down():
    assert sorted(FOUND) == sorted(breadth.MODEL_TYPES)


def test_the_readme_says_what_is_written_down():
    assert breadth.as_text(FOUND) in breadth.README.read_text()


def test_at_least_150_model_types_pass():
    assert sum(one.result == breadth.PASSES for one in FOUND.values()) >= 150


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
