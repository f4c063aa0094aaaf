"What is named in a text; intervals of one fact; attackers with dropout and with checkpointed gradients"
import numpy as np, pandas as pd, pytest, torch, unicodedata
from mechunlearn.evaluation import first_named, interval
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.finetuning import finetune
from mechunlearn.localization import build
from mechunlearn.models import components
from mechunlearn.relearning import Lora, adapters, relearn, rowwise
from mechunlearn.stats import bootstrap_ratio, paired_bootstrap

SPORTS = [" golf", " football", " tennis"]


@pytest.mark.parametrize("text, says", [
    ("not golf but football", " football"), ("isn't golf", None), ("isn’t golf, it is football", " football"), ("never golf", None), ("no longer golf but tennis", " tennis"),
    ("golf? no, football", " football"), ("golf, no, football", " football"), ("golf. No one else plays it", " golf"), ("not golf or tennis but football", " football"),
    ("neither golf nor football", None), ("not only golf", " golf"), ("does not play golf", None), ("football instead of golf", " football"), ("instead of golf: football", " football"),
    ("golf, not football", " golf"), ("Golf!", " golf"), ("golfer", None), ("no. golf", " golf"), ("not the golf", None), ("not a golfer but plays football", " football"),
    ("football and not golf", " football"), ("is it golf or tennis", " golf"), ("not 'golf' but 'tennis'", " tennis"), ("", None)])
def test_what_is_denied_is_not_named(text, says): assert first_named(text, SPORTS) == says


@pytest.mark.parametrize("text, answers, says", [
    ("東京です。", ["東京", "大阪"], "東京"), ("答えは大阪府です", [" 東京", " 大阪"], " 大阪"), ("กรุงเทพมหานคร", ["กรุงเทพ", "เชียงใหม่"], "กรุงเทพ"), ("IBMです", ["IBM"], "IBM"), ("서울이다", ["서울"], "서울"),
    ("भारती", ["भारत"], None), ("भारत है", ["भारत"], "भारत"), ("Москвы", ["Москва"], None), ("в Москва.", ["Москва"], "Москва"), ("Zürich-Nord", ["Zürich"], "Zürich"),
    ("St. John's, Canada", [" St. John's", " St"], " St. John's"), ("New York City", [" New York", " New York City"], " New York City"), ("New Yorkers of New York", [" New York"], " New York"),
    ("C++ or C", [" C", " C++"], " C++"), ("東京都です", ["東京都", "東京"], "東京都"), ("東京都ではない", ["東京都", "東京"], None)])
def test_words_of_every_script(text, answers, says): assert first_named(text, answers) == says


def test_accents_composed_or_not():
    for a in ("NFC", "NFD"):
        for b in ("NFC", "NFD"): assert first_named(unicodedata.normalize(a, "São Paulo."), [word := unicodedata.normalize(b, " São Paulo"), " Sao"]) == word
    assert first_named(unicodedata.normalize("NFD", "Pará"), [" Par"]) is None


# ---- intervals

def test_one_fact_is_no_certainty():
    for measure in ("prob", "compliance", "top1"):
        for values in ([1.], [0.], [.3], [1.] * 5):
            r = interval(pd.Series(values), measure)
            assert 0 <= r["ci_low"] <= r["value"] <= r["ci_high"] <= 1 and r["ci_high"] - r["ci_low"] > .3
    for values in ([2.], [2.] * 4): assert np.isnan([interval(pd.Series(values), "loss")[k] for k in ("ci_low", "ci_high")]).all()
    r = interval(pd.Series([2., 3.]), "loss")
    assert r["ci_low"] < 2.5 < r["ci_high"]
    d, lo, hi, p = paired_bootstrap([1.], [0.])
    assert d == 1 and np.isnan([lo, hi]).all() and p == 1


def test_a_ratio_leaves_out_what_is_missing():
    x, y = np.array([1., 0, 1, np.nan]), np.array([1., 1, 2, 1])
    assert bootstrap_ratio(x, y) == bootstrap_ratio(x[:3], y[:3]) == bootstrap_ratio([*x[:3], 1.], [*y[:3], np.nan])
    assert np.isnan(bootstrap_ratio([np.nan], [1.])["value"])


# ---- attackers

@pytest.fixture(scope="module")
def task(): return sports_athlete_editing(None, forget_size=8)

SMALL = dict(sizes=dict(forget=4, retain=4, text=2), max_facts=4, steps=3, at=(3,), sides=(0,))


def test_dropout_does_not_go_by_micro_batches(lm, task):
    got = [relearn(lm, task, None, Lora(4, 16, 1e-2, .3), batch_size=b, **SMALL).full_truth.to_numpy() for b in (1, 3, 64)]
    assert got[0] == pytest.approx(got[1], rel=1e-3) and got[1] == pytest.approx(got[2], rel=1e-3)
    other = relearn(lm, task, None, Lora(4, 16, 1e-2, .3), seed=1, **SMALL).full_truth.to_numpy()
    none = relearn(lm, task, None, Lora(4, 16, 1e-2, 0.), **SMALL).full_truth.to_numpy()
    assert abs(got[2] - other).max() > 1e-4 and abs(got[2] - none).max() > 1e-5


def test_dropout_drops_its_share_and_changes_from_step_to_step(tiny, task):
    lm = tiny()
    with adapters(lm, Lora(4, 8, 1e-3, .25)), rowwise(lm, 0) as rows:
        drop = next(m for m in lm.hf.modules() if type(m).__name__ == "RowDropout").train()
        rows["ids"] = [[1, 2, 3]] * 400
        rows["ids"] = [[1, 2, 3 + i] for i in range(400)]
        one = drop(torch.ones(400, 5, 32))
        assert (one[:, :2] == 0).all() and one[:, 2:].mean() == pytest.approx(1, abs=.02) and (one[:, 2:] == 0).float().mean() == pytest.approx(.25, abs=.02)
        assert torch.equal(drop(torch.ones(400, 5, 32)), one)
        rows["step"] = 1
        assert not torch.equal(drop(torch.ones(400, 5, 32)), one)


@pytest.mark.parametrize("rank, dropout", [(0, 0.), (4, .3), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((4, 0.), (0, .3)))])
def test_checkpointed_gradients_give_the_same(lm, task, rank, dropout):
    lora = Lora(rank, 16, 1e-2 if rank else 1e-3, dropout)
    want = relearn(lm, task, None, lora, **SMALL).full_truth.to_numpy()
    lm.hf.gradient_checkpointing_enable()
    try:
        assert relearn(lm, task, None, lora, **SMALL).full_truth.to_numpy() == pytest.approx(want, rel=1e-3)
        edit = finetune(lm, task, build(lm, "all", components(lm)), lr=1e-3, steps=2, progress=False)
        assert edit.curve.forget.notna().all()
    finally: lm.hf.gradient_checkpointing_disable()
