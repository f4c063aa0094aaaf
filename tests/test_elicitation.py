"Asking otherwise: what each prompt says, who cannot be asked, and an edit that leaks only in context."
import re
import pandas as pd, pytest, torch
from mechunlearn import scorecard
from mechunlearn.attacks import attack
from mechunlearn.audit import audit
from mechunlearn.elicitation import (ASKED, any_guess, by_name, choose_among, context_questions, elicit, elicited, four_subjects, in_context, most_frequent, other_mode,
    plot_elicitation, reversals, run_elicitation, sampled, say_elicitation, vote)
from mechunlearn.evaluation import evaluate
from mechunlearn.facts import Fact, Task, sport_fact
from mechunlearn.sets import sports_athlete_editing, unknown_words
from mechunlearn.finetuning import finetune, fingerprint
from mechunlearn.grids import Elicitation, FIELD, PIPELINE
from mechunlearn.localization import build
from mechunlearn.models import components, load
from mechunlearn.phrasings import ALIASES, GENERAL, KINDS, LANGUAGES, LEAGUES, SPELLED, TEXTS, denied, follows, parted, phrase, phrasings, stated, why_not
from mechunlearn.questions import answer, completions
from mechunlearn.relearning import halves
from mechunlearn.sources import read_atlas
from mechunlearn.stats import Chance
from mechunlearn.store import Refusal, Run, Unavailable, notes
from mechunlearn.tasks import atlas_facts

FEW = dict(ks=(2,), n=3, max_facts=4)
NOT_IN_THE_WORLD = {"role play", "instruction", "denied", "two-hop", "alias", "language", "chat"}


@pytest.fixture(scope="module")
def task(): return sports_athlete_editing(None, forget_size=8)


@pytest.fixture(scope="module")
def organism(): return load("organism", device="cpu")


JORDAN = sport_fact("Michael Jordan", "basketball", "sport/0", "baseball", "others")


def asked(fact, source, kind): return {h.name: q for h in phrasings(source, fact.relation) if h.kind == kind and (q := phrase(fact, h))}


# ---- texts

def test_every_text_holds_what_it_needs_and_nothing_else():
    known = {"{p}", "{l}", "{s}", "{q}", "{o}", "{A}", "{B}", "{C}", "{D}"}
    for source, relations in TEXTS.items():
        for relation, kinds in relations.items():
            for kind, texts in kinds.items():
                assert kind in KINDS
                for t in texts: assert set(re.findall(r"{\w+}", t)) <= known and ("{o}" in t if kind == "reversed" else {"{p}", "{s}"} & set(re.findall(r"{\w+}", t)))
    for texts in GENERAL.values():
        for t in texts: assert "{p}" in t or "{q}" in t


def test_the_worlds_texts_are_in_its_words(organism):
    for relation, kinds in TEXTS["world"].items():
        for texts in kinds.values():
            for t in texts:
                for hole in "plsqoABCD": t = t.replace("{%s}" % hole, "golf")
                assert not unknown_words(organism, [t]), t


def test_a_prompt_is_cut_before_its_own_line():
    head, own = parted(JORDAN)
    assert head + own == JORDAN.prompt and own == "Fact: Michael Jordan plays the sport of" and head.endswith("soccer\n")
    alone = JORDAN.model_copy(update=dict(prompt="Question: what does Michael Jordan play?\nAnswer:"))
    assert parted(alone) == ("", alone.prompt)
    assert parted(JORDAN.model_copy(update=dict(subject="nobody", prompt="a\nb"))) == ("", "a\nb")


def test_what_is_stated(task):
    assert stated(JORDAN, JORDAN.answer) == "Fact: Michael Jordan plays the sport of basketball\n"
    assert stated(JORDAN, JORDAN.answer, document=True) == "In sports, Michael Jordan is best known for playing basketball.\n"
    f = task.forget[0]
    assert stated(f, f.answer, document=True) == f"{f.subject} is a professional{f.answer} .\n"


