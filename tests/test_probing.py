import numpy as np, pandas as pd, pytest, torch
from contextlib import nullcontext
from mechunlearn import probing, stats
from mechunlearn.facts import Fact, Task
from mechunlearn.probing import (POSITIONS, curve_of, extraction_onset, features, fit_probe, flu_frequency, flu_layers, plot_probe, probe_curve, probe_hits,
    run_probing, say_probe, selectivity)
from mechunlearn.store import Refusal, Run

SPORTS = (" football", " baseball", " basketball", " golf")


def facts(start, stop, relation="sport", prefix="p"):
    "Facts with balanced answers; subjects need no tokenizer here"
    return tuple(Fact(id=f"{relation}/{i}", relation=relation, subject=f"{prefix}{relation}{i}", answer=SPORTS[i % 3], candidates=SPORTS,
                      prompt=f"{i % 3} of") for i in range(start, stop))

def task(**kw):
    splits = dict(forget=facts(0, 4), retain=facts(10, 100), retain_test=facts(100, 160), dev_forget=facts(160, 170),
                  dev_retain=facts(170, 180))
    return Task(name="t", source="world", **splits | kw)

@pytest.fixture
def planted(monkeypatch):
    "Activations in which the answer can be read at the subject from layer 1 on, at the last token from layer 3 on (5 layers and embeddings)"
    seen = []
    def fake(lm, fs, batch_size=64):
        seen.append([f.id for f in fs])
        rng = np.random.default_rng(len(fs))
        x, y = rng.normal(size=(len(fs), 6, 2, 12)), np.array([SPORTS.index(f.answer) for f in fs])
        for l in range(6):
            for p, first in enumerate((1, 3)):
                if l - 1 >= first: x[np.arange(len(fs)), l, p, y] += 6
        return x.astype("float32")
    monkeypatch.setattr(probing, "features", fake)
    monkeypatch.setattr(probing, "in_float32", nullcontext)
    return seen


def test_curve_finds_what_was_planted(planted):
    c = probe_curve(None, task())
    acc = c[~c.control].pivot(index="layer", columns="position", values="accuracy")
    assert list(acc.index) == [-1, 0, 1, 2, 3, 4]
    assert (acc.subject.loc[:0] < .6).all() and (acc.subject.loc[1:] > .95).all()
    assert (acc["last"].loc[:2] < .6).all() and (acc["last"].loc[3:] > .95).all()
    assert flu_layers(c) == [1]
    control = c[c.control].accuracy
    assert abs(control.mean() - 1 / 3) < .1 and control.max() < .6
    s = selectivity(c).pivot(index="layer", columns="position", values="selectivity")
    assert (s.subject.loc[1:] > .4).all() and abs(s.subject.loc[-1]) < .3
    assert (c.ci_low <= c.accuracy).all() and (c.accuracy <= c.ci_high).all() and (c.n_test == 80).all()
    assert plot_probe(c, [1]).axes[0].get_xlabel() == "after layer" and "layer 1." in say_probe(c, [1])

@pytest.mark.parametrize("first, said", [(.3, False), (.6, False), (.7, True), (.95, True)])
def test_what_is_read_before_any_layer_is_said(first, said):
    "Of the way from the control, .33, to the top, 1, more than half"
    rows = [(l, "subject", k, a, a - .05, a + .05, 100) for k, line in ((False, (first, .95, 1.)), (True, (.33,) * 3)) for l, a in zip((-1, 0, 1), line)]
    c = pd.DataFrame(rows + [(l, "last", False, .33, .28, .38, 100) for l in (-1, 0, 1)], columns=["layer", "position", "control", "accuracy", "ci_low", "ci_high", "n_test"])
    assert ("before any layer" in say_probe(c)) == said and "before any layer" not in say_probe(c[c.layer >= 0])


def test_train_and_test_are_disjoint_and_without_the_forget_set(planted):
    t = task()
    probe_curve(None, t)
    train, test = map(set, planted)
    assert train == {f.id for f in t.retain} and test == {f.id for s in (t.retain_test, t.dev_forget, t.dev_retain) for f in s}

def test_curve_is_reproducible(planted):
    a, b, c = (probe_curve(None, task(), seed=s, n_control=1) for s in (1, 1, 2))
    assert a.equals(b) and not a.equals(c) and a[~a.control].equals(c[~c.control])

def test_rare_and_unseen_answers_are_left_out(planted):
    golf = tuple(f.model_copy(update={"answer": " golf", "id": f"g{f.id}", "subject": f"g{f.subject}"}) for f in facts(0, 8))
    c = probe_curve(None, task(retain=facts(10, 100) + golf[:4], retain_test=facts(100, 160) + golf[4:]))
    assert (c.n_test == 80).all() and not any(i.startswith("g") for ids in planted for i in ids)

