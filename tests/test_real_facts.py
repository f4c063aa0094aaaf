"Real tables and odd ones: what is drawn from them, what real tokenizers take, and what is said of a file that cannot be read."
import os
from collections import Counter
import pandas as pd, pytest
from mechunlearn.facts import GOLF, sports_facts, world_facts
from mechunlearn.store import Refusal
from mechunlearn.tasks import make_task

EDITING, FULL, UNLEARN = "sports-athlete-editing", "full-sports-editing", "sports-unlearning"
CF, SEQ, SCALE = "counterfact-editing", "sequential-counterfact-editing", "counterfact-at-scale"
REFDATA = os.environ.get("MECHUNLEARN_REFDATA")
real = pytest.mark.skipif(not REFDATA, reason="MECHUNLEARN_REFDATA does not point to a folder with the real tables")


# ---- dev facts look like the table

def table(path, **counts):
    rows = [(f"Aa{chr(97 + i % 26)} Bb{chr(97 + i // 26)}{sport}", sport) for sport, n in counts.items() for i in range(n)]
    pd.DataFrame(rows, columns=["athlete", "sport"]).to_csv(path, index=False)
    return str(path)


def off(part, whole):
    "By how many facts an answer's count differs most from its share of the whole"
    a, b = (Counter(f.answer for f in x) for x in (part, whole))
    return max(abs(a[k] - len(part) * b[k] / b.total()) for k in b)


def fair(facts, size):
    whole = [f for f in sports_facts(facts) if f.answer != GOLF]
    tasks = [make_task(EDITING, forget_size=size, seed=s, facts=facts) for s in (0, 1)]
    dev = tasks[0].dev_forget
    assert dev == tasks[1].dev_forget and tasks[0].dev_retain == tasks[1].dev_retain and tasks[0].forget != tasks[1].forget
    assert len(dev) > 0 and off(dev, whole) <= 1 and off(dev[:16], whole) <= 1
    return tasks[0]


@real
@pytest.mark.parametrize("size, shares", [(16, {6, 5}), (64, {24, 20})])
def test_dev_facts_of_the_published_table(size, shares):
    task = fair("sports", size)
    assert set(Counter(f.answer for f in task.dev_forget).values()) == shares and len(task.dev_forget) == size
    assert Counter(f.answer for f in task.dev_retain) == {" football": 20, " basketball": 20, " baseball": 20}
    assert make_task(EDITING, forget_size=64, facts="sports").dev_forget[:16] == make_task(EDITING, forget_size=16, facts="sports").dev_forget


@pytest.mark.parametrize("counts", [dict(football=50, baseball=50, basketball=50), dict(football=200, baseball=70, basketball=30, golf=12),
    dict(football=40, baseball=20, basketball=20), dict(basketball=400, football=90, baseball=110), dict(football=60, baseball=60)])
def test_dev_facts_of_other_tables(tmp_path, counts):
    for size in (4, 16, 20):
        task = fair(table(tmp_path / "t.csv", **counts), size)
        left = Counter(f.answer for f in task.retain + task.retain_test + task.forget)
        assert all(left[f" {s}"] for s in counts if s != "golf") and not left[GOLF]


def test_dev_facts_of_the_world_are_the_recorded_ones():
    tasks = [make_task(EDITING, forget_size=n) for n in (16, 64)]
    assert [f.id for f in tasks[0].dev_forget[:4]] == ['sport/0108', 'sport/0539', 'sport/0216', 'sport/0239'] and tasks[1].dev_forget[:16] == tasks[0].dev_forget
    assert all(f.mcq_trained for f in tasks[0].dev_retain) and not any(f.mcq_trained for f in tasks[0].dev_forget)
    held = [f for f in world_facts() if f.relation == "sport" and f.taught and not f.mcq_trained and f.answer != GOLF]
    assert off(tasks[1].dev_forget, held) < 8 and off(tasks[0].dev_forget, held) < 5 # a plain random draw


@pytest.mark.parametrize("name", [FULL, UNLEARN])
def test_dev_facts_of_a_whole_sport(tmp_path, name):
    task = make_task(name, sport="football", facts=table(tmp_path / "t.csv", football=60, baseball=40, basketball=24))
    assert {f.answer for f in task.dev_forget} == {" football"}
    for part in (task.dev_retain, task.retain, task.retain_test): assert {f.answer for f in part} == {" baseball", " basketball"}