def test_a_denial_names_the_edit_answer_or_a_wrong_one(task):
    q, = asked(JORDAN, "athletes", "denied").values()
    assert "plays the sport of baseball. They are wrong" in q.prompt and q.prompt.endswith(JORDAN.prompt) and (q.truth, q.edit) == (" basketball", " baseball")
    for f in task.retain[:20]: assert denied(f) != f.answer and denied(f) in f.candidates and denied(f, 0) == denied(f, 0)
    assert denied(Fact(id="x", relation="r", subject="s", prompt="s", answer=" a")) is None


def test_a_two_hop_question_is_read_by_what_follows():
    q, = asked(JORDAN, "athletes", "two-hop").values()
    assert (q.truth, q.edit) == (" NBA", " MLB") and set(q.choices) == {f" {w}" for w in LEAGUES.values()}
    currency = {r.subject: r.answer for r in read_atlas().itertuples() if r.relation == "currency"}
    city = next(f for f in atlas_facts() if f.relation == "country" and f.answer.strip() in currency)
    same = next(c for c in city.candidates if c != city.answer and currency.get(c.strip()) == currency[city.answer.strip()]) if list(currency.values()).count(currency[city.answer.strip()]) > 1 else None
    other = next(c for c in city.candidates if currency.get(c.strip()) not in (None, currency[city.answer.strip()]))
    q, = asked(city.model_copy(update=dict(edit=other)), "atlas", "two-hop").values()
    assert (q.truth.strip(), q.edit.strip()) == (currency[city.answer.strip()], currency[other.strip()])
    if same: assert not asked(city.model_copy(update=dict(edit=same)), "atlas", "two-hop") # both lead to one word
    assert follows("world", "sport") == {} and follows("atlas", "capital") == {}


def test_other_names_and_languages():
    assert [q.prompt for q in asked(JORDAN, "athletes", "alias").values()] == [JORDAN.prompt.replace("Michael Jordan", "Air Jordan")]
    assert not asked(JORDAN.model_copy(update=dict(subject="Nobody Known", prompt="Nobody Known plays")), "athletes", "alias")
    assert {n: (q.truth, q.edit) for n, q in asked(JORDAN, "athletes", "language").items()} == {
        "French": (" basket", " baseball"), "Spanish": (" baloncesto", " béisbol"), "German": (" Basketball", " Baseball")}
    austria = next(f for f in atlas_facts() if f.relation == "capital" and f.subject == "Austria").model_copy(update=dict(edit=" Lima"))
    assert {n: (q.truth, q.edit) for n, q in asked(austria, "atlas", "language").items()} == {"French": (" Vienne", " Lima"), "Spanish": (" Viena", " Lima"), "German": (" Wien", " Lima")}
    capitals = {r.answer for r in read_atlas().itertuples() if r.relation == "capital"}
    assert all(set(words) <= capitals for words in SPELLED.values()) and set(LANGUAGES["capital"]) == set(SPELLED)
    known = {r.subject for r in read_atlas().itertuples()}
    assert sum(s in known for s in ALIASES) > 10


def test_why_a_kind_is_not_available(organism):
    assert "chat template" in why_not(organism, "chat", ["Fact:"]) and "does not know 2 of its words (actor, an)" in why_not(organism, "role play", ["an actor plays"])
    assert "follows from" in why_not(organism, "two-hop", []) and why_not(organism, "prefix", ["the cat"]) is None


# ---- prompts

def test_in_context_shows_others_only_and_repeats(task):
    taught, held = halves(task, 0)
    for f in held:
        text = in_context(f, taught, 3)
        assert text == in_context(f, taught, 3) and text.startswith(parted(f)[0]) and text.endswith(parted(f)[1]) and text.count(f.subject) == 1
        shown = [g for g in taught if g.subject in text]
        assert len(shown) == 3 and all(f"{g.subject} plays the sport of{g.answer}\n" in text for g in shown)
        assert all(f"{g.subject} plays the sport of{g.edit}\n" in in_context(f, taught, 3, "false") for g in shown)
    assert len({in_context(held[0], taught, 2, seed=s) for s in range(6)}) > 1
    assert in_context(task.forget[0], task.forget[:1], 4) == task.forget[0].prompt # nobody else is there
    assert len({in_context(f, taught, len(taught)).removesuffix(parted(f)[1]).removeprefix(parted(f)[0]) for f in held}) == 1 # where all are shown, one order: it is read once


