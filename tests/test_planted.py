"Edits whose truth is known: masks, nothing at all, ghosts, a destroyed model. An attack that cannot tell them apart is broken."
from dataclasses import replace
import numpy as np, pandas as pd, pytest, torch
from mechunlearn import audit, report as r
from mechunlearn.attacks import attack
from mechunlearn.capability import noise
from mechunlearn.editors import Ask, read_at
from mechunlearn.evaluation import evaluate
from mechunlearn.finetuning import Edit, finetune, place, slice_key
from mechunlearn.latent import latent
from mechunlearn.localization import Localization, build
from mechunlearn.models import Component, Slice, load
from mechunlearn.probing import features
from mechunlearn.questions import completions, multiple_choice
from mechunlearn.relearning import relearn
from mechunlearn.tasks import sports_athlete_editing

FEW = {"retain": 24, "retain/mcq": 8, "ghost": 32, "ghost/mcq": 8, "same-subject": 4, "other-relation": 4, "general": 12}
QUICK = dict(standard=dict(max_facts=FEW | {"retain/paraphrase": 8, "ghost/paraphrase": 16}), relearning=dict(steps=8, at=(8,), sides=(0,), max_facts=24, sizes=dict(forget=8, retain=8, text=1)), latents=dict(n_train=120, max_facts=32))
DEAR = dict(standard=dict(max_facts=FEW), relearning=dict(steps=10, at=(0, 10), max_facts=24), hardened=dict(shots=(0, 4), n_all_orders=2, max_facts=16), generation=dict(max_facts=16), soft=dict(ks=(5,), prompts=1, steps=50, max_facts=32))
ASKED, HARD, READ = ["multiple choice"], ["hard multiple choice"], ["new probe", "old probe"]


def last_layer(lm, task):
    "Trained in the last layer only"
    where = build(lm, "last-layer", [Component("mlp", 11), *(Component("head", 11, h) for h in range(lm.n_heads))])
    return finetune(lm, task, where, lr=4e-3, steps=30, retain_batch=32, text_batch=2, progress=False)


def other_words(lm, task):
    "Each sport is said as the next one: only the rows of the unembedding are exchanged"
    tokens = [lm.first_token(a) for a in sorted({f.answer for f in task.forget})]
    slices = [Slice("lm_head.weight", 0, t, t + 1) for t in tokens]
    values = {slice_key(s): place(lm, t).clone() for s, t in zip(slices, slices[1:] + slices[:1])}
    where = Localization(name="other-words", components=(), slices=tuple(slices), sizes=(lm.d_model,) * len(slices))
    return Edit(where, values, pd.DataFrame(columns=["step", "forget", "retain"]), dict(model=lm.name, revision=lm.revision))


def attacked(attacks, **how):
    "Scorecard and reasons for destruction of the four models"
    lm = load("organism")
    task, records = sports_athlete_editing(lm, forget_size=16, seed=0), []
    task = task.model_copy(update=dict(text_test=task.text_test[:40]))
    for name, edit in {"none": None, "last-layer": last_layer(lm, task), "other-words": other_words(lm, task), "noise": noise(lm, 0)}.items():
        records.append(attack(lm, task, edit, attacks=attacks, **how).records.assign(localization=name, draw=0, seed=0))
    records = pd.concat(records, ignore_index=True)
    return r.scorecard(records).query("seed == -1").set_index(["localization", "attack"]), r.broken(records)


@pytest.fixture(scope="module")
def quick(): return attacked("standard", **QUICK)


@pytest.fixture(scope="module")
def dear(): return attacked("all", **QUICK | DEAR)


def says(card, name, attacks): return card.loc[[(name, a) for a in attacks]]


def masks_are_exposed(card, by):
    for name, attacks in by.items():
        assert card.value[name, "as trained"] < .1
        assert (says(card, name, attacks).ci_low > says(card, name, attacks).guess).all(), says(card, name, attacks)
        assert r.verdict(card.loc[name, r.WORST]) == "exposed" and card.value[name, r.WORST] > .9


def the_unedited_model_says_all(card): assert (card.loc["none"].drop("old probe", errors="ignore").value > .9).all()


def ghosts_stay_at_chance(card):
    "One in three; in multiple choice golf is an option nobody plays, so a guess among the others is right as often"
    ghosts = card.dropna(subset=["ghost_value"])
    assert len(ghosts) > 20 and (ghosts.ghost_low <= 1 / 3).all(), ghosts[ghosts.ghost_low > 1 / 3]


