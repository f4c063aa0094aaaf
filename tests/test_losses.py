"Each loss against its paper, by plain arithmetic and by autograd of a plain form on tiny models"
import math
import numpy as np, pytest, torch
from conftest import BUILD, FEW
from mechunlearn import losses as L
from mechunlearn.facts import Fact
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.finetuning import Diverged, fact_rows, fingerprint, finetune, load_edit, masters, say_training, plot_training, slice_key, step_losses, training_rows, with_reference
from mechunlearn.grids import Settings, folder, parse
from mechunlearn.jobs import Job, run_finetuning
from mechunlearn.localization import Part, build, joined
from mechunlearn.losses import LOSSES, ascent, choose_update, dpo, l1_change, not_said, npo, said, simnpo
from mechunlearn.models import Component, components
from mechunlearn.store import Refusal, Run, cause_hash
from mechunlearn.tasks import make_task

SMALL = dict(lr=1e-2, steps=4, batch=4, retain_batch=4, text_batch=2, progress=False)
NAMED = [n for n in LOSSES if n != "injection"]


def task_for(lm, seed=0, size=4):
    task = sports_athlete_editing(lm, forget_size=size, seed=seed)
    return task.model_copy(update=dict(retain=task.retain[:12], retain_test=task.retain_test[:6], text_train=task.text_train[:12], text_test=task.text_test[:4]))

def mixed(lm): return build(lm, "mixed", [Component("mlp", 1), Component("head", 0, 1), Component("head", 2, 3)], part=(2, 5))

ANSWERS = [(" the market", " the river"), (" basketball", " the bright market"), (" the river house", " golf"), (" football", " baseball")] # truth, edit

def own_facts(lm, n=3, **more):
    "Answers of one to three tokens"
    return [Fact(id=f"own/{i}", relation="r", subject="fox", prompt=p, answer=a, edit=e, **more)
            for i, (p, (a, e)) in enumerate(zip(["the bright fox watches", "the fox likes", "every fox sees the", "the fox"], ANSWERS[:n]))]

def logp_of(lm, prompt, word, grad=False):
    "log p of a whole answer, a token after the other and without any sharing"
    ids, pieces, out = lm.ids([prompt])[0], lm.pieces(word), 0.
    with torch.set_grad_enabled(grad):
        for i, t in enumerate(pieces): out = out + lm.hf(torch.tensor([ids + pieces[:i]])).logits[0, -1].float().log_softmax(-1)[t]
    return out


# ---- formulas, with numbers worked out here

LOGITS = torch.tensor([[2., 1., 0., -1.], [0., 3., 0., 0.]])
P = [math.exp(2) / (math.exp(2) + math.exp(1) + 1 + math.exp(-1)), math.exp(3) / (math.exp(3) + 3)] # of tokens 0 and 1
logp = torch.tensor(P).log()

def sigmoid(x): return 1 / (1 + math.exp(-x))


def test_one_token():
    target = torch.tensor([0, 1])
    assert said(LOGITS, target).tolist() == pytest.approx([-math.log(p) for p in P]) and not_said(LOGITS, target).tolist() == pytest.approx([-math.log(1 - p) for p in P])


def test_ascent(): assert ascent(-said(LOGITS, torch.tensor([0, 1]))).tolist() == pytest.approx([math.log(p) for p in P])


@pytest.mark.parametrize("beta", [.05, .1, 1., 4.])
def test_npo(beta):
    before = [.9, .2]
    want = [2 / beta * math.log(1 + (p / q)**beta) for p, q in zip(P, before)]
    assert npo(logp, torch.tensor(before).log(), beta).tolist() == pytest.approx(want, rel=1e-5)
    assert want == pytest.approx([-2 / beta * math.log(sigmoid(-beta * math.log(p / q))) for p, q in zip(P, before)])