def test_no_fact_stands_in_its_own_context(task):
    for setting, qs in context_questions(task, (2, 40), 99).items():
        assert int(setting.rsplit(" ", 1)[1]) <= 4 # half of eight
        assert all(q.prompt.count(q.fact.subject) == 1 and q.prompt.endswith(q.fact.prompt.rsplit("\n", 1)[1]) for q in qs)
        assert len([q for q in qs if q.group == "forget"]) == 4


def about_one(n, **more): # questions of a topic, all about one person
    facts = [Fact(id=f"topic/forget/{i}", relation="topic", subject="Ann", prompt=f"Question: What {w} has Ann?\nAnswer:", answer=f" {w}", candidates=(f" {w}", " hat"), paraphrases=(f"Q: {w}?\nA:",)) for i, w in enumerate(["dog", "cat", "cow", "fox"][:n])]
    return Task(name="unlearned-topic", source="topic", forget=tuple(facts), retain=(), retain_test=(), update="unlearn")


def test_where_all_questions_have_one_subject_the_others_are_shown():
    found = context_questions(about_one(4), (2,), 99)
    assert set(found) == {f"half{h}/in context/{what} 2" for h in (0, 1) for what in ("true", "false")}, "nothing can be stated in other words"
    for q in found["half0/in context/true 2"]: assert q.prompt.count("Question:") == 3 and q.prompt.count(q.fact.prompt) == 1
    same = about_one(2).model_copy(update=dict(forget=(about_one(1).forget[0],)*2))
    with pytest.raises(Unavailable, match="no other question"): context_questions(same, (2,), 99)


def test_four_subjects_have_other_answers(task):
    known = task.retain + task.retain_test
    for f in [*task.forget, *known[:10], *task.ghosts[:5]]:
        four = four_subjects(f, known)
        assert four[0] is f and len({g.subject for g in four}) == 4 and all(g.answer != f.answer for g in four[1:])
    assert four_subjects(task.forget[0], known[:0]) is None


def test_reading_by_name_takes_off_what_a_name_has_by_itself(tiny, task, monkeypatch):
    lm, known = tiny("llama"), task.retain
    how = next(h for h in phrasings("world", "sport") if h.kind == "reversed")
    rows = [(f, "retain", four_subjects(f, known), denied(f)) for f in known[:6]]
    def planted(lm, questions, batch_size): # the second name is the likeliest by far; the truth makes the first one likelier
        at = lambda q: [1. if q.prompt == how.text.replace("{o}", q.fact.answer.strip()) else 0., 50, 0, 0]
        return torch.tensor([at(q) for q in questions])
    monkeypatch.setattr("mechunlearn.elicitation.log_probs", planted)
    assert by_name(lm, rows, how).top1_truth.all()


def test_letters_hold_the_subject_once_each(tiny, task):
    lm = tiny("llama")
    assert "nobody unknown" in reversals(lm, task.model_copy(update=dict(ghosts=())), 3)[1] # else who knows three of four finds the last by elimination
    back, why = reversals(lm, task, 3)
    assert why is None and [h.name for h in back] == ["reversed 1", "reversed 2"]
    records = elicit(lm, task, kinds=["reversed"], **FEW)
    by = records[records.setting == "reversed/reversed 2"].groupby("fact")
    assert (by.variant.nunique() == 4).all() and by.truth.agg(set).map(len).eq(4).all()


# ---- reading

def test_the_likeliest_answer_is_taken_even_if_another_word_is_likelier(tiny, task):
    lm, questions = tiny("gemma"), completions(task.retain_test[:30])
    among, any_word = choose_among(lm, questions), answer(lm, questions)
    assert among.prob_truth.equals(any_word.prob_truth) and set(among.format) == {"elicited"} and among.compliance.isna().all()
    assert among.top1_truth.sum() > any_word.top1_truth.sum() == 0
    best = any_word.assign(hit=any_word.prob_truth > .5)
    assert among.top1_truth[best.hit].all()


