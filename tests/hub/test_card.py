import json
import logging
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny_models import FAMILIES, bert, classifier, llama, short_name, t5
from transformers import LlamaForCausalLM, PreTrainedModel

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.core.saliency import FROM_DATA
from svdq_hf.format.metadata import tags
from svdq_hf.hub import card_facts
from svdq_hf.hub.card import CardResult, model_card, write_card
from svdq_hf.hub.readme import BEGIN, END, base_metadata, merge, metadata_of, own_text, read_text, section_of
from svdq_hf.hub.usage import auto_class
from svdq_hf.quantize.footprint import read_footprint

BASE = """---
license: other
license_name: llama
license_link: LICENSE
language: [en, de]
pipeline_tag: text-generation
library_name: sentence-transformers
datasets: [glue]
tags: [theirs]
---
# The base model
"""
ACCURACY = CardResult("text-classification", "glue/sst2", "accuracy", 0.91)


def saved(model: PreTrainedModel, folder: Path, **choices: object) -> Path:
    quantize_model(model, SVDQConfig(**{"k": 16, **choices}))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(llama(), tmp_path / "quantized", rank=4, group_size=32)


def rows(card: str) -> dict[str, str]:
    """The first table of a card: left column -> right column."""
    lines = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {line[0]: line[1] for line in lines if len(line) == 2}


def test_metadata_of_a_hub_model_are_its_own_and_its_base_s(folder):
    metadata = ModelCard(model_card(folder, base_model="org/llama", base_card=BASE)).data.to_dict()
    assert metadata == {
        "library_name": "transformers",
        "base_model": "org/llama",
        "base_model_relation": "quantized",
        "license": "other",
        "license_name": "llama",  # its link is a file that only the base's repository has
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "tags": tags(),
    }


@pytest.mark.parametrize("bits", [3, 8])
def test_other_bits_are_said_in_the_tags_and_the_text(bits, tmp_path):
    folder = saved(llama(), tmp_path / "quantized", bits=bits)
    card = model_card(folder)
    assert metadata_of(card)["tags"] == tags(bits) == ["svdq", f"{bits}-bit", "quantized", "mixed-precision"]
    assert f"## {bits}-bit weights" in card
    assert f"the rest in {bits} bits" in card
    assert "4-bit" not in card
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.model_tags == tags(bits)
    assert model.dequantize().model_tags == []


def test_nothing_is_invented(folder):
    assert metadata_of(model_card(folder)) == {"library_name": "transformers", "tags": tags()}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nbase_model: org/base\nlicense: mit\n---\n", {"base_model": "org/base", "license": "mit"}),
        (
            "---\nbase_model: [org/base]\nbase_model_relation: quantized\n---\n",
            {"base_model": ["org/base"], "base_model_relation": "quantized"},
        ),
        ("no metadata", {}),
        ("---\nlicense: {a: b}\nlanguage: no\npipeline_tag: 3\nbase_model: []\n---\n", {}),
        (
            "---\nlicense: other\nlicense_link: https://a.org/l\n---\n",
            {"license": "other", "license_link": "https://a.org/l"},
        ),
    ],
)
def test_local_base_folder_gives_what_its_card_says(card, expected):
    assert base_metadata(card, None) == expected


def test_broken_card_of_the_base_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert base_metadata("---\na: [\n---\n", "org/base") == {
            "base_model": "org/base",
            "base_model_relation": "quantized",
        }
    assert "the base model's card is left out" in caplog.text


def test_body_tells_how_to_load_and_what_was_done(folder):
    card = model_card(folder, base_model="org/llama", repo_id="me/small")
    assert "pip install -e .  # in a checkout of svdq_hf 0.1.0 or newer" in card
    assert "import svdq_hf " in card
    assert 'AutoModelForCausalLM.from_pretrained("me/small")' in card
    weights = read_footprint(folder)
    errors = {layer.name: layer.facts["relative_error"] for layer in weights.layers}
    worst = max(errors, key=errors.__getitem__)
    parameters = sum(parameter.numel() for parameter in llama().parameters())
    assert rows(card) == {
        "---": "---",
        "base model": "`org/llama`",
        "size": f"{weights.total_bytes / 1e6:.1f} MB",
        "layers quantized": f"14, of {weights.weights:,} weights",
        "k, weights in FP32": f"16 per layer, {weights.salient_share:.3%} of all",
        "score": "`svd`, rank 4",
        "scales": "one per 32 columns, in 8 bits, mse; one per column",
        "levels": "normal",
        "data": "none",
        "bits per weight": f"{weights.bits_per_weight:.2f} in these layers, everything counted",
        "parameters": f"{parameters:,} (the Hub counts packed bytes)",
        "relative error": f"mean {sum(errors.values()) / 14:.4f}, worst {errors[worst]:.4f} (`{worst}`)",
        "linear layers kept dense": "`lm_head`",
    }


