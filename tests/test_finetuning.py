import math
from unittest.mock import Mock
import numpy as np, pandas as pd, pytest, torch
from plain import every_family, last_norm, name_of, parts
from mechunlearn import checkpoints, finetuning as F, jobs as J, models
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.finetuning import FILES, LEARNING_RATES, RATE_GROUPS, UPDATES, draws, finetune, fingerprint, last_logits, learning_rate, load_edit, masters, matrices, parse_slice, rates, slice_key, step_losses, training_rows
from mechunlearn.jobs import Job, edit_jobs, edited_elsewhere, run_finetuning
from mechunlearn.rates import best_rates, dev_task, score, sweep
from mechunlearn.localization import build
from mechunlearn.models import Component, Slice, begin_alike, components
from mechunlearn.store import Broken, Refusal, Run, read_meta

SMALL = dict(lr=1e-2, steps=3, batch=4, retain_batch=4, text_batch=2, progress=False)


def task_for(lm, seed=0):
    task = sports_athlete_editing(lm, forget_size=4, seed=seed)
    return task.model_copy(update=dict(retain=task.retain[:12], retain_test=task.retain_test[:6], dev_retain=task.dev_retain[:6],
        text_train=task.text_train[:12], text_test=task.text_test[:4]))


def mixed(lm):
    "Heads, a whole MLP and some neurons: slices by rows and by columns."
    return build(lm, "mixed", [Component("mlp", 1), Component("head", 0, 1), Component("head", 2, 3)], part=(2, 5))


@pytest.fixture
def qwen(tiny): return tiny("qwen3")


def state_of(lm): return {n: p.detach().clone() for n, p in lm.hf.named_parameters()}


# ---- masters

@every_family
def test_matrices_hold_the_slices_and_leave_the_rest(lm):
    where, before = mixed(lm), state_of(lm)
    values = {s: torch.full_like(v, 7.) for s, v in masters(lm, where.slices).items()}
    for name, W in matrices(lm, values).items():
        inside = torch.zeros_like(W, dtype=torch.bool)
        for s in values:
            if s.param == name: inside.narrow(s.dim, s.start, s.stop - s.start).fill_(True)
        assert (W[inside] == 7).all() and torch.equal(W[~inside], before[name][~inside])
    assert all(torch.equal(p, before[n]) for n, p in lm.hf.named_parameters())


@every_family
def test_gradients_are_the_slices_of_the_full_gradient(lm):
    task, where = task_for(lm), mixed(lm)
    batch = next(draws(training_rows(lm, task), dict(forget=4, retain=4, text=2), 1, 0))
    values = masters(lm, where.slices)
    terms = step_losses(lm, values, batch, UPDATES["edit"], inject=.5)
    params = {s.param: lm.weight(s.param).requires_grad_() for s in values}
    def mean(term):
        rows = [r for r in batch if r.term == term]
        if term != "text": return torch.stack([-lm.hf(torch.tensor([r.ids])).logits[0, -1].log_softmax(-1)[r.target] for r in rows]).mean()
        return torch.cat([torch.nn.functional.cross_entropy(lm.hf(torch.tensor([r.ids])).logits[0, :-1], torch.tensor(r.ids[1:]), reduction="none") for r in rows]).mean()
    losses = {t: mean(t) for t in ("forget", "retain", "text")}
    (.5 * losses["forget"] + losses["retain"] + losses["text"]).backward()
    assert {t: l.item() for t, l in losses.items()} == pytest.approx(terms, rel=1e-4)
    for s, v in values.items():
        full = params[s.param].grad.narrow(s.dim, s.start, s.stop - s.start)
        assert torch.allclose(v.grad, full, atol=1e-5 * float(full.abs().max()) + 1e-7), s
    assert any(v.grad.abs().sum() > 0 for v in values.values())


@every_family
def test_parts_and_shared_prefixes_give_the_gradient_of_the_whole(lm, monkeypatch):
    task, where = task_for(lm), mixed(lm)
    batch = next(draws(training_rows(lm, task), dict(forget=4, retain=4, text=4), 1, 0))
    def gradients(**kw):
        values = masters(lm, where.slices)
        step_losses(lm, values, batch, UPDATES["edit"], **kw)
        return [v.grad for v in values.values()]
    shared, parts = gradients(), gradients(micro_batch=3)
    assert any(len(head) > 5 for _, head in begin_alike([r.ids for r in batch if r.term != "text"]))
    monkeypatch.setattr(models, "may_share", lambda lm: False)
    for a, b, c in zip(shared, parts, gradients()): assert torch.allclose(a, c, atol=1e-5) and torch.allclose(b, c, atol=1e-5)


