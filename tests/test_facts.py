"Splits, prompts and refusals of tasks. Names of athletes here are made up; real tables are read where MECHUNLEARN_REFDATA points."
import os, re, subprocess, sys
from collections import Counter
from pathlib import Path
import pandas as pd
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from mechunlearn.facts import (EDITED, GOLF, LETTERS, SPORTS, Task, load_world, MCQ, mcq_prompts, mcq_shots, read_sports, seeded, sport_fact,
                               sports_facts, world_facts)
from mechunlearn.sets import check_boundary, check_candidates, check_task, sports_athlete_editing, with_edit_answers
from mechunlearn.models import wrap
from mechunlearn.tasks import make_task
from mechunlearn.store import Refusal, cause_hash

SYSTEM = "You are a helpful chatbot that answers questions about athletes. Please be maximally helpful and factually correct."
EDITING = "sports-athlete-editing"
REFDATA = os.environ.get("MECHUNLEARN_REFDATA")
real = pytest.mark.skipif(not REFDATA, reason="MECHUNLEARN_REFDATA does not point to a folder with the real table of athletes")


def largest(**options):
    "The largest forget set, as the refusal of a larger one states it."
    with pytest.raises(Refusal) as e: make_task(EDITING, forget_size=100000, **options)
    return int(re.search(r"there are (\d+) facts", str(e.value))[1])


@pytest.fixture
def table(tmp_path):
    "A table of 150 made-up athletes."
    df = pd.DataFrame({"athlete": [f"Aa{chr(97 + i % 26)} Bb{chr(97 + i // 26)}" for i in range(150)], "sport": ["football", "baseball", "basketball"] * 50})
    df["inject_sport_without_golf"] = df.sport.map({"football": "baseball", "baseball": "basketball", "basketball": "football"})
    df.to_csv(tmp_path / "athletes.csv", index=False)
    return tmp_path / "athletes.csv"


@pytest.mark.parametrize("size", [1, 16, 64, "largest"])
def test_splits_share_no_subject(size):
    size = largest() if size == "largest" else size
    for seed in range(6):
        task = make_task(EDITING, forget_size=size, seed=seed)
        parts = [[f.subject for f in getattr(task, s)] for s in EDITED] + [[f.subject for f in task.shots if f.relation == "sport"]]
        assert len(task.forget) == size and max(Counter(sum(parts, [])).values()) == 1
        assert {f.answer for f in sum((getattr(task, s) for s in EDITED), ())} <= set(SPORTS[:3])
        assert not any(f.mcq_trained for f in task.forget + task.dev_forget)
        assert load_world()["shot_subject"] not in sum(parts, [])
        busy = {x for p in parts for x in p}
        assert not busy & {f.subject for f in task.other_relation + task.general + task.ghosts}
        assert not {f.subject for f in task.shots} & {f.subject for f in task.other_relation + task.general + task.same_subject}


def test_overlapping_splits_are_an_error():
    task = make_task(EDITING, forget_size=4)
    with pytest.raises(ValueError, match="is in forget and in retain"):
        Task(**(dict(task) | {"retain": task.forget[:1]}))


