"""GGUF to GGUF: what is written loads, is near what was read, and else there is one line and no file."""

import json
import sys

import gguf
import numpy as np
import pytest
import tiny_gguf
import torch

from svdq_hf import quantize_gguf
from svdq_hf.cli import main
from svdq_hf.integrations.gguf.model_file import ModelFile

TOKENS = torch.arange(60).unsqueeze(0)


@pytest.fixture(scope="module")
def model():
    return tiny_gguf.llama()


@pytest.fixture
def source(model, tmp_path):
    return tiny_gguf.write(model, tmp_path / "f16.gguf", np.float16)


def distance(path, model):
    with torch.no_grad():
        expected = model(TOKENS).logits
    return float((tiny_gguf.logits(path, TOKENS) - expected).norm() / expected.norm())


def test_what_is_written_loads_and_scales_and_feedback_bring_it_nearer(source, model, tmp_path):
    choices = {"plain": {"column_scale": False}, "scaled": {}, "fed": {"error_feedback": True}}
    found = {}
    for name, chosen in choices.items():
        quantize_gguf(source, tmp_path / f"{name}.gguf", **chosen)
        found[name] = distance(tmp_path / f"{name}.gguf", model)
    assert found["fed"] < found["scaled"] < 0.8 * found["plain"]


@pytest.mark.parametrize("kind", [np.float32, np.float16, "BF16"], ids=["F32", "F16", "BF16"])
def test_types_and_sizes(model, kind, tmp_path):
    source = tiny_gguf.write(model, tmp_path / "in.gguf", kind)
    done = quantize_gguf(source, tmp_path / "out.gguf")
    assert done.types == {"IQ4_NL": 15, "F32": 5, "Q8_0": 1}  # 14 in layers and the embedding; norms; output
    assert (done.bytes_before, done.bytes_after) == (
        source.stat().st_size,
        (tmp_path / "out.gguf").stat().st_size,
    )
    before, after = (ModelFile(file, gguf.GGUFReader(file)) for file in (source, tmp_path / "out.gguf"))
    assert list(after.tensors) == list(before.tensors)
    assert all(after.shape(name) == before.shape(name) for name in before.tensors)


def test_metadata_is_copied_byte_by_byte_but_for_what_changes(model, tmp_path):
    source = tiny_gguf.write(model, tmp_path / "in.gguf", last_token=b"\xff\xfe", general_name="tiny")
    quantize_gguf(source, tmp_path / "out.gguf")
    before, after = (gguf.GGUFReader(file).fields for file in (source, tmp_path / "out.gguf"))
    changed = {"general.file_type": 25, "general.quantization_version": 2}
    assert {key: after[key].contents() for key in changed} == changed
    assert after["general.quantized_by"].contents().startswith("svdq_hf ")
    for key in before.keys() - changed.keys() - {"GGUF.kv_count"}:
        assert [bytes(part) for part in after[key].parts] == [bytes(part) for part in before[key].parts], key
    assert bytes(after["tokenizer.ggml.tokens"].parts[after["tokenizer.ggml.tokens"].data[-1]]) == b"\xff\xfe"


@pytest.mark.parametrize("alignment", [32, 256])
def test_tensors_stand_where_the_files_alignment_says(model, alignment, tmp_path):
    source = tiny_gguf.write(model, tmp_path / "in.gguf", alignment=alignment)
    quantize_gguf(source, tmp_path / "out.gguf", column_scale=False)
    tensors = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    assert all(one.data_offset % alignment == 0 for one in tensors)
    norms = [tiny_gguf.tensor(file, "output_norm.weight") for file in (source, tmp_path / "out.gguf")]
    assert torch.equal(*norms)


def test_a_tied_embedding_and_values_that_many_heads_share_have_more_bits(tmp_path):
    model = tiny_gguf.llama(num_key_value_heads=1, num_hidden_layers=8)
    source = tiny_gguf.write(model, tmp_path / "in.gguf", drop=["output.weight"])
    quantize_gguf(source, tmp_path / "out.gguf")
    types = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert types["token_embd.weight"] == "Q8_0"
    assert {types[f"blk.{layer}.attn_v.weight"] for layer in range(8)} == {"Q5_0"}
    assert [types[f"blk.{layer}.ffn_down.weight"] for layer in range(8)] == ["Q5_0"] + ["IQ4_NL"] * 7


def test_rows_that_are_no_multiple_of_32_and_unknown_tensors_are_copied(model, tmp_path):
    odd = {"blk.0.ffn_gate_inp.weight": torch.randn(4, 64), "rope_freqs.weight": torch.randn(8)}
    source = tiny_gguf.write(
        model, tmp_path / "in.gguf", add=odd | {"blk.0.attn_kv_b.weight": torch.randn(4, 40)}
    )
    quantize_gguf(source, tmp_path / "out.gguf")
    for name in [*odd, "blk.0.attn_kv_b.weight"]:
        same = [tiny_gguf.tensor(file, name) for file in (source, tmp_path / "out.gguf")]
        assert torch.equal(*same)


