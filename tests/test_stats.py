"Against scipy, statsmodels and plain enumeration"
import itertools

import numpy as np, pandas as pd, pytest
from scipy.stats import binomtest, false_discovery_control, t as student, ttest_1samp
from statsmodels.stats.multitest import multipletests

from mechunlearn.stats import (WORTH, agresti_min, best_of, bootstrap, bootstrap_ratio, choose_best, differs, holm, mcnemar, over_seeds, paired_bootstrap,
                               paired_test, t_interval, t_test, wilson)


@pytest.mark.parametrize("n", [1, 7, 64])
def test_wilson_is_scipys(n):
    for k in range(n + 1):
        ours, theirs = wilson(k, n), binomtest(k, n).proportion_ci(method="wilson")
        np.testing.assert_allclose(ours, (theirs.low, theirs.high), atol=1e-12)
    assert wilson(5, 10, level=.5)[1] < wilson(5, 10, level=.99)[1]


def test_wilson_refuses_the_impossible():
    for k, n in ((-1, 4), (5, 4), (1, 0)):
        with pytest.raises(ValueError): wilson(k, n)
    assert np.isnan(wilson(0, 0)).all()


def test_intervals_hold_their_value():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, 40)); k = rng.uniform(0, n); level = rng.uniform(.01, .999)
        lo, hi = wilson(k, n, level); assert 0 <= lo <= k/n <= hi <= 1
        x = rng.choice([rng.normal(size=n), rng.beta(.1, .1, n), np.full(n, rng.normal()), 1e6 + rng.exponential(size=n)**4])
        lo, hi = bootstrap(x, level, 50, int(rng.integers(9))); assert lo <= x.mean() <= hi
        y = rng.normal(size=n); d, lo, hi, p = paired_bootstrap(x, y, n_boot=50)
        assert (n == 1 or lo <= d <= hi) and 0 < p <= 1 and d == pytest.approx(x.mean() - y.mean())


def test_intervals_hold_their_value_for_one_fact_and_for_none():
    assert bootstrap([.3]) == (.3, .3) and bootstrap([.3, np.nan]) == (.3, .3)
    for got in (bootstrap([]), paired_bootstrap([], []), t_interval([]), t_interval([.3])): assert np.isnan(got).all()


def test_bootstrap_agrees_with_theory_and_is_repeatable():
    x = np.random.default_rng(1).normal(size=400)
    half = 1.96*x.std()/20
    np.testing.assert_allclose(bootstrap(x, n_boot=8000), (x.mean() - half, x.mean() + half), atol=.012)
    assert bootstrap(x, seed=3) == bootstrap(x, seed=3) != bootstrap(x, seed=4)


def test_bootstrap_covers():
    rng = np.random.default_rng(2)
    hits = [lo <= .25 <= hi for _ in range(300) for lo, hi in [bootstrap(rng.beta(1, 3, 40), n_boot=300)]]
    assert .89 < np.mean(hits) < .99


# ---- several seeds

def design(rng):
    "Seeds, draws and facts of a random design"
    n, s, d = int(rng.integers(1, 40)), int(rng.integers(1, 6)), int(rng.integers(1, 4))
    return np.tile(np.arange(n), s*d), np.repeat(np.arange(s), n*d), np.tile(np.repeat(np.arange(d), n), s)


def test_intervals_over_seeds_hold_their_value():
    rng = np.random.default_rng(0)
    for _ in range(120):
        facts, seeds, draws = design(rng); n = len(facts)
        x = rng.choice([rng.beta(.2, .2, n), (rng.random(n) < rng.random()).astype(float)])
        value, lo, hi = over_seeds(x, seeds, draws); assert 0 <= lo <= value <= hi <= 1 and hi > lo
        value, lo, hi = over_seeds(rng.normal(size=n), seeds, share=False); assert np.isnan(lo) or lo < value < hi
        r = paired_test(x, (rng.random(n) < .5).astype(float), facts, seeds, draws)
        assert -1 <= r["ci_low"] <= r["difference"] <= r["ci_high"] <= 1 and 0 <= r["p_facts"] <= r["p"] <= 1
        assert r["value"] - r["reference"] == pytest.approx(r["difference"])


def test_students_interval_and_test_are_scipys():
    x = np.random.default_rng(0).normal(.3, 1, 5)
    assert t_interval(x) == pytest.approx(student.interval(.95, 4, x.mean(), x.std(ddof=1)/np.sqrt(5)))
    assert t_test(x) == pytest.approx(ttest_1samp(x, 0).pvalue)
    assert t_test([0, 0]) == 1 and t_test([.5, .5]) == 0


def test_the_interval_of_paired_shares_by_hand():
    d = np.r_[np.ones(5), -np.ones(2), np.zeros(13)]
    half = 1.959964*np.sqrt(5.5 + 2.5 - 9/22)/22
    assert agresti_min(d) == pytest.approx((3/22 - half, 3/22 + half), abs=1e-6)


def test_over_seeds_is_never_narrower_than_one_seed():
    ten = (np.arange(64) < 10).astype(float)
    for k in (1, 2, 5): assert over_seeds(np.tile(ten, k), np.repeat(np.arange(k), 64)) == pytest.approx((10/64, *wilson(10, 64)))
    assert over_seeds([2.]*5, [0]*5, share=False) == (2., pytest.approx(np.nan, nan_ok=True), pytest.approx(np.nan, nan_ok=True))


