"Tampering: that the model is the same afterwards, that each way does what it says, and that an edit smaller than a rounding is told from one that is not."
from contextlib import nullcontext
import numpy as np, pandas as pd, pytest, torch
from bitsandbytes import functional as F
from plain import every_family, parts
from mechunlearn.audit import audit
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.finetuning import Edit, finetune, fingerprint, parse_slice, place, put, slice_key
from mechunlearn.grids import Settings, parse
from mechunlearn.localization import build
from mechunlearn.memory import numbers, rest_quantized
from mechunlearn.models import Component, components, load
from mechunlearn.probing import features
from mechunlearn.questions import answer, completions
from mechunlearn.relearning import Lora, blind_guesses, linear_weights
from mechunlearn.scorecard import SCORED, attempts, scorecard, verdict
from mechunlearn.stats import Chance, per_fact
from mechunlearn.store import Refusal, Run, Unavailable, notes
from mechunlearn.tampering import (BACK, DESTROYED, HOLDS, KINDS_OF_TEXT, OF_NEURONS, PACKED, edit_directions, layer_of, mixed, neuron_changes, neurons_back, noisy, other_training, packed_as, plot_tampering, plot_where,
    pruned, put_back, random_half, relearn_splits, reweighted, run_tampering, say_tampering, tamper, tampered, traced_without, trained_on, verdicts, weight_changes,
    usual_writes, within_rounding, without_direction)

FEW = dict(weights=dict(noise=(.1,), draws=2, shares=(.5,)), layers=2, lora=Lora(4, 4, 1e-3, 0.), steps=2, shares=(0., .5, 1.), max_facts=6)


@pytest.fixture(scope="module")
def task(): return sports_athlete_editing(None, forget_size=8)


def moved(lm, by=.3, comps=(("mlp", 1), ("head", 0, 1))):
    "An edit of a constant"
    where = build(lm, "moved", [Component(*c) for c in comps])
    return Edit(where, {slice_key(s): place(lm, s).float() + by for s in where.slices}, pd.DataFrame(columns=["step", "forget", "retain"]), dict(model=lm.name, revision=lm.revision))


# ---- what is done to weights

@pytest.mark.parametrize("kind", PACKED)
def test_rounding_is_that_of_bitsandbytes_and_rounds_once(kind):
    w = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
    if kind == "int8": want = F.int8_vectorwise_dequant(*F.int8_vectorwise_quant(w)[:2])
    else: want = F.dequantize_4bit(*F.quantize_4bit(w, quant_type=kind, blocksize=64))
    got = packed_as(w, kind)
    assert torch.allclose(got, want, atol=1e-6) and torch.allclose(packed_as(got, kind), got, atol=1e-6)
    assert 0 < (got - w).abs().mean() < .15
    assert torch.equal(packed_as(torch.zeros(2, 64), kind), torch.zeros(2, 64))


def test_rounding_holds_what_a_quantized_model_computes_with(tiny):
    lm, path = tiny("llama"), "model.layers.1.mlp.up_proj"
    with reweighted(lm, weight_changes(quantized=("nf4",))["quantized/nf4"]): want = lm.weight(path + ".weight").clone()
    assert torch.allclose(numbers(rest_quantized(tiny("llama"), [], "4bit").hf.get_submodule(path)), want, atol=1e-6)


@every_family
def test_every_way_leaves_the_model_bit_identical(lm, task):
    before, state = fingerprint(lm), torch.get_rng_state()
    for change in weight_changes(noise=(.1,), draws=1).values():
        with reweighted(lm, change): assert fingerprint(lm) != before
        assert fingerprint(lm) == before
    with pytest.raises(RuntimeError, match="interrupted"), reweighted(lm, lambda w, i: w * 2): raise RuntimeError("interrupted")
    assert fingerprint(lm) == before and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_attack_leaves_the_model_bit_identical(tiny, task, dtype):
    lm = tiny("gemma2")
    lm.hf.to(dtype)
    hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.hf.modules()]
    before, had, state = fingerprint(lm), hooks(), torch.get_rng_state()
    for lora in (FEW["lora"], Lora(0, 1, 1e-3, 0.)): tamper(lm, task, moved(lm), **FEW | dict(lora=lora))
    assert fingerprint(lm) == before and hooks() == had and torch.equal(torch.get_rng_state(), state)
    assert not lm.hf.training and not any(p.requires_grad or p.grad is not None for p in lm.hf.parameters())


