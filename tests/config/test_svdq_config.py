import copy
import dataclasses
import inspect
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import svdq_hf
from svdq_hf.config import SVDQConfig
from svdq_hf.config.checks import ELSEWHERE
from svdq_hf.config.choices import CHOICES, QUANT_METHOD
from svdq_hf.config.chosen import Chosen
from svdq_hf.config.presets import PRESETS
from svdq_hf.core.grid import Grid
from svdq_hf.core.saliency import saliency_names
from svdq_hf.format.parts import Scheme
from svdq_hf.format.versions import EXPERTS_VERSION, FORMAT_VERSION

CONFIGS = {
    "default": {},
    "a share": {"k": 0.01},
    "no salient weights": {"k": 0},
    "all choices": {
        "k": 64,
        "rank": 4,
        "saliency": "magnitude",
        "bits": 4,
        "group_size": 128,
        "scale": "sigma",
        "clip_sigma": 3,
        "levels": "linear",
        "column_scale": False,
        "scale_bits": 16,
        "modules_to_not_convert": ["lm_head", r"layers\.0\."],
        "compute_dtype": "bfloat16",
        "seed": 7,
    },
    "synthetic": {"error_feedback": "synthetic"},
    "8 bits": {"bits": 8},
    "3 bits": {"bits": 3, "levels": "linear"},
    "3 bits and the head": {"bits": 3, "lm_head": True},
    "rows": {"group_size": "row", "compute_dtype": torch.float16},
    "an empty list": {"modules_to_not_convert": []},
}
every_config = pytest.mark.parametrize("choices", CONFIGS.values(), ids=CONFIGS)


def test_the_defaults_are_those_of_the_readme():
    assert {key: value for key, value in SVDQConfig().to_dict().items() if key != "requires"} == {
        "quant_method": "svdq",
        "format_version": 2,
        "k": 256,
        "rank": 8,
        "saliency": "svd",
        "bits": 4,
        "group_size": 32,
        "scale": "mse",
        "clip_sigma": 2.5,
        "levels": "normal",
        "column_scale": True,
        "scale_bits": 8,
        "error_feedback": False,
        "lm_head": False,
        "modules_to_not_convert": None,
        "compute_dtype": None,
        "seed": 0,
    }


@every_config
def test_a_config_survives_dict_and_json(choices):
    config = SVDQConfig(**choices)
    assert SVDQConfig.from_dict(config.to_dict()) == config
    assert SVDQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert SVDQConfig.from_dict(json.loads(config.to_json_string())) == config


@every_config
def test_a_stored_config_says_method_version_and_remedy(choices):
    stored = json.loads(SVDQConfig(**choices).to_json_string())
    assert stored["quant_method"] == QUANT_METHOD == "svdq"
    other_bits = choices.get("bits", 4) != 4
    assert stored["format_version"] == (3 if other_bits else 1 if choices.get("levels") == "linear" else 2)
    assert stored["requires"] == (
        "the Python package svdq_hf, 0.1.0 or newer (pip install -e . in a checkout of svdq_hf), "
        "then `import svdq_hf` before from_pretrained"
    )


def test_a_changed_dict_does_not_change_the_config():
    config = SVDQConfig(modules_to_not_convert=["head"])
    config.to_dict()["modules_to_not_convert"].append("body")
    assert config.modules_to_not_convert == ["head"]


def test_configs_are_equal_when_all_choices_are():
    assert SVDQConfig(k=3) == SVDQConfig(k=3)
    assert SVDQConfig(k=3) != SVDQConfig(k=4)
    assert SVDQConfig() != SVDQConfig().to_dict()


def test_the_paper_preset_is_one_absmax_scale_a_matrix():
    paper = {"group_size": "tensor", "levels": "linear", "column_scale": False, "scale_bits": 16}
    assert SVDQConfig.paper() == SVDQConfig(
        k=256, rank=8, saliency="svd", scale="absmax", modules_to_not_convert=None, **paper
    )
    assert SVDQConfig.paper(k=64, scale="sigma", rank=4) == SVDQConfig(k=64, rank=4, scale="sigma", **paper)