def test_asking_a_fact_again_tells_no_more():
    "n is that of one seed, and draws on the same facts are no facts"
    x = (np.arange(32) < 8).astype(float)
    assert over_seeds(np.tile(x, 3), np.zeros(96), np.repeat([0, 1, 2], 32)) == over_seeds(x, np.zeros(32))


@pytest.mark.parametrize("p, tau", [(.3, .2), (.5, .1), (.5, 0)])
@pytest.mark.parametrize("n_seeds", [2, 3, 5])
def test_over_seeds_covers_another_seed(p, tau, n_seeds):
    rng, hits = np.random.default_rng(0), []
    truth = (p + tau*rng.normal(size=10**5)).clip(0, 1).mean()
    for _ in range(150):
        rates = (p + tau*rng.normal(size=n_seeds)).clip(0, 1)
        _, lo, hi = over_seeds(rng.binomial(1, np.repeat(rates, 64)), np.repeat(np.arange(n_seeds), 64))
        hits.append(lo <= truth <= hi)
    assert np.mean(hits) > .89


def test_seeds_that_disagree_are_no_difference():
    "Two seeds in which the one edit is better, and one in which it is not: plain over facts, open over seeds"
    share = lambda *ps: np.concatenate([np.arange(64) < p*64 for p in ps]).astype(float)
    who, facts = np.repeat([0, 1, 2], 64), np.arange(192)
    r = paired_test(share(.5, .45, .05), share(.1, .1, .1), facts, who)
    assert r["p_facts"] < .001 and r["p"] > .05 and r["ci_low"] < 0 < r["ci_high"] and r["test"] == "McNemar, t over 3 seeds"
    r = paired_test(share(.5, .5, .5), share(.1, .1, .1), facts, who)
    assert r["p"] == r["p_facts"] < .001 and r["ci_low"] > 0
    assert paired_test(share(.5), share(.1), facts[:64], who[:64])["test"] == "McNemar"


def test_the_one_rule():
    tests = pd.DataFrame({"difference": [WORTH, -WORTH, .9*WORTH, .5, np.nan], "p_holm": [.049, .049, 0, .05, 0]})
    assert differs(tests).tolist() == [True, True, False, False, False]


# ---- comparisons

def test_mcnemar_is_the_binomial_test_of_discordant_pairs():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = rng.random((2, 30)) < rng.uniform(.2, .8, (2, 1))
        only_a, differ = int((a & ~b).sum()), int((a ^ b).sum())
        assert mcnemar(a, b) == pytest.approx(binomtest(only_a, differ).pvalue if differ else 1)
        assert mcnemar(a, b) == pytest.approx(mcnemar(b, a))
    with pytest.raises(ValueError): mcnemar([1], [1, 0])


def test_paired_p_is_the_permutation_p():
    d = np.array([.3, -.1, .4, .2, .25, -.05, .1, .33])
    flips = np.array([(d*s).mean() for s in itertools.product([-1, 1], repeat=8)])
    exact = np.mean(np.abs(flips) >= d.mean() - 1e-12)
    assert paired_bootstrap(d, np.zeros(8), n_boot=20000)[3] == pytest.approx(exact, abs=.01)
    assert paired_bootstrap(d, d)[3] == 1
    with pytest.raises(ValueError): paired_bootstrap([1.], [1., 2.])


def test_holm_by_hand_and_by_statsmodels():
    np.testing.assert_allclose(holm([.01, .04, .03]), [.03, .06, .06])
    p = np.random.default_rng(0).uniform(0, .2, 9)
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])
    assert (holm(p) >= false_discovery_control(p) - 1e-12).all()
    np.testing.assert_allclose(holm([.01, np.nan, .04]), [.02, np.nan, .04])
    assert holm([]).size == 0 and np.isnan(holm([np.nan])).all()


def test_ratio_of_two_means():
    x, y = np.r_[np.ones(5), np.zeros(15)], np.ones(20)
    r = bootstrap_ratio(x, y)
    assert r["value"] == .25 and (r["ci_low"], r["ci_high"]) == pytest.approx(bootstrap(x), abs=.03)
    assert (r := bootstrap_ratio(y, y))["value"] == 1. and np.isnan([r["ci_low"], r["ci_high"]]).all() # nothing varies
    assert all(np.isnan(v) for v in bootstrap_ratio(x, 0 * y).values()) and all(np.isnan(v) for v in bootstrap_ratio([], []).values())
    with pytest.raises(ValueError): bootstrap_ratio([1.], [1., 2.])


def test_best_attempt_is_chosen_on_the_other_half():
    lucky = pd.DataFrame({"a": [1, 1, 0, 0], "b": [0, 0, 1, 1]}, index=list("wxyz"), dtype=float)
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(4)
        chosen = best_of(lucky, seed)
        for mine, other in ((order[::2], order[1::2]), (order[1::2], order[::2])):
            best = lucky.iloc[np.sort(other)].mean().idxmax()
            assert (chosen.iloc[mine] == lucky[best].iloc[mine]).all()
    assert best_of(lucky[["a"]]).tolist() == [1, 1, 0, 0] and best_of(lucky.iloc[:1]).tolist() == [1]


def test_what_is_best_can_be_said():
    table = pd.DataFrame({"a": [1.]*8, "b": [.5]*8})
    assert {v for _, v in choose_best(table)} == {"a"} and {v for _, v in choose_best(table, score=lambda means: -means)} == {"b"}
