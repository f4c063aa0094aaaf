"Latent knowledge: probes that must find what is there and nothing else."
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from mechunlearn.questions import as_records
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.finetuning import Edit, fingerprint, slice_key
from mechunlearn.latent import (Probes, aligned, edited_relations, fit_binary, latent, latent_curve, latent_selectivity, original_probes,
    plot_latent, plot_layers, read, run_latent, strongest)
from mechunlearn.localization import build
from mechunlearn.models import Component
from mechunlearn.probing import fit_probe
from mechunlearn.store import Refusal, Run, read_meta


@pytest.fixture(scope="module")
def task(): return sports_athlete_editing(None, forget_size=8)


def written(facts, layer, rng, answer=lambda f: f.answer, d=12, layers=4):
    "Made-up activations: noise, and from `layer` on the answer at the subject."
    x, words = rng.normal(size=(len(facts), layers, 2, d)), sorted({" football", " baseball", " basketball"})
    for i, f in enumerate(facts): x[i, layer:, 0, words.index(answer(f))] += 6
    return x.astype(np.float32)


def noise(lm, layer):
    where = build(lm, "noise", [Component("mlp", layer)])
    values = {slice_key(s): lm.weight(s.param).narrow(s.dim, s.start, s.stop - s.start).float() + .3 for s in where.slices}
    return Edit(where, values, pd.DataFrame(), dict(model=lm.name, revision=lm.revision))


def accuracy(records, column="top1_truth"): return records.groupby(["setting", "layer"])[column].mean().astype(float)


def test_probes_read_what_is_written_where_it_is_written(task):
    rng = np.random.default_rng(0)
    probes = Probes(task.retain, written(task.retain, 2, rng))
    records = read(probes, task.forget + task.retain_test, written(task.forget + task.retain_test, 2, rng), "forget")
    a = accuracy(records)
    assert a["subject", 1] > .95 and a["subject", 2] > .95  # layers count from -1
    assert max(a["subject", -1], a["subject", 0], a["last"].max()) < .5


def test_an_edit_that_rewrites_the_stream_is_read_as_the_edit(task):
    rng = np.random.default_rng(0)
    probes = Probes(task.retain, written(task.retain, 0, rng))
    records = read(probes, task.forget, written(task.forget, 0, rng, lambda f: f.edit), "forget").query("setting == 'subject'")
    assert records.top1_edit.all() and not records.top1_truth.any() and (records.prob_edit > .5).all()


def test_shuffled_answers_are_not_learned(task):
    rng = np.random.default_rng(0)
    probes = Probes(task.retain, written(task.retain, 0, rng), seed=0)
    a = accuracy(read(probes, task.retain_test, written(task.retain_test, 0, rng), "retain", "/shuffled"))
    assert a["subject/shuffled"].max() < .55


def test_probabilities_are_those_of_the_probe(task):
    rng = np.random.default_rng(0)
    x = written(task.retain, 0, rng)
    probes, r = Probes(task.retain, x), None
    r = read(probes, task.forget, written(task.forget, 0, rng), "forget")
    assert r.prob_truth.between(0, 1).all() and (r.prob_truth + r.prob_edit <= 1 + 1e-6).all()
    best = r[r.prob_truth > .5]
    assert len(best) and best.top1_truth.all()


FITS = {"": fit_probe, "/binary": fit_binary}


def planted(task, layer, rng, n_control=3):
    "Both kinds of probe and their controls on made-up activations with the answer at the subject from `layer` on (4: nowhere)."
    test, parts = list(task.retain_test), []
    x, xt = written(task.retain, layer, rng), written(test, layer, rng)
    for kind, fit in FITS.items():
        parts.append(read(Probes(task.retain, x, fit=fit), test, xt, "retain", kind))
        parts += [read(Probes(task.retain, x, k, fit), test, xt, "retain", kind + "/shuffled", k) for k in range(n_control)]
    return pd.concat(parts, ignore_index=True)


def test_both_kinds_of_probe_find_what_is_planted_and_are_selective(task):
    records = planted(task, 2, np.random.default_rng(0))
    a, s = accuracy(records), latent_selectivity(records).set_index(["setting", "layer"])
    for kind in FITS:
        assert a["subject" + kind, 1] > .95 and a["subject" + kind, 2] > .95
        assert (s.loc[("subject" + kind, [1, 2]), "ci_low"] > .4).all() and (s.loc[("subject" + kind, [1, 2]), "p"] < .01).all()
        assert s.value["subject" + kind, 1] == pytest.approx(a["subject" + kind, 1] - a["subject" + kind + "/shuffled", 1])