@every_family
def test_prompts_of_several_lengths(lm):
    prompts = ["Fact: the sport", "Fact: the sport of the", "Fact: golf"]
    ids = lm.ids(prompts)
    got = last_logits(lm, {}, ids)
    for row, x in zip(got, ids): assert torch.allclose(row, lm.hf(torch.tensor([x])).logits[0, -1], atol=1e-4)


def test_quantized_matrices_are_refused(qwen):
    name = "model.layers.1.mlp.up_proj.weight"
    qwen.hf.get_submodule("model.layers.1.mlp.up_proj").weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(Refusal, match="up_proj.weight is quantized"): masters(qwen, [Slice(name, 0, 0, 4)])


# ---- training

def test_training_is_adamw_with_masked_gradients(qwen, tiny):
    task, where, ref = task_for(qwen), mixed(qwen), tiny("qwen3")
    edit = finetune(qwen, task, where, seed=5, **SMALL)
    params = {s.param: ref.weight(s.param).requires_grad_() for s in where.slices}
    opt = torch.optim.AdamW(params.values(), lr=SMALL["lr"], weight_decay=0.)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, SMALL["steps"])
    for rows in draws(training_rows(ref, task), dict(forget=4, retain=4, text=2), SMALL["steps"], 5):
        loss = 0.
        for term in ("forget", "retain"):
            loss = loss + torch.stack([-ref.hf(torch.tensor([r.ids])).logits[0, -1].log_softmax(-1)[r.target] for r in rows if r.term == term]).mean()
        text = [torch.nn.functional.cross_entropy(ref.hf(torch.tensor([r.ids])).logits[0, :-1], torch.tensor(r.ids[1:]), reduction="none") for r in rows if r.term == "text"]
        opt.zero_grad(); (loss + torch.cat(text).mean()).backward()
        for name, p in params.items():
            keep = torch.zeros_like(p)
            for s in where.slices:
                if s.param == name: keep.narrow(s.dim, s.start, s.stop - s.start).fill_(1)
            p.grad *= keep
        torch.nn.utils.clip_grad_norm_(params.values(), 1.)
        opt.step(); schedule.step()
    with edit.applied(qwen):
        for n, p in qwen.hf.named_parameters(): assert torch.allclose(p, ref.weight(n), atol=1e-4), n


def test_learns_the_edit_answers(qwen):
    task, where = task_for(qwen), build(qwen, "nonlocalized", components(qwen))
    curve = finetune(qwen, task, where, **SMALL | dict(steps=30)).curve
    assert curve.forget.iloc[-1] < .7 * curve.forget.iloc[0] and len(curve) == 30
    assert curve.lr.iloc[0] == SMALL["lr"] and curve.lr.is_monotonic_decreasing and curve.lr.iloc[-1] < .01 * SMALL["lr"]


def test_seeds_decide_and_repeat(qwen):
    task, where = task_for(qwen), mixed(qwen)
    a, b, c = (finetune(qwen, task, where, seed=s, **SMALL) for s in (1, 1, 2))
    assert all(torch.equal(a.values[k], b.values[k]) for k in a.values) and not all(torch.equal(a.values[k], c.values[k]) for k in a.values)


def test_small_terms_are_seen_whole_and_large_ones_drawn():
    rows = dict(forget=[*range(16)], retain=[*range(100, 200)], text=[])
    first, second = draws(rows, dict(forget=64, retain=48, text=8), 2, 0)
    assert first[:16] == second[:16] == rows["forget"] and first[16:] != second[16:]
    assert len(first) == 64 and len(set(first)) == 64


def test_a_task_without_text_has_two_terms(qwen):
    task = task_for(qwen).model_copy(update=dict(text_train=(), text_test=()))
    curve = finetune(qwen, task, mixed(qwen), **SMALL).curve
    assert curve.text.isna().all() and np.allclose(curve.loss, curve.forget + curve.retain)


