"The relearning attack: what it leaves alone, what it trains on, what it counts."
from contextlib import nullcontext
from types import SimpleNamespace
import pandas as pd, pytest, torch
from mechunlearn import relearning
from mechunlearn.questions import answer, completions
from mechunlearn.facts import Fact, Task
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.finetuning import Edit, fingerprint, slice_key
from mechunlearn.localization import build
from mechunlearn.models import Component
from mechunlearn.relearning import (ORGANISM, PUBLISHED, Lora, adapters, attacker, by_attacker, blind_guesses, everything, grid_for, halves, linear_weights, lora_for,
    low_resource, pair, recovery, relearn, relearn_grid, relearning_rows, run_relearning, teach)
from mechunlearn.stats import summarise
from mechunlearn.store import Refusal, Run

SMALL = dict(lora=Lora(4, 4, 1e-2, 0.), sizes=dict(forget=4, retain=4, text=1), max_facts=6)


@pytest.fixture(scope="module")
def task(): return sports_athlete_editing(None, forget_size=8)


def random_edit(lm):
    "Noise in one MLP and one head, as an edit."
    where = build(lm, "noise", [Component("mlp", 1), Component("head", 0, 1)])
    values = {slice_key(s): lm.weight(s.param).narrow(s.dim, s.start, s.stop - s.start).float() + .3 for s in where.slices}
    return Edit(where, values, pd.DataFrame(), dict(model=lm.name, revision=lm.revision))


def answers(lm, task): return answer(lm, completions(task.forget)).full_truth.to_numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_is_bit_identical_afterwards(lm, task, dtype):
    lm.hf.to(dtype)
    edit, before, modules = random_edit(lm), fingerprint(lm), [id(m) for m in lm.hf.modules()]
    records = relearn(lm, task, edit, steps=2, sides=(0,), **SMALL)
    assert fingerprint(lm) == before and [id(m) for m in lm.hf.modules()] == modules
    assert not lm.hf.training and not any(p.requires_grad or p.grad is not None for p in lm.hf.parameters())
    assert records.full_truth.between(0, 1).all()


def test_model_is_bit_identical_after_an_error(tiny, task):
    lm = tiny()
    edit, before = random_edit(lm), fingerprint(lm)
    with pytest.raises(RuntimeError, match="interrupted"), edit.applied(lm), adapters(lm, SMALL["lora"]) as params:
        for step in teach(lm, task, task.forget[:4], params, SMALL["lora"], 3, sizes=SMALL["sizes"]):
            if step == 2: raise RuntimeError("interrupted")
    assert fingerprint(lm) == before and not lm.hf.training


@pytest.mark.filterwarnings("error::FutureWarning")
def test_adapters_first_add_exactly_nothing_and_are_float32(lm, task):
    lm.hf.to(torch.bfloat16)
    before = answers(lm, task)
    with adapters(lm, Lora(4, 8, 1e-3, .5)) as params:
        assert {p.dtype for p in params} == {torch.float32}
        assert (answers(lm, task) == before).all()


def adapter_gradients(lm, task):
    "Gradients of adapters that add something, and the dtypes that they are multiplied in"
    seen, rows = [], relearning.fact_rows(lm, task.forget, [f.answer for f in task.forget], "forget")
    with adapters(lm, Lora(4, 8, 1e-3, 0.)) as params:
        drawn = torch.Generator().manual_seed(0)
        for p in params: p.data.copy_(torch.randn(p.shape, generator=drawn)*.05)
        for name, m in lm.hf.named_modules():
            if ".lora_" in name and isinstance(m, torch.nn.Linear): m.register_forward_hook(lambda m, x, out: seen.append(out.dtype))
        relearning.step_losses(lm, {}, rows, relearning.UPDATES["edit"])
        return torch.cat([p.grad.flatten() for p in params]), set(seen)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "neox", "phi3"])
def test_adapters_are_multiplied_in_bfloat16_where_the_model_is(tiny, task, family, monkeypatch):
    lm = tiny(family)
    exact, dtypes = adapter_gradients(lm, task)
    assert dtypes == {torch.float32}
    lm.hf.to(torch.bfloat16)
    ours, dtypes = adapter_gradients(lm, task)
    assert dtypes == {torch.bfloat16} and ours.dtype == torch.float32
    monkeypatch.setattr(relearning, "_as_multiplied", lambda lm: nullcontext())
    slow, dtypes = adapter_gradients(lm, task)
    assert dtypes == {torch.float32}
    off = [((g - exact).norm() / exact.norm()).item() for g in (ours, slow)]
    assert off[0] < 1.5*off[1] < .1 # no further from float32 than the model's own rounding takes it


