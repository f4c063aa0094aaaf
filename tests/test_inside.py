"Reading inside: that a lens is the model where it must be, that states are put where they should, and what is found of edits whose truth is known."
import numpy as np, pandas as pd, pytest, torch
from plain import blocks, every_family, last_norm
from mechunlearn.attacks import attack
from mechunlearn.audit import audit
from mechunlearn.facts import Fact
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.finetuning import Edit, finetune, fingerprint, place, slice_key
from mechunlearn.inside import (States, Translators, Words, asked_inside, candidate_records, depth_table, depths, moved, first_tokens, inside_curve, known_answers, lens,
    lens_facts, lens_records, look_up, patch_in, places, plot_depths, plot_moved, plot_inside, read_inside, run_inside, say_depths, states, strangers, swings, unedited, union_records)
from mechunlearn.localization import Localization, build
from mechunlearn.models import Component, Slice, load, resid_at
from mechunlearn.questions import answer, as_records, completions, multiple_choice, paraphrases
from mechunlearn.scorecard import among, guesses, scorecard
from mechunlearn.stats import per_fact
from mechunlearn.store import Refusal, Run, notes
from mechunlearn.tasks import make_task

SMALL = dict(max_facts=4, n_train=12, n_strangers=1)


@pytest.fixture(scope="module")
def task(): return sports_athlete_editing(None, forget_size=6)


def of_lengths(task):
    "Facts whose prompts have several lengths, so that batches are padded"
    long = [f.model_copy(update=dict(prompt="the " * k + f.prompt)) for k, f in enumerate(task.forget[:3])]
    return completions(long, "forget")


def pushed(lm, *parts, by=.3):
    where = build(lm, "pushed", list(parts) or [Component("mlp", 1)])
    values = {slice_key(s): place(lm, s).float() + by for s in where.slices}
    return Edit(where, values, pd.DataFrame(), dict(model=lm.name, revision=lm.revision))


def test_states_are_put_in_only_where_somebody_is_to_compare_with(tiny, task):
    lm = tiny()
    plain = {k: read_inside(lm, task, pushed(lm), **SMALL | dict(n_strangers=k)) for k in (0, 1)}
    names = {k: set(r.setting.str.split("/").str[0]) for k, r in plain.items()}
    assert names[1] - names[0] == {"into-original", "into-edited", "stranger", "original"} and names[0] < names[1]
    same = [r[r.setting.str.startswith("tuned")].reset_index(drop=True) for r in plain.values()]
    pd.testing.assert_frame_equal(*same)


# ---- states and lenses

@every_family
@torch.no_grad()
def test_states_are_the_stream_and_what_mlps_add(lm, task):
    facts = [q.fact for q in of_lengths(task)]
    got, spans = states(lm, facts, 2), lm.subject_positions([f.prompt for f in facts], [f.subject for f in facts])
    assert torch.equal(places(lm, facts), torch.tensor([[stop - 1, -1] for _, stop in spans]))
    assert torch.allclose(got.stream, resid_at(lm, [f.prompt for f in facts], places(lm, facts).tolist(), 3), atol=1e-5)
    assert got.mlp.shape == (3, lm.n_layers, 2, lm.d_model)
    if not lm.parallel: # with attention, the rest of the difference between two layers
        edit = pushed(lm, Component("mlp", lm.n_layers - 1))
        with edit.applied(lm): after = states(lm, facts, 3)
        assert torch.allclose(after.stream[:, -1] - got.stream[:, -1], after.mlp[:, -1] - got.mlp[:, -1], atol=1e-4) and (after.mlp - got.mlp)[:, -1].abs().max() > 1e-3


@every_family
@torch.no_grad()
def test_the_lens_at_the_end_is_the_model(lm, task):
    questions = of_lengths(task)
    asked, x = answer(lm, questions), states(lm, [q.fact for q in questions]).stream[:, -1:, 1:]
    for whole in (True, False):
        r = lens_records(questions, lens(lm, questions, x, whole), "lens", lm.n_layers - 1)
        assert r.prob_truth.to_numpy() == pytest.approx(asked.prob_truth.to_numpy(), rel=1e-3)
        assert r.full_truth.isna().all() if not whole else r.full_truth.to_numpy() == pytest.approx(asked.full_truth.to_numpy(), rel=1e-3)