def test_a_config_of_version_1_is_stored_with_the_keys_of_version_1():
    stored = json.loads(SVDQConfig.paper(k=3).to_json_string())
    assert stored.keys() == {
        "quant_method", "format_version", "requires", "k", "rank", "saliency", "bits", "group_size", "scale",
        "clip_sigma", "modules_to_not_convert", "compute_dtype", "seed",
    }  # fmt: skip
    config = SVDQConfig.from_dict(stored)
    assert config == SVDQConfig.paper(k=3)
    config.update(k=4)
    assert config == SVDQConfig.paper(k=4)


@pytest.mark.parametrize(("bits", "levels"), [(3, "normal"), (4, "normal"), (8, "linear")])
def test_levels_that_nobody_chose_are_those_of_the_bits(bits, levels):
    config = SVDQConfig(bits=bits)
    assert (config.levels, config.format_version) == (levels, 2 if bits == 4 else 3)
    assert config.scheme.grid == Grid(32, levels=levels, column_scale=True, scale_bits=8, bits=bits)
    assert SVDQConfig.from_dict({"bits": bits}) == config
    for preset in (SVDQConfig.best, SVDQConfig.small, SVDQConfig.calibrated):
        assert preset(bits=bits).levels == levels
    assert SVDQConfig.paper(bits=bits).levels == "linear"


def test_levels_that_8_bits_do_not_have_are_refused():
    message = r"^levels='normal': must be one of \['linear'\] where bits is 8"
    for change in (lambda: SVDQConfig(bits=8, levels="normal"), lambda: SVDQConfig().update(bits=8)):
        with pytest.raises(ValueError, match=message):
            change()
    config = SVDQConfig()
    config.update(bits=8, levels="linear")
    assert config == SVDQConfig(bits=8)


@pytest.mark.parametrize("size", ["row", "tensor"])
def test_error_feedback_needs_groups(size):
    with pytest.raises(ValueError, match=f"group_size='{size}': must be a number of columns where"):
        SVDQConfig(error_feedback=True, group_size=size)


def test_a_stored_dict_of_version_1_means_what_it_meant():
    config = SVDQConfig.from_dict({"quant_method": "svdq", "format_version": 1, "k": 3, "group_size": 64})
    assert (config.levels, config.column_scale, config.scale_bits) == ("linear", False, 16)
    assert config.format_version == 1


def test_the_scheme_is_what_is_stored():
    config = SVDQConfig(k=5, group_size=32, scale="sigma", clip_sigma=3.0)
    assert config.scheme == Scheme(5, Grid(32, "sigma", 3.0, "normal", True, 8))


@pytest.mark.parametrize(
    ("given", "name", "dtype"),
    [
        (None, None, None),
        ("bfloat16", "bfloat16", torch.bfloat16),
        ("torch.float16", "float16", torch.float16),
        (torch.float32, "float32", torch.float32),
    ],
)
def test_compute_dtype_is_stored_by_name(given, name, dtype):
    config = SVDQConfig(compute_dtype=given)
    assert config.compute_dtype == name
    assert config.torch_compute_dtype == dtype


