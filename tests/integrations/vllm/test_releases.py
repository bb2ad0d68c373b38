"""A release of vLLM that was not tried is named when a model is loaded, and the page has those that were."""

import sys

import pytest
from places import ROOT

from svdq_hf.integrations.vllm.releases import TRIED


@pytest.mark.parametrize("release", [*(f"{tried}.5" for tried in TRIED), "0.40.0"])
def test_a_release_that_was_not_tried_is_named(plugin, monkeypatch, caplog, release):
    monkeypatch.setattr(sys.modules["vllm"], "__version__", release)
    plugin.SVDQVllmConfig.from_config({"quant_method": "svdq"})
    said = [record.getMessage() for record in caplog.records]
    assert [release in one and "docs/vllm.md" in one for one in said] == [True] * (release == "0.40.0")


def test_the_page_has_the_releases_that_were_tried():
    page = (ROOT / "docs" / "vllm.md").read_text()
    assert all(f"| {release}" in page for release in TRIED)