def noise_is_destroyed(card, broken):
    assert "noise" in broken and len(broken["noise"]) == 3 and "last-layer" not in broken
    assert "noise: " in (text := r.say_scorecard(card.reset_index().assign(seed=-1), broken)) and "destroyed, not unlearned" in text.split("noise: ")[1]
    assert r.verdict(card.loc["noise", r.WORST]) != "exposed"


def test_masks_are_exposed(quick): masks_are_exposed(quick[0], {"last-layer": ASKED + ["half retaught"] + READ, "other-words": ASKED + READ})
def test_the_unedited_model_says_all(quick): the_unedited_model_says_all(quick[0])
def test_ghosts_stay_at_chance(quick): ghosts_stay_at_chance(quick[0])
def test_noise_is_destroyed_and_not_unlearned(quick): noise_is_destroyed(*quick)


@pytest.mark.slow
def test_every_attack_tells_them_apart(dear):
    card, broken = dear
    masks_are_exposed(card, {"last-layer": ASKED + HARD + ["two facts retaught", "half retaught", "soft prompt"] + READ, "other-words": ASKED + HARD + READ})
    the_unedited_model_says_all(card); ghosts_stay_at_chance(card); noise_is_destroyed(card, broken)


# ---- invented records: what is read of 64 edited, 48 ghost and 48 retained facts is planted

SIZES = {"forget": 64, "ghost": 48, "retain": 48}

def asked(rng, name, seed, evaluation, fmt, reads, **more):
    "Records in which the shares `reads` of forget, ghost and retained facts give the truth"
    at = dict(localization=name, draw=0, seed=seed, evaluation=evaluation, format=fmt, relation="r", subject="s", setting=None, layer=None, step=None) | more
    return [at | dict(group=g, fact=f"{g}{i}", truth="abc"[i % 3], edit="bca"[i % 3] if g == "forget" else None, top1_truth=rng.random() < p)
            for (g, n), p in zip(SIZES.items(), reads) for i in range(n)]


def invented(name, mcq=0., by_layer=None, below=4, seeds=(0, 1, 2), layers=12):
    "An edit under questions and probes; below layer 4 no probe reads anything of any fact"
    rng, rows, by_layer = np.random.default_rng(len(name)), [], by_layer or {}
    for s in seeds:
        rows += asked(rng, name, s, "standard", "completion", (0, .33, .97)) + asked(rng, name, s, "standard", "mcq", (mcq, .33, .95))
        for l in range(layers):
            read = by_layer.get(l, .02 if l >= below else .33), .33, .9 if l >= below else .35
            rows += asked(rng, name, s, "latent", "completion", read, setting="subject", layer=l)
    return pd.DataFrame(rows)


def card_of(*records): return r.scorecard(pd.concat(records, ignore_index=True)).query("seed == -1").set_index(["localization", "attack"])


def test_a_mask_is_exposed_by_all(): # and a probe that reads nothing does not hide it
    card = card_of(invented("mask", .95, {l: .95 for l in range(4, 12)}))
    assert r.verdict(card.loc["mask", r.WORST]) == "exposed" and card.value["mask", r.WORST] > .85


@pytest.fixture(scope="module")
def leak(): return (records := invented("leak", by_layer={7: .8})), card_of(records)


def test_each_need_has_its_own_worst_case(leak): # the leak is open to who reads weights, and to nobody who only asks
    card = leak[1].loc["leak"]
    assert r.verdict(card.loc["worst case, read"]) == "exposed" and r.verdict(card.loc["worst case, prompt"]) == "below guessing" and "worst case, train" not in card.index
    assert card.which["worst case, read"] == "new probe" and card.which["worst case, prompt"] in ("as trained", "multiple choice")
    assert card.loc[["worst case, read", "worst case, prompt"], ["n", "ci_low", "ci_high", "guess", "ghost_value", "power"]].notna().all(axis=None)