def test_adapters_are_on_every_linear_layer_but_the_unembedding(tiny):
    lm = tiny("llama")
    with adapters(lm, Lora(4, 8, 1e-3, 0.)) as params:
        assert len(params) == 2 * 7 * lm.n_layers
        assert type(lm.hf.get_submodule("lm_head")) is torch.nn.Linear


def test_the_attack_starts_from_the_edited_model(tiny, task):
    lm = tiny()
    edit = random_edit(lm)
    with edit.applied(lm): edited = answers(lm, task)
    assert abs(edited - answers(lm, task)).max() > 1e-3
    first = relearn(lm, task, edit, steps=1, at=(0,), **SMALL).query("group == 'forget'").set_index("fact").full_truth
    assert first[[f.id for f in task.forget]].to_numpy() == pytest.approx(edited, rel=1e-4)


def test_teaching_teaches_the_truth(tiny, task):
    lm = tiny(seed=1)
    lora = Lora(16, 64, 1e-2, 0.)
    records = relearn(lm, task, None, lora, steps=25, at=(0, 25), sides=(0,), sizes=dict(forget=4, retain=0, text=0), max_facts=4)
    trained = records[records.group == "trained"].groupby("step").prob_truth.mean()
    assert trained[25] > .6 > trained[0]


def test_no_held_fact_is_taught(tiny, task, monkeypatch):
    lm, seen = tiny(), set()
    monkeypatch.setattr("mechunlearn.relearning.step_losses", lambda lm, values, rows, update, **kw: seen.update((tuple(r.ids), r.target) for r in rows))
    for half in (0, 1):
        seen.clear()
        taught, held = halves(task, half)
        with adapters(lm, SMALL["lora"]) as params: list(teach(lm, task, taught, params, SMALL["lora"], 40, sizes=dict(forget=2, retain=8, text=1)))
        prompts = {p for p, _ in seen}
        tokens = lambda facts: {tuple(i) for i in lm.ids([f.prompt for f in facts])}
        assert tokens(taught) <= prompts and not tokens(held + task.ghosts + task.retain_test) & prompts
        assert {(tuple(i), lm.first_token(f.answer)) for i, f in zip(lm.ids([f.prompt for f in taught]), taught)} <= seen


def test_every_forget_fact_is_asked_once_as_held_and_once_as_taught(tiny, task):
    records = relearn(tiny(), task, None, steps=2, at=(2,), **SMALL)
    for group in ("forget", "trained"):
        assert sorted(records[records.group == group].fact) == sorted(f.id for f in task.forget)
    held = records[records.group == "forget"].groupby("setting").fact.agg(set)
    taught = records[records.group == "trained"].groupby("setting").fact.agg(set)
    assert held["half0"] == taught["half1"] and not held["half0"] & taught["half0"]
    assert set(records[records.group == "ghost"].fact) <= {f.id for f in task.ghosts}
    rows = summarise(records.assign(localization="none", draw=0, seed=0))
    assert {g: relearning_rows(rows, g).n.tolist() for g in ("forget", "trained", "ghost", "retain")} == dict(forget=[8], trained=[8], ghost=[6], retain=[6])


def test_steps_that_are_measured(tiny, task):
    steps = lambda **kw: sorted(relearn(tiny(), task, None, sides=(0,), **SMALL, **kw).step.unique())
    assert steps(steps=8) == [0, 2, 4, 8]
    assert steps(steps=3, at=(1, 3)) == [1, 3]
    assert steps(steps=1) == [0, 1]


def test_the_attack_repeats_and_leaves_the_random_state_alone(tiny, task):
    lm, dropped = tiny(), SMALL | dict(lora=Lora(4, 4, 1e-2, .3))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b, c = (relearn(lm, task, None, steps=4, at=(4,), sides=(0,), seed=s, **dropped).full_truth for s in (0, 0, 1))
    assert a.equals(b) and not a.equals(c)
    assert torch.equal(torch.get_rng_state(), state)


def test_micro_batches_do_not_matter(tiny, task):
    one, many = (relearn(tiny(), task, None, steps=3, at=(3,), sides=(0,), batch_size=b, **SMALL).full_truth for b in (2, 64))
    assert one.to_numpy() == pytest.approx(many.to_numpy(), rel=1e-3)


def test_a_task_without_text_or_ghosts(tiny, task):
    bare = task.model_copy(update=dict(text_train=(), ghosts=()))
    records = relearn(tiny(), bare, None, steps=2, **SMALL)
    assert set(records.group) == {"forget", "trained", "retain"}


def test_one_fact_cannot_be_halved(tiny):
    with pytest.raises(Refusal, match="forget_size must be at least 2"): relearn(tiny(), sports_athlete_editing(None, forget_size=1), None, steps=1, **SMALL)