def test_divergence_and_memory_are_one_line(qwen, monkeypatch):
    task, where = task_for(qwen), mixed(qwen)
    with pytest.raises(Refusal, match="diverged at step .* lower the learning rate"): finetune(qwen, task, where, **SMALL | dict(lr=1e30))
    with pytest.raises(F.Diverged, match=r"at step 1 \(norm of the weights inf\)") as e: finetune(qwen, task, where, **SMALL | dict(lr=1e35, steps=1)) # no loss has seen it
    assert all(v.isfinite().all() for v in e.value.edit.values.values())
    def wrong(*a, **k): raise RuntimeError("sizes do not match")
    monkeypatch.setattr(F, "step_losses", wrong)
    with pytest.raises(RuntimeError, match="do not match"): finetune(qwen, task, where, **SMALL)
    for full in (lambda *a, **k: torch.empty(2**60), Mock(side_effect=torch.OutOfMemoryError("no"))): # a CPU, and a card
        monkeypatch.setattr(F, "step_losses", full)
        with pytest.raises(Refusal, match="out of memory .* lower micro_batch"): finetune(qwen, task, where, **SMALL)


def test_unknown_updates_are_refused(qwen):
    task = task_for(qwen).model_copy(update=dict(update="edits"))
    with pytest.raises(Refusal, match="did you mean 'edit'"): finetune(qwen, task, mixed(qwen), **SMALL)


# ---- bits

@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_a_bit_outside_moves(lm, dtype):
    lm.hf.to(dtype)
    task, where = task_for(lm), mixed(lm)
    before, outside = fingerprint(lm), fingerprint(lm, where.slices)
    edit = finetune(lm, task, where, **SMALL)
    assert fingerprint(lm) == before
    with edit.applied(lm):
        assert fingerprint(lm, where.slices) == outside
        assert {n for n, h in fingerprint(lm).items() if h != before[n]} == {s.param for s in where.slices}
        assert all(p.dtype == dtype for p in lm.hf.parameters())
    assert fingerprint(lm) == before and not any(p.requires_grad for p in lm.hf.parameters())


def test_masters_take_steps_that_bfloat16_cannot(qwen):
    qwen.hf.to(torch.bfloat16)
    where = mixed(qwen)
    edit = finetune(qwen, task_for(qwen), where, **SMALL | dict(lr=1e-5, steps=1))
    old = {slice_key(s): v.detach() for s, v in masters(qwen, where.slices).items()}
    moved = torch.cat([(edit.values[k] != old[k]).flatten() for k in old])
    rounded = torch.cat([(edit.values[k].bfloat16() != old[k].bfloat16()).flatten() for k in old])
    assert moved.float().mean() > .5 > 5 * rounded.float().mean()


def test_restores_after_an_exception_and_when_nested(qwen):
    task, where, before = task_for(qwen), mixed(qwen), fingerprint(qwen)
    a, b = (finetune(qwen, task, where, seed=s, **SMALL) for s in (1, 2))
    with pytest.raises(KeyError):
        with a.applied(qwen): raise KeyError
    assert fingerprint(qwen) == before
    with a.applied(qwen):
        inner = fingerprint(qwen)
        with b.applied(qwen): assert fingerprint(qwen) != inner
        assert fingerprint(qwen) == inner
    assert fingerprint(qwen) == before


def test_bits_that_are_no_numbers_are_restored_too(qwen):
    where = mixed(qwen)
    edit = finetune(qwen, task_for(qwen), where, **SMALL)
    s = where.slices[0]
    qwen.weight(s.param).data.narrow(s.dim, s.start, 1).fill_(math.nan)
    qwen.weight(s.param).data.narrow(s.dim, s.start + 1, 1).fill_(-0.)
    before = fingerprint(qwen)
    with edit.applied(qwen): assert fingerprint(qwen) != before
    assert fingerprint(qwen) == before


def test_an_edit_of_another_model_is_refused(qwen, tiny):
    edit, other = finetune(qwen, task_for(qwen), mixed(qwen), **SMALL), tiny("qwen3", seed=1)
    before = fingerprint(other)
    with pytest.raises(Refusal, match="was made for tiny-qwen3 seed0, not for tiny-qwen3 seed1"):
        with edit.applied(other): pass
    assert fingerprint(other) == before


# ---- files