COUNT = "an int from 0 on"
BAD = [
    ("k", -1, COUNT),
    ("k", 1.0, "a float between 0 and 1"),
    ("k", 0.0, "a float between 0 and 1"),
    ("k", -0.5, "a float between 0 and 1"),
    ("k", 2.5, "a float between 0 and 1"),
    ("k", float("nan"), "a float between 0 and 1"),
    ("k", True, COUNT),
    ("k", "256", COUNT),
    ("k", None, COUNT),
    ("rank", 0, "an int from 1 on"),
    ("rank", -8, "an int from 1 on"),
    ("rank", 8.0, "an int from 1 on"),
    ("rank", True, "an int from 1 on"),
    ("rank", None, "an int from 1 on"),
    ("seed", -1, "an int from 0 to"),
    ("seed", 0.5, "an int from 0 to"),
    ("damping", -0.1, "a number from 0 on"),
    ("damping", float("nan"), "a number from 0 on"),
    ("damping", True, "a number from 0 on"),
    ("damping", "1", "a number from 0 on"),
    ("seed", None, "an int from 0 to"),
    ("bits", 2, "one of [3, 4, 8]"),
    ("bits", 4.0, "one of [3, 4, 8]"),
    ("bits", "4", "one of [3, 4, 8]"),
    ("bits", None, "one of [3, 4, 8]"),
    ("bits", [8], "one of [3, 4, 8]"),
    ("saliency", None, "the name of a score"),
    ("saliency", 3, "the name of a score"),
    ("saliency", "SVD", "'svd'"),
    ("saliency", "hessian", "register_saliency"),
    ("group_size", 0, "a multiple of 64"),
    ("group_size", 48, "a divisor of 64"),
    ("group_size", "column", "'row' or 'tensor'"),
    ("group_size", None, "'row' or 'tensor'"),
    ("group_size", -1, "'row' or 'tensor'"),
    ("scale", "minmax", "['mse', 'absmax', 'sigma']"),
    ("scale", None, "['mse', 'absmax', 'sigma']"),
    ("clip_sigma", 0, "a number above 0"),
    ("clip_sigma", float("inf"), "a number above 0"),
    ("clip_sigma", "2.5", "a number above 0"),
    ("modules_to_not_convert", "lm_head", "None or a list of names"),
    ("modules_to_not_convert", [1], "None or a list of names"),
    ("modules_to_not_convert", {"a": 1}, "None or a list of names"),
    ("compute_dtype", "int8", "('float32', 'bfloat16', 'float16')"),
    ("compute_dtype", torch.float64, "('float32', 'bfloat16', 'float16')"),
    ("compute_dtype", 16, "('float32', 'bfloat16', 'float16')"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), BAD, ids=lambda part: repr(part))
def test_a_bad_value_is_refused_by_key_value_and_what_is_allowed(key, value, allowed):
    with pytest.raises(ValueError, match=f"^{key}=") as error:
        SVDQConfig(**{key: value})
    assert f"{key}={value!r}" in str(error.value)
    assert allowed in str(error.value)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, value, _ in BAD if key != "saliency"])
def test_a_bad_value_is_refused_from_a_file_too(key, value):
    with pytest.raises(ValueError, match=f"^{key}="):
        SVDQConfig.from_dict({"quant_method": "svdq", "format_version": 1, key: value})


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("groupsize", "group_size"),
        ("GROUP_SIZE", "group_size"),
        ("saliancy", "saliency"),
        ("modules_to_convert", "modules_to_not_convert"),
        ("bit", "bits"),
    ],
)
def test_an_unknown_key_is_refused_with_the_near_one(key, meant):
    with pytest.raises(ValueError, match=f"^{key}=5: .*; did you mean '{meant}'\\?$"):
        SVDQConfig(**{key: 5})


def test_an_unknown_key_far_from_any_is_refused_with_all_of_them():
    with pytest.raises(ValueError, match=r"^zzz=1: SVDQConfig knows no such key, only ") as error:
        SVDQConfig(zzz=1)
    assert "did you mean" not in str(error.value)
    for key in ("k", "rank", "saliency", "group_size", "modules_to_not_convert", "seed"):
        assert repr(key) in str(error.value)


def test_a_format_of_the_future_is_refused_with_the_remedy():
    future = FORMAT_VERSION + 1
    with pytest.raises(ValueError, match=f"^format_version={future}: .*install a newer one: pip install -e"):
        SVDQConfig.from_dict({**SVDQConfig().to_dict(), "format_version": future})