@torch.no_grad()
def test_the_lens_inside_is_norm_and_unembedding(lm, task):
    questions = completions(task.forget, "forget")
    x = states(lm, task.forget).stream
    got, (ids, truth) = lens(lm, questions, x), first_tokens(lm, questions)
    want = lm.cap(lm.hf.get_output_embeddings()(last_norm(lm.hf)(x[2, 1, 0]))).float()
    assert torch.allclose(got.logits[2, 1, 0], want[ids[2]], atol=1e-4) and got.top[2, 1, 0] == pytest.approx(want.max().item(), abs=1e-4)
    assert got.rank[2, 1, 0] == (want > want[ids[2, truth[2]]]).sum()


def test_a_vocabulary_is_never_kept_whole(tiny, task, monkeypatch):
    lm, seen = tiny(), []
    questions, x = completions(task.forget, "forget"), states(lm, task.forget).stream
    want, unembed = lens(lm, questions, x), lm.unembed
    monkeypatch.setattr("mechunlearn.inside.CHUNK", 5 * len(lm.tok))
    monkeypatch.setattr(type(lm), "unembed", lambda self, h, weights={}: seen.append(len(h)) or unembed(h, weights))
    got = lens(lm, questions, x)
    assert max(seen) == 5 and all(torch.allclose(a.float(), b.float(), atol=1e-4) for a, b in zip(got, want))


def test_ranks_and_ragged_choices():
    logits = torch.tensor([[0., 3., 1., 2.], [5., 4., 3., 2.]])
    w = look_up(logits, torch.tensor([[2, 1, -1], [3, 0, 1]]), torch.tensor([0, 0]))
    assert w.rank.tolist() == [2, 3] and w.top.tolist() == [3., 5.] and w.logits[0, 2].isnan() and w.logits[1].tolist() == [2., 5., 4.]
    assert torch.allclose(w.total, logits.logsumexp(1))


def test_what_is_as_probable_as_others_is_given_once(tiny, task):
    w = look_up(torch.tensor([[1., 1., 1., 0.]]), torch.tensor([[0, 1, 2]]), torch.tensor([0]))
    assert w.rank.tolist() == [2] # behind the two others
    q = completions(task.forget, "forget")[0]
    r = lens_records([q], Words(torch.ones(1, 1, 1, len(q.choices)), *torch.ones(2, 1, 1, 1), torch.zeros(1, 1, 1)), "lens").iloc[0]
    assert bool(r.top1_truth) + bool(r.top1_edit) < 2


def test_open_questions_are_compared_with_every_word(tiny):
    lm = tiny("llama")
    fact = Fact(id="x/1", relation="x", subject="fox", prompt="Fact: the bright fox watches", answer=" the market", edit=" golf")
    q, x = completions([fact], "forget"), states(lm, [fact]).stream[:, -1:, 1:]
    best = int(lm.hf(**lm.encode([fact.prompt])).logits[0, -1].argmax())
    hits = lens_records(q, lens(lm, q, x), "lens")
    assert not hits.top1_truth.any() or lm.first_token(" the market") == best
    head = lm.hf.get_output_embeddings().weight
    with torch.no_grad(): head[lm.first_token(" the market")] += 100 * last_norm(lm.hf)(x[0, 0, 0]) # now it is the best of all
    assert lens_records(q, lens(lm, q, x), "lens").top1_truth.all()