def test_npo_is_ascent_for_small_beta():
    x = logp.clone().double().requires_grad_()
    got = npo(x, torch.tensor([.9, .2]).double().log(), 1e-5)
    got.sum().backward()
    assert x.grad.tolist() == pytest.approx([1, 1], abs=1e-4)
    assert (got[0] - got[1]).item() == pytest.approx(math.log(P[0] / .9) - math.log(P[1] / .2), abs=1e-3)


@pytest.mark.parametrize("beta,gamma", [(2.5, 0.), (1., 0.), (.5, 1.)])
def test_simnpo(beta, gamma):
    tokens = [3, 1]
    want = [-2 / beta * math.log(sigmoid(-beta / n * math.log(p) - gamma)) for p, n in zip(P, tokens)]
    assert simnpo(logp, torch.tensor(tokens), beta, gamma).tolist() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("beta", [.1, 1.])
def test_dpo(beta):
    win, ref_win, ref = [.1, .6], [.05, .3], [.8, .1]
    want = [-1 / beta * math.log(sigmoid(beta * (math.log(w / rw) - math.log(p / r)))) for w, rw, p, r in zip(win, ref_win, P, ref)]
    tensor = lambda x: torch.tensor(x).log()
    assert dpo(tensor(win), logp, tensor(ref_win), tensor(ref), beta).tolist() == pytest.approx(want, rel=1e-5)


def test_formulas_stay_finite_at_both_ends():
    x = torch.tensor([0., -1e-7, -80., -1e4], requires_grad=True)
    for got in (npo(x, torch.zeros(4)), npo(x, torch.full((4,), -1e4)), simnpo(x, torch.ones(4)), dpo(x, x.flip(0), torch.zeros(4), torch.zeros(4))):
        x.grad = None
        got.sum().backward()
        assert got.isfinite().all() and x.grad.isfinite().all()


def test_l1(): assert l1_change([torch.tensor([1., -2.]), torch.tensor([[.5]])], [torch.tensor([0., 1.]), torch.tensor([[.75]])]).item() == 1 + 3 + .25


# ---- gradients on tiny models, answers of one to three tokens

def plain_loss(lm, f, name, before, word):
    "A loss of one fact in plain words; `before`: log p by the unedited model, by prompt and answer"
    if name == "injection": return -logp_of(lm, f.prompt, f.edit, True)
    if name == "idk": return -logp_of(lm, f.prompt, word, True)
    x, n = logp_of(lm, f.prompt, f.answer, True), len(lm.pieces(f.answer))
    if name == "log-1-p": return -torch.log(1 - x.exp())
    if name in ("gradient-ascent", "graddiff"): return x
    if name == "npo": return 2 / .1 * torch.log(1 + (x.exp() / math.exp(before[f.prompt, f.answer]))**.1)
    if name == "simnpo": return 2 / 2.5 * torch.log(1 + x.exp()**(2.5 / n))
    gain = (logp_of(lm, f.prompt, word, True) - before[f.prompt, word]) - (x - before[f.prompt, f.answer])
    return -torch.log(torch.sigmoid(.1 * gain)) / .1