def test_embeddings_and_unembedding_are_left_alone(tiny):
    lm = tiny("llama")
    same = lambda a, b: {n for n in a if a[n] == b[n]}
    before = fingerprint(lm)
    with reweighted(lm, lambda w, i: w + 1): left = same(before, fingerprint(lm))
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= left and not left & {s.param for s in linear_weights(lm)}


def test_noise_and_pruning_do_what_they_say():
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 3
    assert ((noisy(w, 0, .2) - w).std() / w.std()).item() == pytest.approx(.2, rel=.05)
    assert torch.equal(noisy(w, 0, .2), noisy(w, 0, .2)) and not torch.equal(noisy(w, 0, .2), noisy(w, 1, .2)) and not torch.equal(noisy(w, 0, .2), noisy(w, 0, .2, 1))
    cut = pruned(w, .25)
    assert (cut == 0).float().mean() == .25 and cut[cut != 0].abs().min() > w[cut == 0].abs().max() and torch.equal(pruned(w, 0.), w)


# ---- a direction, other text, the original

@every_family
def test_hooks_give_what_nnsight_gives_and_all_facts_are_alike_along_the_direction(lm, task):
    prompts = [task.forget[0].prompt, task.forget[1].prompt + " of", "the"]
    r = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0)); r /= r.norm()
    usual = usual_writes(lm, prompts, 2)
    with torch.no_grad(), without_direction(lm, r, usual): got, stream = lm.hf(**lm.encode(prompts)).logits[:, -1], features(lm, task.forget)
    assert torch.allclose(got, traced_without(lm, prompts, r, usual), atol=1e-4)
    along = stream @ r.numpy() # after block l: what entered, and all that was added up to there
    assert np.allclose(along, np.cumsum(usual @ r)[::2][:, None].numpy(), atol=1e-3)
    assert (got - lm.hf(**lm.encode(prompts)).logits[:, -1]).abs().max() > 1e-3


@every_family
def test_what_is_usual_is_the_mean_over_all_tokens_but_the_first(lm, task):
    prompts, seen = [task.forget[0].prompt, task.forget[1].prompt + " of the"], []
    added = lm.hf.get_submodule(lm.path("mlp_add", 1)).register_forward_hook(lambda m, args, out: seen.append(out[0, 1:]))
    with torch.no_grad():
        for p in prompts: lm.hf(**lm.encode([p]))
    added.remove()
    for size in (1, 2): assert torch.allclose(usual_writes(lm, prompts, size)[4], torch.cat(seen).mean(0), atol=1e-5)


def test_a_first_token_stays_as_it_is(tiny, task):
    lm, r = tiny(), torch.eye(32)[3]
    inputs, usual = lm.encode([task.forget[0].prompt]), torch.zeros(2*tiny().n_layers + 1, 32)
    with torch.no_grad():
        before = lm.hf(**inputs, output_hidden_states=True).hidden_states[-2]
        with without_direction(lm, r, usual):
            after = lm.hf(**inputs, output_hidden_states=True).hidden_states[-2]
            bare = lm.hf(inputs["input_ids"], output_hidden_states=True).hidden_states[-2] # nobody has to say that nothing is padded
    assert torch.equal(before[:, 0], after[:, 0]) and after[:, 1:, 3].abs().max() < 1e-5 < before[:, 1:, 3].abs().max() and torch.equal(bare, after)