def test_rank_is_told_of_a_score_that_has_one(tmp_path):
    assert rows(model_card(saved(llama(), tmp_path / "a", saliency="magnitude")))["score"] == "`magnitude`"


def test_layers_kept_dense_are_named_once_for_all_numbers(tmp_path):
    card = model_card(saved(t5(), tmp_path / "t5"))
    assert rows(card)["linear layers kept dense"] == (
        "`decoder.block.*.layer.*.DenseReluDense.wo` x 2, `encoder.block.*.layer.*.DenseReluDense.wo` x 2, "
        "`lm_head`"
    )


@pytest.mark.parametrize(
    ("build", "auto"), [(bert, "AutoModel"), (classifier, "AutoModelForSequenceClassification")]
)
def test_card_names_the_auto_class_that_loads_the_saved_architecture(build, auto, tmp_path):
    assert f"{auto}.from_pretrained(" in model_card(saved(build(), tmp_path / "model"))


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("MixtralForCausalLM", "AutoModelForCausalLM"),
        ("WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("BertForPreTraining", "BertForPreTraining"),
        ("os.system", "AutoModel"),
    ],
)
def test_auto_class(architecture, name):
    assert auto_class(architecture) == name


def test_evaluation_is_a_table_and_model_index(folder):
    card = model_card(folder, base_model="org/llama", results=[ACCURACY])
    assert "| text-classification | glue/sst2 | accuracy | 0.91 |" in card
    (result,) = ModelCard(card).data.eval_results
    assert (result.task_type, result.dataset_type, result.metric_type) == ACCURACY[:3]
    assert result.metric_value == 0.91
    assert metadata_of(card)["model-index"][0]["name"] == "llama-svdq"
    with pytest.raises(ValueError, match="must be a finite number"):
        model_card(folder, results=[ACCURACY._replace(value=float("nan"))])


def test_names_of_strangers_cannot_break_out_of_the_section(folder):
    nasty = f"a|b`{END}\n---\n<script>"
    stated = f"---\n{yaml.safe_dump({'base_model': nasty})}---\n"
    card = model_card(folder, base_card=stated, results=[CardResult(nasty, nasty, nasty, 1.0)])
    assert (card.count(BEGIN), section_of(card).count("<")) == (1, 0)
    assert metadata_of(card)["base_model"] == nasty  # YAML quotes it
    assert own_text(card) == ""


def test_a_second_card_replaces_only_the_section(folder):
    file = folder / "README.md"
    write_card(folder)
    first = read_text(file)
    file.write_bytes(first.replace("---\n\n<!--", "license: mit # mine\n---\n\nMy text.\n\n<!--").encode())
    before = read_text(file)
    write_card(folder, results=[ACCURACY], base_card="---\nlicense: apache-2.0\nlanguage: en\n---\n")
    after = read_text(file)
    assert "license: mit # mine\n" in after
    assert metadata_of(after).keys() == {"library_name", "tags", "license", "language", "model-index"}
    assert (own_text(before), own_text(after)) == ("My text.", "My text.")
    assert "## Evaluation" in section_of(after)
    write_card(folder, results=[ACCURACY._replace(value=0.5)])
    (result,) = ModelCard(read_text(file)).data.eval_results
    assert result.metric_value == 0.5


def test_result_of_another_is_kept_in_model_index(folder):
    theirs = model_card(folder, results=[ACCURACY._replace(metric="f1")])
    both = model_card(folder, results=[ACCURACY], existing=theirs)
    assert [one.metric_type for one in ModelCard(both).data.eval_results] == ["f1", "accuracy"]


@pytest.mark.parametrize(
    "text",
    [
        "# Title\n\ntext without end of line",
        "# Title\r\n\r\nlines of Windows\r\n",
        "---\n# a comment\nlicense:   mit\n---\n\n# Title \n",
        "---\r\nlicense: mit\r\n---\r\n\r\n# Title\r\n",
        "---\n---\nempty metadata",
        "\n---\nlicense: mit\n---  \nspaces around",
        "---\nlicense: mit\n",
        "text\n---\nnot: metadata\n---\n",
        "😀 ünïcödé\n",
        "",
    ],
)
def test_text_of_another_hand_is_kept_whole(text):
    result = merge(text, {"license": "apache-2.0", "tags": ["svdq"]}, "ours\nlines")
    old = metadata_of(text)
    head = len(text) if not old else text.index("mit") + 3
    assert text[:head].strip() in result
    assert text[head:].strip() in result
    assert metadata_of(result) == {"license": "apache-2.0", "tags": ["svdq"], **old}
    assert section_of(result).splitlines() == ["ours", "lines"]
    assert ("\r\n" in result) == ("\r\n" in text)
    assert result.replace("\r\n", "").count("\r") == 0
    assert merge(result, {"license": "x"}, "ours\nlines") == result  # nothing is left to do