def test_both_kinds_of_probe_find_nothing_in_noise(task):
    records = planted(task, 4, np.random.default_rng(1))
    n, s = len(task.retain_test), latent_selectivity(records)
    assert (abs(accuracy(records) - 1 / 3) < 4 * np.sqrt(2 / 9 / n)).all()
    assert len(s) == 16 and (s.n == n).all() and ((s.ci_low <= 0) & (s.ci_high >= 0)).mean() > .85


def test_selectivity_is_a_difference_of_the_same_facts():
    "Ten facts, all read at both settings: 7 right, 4 right under the control, 3 of them among the 7. Two controls count once."
    right = {"subject": [1] * 7 + [0] * 3, "subject/shuffled": [1, 1, 1, 0, 0, 0, 0, 0, 0, 1]}
    rows = [dict(fact=f"f{i}", group="forget", layer=0, setting=s, top1_truth=bool(hit)) for s, hits in right.items() for i, hit in enumerate(hits)]
    one = latent_selectivity(as_records(rows, evaluation="latent")).iloc[0]
    assert one.n == 10 and one.value == pytest.approx(.3) and one.ci_low < .3 < one.ci_high
    again = [r | dict(top1_truth=False) for r in rows if r["setting"] == "subject/shuffled"]
    two = latent_selectivity(as_records(rows + again, evaluation="latent")).iloc[0]
    assert two.n == 10 and two.value == pytest.approx(.5)
    with pytest.raises(Refusal, match="shuffled"): latent_selectivity(as_records(rows[:10], evaluation="latent"))


def test_binary_probes_are_yes_or_no_probes_of_which_the_surest_wins(task):
    rng = np.random.default_rng(0)
    x, y = written(task.retain, 0, rng)[:, 0, 0], np.array([f.answer for f in task.retain])
    new = written(task.retain_test, 0, rng)[:, 0, 0] * .3
    each = np.stack([fit_probe(x, y == a).predict_proba(new)[:, 1] for a in sorted(set(y))], 1)
    probe = fit_binary(x, y)
    assert np.allclose(probe.predict_proba(new), each / each.sum(1, keepdims=True), atol=1e-4)
    assert (probe.predict(new) == np.array(sorted(set(y)))[each.argmax(1)]).all()


def test_two_answers_need_one_binary_probe(task):
    two = [f for f in task.retain if f.answer != " football"]
    x = np.random.default_rng(0).normal(size=(len(two), 2, 2, 5))
    a, b = (read(Probes(two, x, fit=fit), two, x, "retain") for fit in FITS.values())
    assert np.allclose(a.prob_truth, b.prob_truth, atol=1e-3)


def test_one_answer_cannot_be_probed(task):
    same = [f for f in task.retain if f.answer == " football"]
    with pytest.raises(Refusal, match="same answer"): Probes(same, np.zeros((len(same), 2, 2, 3)))


def test_relations_have_their_own_probes(task):
    city = [f for f in task.other_relation if f.relation == "city"]
    assert {f.relation for f in edited_relations(task)} == {"sport"}
    rng = np.random.default_rng(0)
    facts = list(task.retain) + city
    probes = Probes(facts, rng.normal(size=(len(facts), 2, 2, 5)))
    assert set(probes.classes["sport"]) <= {" football", " baseball", " basketball"} and not set(probes.classes["city"]) & set(probes.classes["sport"])
    r = read(probes, city[:5] + list(task.forget[:3]), rng.normal(size=(8, 2, 2, 5)), "x")
    assert len(r) == 8 * 4 and r.groupby("fact").size().eq(4).all()


def test_no_forgotten_ghost_or_test_fact_is_trained_on(task):
    held = {f.subject for f in task.forget + task.ghosts + task.retain_test + task.dev_forget}
    assert not held & {f.subject for f in edited_relations(task)}


@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
def test_records_and_model_afterwards(tiny, task, family):
    lm = tiny(family)
    before, edit = fingerprint(lm), noise(lm, 1)
    r = latent(lm, task, edit, n_train=20, max_facts=6)
    assert fingerprint(lm) == before
    assert set(r.setting) == {p + s for p in ("subject", "last") for s in ("", "/transferred", "/shuffled")}
    assert sorted(r.layer.unique()) == list(range(-1, lm.n_layers))
    assert r.groupby("group").fact.nunique().to_dict() == dict(forget=8, ghost=6, retain=6)
    assert (r[r.group == "ghost"].top1_edit.isna()).all()