def test_directions_use_no_truth_of_an_edited_fact(tiny, task):
    lm, wrong = tiny(), [f.model_copy(update=dict(answer=f.edit)) for f in task.forget]
    assert torch.equal(edit_directions(lm, task, 16), edit_directions(lm, task.model_copy(update=dict(forget=tuple(wrong))), 16))
    assert torch.allclose(edit_directions(lm, task, 16).norm(dim=-1), torch.tensor(1.), atol=1e-5)


def test_a_mark_of_edited_facts_is_found(tiny, task, monkeypatch):
    mark, names = np.eye(32)[3], {f.id for f in task.forget}
    def planted(lm, facts, batch_size): # the answer given in one direction, the mark in another
        said = [f.edit if f.id in names else f.answer for f in facts]
        x = np.array([np.eye(32)[10 + hash(w) % 5] * 9 for w in said]) + np.outer([f.id in names for f in facts], mark)
        return np.broadcast_to(x[:, None, None].astype("float32"), (len(facts), 4, 2, 32)).copy()
    monkeypatch.setattr("mechunlearn.tampering.features", planted)
    assert torch.allclose(edit_directions(tiny(), task)[1, 0].abs(), torch.tensor(mark).float(), atol=1e-4)


def test_no_truth_is_trained(task):
    there = other_training(task.model_copy(update=dict(text_train=("the dog", f"{task.forget[0].subject} plays"))))
    assert set(there) == set(KINDS_OF_TEXT) and there["unrelated"][0].text_train == ("the dog",)
    edited = {(f.subject, f.relation) for f in task.forget}
    assert not any((f.subject, f.relation) in edited for f in there["topical"][1]) and {f.subject for f in there["topical"][1]} <= {f.subject for f in task.forget}
    assert not {f.subject for f in there["template"][0].retain} & {f.subject for f in task.forget}
    assert set(other_training(task.model_copy(update=dict(text_train=(), same_subject=())))) == {"template"}


@pytest.mark.parametrize("kind", KINDS_OF_TEXT)
def test_training_changes_the_model_and_repeats(tiny, task, kind, monkeypatch):
    lm, seen = tiny(), []
    import mechunlearn.relearning as R
    monkeypatch.setattr(R, "step_losses", lambda lm, values, rows, *a, _f=R.step_losses, **kw: seen.extend(tuple(r.ids) for r in rows) or _f(lm, values, rows, *a, **kw))
    said = lambda: answer(lm, completions(task.forget)).full_truth.to_numpy()
    before, after = said(), []
    for _ in range(2):
        with trained_on(lm, task, kind, Lora(4, 4, 1e-2, 0.), 2): after.append(said())
    assert (after[0] == after[1]).all() and abs(after[0] - before).max() > 1e-5 and (said() == before).all()
    assert seen and not set(seen) & {tuple(i) for i in lm.ids([f.prompt for f in task.forget])}


def test_the_line_and_the_layers(tiny):
    lm = tiny()
    edit, before = moved(lm), fingerprint(lm)
    def made(e):
        with e.applied(lm): return fingerprint(lm)
    assert made(mixed(lm, edit, 0.)) == before and made(mixed(lm, edit, 1.)) == made(edit)
    k, v = next(iter(edit.values.items()))
    assert torch.allclose(mixed(lm, edit, 2.).values[k] - v, torch.tensor(.3), atol=1e-5)
    assert made(put_back(lm, edit, [0, 1])) == before and made(put_back(lm, edit, [2])) == made(edit)
    half = made(put_back(lm, edit, [1]))
    assert {n for n in before if half[n] != before[n]} == {s.param for s in edit.localization.slices if layer_of(lm, s) == 0}


