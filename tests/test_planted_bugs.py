"Tests that were missing when bugs were planted by hand: see benchmarks/planted_bugs.py"
from itertools import combinations
import pytest
from mechunlearn.facts import Fact, Task, mcq_prompts, sports_athlete_editing, with_edit_answers, world_facts


def fact(subject, **kw):
    "A fact about somebody"
    return Fact(id=subject, relation="sport", subject=subject, answer=" golf", prompt=f"{subject} plays", question=f"What does {subject} play?", candidates=(" golf", " tennis"), **kw)


@pytest.mark.parametrize("a, b", list(combinations(("forget", "forget_test", "retain", "retain_test", "dev_forget", "dev_retain"), 2)))
def test_no_two_splits_may_share_a_subject(a, b):
    splits = {s: (fact(s),) for s in ("forget", "retain", "retain_test")} | {a: (fact("Ann"),), b: (fact("Ann"),)}
    with pytest.raises(ValueError, match="Ann is in"): Task(name="t", source="world", **splits)


def test_a_fact_is_never_its_own_example():
    task = sports_athlete_editing(forget_size=16)
    for f in task.shots[:6]:
        for item in mcq_prompts(task, f): assert item.prompt.count(f.subject) == 1


def test_edit_answers_are_drawn_by_seed():
    facts = [f for f in world_facts() if f.relation == "sport" and f.taught][:60]
    first, again, other = ([f.edit for f in with_edit_answers(facts, seed)] for seed in (0, 0, 1))
    assert first == again and sum(a != b for a, b in zip(first, other)) > 10