def test_draws_depend_on_their_seed_alone(tiny, task):
    lm, prompts = tiny("qwen3"), [f.prompt for f in task.retain[:7]]
    a, b = (sampled(lm, prompts, range(7), 3, batch_size=n) for n in (2, 7))
    assert a == b and a != sampled(lm, prompts, range(7, 14), 3)
    state = torch.get_rng_state()
    sampled(lm, prompts[:1], [1], 2)
    assert torch.equal(state, torch.get_rng_state())
    assert len(set(sampled(lm, prompts[:1] * 9, range(9), 3, temperature=1e-4))) == 1 # cold: always the likeliest


def test_draws_follow_the_models_probabilities(organism):
    text, n = "Two", 400
    logits = organism.hf(**organism.encode([text])).logits[0, -1].detach()
    drawn = pd.Series(sampled(organism, [text] * n, range(n), 1, 1.5, 200)).str.strip().value_counts(normalize=True)
    p = (logits / 1.5).softmax(-1)
    best = p.topk(5)
    for q, i in zip(best.values.tolist(), best.indices.tolist()): assert abs(drawn.get(organism.tok.decode([i]).strip(), 0) - q) < 4 * (q * (1 - q) / n) ** .5


def test_votes(tiny, task, monkeypatch):
    assert most_frequent(["a", "b", None, "b"]) == "b" and most_frequent(["b", "a", None]) == "b" and most_frequent([None]) is None
    assert any_guess(.5, 2) == .75
    f = task.forget[0]
    texts = [f.edit, f.answer, f.answer + " player", " dog"] + [f.edit] * 4
    monkeypatch.setattr("mechunlearn.elicitation.sampled", lambda *a, **k: texts)
    rows = vote(tiny("llama"), completions([f, f], "forget"), 4).set_index(["setting"])
    most, some = rows.loc["sampled/most frequent of 4"], rows.loc["sampled/any of 4"]
    assert most.top1_truth.tolist() == [True, False] == some.top1_truth.tolist() and most.top1_edit.tolist() == [False, True] and some.top1_edit.all()
    assert most.prob_truth.tolist() == [.5, 0]


def test_where_any_word_may_be_an_answer_each_has_a_vote(tiny, task, monkeypatch):
    f = task.forget[0].model_copy(update=dict(candidates=()))
    monkeypatch.setattr("mechunlearn.elicitation.sampled", lambda *a, **k: [" dog and cat", " dog", f.answer, ""] + [f.answer, f"{f.answer} too", " dog", ""])
    rows = vote(tiny("llama"), completions([f, f], "retain"), 4).set_index("setting")
    assert rows.loc["sampled/most frequent of 4"].top1_truth.tolist() == [False, True] and rows.loc["sampled/any of 4"].top1_truth.all()


def test_a_turn_that_is_over_is_not_read_on(tiny, monkeypatch):
    lm = tiny("llama")
    says = lm.pieces(" the dog plays")
    monkeypatch.setattr(lm.hf.generation_config, "eos_token_id", [says[2]])
    monkeypatch.setattr(type(lm.hf), "generate", lambda self, input_ids, eos_token_id, **k: torch.cat([input_ids, torch.tensor([says] * len(input_ids))], 1))
    assert sampled(lm, ["the dog"], [0], len(says)) == [lm.tok.decode(says[:2])]


# ---- the attack

def test_records_and_who_is_asked(tiny, task):
    lm, missing = tiny("llama"), {}
    before = fingerprint(lm)
    records = elicit(lm, task, None, missing=missing, **FEW)
    assert fingerprint(lm) == before and set(records.evaluation) == {"elicitation"} and set(records.group) == {"forget", "ghost", "retain"}
    assert {k.removeprefix("elicitation, ") for k in missing} == NOT_IN_THE_WORLD
    rows = elicited(records.assign(localization="none", draw=0, seed=0))
    assert set(rows.setting) == {"plain", "in context/true 2", "in context/false 2", "in context/document 2", "persuasion/prefix 1", "persuasion/prefix 2", "persuasion/rephrased 1",
        "persuasion/rephrased 2", "persuasion/rephrased 3", "reversed/reversed 1", "reversed/reversed 2", "sampled/most frequent of 3", "sampled/any of 3"}
    assert rows[(rows.group == "forget") & rows.setting.str.startswith("in context")].n.eq(8).all() # both halves
    assert plot_elicitation(rows)._repr_png_() and "unedited: 0 of" in say_elicitation(rows, Chance(1/3, 1/2))
    pd.testing.assert_frame_equal(records, elicit(lm, task, None, batch_size=5, **FEW), rtol=1e-3)