@pytest.mark.parametrize("lm", [f if f in FEW else pytest.param(f, marks=pytest.mark.slow) for f in BUILD], indirect=True)
def test_every_loss_and_its_gradient(lm):
    "At weights that are not the unedited ones, so that the reference counts; with micro-batches as without"
    facts, where, word = own_facts(lm, 4), mixed(lm), " the garden"
    task = task_for(lm).model_copy(update=dict(forget=tuple(facts), text_train=()))
    before = {(f.prompt, w): float(logp_of(lm, f.prompt, w)) for f in facts for w in (f.answer, word)}
    for name, l in LOSSES.items():
        update, _ = choose_update(lm, task, name, preferred=word if name in ("idk", "dpo") else None)
        forget = training_rows(lm, task, update)["forget"]
        if update.reference: forget = with_reference(lm, forget, 3)
        rows = forget + fact_rows(lm, task.retain[:3], [f.answer for f in task.retain[:3]], "retain")
        got = []
        for micro_batch in (128, 2):
            values = masters(lm, where.slices)
            for v in values.values(): v.data += .05 * torch.sin(torch.arange(v.numel())).view_as(v)
            terms = step_losses(lm, values, rows, update, .7, micro_batch)
            got.append((terms, values))
        kept = {s: lm.weight(s.param).detach().clone() for s in where.slices}
        params = {s.param: lm.weight(s.param) for s in where.slices}
        try:
            for s, v in values.items(): params[s.param].detach().narrow(s.dim, s.start, s.stop - s.start).copy_(v.detach())
            for p in params.values(): p.requires_grad_()
            forgets = torch.stack([plain_loss(lm, f, name, before, word) for f in facts]).mean()
            retains = torch.stack([-logp_of(lm, f.prompt, f.answer, True) for f in task.retain[:3]]).mean()
            full = dict(zip(params, torch.autograd.grad(.7 * forgets + retains, list(params.values()))))
        finally:
            for p in params.values(): p.requires_grad_(False)
            for s, old in kept.items(): params[s.param].data.copy_(old)
        for terms, values in got:
            assert terms["forget"] == pytest.approx(forgets.item(), rel=1e-3, abs=1e-4) and terms["retain"] == pytest.approx(retains.item(), rel=1e-3), name
            for s, v in values.items():
                want = full[s.param].narrow(s.dim, s.start, s.stop - s.start)
                assert torch.allclose(v.grad, want, rtol=1e-2, atol=2e-4 * float(want.abs().max()) + 1e-7), (name, s)


def test_two_answers_of_one_token_are_read_once(tiny, monkeypatch):
    from mechunlearn import finetuning as F
    lm, read, real = tiny("llama"), [], F.end_logits
    task = task_for(lm)
    update, _ = choose_update(lm, task, "dpo", preferred=" golf")
    rows = training_rows(lm, task, update)["forget"]
    monkeypatch.setattr(F, "end_logits", lambda lm, w, ids, *a, **k: read.append(len(ids)) or real(lm, w, ids, *a, **k))
    rows = with_reference(lm, rows)
    want = [[float(logp_of(lm, f.prompt, w)) for w in (f.answer, " golf")] for f in task.forget]
    assert read == [4] and np.allclose([r.reference for r in rows], want, atol=1e-4)


def test_only_the_first_token_counts_where_the_facts_say_so(tiny):
    lm = tiny("llama")
    task = task_for(lm).model_copy(update=dict(forget=tuple(own_facts(lm, whole=False))))
    update, _ = choose_update(lm, task, "dpo", preferred=" the garden")
    assert all(not r.rest and len(r.preferred) == 1 for r in training_rows(lm, task, update)["forget"])


def test_at_the_start_the_reference_is_the_model_itself(tiny):
    lm = tiny("qwen3")
    for name, want in (("npo", 2 / .1 * math.log(2)), ("dpo", 1 / .1 * math.log(2))):
        assert finetune(lm, task_for(lm), mixed(lm), loss=name, **SMALL).curve.forget[0] == pytest.approx(want, rel=1e-5)


def test_a_margin_is_heard(tiny):
    lm = tiny("qwen3")
    go = lambda **kw: finetune(lm, task_for(lm), mixed(lm), loss="simnpo", **SMALL, **kw)
    some, none, zero = go(gamma=2.), go(), go(gamma=0.)
    before = [logp_of(lm, f.prompt, f.answer, True).item() / len(lm.pieces(f.answer)) for f in task_for(lm).forget]
    assert some.curve.forget[0] == pytest.approx(np.mean([2 / 2.5 * math.log(1 + math.exp(2.5 * x + 2)) for x in before]), rel=1e-4)
    assert some.config["gamma"] == 2 and none.config == zero.config and none.curve.equals(zero.curve) and some.curve.forget[0] > none.curve.forget[0]


# ---- as an edit

