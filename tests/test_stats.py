"Against scipy, statsmodels and plain enumeration"
import itertools

import numpy as np, pandas as pd, pytest
from scipy.stats import binomtest, false_discovery_control
from statsmodels.stats.multitest import multipletests

from mechunlearn.stats import best_of, bootstrap, bootstrap_clustered, bootstrap_ratio, holm, mcnemar, paired_bootstrap, wilson


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
        df = pd.DataFrame({"seed": rng.integers(0, 4, n), "fact": rng.integers(0, 5, n), "value": x})
        value = df.groupby(["seed", "fact"])["value"].mean().groupby(level=0).mean().mean()
        lo, hi = bootstrap_clustered(df, n_boot=50, level=level); rounding = 1e-9*abs(value); assert lo - rounding <= value <= hi + rounding
        y = rng.normal(size=n); d, lo, hi, p = paired_bootstrap(x, y, n_boot=50)
        assert (n == 1 or lo <= d <= hi) and 0 < p <= 1 and d == pytest.approx(x.mean() - y.mean())


def test_intervals_hold_their_value_for_one_fact_and_for_none():
    assert bootstrap([.3]) == (.3, .3) and bootstrap([.3, np.nan]) == (.3, .3)
    empty = pd.DataFrame({"seed": [0], "fact": [0], "value": [np.nan]})
    for got in (bootstrap([]), bootstrap_clustered(empty), paired_bootstrap([], [])): assert np.isnan(got).all()


def test_bootstrap_agrees_with_theory_and_is_repeatable():
    x = np.random.default_rng(1).normal(size=400)
    half = 1.96*x.std()/20
    np.testing.assert_allclose(bootstrap(x, n_boot=8000), (x.mean() - half, x.mean() + half), atol=.012)
    assert bootstrap(x, seed=3) == bootstrap(x, seed=3) != bootstrap(x, seed=4)


def test_bootstrap_covers():
    rng = np.random.default_rng(2)
    hits = [lo <= .25 <= hi for _ in range(300) for lo, hi in [bootstrap(rng.beta(1, 3, 40), n_boot=300)]]
    assert .89 < np.mean(hits) < .99


def test_clustered_variance_is_between_plus_within():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 30)) + rng.normal(0, 1, (6, 1))
    df = pd.DataFrame([(s, f, x[s, f]) for s in range(6) for f in range(30)], columns=["seed", "fact", "value"])
    lo, hi = bootstrap_clustered(df, n_boot=20000, level=.6827)
    expected = np.sqrt(x.mean(1).var()/6 + x.var(1).mean()/30/6)
    assert (hi - lo)/2 == pytest.approx(expected, rel=.05)


def test_clustered_counts_facts_not_prompts():
    "Repeating each fact's row adds no information"
    rng = np.random.default_rng(0)
    df = pd.DataFrame({"seed": np.repeat([0, 1], 20), "fact": list(range(20))*2, "value": rng.uniform(size=40)})
    assert bootstrap_clustered(df) == pytest.approx(bootstrap_clustered(pd.concat([df]*5)))


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