@pytest.mark.parametrize("version", [0, -1, 1.0, "1", True, None])
def test_a_format_version_that_is_none_is_refused(version):
    with pytest.raises(ValueError, match=r"^format_version=.*: must be an int from 1 on"):
        SVDQConfig(format_version=version)


def test_another_method_is_refused():
    with pytest.raises(ValueError, match=r"^quant_method='gptq': must be 'svdq'"):
        SVDQConfig.from_dict({"quant_method": "gptq"})


def test_a_stored_model_loads_where_its_score_is_not_known():
    stored = {"quant_method": "svdq", "format_version": 1, "saliency": "somebodys_own"}
    assert "somebodys_own" not in saliency_names()
    assert SVDQConfig.from_dict(stored).saliency == "somebodys_own"
    del stored["format_version"]
    with pytest.raises(ValueError, match=r"^saliency='somebodys_own': must be one of"):
        SVDQConfig.from_dict(stored)


@pytest.mark.parametrize("name", saliency_names())
def test_every_registered_score_is_accepted(name):
    assert SVDQConfig(saliency=name).saliency == name


def test_a_config_is_not_hashable_since_it_can_change():
    with pytest.raises(TypeError, match="unhashable"):
        hash(SVDQConfig())


def test_tuple_of_names_is_a_list_of_names():
    config = SVDQConfig(modules_to_not_convert=("a",))
    assert config.modules_to_not_convert == ["a"]
    assert SVDQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_choices_that_come_beside_a_dict_or_later_are_checked_too():
    assert SVDQConfig.from_dict({"k": 5}, k=7).k == 7
    assert SVDQConfig.from_dict({}, return_unused_kwargs=True, revision="x")[1] == {"revision": "x"}
    for change in (lambda: SVDQConfig.from_dict({}, k=-5), lambda: SVDQConfig().update(k=-5)):
        with pytest.raises(ValueError, match="k=-5: must be"):
            change()


def test_true_is_no_number():
    with pytest.raises(ValueError, match="clip_sigma=True"):
        SVDQConfig(clip_sigma=True)


def test_damping_is_no_part_of_a_file_and_survives_an_update():
    config = SVDQConfig.calibrated(damping=0.5)
    assert "damping" not in config.to_dict()
    assert config != SVDQConfig.calibrated()
    config.update(k=3)
    assert (config.k, config.damping) == (3, 0.5)


# The table of choices.


def signature():
    parameters = inspect.signature(SVDQConfig.__init__).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD}


def test_the_signature_is_that_of_the_table():
    rows = {name: row.default for name, row in CHOICES.items()}
    written = {name: default for name, default in signature().items() if name != "self"}
    assert written == rows
    assert all(type(written[name]) is type(rows[name]) for name in rows)


def test_every_choice_has_a_type_and_a_line_in_the_docstring():
    assert list(CHOICES) == list(Chosen.__annotations__)
    told = re.findall(r"^        (\w+): ", SVDQConfig.__doc__ or "", flags=re.M)
    assert [name for name in told if name != "ValueError"] == list(CHOICES)


def test_the_parts_of_the_grid_are_all_choices():
    fields = {field.name for field in dataclasses.fields(Grid)}
    assert {name for name, row in CHOICES.items() if row.of == "grid"} == fields


def test_defaults_pass_their_own_checks():
    own = {name: row.default for name, row in CHOICES.items() if name != "levels"}
    assert all(CHOICES[name].check.fits(default) for name, default in own.items())


