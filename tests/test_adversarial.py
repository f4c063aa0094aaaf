"Optimized attacks: that the push and the suffix stand where they should, that what is searched gets better, and what they can and cannot bring back."
import pandas as pd
import pytest
import torch
from mechunlearn.adversarial import (found_suffix, inside, latent_push, middle_layers, perturb, perturbed, places_of, pushed, run_adversarial, suffix_gradient,
    suffix_losses, suffixed, traced_push, usual_norm)
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.finetuning import answer_losses, fingerprint
from mechunlearn.questions import answer, completions
from mechunlearn.relearning import asked, halves
from mechunlearn.softprompts import read_once
from mechunlearn.store import Refusal, Run

SMALL = dict(layers=(1,), radii=(.5,), steps=2, tokens=(2,), exchanges=2, candidates=3, batch=4, retain_batch=4, max_facts=6)


@pytest.fixture(scope="module")
def task(): return sports_athlete_editing(None, forget_size=8)


def texts(task): return [task.forget[0].prompt, task.forget[1].paraphrases[0], task.forget[2].prompt + " of"]


def of(task): return dict(zip(texts(task), [f.subject for f in task.forget]))


@torch.no_grad()
@pytest.mark.parametrize("places", [("subject", "last"), ("last",), ("subject",)])
def test_a_push_is_that_of_nnsight_and_leaves_nothing(lm, task, places):
    push, prompts = torch.randn(len(places), lm.d_model, generator=torch.Generator().manual_seed(1)), texts(task)
    ask = lambda lm: lm.hf(**lm.encode(prompts), use_cache=False).logits[:, -1]
    before = ask(lm)
    with pushed(lm, push, 0, of(task), places) as spoken: got = ask(spoken) # behind the first of two blocks: the second still reads the subject
    assert torch.allclose(got, traced_push(lm, prompts, of(task), push, 0, places), atol=1e-4)
    assert (got - before).abs().max() > 1e-2 and torch.equal(ask(lm), before)


def test_questions_are_asked_with_it_also_where_beginnings_are_shared(tiny, task):
    lm, facts = tiny(), task.forget[:6]
    push, subjects = torch.randn(2, lm.d_model, generator=torch.Generator().manual_seed(2)), {f.prompt: f.subject for f in facts}
    with pushed(lm, push, 1, subjects) as spoken: together = answer(spoken, completions(facts, "forget"))
    with pushed(lm, push, 1, subjects) as spoken: alone = pd.concat([answer(spoken, completions([f], "forget")) for f in facts])
    assert together.prob_truth.to_numpy() == pytest.approx(alone.prob_truth.to_numpy(), rel=1e-4)
    assert together.prob_truth.to_numpy() != pytest.approx(answer(lm, completions(facts, "forget")).prob_truth.to_numpy(), rel=1e-3)


def test_where_a_subject_is_not_found_nothing_is_pushed(tiny, task):
    lm = tiny()
    assert places_of(lm, texts(task)[:1], {}, "subject") == [None] and places_of(lm, texts(task)[:1], {}, "last") == [-1]
    with pytest.raises(Refusal, match="no subject can be located"):
        usual_norm(lm, [task.forget[0].model_copy(update=dict(prompt="nobody is here"))], 1, ("subject",))


def test_the_ball():
    push, radius = torch.tensor([[3., 4.], [.3, .4]]), torch.tensor([1., 1.])
    assert torch.allclose(inside(push, radius), torch.tensor([[.6, .8], [.3, .4]]))


def test_a_push_stays_in_its_ball_and_teaches_what_it_is_taught(tiny, task):
    lm, facts = tiny(), task.forget[:4]
    before, subjects = fingerprint(lm), {f.prompt: f.subject for f in facts}
    push = latent_push(lm, task, facts, 1, 1., steps=20, retain_batch=0)
    assert (push.norm(dim=-1) <= usual_norm(lm, facts, 1) * 1.0001).all() and fingerprint(lm) == before
    with pushed(lm, push, 1, subjects) as spoken: after = answer(spoken, completions(facts, "forget")).full_truth
    assert after.mean() > answer(lm, completions(facts, "forget")).full_truth.mean()
    assert torch.equal(push, latent_push(lm, task, facts, 1, 1., steps=20, retain_batch=0))


def suffix_case(lm, task):
    facts, suffixes = task.forget[:3], torch.tensor([[7, 300, 45], [19, 7, 7]])
    answers = [[lm.first_token(f.answer)] + ([5, 9] if i == 1 else []) for i, f in enumerate(facts)]
    return facts, suffixes, answers, read_once(lm, lm.ids([f.prompt for f in facts]))


