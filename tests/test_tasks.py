"Every task: splits, refusals, own facts, CounterFact, and how each is trained and asked. All facts here are made up; real ones are read where MECHUNLEARN_REFDATA points."
import json, os, re
from collections import Counter
from contextlib import ExitStack
from functools import lru_cache
from itertools import combinations
import numpy as np, pandas as pd, pytest, torch
from plain import every_family
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from mechunlearn import sources, tasks
from mechunlearn.evaluation import FORMATS, HELD_OUT, MAX_FACTS, OPEN, asked_of, evaluate, questionnaire
from mechunlearn.questions import answer, completions
from mechunlearn import sets as sets_module
from mechunlearn.facts import EDITED, GOLF, Fact, askable, load_world, mcq_options, mcq_prompts, seeded, sports_facts, world_facts
from mechunlearn.sets import KNOWN, UNKNOWN, probabilities
from mechunlearn.finetuning import UPDATES, draws, finetune, fingerprint, heard, load_edit, masters, not_said, own_slices, step_losses, training_rows
from mechunlearn.localization import Evidence, Part, atoms, build, joined, localize
from mechunlearn.models import Component, Slice, components, load, wrap
from mechunlearn.store import Refusal
from mechunlearn.tasks import (BEGINS, OPEN_RELATIONS, SAME, SPORT_NAMES, TASKS, TWICE, counterfact_facts, counterfact_sets, fit_for, make_task)

CF, SEQ, SCALE, FULL, UNLEARN, EDITING = ("counterfact-editing", "sequential-counterfact-editing", "counterfact-at-scale", "full-sports-editing",
    "sports-unlearning", "sports-athlete-editing")
CASES = [(EDITING, dict(forget_size=n)) for n in (1, 64)] + [(n, dict(sport=s)) for n in (FULL, UNLEARN) for s in SPORT_NAMES]
CASES += [(CF, dict(forget_size=1)), (CF, {}), (SEQ, {}), (SCALE, dict(forget_size=300)), (SCALE, dict(forget_size=1000))]
REFDATA = os.environ.get("MECHUNLEARN_REFDATA")
real = pytest.mark.skipif(not REFDATA, reason="MECHUNLEARN_REFDATA does not point to a folder with the real data")
SMALL = dict(lr=1e-2, steps=6, batch=4, retain_batch=4, text_batch=2, progress=False)
cached = lru_cache(make_task)


def on(cases): return pytest.mark.parametrize("name, options", cases, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in cases])
def made(name, seed=0, **options): return cached(name, seed=seed, **options)
def subjects(facts): return {f.subject for f in facts}
def apart(task): return not any(subjects(getattr(task, a)) & subjects(getattr(task, b)) for a, b in combinations([*EDITED, "shots"], 2))


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch, tmp_path):
    for v in [v for v in os.environ if v.startswith("MECHUNLEARN_")]: monkeypatch.delenv(v)
    monkeypatch.setenv("MECHUNLEARN_CACHE", str(tmp_path / "cache"))