@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_loss_trains_and_touches_nothing_else(tiny, loss):
    lm = tiny("qwen3")
    task, where, before = task_for(lm), mixed(lm), fingerprint(lm)
    outside = fingerprint(lm, where.slices)
    a, b = (finetune(lm, task, where, loss=loss, seed=3, **SMALL | dict(steps=12)) for _ in range(2))
    assert fingerprint(lm) == before and a.config == b.config and a.config["loss"] == loss and a.curve.equals(b.curve)
    assert all(torch.equal(a.values[k], b.values[k]) for k in a.values)
    with a.applied(lm): assert fingerprint(lm, where.slices) == outside and fingerprint(lm) != before
    assert (a.curve.formula == loss).all() and (loss in ("log-1-p", "simnpo") or a.curve.forget.iloc[-1] < a.curve.forget.iloc[0]) # a random model has nothing to take away
    assert a.config.get("beta") == LOSSES[loss].beta and a.config.get("preferred") == (" thing" if loss in ("idk", "dpo") else None)


def test_the_truth_goes(tiny):
    "From a model that is sure of it, every fact; a random model cannot tell retained facts with the same answer apart, so none are trained"
    lm = tiny("llama")
    lm.hf.lm_head.weight.data *= 10
    task, where = task_for(lm), build(lm, "all", components(lm))
    truths = tuple(f.model_copy(update={"edit": f.answer}) for f in task.forget)
    def ask(): return np.array([float(logp_of(lm, f.prompt, f.answer)) for f in task.forget])
    with finetune(lm, task.model_copy(update=dict(forget=truths, text_train=())), where, **SMALL | dict(steps=40)).applied(lm):
        before = ask()
        assert (before > math.log(.5)).all()
        for loss in NAMED:
            with finetune(lm, task, where, loss=loss, **SMALL | dict(steps=25, retain_batch=0)).applied(lm): assert (ask() < before - 1).all(), loss


def test_injection_is_what_a_task_with_edits_does_anyway(tiny):
    lm = tiny("qwen3")
    task, where = task_for(lm), mixed(lm)
    named, own = finetune(lm, task, where, loss="injection", **SMALL), finetune(lm, task, where, **SMALL)
    assert all(torch.equal(named.values[k], own.values[k]) for k in own.values) and named.config == own.config | dict(loss="injection")
    assert set(own.config) == {"model", "revision", "task", "seed", "lr", "inject", "steps", "clip", "forget", "retain", "text"} and "formula" not in own.curve


def test_ascent_alone_has_no_other_term(tiny):
    lm = tiny("qwen3")
    edit = finetune(lm, task_for(lm), mixed(lm), loss="gradient-ascent", **SMALL)
    assert edit.curve.retain.isna().all() and edit.curve.text.isna().all() and np.allclose(edit.curve.loss, edit.curve.forget) and edit.config["retain"] == 0
    both = finetune(lm, task_for(lm), mixed(lm), loss="graddiff", **SMALL)
    assert np.allclose(both.curve.loss, both.curve.forget + both.curve.retain + both.curve.text)
    plot_training(edit.curve.assign(localization="flu"))
    assert "gradient-ascent" in say_training(edit.curve.assign(localization="flu"))


def test_l1_keeps_weights_where_they_were(tiny):
    lm = tiny("qwen3")
    task, where = task_for(lm), mixed(lm)
    old = {slice_key(s): v.detach() for s, v in masters(lm, where.slices).items()}
    moved = lambda e: sum(float((e.values[k] - old[k]).abs().sum()) for k in old)
    free, held = finetune(lm, task, where, **SMALL | dict(steps=20)), finetune(lm, task, where, l1=1., **SMALL | dict(steps=20))
    assert moved(held) < .8 * moved(free) and held.config["l1"] == 1. and held.curve.l1[0] == 0 and "l1" not in free.curve
    c = held.curve
    assert np.allclose(c.loss, c.forget + c.retain + c.text + c.l1, rtol=1e-5)
    zero = finetune(lm, task, where, l1=0., **SMALL | dict(steps=20))
    assert all(torch.equal(zero.values[k], free.values[k]) for k in free.values)