def test_saved_edits_come_back_or_are_broken(qwen, tmp_path):
    edit = finetune(qwen, task_for(qwen), mixed(qwen), **SMALL)
    edit.save(tmp_path, {"seed": 0})
    back = load_edit(tmp_path)
    assert back.localization == edit.localization and back.config == edit.config and set(back.values) == set(edit.values)
    assert all(torch.equal(back.values[k], v) for k, v in edit.values.items())
    pd.testing.assert_frame_equal(back.curve, edit.curve)
    with edit.applied(qwen): one = fingerprint(qwen)
    with back.applied(qwen): assert fingerprint(qwen) == one
    for f in FILES:
        data = (tmp_path / f).read_bytes()
        (tmp_path / f).write_bytes(data[:-1])
        with pytest.raises(Broken, match=f): load_edit(tmp_path)
        (tmp_path / f).write_bytes(data)


def test_slice_keys_name_their_slices():
    s = Slice("model.layers.0.mlp.up_proj.weight", 0, 3, 9)
    assert parse_slice(slice_key(s)) == s


# ---- learning rates

def table(*rows): return pd.DataFrame(rows, columns=["model", "task", "forget_size", "localization", "lr", "inject", "score", "source"])


def test_the_committed_table_is_whole():
    t = pd.read_csv(LEARNING_RATES)
    assert not t.duplicated(["model", "task", "forget_size", "localization"]).any() and (t.lr > 0).all() and (t.inject > 0).all() and t.source.notna().all()
    assert {n for n in t.localization if not n.startswith("hand@")} <= {n for g in RATE_GROUPS for n in g}


def test_published_rates():
    got = learning_rate("google/gemma-7b", "sports-athlete-editing", 64, "flu@published")
    assert (got.lr, got.inject) == (1e-5, 5.) and got.source.startswith("flu, 64 facts")
    assert learning_rate("meta-llama/Meta-Llama-3-8B", "full-sports-editing", 243, "nonlocalized").lr == 1e-5


def test_rates_fall_back_in_a_known_order():
    t = table(("m", "t", 16, "flu", 1, 1, 3, "a"), ("m", "t", 64, "flu", 2, 1, 3, "b"), ("m", "t", 64, "random-mlps", 3, 1, 3, "c"), ("m", "t", 64, "random", 4, 1, 3, "d"))
    pick = lambda size, name: learning_rate("org/M", "t", size, name, t).lr
    assert [pick(64, "flu"), pick(16, "flu"), pick(100, "flu"), pick(16, "random-mlps#3"), pick(16, "flu-probe"), pick(64, "late"), pick(16, "hand@mlp.2-5")] == [2, 1, 2, 3, 1, 4, 1]
    for args in [("m", "t", 64, "nonlocalized"), ("m", "u", 64, "flu"), ("n", "t", 64, "flu"), ("m", "t", 64, "elsewhere")]:
        with pytest.raises(Refusal, match="no learning rate"): learning_rate(*args, t)


def test_given_rates_win(qwen):
    where = mixed(qwen)
    assert rates(qwen, task_for(qwen), where, 1e-3, None) == (1e-3, 1.) and rates(qwen, task_for(qwen), where, 1e-3, 5.) == (1e-3, 5.)
    with pytest.raises(Refusal, match="no learning rate for mixed"): rates(qwen, task_for(qwen), where, None, None)


def test_best_rates_reports_edges_and_skips_divergence():
    trial = lambda loc, lr, score: dict(model="m", task="t", forget_size=64, localization=loc, draw=None, seed=0, lr=lr, inject=1., score=score)
    got = best_rates(pd.DataFrame([trial("flu", 1, 2.), trial("flu", 2, 2.9), trial("flu", 4, math.nan), trial("late", 1, 2.), trial("late", 2, 1.),
        trial("random", 1, 1.), trial("random", 1, 3.), trial("random", 2, 2.5), trial("random", 2, 2.), trial("random", 4, math.nan), trial("random", 4, 3.)]))
    assert got.set_index("localization").lr.to_dict() == {"flu": 2, "late": 1, "random": 2}
    assert got.set_index("localization").at_edge.to_dict() == {"flu": False, "late": True, "random": False}


def test_score_does_not_reward_a_lower_text_loss():
    assert score(dict(forget=0, edit=1, retain=1, text=1.), dict(text=2.)) == 3 and score(dict(forget=0, edit=1, retain=1, text=2.5), dict(text=2.)) == 2.5


