"Latent knowledge: probes that must find what is there and nothing else."
import numpy as np, pandas as pd, pytest, torch
from mechunlearn.evaluation import as_records
from mechunlearn.facts import sports_athlete_editing
from mechunlearn.finetuning import Edit, fingerprint, slice_key
from mechunlearn.latent import Probes, edited_relations, latent, latent_curve, original_probes, read, run_latent, strongest
from mechunlearn.localization import build
from mechunlearn.models import Component
from mechunlearn.store import Refusal, Run


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


def test_curve_counts_facts(tiny, task):
    curve = latent_curve(latent(tiny(), task, None, n_train=20, max_facts=6))
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
