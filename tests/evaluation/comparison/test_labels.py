"""Labels of configs: preset and choices, and the config of a file."""

import pytest

from svdq_hf import SVDQConfig
from svdq_hf.config.presets import PRESETS
from svdq_hf.evaluation.comparison.labels import label, preset_of


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (SVDQConfig(), "svdq"),
        (SVDQConfig.best(), "svdq-best"),
        (SVDQConfig.small(), "svdq-small"),
        (SVDQConfig.paper(), "svdq-paper"),
        (SVDQConfig.best(bits=8), "svdq-best bits=8"),
        (SVDQConfig(k=7, lm_head=True), "svdq k=7 lm_head"),
    ],
)
def test_a_config_is_called_by_its_preset_and_its_choices(config, name):
    assert label(config) == name


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_known_from_what_files_hold(name):
    config = getattr(SVDQConfig, name)()
    assert preset_of(SVDQConfig.from_dict(config.to_dict())) == name
