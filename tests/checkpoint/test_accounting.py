"""Every tensor of a model's files is in what is written of it, or it is named; else nothing is written."""

import json
from functools import partial
from pathlib import Path

import pytest
import tiny_experts
import tiny_models as tiny
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from streamed import edit_config, edit_tensors
from tiny_models import bert, bert_config, classifier, llama, t5

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.checkpoint import Source, estimate_checkpoint, export_dense, quantize_checkpoint
from svdq_hf.cli.command import main
from svdq_hf.hub.push import push_model
from svdq_hf.integrations.transformers import patches

FAMILIES = {name: family.build for name, family in tiny.FAMILIES.items()} | {
    name: partial(tiny_experts.build, name) for name in tiny_experts.FAMILIES
}
CONFIG = SVDQConfig(k=4)
IN_MEMORY = SVDQConfig(k=4, error_feedback="synthetic")
UNUSABLE = [None, [], "LlamaForCausalLM", ["Nope"], ["LLaMAForCausalLM"], [7]]


def names(folder: Path) -> set[str]:
    """Names of all tensors of a folder."""
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def saved(model: torch.nn.Module, folder: Path, **config: object) -> Path:
    model.save_pretrained(folder)
    if config:
        edit_config(folder, **config)
    return folder


@pytest.mark.parametrize("config", [CONFIG, IN_MEMORY], ids=["streamed", "in memory"])
@pytest.mark.parametrize("architectures", UNUSABLE)
def test_a_head_is_kept_where_config_json_names_no_class(architectures, config, tmp_path):
    source = saved(llama(), tmp_path / "dense", architectures=architectures)
    quantize_checkpoint(source, tmp_path / "out", config)
    assert names(source) <= names(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("architectures", UNUSABLE)
def test_export_keeps_it_too(architectures, tmp_path):
    quantize_model(llama(), CONFIG).save_pretrained(tmp_path / "quantized")
    edit_config(tmp_path / "quantized", architectures=architectures)
    export_dense(tmp_path / "quantized", tmp_path / "out")
    assert names(tmp_path / "out") == set(llama().state_dict())


@pytest.mark.parametrize(
    "build",
    [llama, lambda: llama(tie_word_embeddings=True), classifier, bert, t5, tiny.mixtral],
    ids=["head", "tied head", "classifier", "no head", "two stacks", "experts"],
)
def test_the_class_is_found_by_the_tensors(build, tmp_path):
    model = build()
    source = saved(model, tmp_path / "dense", architectures=None)
    found = Source.resolve(source)
    found.check()
    assert type(found.empty) is type(model) or not {*found.empty.state_dict()} ^ {*model.state_dict()}


def test_of_a_class_that_lacks_them_tensors_are_named_and_the_class_that_has_them(tmp_path, capsys):
    source = saved(classifier(), tmp_path / "dense", architectures=["BertModel"])
    words = (
        f"{source}: classifier.bias, classifier.weight are in its files and would not be in the output: "
        'BertModel has no place for that; write ["BertForSequenceClassification"] as "architectures" into '
        "config.json, or leave it out by name: --drop classifier"
    )
    for more in ([], ["--dry-run"], ["--error-feedback", "synthetic"]):
        assert main(["quantize", str(source), str(tmp_path / "out"), *more]) == 1
        assert words in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("config", [CONFIG, IN_MEMORY], ids=["streamed", "in memory"])
def test_a_stray_tensor_is_refused_and_dropped_by_name(config, tmp_path, caplog):
    source = saved(classifier(), tmp_path / "dense")
    edit_tensors(source, lambda tensors: tensors.update({"stray.weight": torch.ones(3)}))
    with pytest.raises(ValueError, match=r"stray\.weight is in its files .* --drop stray "):
        quantize_checkpoint(source, tmp_path / "out", config)
    with pytest.raises(ValueError, match="drop='strange' fits no tensor that the model has no place for"):
        quantize_checkpoint(Source.resolve(source, drop=["stray", "strange"]), tmp_path / "out", config)
    quantize_checkpoint(Source.resolve(source, drop=["stray"]), tmp_path / "out", config)
    assert names(tmp_path / "out") >= names(source) - {"stray.weight"}
    assert "stray.weight is in its files and not in the output: you have asked to drop" in caplog.text


def test_the_command_line_drops_by_name_in_both_commands(tmp_path, capsys):
    source = saved(classifier(), tmp_path / "dense")
    edit_tensors(source, lambda tensors: tensors.update({"stray.weight": torch.ones(3)}))
    assert main(["quantize", str(source), str(tmp_path / "out"), "--drop", "stray", "--json"]) == 0
    edit_tensors(tmp_path / "out", lambda tensors: tensors.update({"other": torch.ones(3)}))
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "again")]) == 1
    assert "other is in its files and would not be in the output" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "again"), "--drop", "oth*"]) == 0
    assert names(tmp_path / "again") == names(source) - {"stray.weight"}