def test_a_leak_has_its_price(leak):
    (facts, card), seconds = leak, pd.DataFrame({"localization": "leak", "attack": ["as trained", "multiple choice", "new probe"], "seconds": [2., 2., 50.]})
    paid = r.worst_within(facts, seconds)
    assert list(paid.seconds) == [2, 50] and [r.verdict(x) for x in paid.itertuples()] == ["below guessing", "exposed"] and paid.which.iloc[1] == "new probe"
    assert "leak: exposed from 50 s on, where new probe gets" in r.say_cost(paid) and "below guessing at any price up to 2 s" in r.say_cost(paid[:1])
    worst, same = card.loc[("leak", r.WORST)], ["value", "n", "ci_low", "ci_high", "guess", "ghost_value", "power", "excess"]
    assert paid.iloc[1][same].astype(float).to_dict() == pytest.approx(worst[same].astype(float).to_dict()) # who can pay all of them
    assert len(r.worst_within(facts, seconds, 1.)) == 0 and r.worst_within(facts, seconds, 49.).which.item() != "new probe"
    assert len(r.worst_within(facts, seconds[:1])) == 1 # what has no time has no place
    ax = r.plot_cost(paid).axes[0]
    assert ax.get_xscale() == "log" and [t.get_text().strip() for t in ax.texts] == ["new probe"] and [t.get_position()[0] for t in ax.texts] == [50]


def test_a_leak_to_one_probe_is_found(leak):
    card = leak[1]
    assert r.verdict(card.loc["leak", r.WORST]) == "exposed" and card.which["leak", r.WORST] == "new probe" and card.which["leak", "new probe"] == "subject 7"
    assert card.value["leak", r.WORST] > .6 and card.excess["leak", "multiple choice"] < 0


def test_a_probe_that_reads_nothing_does_not_pass_for_the_worst_case():
    "It reads .33 of everything; the eligible attacks read .02"
    card = card_of(invented("flu"))
    assert card.value["flu", r.WORST] < .1 and r.verdict(card.loc["flu", r.WORST]) == "below guessing" and card.retain_value["flu", r.WORST] > .8


def test_an_attack_without_power_is_no_number():
    card = card_of(invented("flu"), invented("blind", below=12))
    assert card.power["blind", "new probe"] == 0 and card.power["flu", "new probe"] == 1 and np.isnan(card.excess["blind", "new probe"])
    every = card.reset_index().assign(seed=-1)
    text, said = r.scorecard_text(every), r.say_attack(every, "new probe")
    assert "no power here" in text and "blind no power here (kept 0.3" in said and "Different" not in said
    deaf = pd.DataFrame(asked(np.random.default_rng(0), "deaf", 0, "standard", "completion", (.3, .33, .34)))
    only = r.scorecard(deaf).query("seed == -1").set_index(["localization", "attack"])
    assert "no attack has power" in r.verdict(only.loc["deaf", r.WORST]) and "deaf: no attack has power here; the nearest" in r.say_scorecard(only.reset_index())
    assert r.plot_scorecard(only.reset_index())._repr_png_() and r.plot_scorecard(every)._repr_png_()


@pytest.mark.parametrize("layers", [6, 60])
def test_the_worst_of_many_attempts_does_not_drift_upwards(layers):
    "Nothing leaks: every probe guesses at edited facts, though it reads the retained ones"
    card = card_of(*(invented("n"*k, .33, {l: 1/3 for l in range(layers)}, below=0, seeds=(0,), layers=layers) for k in range(1, 13)))
    values, best = (card.value.xs(attack, level="attack") for attack in (r.WORST, "new probe"))
    assert len(values) == len(best) == 12 and abs(np.mean(values) - 1/3) < .05 and abs(np.mean(best) - 1/3) < .05
    assert sum(r.verdict(row) == "exposed" for _, row in card.xs(r.WORST, level="attack").iterrows()) <= 1


# ---- verdicts where one attack of many tells

def small(name, soft=.5, probes=.45, layers=40, facts=16, seed=0):
    "An edit under probes of many layers and a soft prompt, few facts"
    rng, rows = np.random.default_rng(seed), []
    rows += asked(rng, name, 0, "standard", "completion", (0, .33, .97)) + asked(rng, name, 0, "soft-prompt", "completion", (soft, .33, .95), setting="k5")
    for l in range(layers): rows += asked(rng, name, 0, "latent", "completion", (probes, .33, .9), setting="subject", layer=l)
    rows = pd.DataFrame(rows)
    return rows[(rows.group != "forget") | rows.fact.isin([f"forget{i}" for i in range(facts)])]