def test_translators_find_an_affine_map_and_use_the_old_head(tiny, task):
    lm, rng = tiny("gemma2"), torch.Generator().manual_seed(0)
    x = torch.randn(120, lm.n_layers + 1, 2, lm.d_model, generator=rng)
    with torch.no_grad(): read = last_norm(lm.hf)(x[:, -1, 1])
    turn = torch.randn(lm.d_model, lm.d_model, generator=rng)
    x[:, 1, 0] = read @ turn + 3 # another basis, and shifted
    translate = Translators(lm, States(x[:90], torch.zeros(0)))
    got = translate(x[90:])
    error = lambda l, p: ((got[:, l, p] - read[90:]).norm() / read[90:].norm()).item()
    assert error(1, 0) < .2 < .5 < error(0, 0) # and what is noise cannot be translated
    questions = completions(task.forget[:1] * 30, "forget")
    assert torch.allclose(lens(lm, questions, read[90:, None, None], normed=True).logits, lens(lm, questions, x[90:, -1:, 1:]).logits, atol=1e-4)


def test_no_lens_is_fitted_on_what_it_reads(task):
    asked = {q.fact.subject for qs in asked_inside(task).values() for q in qs}
    train = lens_facts(task, 40)
    assert len(train) == 40 and not {f.subject for f in train} & asked and {f.relation for f in train} == {"sport"}
    none = task.model_copy(update=dict(retain=tuple(f.model_copy(update=dict(relation="other")) for f in task.retain)))
    assert {f.relation for f in lens_facts(none)} == {"other"}


# ---- putting states in

@every_family
@torch.no_grad()
def test_a_state_is_put_where_it_should_be(lm, task):
    questions = of_lengths(task)
    donors = torch.randn(3, lm.n_layers, 2, lm.d_model, generator=torch.Generator().manual_seed(0))
    got, at, (ids, _) = patch_in(lm, questions, donors, 2), places(lm, [q.fact for q in questions]), first_tokens(lm, questions)
    for i, l, p in [(0, 0, 0), (1, 1, 1), (2, lm.n_layers - 1, 1), (2, 1, 0)]:
        def put(module, args, out, i=i, l=l, p=p):
            first = (out[0] if isinstance(out, tuple) else out).clone()
            first[0, at[i, p]] = donors[i, l, p]
            return (first, *out[1:]) if isinstance(out, tuple) else first
        handle = blocks(lm.hf)[l].register_forward_hook(put)
        try: want = lm.hf(**lm.encode([questions[i].prompt])).logits[0, -1].float()
        finally: handle.remove()
        assert torch.allclose(got.logits[i, l, p], want[ids[i]], atol=1e-3) and got.total[i, l, p] == pytest.approx(want.logsumexp(-1).item(), abs=1e-3)


def test_a_models_own_states_change_nothing(lm, task):
    questions = of_lengths(task)
    own, plain = states(lm, [q.fact for q in questions]).stream, answer(lm, questions)
    got = lens_records(questions, patch_in(lm, questions, own[:, 1:]), "x", 0)
    want = got.fact.map(dict(zip(plain.fact, plain.full_truth)))
    assert got.full_truth.to_numpy() == pytest.approx(want.to_numpy(), rel=1e-3)


def test_strangers_are_ghosts_or_of_another_answer(task):
    ghosts = {f.id for f in task.ghosts}
    assert {s.id for s in strangers(task, task.forget)} <= ghosts and strangers(task, task.forget, 1) != strangers(task, task.forget, 2)
    assert strangers(task, task.forget, 1) == strangers(task, task.forget, 1)
    bare = task.model_copy(update=dict(ghosts=()))
    others = strangers(bare, task.forget)
    assert all(s.answer != f.answer and s.relation == f.relation for s, f in zip(others, task.forget))
    assert strangers(bare.model_copy(update=dict(retain=())), task.forget) == [None] * len(task.forget)


# ---- depth

def invented(stranger, edited, least=-.1):
    "Log-probabilities of the truth by layer, and of the original alone"
    rows = [dict(setting="original/last", layer=len(edited) - 1, full_truth=np.exp(least))]
    rows += [dict(setting="stranger/last", layer=l, variant=k, full_truth=np.exp(x + d)) for l, x in enumerate(stranger) for k, d in enumerate((-.2, .2) if x < -1 else (0, 0))]
    rows += [dict(setting="into-original/last", layer=l, full_truth=np.exp(x)) for l, x in enumerate(edited)]
    return as_records(rows, evaluation="inside", fact="f", group="forget")