def test_the_gradient_of_l1(tiny):
    from mechunlearn.finetuning import _held_back
    lm = tiny("qwen3")
    values = masters(lm, mixed(lm).slices)
    start = {s: v.detach().clone() for s, v in values.items()}
    for k, v in enumerate(values.values()): v.data += (-1)**k * .1
    assert _held_back(values, start, .5) == pytest.approx(.1 * sum(v.numel() for v in values.values()), rel=1e-4)
    for k, v in enumerate(values.values()): assert torch.equal(v.grad, torch.full_like(v, .5 * (-1)**k))


def test_parts_that_hear_their_own_facts(tiny):
    "At scale and part after part, with a loss that asks the unedited model"
    lm = tiny("llama")
    for name in ("counterfact-at-scale", "sequential-counterfact-editing"):
        task = make_task(name, lm, forget_size=6, **(dict(parts=2) if name.startswith("seq") else {}))
        task = task.model_copy(update=dict(retain=task.retain[:12], retain_test=task.retain_test[:6], text_train=task.text_train[:12]))
        comps = (["mlp.0"], ["mlp.1", "head.2.3"])
        where = joined(lm, "two", [Part(facts=tuple(f.id for f in fs), components=tuple(c), slices=build(lm, "x", map(Component.parse, c)).slices)
            for fs, c in zip((task.forget[:3], task.forget[3:]), comps)])
        edit, before = finetune(lm, task, where, loss="dpo", **SMALL), fingerprint(lm)
        assert edit.config["loss"] == "dpo" and edit.curve.forget[0] == pytest.approx(10 * math.log(2), rel=1e-4)
        with edit.applied(lm): assert fingerprint(lm) != before


# ---- what cannot be

def test_what_is_refused(tiny):
    lm = tiny("qwen3")
    task, where = task_for(lm), mixed(lm)
    unlearn = task.model_copy(update=dict(name="sports-unlearning", update="unlearn", forget=tuple(f.model_copy(update=dict(edit=None)) for f in task.forget)))
    go = lambda task=task, **kw: finetune(lm, task, where, **SMALL, **kw)
    for kw, why in [(dict(loss="npoo"), "unknown loss 'npoo', did you mean 'npo'"), (dict(loss="npo", beta=-1.), "beta=-1: beta must be a positive number"),
            (dict(loss="npo", beta=0.), "beta=0"), (dict(loss="npo", beta=math.nan), "beta=nan"), (dict(loss="idk", beta=.1), "beta is an option of the losses npo, simnpo, dpo, not of idk"),
            (dict(beta=.1), "not of the task itself"), (dict(loss="simnpo", gamma=-1.), "gamma=-1: gamma must be 0 or a positive number"), (dict(loss="npo", gamma=.5), "gamma is an option of the losses simnpo, not of npo"), (dict(loss="npo", preferred=" golf"), "preferred is an option of the losses idk, dpo"), (dict(l1=-1e-3), "l1=-0.001"),
            (dict(l1=math.inf), "l1=inf"), (dict(loss="idk", preferred=" zzyzx"), "does not know the word ' zzyzx'"),
            (dict(loss="dpo", preferred=task.forget[0].answer), "is the truth about"),
            (dict(task=unlearn, loss="injection"), "sports-unlearning has no edit answers to inject"), (dict(task=unlearn, loss="dpo", preferred="edit"), "no edit answers to prefer")]:
        with pytest.raises(Refusal, match=why) as e: go(**kw)
        assert "\n" not in str(e.value)
    for loss in NAMED: assert go(unlearn, loss=loss).config["loss"] == loss # a preferred answer is found for a task without edit answers
    assert go(loss="dpo", preferred="edit").config["preferred"] == "edit" and go(loss="idk", preferred="golf").config["preferred"] == " golf"