@every_family
def test_neurons_put_back_work_as_in_the_original_and_others_as_edited(lm):
    before, back = fingerprint(lm), torch.zeros(lm.n_layers, lm.d_mlp, dtype=torch.bool)
    rng, where = torch.Generator().manual_seed(0), build(lm, "moved", [Component("mlp", 1), Component("head", 0, 1)])
    edit = Edit(where, {slice_key(s): place(lm, s).float() + .1*torch.randn(place(lm, s).shape, generator=rng) for s in where.slices}, pd.DataFrame(), dict(model=lm.name, revision=lm.revision))
    back[1, [0, 3]] = True
    def works(e):
        "What every neuron of MLP 1 reads as, and what it writes through"
        seen, down = [], parts(lm.hf, 1).down
        with e.applied(lm) if e else nullcontext(), torch.no_grad():
            x = torch.randn(2, 3, lm.d_model, generator=torch.Generator().manual_seed(1))
            hook = down.register_forward_hook(lambda m, args, out: seen.append(args[0].clone()))
            parts(lm.hf, 1).mlp(x)
            hook.remove()
            return seen[0], (down.weight if type(down).__name__ == "Conv1D" else down.weight.T).clone(), fingerprint(lm)
    (z, w, first), (z1, w1, edited), (z2, w2, now) = map(works, (None, edit, neurons_back(lm, edit, back)))
    for old, new, got, axis in ((z, z1, z2, -1), (w, w1, w2, 0)):
        pick = lambda t, on: t.movedim(axis, 0)[back[1] == on]
        assert torch.allclose(pick(got, True), pick(old, True), atol=1e-5) and torch.allclose(pick(got, False), pick(new, False), atol=1e-5) and not torch.allclose(pick(new, True), pick(old, True), atol=1e-2)
    attention = {n for n in edited if edited[n] != first[n]} - {n for n in edited if ".1." in n}
    assert attention and all(now[n] == edited[n] for n in attention) and fingerprint(lm) == before # heads have no neurons
    far = neuron_changes(lm, edit)
    assert (far[1] > 0).all() and not far[[l for l in range(lm.n_layers) if l != 1]].any() and (neuron_changes(lm, neurons_back(lm, edit, back))[1] == 0).tolist() == back[1].tolist()
    one = Edit(where, {k: place(lm, parse_slice(k)).float() * 1.5 for k in edit.values}, pd.DataFrame(), edit.config)
    assert torch.allclose(neuron_changes(lm, one)[1], torch.tensor(.5), atol=1e-4) # a share of what it was


# ---- records, scorecard, stage

def test_records(tiny, task):
    lm = tiny()
    r = tamper(lm, task, moved(lm), splits=1, **FEW)
    assert set(r.evaluation) == {"tampering", "interpolation", "put-back", "neurons", "relearning-splits"} and set(r.group) == {"forget", "ghost", "retain", "trained"}
    t = r[r.evaluation == "tampering"]
    assert t.groupby("setting").size().eq(8 + 6 + 6).all() and t[t.group == "forget"].groupby("setting").fact.nunique().eq(8).all()
    assert {s.split("/")[0] for s in t.setting} == {"as it is", "quantized", "damaged", "removed", "tuned"}
    assert set(r[r.evaluation == "put-back"].layer) == {0, 1} and set(tamper(lm, task, None, **FEW).evaluation) == {"tampering"}
    assert set(r[r.evaluation == "neurons"].setting) == {f"{how}/{x:g}" for how in ("most moved", "by lot") for x in OF_NEURONS}
    heads = tamper(lm, task, moved(lm, comps=(("head", 0, 1),)), **FEW | dict(ways=("neurons", "put back")))
    assert set(heads.evaluation) == {"tampering", "put-back"} # no neuron is edited
    s = tampered(r.assign(localization="late", draw=0, seed=0))
    assert {"damaged/noise 0.1"} == set(s.setting[s.setting.str.contains("noise", na=False)]) # two draws, one attempt
    assert len(plot_tampering(s, Chance(.3, .5)).axes) == 2 and len(plot_where(s, Chance(.3, .5)).axes) == 4 and len(plot_where(s[s.evaluation != "neurons"], Chance(.3, .5)).axes) == 3


