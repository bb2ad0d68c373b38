"""Tasks: loss, flips and metrics of classifiers, and regressions, which have no answers to flip."""

import json

import letters
import pytest
import torch
from letters import KINDS

from svdq_hf.evaluation import compare
from svdq_hf.evaluation.comparison.answers import Reference
from svdq_hf.evaluation.comparison.classifier import TaskExamples
from svdq_hf.evaluation.comparison.result import Flips, quality_of
from svdq_hf.evaluation.tasks.classification import Score

ROWS = [("the fox", "a dog", 0), ("it runs", "it stays", 1), ("so", "not so", 1), ("we go", "you go", 0)]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "rte").mkdir()
    rows = [{"sentence1": a, "sentence2": b, "label": label} for a, b, label in ROWS]
    (tmp_path / "rte" / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def classifier(folder, labels, seed):
    torch.manual_seed(seed)
    model_class, config = KINDS["labels"]
    told = config()
    told.num_labels = labels
    model_class(told).save_pretrained(folder)
    letters.tokenizer(ends=True).save_pretrained(folder)
    return folder


def test_two_classifiers_on_a_task(data, tmp_path):
    first, second = (classifier(tmp_path / name, 2, seed) for seed, name in enumerate(("a", "b")))
    result = compare(first, second, task="rte", data=data, speed=False)
    (found,) = result.others
    assert (result.counted, result.n, result.measured_on) == ("answers", 4, "rte")
    quality, before = found.quality, result.reference.quality
    assert quality.metrics == {"accuracy": quality.right}
    flips = quality.flips
    assert quality.right - before.right == (flips.gained - flips.lost) / 4
    assert flips.changed == 4 - round(4 * quality.same.value)
    assert f"{flips.changed} answers changed ({flips.lost} right to wrong" in found.verdict
    with pytest.raises(ValueError, match="c: it has 3 labels, and rte has 2"):
        compare(classifier(tmp_path / "c", 3, 0), second, task="rte", data=data, speed=False)


def told(measure, logits, labels):
    return measure._observed(Score(torch.tensor(logits), torch.tensor(labels)))


def test_flips_are_counted_by_hand(data, tmp_path):
    measure = TaskExamples("rte", letters.tokenizer(ends=True), data, Reference(tmp_path))
    labels = [0, 1, 1, 0]
    before = told(measure, [[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0]], labels)  # right: 1 1 0 0
    after = told(measure, [[0.0, 2.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]], labels)  # right: 0 1 1 0
    quality = quality_of(after, before)
    assert quality.flips == Flips(changed=2, lost=1, gained=1)
    assert quality.right == 0.5
    assert quality.change.value == pytest.approx(0, abs=1e-12)
    assert quality.metrics == {"accuracy": 0.5}


def test_a_regression_has_a_loss_and_metrics_only(tmp_path):
    (tmp_path / "stsb").mkdir()
    rows = [{"sentence1": "a b", "sentence2": "c", "label": float(label)} for label in (1, 2, 4)]
    (tmp_path / "stsb" / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    measure = TaskExamples("stsb", letters.tokenizer(ends=True), tmp_path, Reference(tmp_path))
    before = told(measure, [[1.0], [2.0], [4.0]], [1.0, 2.0, 4.0])
    after = told(measure, [[1.0], [2.0], [3.0]], [1.0, 2.0, 4.0])
    quality = quality_of(after, before)
    assert (quality.loss, quality.change.value) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert (quality.kl, quality.same, quality.flips) == (None, None, None)
    assert set(quality.metrics) == {"pearson", "spearmanr"}
