"Soft prompts: that they stand where they should, that only they are trained, and what they can and cannot bring back."
import pandas as pd, pytest, torch
from mechunlearn.questions import answer, completions
from mechunlearn.facts import Fact
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.finetuning import Edit, fingerprint, slice_key
from mechunlearn.localization import build
from mechunlearn.models import Component, load
from mechunlearn.relearning import asked, blind_guesses, halves
from mechunlearn.softprompts import (logits_behind, plot_soft_prompts, prompted, random_words, read_once, run_soft_prompts, soft_prompt, soften, softened,
    traced_logits)
from mechunlearn.store import Refusal, Run

SMALL = dict(ks=(2,), prompts=2, steps=2, batch=4, retain_batch=4, max_facts=6)


@pytest.fixture(scope="module")
def task(): return sports_athlete_editing(None, forget_size=8)


@pytest.fixture(scope="module")
def organism(): return load("organism", device="cpu")


def prompts_of(task): return [task.forget[0].prompt, task.forget[1].prompt + " of", "the", task.forget[0].paraphrases[0]]


def embeddings(lm, ids): return lm.hf.get_input_embeddings()(torch.tensor(ids)).detach()


def noise(lm):
    where = build(lm, "noise", [Component("mlp", 1), Component("head", 0, 1)])
    values = {slice_key(s): lm.weight(s.param).narrow(s.dim, s.start, s.stop - s.start).float() + .3 for s in where.slices}
    return Edit(where, values, pd.DataFrame(), dict(model=lm.name, revision=lm.revision))


WORDS = [7, 300, 45, 19]

@torch.no_grad()
def with_words(lm, prompts): return lm.hf(**lm.pad([ids + WORDS for ids in lm.ids(prompts)]), use_cache=False).logits[:, -1]


@torch.no_grad()
def test_embeddings_of_real_words_give_exactly_the_logits_of_those_words(lm, task):
    prompts, soft = prompts_of(task), embeddings(lm, WORDS)
    want = with_words(lm, prompts)
    assert len({len(i) for i in lm.ids(prompts)}) == 4  # padded
    with prompted(lm, soft) as spoken: got = spoken.hf(**spoken.encode(prompts), use_cache=False).logits[:, -1]
    assert torch.equal(got, want)
    with prompted(lm, soft[[1, 0, 2, 3]]) as spoken: other = spoken.hf(**spoken.encode(prompts), use_cache=False).logits[:, -1]
    assert (other - want).abs().max() > 1e-2  # their order counts
    assert torch.equal(with_words(lm, prompts), want)  # and nothing of them stays


@torch.no_grad()
def test_nnsight_gives_the_same(lm, task):
    prompts, soft = prompts_of(task), random_words(lm, 4, seed=1) * 1.1
    with prompted(lm, soft) as spoken: want = spoken.hf(**spoken.encode(prompts), use_cache=False).logits[:, -1]
    assert torch.allclose(traced_logits(lm, prompts, soft), want, atol=1e-6)
    assert torch.allclose(traced_logits(lm, prompts, embeddings(lm, WORDS)), with_words(lm, prompts), atol=1e-6)


def test_reading_the_prompts_once_gives_the_same_and_can_be_repeated(lm, task):
    prompts, soft = prompts_of(task), embeddings(lm, WORDS)
    want, once = with_words(lm, prompts), read_once(lm, lm.ids(prompts))
    for rows in ([0, 1, 2, 3], [3, 0], [2]): assert torch.allclose(logits_behind(lm, once, rows, soft), want[rows], atol=1e-5)


def test_gradients_are_those_of_the_whole_prompt(lm, task):
    prompts = prompts_of(task)
    short, whole = (random_words(lm, 3).requires_grad_() for _ in range(2))
    logits_behind(lm, read_once(lm, lm.ids(prompts)), range(4), short).logsumexp(-1).sum().backward()
    with prompted(lm, whole) as spoken: value = spoken.hf(**spoken.encode(prompts), use_cache=False).logits[:, -1].logsumexp(-1).sum()
    value.backward()  # not in the line above: nnsight takes it for a `with ... .backward()` of its own
    assert whole.grad.abs().max() > 1e-3 and torch.allclose(short.grad, whole.grad, rtol=1e-3, atol=1e-5)