def test_experts_are_quantized_one_by_one(model, tmp_path):
    experts = torch.randn(3, 8, 64)
    source = tiny_gguf.write(model, tmp_path / "in.gguf", add={"blk.0.ffn_up_exps.weight": experts})
    quantize_gguf(source, tmp_path / "out.gguf")
    found = tiny_gguf.tensor(tmp_path / "out.gguf", "blk.0.ffn_up_exps.weight")
    assert found.shape == experts.shape
    assert (found - experts).norm() < 0.08 * experts.norm()


def _quantized(model, path):
    quantize_gguf(tiny_gguf.write(model, path.with_name("dense.gguf")), path)


def _truncated(model, path):
    whole = tiny_gguf.write(model, path.with_name("dense.gguf")).read_bytes()
    path.write_bytes(whole[:-1000])


def _cut_early(model, path):
    path.write_bytes(tiny_gguf.write(model, path.with_name("dense.gguf")).read_bytes()[:300])


def _nan(model, path):
    bad = torch.full((8, 64), torch.nan)
    tiny_gguf.write(model, path, add={"blk.0.ffn_up_exps.weight": bad})


WRONG = {
    "quantized already, token_embd.weight is IQ4_NL; take the file of F16": _quantized,
    "truncated or damaged": _truncated,
    "truncated or damaged (index": _cut_early,
    "ffn_up_exps.weight has a NaN": _nan,
    "not a GGUF file": lambda model, path: path.write_bytes(b"PK34" * 99),
    "not a GGUF file; llama.cpp's convert_hf_to_gguf.py": lambda model, path: path.write_bytes(b""),
    "is a folder, no GGUF file": lambda model, path: path.mkdir(),
    "no such file": lambda model, path: None,
    "one of 3 parts of a model; join them": lambda model, path: tiny_gguf.write(model, path, split_count=3),
    "holds no model (general.type is 'adapter')": lambda model, path: tiny_gguf.write(
        model, path, general_type="adapter"
    ),
    "none of its tensors is one that is quantized": lambda model, path: tiny_gguf.write(
        model, path, drop=tiny_gguf.MATRICES
    ),
}


@pytest.mark.parametrize("told", WRONG)
def test_a_wrong_file_is_one_line_that_names_it_and_nothing_is_written(model, told, tmp_path, capsys):
    work = tmp_path / "work"
    work.mkdir()
    WRONG[told](model, tmp_path / "in.gguf")
    assert main(["gguf", str(tmp_path / "in.gguf"), str(work / "out.gguf")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"svdq gguf: {tmp_path / 'in.gguf'}: ")
    assert told in error
    assert error.count("\n") == 1
    assert list(work.iterdir()) == []


def test_an_output_that_is_there_or_has_no_folder_is_refused_first(tmp_path, capsys):
    (tmp_path / "out.gguf").write_text("mine")
    assert main(["gguf", "none.gguf", str(tmp_path / "out.gguf")]) == 1
    assert "is there already; name another file or remove it" in capsys.readouterr().err
    assert (tmp_path / "out.gguf").read_text() == "mine"
    assert main(["gguf", "none.gguf", str(tmp_path / "no" / "out.gguf")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_without_the_package_gguf_the_error_says_what_to_install(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        quantize_gguf(source, tmp_path / "out.gguf")


def test_what_a_killed_run_left_is_replaced(source, tmp_path):
    (tmp_path / ".out.gguf.unfinished").write_text("half")
    quantize_gguf(source, tmp_path / "out.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f16.gguf", "out.gguf"]


def test_feedback_for_a_model_that_transformers_does_not_know_is_refused(model, tmp_path):
    source = tiny_gguf.write(model, tmp_path / "in.gguf", arch="plamo")
    with pytest.raises(ValueError, match=r"in.gguf: transformers cannot run it .*; leave error feedback out"):
        quantize_gguf(source, tmp_path / "out.gguf", error_feedback=True)


@pytest.mark.parametrize("command", ["quantize", "export"])
def test_commands_for_folders_name_the_one_for_files(command, source, tmp_path, capsys):
    assert main([command, str(source), str(tmp_path / "out")]) == 1
    assert "svdq gguf" in capsys.readouterr().err
    assert main([command, str(tmp_path), str(tmp_path / "out.gguf")]) == 1
    assert "svdq gguf F16.gguf" in capsys.readouterr().err


def test_the_command_prints_types_and_sizes_or_json(source, tmp_path, capsys):
    assert main(["gguf", str(source), str(tmp_path / "a.gguf")]) == 0
    told = capsys.readouterr().out
    assert "15 IQ4_NL" in told
    assert "column scales folded for 14 of 14 matrices" in told
    assert main(["gguf", str(source), str(tmp_path / "b.gguf"), "--no-column-scale", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folded"] == 0
    assert (tmp_path / "a.gguf").stat().st_size == (tmp_path / "b.gguf").stat().st_size