def test_what_a_class_is_known_to_leave_out_is_told(tmp_path, caplog):
    source = saved(bert(), tmp_path / "dense", architectures=["BertModel"])
    old = "embeddings.position_ids"  # a buffer that the class computes: nothing is lost, and nothing told
    edit_tensors(source, lambda tensors: tensors.update({old: torch.arange(40).unsqueeze(0)}))
    quantize_checkpoint(source, tmp_path / "out", CONFIG)
    assert "not in the output" not in caplog.text
    deberta = saved(tiny.deberta1(), tmp_path / "deberta")
    edit_tensors(deberta, lambda tensors: tensors.update({"encoder.position_embeddings": torch.ones(2)}))
    quantize_checkpoint(deberta, tmp_path / "deberta-out", CONFIG)
    assert "encoder.position_embeddings is in its files and not in the output: DebertaModel leaves out" in (
        caplog.text
    )


def test_tied_tensors_that_differ_are_both_written(tmp_path):
    source = saved(llama(tie_word_embeddings=True), tmp_path / "dense")
    edit_tensors(source, lambda tensors: tensors.update({"lm_head.weight": torch.ones(96, 64)}))
    quantize_checkpoint(source, tmp_path / "out", CONFIG)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], torch.ones(96, 64))
    assert torch.equal(
        written["model.embed_tokens.weight"],
        load_file(source / "model.safetensors")["model.embed_tokens.weight"],
    )


@pytest.mark.slow
@pytest.mark.parametrize("architectures", [None, "kept"])
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_of_any_family_is_lost_there_and_back(name, architectures, tmp_path):
    source = saved(FAMILIES[name](), tmp_path / "dense")
    if architectures is None:
        edit_config(source, architectures=None)
    quantize_checkpoint(source, tmp_path / "out", CONFIG)
    if architectures is None:
        edit_config(tmp_path / "out", architectures=None)
    export_dense(tmp_path / "out", tmp_path / "again", "float32")
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "again" / "model.safetensors"),
    )
    assert {name: one.shape for name, one in after.items()} == {
        name: one.shape for name, one in before.items()
    }


def test_a_written_folder_that_lacks_a_tensor_is_thrown_away(tmp_path, monkeypatch):
    source = saved(llama(), tmp_path / "dense")
    patches.apply()  # before the one below, which would else be replaced
    real = hf.PreTrainedModel.save_pretrained

    def forgetful(self, folder, **choices):
        real(self, folder, **choices)
        tensors = load_file(Path(folder, "model.safetensors"))
        del tensors["model.norm.weight"]
        save_file(tensors, Path(folder, "model.safetensors"), {"format": "pt"})

    monkeypatch.setattr(hf.PreTrainedModel, "save_pretrained", forgetful)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is in its files and not in what was written"):
        quantize_checkpoint(source, tmp_path / "out", IN_MEMORY)
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]
    with pytest.raises(ValueError, match="a tensor is lost, and nothing was pushed"):
        push_model(quantize_model(llama(), CONFIG), "alice/model")


def test_a_source_is_looked_at_once(tmp_path, monkeypatch):
    import svdq_hf.checkpoint.class_choice
    import svdq_hf.checkpoint.source
    from svdq_hf.checkpoint.quantize import check_names, quantize_source

    folder, counts = saved(llama(), tmp_path / "dense"), {"built": 0, "local_folder": 0, "tensor_places": 0}

    def counted(name):
        real = getattr(svdq_hf.checkpoint.source, name)

        def count(*arguments):
            counts[name] += 1
            return real(*arguments)

        return count

    for name in counts:
        monkeypatch.setattr(svdq_hf.checkpoint.source, name, counted(name))
    source = Source.resolve(folder)
    config = SVDQConfig(k=4, modules_to_not_convert=["down_proj"])
    check_names(source, config)
    estimate_checkpoint(source, tmp_path / "out", config)
    result = quantize_source(source, tmp_path / "out", config)
    assert counts == {"built": 1, "local_folder": 1, "tensor_places": 1}
    assert result.dense == ("lm_head", "model.layers.*.mlp.down_proj x 2")
    assert result.bytes_before == (folder / "model.safetensors").stat().st_size
    assert result.bytes_after == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert "`model.layers.*.mlp.down_proj` x 2" in (tmp_path / "out" / "README.md").read_text()


def test_code_of_a_models_author_is_not_run_and_the_remedy_is_python(tmp_path, capsys):
    source = saved(bert(), tmp_path / "dense")
    edit_config(
        source, model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.Evil"}
    )
    (source / "evil.py").write_text("raise SystemExit('it ran')")
    assert main(["quantize", str(source), str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert (
        "which svdq does not run; if you trust it, load the model in Python with trust_remote_code=True"
        in told
    )
    assert "--trust-remote-code" not in told


def test_other_weights_are_refused_with_a_remedy(tmp_path, capsys):
    source = saved(bert(), tmp_path / "dense")
    (source / "model.safetensors").rename(source / "model.fp16.safetensors")
    assert main(["quantize", str(source), str(tmp_path / "out")]) == 1
    assert 'from_pretrained(folder, variant="fp16"), and save it again' in capsys.readouterr().err
    (source / "model.fp16.safetensors").rename(source / "pytorch_model.bin")
    assert main(["quantize", str(source), str(tmp_path / "out")]) == 1
    assert "load the model in Python and save it again, which writes safetensors" in capsys.readouterr().err


def test_bert_masked_with_a_leftover_names_it(tmp_path):
    source = saved(hf.BertForMaskedLM(bert_config()), tmp_path / "dense")
    edit_tensors(source, lambda tensors: tensors.update({"cls.seq_relationship.bias": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"--drop cls\.seq_relationship \(in Python"):
        quantize_checkpoint(source, tmp_path / "out", CONFIG)