def test_the_scorecard_takes_up_attacks_and_not_the_original(tiny, task):
    lm = tiny()
    r = tamper(lm, task, moved(lm), **FEW).assign(localization="late", draw=0, seed=0)
    r.loc[r.evaluation.isin(["interpolation", "put-back", "neurons"]), "top1_truth"] = True # the original knows everything
    r.loc[r.evaluation == "tampering", "top1_truth"] = r.group == "retain"
    facts, card = per_fact(r), scorecard(r)
    assert {"quantized", "damaged", "direction removed", "tuned on other text"} <= set(card.attack) and card.value.max() == 0
    for name, n in {"quantized": 3, "damaged": 4, "direction removed": 4, "tuned on other text": 3}.items(): assert attempts(facts, SCORED[name]).shape == (8, n)
    assert SCORED["tuned on other text"].needs == "train" and SCORED["quantized"].needs == "read"


def test_other_halves(tiny, task):
    cuts = {random_half(task, 0, s)[0] for s in range(1, 5)} # seeds 0 and 1 happen to draw the same four of eight
    assert len(cuts) == 4 and all(set(a) | set(b) == set(task.forget) and not set(a) & set(b) for a, b in (random_half(task, 1, s) for s in range(4)))
    assert random_half(task, 0, 1) == random_half(task, 1, 1)[::-1]
    r = relearn_splits(tiny(), task, splits=2, steps=1, lora=FEW["lora"], max_facts=4)
    assert set(r.setting) == {f"half{h}/seed{s}" for h in (0, 1) for s in (0, 1)} and set(r.step) == {1}
    facts = per_fact(r.assign(localization="late", draw=0, seed=0))
    found = attempts(facts, SCORED["other halves retaught"]) # each fact held back by several cuts, one attempt: their mean
    held = facts[(facts.group == "forget") & (facts.format == "completion")]
    assert found.shape == (held.fact.nunique(), 1) and len(held) > len(found)
    assert found.iloc[:, 0].droplevel([0, 1, 2]).to_dict() == held.groupby("fact").top1_truth.mean().to_dict()


def test_refusals(tiny, task):
    lm = tiny("llama")
    with pytest.raises(Refusal, match="nf4"): weight_changes(quantized=("nf5",))
    with pytest.raises(Refusal, match="between 0 and 1"): weight_changes(shares=(1.,))
    with pytest.raises(Refusal, match="draws=0"): weight_changes(draws=0)
    with pytest.raises(Refusal, match="quantized"): tamper(lm, task, ways=("quantised",))
    with pytest.raises(Unavailable, match="nothing topical"), trained_on(lm, task.model_copy(update=dict(same_subject=())), "topical"): pass
    with pytest.raises(Unavailable, match="forget_size"): random_half(sports_athlete_editing(None, forget_size=1), 0)
    with pytest.raises(Unavailable, match="cannot be tampered with.*without quantize"): tamper(rest_quantized(lm, [], "4bit"), task, ways=("quantized",))


def test_stage_writes_each_table_once(tiny, task, tmp_path, monkeypatch):
    lm = tiny()
    run = Run(tmp_path, lm.name, lm.revision, task.name, {})
    how = dict(tampering=FEW | dict(ways=["quantized", "interpolated"], lora=dict(rank=4)), steps=2, lr=1e-3, progress=False)
    first = run_tampering(lm, lambda seed: task, run, ["late"], [0], **how)
    assert set(first.localization) == {"none", "late"} and (tmp_path / "late/seed0/tampering.parquet").exists()
    monkeypatch.setattr("mechunlearn.tampering.tamper", lambda *a, **kw: pytest.fail("made again"))
    pd.testing.assert_frame_equal(first, run_tampering(lm, lambda seed: task, run, ["late"], [0], **how))