def refusal(fn, *args, **kw):
    with pytest.raises(Refusal) as e: fn(*args, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- the world

@on(CASES)
def test_splits_and_edit_answers(name, options):
    drawn, legal = [made(name, seed=s, **options) for s in range(3)], {f.relation: f.candidates for f in world_facts()}
    assert len({t.forget for t in drawn}) == 3 and len({(t.dev_forget, t.dev_retain, t.shots) for t in drawn}) == 1
    for t in drawn:
        edited, kept = t.forget + t.forget_test + t.dev_forget, t.retain + t.retain_test + t.dev_retain + t.shots + t.same_subject + t.other_relation
        assert apart(t) and t.retain and t.retain_test and len({f.id for f in t.forget}) == len(t.forget) == t.options.get("forget_size", len(t.forget))
        assert not any(f.edit for f in kept) and subjects(t.same_subject) <= subjects(edited) and not {f.id for f in t.same_subject} & {f.id for f in edited}
        if name == UNLEARN: assert not any(f.edit for f in edited) and t.update == "unlearn"
        elif name == FULL: assert {f.edit for f in edited} == {GOLF} and {f.answer for f in edited} == {f" {options['sport']}"}
        else: assert all(f.edit in legal[f.relation] and f.edit not in (f.answer, GOLF) for f in edited)


@pytest.mark.parametrize("sport", SPORT_NAMES)
def test_a_whole_sport_is_edited(sport):
    theirs = {f.id for f in world_facts() if f.taught and f.answer == f" {sport}" and f.subject != load_world()["shot_subject"]}
    for t in (made(n, sport=sport, seed=s) for n in (FULL, UNLEARN) for s in range(2)):
        shots = theirs & {f.id for f in t.shots}
        assert {f.id for f in t.forget + t.forget_test} == theirs - shots - {f.id for f in t.dev_forget} and len(shots) == 6
        assert abs(len(t.forget) - len(t.forget_test)) <= 1 and {f.answer for f in t.retain + t.retain_test} == {f" {s}" for s in SPORT_NAMES if s != sport}


@pytest.mark.parametrize("size, parts", [(64, 4), (16, 2), (6, 6), pytest.param(5, 4)])
def test_a_sequence_is_its_parts(size, parts):
    task = made(SEQ, forget_size=size, parts=parts)
    subs = task.in_parts()
    assert sum((s.forget for s in subs), ()) == task.forget and len(subs) == parts and np.ptp([len(s.forget) for s in subs]) == (size % parts > 0)
    assert all((s.update, s.parts, s.localize_on) == ("edit", 1, s.forget) for s in subs) and task.update == "sequential"


@pytest.mark.parametrize("size", [30, 100, 300, 1000])
def test_open_facts_at_scale(size):
    t, fact = made(SCALE, forget_size=size), {f.prompt: f for f in world_facts()}
    assert len(t.forget) == size and t.update == "each" and t.localize_on == t.forget and (size == 1000 or len(subjects(t.forget)) == size)
    if size < 300: assert np.ptp([*Counter(f.relation for f in t.forget).values()]) <= 1 and {f.relation for f in t.forget} == set(OPEN_RELATIONS)
    for f in t.forget + t.retain_test:
        near = [fact[p] for p in f.neighbors]
        assert all((g.relation, g.answer) == (f.relation, f.answer) and g.subject != f.subject for g in near) and len(set(near)) == len(near) <= 10
        assert not subjects(near) & subjects(t.forget + t.retain)
        assert f.candidates == () and len(set(f.wrong)) == 3 and f.answer not in f.wrong and set(f.wrong) <= set(fact[f.prompt].candidates)
    assert all(askable(t, f) and len(set(m.options)) == 4 and {f.answer, f.edit} <= set(m.options) for f in t.forget for m in mcq_prompts(t, f))
    assert sum(len(f.neighbors) for f in t.retain_test) > len(t.retain_test)


# ---- refusals

@pytest.mark.parametrize("name, options, says", [
    ("counterfact-edit", {}, "unknown task 'counterfact-edit', did you mean 'counterfact-editing'"), (CF, dict(parts=2), "unknown option of counterfact-editing 'parts'"),
    (FULL, dict(forget_size=3), "unknown option of full-sports-editing 'forget_size'"), (FULL, dict(sport="curling"), "unknown sport 'curling'"),
    (UNLEARN, dict(sport="golf"), "unknown sport 'golf'. Valid: basketball"), (CF, dict(forget_size=0), "forget_size 0 leaves the forget set empty"),
    (SCALE, dict(forget_size=5000), "forget_size 5000 is too large: there are "), (SCALE, dict(forget_size="30"), "forget_size is a whole number of facts, not '30'"),
    (CF, dict(forget_size=True), "not True"), (FULL, dict(seed="0"), "seed is a whole number, not '0'"), (SEQ, dict(parts=1), "parts is a whole number of at least 2, not 1"),
    (SEQ, dict(forget_size=3, parts=4), "3 facts cannot be edited in 4 parts"), (SEQ, dict(parts="4"), "not '4'"), (CF, dict(paper_split=True), "needs facts='counterfact'"),
    (FULL, dict(paper_split=True), "needs facts='sports'"), (UNLEARN, dict(paper_split=1), "paper_split is true or false, not 1"),
    (CF, dict(facts="wolrd"), "unknown facts 'wolrd', did you mean 'world'"), (FULL, dict(facts="wolrd"), "wolrd"), (CF, dict(facts="sports"), "unknown facts 'sports'"),
    (CF, dict(facts="counterfact"), "MECHUNLEARN_COUNTERFACT"), (UNLEARN, dict(facts="sports"), "MECHUNLEARN_SPORTS"), (CF, dict(facts="nowhere.json"), "nowhere.json"),
    pytest.param(CF, dict(facts="nowhere.csv"), "nowhere.csv")])
def test_refusals(name, options, says): assert says in refusal(make_task, name, **options)


@pytest.mark.parametrize("name, text, options, says", [
    (CF, "subject,prompt,answer,edit\nAnn,Ann is in,Ba,Ca\nBob,nobody is in,Fa,Ga\n", {}, "own.csv row 3, column 'prompt': the subject 'Bob'"),
    (CF, "subject,prompt,answer,edit\nAnn,Ann is in,Ba,Ca\nBob,Bob is in,Fa,Fa\n", {}, "own.csv row 3, column 'edit': 'Fa' is the true answer"),
    (CF, "subject,prompt,answer,edit\nAnn,Ann is in,,Ca\n", {}, "own.csv row 2, column 'answer'"),
    (CF, "subject,prompt,answer,edit\nAnn,Ann is in,Ba,\n", {}, "own.csv: no row has an edit"),
    pytest.param(CF, "subject,prompt,answer,edit\nAnn,Ann is in,Ba,Ca\n" + "".join(f"A{i},A{i} is in,Ba,\n" for i in range(20)), dict(paper_split=True), "paper_split"),
    *[pytest.param(FULL, "athlete,sport\n" + "".join(f"Ann A{i},{('football', 'baseball')[i % 2]}\n" for i in range(100)), dict(paper_split=p), "basketball") for p in (False, True)]])
def test_files_that_are_refused(tmp_path, name, text, options, says):
    (tmp_path / "own.csv").write_text(text)
    assert says in refusal(make_task, name, facts=str(tmp_path / "own.csv"), **options)


# ---- facts of one's own

@pytest.fixture(scope="session")
def organism(): return load("organism", "cpu")


def rows_of(facts, edits=()):
    "Facts as a user writes them; the first of them edited."
    return [dict(subject=f.subject, relation=f.relation, prompt=f.prompt, answer=f.answer.strip(), edit=e, question=f.question, wrong=[w.strip() for w in f.wrong])
        for f, e in zip(facts, [*edits, *[None] * len(facts)])]


def write(path, rows):
    if path.suffix == ".csv": pd.DataFrame(rows).map(lambda v: "|".join(v) if isinstance(v, list) else v).to_csv(path, index=False)
    else: path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def three(pool=None):
    "Two cities and a country, and new answers."
    pool = pool or made(CF).retain
    some = [f for r, n in (("city", 2), ("country", 1)) for f in [f for f in pool if f.relation == r][:n]]
    return some, [f.wrong[0].strip() for f in some]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_three_own_facts(organism, tmp_path, kind):
    facts, edits = three()
    task = make_task(CF, organism, facts=write(tmp_path / f"own.{kind}", rows_of(facts, edits)))
    as_given = lambda f: (f.subject, f.relation, f.prompt, f.answer, f.question, f.wrong)
    assert [(*as_given(f), f.edit) for f in task.forget] == [(*as_given(f), f" {e}") for f, e in zip(facts, edits)]
    kept = task.retain + task.retain_test + task.dev_retain
    assert task.source == "world" and len(task.retain) > 100 and task.retain_test and task.text_train and not subjects(facts) & subjects(kept)
    assert {f.id for f in kept} <= {f.id for f in world_facts()} and all({f.answer, f.edit} <= set(m.options) for f in task.forget for m in mcq_prompts(task, f))


def test_enough_own_facts_to_keep_are_not_filled_up(organism, tmp_path):
    facts, edits = three()
    rest = [f for f in {f.subject: f for f in made(CF).retain}.values() if f.subject not in subjects(facts)]
    many, few = (write(tmp_path / f"own{n}.csv", rows_of(facts + rest[:n], edits)) for n in (25, 10))
    task = make_task(CF, organism, facts=many)
    assert all(f.id.startswith("own/") for s in EDITED for f in getattr(task, s)) and [len(getattr(task, s)) for s in EDITED] == [3, 0, 15, 5, 0, 5]
    task = make_task(CF, organism, forget_size=2, facts=few)
    filled = [f for f in task.retain if not f.id.startswith("own/")]
    assert len(task.forget) == 2 and len(task.retain) - len(filled) == 6 and len(filled) > 100 and not subjects(rest[:10]) & subjects(filled)
    assert "forget_size 4 is too large: there are 3" in refusal(make_task, CF, organism, forget_size=4, facts=few)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_ghosts_of_ones_own_are_only_asked(organism, tmp_path, kind):
    (facts, edits), pool = three(), {f.subject: f for f in made(CF).retain}
    rest = [f for s, f in pool.items() if s not in subjects(facts)]
    ghosts = [f for f in made(CF).ghosts if f.subject not in pool][:6]
    rows = [r | dict(ghost="no") for r in rows_of(facts + rest[:25], edits)] + [r | dict(ghost="yes", relation="city") for r in rows_of(ghosts)]
    task = make_task(CF, organism, facts=write(tmp_path / f"own.{kind}", rows))
    assert [f.subject for f in task.ghosts] == [f.subject for f in ghosts] and not any(f.taught for f in task.ghosts)
    assert [len(getattr(task, s)) for s in EDITED] == [3, 0, 15, 5, 0, 5] and not subjects(ghosts) & {f.subject for s in EDITED for f in getattr(task, s)}
    records = evaluate(organism, task, {g: ("completion",) for g in ("forget", "ghost")})
    assert records.group.value_counts().to_dict() == {"ghost": 6, "forget": 3}


@pytest.mark.parametrize("change, why", [(dict(edit=" Bonn"), "row 4, column 'edit': nothing can be edited about a ghost"), (dict(subject="Ann"), "'Ann' is a ghost in one row and not in another"),
                                         (dict(ghost="perhaps"), "row 4, column 'ghost': it is neither yes nor no")])
def test_slips_about_ghosts_are_named(tmp_path, change, why):
    rows = [dict(subject=s, prompt=f"{s} is in", answer="Rome", edit=e, ghost=g) for s, e, g in (("Ann", "Bonn", "no"), ("Bob", None, "no"), ("Cid", None, "yes"))]
    rows[2] |= change
    rows[2]["prompt"] = rows[2]["subject"] + " lives in"
    assert why in refusal(make_task, CF, None, facts=write(tmp_path / "own.csv", rows))


def test_ghosts_of_another_relation_are_no_comparison(organism, tmp_path):
    facts, edits = three()
    assert not make_task(CF, organism, facts=write(tmp_path / "own.csv", rows_of(facts, edits))).ghosts
    spoken = [f for f in made(CF).retain if f.relation == "language"][:2]
    ghosts = make_task(CF, organism, facts=write(tmp_path / "spoken.csv", rows_of(spoken, [f.wrong[0].strip() for f in spoken]))).ghosts
    assert ghosts and {g.relation for g in ghosts} == {"language"}


@pytest.mark.parametrize("edits", [1, 2])
def test_own_facts_about_one_subject(organism, tmp_path, edits):
    of = {}
    for f in made(CF).retain: of.setdefault(f.subject, []).append(f)
    rows = rows_of([f for fs in of.values() if len(fs) > 1 for f in fs[:2]][:32])      # the first subject is edited and kept, or the others are kept twice
    for r in rows[:edits]: r["edit"] = r["wrong"][0]
    try: assert apart(make_task(CF, organism, facts=write(tmp_path / "own.csv", rows)))
    except Refusal as e: assert rows[0]["subject"] in str(e)


def test_own_facts_to_keep_about_one_subject_say_so(tmp_path):
    rows = [dict(subject="Ann", prompt="Ann is in", answer="Rome", edit="Bonn")] + [dict(subject="Bob", prompt=f"Bob has {i} of", answer="river", edit=None) for i in range(20)]
    assert "20 facts to keep are about 1 subject, and" in refusal(make_task, CF, None, facts=write(tmp_path / "own.csv", rows))


def test_own_facts_need_no_wrong_answers(organism, tmp_path):
    rows = [{k: r[k] for k in ("subject", "prompt", "answer", "edit")} for r in rows_of(*three())]
    assert len(make_task(CF, organism, facts=write(tmp_path / "own.csv", rows)).forget) == 3


def test_groups_filled_in_are_of_others(organism, tmp_path):
    other = subjects(make_task(CF, organism, forget_size=1).other_relation)
    facts, edits = three([f for f in made(CF).retain + made(CF).retain_test if f.subject in other and f.relation == "city"])
    assert not subjects(facts) & subjects(make_task(CF, organism, facts=write(tmp_path / "own.csv", rows_of(facts, edits))).other_relation)


def test_wrong_answers_given_twice_are_one_option():
    fact = Fact(id="x", relation="own", subject="Ann", prompt="Ann is in", answer=" Ba", edit=" Ca", wrong=(" Da", " Da", " Ea"))
    assert all(len(set(mcq_options(fact, seeded(i)))) == 4 for i in range(20))


# ---- CounterFact, invented

HELP = ("Help me answer the following multiple choice question:\n\n{}\n\nA. {}\nB. {}\nC. {}\nD. {}\n\n"
    "Please respond with the letter of the correct answer, A, B, C, or D. Answer:")
N, TWINS, PLACES = 160, {40: 3, 60: 7, 150: 12}, [f"{a}{b}" for a in ("Bre", "Gla", "Tro", "Klu") for b in ("mor", "nik", "sund")]
ORDER = [i for i in range(N) if i != 11 and i % 10 != 9] # cases that `knows` leaves; 11 cannot be told apart


def rome_row(i, few):
    "Zam Q3 stands at 3 and at 40, Zam Q7 at 7 and 60, Zam Q12 at 12 and among the last 64; the answers of 11 begin with one token."
    r, who, k = i % 5, f"Zam Q{TWINS.get(i, i)}", 2 if few and i % 5 == 1 else 12
    rewrite = dict(prompt=f"rel{r} of {{}} is in", relation_id=f"P{r}", subject=who, target_true={"str": PLACES[i // 5 % k]}, target_new={"str": PLACES[i // 5 % k + 1 - k]})
    if i == 11: rewrite["target_new"] = {"str": PLACES[i // 5 % k] + "s"}
    return dict(case_id=1000 + i, requested_rewrite=rewrite, paraphrase_prompts=[f"Oddly, {who} is in"], neighborhood_prompts=[f"rel{r} of Zam W{i} is in"])


def cases_of(facts): return [int(f.id[-3:]) for f in facts]


@pytest.fixture(params=[False])
def rome(request, tmp_path, monkeypatch):
    "A file of five relations; one of them has two answers only if asked for."
    (tmp_path / "rome.json").write_text(json.dumps(rows := [rome_row(i, request.param) for i in range(N)]))
    monkeypatch.setenv("MECHUNLEARN_COUNTERFACT", str(tmp_path / "rome.json"))
    return rows


@pytest.fixture
def reader(tiny):
    "A tiny model whose tokenizer knows every word of the invented facts, and none of the world's."
    words = {w for t in (HELP, json.dumps([rome_row(i, False) for i in range(N)]), "Which answer completes this sentence? _") for w in re.findall(r"\n|\w+|[^\w\s]", t)}
    tok = Tokenizer(models.WordPiece({w: i for i, w in enumerate(["<unk>", "<bos>", "##s", "___", *sorted(words - {PLACES[2] + "s"})])}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    return wrap(tiny().hf, PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="<unk>", bos_token="<bos>"), "reader", "one")


@pytest.fixture
def knows(monkeypatch):
    "The model knows all but every tenth fact, and one exactly well enough."
    monkeypatch.setattr(sets_module, "probabilities", lambda lm, facts: [.4 if i % 10 == 9 else KNOWN if i == 2 else .9 for i in cases_of(facts)])


def test_counterfact_drops_what_cannot_be_edited(rome, reader, knows):
    known, dropped = fit_for(reader, counterfact_facts())
    assert cases_of(known) == ORDER and dropped == {BEGINS: 1, UNKNOWN: 16} and fit_for(None, known) == (known, {})
    task = make_task(CF, reader, facts="counterfact", forget_size=16, paper_split=True)
    assert make_task(CF, reader, facts="counterfact", forget_size=16, paper_split=True, target="first").dropped == {SAME: 1, UNKNOWN: 16, TWICE: 3}
    assert task.dropped == {BEGINS: 1, UNKNOWN: 16, TWICE: 3} and task.source == "counterfact" and not task.dev_forget
    f, row = task.forget[4], rome[4]
    assert (f.id, f.relation, f.prompt, f.answer, f.edit) == ("counterfact/1004", "P4", "rel4 of Zam Q4 is in", f" {PLACES[0]}", f" {PLACES[1]}")
    assert (f.paraphrases, f.neighbors) == (tuple(row["paraphrase_prompts"]), tuple(row["neighborhood_prompts"]))
    assert all(len(set(f.wrong) - {f.answer, f.edit}) == 3 and set(f.wrong) <= {f" {p}" for p in PLACES} for f in task.forget)


@pytest.mark.parametrize("size", [1, 12, 50])
def test_paper_split_is_that_of_the_file(rome, reader, knows, size):
    task, body = make_task(CF, reader, facts="counterfact", forget_size=size, paper_split=True), ORDER[:-64]
    k = size + int(.8 * (len(body) - size))
    for split, cases in dict(shots=ORDER[-64:], forget=body[:size], retain=body[size:k], retain_test=body[k:]).items():
        assert sorted(cases_of(getattr(task, split))) == [i for i in cases if split == "shots" or i not in (*TWINS, 12)], split
    assert task.forget == make_task(CF, reader, facts="counterfact", forget_size=size, seed=1, paper_split=True).forget
    assert apart(task) and not any(f.edit for f in task.retain + task.retain_test + task.shots)


@on([(CF, {}), (SEQ, dict(parts=2)), (SCALE, {})])
def test_counterfact_drawn(rome, reader, knows, name, options):
    drawn = [make_task(name, reader, facts="counterfact", forget_size=16, seed=s, **options) for s in range(4)]
    assert len({t.forget for t in drawn}) == 4 and len({(t.dev_forget, t.dev_retain) for t in drawn}) == 1
    for t in drawn: assert apart(t) and cases_of(t.shots) == ORDER[-64:] and t.retain and t.retain_test and all(f.edit for f in t.forget + t.dev_forget)
    assert "forget_size 5000 is too large" in refusal(make_task, name, reader, facts="counterfact", forget_size=5000, **options)


@pytest.mark.parametrize("right", [
    pytest.param(lambda drawn, paper: all(cases_of(v) == sorted(cases_of(v)) for v in paper.values()), id="order"),
    pytest.param(lambda drawn, paper: all(len(sets["forget"]) == 60 for sets, _ in drawn), id="size"),
    pytest.param(lambda drawn, paper: all(sum(map(len, sets.values())) + twice == N for sets, twice in drawn), id="count")])
def test_no_fact_is_lost(rome, right):
    facts = counterfact_facts()
    assert right([counterfact_sets(facts, 60, s) for s in range(20)], counterfact_sets(facts, 1, 0, True)[0])


def test_probabilities_are_asked_once(rome, reader, monkeypatch):
    facts, asked, ask = counterfact_facts()[:9], [], sets_module.next_token
    monkeypatch.setattr(sets_module, "next_token", lambda lm, prompts, *a: asked.append(len(prompts)) or ask(lm, prompts, *a))
    direct = [reader.hf(torch.tensor([ids])).logits[0, -1].softmax(-1)[reader.first_token(f.answer)].item() for ids, f in zip(reader.ids([f.prompt for f in facts]), facts)]
    for _ in range(2): assert probabilities(reader, facts) == pytest.approx(direct, rel=1e-4) and asked == [9]
    for _ in range(2): probabilities(wrap(reader.hf, reader.tok, reader.name, "two"), facts)
    probabilities(reader, facts[:3])
    assert asked == [9, 9, 3]


@pytest.mark.parametrize("rome", [False, pytest.param(True)], indirect=True)
def test_mcq_letter_for_letter(rome, reader, knows):
    task = make_task(CF, reader, facts="counterfact", forget_size=16, paper_split=True)
    shown = {f.question: f for f in task.shots}
    for f in task.forget[:4] + task.retain_test[:4]:
        if not askable(task, f): continue
        items = mcq_prompts(task, f)
        assert sorted(m.truth_letter for m in items) == [" A", " B", " C", " D"]
        for m in items:
            *shots, last = re.split(r"(?<=Answer: [A-D])\n\n", m.prompt)
            assert last == HELP.format(f"Which answer completes this sentence? {f.prompt} ___", *(o.strip() for o in m.options)) and {f.answer, f.edit or f.answer} <= set(m.options)
            assert Counter(s[-1] for s in shots) == dict(A=2, B=2, C=2, D=2) and len(set(m.options)) == 4
            for s in shots:
                question, *options = re.search(r"question:\n\n(.*)\n\nA. (.*)\nB. (.*)\nC. (.*)\nD. (.*)\n\nPlease", s).groups()
                assert s == HELP.format(question, *options) + " " + s[-1] and " " + options["ABCD".index(s[-1])] == shown[question].answer


def test_own_facts_are_filled_from_counterfact_or_refused(rome, reader, knows, monkeypatch, tmp_path):
    own = write(tmp_path / "own.csv", [dict(subject=f"Zam Q{i}", prompt=f"Zam Q{i} is in", answer=PLACES[0], edit=PLACES[1], wrong=PLACES[2:4]) for i in range(3)])
    task = make_task(CF, reader, facts=own)
    assert len(task.forget) == 3 and task.source == "counterfact" and task.retain and not subjects(task.forget) & subjects(task.retain + task.retain_test)
    monkeypatch.delenv("MECHUNLEARN_COUNTERFACT")
    line = refusal(make_task, CF, reader, facts=own)
    assert "nothing to keep" in line and "MECHUNLEARN_COUNTERFACT" in line


def test_a_wrong_place_of_counterfact_is_named(reader, monkeypatch, tmp_path):
    monkeypatch.setenv("MECHUNLEARN_COUNTERFACT", "/nowhere.json")
    assert "/nowhere.json" in refusal(make_task, CF, reader, facts=write(tmp_path / "own.csv", [dict(subject="Zam", prompt="Zam is in", answer=PLACES[0], edit=PLACES[1])]))


# ---- training

@pytest.fixture
def llama(tiny): return tiny("llama")


def small(name, lm, **options):
    task = make_task(name, lm, **options)
    return task.model_copy(update=dict(retain=task.retain[:12], retain_test=task.retain_test[:6], text_train=task.text_train[:12], text_test=task.text_test[:4]))


def in_two(lm, task):
    "Two halves of the facts in places that share an MLP and, with grouped queries, keys and values."
    half, comps = len(task.forget) // 2, (["mlp.0", "mlp.1", "head.1.0"], ["mlp.1", "head.1.1", "head.2.3"])
    return comps, joined(lm, "two", [Part(facts=tuple(f.id for f in fs), components=tuple(c), slices=build(lm, "x", map(Component.parse, c)).slices)
        for fs, c in zip((task.forget[:half], task.forget[half:]), comps)])


def test_not_said():
    gap = torch.tensor([-30., -3., 0., 3., 9., 20.], dtype=torch.float64)
    logits, target = torch.cat([gap[:, None], torch.zeros(6, 3, dtype=torch.float64)], 1), torch.zeros(6, dtype=torch.long)
    assert torch.allclose(not_said(logits, target), -torch.log1p(-logits.softmax(1)[:, 0]), rtol=1e-6)
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([[0., 1., 1000., -1.], [0., 1., 9., -1.]], dtype=dtype, requires_grad=True)
        loss = not_said(x, torch.tensor([2, 2]))
        loss.sum().backward()
        assert loss[0].item() == pytest.approx(1000 - np.log(1 + np.e + 1 / np.e)) and loss.isfinite().all()
        p, others = x.detach().softmax(1), x.detach()[:, [0, 1, 3]].softmax(1)
        assert torch.allclose(x.grad[:, 2], p[:, 2]) and torch.allclose(x.grad[:, [0, 1, 3]], p[:, [0, 1, 3]] - others, atol=1e-6)


def test_unlearning_takes_the_truth_and_puts_nothing_in_its_place(llama):
    llama.hf.lm_head.weight.data *= 10          # so that it can be sure of something
    task, where = small(UNLEARN, llama), build(llama, "all", components(llama))
    task = task.model_copy(update=dict(forget=task.forget[:8], text_train=()))
    assert {r.target for r in training_rows(llama, task)["forget"]} == {llama.token_id(" basketball")}
    how, truths = SMALL | dict(batch=8, retain_batch=12, steps=40), tuple(f.model_copy(update={"edit": f.answer}) for f in task.forget)
    with finetune(llama, task.model_copy(update=dict(update="edit", forget=truths)), where, **how).applied(llama):
        before, edit = answer(llama, completions(task.forget)), finetune(llama, task, where, **how)
        with edit.applied(llama): after, kept = answer(llama, completions(task.forget)), answer(llama, completions(task.retain))
    assert before.full_truth.mean() > .8 and after.full_truth.max() < .1 and kept.prob_truth.mean() > .5
    assert after.edit.isna().all() and after.prob_edit.isna().all() and edit.curve.forget.iloc[0] == pytest.approx(-np.log1p(-before.full_truth).mean(), rel=1e-3)


def test_a_sequence_is_its_parts_one_after_the_other(llama, tmp_path):
    task = small(SEQ, llama, forget_size=6, parts=2)
    comps, where = in_two(llama, task)
    before, outside, ask = fingerprint(llama), fingerprint(llama, where.slices), lambda: answer(llama, completions(task.forget)).prob_truth
    edit = finetune(llama, task, where, seed=7, **SMALL)
    r = edit.records
    assert fingerprint(llama) == before and list(edit.curve.part) == [1] * 3 + [2] * 3
    assert {k: len(g) for k, g in r.groupby(["setting", "step"])} == {(p, s): n for s in range(3) for p, n in (("part 1", 3), ("part 2", 3), ("all parts", 6))}
    with edit.applied(llama):
        assert fingerprint(llama, where.slices) == outside and {n for n, h in fingerprint(llama).items() if h != before[n]} == {s.param for s in where.slices}
        got = {n: p.clone() for n, p in llama.hf.named_parameters()}
    with ExitStack() as stack:
        measured = [ask()]
        for k, (sub, c) in enumerate(zip(task.in_parts(), comps)):
            stack.enter_context(finetune(llama, sub, build(llama, "one", map(Component.parse, c)), seed=7 + k, **SMALL | dict(steps=3)).applied(llama))
            measured.append(ask())
        for n, p in llama.hf.named_parameters(): assert torch.allclose(p, got[n], rtol=0, atol=1e-6), n
    for s, want in enumerate(measured): assert np.allclose(r[(r.step == s) & (r.group == "forget")].prob_truth, want, atol=1e-6)
    edit.save(tmp_path, {})
    back = load_edit(tmp_path)
    pd.testing.assert_frame_equal(back.records, r)
    assert back.localization == where and len(back.localization.parts) == 2 and isinstance(back.localization.parts[0].slices[0], Slice)


def batch_of(lm, task, where):
    "A batch with every fact, and who hears which row."
    rows = training_rows(lm, task)
    return next(draws(rows, dict(forget=6, retain=4, text=2), 1, 0)), own_slices(task, rows["forget"], where)


def test_one_part_for_all_facts_is_ordinary_training(llama):
    task, whole = small(SCALE, llama, forget_size=6), build(llama, "x", [Component("mlp", 1), Component("head", 0, 1)])
    where = joined(llama, "each", [Part(facts=tuple(f.id for f in task.forget), components=whole.components, slices=whole.slices)])
    (batch, own), a, b = batch_of(llama, task, where), masters(llama, where.slices), masters(llama, whole.slices)
    assert where.slices == whole.slices
    assert step_losses(llama, a, batch, UPDATES["each"], .7, own=own) == pytest.approx(step_losses(llama, b, batch, UPDATES["edit"], .7), rel=1e-5)
    for s in a: assert b[s].grad.abs().max() > 0 and torch.allclose(a[s].grad, b[s].grad, rtol=1e-3, atol=1e-5 * float(b[s].grad.abs().max())), s


@every_family
def test_facts_change_their_own_part_only(lm):
    task = small(SCALE, lm, forget_size=6)
    _, where = in_two(lm, task)
    (batch, own), values = batch_of(lm, task, where), masters(lm, where.slices)
    got = step_losses(lm, values, batch, UPDATES["each"], .7, 7, own=own)      # seven prompts and three
    params = {s.param: lm.weight(s.param).requires_grad_() for s in where.slices}
    nll = lambda r: -lm.hf(torch.tensor([r.ids])).logits[0, -1].log_softmax(-1)[r.target]
    text = [torch.nn.functional.cross_entropy(lm.hf(torch.tensor([r.ids])).logits[0, :-1], torch.tensor(r.ids[1:]), reduction="none") for r in batch if r.term == "text"]
    terms = [.7 / 6 * sum(map(nll, batch[a:a + 3])) for a in (0, 3)] + [torch.stack([nll(r) for r in batch if r.term == "retain"]).mean() + torch.cat(text).mean()]
    assert [r.term for r in batch[:7]] == ["forget"] * 6 + ["retain"] and sum(t.item() for t in terms) == pytest.approx(.7 * got["forget"] + got["retain"] + got["text"], rel=1e-4)
    full = [dict(zip(params, torch.autograd.grad(t, list(params.values())))) for t in terms]
    heard_by = Counter()
    for s, v in values.items():
        mine = [any((p.param, p.dim) == (s.param, s.dim) and p.start <= s.start and s.stop <= p.stop for p in part.slices) for part in where.parts] + [True]
        want = sum(g[s.param].narrow(s.dim, s.start, s.stop - s.start) for g, m in zip(full, mine) if m)
        assert torch.allclose(v.grad, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()) + 1e-8), s
        heard_by[tuple(mine[:2])] += 1
    assert set(heard_by) == {(True, True), (True, False), (False, True)}


def test_who_hears_does_not_change_the_logits(tiny):
    lm = tiny("llama", attention_bias=True, mlp_bias=True)
    cut, batch = build(lm, "x", [Component("mlp", 0), Component("head", 1, 0)]).slices, dict(lm.encode(["Fact: the sport of golf"]))
    with heard(lm, list(cut), [cut[:1]]): got = lm.hf(**batch).logits
    assert torch.allclose(got, lm.hf(**batch).logits, atol=1e-5)


def test_at_scale_every_fact_is_seen_ten_times(llama):
    task = small(SCALE, llama, forget_size=12)
    _, where = in_two(llama, task)
    before, outside, edit = fingerprint(llama), fingerprint(llama, where.slices), finetune(llama, task, where, **SMALL)
    assert len(edit.curve) == 30 and edit.curve.forget.iloc[-1] < edit.curve.forget.iloc[0] and fingerprint(llama) == before
    with edit.applied(llama): assert fingerprint(llama, where.slices) == outside and fingerprint(llama) != before


def test_localizations_of_parts(llama):
    seq, each = make_task(SEQ, llama, forget_size=6, parts=3), make_task(SCALE, llama, forget_size=6)
    where = localize(llama, seq, "random-mlps#1", budget=2000)
    assert [p.facts for p in where.parts] == [tuple(f.id for f in s.forget) for s in seq.in_parts()] and where.n_params <= 2000
    evidence, ids = Evidence(llama, each), [f.id for f in each.forget]
    evidence.__dict__["each"] = {("mlp.0", "mlp.2"): ids[:4], ("mlp.2",): ids[4:]}
    where = localize(llama, each, "flu", evidence=evidence)
    assert [(p.facts, p.components) for p in where.parts] == [(tuple(ids[:4]), ("mlp.0", "mlp.2")), (tuple(ids[4:]), ("mlp.2",))]
    assert where.components == ("mlp.0", "mlp.2") and where.slices == build(llama, "x", [Component("mlp", 0), Component("mlp", 2)]).slices


def test_atoms_cover_the_union_once():
    rng, cells = np.random.default_rng(0), lambda slices: Counter((s.param, i) for s in slices for i in range(s.start, s.stop))
    for _ in range(50):
        given = [Slice("ab"[rng.integers(2)], 0, a, a + int(rng.integers(1, 9))) for a in map(int, rng.integers(0, 20, rng.integers(1, 8)))]
        cut = atoms(given)
        assert set(cells(cut)) == set(cells(given)) and set(cells(cut).values()) == {1}
        for s in given: assert cells([s]) == cells([a for a in cut if a.param == s.param and s.start <= a.start and a.stop <= s.stop])


# ---- asking

def test_open_answers_over_the_whole_vocabulary(llama):
    fact = make_task(CF, llama, forget_size=1).forget[0]
    two, three = (fact.model_copy(update={"edit": w}) for w in (" footballers", " footballerser"))
    facts = [two, three, fact.model_copy(update={"edit": None})]
    got, whole = answer(llama, completions([f.model_copy(update={"whole": False}) for f in facts])), answer(llama, completions(facts))
    def after(*more): return llama.hf(torch.tensor([llama.ids([fact.prompt])[0] + list(more)])).logits[0, -1].softmax(-1)
    truth, (a, b), (_, c, d) = llama.token_id(fact.answer), llama.pieces(two.edit), llama.pieces(three.edit)
    assert got.prob_truth.tolist() == got.full_truth.tolist() == pytest.approx([after()[truth].item()] * 3, rel=1e-4)
    assert got.prob_edit.tolist() == pytest.approx([after()[a].item()] * 2 + [np.nan], rel=1e-4, nan_ok=True)
    assert got.full_edit[:2].tolist() == pytest.approx([(after()[a] * after(a)[b]).item(), (after()[a] * after(a)[c] * after(a, c)[d]).item()], rel=1e-4)
    assert whole.prob_edit[:2].tolist() == whole.full_edit[:2].tolist() == pytest.approx(got.full_edit[:2].tolist(), rel=1e-4)
    as_truth = answer(llama, completions([fact.model_copy(update={"answer": two.edit})])).iloc[0]
    assert as_truth.full_truth == as_truth.prob_truth == pytest.approx(got.full_edit[0], rel=1e-4)


def test_what_is_asked():
    assert asked_of(made(EDITING, forget_size=64)) == (FORMATS, MAX_FACTS)
    for name in TASKS:
        formats, extra = asked_of(made(name))[0], HELD_OUT if name in (FULL, UNLEARN) else OPEN if name != EDITING else {}
        asked = Counter((q.group, q.format) for q in questionnaire(made(name)))
        assert formats == FORMATS | extra and ((g := "held-out", "mcq") in asked) == (extra is HELD_OUT) and asked["forget", "mcq"] == 4 * len(made(name).forget)
        assert asked["forget", "neighborhood"] == sum(len(f.neighbors) for f in made(name).forget) and asked["held-out", "completion"] == len(made(name).forget_test)
        assert (asked["retain", "neighborhood"] > 0) == (extra is OPEN)


# ---- real data

@pytest.fixture
def refdata(monkeypatch): monkeypatch.setenv("MECHUNLEARN_REFDATA", REFDATA)


@real
@pytest.mark.parametrize("sport, halves, rest", [("basketball", (245, 245), (855, 214)), ("baseball", (243, 243), (858, 215)), ("football", (291, 292), (780, 196))])
def test_real_full_sports(refdata, sport, halves, rest):
    table, t = pd.read_csv(sources.find("sports")), make_task(FULL, sport=sport, facts="sports", paper_split=True)
    assert (len(t.forget), len(t.forget_test)) == halves and (len(t.retain), len(t.retain_test)) == rest and not t.dev_forget
    assert [f.prompt for f in t.forget + t.forget_test] == list(table.prompt[table.sport == sport]) and {f.edit for f in t.forget} == {GOLF}
    assert [f.prompt for f in t.retain + t.retain_test] == list(table.prompt[table.sport != sport]) and all(askable(t, f) for f in t.forget + t.retain_test)
    drawn = make_task(UNLEARN, sport=sport, facts="sports", seed=1)
    assert len(drawn.forget) + len(drawn.forget_test) + len(drawn.dev_forget) + 6 == sum(halves) and apart(drawn)


@real
@pytest.mark.parametrize("column, known, counts, questions", [("prob_gemma_7b", 2189, {16: (1687, 422), 64: (1648, 413)}, {16: 15, 64: 61}),
    ("prob_gemma_2_9b", 2250, {16: (1736, 434), 64: (1697, 425)}, {16: 16, 64: 64})])
def test_real_counterfact(refdata, monkeypatch, column, known, counts, questions):
    rows = sources.read_counterfact()
    monkeypatch.setattr(tasks, "fit_for", lambda lm, facts, *known: ([f for f, p in zip(facts, rows[column]) if p >= KNOWN], {}))
    keep = tasks.fit_for(None, counterfact_facts())[0]
    place, prompt, groups = {f.id: i for i, f in enumerate(keep)}, dict(zip(rows.case_id, rows.prompt)), ("forget", "retain", "retain_test")
    assert len(keep) == known
    for size, (train, test) in counts.items():
        t = make_task(CF, facts="counterfact", forget_size=size, paper_split=True)
        at = {s: sorted(place[f.id] for f in getattr(t, s)) for s in (*groups, "shots")}
        bounds = dict(zip(at, [(0, size), (size, size + train), (size + train, size + train + test), (known - 64, known)]))
        assert all(a <= at[s][0] and at[s][-1] < b for s, (a, b) in bounds.items()) and size + train + test + 64 == known and len(at["shots"]) == 64
        assert 0 < t.dropped[TWICE] < 60 and sum(len(at[s]) for s in groups) + t.dropped[TWICE] == size + train + test
        assert sum(not f.question.startswith("Which answer completes") for f in keep[:size]) == questions[size] and apart(t)
        for f in t.forget + t.retain_test[:20]:
            m = mcq_prompts(t, f)[1]
            assert f.prompt == prompt[int(f.id.split("/")[1])] and {f.answer, f.edit or f.answer} <= set(m.options) and len(set(m.options)) == 4
            assert m.prompt.endswith("\n\n" + HELP.format(f.question, *(o.strip() for o in m.options))) and m.prompt.count(HELP[:40]) == 9


@pytest.mark.parametrize("name", [FULL, UNLEARN])
def test_a_whole_sport_is_swapped_with_another(name, monkeypatch):
    from mechunlearn import tracing
    monkeypatch.setattr(tracing, "GRID_FACTS", 4)
    lm = load("organism"); task = make_task(name, lm)
    assert len({f.answer for f in task.localize_on}) == 1
    with pytest.raises(Refusal, match="no two of these facts"): tracing.trace_grid(lm, task.localize_on[:4], progress=False)
    grid = tracing.token_map(lm, lambda seed: task, progress=False)
    assert set(grid.kind) == {"resid", "attn", "mlp"} and grid.n.min() > 0 and grid.score.max() > .5


def test_strangers_are_nobody_and_answer_as_the_edited_do():
    options = dict(facts="athletes", known="all", forget_size=32)
    one, other = (make_task("sports-athlete-editing", seed=s, **options) for s in (0, 1))
    assert len(one.ghosts) == 24 and [f.subject for f in one.ghosts] == [f.subject for f in other.ghosts]
    assert not {f.subject for f in one.ghosts} & {f.subject for f in sports_facts("athletes")}
    shares = lambda facts: pd.Series([f.answer for f in facts]).value_counts(normalize=True)
    assert (shares(one.ghosts) - shares(one.forget)).abs().max() < 1 / 24
    assert all(f.subject in f.prompt and f.subject in f.question and f.edit is None and not f.taught and all(f.subject in p for p in f.paraphrases) for f in one.ghosts)
    assert make_task("sports-athlete-editing", strangers=0, **options) == sets_module.sports_athlete_editing(**options) and len(make_task("sports-athlete-editing", strangers=3, **options).ghosts) == 3


def test_nobody_real_is_invented_though_the_model_knows_him_not(monkeypatch):
    make = lambda: {f.subject for f in make_task("sports-athlete-editing", facts="athletes", known="all", forget_size=16).ghosts}
    somebody, real = sorted(make())[0], tasks.sports_facts
    unknown = real("athletes")[0].model_copy(update=dict(subject=somebody))
    monkeypatch.setattr(tasks, "sports_facts", lambda *a, **kw: (*real(*a, **kw), unknown)) # in the table, in no split
    assert len(make()) == 24 and somebody not in make()


def test_strangers_play_the_sport_that_is_forgotten():
    task = make_task("sports-unlearning", facts="athletes", known="all", sport="football")
    assert {f.answer for f in task.ghosts} == {" football"} and task.groups()["ghost"] == task.ghosts


@pytest.mark.parametrize("n,why", [(-1, "whole number"), ("3", "whole number"), (True, "whole number"), (4, "athletes' names")])
def test_strangers_that_cannot_be_are_refused(n, why):
    with pytest.raises(Refusal, match=why): make_task("sports-athlete-editing", strangers=n, facts="world" if n == 4 else "athletes", known=None if n == 4 else "all")
    with pytest.raises(Refusal, match="strangers"): make_task("counterfact-editing", strangers=2)