def test_a_tokenizer_without_a_word_for_not_knowing(tiny, monkeypatch):
    monkeypatch.setattr(L, "NOT_KNOWING", (" zzyzx",))
    with pytest.raises(Refusal, match="knows none of ' zzyzx': name the answer to prefer"): L.not_knowing(tiny("qwen3"))


@pytest.mark.parametrize("loss", ["gradient-ascent", None])
def test_divergence_keeps_the_last_good_state(tiny, loss):
    lm = tiny("qwen3")
    task, where, before = task_for(lm), mixed(lm), fingerprint(lm)
    with pytest.raises(Diverged, match=r"diverged at step 1 \(forget loss .*nan.*lower the learning rate \(lr=1e\+30\)") as e: finetune(lm, task, where, loss=loss, **SMALL | dict(lr=1e30))
    edit = e.value.edit
    assert isinstance(e.value, Refusal) and len(edit.curve) == 1 and np.isfinite(edit.curve.loss).all() and fingerprint(lm) == before
    with edit.applied(lm): assert fingerprint(lm) == before # before the step that ruined it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_kept_is_that_of_the_step_before(tiny, monkeypatch, dtype):
    from mechunlearn import finetuning as F
    lm, real, seen = tiny("qwen3"), F.step_losses, []
    lm.hf.to(dtype)
    def breaks(lm, values, *a, **k):
        seen.append({s: v.detach().clone() for s, v in values.items()})
        return real(lm, values, *a, **k) | ({"text": math.nan} if len(seen) == 3 else {})
    monkeypatch.setattr(F, "step_losses", breaks)
    with pytest.raises(Diverged, match=r"at step 2 \(text loss nan\)") as e: finetune(lm, task_for(lm), mixed(lm), **SMALL)
    kept = {s: e.value.edit.values[slice_key(s)] for s in seen[1]}
    assert all(kept[s].dtype == torch.float32 and torch.equal(kept[s], v.to(dtype).float()) for s, v in seen[1].items()) and len(e.value.edit.curve) == 2 # as the model read it


# ---- in the pipeline

def test_a_run_keeps_the_last_good_state(tiny, tmp_path):
    lm = tiny("qwen3")
    run = Run(tmp_path / "run", lm.name, lm.revision, "sports-athlete-editing", {})
    with pytest.raises(Refusal, match="diverged at step 1 .* kept in .*diverged"):
        run_finetuning(lm, lambda s: task_for(lm, s), run, ["late"], [0], budget=2000, loss="gradient-ascent", **SMALL | dict(lr=1e30))
    kept = load_edit(run.edit_dir("late", 0) / "diverged")
    assert len(kept.curve) == 1 and not (run.edit_dir("late", 0) / "training.parquet").exists()


def test_causes_name_the_loss_and_are_else_as_before(tiny):
    lm = tiny("qwen3")
    job = lambda **kw: Job(lm, task_for(lm), mixed(lm), None, dict(lr=1e-3, **kw)).causes()
    assert set(job()["training"]) == {"lr", "inject", "steps", "batch", "retain_batch", "text_batch", "clip"}
    ways = [job(), job(loss="npo"), job(loss="npo", beta=.2), job(loss="graddiff"), job(l1=1e-3), job(loss="idk"), job(loss="idk", preferred=" golf")]
    assert len({cause_hash(c) for c in ways}) == len(ways)


def test_settings_know_the_losses():
    from typing import get_args
    assert [x for x in get_args(get_args(Settings.model_fields["loss"].annotation)[0])] == list(LOSSES)
    for bad in (dict(loss="npoo"), dict(beta=-1), dict(beta=0), dict(l1=-1), dict(preferred="")):
        with pytest.raises(Refusal): parse(Settings, bad, "settings")
    assert folder("runs", "m", "t", {}, loss="npo").endswith("t-npo") and folder("runs", "m", "t", {}).endswith("m/t")
