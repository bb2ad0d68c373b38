import pytest

pytest.importorskip("matplotlib", reason="needs the extra: pip install -e '.[evaluate]'")

from svdq_hf.evaluation.report.drawing import svg
from svdq_hf.evaluation.sensitivity_picture import by_place, sensitivity_picture

COSTS = {"model.layers.0.q": 0.1, "model.layers.0.up": -0.2, "model.layers.1.q": 0.3, "model.pool": 0.4}


def test_a_name_is_split_at_its_first_number():
    rows, columns, found = by_place(COSTS)
    assert rows == ["layers.0", "layers.1", ""]
    assert columns == ["q", "up", "pool"]
    assert found == {
        ("layers.0", "q"): 0.1,
        ("layers.0", "up"): -0.2,
        ("layers.1", "q"): 0.3,
        ("", "pool"): 0.4,
    }


def test_experts_of_one_kind_are_added_up():
    costs = {f"layers.0.experts.{number}.up": 1.0 for number in range(3)}
    rows, columns, found = by_place({**costs, "layers.1.up": 1.0})
    assert (rows, columns) == (["0", "1"], ["experts.*.up", "up"])
    assert found["0", "experts.*.up"] == 3.0


def test_a_square_for_each_matrix_and_the_same_bytes_again():
    figure = sensitivity_picture(COSTS)
    (mesh,) = figure.axes[0].collections
    values = mesh.get_array()
    assert values.shape == (3, 3)
    assert float(values[1, 0]) == 0.3
    assert bool(values.mask[0, 2])  # a layer without this kind stays blank
    assert mesh.get_clim() == (-0.4, 0.4)
    assert svg(figure) == svg(sensitivity_picture(COSTS))


def test_a_deep_model_has_few_enough_labels():
    figure = sensitivity_picture({f"h.{layer}.up": float(layer) for layer in range(96)})
    assert len(figure.axes[0].get_yticks()) <= 48


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="one layer or more"):
        sensitivity_picture({})