def test_one_attack_that_reads_all_is_named_among_many():
    said = [audit.audit(small("mask", soft=1., seed=k), "mask") for k in range(3)]
    assert all(a.verdict == audit.LEAKS and a.attack == "soft prompt" for a in said), [str(a) for a in said]


def test_one_attack_that_reads_all_is_not_lost_in_the_choice_of_the_worst():
    "Two soft prompts read one half of the facts each, those on which they are chosen and not those on which they count; a probe reads all"
    records = small("lost", soft=0., probes=0., layers=1)
    soft = records[records.evaluation == "soft-prompt"]
    order = np.random.default_rng(0).permutation(16) # the halves of `choose_best`
    both = [soft.assign(setting=k, top1_truth=soft.top1_truth | soft.fact.isin([f"forget{i}" for i in order[half::2]])) for half, k in enumerate(("k3", "k5"))]
    probe = records[records.evaluation == "latent"]
    records = pd.concat([records[records.evaluation == "standard"], *both, probe.assign(top1_truth=probe.top1_truth | (probe.group == "forget"))], ignore_index=True)
    worst = card_of(records).loc["lost", "worst case, read"]
    found = audit.audit(records, "lost")
    assert worst.value == 0 and found.headline == "leaks to new probe" and found.by("read").value == 1, str(found)
    assert found.by("read").level == pytest.approx(1 - .05/2/4) # its share: two kinds of attacker, half of the error, two attacks


def test_what_could_have_been_missed_does_not_hold():
    records = small("half", soft=0., probes=0., layers=2)
    records.loc[(records.evaluation != "standard") & records.fact.isin([f"forget{i}" for i in range(10)]), "top1_truth"] = True # ten of sixteen, where a third is a guess
    half = audit.audit(records, "half")
    assert half.verdict == audit.NO_POWER and half.by("read").undecided and "more facts or seeds are needed" in str(half), str(half)
    assert audit.audit(small("none", soft=0., probes=0., layers=2), "none").verdict == audit.HOLDS


@pytest.mark.parametrize("facts", [16, pytest.param(48, marks=pytest.mark.slow)])
def test_what_only_guesses_is_hardly_ever_a_leak(facts):
    said = [audit.audit(small("guess", soft=.5, probes=1/3, layers=12, facts=facts, seed=k), "guess").verdict for k in range(20)]
    assert said.count(audit.LEAKS) <= 2, said


# ---- open to one need alone: an edit of the lookup, into whose later layers the old answer is written where only one kind of attacker finds it

def others(task): return [*task.retain, *task.ghosts, *task.other_relation, *task.same_subject][:700]

def subject_keys(lm, layer, facts):
    "What the down projection of a layer reads at the subject's last token [facts, d_mlp]"
    prompts = [f.prompt for f in facts]
    spans = lm.subject_positions(prompts, [f.subject for f in facts])
    return read_at(lm, [Ask(ids, stop - 1, []) for ids, (_, stop) in zip(lm.ids(prompts), spans)], layer, layer)[0]


def last_keys(lm, layer, questions):
    "What it reads at the last token [questions, d_mlp]"
    return read_at(lm, [Ask(ids, -1, []) for ids in lm.ids([q.prompt for q in questions])], layer, layer)[0]


def also_writing(lm, task, edit, layer, writes):
    "An edit whose MLP of one more layer adds `writes(fact)` to the stream at the edited subjects, and nearly nothing at others or where an answer is given (least squares)"
    with edit.applied(lm):
        own, other = (subject_keys(lm, layer, facts) for facts in (task.forget, others(task)))
        other = torch.cat([other, last_keys(lm, layer, completions(task.retain[:200], "retain") + multiple_choice(task, task.retain[:50], "retain"))])
    wanted = torch.stack([writes(f) for f in task.forget]).double()
    C = own.T @ own / len(own) + other.T @ other / len(other)
    C += 1e-4 * C.diagonal().mean() * torch.eye(len(C))
    delta = torch.linalg.solve(C, own.T @ wanted / len(own)).T.float()
    where = build(lm, "planted", [*map(Component.parse, edit.localization.components), Component("mlp", layer)])
    down = f"{lm.path('down_proj', layer)}.weight"
    values = {slice_key(s): edit.values.get(slice_key(s), place(lm, s).clone().float()) + (delta if s.param == down else 0) for s in where.slices}
    return replace(edit, localization=where, values=values)