def test_answers_behind_real_words_are_those_of_the_longer_prompt(tiny, task):
    lm = tiny("llama")
    questions, word = completions(task.forget), lm.tok.convert_ids_to_tokens(45)
    assert lm.ids([task.forget[0].prompt + f" {word}"])[0] == lm.ids([task.forget[0].prompt])[0] + [45]
    want = answer(lm, [q._replace(prompt=q.prompt + f" {word}") for q in questions], 3)
    with prompted(lm, embeddings(lm, [45])) as spoken: got = answer(spoken, questions, 5)
    pd.testing.assert_frame_equal(got, want, rtol=1e-4)
    assert (answer(lm, questions).full_truth - want.full_truth).abs().max() > 1e-5


def test_an_answer_of_several_tokens_stands_behind_the_soft_words(tiny, task):
    lm = tiny("llama")
    long, word = " football golf", lm.tok.convert_ids_to_tokens(45)
    assert len(lm.pieces(long)) == 2
    fact = lambda extra: Fact(id="x/1", relation="x", subject="the", prompt="Fact: the" + extra, answer=long, edit=" golf")
    want = answer(lm, completions([fact(f" {word}")]))
    with prompted(lm, embeddings(lm, [45])) as spoken: got = answer(spoken, completions([fact("")]))
    assert got.full_truth[0] == pytest.approx(want.full_truth[0], rel=1e-4)