def test_below_the_edit_everything_is_as_it_was(tiny, task):
    lm = tiny("llama")
    kw = dict(n_train=30, max_facts=6)
    plain, edited = latent(lm, task, None, **kw), latent(lm, task, noise(lm, 1), **kw)
    pick = lambda r, s, layers: r[(r.setting == s) & r.layer.isin(layers)].sort_values(["group", "layer", "fact"]).prob_truth.to_numpy()
    assert np.array_equal(pick(plain, "subject", [-1, 0]), pick(edited, "subject", [-1, 0]))
    assert np.array_equal(pick(plain, "subject", [-1, 0]), pick(edited, "subject/transferred", [-1, 0]))
    assert not np.allclose(pick(plain, "subject", [1, 2]), pick(edited, "subject/transferred", [1, 2]))
    assert set(plain.setting) == {p + s for p in ("subject", "last") for s in ("", "/shuffled")}


def test_options_add_records_and_change_none(tiny, task):
    lm, kw = tiny(), dict(n_train=30, max_facts=4)
    plain, more = (latent(lm, task, noise(lm, 0), **kw | extra) for extra in ({}, dict(binary=True, n_control=2)))
    assert {p + s for p in ("subject", "last") for s in ("/binary", "/binary/shuffled")} == set(more.setting) - set(plain.setting)
    old = more[~more.setting.str.contains("binary") & (more.variant == 0)].reset_index(drop=True)
    keys = ["setting", "group", "layer", "fact"]
    pd.testing.assert_frame_equal(plain.sort_values(keys, ignore_index=True), old.sort_values(keys, ignore_index=True))
    says = more[more.variant == 0].pivot(index=["group", "layer", "fact"], columns="setting", values="prob_truth")
    for kind in ("", "/shuffled"): assert not np.allclose(says["subject" + kind], says["subject/binary" + kind])
    controls = more[more.setting == "subject/shuffled"].pivot(index=["group", "layer", "fact"], columns="variant", values="prob_truth")
    assert list(controls) == [0, 1] and not np.allclose(controls[0], controls[1])
    assert len(strongest(more, setting="subject/shuffled")) == len(task.forget)
    assert not set(latent(lm, task, n_control=0, **kw).setting) - {"subject", "last"}


def test_transferred_probes_can_be_given(tiny, task):
    lm = tiny()
    given = original_probes(lm, task, n_train=30)
    a, b = (latent(lm, task, noise(lm, 0), original=o, n_train=30, max_facts=4) for o in (given, None))
    pd.testing.assert_frame_equal(a, b)


def test_the_strongest_layer_is_chosen_on_other_facts():
    rng, rows = np.random.default_rng(0), []
    for i in range(200):
        for layer in range(30): rows.append(dict(fact=f"f{i:03d}", group="forget", layer=layer, setting="subject", top1_truth=bool(rng.random() < 1 / 3)))
    noise_only = as_records(rows, evaluation="latent")
    best_of_all = noise_only.groupby("layer").top1_truth.mean().max()
    assert best_of_all > 1 / 3 + .04 and abs(strongest(noise_only).mean() - 1 / 3) < .07
    known = as_records([r | dict(top1_truth=True) if r["layer"] == 17 else r for r in rows], evaluation="latent")
    assert strongest(known).mean() == 1 and len(strongest(known)) == 200
    assert not len(strongest(noise_only, "ghost"))


def of_one(records): return records.assign(localization="none", draw=0, seed=0)


def test_curve_counts_facts(tiny, task):
    curve = latent_curve(of_one(latent(tiny(), task, None, n_train=20, max_facts=6)))
    n = curve.query("setting == 'subject' and layer == 0 and answer == 'truth'").set_index("group").n.to_dict()
    assert n == dict(forget=8, retain=6, ghost=6)
    assert (curve.ci_low <= curve.value).all() and (curve.value <= curve.ci_high).all()


def test_stage_writes_each_table_once(tiny, task, tmp_path, monkeypatch):
    lm = tiny()
    run = Run(tmp_path, lm.name, lm.revision, task.name, {})
    how = dict(latents=dict(n_train=20, max_facts=4), steps=2, lr=1e-3, progress=False)
    first = run_latent(lm, lambda seed: task, run, ["late"], [0], **how)
    assert set(first.localization) == {"none", "late"} and (tmp_path / "late/seed0/latent.parquet").exists()
    monkeypatch.setattr("mechunlearn.latent.latent", lambda *a, **kw: pytest.fail("made again"))
    pd.testing.assert_frame_equal(first, run_latent(lm, lambda seed: task, run, ["late"], [0], **how))


def test_binary_probes_are_another_artefact(tiny, task, tmp_path):
    lm = tiny()
    run = Run(tmp_path, lm.name, lm.revision, task.name, {})
    causes, small = [], dict(n_train=20, max_facts=4)
    for more in ({}, dict(binary=True), dict(n_control=2), {}):
        metrics = run_latent(lm, lambda seed: task, run, [], [0], latents=small | more)
        causes.append(read_meta(tmp_path / "none/seed0/latent.parquet")["hash"])
        assert ("subject/binary" in set(metrics.setting)) == ("binary" in more)
    assert len(set(causes)) == 3 and causes[0] == causes[3]