def test_default_settings_follow_the_width(tiny):
    assert lora_for(tiny()) == ORGANISM
    wide = lambda n: lora_for(SimpleNamespace(d_model=n))
    assert wide(3072) == wide(3584) == wide(4096) == PUBLISHED and PUBLISHED.alpha / PUBLISHED.rank == 1 / 16
    assert [wide(n).rank for n in (576, 640, 1152, 2048)] == [64, 128, 128, 256] and wide(2048) == Lora(256, 256, 5e-4, 0.)
    assert {l.rank for l, _ in grid_for(SimpleNamespace(d_model=640))} == {0, 16, 128} != {l.rank for l, _ in grid_for(SimpleNamespace(d_model=3072))}


def a_task(truths, edits, known=(" a", " b", " c"), relation="sport"):
    fact = lambda i, a, e=None: Fact(id=f"{relation}/{i}", relation=relation, subject=f"S{i}", prompt=f"S{i} is", answer=a, edit=e, candidates=known + (" golf",))
    forget = tuple(fact(i, a, e) for i, (a, e) in enumerate(zip(truths, edits)))
    return Task(name="t", source="world", forget=forget, retain=tuple(fact(1000 + i, a) for i, a in enumerate(known)), retain_test=(fact(2000, known[0]),))


def test_chance_counts_what_blind_strategies_reach():
    c = blind_guesses(a_task([" a", " a", " a", " b"], [" b", " b", " c", " c"]))
    assert c.uniform == pytest.approx(1 / 3) and c.not_edit == pytest.approx(1 / 2)
    assert c.constant == pytest.approx(3 / 4)  # halves: a, a and a, b
    golf = blind_guesses(a_task([" a", " b"], [" golf", " golf"]))
    assert golf.not_edit == pytest.approx(1 / 3)  # knowing that golf is wrong rules nothing out


def test_chance_is_reached_by_simulated_attackers():
    import random
    rng, known = random.Random(0), [" a", " b", " c"]
    truths = [rng.choice(known) for _ in range(300)]
    edits = [rng.choice([k for k in known if k != t]) for t in truths]
    c = blind_guesses(a_task(truths, edits))
    blind = sum(rng.choice(known) == t for t in truths * 20) / 6000
    wary = sum(rng.choice([k for k in known if k != e]) == t for t, e in zip(truths * 20, edits * 20)) / 6000
    assert blind == pytest.approx(c.uniform, abs=.03) and wary == pytest.approx(c.not_edit, abs=.03)


def test_stage_writes_each_table_once(tiny, task, tmp_path, monkeypatch):
    lm = tiny()
    run = Run(tmp_path, lm.name, lm.revision, task.name, {})
    how = dict(relearning=dict(steps=1, max_facts=4, sizes=SMALL["sizes"], lora=dict(rank=4)), steps=2, lr=1e-3, progress=False)
    first = run_relearning(lm, lambda seed: task, run, ["late"], [0], **how)
    assert set(first.localization) == {"none", "late"} and (tmp_path / "late/seed0/relearning.parquet").exists()
    monkeypatch.setattr("mechunlearn.relearning.relearn", lambda *a, **kw: pytest.fail("made again"))
    again = run_relearning(lm, lambda seed: task, run, ["late"], [0], **how)
    pd.testing.assert_frame_equal(first, again)


WHOLE = Lora(0, 0, 1e-2, 0.)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_the_weights_themselves(lm, task, dtype):
    lm.hf.to(dtype)
    before, linear = fingerprint(lm), {s.param for s in linear_weights(lm)}
    with attacker(lm, WHOLE) as (params, values):
        assert all(p.dtype == torch.float32 for p in params) and len(params) == 7 * lm.n_layers
        for _ in teach(lm, task, task.forget[:4], params, WHOLE, 3, sizes=SMALL["sizes"], values=values): pass
        assert {name for name, sha in fingerprint(lm).items() if sha != before[name]} == linear
    assert fingerprint(lm) == before and not any(p.requires_grad for p in lm.hf.parameters())


def test_the_weights_themselves_follow_plain_adamw(tiny, task):
    lm, plain = tiny("llama"), tiny("llama")
    facts, sizes = task.forget[:4], dict(forget=4, retain=0, text=0)
    with attacker(lm, WHOLE) as (params, values):
        for _ in teach(lm, task, facts, params, WHOLE, 3, sizes=sizes, values=values): pass
        ours = {s.param: lm.weight(s.param).detach().clone() for s in values}
    weights = [plain.weight(s.param).requires_grad_() for s in linear_weights(plain)]
    opt = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 3)
    target = torch.tensor([plain.first_token(f.answer) for f in facts])
    for _ in range(3):
        batch = plain.pad(plain.ids([f.prompt for f in facts]))
        torch.nn.functional.cross_entropy(plain.hf(**batch).logits[:, -1], target).backward()
        opt.step(); schedule.step(); opt.zero_grad()
    assert max(float((ours[s.param] - plain.weight(s.param).detach()).abs().max()) for s in linear_weights(plain)) < 2e-4