@torch.no_grad()
def test_losses_behind_a_suffix_are_those_of_the_longer_prompt(lm, task):
    facts, suffixes, answers, once = suffix_case(lm, task)
    got = suffix_losses(lm, once, [2, 0, 1], suffixes, [answers[i] for i in (2, 0, 1)], batch_size=4)
    for s, row in zip(suffixes, got):
        for i, value in zip((2, 0, 1), row):
            whole = lm.ids([facts[i].prompt])[0] + s.tolist() + answers[i][:-1]
            want = answer_losses(lm.hf(**lm.pad([whole])).logits[:, -len(answers[i]):].float(), [answers[i]])
            assert value.item() == pytest.approx(want.item(), abs=1e-3)
    assert torch.allclose(suffix_losses(lm, once, [2, 0, 1], suffixes, [answers[i] for i in (2, 0, 1)]), got, atol=1e-4) # what was read is still whole


def test_the_gradient_of_a_suffix_is_that_of_its_losses(tiny, task):
    lm = tiny()
    _, suffixes, answers, once = suffix_case(lm, task)
    g, E = suffix_gradient(lm, once, [0, 1, 2], suffixes[0], answers, 3), lm.hf.get_input_embeddings().weight
    assert g.shape == (3, len(E))
    embed, h = lm.hf.get_input_embeddings(), 1e-2
    step = h * (E[19] - E[300])
    def loss(sign):
        handle = embed.register_forward_hook(lambda m, a, out: out + sign * step * (a[0] == 300)[..., None])
        try: return suffix_losses(lm, once, [0, 1, 2], suffixes[:1], answers).mean().item()
        finally: handle.remove()
    assert (loss(1) - loss(-1)) / (2 * h) == pytest.approx((g[1, 19] - g[1, 300]).item(), rel=.05, abs=1e-4)


def test_a_suffix_gets_better_and_stands_behind_every_question(tiny, task):
    lm, facts = tiny(), task.forget[:4]
    how = dict(n=3, candidates=8, retain_batch=0)
    first, last = (found_suffix(lm, task, facts, steps=s, **how) for s in (1, 12))
    once, answers = read_once(lm, lm.ids([f.prompt for f in facts])), [[lm.first_token(f.answer)] for f in facts]
    losses = suffix_losses(lm, once, range(4), torch.stack([first, last]), answers).mean(1)
    assert losses[1] < losses[0] and not set(last.tolist()) & set(lm.tok.all_special_ids)
    with suffixed(lm, last) as spoken: assert [i[-3:] for i in spoken.ids(texts(task))] == [last.tolist()] * 3


def test_records(tiny, task):
    records = perturb(tiny(), task, None, seed=3, **SMALL)
    assert set(records.evaluation) == {"adversarial"}
    assert set(records.setting) == {f"half{h}/{p}/seed3" for h in (0, 1) for p in ("plain", "latent/layer1/radius0.5", "suffix/tokens2")}
    plain = records[records.setting == "half0/plain/seed3"]
    want = answer(tiny(), asked(task, *halves(task, 0), 6))
    assert plain.full_truth.to_numpy() == pytest.approx(want.full_truth.to_numpy(), rel=1e-5)
    s = perturbed(records.assign(localization="none", draw=0, seed=0))
    assert set(s.setting) == {"plain", "latent/layer1/radius0.5", "suffix/tokens2"} and set(s.way) == {"plain", "latent", "suffix"}
    assert set(perturb(tiny(), task, None, **SMALL | dict(layers=(), tokens=())).setting) == {"half0/plain/seed0", "half1/plain/seed0"}


def test_refusals(tiny, task):
    lm = tiny()
    for how, said in [(dict(layers=(99,)), "has the blocks 0 to"), (dict(radii=(0,)), "length above 0"), (dict(places=("middle",)), "subject, last or both"),
                      (dict(tokens=(0,)), "at least one token"), (dict(candidates=0), "candidates=0")]:
        with pytest.raises(Refusal, match=said): perturb(lm, task, None, **SMALL | how)
    assert all(0 <= l < lm.n_layers for l in middle_layers(lm))


def test_stage_writes_each_table_once(tiny, task, tmp_path, monkeypatch):
    lm = tiny()
    run = Run(tmp_path, lm.name, lm.revision, task.name, {})
    how = dict(adversarial=SMALL, steps=2, lr=1e-3, progress=False)
    first = run_adversarial(lm, lambda seed: task, run, ["late"], [0], **how)
    assert set(first.localization) == {"none", "late"} and (tmp_path / "late/seed0/adversarial.parquet").exists()
    monkeypatch.setattr("mechunlearn.adversarial.perturb", lambda *a, **kw: pytest.fail("made again"))
    pd.testing.assert_frame_equal(first, run_adversarial(lm, lambda seed: task, run, ["late"], [0], **how))