def hill(n_layers, peak=.75, model="", localization="late"):
    "A curve that is 1 at one relative depth and 0 an eighth away from it."
    layer = np.arange(-1, n_layers)
    return pd.DataFrame(dict(model=model, localization=localization, group="forget", setting="last", answer="truth", layer=layer,
        value=np.maximum(0, 1 - 8 * abs((layer + 1) / n_layers - peak))))


def test_peaks_of_models_of_different_depth_are_aligned():
    both = pd.concat([hill(8, model="a"), hill(16, model="b")])
    by_index = both.query("layer < 8").groupby("layer").value.mean()
    assert by_index.idxmax() == 5 and by_index.max() == .5  # three quarters of model a, a third of model b
    at = aligned(both)
    top = at.loc[at.value.idxmax()]
    assert top.depth == .75 and top.value == 1 and len(at) == 17 and (at.models == 2).all()
    assert np.allclose(at.value, np.maximum(0, 1 - 8 * abs(at.depth - .75))) and np.allclose(at.highest, at.lowest)


def test_a_model_counts_once_however_many_seeds_and_sizes_it_has():
    "Two seeds of one model with 0 and .5, and one of another with 1: not a half but .625."
    flat = [hill(4, model=m).assign(value=v, seed=s) for m, v, s in [("a", 0., 0), ("a", .5, 1), ("b", 1., 0)]]
    at = aligned(pd.concat(flat))
    assert (at.value == .625).all() and (at.lowest == .25).all() and (at.highest == 1).all() and (at.models == 2).all()


def test_nothing_is_made_up_beyond_the_layers_of_a_model():
    part = hill(8, model="b").query("layer >= 3")
    at = aligned(pd.concat([hill(8, model="a"), part]))
    assert at.depth.min() == .5 and at.depth.max() == 1
    short = hill(8, model="a").query("layer < 7")  # the last layer was not read
    assert aligned(short, n_layers=dict(a=8)).depth.max() == 7 / 8
    only = aligned(pd.concat([hill(8, model="a"), hill(16, model="b"), hill(8, model="a", localization="flu")]))
    assert only.groupby("localization").models.first().to_dict() == dict(late=2, flu=1)
    with pytest.raises(Refusal, match="column `model`"): aligned(hill(8).drop(columns="model"))


def test_lines_are_the_curves(tiny, task):
    records = latent(tiny(), task, n_train=20, max_facts=4, binary=True)
    curves = latent_curve(of_one(records))
    shown = curves.query("group == 'forget' and setting in ['subject', 'last']")
    axes = np.array(plot_layers(shown).axes).reshape(2, 2)
    assert [a.get_title("left") for a in axes[0]] == ["truth", "edit"] and [a.get_ylabel() for a in axes[:, 0]] == ["subject", "last"]
    drawn = axes[1, 1].lines[0].get_ydata()
    assert np.allclose(drawn, shown.query("setting == 'last' and answer == 'edit'").sort_values("layer").value)
    depth = np.array(plot_layers(aligned(shown.assign(model="m"))).axes)[-1].lines[0]
    assert np.allclose(depth.get_ydata(), drawn) and np.allclose(depth.get_xdata(), np.linspace(0, 1, len(drawn)))
    plt.close("all")


def test_bands_are_for_single_rows_and_binary_probes_are_not_dashes(tiny, task):
    curves = latent_curve(of_one(latent(tiny(), task, n_train=20, max_facts=4, binary=True)))
    one = curves.query("group == 'forget' and setting == 'subject'")
    two = pd.concat([one, one.assign(value=one.value / 2)])
    banded, mean = (plot_layers(c).axes[0] for c in (one, two))
    assert len(banded.collections) == 1 and not len(mean.collections)
    assert np.allclose(mean.lines[0].get_ydata(), .75 * banded.lines[0].get_ydata())
    drawn = {line.get_linestyle() for line in plot_latent(curves).axes[0].lines}
    assert drawn == {"-", ":"} and len(plot_latent(curves).axes) == 1
    plt.close("all")


def test_a_sport_that_is_edited_as_a_whole_is_learnt_from_its_other_half():
    from mechunlearn.tasks import make_task
    task = make_task("full-sports-editing", None, sport="basketball", seed=0)
    train = edited_relations(task, 10**6)
    sport = {f.answer for f in task.forget}
    assert len(sport) == 1 and sport < {f.answer for f in train} and not {f.subject for f in train} & {f.subject for f in task.forget}
    assert {f.id for f in train if f.answer in sport} == {f.id for f in task.forget_test}