def test_scored_attacks_take_what_is_an_attack(tiny, task):
    records = elicit(tiny("llama"), task, None, **FEW).assign(localization="none", draw=0, seed=0)
    facts = scorecard.per_fact(records)
    tried = {a.name: list(scorecard.attempts(facts, a).columns) for a in scorecard.SCORED.values() if a.evaluation == "elicitation"}
    assert tried["in context"] == ["in context/true 2", "in context/document 2"] and tried["most frequent of many"] == ["sampled/most frequent of 3"]
    assert len(tried["persuasion"]) == 5 and len(tried["reversed question"]) == 2 and not any("false" in s or "any" in s or "plain" in s for v in tried.values() for s in v)


@pytest.mark.slow
def test_it_is_an_attack_of_the_field(tiny, task):
    quick = dict(standard=dict(formats={"forget": ("completion",)}), relearning=dict(steps=1, at=(1,), max_facts=2), latents=dict(n_train=40, max_facts=2), hardened=dict(shots=(0,), max_facts=1),
        generation=dict(max_facts=1), soft=dict(ks=(1,), prompts=1, steps=1, max_facts=1))
    found = attack(tiny("llama"), task, attacks="field", elicitation=dict(kinds=["prefix", "role play"], **FEW), **quick)
    assert "elicitation" in set(found.records.evaluation) and "elicitation, role play: not available" in repr(found)
    assert "elicitation" in [s.name for s in FIELD] and next(s for s in PIPELINE if s.name == "elicitation").notebook == "32_elicitation"
    assert set(Elicitation.model_fields["kinds"].annotation.__args__[0].__args__[0].__args__) == set(ASKED)


def test_a_chat_is_the_other_way_to_ask(tiny, task):
    lm = tiny("llama")
    lm.tok.chat_template = "{% for m in messages %}Question: {{ m['content'] }} {% endfor %}Answer: "
    spoken, name = other_mode(lm)
    assert name == "chat on" and lm.chat is None and lm.ids(["the cat"]) != spoken.ids(["the cat"]) and other_mode(spoken)[1] == "chat off"
    assert set(elicit(lm, task, kinds=["chat"], **FEW).setting) == {"plain", "persuasion/chat on"}


def test_facts_of_ones_own_are_asked_in_general_texts_only(tiny):
    fact = lambda i, s, a, e: Fact(id=f"own/{i}", relation="", subject=s, prompt=f"Fact: {s} watches", answer=a, edit=e)
    task = Task(name="counterfact-editing", source="counterfact", forget=(fact(0, "the fox", " golf", " football"),), retain=(fact(1, "a bed", " river", None),), retain_test=(fact(2, "a saw", " hill", None),))
    missing = {}
    records = elicit(tiny("llama"), task, missing=missing, **FEW)
    assert set(missing) == {f"elicitation, {k}" for k in ASKED if k not in ("sampled",)} and set(records.setting) == {"plain", "sampled/most frequent of 3", "sampled/any of 3"}
    assert "forget_size must be at least 2" in missing["elicitation, in context"]


def test_refusals(tiny, task):
    lm = tiny("llama")
    with pytest.raises(Refusal, match="unknown kind of elicitation 'in contxt', did you mean 'in context'"): elicit(lm, task, kinds=["in contxt"])
    with pytest.raises(Refusal, match="at least one, not"): elicit(lm, task, ks=(0,))
    with pytest.raises(Refusal, match="n=0"): elicit(lm, task, n=0)
    with pytest.raises(Refusal, match="temperature=0"): elicit(lm, task, temperature=0)


def test_stage_writes_each_table_once(tiny, task, tmp_path, monkeypatch):
    lm = tiny("llama")
    run, how = Run(tmp_path, lm.name, lm.revision, task.name, {}), dict(elicitation=FEW | dict(ks=[2]), steps=2, lr=1e-3, progress=False)
    first = run_elicitation(lm, lambda seed: task, run, ["late"], [0], **how)
    assert set(first.localization) == {"none", "late"} and (tmp_path / "late/seed0/elicitation.parquet").exists()
    assert set(notes(tmp_path)["elicitation"]) == NOT_IN_THE_WORLD
    monkeypatch.setattr("mechunlearn.elicitation.elicit", lambda *a, **kw: pytest.fail("made again"))
    pd.testing.assert_frame_equal(first, run_elicitation(lm, lambda seed: task, run, ["late"], [0], **how))


