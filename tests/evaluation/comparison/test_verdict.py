"""Verdicts: their words, for every kind of figures, and what is advised."""

import pytest

from svdq_hf import SVDQConfig
from svdq_hf.evaluation.comparison.result import ComparedModel, Flips, Quality
from svdq_hf.evaluation.comparison.statistics import Estimate
from svdq_hf.evaluation.comparison.table import rows
from svdq_hf.evaluation.comparison.verdict import LEVELS, advice, closeness, figure, share, signed, verdict

GEMMA = Quality(
    loss=3.3,
    change=Estimate(0.0481, 0.0399, 0.0561),
    kl=Estimate(0.104, 0.097, 0.11),
    same=Estimate(0.8612, 0.85, 0.87),
)


class Speed:
    run_peak_bytes = 100
    decode_tokens_per_second = 30.0


class Slow:
    run_peak_bytes = 200
    decode_tokens_per_second = 12.0


def model(quality=GEMMA, config=None, **about):
    quantization = None if config is None else config.to_dict()
    given = {"name": "svdq-best", "folder": None, "bytes": 250, "bits": 4.46, "dense_share": 0.3}
    given |= {"shrinks": "", **about}
    return ComparedModel(quality=quality, quantization=quantization, **given)


OWN = "in minutes to hours, --preset self_calibrated"
CALIBRATED = "with texts of yours, svdq quantize --preset calibrated"
DENSE = model(Quality(), name="gemma", bytes=1000, bits=32.0, dense_share=None)


def test_a_causal_models_verdict_says_loss_interval_kl_and_top_tokens():
    assert verdict(model(), DENSE, "tokens") == (
        "svdq-best changes the loss by +0.048 nats (+0.040 to +0.056), KL 0.104, 86.1 % of top tokens stay: "
        "close to the original. It takes 0.25 of the disk."
    )


def test_memory_and_speed_are_told_where_they_are_known():
    found = verdict(model(speed=Speed()), model(bytes=1000, speed=Slow()), "tokens")
    assert found.endswith(" It takes 0.25 of the disk and 0.50 of the memory, and writes 2.50 times as fast.")


def test_a_task_counts_the_answers_that_flip():
    quality = Quality(
        change=Estimate(0.01, -0.01, 0.02),
        kl=Estimate(0.004, 0.003, 0.006),
        same=Estimate(0.97, 0.9, 1),
        flips=Flips(8, 5, 3),
    )
    assert "8 answers changed (5 right to wrong, 3 wrong to right): very close" in verdict(
        model(quality), DENSE, "answers"
    )


def test_embeddings_are_told_by_their_cosine():
    quality = Quality(cosine=Estimate(0.9861, 0.98, 0.99), same=Estimate(0.9, 0.8, 1))
    found = verdict(model(quality, bytes=None), DENSE, "sentences")
    assert found == (
        "svdq-best keeps a cosine of 0.9861, 90.0 % of nearest sentences stay: close to the original."
    )


def test_the_same_answers_are_called_so():
    zero, one = Estimate(0, 0, 0), Estimate(1, 1, 1)
    for quality in (
        Quality(change=zero, kl=zero, same=one),
        Quality(cosine=one, same=one),
        Quality(change=zero),
    ):
        assert closeness(quality) == "the same answers"
        assert advice(model(quality, SVDQConfig())) == []


def test_words_go_from_near_to_far():
    words = [closeness(Quality(kl=Estimate(kl, kl, kl))) for kl in (0.001, 0.01, 0.1, 0.3, 9.0)]
    assert words == [word for _, word in LEVELS]
    words = [closeness(Quality(cosine=Estimate(one, one, one))) for one in (0.9995, 0.997, 0.98, 0.95, 0.5)]
    assert words == [word for _, word in LEVELS]


@pytest.mark.parametrize(
    ("kl", "config", "hint"),
    [
        (0.1, SVDQConfig(), f"nearer: --preset best; {OWN}; --bits 8"),
        (0.1, SVDQConfig.best(), f"nearer: {OWN}; --bits 8"),
        (0.1, SVDQConfig.best(bits=3), f"nearer: {OWN}; --bits 4"),
        (0.1, SVDQConfig.calibrated(), f"nearer: {OWN}; --bits 8"),
        (0.1, SVDQConfig.calibrated(saliency="requant"), "nearer: --bits 8"),
        (0.1, SVDQConfig.self_calibrated(), "nearer: --bits 8"),
        (9.0, SVDQConfig.paper(), "nearer: --preset best; the preset paper is only for comparisons"),
        (0.001, SVDQConfig.best(), "smaller: --preset small"),
        (0.001, SVDQConfig.self_calibrated(), "smaller: --preset self_calibrated --k 0.0009 --group-size 64"),
        (0.0005, SVDQConfig(bits=8), "smaller: --preset best, of 4 bits"),
    ],
)
def test_what_to_try_next_goes_by_the_distance_and_the_choices(kl, config, hint):
    (found,) = advice(model(Quality(kl=Estimate(kl, kl, kl)), config), "causal")
    assert found.startswith(hint)


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        (SVDQConfig(), f"nearer: --preset best; {CALIBRATED}; --bits 8"),
        (SVDQConfig.calibrated(), "nearer: --bits 8"),
    ],
)
def test_what_does_not_write_is_not_told_to_write_its_own_text(config, hint):
    quality = Quality(kl=Estimate(0.1, 0.1, 0.1))
    assert advice(model(quality, config), "labels") == [hint]


def test_speech_is_not_told_to_take_texts():
    quality = Quality(kl=Estimate(0.1, 0.1, 0.1))
    assert advice(model(quality, SVDQConfig()), "speech") == ["nearer: --preset best; --bits 8"]


def test_nothing_is_advised_where_nothing_is_left_and_for_others_models():
    near = Quality(kl=Estimate(0.001, 0.001, 0.001))
    for config in (SVDQConfig.small(), SVDQConfig.best(bits=3), SVDQConfig.resq()):
        assert advice(model(near, config)) == []
    assert advice(model(near)) == []


def test_a_file_that_is_mostly_dense_is_told_how_to_shrink():
    found = advice(model(config=SVDQConfig.best(), dense_share=0.886, shrinks="--lm-head"))
    assert found[-1] == "89 % of the file is not quantized: --lm-head shrinks it"
    assert not any("file" in hint for hint in advice(model(config=SVDQConfig.best(), dense_share=0.886)))


def test_numbers_have_the_digits_that_they_deserve():
    assert (signed(0.0), signed(0.0095), signed(-0.12345)) == ("+0.000", "+0.009", "-0.123")
    assert (figure(0.0), figure(12.34)) == ("0", "12.3")
    assert share(Estimate(0.99999, 0, 1)) == "100.00 %"


def test_rows_have_a_text_for_each_model_and_none_is_empty():
    from svdq_hf.evaluation.comparison.result import ComparisonResult

    result = ComparisonResult("a text", "tokens", 9, DENSE, [model(), model(name="b", speed=Speed())], 1.0)
    found = {row.title: row.texts for row in rows(result)}
    assert found["change of loss"] == ["-", "+0.048", "+0.048"]
    assert found["decode, tokens/s"] == ["-", "-", "30.0"]
    assert found["bits per weight"] == ["32.00", "4.46", "4.46"]
    assert "mean cosine" not in found
    assert max(map(len, found)) <= 18