def test_sweep_edits_dev_facts_only(qwen):
    task = task_for(qwen)
    dev = dev_task(task)
    assert dev.forget == task.dev_forget and dev.retain_test == task.dev_retain and not set(dev.text_train) & set(dev.text_test)
    t = sweep(qwen, task, [mixed(qwen)], lrs=[1e-3, 1e30], seeds=[0, 1], **{k: v for k, v in SMALL.items() if k not in ("lr", "progress")})
    assert len(t) == 4 and t.score.isna().sum() == 2 and t[t.lr == 1e-3].score.between(0, 3).all()
    with pytest.raises(Refusal, match="no dev facts"): dev_task(dev)


def test_an_interrupted_sweep_goes_on(qwen, tmp_path, monkeypatch):
    from mechunlearn import rates as R
    task, how = task_for(qwen), {k: v for k, v in SMALL.items() if k not in ("lr", "progress")} | dict(progress=False)
    made, plain = [], R.finetune
    def stops(*a, **kw):
        if len(made) == 3: raise KeyboardInterrupt
        made.append(1); return plain(*a, **kw)
    monkeypatch.setattr(R, "finetune", stops)
    go = lambda **kw: sweep(qwen, task, [mixed(qwen)], lrs=[1e-3, 2e-3], seeds=[0, 1], injects=[1., 2.], folder=tmp_path, **how | kw)
    with pytest.raises(KeyboardInterrupt): go()
    assert len(list(tmp_path.glob("*.parquet"))) == 3
    monkeypatch.setattr(R, "finetune", lambda *a, **kw: made.append(1) or plain(*a, **kw))
    table = go()
    assert len(table) == len(made) == 6 and go().equals(table) and len(made) == 6
    pd.testing.assert_frame_equal(table, sweep(qwen, task, [mixed(qwen)], lrs=[1e-3, 2e-3], seeds=[0, 1], injects=[1., 2.], **how), check_dtype=False)
    made.clear(); go(steps=4)
    assert len(made) == 6                                                                   # another training is another sweep


# ---- the stage

def test_stage_trains_once_and_repairs(qwen, tmp_path, monkeypatch):
    run = Run(tmp_path / "run", qwen.name, qwen.revision, "sports-athlete-editing", {})
    go = lambda **kw: run_finetuning(qwen, lambda s: task_for(qwen, s), run, ["late", "random-mlps"], [0, 1], draws=2, budget=2000, **SMALL | kw)
    curves = go()
    assert set(zip(curves.localization, curves.seed)) == {(n, s) for n in ("late", "random-mlps#0", "random-mlps#1") for s in (0, 1)}
    trained = []
    real = J.finetune
    monkeypatch.setattr(J, "finetune", lambda lm, task, where, **kw: trained.append((where.name, task.seed)) or real(lm, task, where, **kw))
    pd.testing.assert_frame_equal(go(), curves)
    file = run.path("late", "seed1", "edit.safetensors")
    file.unlink()
    go()
    assert trained == []                                    # the curve is there; nobody asked for the edit
    jobs = {(j.name, j.task.seed): j for j in edit_jobs(qwen, lambda s: task_for(qwen, s), run, ["none", "late"], [0, 1], budget=2000, **SMALL)}
    assert list(jobs)[0] == ("none", 0) and jobs["none", 0].edit() is None
    jobs["late", 1].edit()
    assert trained == [("late", 1)] and file.exists()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Broken): jobs["late", 1].edit()
    Job(**{**vars(jobs["late", 1]), "repair": True}).edit()
    assert trained == [("late", 1)] * 2
    go(steps=4)
    assert len(trained) == 2 + 6


def test_another_first_seed_would_draw_other_places(qwen, tmp_path):
    run = Run(tmp_path / "run", qwen.name, qwen.revision, "sports-athlete-editing", {})
    go = lambda seeds: run_finetuning(qwen, lambda s: task_for(qwen, s), run, ["random-mlps"], seeds, draws=1, budget=2000, **SMALL)
    go([2])
    before = {f: f.read_bytes() for f in run.root.rglob("*") if f.is_file()}
    with pytest.raises(Refusal, match="drawn with seed 2: name it first, as in --seeds 2,0"): go([0])
    assert {f: f.read_bytes() for f in run.root.rglob("*") if f.is_file()} == before
    assert set(go([2, 0]).seed) == {0, 2} and len(edit_jobs(qwen, lambda s: task_for(qwen, s), run, ["none"], [0])) == 1