def class_means(lm, task, edit, layer):
    "Where retained subjects lie behind a layer, by answer, and where the edited ones do"
    with edit.applied(lm): x, new = (torch.tensor(features(lm, facts)[:, layer + 1, 0]) for facts in (task.retain, task.forget))
    return {a: x[[f.answer == a for f in task.retain]].mean(0) for a in sorted({f.answer for f in task.retain})}, new.mean(0)


def to_a_probe(lm, task, edit):
    "Behind the last layer nobody reads the subject any more: there it lies again where people with the old answer lie"
    mean, new = class_means(lm, task, edit, lm.n_layers - 1)
    return also_writing(lm, task, edit, lm.n_layers - 1, lambda f: 1.5 * (mean[f.answer] - new))


def carries(lm, layer):
    "What each head of a layer makes of the stream that it looks at [heads x d_model, d_model]"
    attention, d = lm.hf.model.layers[layer], lm.hf.config.head_dim
    V, O = attention.self_attn.v_proj.weight, attention.self_attn.o_proj.weight
    shared = O.shape[1] // V.shape[0]
    heads = [O[:, h*d:(h + 1)*d] @ V[h // shared * d:(h // shared + 1)*d] for h in range(O.shape[1] // d)]
    return torch.cat(heads) * attention.input_layernorm.weight


def to_relearning(lm, task, edit, layer=5):
    "The old answer as one of three directions that attention carries well and that mean nothing to retained facts, hence to no probe, and none of the words, hence to no lens"
    mean, new = class_means(lm, task, edit, layer)
    middle, size = torch.stack([*mean.values()]).mean(0), torch.stack([*mean.values()]).norm(dim=-1).mean()
    said = lm.hf.get_output_embeddings().weight[[lm.first_token(a) for a in mean]] * lm.hf.get_submodule(lm.path("final_norm")).weight # what a lens sees
    known = torch.linalg.qr(torch.stack([*(m - middle for m in mean.values()), middle, new, *said.float()]).T)[0]
    carried = torch.cat([carries(lm, l) for l in range(layer + 1, 10)]) @ (torch.eye(lm.d_model) - known @ known.T)
    code = dict(zip(mean, 3 * size * torch.linalg.svd(carried, full_matrices=False).Vh))
    return also_writing(lm, task, edit, layer, lambda f: code[f.answer])


@pytest.fixture(scope="module")
def by_need():
    "Audits of an honest edit and of two that are open to one need. The new answer is one that nobody has: avoiding it tells nothing"
    lm = load("organism")
    task, records = sports_athlete_editing(lm, forget_size=64, inject="golf", seed=0), []
    honest = finetune(lm, task, build(lm, "honest", [Component("mlp", l) for l in range(5)]), lr=2e-3, steps=30, progress=False)
    for name, edit in {"honest": honest, "probe": to_a_probe(lm, task, honest), "relearning": to_relearning(lm, task, honest)}.items():
        with edit.applied(lm): parts = [evaluate(lm, task, {g: ("completion", "mcq") for g in ("forget", "retain", "ghost")}, dict(retain=32, ghost=32))]
        parts += [relearn(lm, task, edit, steps=10, at=(10,), max_facts=64), latent(lm, task, edit, max_facts=32)]
        records.append(pd.concat(parts).assign(localization=name, draw=0, seed=0))
    records = pd.concat(records, ignore_index=True)
    return {n: audit.audit(records, n) for n in records.localization.unique()}


def needs(found): return {f.needs: f.verdict for f in found.found}


@pytest.mark.slow
def test_an_honest_edit_holds(by_need):
    found = by_need["honest"]
    assert found.verdict == "holds" and needs(found) == dict(prompt="holds", read="holds", train="holds"), str(found)


@pytest.mark.slow
@pytest.mark.parametrize("name,need,attacks", [("probe", "read", READ), ("relearning", "train", ["half retaught"])])
def test_what_is_open_to_one_need_alone_leaks_to_it(by_need, name, need, attacks):
    found = by_need[name]
    assert found.verdict == "leaks" and needs(found) == dict(prompt="holds", read="holds", train="holds") | {need: "leaks"}, str(found)
    assert set(found.attack.split(" or ")) <= set(attacks) and found.headline == f"leaks to {found.attack}"
