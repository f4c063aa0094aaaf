import math
import numpy as np, pandas as pd, pytest, torch
from plain import every_family, head_weights, neuron_weights
from mechunlearn import checkpoints, finetuning as F, masking as M
from mechunlearn.attacks import attack
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.finetuning import Diverged, draws, fingerprint, load_edit, masters, place, slice_key, training_rows
from mechunlearn.localization import Localization, build
from mechunlearn.masking import GATES, METHODS, Mask, ask_sizes, clamp, hard_concrete, learn_mask, lost, masked_shares, masked_weights, most_masked, p_open, sizes_needed, straight_through
from mechunlearn.models import Component, components, load
from mechunlearn.relearning import Lora
from mechunlearn.store import Refusal
from mechunlearn.tasks import make_task

SMALL = dict(steps=2, batch=4, retain_batch=4, text_batch=2, progress=False)
every_method = pytest.mark.parametrize("method", METHODS)


def task_for(lm, seed=0):
    task = sports_athlete_editing(lm, forget_size=4, seed=seed)
    return task.model_copy(update=dict(retain=task.retain[:12], retain_test=task.retain_test[:6], same_subject=(), ghosts=(), other_relation=task.other_relation[:4],
        text_train=task.text_train[:12], text_test=task.text_test[:4]))


def mixed(lm):
    "Heads, a whole MLP and some neurons: slices by rows and by columns."
    return build(lm, "mixed", [Component("mlp", 1), Component("head", 0, 1), Component("head", 2, 3)], part=(2, 5))


def by_hand(lm, where, scores=None):
    "A mask that nobody learned"
    rng = torch.Generator().manual_seed(0)
    scores = scores or {slice_key(s): torch.rand(place(lm, s).shape, generator=rng) for s in where.slices}
    return Mask(where, scores, pd.DataFrame([dict(step=0, forget=1., retain=0.)]), dict(model=lm.name, revision=lm.revision))


@pytest.fixture
def qwen(tiny): return tiny("qwen3")


# ---- gates

def test_gates_follow_the_paper():
    "Louizos et al. (2018), equations 10 to 12, written out in numpy"
    a, u = torch.linspace(-6, 6, 25, dtype=torch.double), torch.linspace(.02, .98, 25, dtype=torch.double)
    s = torch.from_numpy(1 / (1 + np.exp(-(np.log(u.numpy()) - np.log(1 - u.numpy()) + a.numpy()) / (2/3))))
    assert torch.allclose(hard_concrete(a, u), (s * 1.2 - .1).clamp(0, 1))
    assert np.allclose(p_open(a).numpy(), 1 / (1 + np.exp(-(a.numpy() - 2/3 * math.log(.1 / 1.1)))))


def test_the_gradient_of_a_gate_is_the_formula():
    a, u = torch.linspace(-4, 4, 41, dtype=torch.double).requires_grad_(), torch.rand(41, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    z = hard_concrete(a, u)
    z.sum().backward()
    s = ((u.log() - (1 - u).log() + a.detach()) * 1.5).sigmoid()
    inside = (s * 1.2 - .1 > 0) & (s * 1.2 - .1 < 1)
    assert torch.allclose(a.grad, torch.where(inside, 1.2 * 1.5 * s * (1 - s), 0.)) and 0 < inside.sum() < 41
    assert set(z.detach()[~inside].tolist()) <= {0., 1.}


@pytest.mark.parametrize("a", [-4., -1., 0., 2.])
def test_open_gates_are_as_frequent_as_said(a):
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(1))
    p, n = p_open(torch.tensor(a)).item(), (hard_concrete(torch.full_like(u, a), u) > 0).float().mean().item()
    assert abs(p - n) < 4 * math.sqrt(p * (1 - p) / 200_000)


def test_random_numbers_at_the_edge_are_no_nan():
    a = torch.zeros(2, requires_grad=True)
    z = hard_concrete(a, torch.tensor([0., 1 - 2**-24]))
    z.sum().backward()
    assert z.tolist() == [0, 1] and torch.isfinite(a.grad).all()