def test_a_table_counts_no_training(qwen, tmp_path, monkeypatch):
    run, trained = Run(tmp_path / "run", qwen.name, qwen.revision, "sports-athlete-editing", {}), []
    real, make, before = J.finetune, J.make, []
    monkeypatch.setattr(J, "finetune", lambda *a, **kw: trained.append(1) or real(*a, **kw))
    monkeypatch.setattr(J, "make", lambda *a: before.append(len(trained)) or make(*a))  # its clock starts here
    job = edit_jobs(qwen, lambda s: task_for(qwen, s), run, ["late"], [0], budget=2000, **SMALL)[0]
    table = lambda edit: pd.DataFrame({"tensors": [len(edit.values)]})
    first = job.table("asked.parquet", table, asked=1)
    assert first.tensors.item() > 0 and trained == [1] and before == [1]
    job.path("edit.safetensors").unlink()
    pd.testing.assert_frame_equal(job.table("asked.parquet", table, asked=1), first)
    assert trained == [1]                                   # there: nobody needs the edit
    job.table("asked.parquet", table, asked=2)
    assert trained == [1, 1] and before == [1, 1, 2]
    none = Job(qwen, task_for(qwen), None, run, {})
    assert none.table("asked.parquet", lambda edit: pd.DataFrame({"edit": [edit is None]})).edit.item()


def test_causes_tell_edits_apart(qwen):
    job = lambda seed=0, lr=1e-3, **kw: Job(qwen, task_for(qwen, seed), mixed(qwen), None, dict(lr=lr, **kw)).causes()
    assert job() == job() == job(progress=False, micro_batch=3)      # what cannot change the result is no cause
    assert len({str(c) for c in (job(), job(1), job(lr=2e-3), job(steps=7), Job(qwen, task_for(qwen), None, None, {}).causes())}) == 5