BOMB = "a: &a [x,x]\n" + "".join(f"{two}: &{two} [*{one},*{one}]\n" for one, two in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    "metadata",
    [
        "a: [",
        "- list",
        "just text",
        "a: !!python/object/apply:os.system [ls]",
        "[" * 5000,
        "a: b: c",
        "\tx: y",
    ],
)
def test_metadata_that_cannot_be_read_are_refused_and_the_file_untouched(metadata, folder):
    file = folder / "README.md"
    file.write_text(f"---\n{metadata}\n---\ntext")
    with pytest.raises(ValueError, match=r"README.md: the metadata .* cannot be read .*repair or remove"):
        write_card(folder)
    assert file.read_text() == f"---\n{metadata}\n---\ntext"


@pytest.mark.parametrize("metadata", ["{license: mit}", "license: mit\n..."])
def test_metadata_to_which_nothing_can_be_added_are_refused(metadata):
    with pytest.raises(ValueError, match=r"README.md: "):
        merge(f"---\n{metadata}\n---\ntext", {"tags": ["svdq"]}, "ours")


@pytest.mark.parametrize("index", ["5", "[x]", "{a: b}", "[{name: x, results: [{task: t}]}]"])
def test_model_index_that_cannot_be_read_is_refused(index, folder):
    text = f"---\nmodel-index: {index}\n---\n"
    with pytest.raises(ValueError, match="its model-index cannot be read"):
        model_card(folder, results=[ACCURACY], existing=text)
    assert metadata_of(model_card(folder, existing=text))["model-index"] == yaml.safe_load(index)


def test_aliases_that_explode_do_not():
    result = merge(f"---\n{BOMB}---\n", {"license": "mit"}, "ours")
    assert BOMB in result
    assert metadata_of(result)["license"] == "mit"


@pytest.mark.parametrize("text", [BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}{END}" * 2, f"{BEGIN}{BEGIN}{END}"])
def test_half_a_pair_of_comments_is_refused(text):
    with pytest.raises(ValueError, match=r"restore the pair, or remove what is left"):
        merge(text, {}, "ours")


def test_comments_in_the_metadata_are_text():
    result = merge(f"---\na: '{BEGIN}'\n---\n", {}, "ours")
    assert metadata_of(result) == {"a": BEGIN}
    assert section_of(result) == "ours"


def test_readme_that_is_no_text_is_refused(folder):
    (folder / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        write_card(folder)
    assert read_text(folder / "README.md", "replace")


@pytest.mark.parametrize("config", ["{}", "[]", "{", '{"quantization_config": 3}'])
def test_folder_without_a_quantized_config_is_refused(config, folder):
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"its config\.json is not that of a quantized model"):
        model_card(folder)


def test_model_that_transformers_does_not_know_has_no_row_of_dense_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MyModel"]}))
    assert "linear layers kept dense" not in rows(model_card(folder))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine"}))
    assert "linear layers kept dense" not in rows(model_card(folder))


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "clip", "vit", "whisper"])
def test_names_of_dense_layers_and_numbers_are_right_in_every_family(family, tmp_path):
    model = FAMILIES[family].build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    card = rows(model_card(saved(model, tmp_path / family)))
    assert card["parameters"] == f"{parameters:,} (the Hub counts packed bytes)"
    quantized = sum(FAMILIES[family].quantized.values())
    assert card["layers quantized"].startswith(f"{quantized}, of ")
    dense = Counter()
    for cell in card["linear layers kept dense"].replace("none", "").split(", "):
        name, _, count = cell.replace("`", "").partition(" x ")
        dense[short_name(name.replace("*", "0"))] += int(count or 1)
    assert {name: count for name, count in dense.items() if name} == FAMILIES[family].dense


def test_size_before_and_after_is_told_where_it_is_known(folder):
    assert rows(model_card(folder, bytes_before=2_500_000))["size"].startswith("2.5 MB before, ")
    (folder / "svdq_report.json").write_text('{"bytes_before": 3000000}')
    try:
        assert rows(model_card(folder))["size"].startswith("3.0 MB before, ")
        (folder / "svdq_report.json").write_text('{"bytes_before": "x"}')
        assert "before" not in rows(model_card(folder))["size"]
    finally:
        (folder / "svdq_report.json").unlink()


@pytest.mark.parametrize("name", ["./folder", "/abs/folder", "a/b/c", "~/model", ""])
def test_a_folder_is_no_base_model(name, folder):
    with pytest.raises(ValueError, match=r"must be a name on the Hub, user/model"):
        model_card(folder, base_model=name)


def test_a_base_model_that_the_card_contradicts_is_refused(folder):
    existing = "---\nbase_model: org/one\n---\n"
    with pytest.raises(ValueError, match=r"README.md has base_model: org/one, not org/two; change it there"):
        model_card(folder, existing=existing, base_model="org/two")


def test_every_need_of_data_has_words_in_a_card():
    assert card_facts.DATA_TELLS.keys() == {*FROM_DATA}
