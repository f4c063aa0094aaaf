"Tests that were missing when bugs were planted by hand: see benchmarks/planted_bugs.py"
from itertools import combinations
import numpy as np
import pytest
import torch
from mechunlearn.facts import Fact, Task, mcq_prompts, usable_shots, world_facts
from mechunlearn.sets import sports_athlete_editing, with_edit_answers
from mechunlearn.finetuning import finetune
from mechunlearn.localization import build
from mechunlearn.models import Component, slices
from mechunlearn.relearning import Lora, relearn
from mechunlearn.tracing import shares


def fact(subject, **kw):
    "A fact about somebody"
    return Fact(id=subject, relation="sport", subject=subject, answer=" golf", prompt=f"{subject} plays", question=f"What does {subject} play?", candidates=(" golf", " tennis"), **kw)


@pytest.mark.parametrize("a, b", list(combinations(("forget", "forget_test", "retain", "retain_test", "dev_forget", "dev_retain"), 2)))
def test_no_two_splits_may_share_a_subject(a, b):
    splits = {s: (fact(s),) for s in ("forget", "retain", "retain_test")} | {a: (fact("Ann"),), b: (fact("Ann"),)}
    with pytest.raises(ValueError, match="Ann is in"): Task(name="t", source="world", **splits)


def test_a_fact_is_never_its_own_example():
    task = sports_athlete_editing(forget_size=16)
    shots = [f for f in task.shots if f.relation == "sport"]
    for f in shots:
        assert len(usable_shots(f, shots, False)) == len(shots) - 1
        for item in mcq_prompts(task, f, n_shots=len(shots) - 1): assert item.prompt.count(f.subject) == 1


def test_edit_answers_are_drawn_by_seed():
    facts = [f for f in world_facts() if f.relation == "sport" and f.taught][:60]
    first, again, other = ([f.edit for f in with_edit_answers(facts, seed)] for seed in (0, 0, 1))
    assert first == again and sum(a != b for a, b in zip(first, other)) > 10


def test_a_score_is_a_ratio_of_means():
    clean, bad, good = np.array([4., 1.]), np.array([[0., 0.]]), np.array([[[1., 1.]]])
    table = shares(clean, bad, good)
    assert table.score[0] == pytest.approx(2/5) and table.score_per_fact[0] == pytest.approx((1/4 + 1)/2)


@pytest.mark.parametrize("rank", [0, 2])
def test_nothing_shrinks_weights_in_training(tiny, monkeypatch, rank):
    lm, seen = tiny(), []
    task, where = sports_athlete_editing(lm, forget_size=4), build(lm, "x", [Component("mlp", 0)])
    class Spied(torch.optim.AdamW):
        def __init__(self, *args, **kw): super().__init__(*args, **kw); seen.extend(g["weight_decay"] for g in self.param_groups)
    monkeypatch.setattr(torch.optim, "AdamW", Spied)
    finetune(lm, task, where, lr=1e-3, steps=1, progress=False)
    relearn(lm, task, lora=Lora(rank, 2., 1e-3, 0.), steps=1, sides=(0,), max_facts=2)
    assert len(seen) >= 2 and set(seen) == {0.}


def test_a_head_writes_through_its_own_columns(lm):
    for h in range(lm.n_heads):
        s = next(s for s in slices(lm, f"head.1.{h}") if "o_proj" in s.param)
        w, z = lm.weight(s.param).clone(), torch.zeros(lm.n_heads * lm.head_dim)
        z[lm.z(1, h)] = 1.
        assert (w @ z).abs().max() > 0
        w.narrow(s.dim, s.start, s.stop - s.start).zero_()
        assert (w @ z).abs().max() == 0