def test_straight_through_is_exact_and_has_the_logistic_gradient():
    a = torch.randn(1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z = straight_through(a)
    z.sum().backward()
    assert torch.equal(z, (a > 0).float()) and torch.allclose(a.grad, a.sigmoid() * (1 - a.sigmoid()))


# ---- discretization

@pytest.mark.parametrize("k", [0, 1, 7, 50, 60])
def test_k_is_exact_whatever_is_tied(k):
    rng = torch.Generator().manual_seed(0)
    scores, weights = torch.randint(0, 3, (6, 10), generator=rng).float(), torch.randint(-2, 3, (6, 10), generator=rng).float()
    chosen = most_masked(scores, weights, k)
    assert chosen.shape == (6, 10) and chosen.sum() == k
    key = [((w != 0) * 1, s, abs(w)) if w else (0, 0, 0) for s, w in zip(scores.flatten().tolist(), weights.flatten().tolist())]
    taken, left = [x for x, c in zip(key, chosen.flatten()) if c], [x for x, c in zip(key, chosen.flatten()) if not c]
    if taken and left: assert min(taken) >= max(left)


@every_family
@pytest.mark.parametrize("k", [1, 37, 400])
def test_the_masked_are_zero_and_the_rest_is_bit_identical(lm, k):
    where, before = mixed(lm), {n: p.detach().clone() for n, p in lm.hf.named_parameters()}
    mask = by_hand(lm, where)
    edit, changed = mask.edit(lm, k), 0
    cut = torch.cat([v.flatten() for v in mask.scores.values()]).sort(descending=True).values[k - 1]
    with edit.applied(lm):
        for n, p in lm.hf.named_parameters():
            moved = p != before[n]
            assert (p[moved] == 0).all() and not torch.signbit(p[moved]).any()
            changed += int(moved.sum())
        for s in where.slices: assert torch.equal(place(lm, s) == 0, mask.scores[slice_key(s)] >= cut)
    assert changed == k
    assert all(torch.equal(p, before[n]) for n, p in lm.hf.named_parameters())


def test_a_bfloat16_model_keeps_its_bits(tiny):
    lm = tiny("qwen3")
    lm.hf.bfloat16()
    before = {n: p.detach().clone() for n, p in lm.hf.named_parameters()}
    with by_hand(lm, mixed(lm)).edit(lm, 100).applied(lm):
        assert sum(int((p.view(torch.int16) != before[n].view(torch.int16)).sum()) for n, p in lm.hf.named_parameters()) == 100


def test_weights_that_are_zero_anyway_are_not_counted(qwen):
    where = mixed(qwen)
    for s in where.slices[:2]: place(qwen, s).zero_()
    n = sum(place(qwen, s).numel() for s in where.slices[2:])
    assert int((torch.cat([place(qwen, s).flatten() for s in where.slices]) != 0).sum()) == n
    scores = {slice_key(s): torch.full_like(place(qwen, s), float(i < 2)) for i, s in enumerate(where.slices)}
    edit = by_hand(qwen, where, scores).edit(qwen, 10)
    assert sum(int(z.sum()) for z in masked_weights(qwen, edit).values()) == 10
    with pytest.raises(Refusal, match=f"cannot mask {n + 1} weights of mixed: give a whole number from 0 to {n}"): by_hand(qwen, where, scores).edit(qwen, n + 1)


# ---- learning

@every_family
@every_method
def test_every_family_learns_and_is_left_alone(lm, method):
    where, before = mixed(lm), fingerprint(lm)
    mask = learn_mask(lm, task_for(lm), where, method, lr=1., **SMALL)
    assert fingerprint(lm) == before and len(mask.curve) == 2 and np.isfinite(mask.curve.drop(columns="text")).all().all()
    assert all(torch.isfinite(v).all() for v in mask.scores.values()) and len({round(float(v.std()), 9) for v in mask.scores.values()}) > 1
    zero = masked_weights(lm, mask.edit(lm, 25))
    assert sum(int(z.sum()) for z in zero.values()) == 25


@every_family
def test_a_step_is_gradient_descent_on_the_gates(lm):
    "The gates' gradient by the chain rule, from the full gradient of the plain model with the masked weights in it"
    task, where, gate = task_for(lm), mixed(lm), GATES["hard-concrete"]
    mask = learn_mask(lm, task, where, "hard-concrete", lr=3., penalty=1e-3, seed=2, clip=1e9, **SMALL | dict(steps=1))
    rng, old = torch.Generator().manual_seed(2), {s: place(lm, s).clone() for s in where.slices}
    u = {s: torch.rand(w.shape, generator=rng) for s, w in old.items()}
    z = {s: hard_concrete(torch.full_like(w, gate.start), u[s]) for s, w in old.items()}
    params = {s.param: lm.weight(s.param).requires_grad_() for s in where.slices}
    for s, w in old.items(): place(lm, s).copy_(w * (1 - z[s]))
    rows = next(draws(training_rows(lm, task), dict(forget=4, retain=4, text=2), 1, 2))
    said = lambda r: -lm.hf(torch.tensor([r.ids])).logits[0, -1].log_softmax(-1)[r.target]
    text = [torch.nn.functional.cross_entropy(lm.hf(torch.tensor([r.ids])).logits[0, :-1], torch.tensor(r.ids[1:]), reduction="none") for r in rows if r.term == "text"]
    sum([torch.stack([said(r) for r in rows if r.term == t]).mean() for t in ("forget", "retain")], torch.cat(text).mean()).backward()
    p, a = p_open(torch.tensor(gate.start)), torch.tensor(gate.start)
    for s, w in old.items():
        soft = ((u[s].logit() + a) * 1.5).sigmoid()
        slope = torch.where((z[s] > 0) & (z[s] < 1), 1.2 * 1.5 * soft * (1 - soft), 0.)
        grad = -w * params[s.param].grad.narrow(s.dim, s.start, s.stop - s.start) * slope + 1e-3 * p * (1 - p)
        found = (gate.start - mask.scores[slice_key(s)]) / 3
        assert torch.allclose(found, grad, atol=2e-3 * float(grad.abs().max()) + 1e-6), s


@pytest.mark.parametrize("method", GATES)
def test_the_penalty_is_the_expected_number_of_open_gates(qwen, method):
    where, start = mixed(qwen), torch.tensor(GATES[method].start)
    curve = learn_mask(qwen, task_for(qwen), where, method, penalty=.01, **SMALL).curve
    p = p_open(start) if method == "hard-concrete" else start.sigmoid()
    assert curve.penalty.iloc[0] == pytest.approx(.01 * float(p) * where.n_params, rel=1e-4)
    assert np.allclose(curve.loss, curve.forget + curve.retain + curve.text + curve.penalty)


def test_a_dearer_mask_is_smaller(qwen):
    size = lambda penalty: sum(float(p_open(v).sum()) for v in learn_mask(qwen, task_for(qwen), mixed(qwen), penalty=penalty, lr=100., **SMALL | dict(steps=5)).scores.values())
    assert size(.01) < size(0.)


def test_micro_batches_change_nothing(qwen):
    a, b = (learn_mask(qwen, task_for(qwen), mixed(qwen), micro_batch=n, **SMALL) for n in (128, 2))
    assert all(torch.allclose(a.scores[k], b.scores[k], atol=1e-3) for k in a.scores)


@every_method
def test_seeds_decide_and_repeat(qwen, method):
    a, b, c = (learn_mask(qwen, task_for(qwen), mixed(qwen), method, lr=.1, seed=s, **SMALL) for s in (1, 1, 2))
    assert all(torch.equal(a.scores[k], b.scores[k]) for k in a.scores) and not all(torch.equal(a.scores[k], c.scores[k]) for k in a.scores)


def test_clamped_weights_stay_between_zero_and_what_they_were(qwen, monkeypatch):
    where, seen, real = mixed(qwen), [], M.step_losses
    old = {s: place(qwen, s).clone() for s in where.slices}
    def look(lm, values, *args): seen.append({s: v.detach().clone() for s, v in values.items()}); return real(lm, values, *args)
    monkeypatch.setattr(M, "step_losses", look)
    mask = learn_mask(qwen, task_for(qwen), where, "clamped", lr=10., **SMALL | dict(steps=4))
    assert len(seen) == 4 and not all(torch.equal(seen[-1][s], old[s]) for s in old)
    for values in seen:
        for s, v in values.items(): assert (v * old[s] >= 0).all() and (v.abs() <= old[s].abs()).all()
    assert all((v >= 0).all() and (v <= 1).all() for v in mask.scores.values()) and any((v == 1).any() for v in mask.scores.values())


def test_a_clamped_step_is_the_authors(qwen):
    "SGD with momentum, weight decay and the L1 norm, then clamped: written out"
    where, task, old = mixed(qwen), task_for(qwen), {}
    mask = learn_mask(qwen, task, where, "clamped", lr=.05, penalty=1.5, seed=0, clip=1e9, **SMALL | dict(steps=1))
    values = masters(qwen, where.slices)
    F.step_losses(qwen, values, next(draws(training_rows(qwen, task), dict(forget=4, retain=4, text=2), 1, 0)), F.UPDATES["edit"])
    norm = sum(float(v.abs().sum()) for v in values.values())
    for s, v in values.items():
        w = v.detach()
        new = w - .05 * (v.grad + 1.5 / norm * w.sign() + .01 * w)
        kept = (new / w).clamp(0, 1)
        assert torch.allclose(mask.scores[slice_key(s)], 1 - kept, atol=1e-4), s


def test_nothing_flips_its_sign_and_zero_stays_zero():
    w, old = torch.tensor([5., -5., .1, .3, -.3]), torch.tensor([1., 1., .2, 0., -.2])
    clamp(w, old)
    assert torch.allclose(w, torch.tensor([1., 0., .1, 0., -.2])) and torch.allclose(lost(w, old), torch.tensor([0., 1., .5, 0., 0.]))


def test_an_unlearning_task(tiny):
    lm = tiny("llama")
    task = make_task("sports-unlearning", lm)
    task = task.model_copy(update=dict(forget=task.forget[:4], retain=task.retain[:8], text_train=task.text_train[:4], text_test=()))
    mask = learn_mask(lm, task, build(lm, "nonlocalized", components(lm)), lr=30., penalty=0., inject=1e5, **SMALL | dict(steps=15))
    with mask.edit(lm, 300).applied(lm): after = F.step_losses(lm, masters(lm, mask.localization.slices), training_rows(lm, task)["forget"], F.UPDATES["unlearn"])
    assert after["forget"] < mask.curve.forget.iloc[0]


# ---- an edit like any other

def test_it_is_saved_and_says_what_it_is(qwen, tmp_path):
    edit = learn_mask(qwen, task_for(qwen), mixed(qwen), "straight-through", penalty=3., **SMALL).edit(qwen, 12)
    edit.save(tmp_path)
    again = load_edit(tmp_path)
    assert all(torch.equal(again.values[k], v) for k, v in edit.values.items())
    assert {k: again.config[k] for k in ("method", "k", "penalty")} == dict(method="straight-through", k=12, penalty=3.)
    checkpoints.export(qwen, edit, tmp_path/"delta", delta=True)


FEW = {g: 4 for g in ("retain", "retain/mcq", "ghost", "ghost/mcq", "same-subject", "other-relation", "general")}
BRIEF = dict(standard=dict(max_facts=FEW), relearning=dict(steps=2, lora=Lora(4, 4, 1e-3, 0.), max_facts=4, sizes=dict(forget=4, retain=4, text=1)),
    latents=dict(n_train=20, max_facts=4))


def test_it_is_attacked(tiny):
    lm = tiny("llama")
    task, before = sports_athlete_editing(None, forget_size=4), fingerprint(lm)
    edit = learn_mask(lm, task, mixed(lm), **SMALL).edit(lm, 400)
    found = attack(lm, task, edit, before=attack(lm, task, **BRIEF).records, **BRIEF)
    assert {"standard", "relearning", "latent"} <= set(found.records.evaluation) and found.table().value.notna().any()
    now, unedited = (r[r.evaluation == "standard"].full_truth.dropna() for r in (found.records, found.before))
    assert not np.allclose(now, unedited) and fingerprint(lm) == before


def test_exported_it_is_audited_as_anyones(qwen, tmp_path):
    qwen.hf.save_pretrained(tmp_path/"base"); qwen.tok.save_pretrained(tmp_path/"base")
    lm = load(str(tmp_path/"base"), device="cpu")
    edit = by_hand(lm, mixed(lm)).edit(lm, 30)
    found = checkpoints.edit_of(lm, checkpoints.export(lm, edit, tmp_path/"masked"))
    zeros = [masked_weights(lm, e) for e in (edit, found)]
    assert set(zeros[0]) >= set(zeros[1]) and all(torch.equal(zeros[0][n], z) for n, z in zeros[1].items()) and sum(int(z.sum()) for z in zeros[1].values()) == 30


def test_sizes_are_records_with_a_base(qwen):
    task = task_for(qwen)
    masks = [by_hand(qwen, mixed(qwen)), by_hand(qwen, build(qwen, "late", [Component("mlp", 2)]))]
    asked = ask_sizes(qwen, task, masks, [5, 50])
    assert asked.groupby("localization").step.unique().map(sorted).to_dict() == {"none": [0], "mixed": [5, 50], "late": [5, 50]}
    assert {"forget", "retain", "other-relation", "text"} <= set(asked.group) and {"completion", "paraphrase", "mcq", "text"} <= set(asked.format)
    assert set(asked[asked.group == "general"].format) == {"mcq"} # general knowledge is asked, as in Figures 19 to 27 of the paper
    rows = M.mask_rows(asked)
    one = asked.query("localization == 'late' and step == 50 and format == 'completion' and group == 'forget'").prob_truth.mean()
    got = rows.query("localization == 'late' and step == 50 and format == 'completion' and group == 'forget'").value.item()
    assert got == pytest.approx(one)
    assert M.plot_masking(asked) is not None and isinstance(M.say_masking(asked), str)


def test_costs_are_drawn_for_what_was_asked():
    asked = shown({"none": {0: (.9, .8, 1.)}, "flu": {10: (.6, .7, 1.), 20: (.4, .3, .9)}})
    titles = lambda records: [ax.get_title(loc="left") for ax in M.plot_mask_costs(records).axes]
    assert titles(asked) == ["forgotten facts", "in multiple choice"]
    more = pd.concat([asked, asked.query("format == 'mcq'").assign(format="neighborhood", prob_truth=.5)])
    assert titles(more) == ["forgotten facts", "in multiple choice", "their neighbours"]
    line = next(l for l in M.plot_mask_costs(more).axes[2].lines if l.get_label() == "flu")
    assert line.get_xdata().tolist() == pytest.approx([.5, .5]) and line.get_ydata().tolist() == pytest.approx([1., .9])


def test_neighbours_are_asked_where_there_are_some(qwen):
    task = task_for(qwen)
    assert not [q for q in M.mask_questions(task) if q.format == "neighborhood"]
    one = task.model_copy(update=dict(forget=tuple(f.model_copy(update={"neighbors": (f.prompt,)}) for f in task.forget)))
    assert len([q for q in M.mask_questions(one) if q.format == "neighborhood"]) == len(one.forget)


def test_a_size_too_large_is_refused_before_anything_is_asked(qwen, monkeypatch):
    monkeypatch.setattr(M, "answer", None)
    with pytest.raises(Refusal, match="cannot mask"): ask_sizes(qwen, task_for(qwen), [by_hand(qwen, mixed(qwen))], [5, 10**9])


def shown(values):
    "Records of two places, five facts each, with these probabilities by size"
    rows = [dict(localization=name, draw=0, seed=0, evaluation="masking", format=f, group=g, fact=f"f{i}", subject=f"s{i}", relation="r", truth="a", edit="b", prob_truth=p, step=k)
        for name, sizes in values.items() for k, (p, mcq, keep) in sizes.items() for f, g, p in (("completion", "forget", p), ("mcq", "forget", mcq), ("completion", "retain", keep)) for i in range(5)]
    return pd.DataFrame(rows)


def test_the_sentence_names_the_smallest_size_that_halves():
    asked = shown({"none": {0: (.9, .8, 1.)}, "flu": {10: (.6, .7, 1.), 20: (.4, .3, .9), 40: (.1, .2, .8)}, "late": {10: (.44, .75, .95), 20: (.3, .7, .9), 40: (.2, .6, .9)}})
    assert sizes_needed(asked) == {"flu": 20, "late": 10} and sizes_needed(asked, .2) == {"flu": 40}
    text = M.say_masking(asked)
    assert "flu 20 (multiple choice 0.30" in text and "late 10 (multiple choice 0.75" in text and "Not halved" not in text
    weak = shown({"none": {0: (.9, .8, 1.)}, "flu": {10: (.8, .7, 1.)}})
    assert M.say_masking(weak) == "Not halved by any number tried: flu."


# ---- mechanisms

@every_family
def test_shares_of_mechanisms_by_hand(lm):
    "Zeros set by hand in a head, in neurons and elsewhere, and counted through views that know nothing of slices"
    where = build(lm, "nonlocalized", components(lm))
    parts = dict(heads=build(lm, "heads", [Component("head", 0, 1)]), lookup=build(lm, "lookup", [], part=(1, 3)))
    edit = by_hand(lm, where).edit(lm, 0)
    edit.values = {k: v.clone() for k, v in edit.values.items()}
    with edit.applied(lm):
        head, mlp, other = head_weights(lm, 0, 1), neuron_weights(lm, 1, 5), neuron_weights(lm, 2, 1)
        head["q"].data[0, :4] = 0; head["o"].data[:3, 0] = 0
        mlp["up"].data[0, :5] = 0; mlp["down"].data[:2, 4] = 0 # neuron 4 is not in the part
        other["up"].data[0, 0] = 0
        edit.values = {slice_key(s): place(lm, s).clone() for s in where.slices}
    table = masked_shares(lm, [edit], parts).set_index("mechanism")
    assert table.masked.to_dict() == dict(heads=7, lookup=5)
    assert table.total.to_dict() == {k: p.n_params for k, p in parts.items()} and np.allclose(table.share, table.masked / table.total)
    assert sum(int(z.sum()) for z in masked_weights(lm, edit).values()) == 7 + 5 + 2 + 1


def test_zeros_outside_a_localization_cannot_be(qwen):
    edit = by_hand(qwen, mixed(qwen)).edit(qwen, 200)
    all_of = masked_shares(qwen, [edit], dict(own=mixed(qwen), late=build(qwen, "late", [Component("mlp", 0)]))).set_index("mechanism").masked
    assert all_of.to_dict() == dict(own=200, late=0)


# ---- bad input

def test_bad_sizes_are_one_line(qwen):
    mask = by_hand(qwen, mixed(qwen))
    n = mask.localization.n_params
    for k in (n + 1, -1, 1.5, True, "3"):
        with pytest.raises(Refusal, match=f"cannot mask {k} weights of mixed: give a whole number from 0 to {n}") as e: mask.edit(qwen, k)
        assert "\n" not in str(e.value)
    assert mask.edit(qwen, np.int64(n)).config["k"] == n and type(mask.edit(qwen, np.int64(3)).config["k"]) is int


def test_bad_input_is_one_line(qwen, tiny, monkeypatch):
    task, where = task_for(qwen), mixed(qwen)
    with pytest.raises(Refusal, match="unknown method 'hard-concret', did you mean 'hard-concrete'"): learn_mask(qwen, task, where, "hard-concret", **SMALL)
    with pytest.raises(Refusal, match="empty has no weights: there is nothing to mask"): learn_mask(qwen, task, Localization(name="empty", components=(), slices=(), sizes=()), **SMALL)
    with pytest.raises(Refusal, match="edits its facts part after part"): learn_mask(qwen, task.model_copy(update=dict(update="sequential")), where, **SMALL)
    for bad in (dict(lr=0.), dict(lr=-1.), dict(penalty=-1.), dict(lr=math.nan), dict(lr=math.inf), dict(penalty=math.inf), dict(steps=0)):
        with pytest.raises(Refusal, match="lr must be positive, penalty not negative, both finite, and steps at least 1"): learn_mask(qwen, task, where, **SMALL | bad)
    with pytest.raises(Refusal, match="learned on tiny-qwen3 seed0, not on tiny-llama seed3"): by_hand(qwen, where).edit(tiny("llama", seed=3), 5)
    monkeypatch.setattr(M, "step_losses", lambda lm, values, *a: [setattr(v, "grad", torch.zeros_like(v)) for v in values.values()] and dict(forget=math.nan, retain=0., text=0.))
    with pytest.raises(Diverged, match=r"training diverged at step 0 \(forget loss nan\): lower the learning rate \(lr=1000\); the last good state is kept$") as e: learn_mask(qwen, task, where, **SMALL)
    assert len({x for v in e.value.edit.scores.values() for x in v.unique().tolist()}) == 1 # nothing was learned yet
    def full(*a, **k): torch.empty(2**60) # as a CPU says it
    monkeypatch.setattr(M, "step_losses", full)
    with pytest.raises(Refusal, match=r"^out of memory on cpu while masking mixed: lower micro_batch \(now \d+\); what then .* dtype bfloat16$"): learn_mask(qwen, task, where, **SMALL)
    def wrong(*a, **k): raise RuntimeError("sizes do not match")
    monkeypatch.setattr(M, "step_losses", wrong)
    with pytest.raises(RuntimeError, match="do not match"): learn_mask(qwen, task, where, **SMALL)


@pytest.mark.parametrize("method", GATES)
def test_what_the_last_step_left_is_looked_at_though_no_loss_has_seen_it(qwen, method):
    with pytest.raises(Diverged, match=r"at step 1 \(norm of the weights (inf|nan)\)") as e: learn_mask(qwen, task_for(qwen), mixed(qwen), method, **SMALL | dict(steps=1, lr=1e36))
    assert all(torch.isfinite(v).all() for v in e.value.edit.scores.values())


def test_quantized_matrices_are_refused(qwen):
    where = mixed(qwen)
    qwen.hf.get_submodule("model.layers.1.mlp.up_proj").weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(Refusal, match="up_proj.weight is quantized"): learn_mask(qwen, task_for(qwen), where, **SMALL)