@pytest.mark.parametrize("edited, depth, since", [
    ([-.1, -.1, -2.1, -4.1], 1, 2), ([-.1] * 4, 0, None), ([-.1, -.1, -.1, -9], 4 / 6, 3), ([-9, -9, -.1, -.1], 0, None), ([-.1, -.1, -1.2, -4.1], 5.1 / 6, 2), ([0, 0, 0, 0], 0, None)])
def test_depth_counts_only_layers_in_which_a_stranger_loses(edited, depth, since):
    d = depths(invented([-.1, -.14, -2.1, -4.1], edited)).iloc[0] # loses 0, .04, 2 and 4 nats
    assert d.depth == pytest.approx(depth) and d.layers == 2 and (d.erased_from == since if since is not None else np.isnan(d.erased_from))
    assert np.isnan(depths(invented([-.1] * 4, edited)).depth.iloc[0]) # nobody loses: no depth
    assert depths(invented([-.1, -.14, -2.1, -4.1], edited), tau=.01).layers.iloc[0] == 3


def test_depths_are_averaged_over_facts_that_have_one():
    a, b, c = invented([-3], [-3]), invented([-3], [-.1]).assign(fact="g"), invented([-.1], [-3]).assign(fact="h")
    t = depth_table(pd.concat([a, b, c]).assign(localization="late", draw=0, seed=0)).iloc[0]
    assert t.value == .5 and t.n == 2 and t.ci_low < .5 < t.ci_high and "late 0.50" in say_depths(pd.DataFrame([t]))
    assert depth_table(c[c.layer < 0].assign(localization="none", draw=0, seed=0)).empty
    assert "no depth" in say_depths(depth_table(c.assign(localization="late", draw=0, seed=0)))


# ---- a few guesses

def test_candidates_are_asked_where_there_are_more_answers_than_candidates(tiny):
    lm = tiny("llama")
    task = make_task("counterfact-editing", lm, forget_size=8)
    known = known_answers(task)
    assert min(map(len, known.values())) >= 12
    questions = completions(task.forget, "forget")
    words = lens(lm, questions, states(lm, task.forget).stream)
    r = candidate_records(questions, words, 12, known)
    assert set(r.relation) == {f.relation for f in task.forget if len(known[f.relation]) > 12} and set(r.setting) == {"top12/subject", "top12/last"}
    assert r.top1_truth.tolist() == [bool(words.rank[i, l, p] < 12) for i, f in enumerate(task.forget) if len(known[f.relation]) > 12 for l in range(lm.n_layers + 1) for p in (0, 1)]
    records = read_inside(lm, task, pushed(lm), **SMALL)
    assert records.setting.str.startswith("top5").any() and not read_inside(lm, sports_athlete_editing(lm, forget_size=4), **SMALL).setting.str.startswith("top").any()


def test_what_all_layers_name_together(tiny):
    lm = tiny("llama")
    task = make_task("counterfact-editing", lm, forget_size=8)
    known, questions, x = known_answers(task), completions(task.forget, "forget"), states(lm, task.forget).stream
    x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * x.std() # a random model names the same word in every layer
    words, seen, hits = lens(lm, questions, x), swings(lm, questions, x), {"each": {}, "swing": {}}
    for i, f in enumerate(task.forget):
        token = lm.first_token(f.answer)
        for p in (0, 1):
            said = torch.stack([lm.hf.lm_head(lm.hf.model.norm(h)).softmax(-1) for h in x[i, :, p]]).detach()
            change = said[1:] - said[:-1]
            up, down = change.argsort(1, descending=True).tolist(), change.argsort(1).tolist()
            assert [min(u.index(token), d.index(token)) for u, d in zip(up, down)] == seen[i, :, p].tolist()
            hits["each"][f.id, p] = token in said[1:].argmax(1)
            hits["swing"][f.id, p] = any(token in (u[0], d[0]) for u, d in zip(up, down))
    n, ids = lm.n_layers, lambda b: [f.id for f in task.forget if len(known[f.relation]) > b]
    r = union_records(lm, questions, words, x, known)
    assert set(r.setting) == {f"{w}{b}/{p}" for w, b in (("each", n), ("swing", 2 * n)) for p in ("subject", "last")} and r.layer.isna().all()
    got = {w: {(f, ("subject", "last").index(s.partition("/")[2])): t for f, s, t in r[r.setting.str.startswith(w)][["fact", "setting", "top1_truth"]].values} for w in hits}
    assert got == {w: {k: bool(v) for k, v in h.items() if k[0] in ids(b)} for (w, h), b in zip(hits.items(), (n, 2 * n))}
    few = {k: v[:2 * n] for k, v in known.items()} # as many answers as words: everybody knows them
    assert set(union_records(lm, questions, words, x, few).setting) == {f"each{n}/subject", f"each{n}/last"} and union_records(lm, questions, words, x, {}).empty
    records = read_inside(lm, task, pushed(lm), **SMALL)
    assert records.setting.str.startswith(f"swing{2 * n}/").any() and "head projection" in set(scorecard(records.assign(localization="late", draw=0, seed=0)).attack)


