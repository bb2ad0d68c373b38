import pytest
import torch
from tiny_models import llama, tokens
from torch import nn

from svdq_hf.calibration.pqi import Line, model_loss, places, walk


def line(module: nn.Linear, rounded: torch.Tensor) -> Line:
    return Line(module, lambda: module.weight.detach(), lambda: rounded)


class Squares(nn.Module):
    """A loss that is a polynomial of its weights: `sum((w x)^2)`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        self.layer.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).square().sum()


def integral(model, lines, batches, at, loss=model_loss):
    terms = {name: torch.zeros_like(one.dense()) for name, one in lines.items()}

    def take(name: str, gradient: torch.Tensor, place: float) -> None:
        terms[name] += gradient * lines[name].difference() / len(at)

    for _ in walk(model, lines, batches, at, take, loss):
        pass
    return terms


def test_the_terms_by_hand():
    model = Squares()
    lines = {"layer": line(model.layer, torch.tensor([[1.5, 0.0], [0.0, 1.0]]))}
    found = integral(model, lines, [torch.tensor([[1.0, 1.0]])], [0.5], lambda one, batch: one(batch))
    # (1.5^2 - 1^2) and (1^2 - 2^2): a quadratic loss is exact by the midpoint
    assert torch.allclose(found["layer"], torch.tensor([[1.25, 0.0], [0.0, -3.0]]))


def test_gradients_are_autograds():
    model, batch = llama(), {"input_ids": tokens()}
    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    moved = {name: one.weight.detach() + 0.05 * torch.randn_like(one.weight) for name, one in layers.items()}
    lines = {name: line(one, moved[name]) for name, one in layers.items()}
    found = {}

    def take(name, gradient, place):
        found[name] = found.get(name, 0) + gradient

    losses = list(walk(model, lines, [batch], [0.25], take))
    for name, one in layers.items():
        one.weight.data = torch.lerp(one.weight.data, moved[name], 0.25)
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert losses == [(0.25, pytest.approx(float(loss.detach())))]
    assert found.keys() == layers.keys()
    for name, one in layers.items():
        assert torch.allclose(found[name], one.weight.grad, atol=1e-6), name


def test_each_sequence_hands_out_its_own_gradient():
    model = Squares()
    lines = {"layer": line(model.layer, torch.zeros(2, 2))}
    seen = []
    batch = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    take = lambda name, gradient, place: seen.append(gradient.tolist())  # noqa: E731
    list(walk(model, lines, [batch], [0.0], take, lambda one, x: one(x)))
    assert seen == [[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 4.0]]]


def test_the_model_is_left_as_it_was():
    model = llama().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: one.requires_grad for name, one in model.named_parameters()}
    layer = model.model.layers[0].mlp.up_proj
    for _ in walk(model, {"up": line(layer, layer.weight + 1)}, [{"input_ids": tokens()}], [1.0], print):
        assert not model.training
    assert model.training
    assert "forward" not in layer.__dict__
    assert {name: one.requires_grad for name, one in model.named_parameters()} == before
    assert all(one.grad is None for one in model.parameters())


def test_tokens_that_a_mask_hides_are_not_predicted():
    model, ids = llama(), tokens(1, 9)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    hidden = model_loss(model, {"input_ids": ids, "attention_mask": mask})
    assert torch.allclose(hidden, model_loss(model, {"input_ids": ids[:, :6]}), atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda model, batch: torch.tensor(float("nan")), "NaN or infinite"),
        (lambda model, batch: torch.tensor(1.0), "computed from the model's layers"),
    ],
)
def test_a_loss_of_no_use_is_refused(loss, words):
    model = Squares()
    lines = {"layer": line(model.layer, torch.zeros(2, 2))}
    with pytest.raises(ValueError, match=words):
        list(walk(model, lines, [torch.ones(1, 2)], [0.5], print, loss))
    assert "forward" not in model.layer.__dict__


def test_places_of_a_rule():
    assert places(4) == [0.125, 0.375, 0.625, 0.875]
    assert places(2, "left") == [0.0, 0.5]
    assert places(2, "right") == [0.5, 1.0]