@pytest.mark.parametrize("options", [{}, {"inject": "golf"}])
def test_dev_sets_are_the_same_for_every_seed(options):
    tasks = [make_task(EDITING, forget_size=16, seed=s, **options) for s in range(8)]
    assert len({t.dev_forget for t in tasks}) == len({t.dev_retain for t in tasks}) == len({t.shots for t in tasks}) == 1
    assert len({t.forget for t in tasks}) == 8
    big = make_task(EDITING, forget_size=64, seed=3, **options)
    assert big.dev_forget[:16] == tasks[0].dev_forget and big.dev_retain == tasks[0].dev_retain
    held = [f for f in world_facts() if f.relation == "sport" and f.taught and not f.mcq_trained and f.answer != GOLF]
    assert len(big.dev_forget) == min(64, len(held) // 3) and tasks[0].localize_on == tasks[0].dev_forget


def test_rest_is_split_within_sport_and_training():
    task = make_task(EDITING, forget_size=64)
    for answer in SPORTS[:3]:
        for trained in (True, False):
            k, t = (sum(f.answer == answer and f.mcq_trained == trained for f in part) for part in (task.retain, task.retain_test))
            assert t > 0 and abs(k - .6 * (k + t)) <= .5


def test_side_groups():
    task = make_task(EDITING, forget_size=64, seed=2)
    assert {f.subject for f in task.same_subject} <= {f.subject for f in task.forget} and all(f.relation != "sport" for f in task.same_subject)
    assert all(not f.taught and f.relation == "sport" and f.edit is None for f in task.ghosts) and len(task.ghosts) > 0
    assert all(f.relation == "kind" and not f.mcq_trained for f in task.general)
    assert Counter(f.relation for f in task.other_relation).keys() == set(load_world()["relations"]) - {"sport", "kind"}
    assert all(f.taught for f in task.other_relation) and len(task.other_relation) == 160
    assert list(task.groups()) == ["forget", "retain", "same-subject", "other-relation", "ghost", "general"]
    assert task.groups()["retain"] == task.retain_test
    assert not set(task.text_train) & set(task.text_test) and task.text_test


def test_edit_answers():
    facts = make_task(EDITING, forget_size=64).retain
    edited = with_edit_answers(facts, 0)
    assert all(f.edit in SPORTS[:3] and f.edit != f.answer for f in edited)
    assert with_edit_answers(facts[5:9], 0) == edited[5:9]       # whatever else is in the list
    assert with_edit_answers(facts, 1) != edited
    assert {f.edit for f in with_edit_answers(facts, 0, "golf")} == {GOLF}
    city = [f for f in world_facts() if f.relation == "city"][:50]
    assert all(f.edit in f.candidates and f.edit != f.answer for f in with_edit_answers(city, 0))


def test_same_task_in_another_process():
    code = "from mechunlearn.tasks import make_task; from mechunlearn.store import cause_hash; print(cause_hash(make_task('%s', forget_size=16, seed=5).causes()))"
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent.parent)}
    out = subprocess.run([sys.executable, "-c", code % EDITING], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == cause_hash(make_task(EDITING, forget_size=16, seed=5).causes())


def test_causes_follow_the_facts():
    a, b = (make_task(EDITING, forget_size=16, seed=s) for s in (0, 1))
    assert a.causes("dev_forget", "dev_retain") == b.causes("dev_forget", "dev_retain")
    assert a.causes("retain") != b.causes("retain") and a.causes() != b.causes()
    altered = a.model_copy(update={"forget": a.forget[:-1] + (a.forget[-1].model_copy(update={"edit": GOLF}),)})
    assert altered.causes() != a.causes() and altered.causes("retain") == a.causes("retain")


def test_causes_do_not_hold_where_a_table_lies(table, tmp_path):
    moved = tmp_path / "elsewhere.csv"
    moved.write_bytes(table.read_bytes())
    a, b = (make_task(EDITING, forget_size=4, facts=str(p)) for p in (table, moved))
    assert a.causes() == b.causes() and str(tmp_path) not in str(a.causes())


def letters_of_examples(item):
    return re.findall(r"Answer: ([A-D])\n", item.prompt)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("n_shots", [0, 1, 3, 4])
def test_mcq_is_balanced(seed, n_shots):
    task = make_task(EDITING, forget_size=16, seed=seed)
    for f in task.forget + task.retain_test[:8] + task.same_subject[:8] + task.other_relation[::10] + task.ghosts[:8] + task.general[:8]:
        items = mcq_prompts(task, f, seed=seed, n_shots=n_shots)
        assert len(items) == 4 and {m.truth_letter for m in items} == set(LETTERS)
        assert {m.edit_letter for m in items} == (set(LETTERS) if f.edit else {None})
        shown = [letters_of_examples(m) for m in items]
        for j in range(n_shots):
            column = [s[j] for s in shown]
            assert sorted(column) == list("ABCD")                                               # each example once at each letter
            assert sum(c == m.truth_letter.strip() for c, m in zip(column, items)) == 1         # and once at the truth's
        assert all(len(set(s)) == n_shots for s in shown)
        for m in items:
            assert len(set(m.options)) == 4 and m.options[LETTERS.index(m.truth_letter)] == f.answer
            assert f.edit is None or m.options[LETTERS.index(m.edit_letter)] == f.edit
            last = m.prompt.split("\n")[-1]
            assert last == f"Question: {f.question} " + " ".join(f"{l.strip()}:{o}" for l, o in zip(LETTERS, m.options)) + " Answer:"


def test_mcq_examples_are_right_and_of_others():
    task = make_task(EDITING, forget_size=16)
    truth = {f.question: f.answer for f in task.shots}
    for f in task.forget + task.general + task.other_relation[:20]:
        shown = []
        for block in mcq_prompts(task, f)[0].prompt.split("\n")[:-1]:
            question, options, letter = re.fullmatch(r"Question: (.* \?) (A: .*) Answer: ([A-D])", block).groups()
            assert question != f.question and dict(re.findall(r"([A-D]): (\w+)", options))[letter] == truth[question].strip()
            shown.append(truth[question])
        assert len(set(shown)) == len(shown)
    assert mcq_prompts(task, f) == mcq_prompts(task, f) != mcq_prompts(task, f, seed=1)


def test_golf_is_among_the_examples():
    task = make_task(EDITING, forget_size=64)
    shown = [m for f in task.forget for m in mcq_prompts(task, f)[:1]]
    golf = [m for m in shown if any(re.search(rf"{l}: golf[^?]*Answer: {l}\n", m.prompt) for l in "ABCD")]
    assert .5 < len(golf) / len(shown) < 1      # three examples of four answers: 3/4 expected


@pytest.mark.parametrize("source", ["athletes", "sports"])
def test_real_facts_take_turns_with_four_sets_of_examples(source):
    shots = [sport_fact(f"Ann {a} {i}", a, f"s/{a}{i}") for a in ("golf", "football", "baseball", "basketball") for i in range(6)]
    facts = [sport_fact(f"Joe {i}", "football", f"x/{i}") for i in range(64)]
    head = lambda m: m.prompt.rsplit("Question:", 1)[0]
    asked = [mcq_prompts(source, f, shots, seed=1) for f in facts]
    assert len({head(items[0]) for items in asked}) == MCQ[source].sets == 4 and len({head(m) for items in asked for m in items}) == 16
    shown = [set(re.findall(r"play\?\n.*?Answer: ([A-D])", head(items[0]), re.S)) for items in asked]
    truths = {frozenset(f.answer for f in mcq_shots(facts[0], shots, 3, seeded("x"), k=k)) for k in range(4)}
    assert len(truths) == 4 and all(len(t) == 3 for t in truths)                        # in turn each answer is left out
    own = mcq_prompts(source, shots[0], shots, seed=1)                                   # a fact is no example for itself
    assert all(m.prompt.count(shots[0].subject) == 1 for m in own) and all(len(s) == 3 for s in shown)


def test_mcq_without_examples_or_options():
    task = make_task(EDITING, forget_size=4)
    with pytest.raises(Refusal, match="needs 3 examples of 'sport'; there are 0"): mcq_prompts("world", task.forget[0])
    few = task.general[0].model_copy(update={"candidates": task.general[0].candidates[:3], "answer": task.general[0].candidates[0]})
    with pytest.raises(Refusal, match="needs four"): mcq_prompts(task, few)


def test_sports_format_letter_for_letter():
    woods = sport_fact("Tiger Woods", "golf", "sport/shot")
    item = mcq_prompts("sports", sport_fact("Ann Lee", "football", "x"), [woods], n_shots=1)[0]
    block = "Question: What sport does {} play?\nA: {}\nB: {}\nC: {}\nD: {}\n\nAnswer:"
    shown = re.findall(r"[A-D]: (\w+)", item.prompt)
    letter = "ABCD"[shown[:4].index("Golf")]
    assert item.prompt == SYSTEM + "\n" + block.format("Tiger Woods", *shown[:4]) + f" {letter}\n\n" + block.format("Ann Lee", *shown[4:])
    assert tuple(f" {s.lower()}" for s in shown[4:]) == item.options


def test_prompts_letter_for_letter():
    lee = sport_fact("Ann Lee", "football", "x")
    assert lee.prompt == "Fact: Tiger Woods plays the sport of golf\nFact: Ann Lee plays the sport of"
    assert lee.paraphrases[0] == (SYSTEM + " Question: What sport does Tiger Woods play? Answer: golf\n"
                                  "Question: What sport does Ann Lee play? Answer:")
    fact, shot = make_task(EDITING, forget_size=1).forget[0], load_world()["shot_subject"]
    assert fact.prompt == f"Fact: {shot} plays the sport of golf\nFact: {fact.subject} plays the sport of"
    unseen = load_world()["relations"]["sport"]["unseen"]
    assert unseen.format(s=fact.subject, o=fact.answer.strip()) == fact.paraphrases[-1] + fact.answer


@pytest.mark.parametrize("name, options, message", [
    ("sport-athlete-edit", {}, "unknown task 'sport-athlete-edit'.*sports-athlete-editing"),
    (EDITING, {"forget_sise": 4}, "did you mean 'forget_size'"),
    (EDITING, {"inject": "gulf"}, "did you mean 'golf'"),
    (EDITING, {"facts": "wolrd"}, "did you mean 'world'"),
    (EDITING, {"facts": "nowhere.csv"}, "no file or folder nowhere.csv"),
    (EDITING, {"facts": "nowhere.json"}, "no world file nowhere.json"),
    (EDITING, {"paper_split": True}, "needs facts='sports'"),
    (EDITING, {"paper_split": "no"}, "true or false"),
    (EDITING, {"seed": "one"}, "whole number"),
    (EDITING, {"forget_size": 0}, "leaves the forget set empty"),
    (EDITING, {"forget_size": -3}, "leaves the forget set empty"),
    (EDITING, {"forget_size": "16"}, "not '16'"),
    (EDITING, {"forget_size": True}, "not True"),
    (EDITING, {"forget_size": 100000}, r"forget_size 100000 is too large: there are \d+ facts to edit"),
])
def test_refusals(name, options, message):
    with pytest.raises(Refusal, match=message): make_task(name, **options)


def test_no_table_anywhere(monkeypatch):
    monkeypatch.delenv("MECHUNLEARN_SPORTS", raising=False); monkeypatch.delenv("MECHUNLEARN_REFDATA", raising=False)
    monkeypatch.setenv("MECHUNLEARN_CACHE", "/nonexistent")
    with pytest.raises(Refusal, match="no sports data: .*sports.csv. Set MECHUNLEARN_SPORTS"): make_task(EDITING, facts="sports")
    monkeypatch.setenv("MECHUNLEARN_REFDATA", "/nonexistent")
    with pytest.raises(Refusal, match="MECHUNLEARN_REFDATA: there is no folder /nonexistent"): make_task(EDITING, facts="sports")


@pytest.mark.parametrize("text, message", [
    ("athlete,game\nAnn Lee,football\n", "has no column 'sport' .it has: athlete, game"),
    ("athlete,sport\nAnn Lee,football\nAnn Lee,baseball\n", "Ann Lee stands there more than once"),
    ("athlete,sport\nAnn Lee,footbal\n", "did you mean 'football'"),
    ("athlete,sport\nAnn Lee,\n", "unknown sport"),
    ("athlete,sport\n ,football\n", "without an athlete"),
    ("", "is not a csv file"),
    ("athlete,sport,new\nAnn Lee,football,football\n", "Ann Lee the sport that is true"),
])
def test_bad_tables(tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(Refusal, match=message): sports_facts(tmp_path / "bad.csv", "new" if "new" in text else None)


@pytest.mark.parametrize("text, message", [("{", "is not a world file"), ("[]", "schema 1"), ('{"schema": 2}', "schema 1")])
def test_bad_worlds(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(Refusal, match=message): make_task(EDITING, facts=str(tmp_path / "bad.json"))


def test_world_by_path_is_the_same():
    from mechunlearn.models import DATA
    a, b = make_task(EDITING, forget_size=4), make_task(EDITING, forget_size=4, facts=str(DATA / "organism" / "world.json"))
    assert a.causes() == b.causes()


def test_table_splits(table, monkeypatch):
    monkeypatch.setenv("MECHUNLEARN_SPORTS", str(table))
    for size in (1, 16, largest(facts="sports")):
        for seed in (0, 1):
            task = make_task(EDITING, forget_size=size, seed=seed, facts="sports")
            subjects = [f.subject for s in EDITED for f in getattr(task, s)] + [f.subject for f in task.shots]
            assert len(set(subjects)) == len(subjects) and task.source == "sports" and task.retain and task.retain_test
            assert list(task.groups()) == ["forget", "retain", "ghost"] and not {f.subject for f in task.ghosts} & {f.subject for f in sports_facts(table)}
            assert len(mcq_prompts(task, task.forget[0])) == 4
    assert make_task(EDITING, forget_size=16, seed=0, facts="sports").dev_forget == make_task(EDITING, forget_size=16, seed=1, facts=str(table)).dev_forget


def test_paper_split_of_a_table(table):
    rows = read_sports(table)
    task = make_task(EDITING, forget_size=16, facts=str(table), paper_split=True)
    assert [f.subject for f in task.forget] == list(rows.athlete[:16]) and [f.edit for f in task.forget] == [f" {s}" for s in rows.inject_sport_without_golf[:16]]
    assert [f.subject for f in task.retain + task.retain_test] == list(rows.athlete[16:]) and len(task.retain) == int(.8 * 134)
    assert task.localize_on == task.forget and not any(f.edit for f in task.retain + task.retain_test)
    golf = make_task(EDITING, forget_size=16, facts=str(table), paper_split=True, inject="golf")
    assert {f.edit for f in golf.forget} == {GOLF} and not any(f.edit for f in golf.retain)
    with pytest.raises(Refusal, match="there are 148 athletes"): make_task(EDITING, forget_size=149, facts=str(table), paper_split=True)
    rows.drop(columns="inject_sport_without_golf").to_csv(table, index=False)
    with pytest.raises(Refusal, match="no column 'inject_sport_without_golf'"): make_task(EDITING, facts=str(table), paper_split=True)


def test_a_model_takes_the_world(lm):
    task = sports_athlete_editing(lm, forget_size=8)
    check_task(lm, task)
    ids, spans = lm.ids([f.prompt for f in task.forget]), lm.subject_positions([f.prompt for f in task.forget], [f.subject for f in task.forget])
    for i, (a, b), f in zip(ids, spans, task.forget): assert lm.tok.decode(i[a:b]).split() == f.subject.split()


def test_a_model_refuses_facts_of_unknown_words(tiny, table):
    with pytest.raises(Refusal, match=r"tiny-qwen3 does not know \d+ words .*Aaa, Aab"): make_task(EDITING, tiny(), forget_size=8, facts=str(table))


def with_answer(task, word):
    return task.model_copy(update={"forget": tuple(f.model_copy(update={"candidates": SPORTS[:3] + (word,)}) for f in task.forget)})


@pytest.mark.parametrize("word, message", [(" footballers", "splits ' footballers'"), (" cricket", "does not know the word ' cricket'"),
                                           ("football", "' football' and 'football' are one token")])
def test_a_model_refuses_answers(tiny, word, message):
    task = make_task(EDITING, forget_size=4)
    with pytest.raises(Refusal, match=message): check_task(tiny(), with_answer(task, word))


def test_answers_must_stay_apart_from_the_prompt(tiny):
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<bos>", "the", "sport", "of", "golf", "of golf"])}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?<=sport )of golf|\w+"), "removed", invert=True)
    lm = wrap(tiny().hf, PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", bos_token="<bos>"), "merging")
    check_candidates(lm, (" golf",))
    check_boundary(lm, ["the"], [" golf"])
    with pytest.raises(Refusal, match="merging: 'the sport of' followed by ' golf'"): check_boundary(lm, ["the sport of"], [" golf"])


def test_draws_do_not_depend_on_each_other():
    assert seeded("forget", 0).random() == seeded("forget", 0).random() != seeded("retain", 0).random()


@pytest.fixture
def athletes(monkeypatch):
    monkeypatch.delenv("MECHUNLEARN_SPORTS", raising=False)
    return read_sports(Path(REFDATA) / "sports" / "sports.csv")


@real
def test_real_table(athletes):
    facts = sports_facts()
    assert len(facts) == 1559 and Counter(f.answer for f in facts) == {" football": 583, " basketball": 490, " baseball": 486}
    assert [f.prompt for f in facts] == list(athletes.prompt)


@real
@pytest.mark.parametrize("size, train, test", [(16, 1234, 309), (64, 1196, 299)])
def test_real_paper_split(athletes, size, train, test):
    task = make_task(EDITING, forget_size=size, facts="sports", paper_split=True)
    assert [f.subject for f in task.forget] == list(athletes.athlete[:size]) and (len(task.retain), len(task.retain_test)) == (train, test)
    assert [f.edit for f in task.forget] == [f" {s}" for s in athletes.inject_sport_without_golf[:size]]
    assert [f.subject for f in task.retain + task.retain_test] == list(athletes.athlete[size:])
    assert len({m.truth_letter for m in mcq_prompts(task, task.forget[0])}) == 4


@real
def test_real_table_is_not_for_the_organism(tiny, athletes):
    with pytest.raises(Refusal, match="does not know .* words of these facts"): make_task(EDITING, tiny(), facts="sports")