def test_relations_have_their_own_probes(planted):
    cities = facts(0, 90, "city", "c")
    c = probe_curve(None, task(forget=facts(0, 4) + cities[:3], retain=facts(10, 100) + cities[3:60],
                               retain_test=facts(100, 160) + cities[60:]))
    assert len(planted) == 4 and all(len({i.split("/")[0] for i in ids}) == 1 for ids in planted) and (c.n_test == 80 + 30).all()

def test_nothing_to_probe_is_refused(planted):
    one = tuple(f for f in facts(10, 100) if f.answer == " golf" or f.answer == " football")
    with pytest.raises(Refusal, match="probed"): probe_curve(None, task(retain=one))
    with pytest.raises(Refusal, match="probed"): probe_curve(None, task(retain_test=(), dev_forget=(), dev_retain=()))


def curve(accuracy, n=200, position="subject", floor=.33):
    rows = [(l - 1, position, c, a, n, *stats.wilson(a * n, n)) for l, acc in enumerate(accuracy) for c, a in ((False, acc), (True, floor))]
    return pd.DataFrame(rows, columns=["layer", "position", "control", "accuracy", "n_test", "ci_low", "ci_high"])

@pytest.mark.parametrize("accuracy,layers", [
    ([.33, .60, .89, .99, 1., 1.], [0, 1, 2]),
    ([.33, .33, .60, .60, .95, .96], [1, 2, 3]),            # contiguous from first to last
    ([.33, .95, .80, .95, .95, .95], [0]),                   # a dip and its recovery
    ([.33, .95, .80, .99, .99, .99], [0, 1, 2]),             # but a rise above the best counts
    ([.33, .35, .31, .36, .34, .33], []),                    # flat
    ([.90, .80, .60, .40, .35, .33], []),                    # falling
    ([.50, .532, .95, .95, .95, .95], [0, 1]),               # just above 5 % of .95 - .33
    ([.50, .530, .95, .95, .95, .95], [1]),                  # just below
    ([.33, .38, .95, .95, .95, .95], [1]),                   # a rise that does not leave the floor's noise
])
def test_flu_rule(accuracy, layers): assert flu_layers(curve(accuracy)) == layers

def test_flu_reads_the_subject_without_control_in_any_order():
    c = pd.concat([curve([.3, .3, .9]), curve([.9, .9, .9], position="last")])
    assert flu_layers(c) == [1] and flu_layers(c.sample(frac=1, random_state=0)) == [1]

def test_flu_needs_more_than_noise():
    assert flu_layers(curve([.33, .43], n=20)) == [] and flu_layers(curve([.33, .43], n=2000)) == [0]


def test_features_are_hf_hidden_states(lm):
    fs = [Fact(id=str(i), relation="r", subject=s, answer=" golf", candidates=SPORTS, prompt=p.format(s)) for i, (s, p) in enumerate(
        [("dog", "Fact: {} plays the sport of"), ("the doger", "{} plays"), ("player", "of of of {} is a professional")])]
    x = features(lm, fs, batch_size=2)
    assert x.shape == (3, lm.n_layers + 1, len(POSITIONS), lm.d_model) and x.dtype == np.float32
    for i, f in enumerate(fs):
        (_, stop), = lm.subject_positions([f.prompt], [f.subject])
        with torch.no_grad(): h = lm.hf(torch.tensor(lm.ids([f.prompt])), output_hidden_states=True).hidden_states
        for l in range(lm.n_layers): # HF's last hidden state is behind the final norm
            np.testing.assert_allclose(x[i, l], h[l][0, [stop - 1, -1]].numpy(), atol=1e-5)

def test_constant_features_predict_the_most_frequent():
    p = fit_probe(np.ones((9, 4), "float32"), ["a"] * 6 + ["b"] * 3)
    assert set(p.predict(np.ones((5, 4)))) == {"a"}

def test_stage_is_made_once(planted, tiny, tmp_path, monkeypatch):
    lm, t = tiny(), task()
    run = Run(tmp_path, lm.name, lm.revision, t.name, {})
    first = run_probing(lm, lambda seed: t, run, seeds=(3,), draws=7)
    monkeypatch.setattr(probing, "probe_hits", None)
    assert run_probing(lm, lambda seed: t, run).equals(first) and (tmp_path / "scores" / "probing.parquet").exists()
    assert first.in_flu[first.layer == 1].eq(1).all() and first.in_flu[first.layer < 0].isna().all() and "layer 0 in 0.07 of resamples." in say_probe(first, [1])
    assert "resamples of the test facts agree" in say_probe(first.assign(in_flu=first.in_flu.gt(.5)), [1]) and not any("resamples" in say_probe(c, [1]) for c in (first.drop(columns="in_flu"), first.assign(in_flu=np.nan)))
    with pytest.raises(TypeError): run_probing(lm, lambda seed: task(retain=facts(10, 60)), run)
    with pytest.raises(TypeError): run_probing(lm, lambda seed: t, run, recompute=True)