def test_weights_are_restored_when_training_them_fails(tiny, task):
    lm = tiny()
    before = fingerprint(lm)
    with pytest.raises(RuntimeError, match="stop"), attacker(lm, WHOLE) as (params, values):
        for step in teach(lm, task, task.forget[:4], params, WHOLE, 3, sizes=SMALL["sizes"], values=values):
            if step == 2: raise RuntimeError("stop")
    assert fingerprint(lm) == before


def test_a_grid_has_every_combination_once_and_keeps_the_scale(tiny, task):
    lm = tiny()
    grid = grid_for(lm, ranks=(0, 2, 4), lrs=(1e-3, 1e-2), steps=(1, 2))
    assert len(set(grid)) == 12 and {l.alpha / l.rank for l, _ in grid if l.rank} == {ORGANISM.alpha / ORGANISM.rank}
    records = relearn_grid(lm, task, None, grid[:4] + grid[-1:], sizes=SMALL["sizes"], max_facts=4)
    table = by_attacker(records)
    assert sorted(table.index) == sorted(f.id for f in task.forget) and table.notna().all(axis=None) and set(records.evaluation) == {"relearning-grid"}
    assert list(table) == ["rank0/lr0.001/steps1", "rank0/lr0.001/steps2", "rank0/lr0.01/steps1", "rank0/lr0.01/steps2", "rank4/lr0.01/steps2"]
    alone = relearn(lm, task, None, grid[-1][0], 2, at=(2,), sizes=SMALL["sizes"], max_facts=4)
    held = alone[alone.group == "forget"].set_index("fact").prob_truth
    assert by_attacker(records, column="prob_truth")["rank4/lr0.01/steps2"][held.index].to_numpy() == pytest.approx(held.to_numpy(), rel=1e-4)


def test_two_facts_or_all_are_taught(tiny, task):
    for side in (0, 1):
        taught, held = pair(task, side)
        assert len(taught) == 2 and {*taught, *held} == set(task.forget) and not {*taught} & {*held}
    assert pair(task, 0)[0] != pair(task, 1)[0] and everything(task, 0) == (task.forget, ())
    with pytest.raises(Refusal, match="at least 3"): pair(task.model_copy(update=dict(forget=task.forget[:2])), 0)
    records = low_resource(tiny(), task, None, SMALL["lora"], sizes=SMALL["sizes"], max_facts=4)
    assert set(records.setting) == {"two facts/half0", "two facts/half1", "all facts/half0"} and set(records.format) == {"completion", "mcq"}
    last = records[(records.step > 0) & (records.format == "completion")].groupby(["setting", "group"]).fact.nunique().unstack()
    assert last.loc["two facts/half0", ["forget", "trained"]].tolist() == [6, 2] and last.loc["all facts/half0", "trained"] == 8
    assert records.groupby("setting").step.max().to_dict() == {"two facts/half0": 10, "two facts/half1": 10, "all facts/half0": 20}


def test_recovery_is_the_share_of_what_was_taken():
    rows = lambda values, step: pd.DataFrame(dict(evaluation="relearning", group="forget", fact=[f"f{i}" for i in range(len(values))], step=step, top1_truth=values))
    original, edited, back = rows([True] * 8, 0), rows([True] * 2 + [False] * 6, 0), rows([True] * 5 + [False] * 3, 9)
    r = recovery(pd.concat([edited, back]), original)
    assert r["value"] == pytest.approx((5 / 8 - 2 / 8) / (8 / 8 - 2 / 8)) and r["n"] == 8 and r["ci_low"] <= r["value"] <= r["ci_high"]
    assert pd.isna(recovery(pd.concat([original, rows([True] * 8, 9)]), original)["value"])


def test_stage_writes_the_grid_where_it_is_wanted(tiny, task, tmp_path):
    lm = tiny()
    run = Run(tmp_path, lm.name, lm.revision, task.name, {})
    how = dict(relearning=dict(steps=1, max_facts=4, sizes=SMALL["sizes"], lora=dict(rank=4)), steps=2, lr=1e-3, progress=False)
    how["relearning"] |= dict(low_resource=True, grid=dict(ranks=(2,), lrs=(1e-3,), steps=(1,), localizations=["late"], seeds=[0]))
    run_relearning(lm, lambda seed: task, run, ["late", "all-mlps"], [0], **how)
    written = lambda name: {p.parts[-3] for p in tmp_path.glob(f"*/seed0/{name}.parquet")}
    assert written("relearning_grid") == {"none", "late"} and written("low_resource") == written("relearning") == {"none", "late", "all-mlps"}
