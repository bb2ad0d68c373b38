"""Spectral decay in a loop of one's own: which layers, which gradient, and that it can be resumed."""

import copy

import pytest
import tiny_models as tiny
import torch
from torch import nn

from svdq_hf import SpectralDecay


def spiked(size=384, spike=30.0):
    """A layer with one singular value of `spike`, which one output of it shows, and its inputs."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, size, generator=generator)
    left[0] += 10 * left.norm() / size**0.5
    left, right = left / left.norm(), right / right.norm()
    model = nn.Sequential(nn.Linear(size, size))
    model[0].bias.data.zero_()
    noise = 0.05 * torch.randn(size, size, generator=generator)
    model[0].weight.data = spike * left.outer(right) + noise
    return model, torch.randn(64, size, generator=generator) + 5 * right


def passed(model, x):
    """A pass whose own gradient is zero."""
    (model(x) * 0).sum().backward()


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_hundred_steps_take_the_spike_down_and_leave_the_rest(optimizer):
    model, x = spiked()
    before = torch.linalg.svdvals(model[0].weight.detach())
    decay, optimizer = SpectralDecay(model), OPTIMIZERS[optimizer](model.parameters())
    for _ in range(100):
        passed(model, x)
        decay.step()
        optimizer.step()
        optimizer.zero_grad()
    after = torch.linalg.svdvals(model[0].weight.detach())
    assert after[0] < 0.9 * before[0]
    assert float(after[9]) == pytest.approx(float(before[9]), rel=0.01)
    assert decay.flagged["0"].count == 1
    assert decay.decompositions == {"0": 1}


def test_a_decomposition_each_hundred_steps():
    model, x = spiked(16)
    decay = SpectralDecay(model)
    for _ in range(300):
        passed(model, x)
        decay.step()
    assert decay.decompositions == {"0": 3}


@pytest.mark.parametrize("power", [1, 2])
def test_the_gradient_in_training_is_that_of_autograd(power):
    model, x = spiked(320)
    decay = SpectralDecay(model, power=power)
    passed(model, x)
    decay.step()
    weight = model[0].weight.detach().double().requires_grad_()
    (5e-4 / (power + 1) * torch.linalg.svdvals(weight)[0] ** (power + 1)).backward()
    assert (model[0].weight.grad - weight.grad).norm() < 1e-4 * weight.grad.norm()


def test_with_power_1_and_all_values_it_is_weight_decay():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 12)), torch.randn(8, 16)
    decay = SpectralDecay(model, strength=0.1, power=1, tau=1.0, k_max=16)
    passed(model, x)
    decay.step()
    torch.testing.assert_close(model[0].weight.grad, 0.1 * model[0].weight.detach())
    norm = model[0].weight.detach().square().sum()
    assert decay.penalty == pytest.approx(0.05 * norm.item(), rel=1e-5)


def test_a_layer_without_outliers_is_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    decay = SpectralDecay(model)
    passed(model, torch.randn(32, 64))
    decay.step()
    assert decay.flagged == {}
    assert decay.penalty == 0
    assert not model[0].weight.grad.any()
    assert 0 < decay.spectra["0"].shares[-1] < 0.95


def test_gradients_that_are_scaled_get_a_scaled_share():
    (one, x), (other, _) = spiked(32), spiked(32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    decays = SpectralDecay(one), SpectralDecay(other)
    one(x).square().mean().backward()
    decays[0].step()
    scaler.scale(other(x).square().mean()).backward()
    decays[1].step(scaler.get_scale())
    scaler.unscale_(optimizer)
    torch.testing.assert_close(other[0].weight.grad, one[0].weight.grad)


def test_batches_that_are_accumulated_get_one_share():
    model, x = spiked(32)
    decay = SpectralDecay(model)
    for part in x.chunk(4):
        model(part).square().mean().backward()
    task = model[0].weight.grad.clone()
    decay.step()
    assert decay.steps == 1
    u, s, vt = torch.linalg.svd(model[0].weight.detach())
    expected = 5e-4 * s[0] ** 2 * u[:, :1] @ vt[:1]
    torch.testing.assert_close(model[0].weight.grad - task, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_keep_theirs(dtype):
    model, x = spiked(32)
    model, x = model.to(dtype), x.to(dtype)
    decay = SpectralDecay(model)
    passed(model, x)
    decay.step()
    assert model[0].weight.grad.dtype == dtype
    assert decay.flagged["0"].count == 1


def test_under_autocast_the_decomposition_is_exact():
    model, x = spiked(32)
    decay = SpectralDecay(model)
    with torch.autocast("cpu", torch.bfloat16):
        passed(model, x)
        decay.step()
    largest = torch.linalg.svdvals(model[0].weight.detach())[0]
    assert float(decay.spectra["0"].values[0]) == pytest.approx(float(largest), rel=1e-5)


def classifier_run(model, decay, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(1, 90, (2, 7), generator=generator)
        out = model(input_ids=ids, labels=torch.tensor([0, 2]))
        out.loss.backward()
        decay.step()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_resumed_training_is_that_in_one_go_bit_for_bit(stop):
    def started(model):
        return SpectralDecay(model, tau=0.3, every=3), torch.optim.AdamW(model.parameters(), lr=1e-3)

    whole = tiny.classifier().eval()
    halved = copy.deepcopy(whole)
    classifier_run(whole, *started(whole), range(8))
    decay, optimizer = started(halved)
    classifier_run(halved, decay, optimizer, range(stop))
    state = copy.deepcopy((decay.state_dict(), optimizer.state_dict(), halved.state_dict()))
    fresh = tiny.classifier().eval()
    fresh.load_state_dict(state[2])
    decay, optimizer = started(fresh)
    decay.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    classifier_run(fresh, decay, optimizer, range(stop, 8))
    assert decay.flagged
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


def test_a_state_of_another_model_is_refused():
    (model, x), other = spiked(16), nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    decay = SpectralDecay(model)
    passed(model, x)
    decay.step()
    with pytest.raises(ValueError, match="that of other layers: 0, 1"):
        SpectralDecay(other).load_state_dict(decay.state_dict())


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"strength": -1.0}, "strength=-1.0, power=2"),
        ({"power": 0.5}, "power=0.5"),
        ({"tau": 1.5}, "tau=1.5: must be from 0"),
        ({"k_max": 0}, "k_max=0"),
        ({"every": 0}, "every=0: must be 1 or more"),
        ({"every": "often"}, "every='often' is a str"),
        ({"layers": "0"}, "a list of names"),
        ({"layers": ["fc9"]}, "layers: 'fc9' matches no linear layer that trains, such as 0"),
    ],
)
def test_impossible_choices_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        SpectralDecay(nn.Sequential(nn.Linear(4, 4)), **choices)


def test_a_step_without_a_pass_is_refused():
    with pytest.raises(ValueError, match="no forward pass in training was seen"):
        SpectralDecay(nn.Sequential(nn.Linear(4, 4))).step()


def test_the_model_is_without_hooks_between_decompositions_and_in_the_end():
    model, x = spiked(16)
    decay = SpectralDecay(model, every=2)
    assert model[0]._forward_hooks
    passed(model, x)
    decay.step()
    assert not model[0]._forward_hooks
    passed(model, x)
    decay.step()
    assert model[0]._forward_hooks
    decay.close()
    assert not model[0]._forward_hooks