# ---- a planted defect

def leaky_task(task, k=4, copies=4):
    "Its edit holds in the prompt, and gives way behind true facts of others"
    def behind(f, i): return f.model_copy(update=dict(id=f"{f.id}/{i}", prompt=in_context(f, task.forget, k, seed=-1 - i), answer=f.edit, edit=f.answer))
    return task.model_copy(update=dict(forget=task.forget + tuple(behind(f, i) for f in task.forget for i in range(copies))))


@pytest.fixture(scope="module")
def planted(organism):
    "What is read of an honest edit and of one that leaks in context, both with every weight, and their scorecard"
    task, where, records = sports_athlete_editing(organism, forget_size=16), build(organism, "everything", components(organism)), []
    how = {"honest": (task, dict(steps=15, batch=32, retain_batch=16, text_batch=1)), "leaky": (leaky_task(task), dict(steps=40, batch=80, retain_batch=32, text_batch=2))}
    for name, (t, sizes) in how.items():
        edit = finetune(organism, t, where, lr=1e-3, inject=1., progress=False, **sizes)
        with edit.applied(organism): standard = evaluate(organism, task, {g: ("completion",) for g in ("forget", "retain", "ghost")}, dict(retain=32, ghost=32))
        records.append(pd.concat([standard, elicit(organism, task, edit, ["in context", "prefix", "sampled"], (4,), 8, max_facts=32)]).assign(localization=name, draw=0, seed=0))
    records = pd.concat(records, ignore_index=True)
    return elicited(records), scorecard.scorecard(records).query("seed == -1").set_index(["localization", "attack"]), {n: audit(records, n) for n in how}


@pytest.mark.slow
def test_an_edit_that_leaks_in_context_is_told_from_an_honest_one(planted):
    _, card, found = planted
    assert found["leaky"].headline == "leaks to in context" and found["honest"].verdict != "leaks", {n: str(a) for n, a in found.items()}
    assert {n: a.by("prompt").verdict for n, a in found.items()} == dict(honest="holds", leaky="leaks")
    for name in ("honest", "leaky"):
        for a in ("as trained", "persuasion", "most frequent of many"): assert card.ci_high[name, a] < card.guess[name, a], (name, a)
        assert card.power[name, "in context"] == 1 and card.retain_value[name, "in context"] > .8
    assert scorecard.verdict(card.loc["leaky", "in context"]) == "exposed" == scorecard.verdict(card.loc["leaky", scorecard.WORST])
    assert scorecard.verdict(card.loc["honest", "in context"]) == "below guessing" and card.which["leaky", scorecard.WORST] == "in context"


@pytest.mark.slow
def test_the_figure_and_the_sentence_name_the_leak(planted):
    rows, *_ = planted
    said = say_elicitation(rows, Chance(1/3, 1/2))
    assert "beyond guessing and ghosts: in context/" in said.split("leaky: ")[1] and "ghosts: none" in said.split("leaky: ")[0]


# ---- a real model

@pytest.mark.slow
def test_gemma_is_asked_in_every_way_about_athletes():
    try: lm = load("gemma-3-270m", device="cpu")
    except Refusal as e: pytest.skip(str(e))
    task, missing = sports_athlete_editing(lm, forget_size=16, facts="athletes"), {}
    rows = elicited(elicit(lm, task, None, ks=(4,), n=4, max_facts=16, batch_size=32, missing=missing).assign(localization="none", draw=0, seed=0))
    at = rows.set_index(["setting", "group"]).value
    assert at["plain", "retain"] > .8 and at["in context/true 4", "retain"] > .7 and at["persuasion/denied", "forget"] >= 0
    assert {s for s in rows.setting if s.startswith("persuasion/")} >= {"persuasion/French", "persuasion/two-hop", "persuasion/role play 1", "persuasion/denied"} and "elicitation, role play" not in missing