def test_the_guess_of_naming_several():
    facts = [dict(fact=f"r{i}", truth=t, group="retain", edit=None) for i, t in enumerate("aaabbcd")] + [dict(fact=f"f{i}", truth=t, edit=e, group="forget") for i, (t, e) in enumerate(["ab", "ba", "ca", "dc"])]
    rows = as_records([f | dict(relation="r", format="completion") for f in facts], evaluation="standard")
    rows = pd.concat([rows, rows.assign(evaluation="inside", setting="top2/last", layer=1)]).assign(localization="none", draw=0, seed=0)
    assert among(per_fact(rows)) == .75 # named are a and c; b and c; b and c; a and b
    rows = rows[rows.truth != "d"] # three answers
    assert among(per_fact(rows), kept=True) == 5 / 6
    assert among(per_fact(rows.assign(setting=rows.setting.str.replace("2", "3")))) == 1 # all of them named: no attack is above that
    assert np.isnan(among(per_fact(rows[rows.evaluation == "standard"])))
    rows = pd.concat([rows, rows[rows.evaluation == "inside"].assign(setting="each1/last", layer=None)]) # each attack by the number that it names
    assert among(per_fact(rows), kept=True, setting="each.*") == 3 / 6 and guesses(per_fact(rows), kept=True)["lens candidates"] == 5 / 6 and guesses(per_fact(rows), kept=True)["head projection"] == 3 / 6


# ---- the attack

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_is_bit_identical_afterwards(lm, task, dtype):
    lm.hf.to(dtype)
    before, state = fingerprint(lm), torch.get_rng_state()
    records = read_inside(lm, task, pushed(lm), **SMALL)
    assert fingerprint(lm) == before and torch.equal(torch.get_rng_state(), state)
    assert set(records.evaluation) == {"inside"} and records.top1_truth.notna().all() and records.prob_truth.between(0, 1).all()
    n, layers = {"forget": 6, "retain": 4, "ghost": 4}, lm.n_layers
    count = records.groupby(["setting", "group"]).size().unstack(fill_value=0)
    for how, per in (("lens", layers + 1), ("tuned", layers + 1), ("into-original", layers), ("into-edited", layers), ("stranger", layers)):
        for where in ("subject", "last"):
            for g, k in n.items(): assert count.loc[f"{how}/{where}", g] == (0 if g == "ghost" and per == layers else k * per)
    assert count.loc["original/last"].tolist() == [6, 0, 4] and "old-head/last" not in count.index


def test_it_repeats_and_the_original_may_be_given(tiny, task):
    lm = tiny("qwen3")
    edit, before = pushed(lm), unedited(lm, task, 3, 12, 4, 1)
    a, b = read_inside(lm, task, edit, seed=3, **SMALL), read_inside(lm, task, edit, before, 3, **SMALL)
    pd.testing.assert_frame_equal(a, b)
    assert not read_inside(lm, task, None, **SMALL).setting.str.contains("into|stranger|original").any()