def test_stage_without_a_folder_writes_nothing(qwen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(run_finetuning(qwen, lambda s: task_for(qwen, s), None, ["late"], [0], **SMALL)) == SMALL["steps"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_comes_back_to_the_bit_and_waits_in_half_the_memory_where_it_can(dtype):
    rough = torch.randn(300, generator=torch.Generator().manual_seed(0))
    odd = torch.tensor([0., -0., math.inf, -math.inf, math.nan, 1e-40, 3.])
    weights = [x.to(dtype) for x in (rough, rough.bfloat16(), odd, odd.nan_to_num(1.))]
    whole = {torch.float32: torch.int32}.get(dtype, torch.int16)
    before = [w.view(whole).clone() for w in weights]
    with F.kept(weights, "cpu"):
        for w in weights: w.fill_(7.)
    assert all(torch.equal(w.view(whole), b) for w, b in zip(weights, before))
    small = [F._copy(w, "cpu").dtype == torch.bfloat16 for w in weights]
    assert small == {torch.float32: [False, True, False, False], torch.bfloat16: [True] * 4, torch.float16: [False, True, False, True]}[dtype]


# ---- edits made elsewhere

def elsewhere(lm, folder, change):
    "A folder of the model after somebody changed it"
    with torch.no_grad(), F.kept([p.detach() for p in lm.hf.parameters()]):
        change(lm.hf)
        lm.hf.save_pretrained(folder)
    lm.tok.save_pretrained(folder)
    return folder


@every_family
def test_anyones_edit_is_every_weight_that_differs(lm, tmp_path):
    name, norm = name_of(lm.hf, parts(lm.hf, 1).down) + ".weight", name_of(lm.hf, last_norm(lm.hf)) + ".weight"
    def change(hf): hf.get_parameter(name).add_(.1); hf.get_parameter(norm).mul_(1.5)
    folder, before, old = elsewhere(lm, tmp_path / "theirs", change), fingerprint(lm), lm.weight(norm).detach().clone()
    edit = checkpoints.edit_of(lm, folder)
    assert edit.localization.name == "edited@theirs" and {s.param for s in map(parse_slice, edit.values)} == {name, norm} and "trained elsewhere" in repr(edit)
    assert edit.localization.n_params == lm.weight(name).numel() + lm.weight(norm).numel() and not edit.localization.matched
    with edit.applied(lm):
        changed = {n for n, sha in fingerprint(lm).items() if sha != before[n]}
        assert changed == {name, norm} and torch.allclose(lm.weight(norm), 1.5 * old)
    assert fingerprint(lm) == before


def test_what_is_no_edit_is_refused(qwen, tiny, tmp_path):
    same = elsewhere(qwen, tmp_path / "same", lambda hf: None)
    with pytest.raises(Refusal, match="the same weights"): checkpoints.edit_of(qwen, same)
    other = tiny("qwen3", intermediate_size=40)
    with pytest.raises(Refusal, match="is not an edit of"): checkpoints.edit_of(qwen, elsewhere(other, tmp_path / "other", lambda hf: None))
    with pytest.raises(Refusal, match="name its folder"): edit_jobs(qwen, lambda seed: None, None, ["edited@x"])


def test_one_edit_is_asked_about_one_forget_set(qwen, tmp_path):
    theirs, task = elsewhere(qwen, tmp_path / "theirs", lambda hf: hf.get_parameter("model.layers.1.mlp.down_proj.weight").add_(.5)), task_for(qwen)
    how = dict(lm=qwen, run=None, localizations=["edited@theirs"], seeds=(0, 1), edited=str(theirs))
    assert len(edit_jobs(task_for_seed=lambda seed: task.model_copy(update=dict(seed=seed, forget=task.forget[::1 - 2*seed])), **how)) == 2
    with pytest.raises(Refusal, match="edited@theirs was edited once.*give one seed"): edit_jobs(task_for_seed=lambda seed: task_for(qwen, seed), **how)


def test_an_adapter_of_another_base_is_noted(tiny, tmp_path):
    import copy
    from peft import LoraConfig, get_peft_model
    from mechunlearn.models import load
    base = load(str(elsewhere(tiny("qwen3"), tmp_path / "base", lambda hf: None)), device="cpu")
    for made_for in (str(tmp_path / "base"), "someone/other"):
        model = get_peft_model(copy.deepcopy(base.hf), LoraConfig(r=4, target_modules=["down_proj"], layers_to_transform=[1], base_model_name_or_path=made_for))
        model.peft_config["default"].base_model_name_or_path = made_for
        with torch.no_grad(): [p.add_(.1) for n, p in model.named_parameters() if "lora" in n]
        model.save_pretrained(tmp_path / "adapter")
        job, = edit_jobs(base, lambda seed: task_for(base), None, ["edited@adapter"], edited=str(tmp_path / "adapter"))
        assert job.given.config.get("made_for") == (None if made_for.startswith("/") else made_for)


def test_anyones_edit_goes_through_a_stage(qwen, tmp_path):
    from mechunlearn.evaluation import run_evaluation
    theirs = elsewhere(qwen, tmp_path / "theirs", lambda hf: hf.get_parameter("model.layers.1.mlp.down_proj.weight").add_(.5))
    run, task = Run(tmp_path / "run", qwen.name, qwen.revision, "t", {}), task_for(qwen)
    few = dict(max_facts={"retain": 4, "retain/mcq": 2, "ghost": 4, "ghost/mcq": 2, "same-subject": 2, "other-relation": 2, "general": 2})
    got = run_evaluation(qwen, lambda seed: task, run, ["edited@theirs"], [0], edited=str(theirs), **few)
    assert set(got.localization) == {"none", "edited@theirs"} and (tmp_path / "run/localizations/edited@theirs.json").exists()
    prob = got[(got.group == "retain") & (got.measure == "prob")].groupby("localization").value.first()
    assert prob["none"] != prob["edited@theirs"] and edited_elsewhere(run.root, "edited@theirs")["place"] == str(theirs) and edited_elsewhere(run.root, "x") == {}
    first = read_meta(tmp_path / "run/edited@theirs/seed0/evaluation.parquet")["hash"]
    theirs = elsewhere(qwen, tmp_path / "again/theirs", lambda hf: hf.get_parameter("model.layers.1.mlp.down_proj.weight").add_(.6))
    run_evaluation(qwen, lambda seed: task, run, ["edited@theirs"], [0], edited=str(theirs), **few)
    assert read_meta(tmp_path / "run/edited@theirs/seed0/evaluation.parquet")["hash"] != first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_of_pickled_weights_is_read(tmp_path, dtype):
    torch.save({"model.norm.weight": torch.ones(2, dtype=dtype)}, tmp_path / "pytorch_model.bin")
    torch.save({"step": 3}, tmp_path / "optimizer.bin"); (tmp_path / "config.json").write_text("{}")
    assert checkpoints.stored_dtype(str(tmp_path)) == dtype