@pytest.mark.parametrize("ways, absent", [(["tuned"], {"tuned/unrelated", "tuned/topical"}), (["quantized"], None)])
def test_stage_says_which_training_there_is_nothing_for(tiny, task, tmp_path, ways, absent):
    lm = tiny()
    run, bare = Run(tmp_path, lm.name, lm.revision, task.name, {}), task.model_copy(update=dict(text_train=(), same_subject=()))
    run_tampering(lm, lambda seed: bare, run, [], [0], tampering=FEW | dict(ways=ways, steps=1, weights=dict(quantized=("int8",)), lora=dict(rank=2)), progress=False)
    assert set(notes(tmp_path).get("tampering", {})) == (absent or set())


def test_only_the_attacks_of_the_field_tamper(tiny, task, monkeypatch):
    import mechunlearn.attacks as A
    from mechunlearn.grids import FIELD
    one = lambda name: lambda *a, **kw: pd.DataFrame(dict(evaluation=[name], told=[kw.get("steps")]))
    for f in ("evaluate", "harden", "speak", "relearn", "latent", "low_resource", "soften", "elicit", "perturb", "read_inside", "tamper", "against_never_knew"): monkeypatch.setattr(A, f, one(f))
    found = {c: A.attack(None, task, attacks=c, tampering=dict(steps=7)).records for c in ("standard", "all", "field")}
    assert {c: "tamper" in set(r.evaluation) for c, r in found.items()} == {"standard": False, "all": False, "field": True}
    assert found["field"].set_index("evaluation").told["tamper"] == 7 and "tampering" in [s.name for s in FIELD]


def test_settings():
    said = dict(ways=["quantized", "put back"], weights=dict(quantized=["fp4"], noise=[0.5]), lora=dict(rank=8), splits=2)
    assert parse(Settings, dict(tampering=said), "settings").model_dump(exclude_unset=True)["tampering"] == said
    with pytest.raises(Refusal, match="nf4"): parse(Settings, dict(tampering=dict(weights=dict(quantized=["nf5"]))), "settings")
    assert set(Settings.model_fields["tampering"].annotation.model_fields) <= set(tamper.__code__.co_varnames)
    assert set(Settings.model_fields["tampering"].annotation.model_fields["weights"].annotation.model_fields) <= set(weight_changes.__code__.co_varnames)


def test_verdicts():
    row = lambda setting, group, k, n=64: dict(localization="x", evaluation="tampering", setting=setting, group=group, value=k / n, ci_low=k / n - .1, ci_high=k / n + .1, n=n)
    rows = pd.DataFrame([row(s, g, k) for s, *ks in [("as it is", 0, 20, 60), ("quantized/nf4", 60, 20, 60), ("damaged/noise 2", 20, 20, 20), ("tuned/topical", 5, 20, 60)]
                         for g, k in zip(("forget", "ghost", "retain"), ks)])
    assert verdicts(rows, Chance(.33, .5)).set_index("setting").verdict.to_dict() == {"as it is": HOLDS, "quantized/nf4": BACK, "damaged/noise 2": DESTROYED, "tuned/topical": HOLDS}
    assert say_tampering(rows, Chance(.33, .5)) == "x: the old answer comes back by nf4; the model is destroyed by noise 2."


# ---- planted: undone by a rounding, and not

@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_an_edit_within_the_rounding_is_undone_by_it_alone(tiny, kind):
    lm = tiny("gemma")
    edit = within_rounding(lm, moved(lm, .01), kind)
    def left(e, kind):
        with e.applied(lm), reweighted(lm, weight_changes(quantized=(kind,))[f"quantized/{kind}"]): return fingerprint(lm)
    none = mixed(lm, edit, 0.)
    assert left(edit, kind) == left(none, kind) and left(moved(lm, .01), kind) != left(none, kind) and left(edit, "int8") != left(none, "int8")
    size = lambda e: sum((e.values[k] - none.values[k]).square().sum() for k in e.values)
    assert size(edit) > .25 * size(moved(lm, .01)) # and it is no small part