def test_words_to_start_from_are_words(lm):
    table = embeddings(lm, list(range(len(lm.tok))))
    which = (random_words(lm, 50)[:, None] - table).abs().amax(-1).argmin(1)
    assert torch.equal(table[which], random_words(lm, 50)) and not set(which.tolist()) & set(lm.tok.all_special_ids)
    assert torch.equal(random_words(lm, 3, 1), random_words(lm, 3, 1)) and not torch.equal(random_words(lm, 3, 1), random_words(lm, 3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_is_bit_identical_afterwards(lm, task, dtype):
    lm.hf.to(dtype)
    before, state, hooks = fingerprint(lm), torch.get_rng_state(), lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.hf.modules()]
    had = hooks()
    records = soften(lm, task, noise(lm), sides=(0,), **SMALL)
    assert fingerprint(lm) == before and hooks() == had and torch.equal(torch.get_rng_state(), state)
    assert not lm.hf.training and not any(p.requires_grad or p.grad is not None for p in lm.hf.parameters())
    assert records.full_truth.between(0, 1).all()


def test_model_is_as_before_after_an_error(tiny, task):
    lm, questions = tiny("gemma"), completions(task.forget)
    edit, before, want = noise(lm), fingerprint(lm), answer(lm, questions)
    with pytest.raises(RuntimeError, match="interrupted"), edit.applied(lm), prompted(lm, random_words(lm, 2)): raise RuntimeError("interrupted")
    assert fingerprint(lm) == before
    pd.testing.assert_frame_equal(answer(lm, questions), want)


def test_training_teaches_the_truth_and_repeats(tiny, task):
    lm = tiny(seed=1)
    taught, _ = halves(task, 0)
    how = dict(k=4, steps=40, lr=.3, batch=4, retain_batch=0)
    a, b, c = (soft_prompt(lm, task, taught, seed=s, **how) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == (4, lm.d_model) and not a.requires_grad
    def truth(soft):
        with prompted(lm, soft) as spoken: return answer(spoken, completions(taught)).full_truth.mean()
    assert truth(a) > 5 * truth(random_words(lm, 4, 0))


def test_no_held_fact_is_taught_and_retained_ones_are_an_option(tiny, task, monkeypatch):
    lm, seen = tiny(), []
    monkeypatch.setattr("mechunlearn.softprompts.read_once", lambda lm, ids: seen.append({tuple(i) for i in ids}) or read_once(lm, ids))
    tokens = lambda facts: {tuple(i) for i in lm.ids([f.prompt for f in facts])}
    for retain_batch in (0, 4):
        taught, held = halves(task, 1)
        soft_prompt(lm, task, taught, k=1, steps=1, retain_batch=retain_batch)
        assert tokens(taught) <= seen[-1] and not tokens(held + task.ghosts + task.retain_test) & seen[-1]
        assert bool(tokens(task.retain) & seen[-1]) == bool(retain_batch)


def test_records(tiny, task):
    records = soften(tiny(), task, None, seed=3, **SMALL | dict(ks=(1, 2)))
    assert set(records.evaluation) == {"soft-prompt"} and set(records.step) == {2}
    assert set(records.setting) == {f"half{h}/{p}" for h in (0, 1) for p in ("k0/seed3", "k1/seed6", "k1/seed7", "k2/seed6", "k2/seed7")}
    assert len(records) == 2 * 5 * (4 + 4 + 6 + 6)
    for group in ("forget", "trained"):
        assert records[records.group == group].groupby("setting").fact.agg(set).groupby(lambda s: s[5:]).agg(lambda x: set().union(*x)).map(len).eq(8).all()
    held, taught = (records[records.group == g].groupby("setting").fact.agg(set) for g in ("forget", "trained"))
    assert held["half0/k1/seed6"] == taught["half1/k1/seed6"] and not held["half0/k1/seed6"] & taught["half0/k1/seed6"]
    s = softened(records.assign(localization="none", draw=0, seed=0))
    assert s.groupby("k").n.agg(list).to_dict() == {k: [8, 8, 6, 6] for k in (0, 1, 2)}
    assert len(plot_soft_prompts(s).axes) == 3


def test_no_soft_prompt_is_the_model_itself(tiny, task):
    lm = tiny()
    edit = noise(lm)
    with edit.applied(lm): want = answer(lm, asked(task, *halves(task, 0), 6)).full_truth
    got = soften(lm, task, edit, sides=(0,), **SMALL).query("setting == 'half0/k0/seed0'").full_truth
    assert got.to_numpy() == pytest.approx(want.to_numpy(), rel=1e-5)


def test_a_task_without_ghosts(tiny, task):
    assert set(soften(tiny(), task.model_copy(update=dict(ghosts=())), None, **SMALL).group) == {"forget", "trained", "retain"}


def test_refusals(tiny, task):
    with pytest.raises(Refusal, match="forget_size must be at least 2"): soften(tiny(), sports_athlete_editing(None, forget_size=1), None, **SMALL)
    with pytest.raises(Refusal, match="at least one embedding.*ks=.5, 0."): soften(tiny(), task, None, **SMALL | dict(ks=(5, 0)))
    with pytest.raises(Refusal, match="at least one embedding, not -1"): soft_prompt(tiny(), task, task.forget, k=-1)
    with pytest.raises(Refusal, match="at least one"): soften(tiny(), task, None, **SMALL | dict(ks=()))
    with pytest.raises(Refusal, match="prompts=0"): soften(tiny(), task, None, **SMALL | dict(prompts=0))


def test_the_unedited_organism_still_knows_and_ghosts_stay_unknown(organism):
    task = sports_athlete_editing(organism, forget_size=16)
    records = soften(organism, task, None, ks=(3,), prompts=1, steps=40)
    s = softened(records.assign(localization="none", draw=0, seed=0)).set_index(["group", "k"])
    assert s.value["forget", 3] >= .9 and s.value["retain", 3] >= .9
    assert s.ci_low["ghost", 3] < blind_guesses(task).uniform < s.ci_high["ghost", 3] + .1


def test_stage_writes_each_table_once(tiny, task, tmp_path, monkeypatch):
    lm = tiny()
    run = Run(tmp_path, lm.name, lm.revision, task.name, {})
    how = dict(soft=SMALL | dict(ks=[2]), steps=2, lr=1e-3, progress=False)
    first = run_soft_prompts(lm, lambda seed: task, run, ["late"], [0], **how)
    assert set(first.localization) == {"none", "late"} and (tmp_path / "late/seed0/soft.parquet").exists()
    monkeypatch.setattr("mechunlearn.softprompts.soften", lambda *a, **kw: pytest.fail("made again"))
    again = run_soft_prompts(lm, lambda seed: task, run, ["late"], [0], **how)
    pd.testing.assert_frame_equal(first, again)