@pytest.mark.parametrize("name", [name for name, row in CHOICES.items() if row.option and row.option.values])
def test_what_the_command_line_offers_is_allowed(name):
    words = {"data": True} if name == "error_feedback" else {}  # what the command line calls it
    assert all(CHOICES[name].check.fits(words.get(value, value)) for value in CHOICES[name].option.values)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_class_method(name):
    assert getattr(SVDQConfig, name)() == SVDQConfig(**PRESETS[name].changes)
    config = SVDQConfig(**PRESETS[name].changes)
    assert (config.needs_batches, config.runs_dense) == (PRESETS[name].needs_data, PRESETS[name].runs_dense)


# It does not change.


def test_a_config_does_not_change():
    config = SVDQConfig(k=3)
    with pytest.raises(AttributeError, match=r"^k=5: .*config\.replace\("):
        config.k = 5
    assert config.k == 3


def test_what_is_given_may_change_later():
    names, layers = ["a"], {"b": 1}
    config = SVDQConfig(modules_to_not_convert=names, layer_k=layers)
    names.append("c")
    layers["c"] = 2
    assert (config.modules_to_not_convert, config.layer_k) == (["a"], {"b": 1})


def test_replace_makes_another_one_and_checks_it():
    config = SVDQConfig(k=3, damping=1, compute="fast")
    assert config.replace(k=4) == SVDQConfig(k=4, damping=1, compute="fast")
    assert config.replace(bits=8, levels=None).levels == "linear"
    assert config.k == 3
    wrong = [
        ({"k": -1}, r"^k=-1: must"),
        ({"saliency": "x"}, r"^saliency='x': must be one of"),
        ({"kay": 1}, r"^kay=1: SVDQConfig knows no such key"),
    ]
    for choices, message in wrong:
        with pytest.raises(ValueError, match=message):
            config.replace(**choices)


def test_replace_keeps_a_score_that_is_not_known_here():
    stored = SVDQConfig.from_dict({"format_version": 2, "saliency": "somebodys_own"})
    assert stored.replace(k=5).saliency == "somebodys_own"


def test_another_budget_forgets_what_the_last_one_found():
    found = SVDQConfig(target_bits=5).replace(layer_k={"a": 1})
    assert (found.target_bits, found.layer_k) == (5, {"a": 1})
    assert found.replace(target_bits=6).layer_k is None


def test_experts_are_a_new_version_of_the_same_config():
    config = SVDQConfig(k=3)
    assert config.with_experts().format_version == EXPERTS_VERSION
    assert config.with_experts().replace(k=4).format_version == EXPERTS_VERSION
    assert config.format_version == 2


@every_config
def test_copies_and_pickles_are_equal(choices):
    config = SVDQConfig(**choices)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_the_grid_is_made_once():
    assert SVDQConfig(k=3).scheme.grid is SVDQConfig(k=4).scheme.grid


def test_the_table_needs_neither_torch_nor_transformers():
    code = (
        "import sys, types; package = types.ModuleType('svdq_hf'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['svdq_hf'] = package; import svdq_hf.config.choices, svdq_hf.config.presets; "
        "print({'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(svdq_hf.__file__).parent)], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("skip", "modules_to_not_convert"),
        ("llm_int8_skip_modules", "modules_to_not_convert"),
        ("load_in_4bit", "bits"),
        ("q_group_size", "group_size"),
        ("groupsize", "group_size"),
    ],
)
def test_a_key_of_another_method_is_told_by_our_name(key, meant):
    with pytest.raises(ValueError, match=rf"{key}=1: .*; did you mean '{meant}'\?$"):
        SVDQConfig(**{key: 1})


def test_the_names_of_others_stand_for_choices_and_are_none():
    assert set(ELSEWHERE.values()) <= CHOICES.keys()
    assert not ELSEWHERE.keys() & CHOICES.keys()


@pytest.mark.parametrize("saliency", ["awq", "spqr", "pqi", "requant"])
def test_a_score_from_data_is_refused_where_no_salient_weights_are_kept(saliency):
    with pytest.raises(ValueError, match=f"saliency='{saliency}'.*one without data where activations is 4"):
        SVDQConfig.resq(saliency=saliency)