# ---- where the lookup ends

def two(subject, last, n=200): return pd.concat([curve(subject, n), curve(last, n, "last")], ignore_index=True)

UP = [.33, .33, .40, .60, .80, .90, .90, .90, .90, .98, .99, .99, .99] # the subject learns in 1-4, and rises again in 8

@pytest.mark.parametrize("last,onset,layers", [
    ([.33] * 9 + [.95, .98, .99, .99], 8, [1, 2, 3, 4]),                          # one jump
    ([.33] * 6 + [.40, .50, .60, .95, .98, .99, .99], 6, [1, 2, 3, 4]),           # a slow climb is dated by its beginning
    ([.33, .50] + [.50] * 7 + [.95, .98, .99, .99], 8, [1, 2, 3, 4]),             # what the name alone gives early is no extraction
    ([.33, .50, .48, .52, .50, .49, .51, .50, .50, .95, .98, .99, .99], 8, [1, 2, 3, 4]),
    ([.33] * 13, None, [1, 2, 3, 4, 5, 6, 7, 8]),                                 # never arrives: nothing bounds it
    ([.99] * 13, None, [1, 2, 3, 4, 5, 6, 7, 8]),
    ([.33, .95] + [.98] * 11, 0, []),                                             # arrives before the subject learns it: no lookup there
    ([.33, .33, .33, .90] + [.98] * 9, 2, [1]),                                   # in the midst of the subject's rise
])
def test_flu_ends_where_extraction_begins(last, onset, layers):
    c = two(UP, last)
    assert extraction_onset(c) == onset and flu_layers(c) == layers == flu_layers(c.sample(frac=1, random_state=1))
    assert flu_layers(c, rule="first-to-last-rise") == flu_layers(curve(UP)) == [1, 2, 3, 4, 5, 6, 7, 8]

def test_where_the_subject_ends_the_prompt_there_is_no_extraction_to_wait_for():
    assert extraction_onset(two(UP, UP)) is None and flu_layers(two(UP, UP)) == flu_layers(curve(UP))

def test_a_climb_is_followed_back_as_far_as_it_is_seen():
    slow = [.33] * 6 + [.40, .50, .60, .95, .98, .99, .99]
    assert [extraction_onset(two(UP, slow, n)) for n in (50, 200, 2000)] == [8, 6, 5]
    sport = [.52, .66, .56, .61, .68, .75, .76, .81, .85, .77, .81, .82, .90, 1.] # 79 players: .05 more at the fourth point are four of them
    assert extraction_onset(two([.71, .71, .73, .80, .89, .89] + [.92] * 8, sport, 79)) == 4

def test_a_recovery_from_a_dip_is_no_lookup():
    names = [.88, .98, .82, .82, .80, .92, .90, .90, .98, 1., .98, .98, .98] # 40 places of the world whose answer the name tells
    assert flu_layers(two(names, [.48, .60, .78, .88, .88, .92] + [.95] * 7, 40)) == []

def test_noise_at_the_last_token_moves_no_bound():
    assert extraction_onset(two(UP, [.33, .40, .36, .41, .38, .42], n=40)) is None

def test_unknown_rule_is_refused_with_the_nearest():
    with pytest.raises(Refusal, match="before-extraction"): flu_layers(curve(UP), rule="before-extracton")

def test_the_curve_is_counted_from_hits_relation_by_relation(planted):
    cities = facts(0, 90, "city", "c")
    t = task(forget=facts(0, 4) + cities[:3], retain=facts(10, 100) + cities[3:60], retain_test=facts(100, 160) + cities[60:])
    hits = probe_hits(None, t, n_control=2)
    assert sorted(h.shape for h in hits) == [(30, 6, 2, 3), (80, 6, 2, 3)] and curve_of(hits).equals(probe_curve(None, t, n_control=2))
    one = curve_of(hits).query("position == 'last' and layer == 2").set_index("control").accuracy
    assert one[False] == sum(h[:, 3, 1, 0].sum() for h in hits) / 110 and np.isclose(one[True], sum(h[:, 3, 1, 1:].mean(-1).sum() for h in hits) / 110)

def test_frequency_of_a_planted_layer(planted):
    sure = flu_frequency(probe_hits(None, task()), n_boot=50)
    assert sure[1] == 1 and sure.drop(1).max() < .2 and list(sure.index) == [0, 1, 2, 3, 4]
    assert sure.equals(flu_frequency(probe_hits(None, task()), n_boot=50))