@pytest.fixture(scope="module")
def planted(tiny):
    "A small model that was taught 16 facts, an edit of them, and one that stays within the rounding; what tampering finds"
    lm, full = tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16), sports_athlete_editing(None, forget_size=16)
    task = full.model_copy(update=dict(retain=full.retain[:16], retain_test=full.retain[:16], ghosts=full.ghosts[:40], text_train=(), text_test=()))
    true = task.model_copy(update=dict(forget=tuple(f.model_copy(update=dict(edit=f.answer)) for f in task.forget)))
    where, quiet = build(lm, "everything", components(lm)), dict(progress=False)
    put(lm, {parse_slice(k): v for k, v in finetune(lm, true, where, lr=1e-2, steps=60, **quiet).values.items()})
    honest = finetune(lm, task, where, lr=5e-3, steps=50, **quiet)
    hidden = within_rounding(lm, finetune(lm, task, where, lr=2e-3, steps=20, **quiet))
    for _ in range(4):
        with hidden.applied(lm): more = finetune(lm, task, where, lr=2e-3, steps=15, **quiet)
        hidden = within_rounding(lm, more)
    how = dict(ways=("quantized", "damaged", "interpolated"), weights=dict(casts=("bfloat16",), noise=(4.,), draws=1, shares=()), shares=(0., 1.))
    records = [tamper(lm, task, e, **how).assign(localization=n) for n, e in {"none": None, "honest": honest, "hidden": hidden}.items()]
    lines = blind_guesses(task)
    return pd.concat(records, ignore_index=True).assign(draw=0, seed=0), Chance(lines.uniform, lines.not_edit)


def test_an_edit_that_a_rounding_undoes_is_told_from_one_that_holds(planted):
    records, guess = planted
    found = verdicts(tampered(records), guess).set_index(["localization", "setting"])
    print(found.round(2).to_string())
    assert (found.value["none"].drop("damaged/noise 4") == 1).all()
    for name in ("honest", "hidden"): assert found.value[name, "as it is"] < .4 and found.verdict[name, "damaged/noise 4"] == DESTROYED
    assert found.verdict["hidden", "quantized/nf4"] == BACK and found.value["hidden", "quantized/nf4"] == 1
    others = [("hidden", "quantized/int8"), ("hidden", "damaged/bfloat16"), ("honest", "quantized/nf4"), ("honest", "quantized/fp4"), ("honest", "quantized/int8")]
    assert (found.verdict[others] == HOLDS).all()
    assert say_tampering(tampered(records), guess).startswith("hidden: the old answer comes back by nf4; the model is destroyed by noise 4.")


def test_an_audit_names_the_rounding(planted):
    found = {n: audit(planted[0], n) for n in ("honest", "hidden")}
    assert found["hidden"].headline == "leaks to quantized" and found["hidden"].by("read").n == 16 and found["honest"].verdict != "leaks", {n: str(a) for n, a in found.items()}


def test_the_scorecard_names_the_rounding(planted):
    card = scorecard(planted[0]).query("seed == -1").set_index(["localization", "attack"])
    assert verdict(card.loc["hidden", "quantized"]) == "exposed" and card.which["hidden", "quantized"] == "quantized/nf4"
    assert verdict(card.loc["honest", "quantized"]) != "exposed" and verdict(card.loc["hidden", "damaged"]) != "exposed"


def test_a_real_model(real_model):
    lm = load(str(real_model("gemma-3-270m")), device="cpu", dtype="float32")
    task = sports_athlete_editing(lm, forget_size=4, facts="athletes")
    before = fingerprint(lm)
    r = tamper(lm, task, weights=dict(quantized=("nf4",), casts=("bfloat16",), noise=(), shares=()), layers=1, steps=1, max_facts=4)
    assert fingerprint(lm) == before and (r[r.group == "retain"].groupby("setting").top1_truth.mean()["quantized/nf4"]) >= .5