def test_facts_of_a_user(tiny, tmp_path):
    "No relation, no candidates, no ghosts, one retained fact"
    from test_unavailable import own
    lm, task = tiny("llama"), own(3)
    records = read_inside(lm, task, pushed(lm))
    assert set(records.group) == {"forget", "retain"} and not records.setting.str.startswith("tuned").any()
    run = Run(tmp_path / "run", lm.name, lm.revision, task.name, {})
    run_inside(lm, lambda seed: task, run, [], [0])
    assert "two retained facts" in notes(tmp_path / "run")["inside"]["tuned lens"]


def test_refusal(tiny, task):
    with pytest.raises(Refusal, match="at least one word, not 0"): read_inside(tiny(), task, None, candidates=0)


def test_stage_writes_each_table_once(tiny, task, tmp_path, monkeypatch):
    lm = tiny()
    run = Run(tmp_path, lm.name, lm.revision, task.name, {})
    how = dict(inside=SMALL, steps=2, lr=1e-3, progress=False)
    first = run_inside(lm, lambda seed: task, run, ["late"], [0], **how)
    assert set(first.localization) == {"none", "late"} and (tmp_path / "late/seed0/inside.parquet").exists()
    monkeypatch.setattr("mechunlearn.inside.read_inside", lambda *a, **kw: pytest.fail("made again"))
    again = run_inside(lm, lambda seed: task, run, ["late"], [0], **how)
    pd.testing.assert_frame_equal(first, again)
    curve = inside_curve(first)
    assert plot_inside(curve)._repr_png_() and plot_depths(curve)._repr_png_() and len(depth_table(first)) == 4


@pytest.mark.parametrize("which", ["standard", "all", "field"])
def test_it_is_an_attack_of_the_field(tiny, task, which, monkeypatch):
    told = {}
    for name in ("evaluate", "harden", "speak", "relearn", "latent", "low_resource", "soften", "elicit", "perturb", "read_inside", "tamper", "against_never_knew"):
        def fake(lm, task, *edit, name=name, **how):
            told[name] = how
            return as_records([dict(fact="f", group="forget")], evaluation=name)
        fake.__name__ = name
        monkeypatch.setattr(f"mechunlearn.attacks.{name}", fake)
    found = attack(tiny("llama"), task, None, attacks=which, inside=SMALL, progress=False)
    assert ("read_inside" in set(found.records.evaluation)) == ("read_inside" in told) == (which == "field")
    assert which != "field" or told["read_inside"] == SMALL | dict(batch_size=64)


# ---- edits whose truth is known

def exchanged(lm, task):
    "Only the unembedding: each sport is said as the next one, and each letter as well"
    sports = [lm.first_token(a) for a in sorted({f.answer for f in task.forget})]
    letters = [lm.first_token(" " + x) for x in "ABCD"]
    slices = [Slice("lm_head.weight", 0, t, t + 1) for t in sports + letters]
    turned = slices[1:len(sports)] + slices[:1] + slices[len(sports) + 1:] + slices[len(sports):len(sports) + 1]
    where = Localization(name="exchanged", components=(), slices=tuple(slices), sizes=(lm.d_model,) * len(slices))
    return Edit(where, {slice_key(s): place(lm, t).clone() for s, t in zip(slices, turned)}, pd.DataFrame(columns=["step", "forget", "retain"]), dict(model=lm.name, revision=lm.revision))


@pytest.fixture(scope="module")
def planted():
    "A mask of the words, a mask of the last two layers, and an edit of the lookup: what is asked of each, and what is read"
    lm = load("organism", device="cpu")
    task, brief, parts = sports_athlete_editing(lm, forget_size=16, seed=0), dict(retain_batch=32, text_batch=1, progress=False), []
    last = [Component("mlp", l) for l in (10, 11)] + [Component("head", l, h) for l in (10, 11) for h in range(lm.n_heads)]
    edits = {"exchanged": exchanged(lm, task), "last-layers": finetune(lm, task, build(lm, "last-layers", last), lr=4e-3, steps=25, **brief),
        "lookup": finetune(lm, task, build(lm, "lookup", [Component("mlp", l) for l in range(4)]), lr=4e-3, steps=25, **brief)}
    few = dict(n_train=200, max_facts=16, n_strangers=1)
    before = unedited(lm, task, **few)
    for name, edit in edits.items():
        with edit.applied(lm):
            groups = dict(forget=task.forget, retain=task.retain_test[:24], ghost=task.ghosts[:24])
            questions = [q for g, facts in groups.items() for q in completions(facts, g) + paraphrases(facts[:8], g)] + multiple_choice(task, task.forget[:8], "forget")
            parts.append(answer(lm, questions, evaluation="standard").assign(localization=name))
        parts.append(read_inside(lm, task, edit, before, **few).assign(localization=name))
    records = pd.concat(parts, ignore_index=True).assign(draw=0, seed=0)
    return lm, task, edits, records, scorecard(records).query("seed == -1").set_index(["localization", "attack"])


def test_a_mask_is_read_and_an_edit_of_the_lookup_is_not(planted):
    *_, card = planted
    for name in ("exchanged", "last-layers", "lookup"): assert card.value[name, "as trained"] < .1
    assert (card.loc["exchanged"].value.loc[["as trained", "in other words", "multiple choice"]] < .1).all() # no question shows it
    for name in ("exchanged", "last-layers"):
        assert (card.loc[name].loc[["logit lens", "tuned lens"], "excess_low"] > 0).all() and card.value[name, "worst case"] > .75, card.loc[name]
    assert card.which["exchanged", "logit lens"].startswith("old-head/last") # its own words say the wrong sport
    for attack in ("logit lens", "tuned lens"): assert card.power["lookup", attack] == 1 and card.ci_high["lookup", attack] < card.guess["lookup", attack]


def test_an_audit_names_what_reads_a_mask(planted):
    _, _, edits, records, _ = planted
    found = {n: audit(records, n) for n in edits}
    assert found["exchanged"].verdict == "leaks" and found["exchanged"].by("prompt").verdict != "leaks" and "lens" in found["exchanged"].attack, str(found["exchanged"])
    assert found["last-layers"].by("read").verdict == "leaks" and found["lookup"].verdict != "leaks", str(found["lookup"])


def test_ghosts_are_not_read(planted):
    *_, records, card = planted
    ghosts = card.loc[(slice(None), ["logit lens", "tuned lens"]), "ghost_value"]
    assert ghosts.notna().all() and ghosts.max() <= .5


def test_depth_tells_a_mask_from_an_edit_of_the_lookup(planted):
    lm, task, edits, records, _ = planted
    deep = depth_table(records).set_index(["localization", "place", "group"])
    assert (deep.value["exchanged"] < 1e-3).all() and deep.value["last-layers", "subject", "forget"] < .1 < .4 < deep.value["lookup", "subject", "forget"]
    assert deep.value["lookup", "last", "forget"] > .9 and deep.erased_from["lookup", "last", "forget"] < lm.n_layers - 1
    assert (moved(lm, task, edits["exchanged"], 4).change == 0).all()
    far = moved(lm, task, edits["last-layers"], 4).groupby(["part", "layer"]).change.max()
    assert (far.unstack().loc[:, :9] == 0).all(axis=None) and (far.unstack().loc[:, 10:] > .05).all(axis=None)
    assert plot_moved(moved(lm, task, edits["lookup"], 4).assign(localization="lookup"))._repr_png_()


@pytest.mark.slow
def test_a_real_model_with_a_large_vocabulary():
    try: lm = load("gemma-3-270m")
    except Refusal as e: pytest.skip(str(e))
    task = make_task("sports-athlete-editing", lm, forget_size=8, facts="athletes")
    edit = pushed(lm, Component("mlp", lm.n_layers - 1), by=.05)
    records = read_inside(lm, task, edit, max_facts=8, n_train=60, n_strangers=1)
    kept = records[(records.group == "retain") & (records.setting == "tuned/last")].groupby("layer").top1_truth.mean().astype(float)
    assert kept.max() > .5 and kept[-1] < kept.max()
    assert (depth_table(records.assign(localization="m", draw=0, seed=0)).query("place == 'subject'").value < .2).all() # the last layer is after the name
