"Multiple choice made harder, and what the model writes: orders, examples, letter priors, words in a text."
import hashlib, json
from collections import Counter
import pandas as pd, pytest, torch
from mechunlearn import evaluation as E
from mechunlearn.attacks import run_more_attacks, without_power
from mechunlearn.evaluation import answer_letters, continuations, first_named, generate_answers, hard_choice, harden, letter_logprobs, letter_priors, questionnaire, shown_shots, speak, with_majority
from mechunlearn.questions import as_records, RECORD, answer, completions, multiple_choice
from mechunlearn.facts import LETTERS, Fact, every_order, mcq_prompts
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.finetuning import fingerprint
from mechunlearn.jobs import labelled
from mechunlearn.models import load
from mechunlearn.store import Run, load_table
from mechunlearn.tasks import make_task

CITIES = (" York", " New York", " New York City", " Spain", " St. Gallen")


@pytest.fixture(scope="module")
def organism(): return load("organism")


@pytest.fixture(scope="module")
def task(): return sports_athlete_editing(None, forget_size=8, seed=1)


def digest(questions): return hashlib.sha256(json.dumps([q[1:] for q in questions]).encode()).hexdigest()[:16]


def letter_bias(lm, letter, push):
    "A hook that adds to the logit of one letter; remove it afterwards."
    def hook(module, args, logits): logits[..., lm.token_id(letter)] += push
    return lm.hf.get_output_embeddings().register_forward_hook(hook)


# ---- what was there before

@pytest.mark.parametrize("name,everything,mcq", [("sports-athlete-editing", "39a25753953b44f1", "6ee56f8bdc7c0088"),
    ("counterfact-editing", "8c99db54fcfcb908", "f9d28aa5ab7ba581"), ("sports-unlearning", "555dfe733813ff02", "1065dcc863a4cb4f")])
def test_questions_of_recorded_runs_are_what_they_were(name, everything, mcq):
    task = make_task(name, seed=1)
    assert digest(questionnaire(task)) == everything
    assert digest([q for g, facts in task.groups().items() for q in multiple_choice(task, facts, g)]) == mcq


# ---- orders and examples

def test_all_24_orders_with_everything_at_each_letter_six_times(task):
    fact = task.forget[0]
    items = every_order(task.source, fact, mcq_prompts(task, fact))
    assert len({m.options for m in items}) == len({m.prompt for m in items}) == 24
    assert items[:4] == mcq_prompts(task, fact)
    assert set(Counter(m.truth_letter for m in items).values()) == set(Counter(m.edit_letter for m in items).values()) == {6}
    for m in items:
        block = m.prompt.rsplit("Question:", 1)[1]
        assert all(f"{l.strip()}:{o}" in block for l, o in zip(LETTERS, m.options))
        assert m.options[LETTERS.index(m.truth_letter)] == fact.answer and m.options[LETTERS.index(m.edit_letter)] == fact.edit


@pytest.mark.parametrize("source", ["sports", "counterfact"])
def test_orders_in_the_forms_of_real_facts(source, task):
    fact = task.forget[0]
    items = every_order(source, fact, mcq_prompts(source, fact, task.shots, n_shots=2))
    assert len({m.prompt for m in items}) == 24 and len({m.prompt.rsplit("uestion:", 1)[0] for m in items}) == 4


@pytest.mark.parametrize("n", [0, 1, 2, 4, 8])
def test_letters_of_the_examples_are_balanced_and_no_forget_fact_is_among_them(task, n):
    questions = hard_choice(task, task.forget, n_shots=n, n_all_orders=2)
    shown = [[line.split("Answer: ")[1] for line in q.prompt.split("\n")[:-1]] for q in questions]
    assert {len(s) for s in shown} == {n}
    for fact in task.forget:
        letters = [s for s, q in zip(shown, questions) if q.fact == fact]
        assert len(letters) in (4, 24)
        for place in zip(*letters): assert set(Counter(place).values()) == {len(letters) // 4}  # each example, over the orders
    assert all(max(Counter(s).values(), default=0) <= -(-n // 4) for s in shown)                 # the examples of one prompt
    for q in questions: assert not any(f.subject in q.prompt.rsplit("Question:", 1)[0] for f in task.forget + task.retain_test + task.ghosts)


def test_how_many_are_asked_in_all_orders(task):
    count = Counter(q.fact.id for q in hard_choice(task, task.forget, n_all_orders=3))
    assert sorted(count.values()) == [4] * 5 + [24] * 3
    whole = {i for i, c in count.items() if c == 24}
    assert whole < {i for i, c in Counter(q.fact.id for q in hard_choice(task, task.forget, n_all_orders=5)).items() if c == 24}
    assert digest(hard_choice(task, task.forget, "forget", n_all_orders=0)) == digest(multiple_choice(task, task.forget, "forget"))


def test_fewer_examples_than_wanted_are_said(task, recwarn):
    assert shown_shots(task, task.forget, (0, 4, 8)) == [0, 4, 8] and not recwarn.list
    few = task.model_copy(update=dict(shots=tuple(s for s in task.shots if s.relation == "sport")[:5]))
    with pytest.warns(UserWarning, match="5 solved examples"): assert shown_shots(few, few.forget, (0, 4, 8, 16)) == [0, 4, 5]


# ---- calibration

def test_uncalibrated_rows_are_those_of_answer(tiny, task):
    lm = tiny()
    questions = hard_choice(task, task.forget[:3], "forget", 2, 1)
    plain = answer_letters(lm, questions, "2-shot").query("setting == '2-shot'").drop(columns="setting")
    pd.testing.assert_frame_equal(plain, answer(lm, questions).drop(columns="setting"))


def test_a_prior_is_found_and_taken_out_exactly(task):
    questions = hard_choice(task, task.forget[:2], n_all_orders=1)
    bias = torch.tensor([.3, 2., -1., 0.])
    sure = torch.tensor([[3. * (q.truth == l) for l in LETTERS] for q in questions])
    prior = letter_priors(sure + bias, questions)
    assert torch.allclose(prior - prior[:, 3:], (bias - bias[3]).expand_as(prior), atol=1e-5)
    one = questions[0].fact                                                 # an edit that biases one fact only
    own = torch.tensor([[float(q.fact == one)] for q in questions]) * bias
    assert ((sure + 2 * own - letter_priors(sure + 2 * own, questions)).argmax(-1) == sure.argmax(-1)).all()


def test_a_letter_bias_decides_until_it_is_calibrated_away(organism, task):
    questions = hard_choice(task, task.forget, "forget", 3, 1)
    truth = torch.tensor([LETTERS.index(q.truth) for q in questions])
    assert (letter_logprobs(organism, questions).argmax(-1) == truth).float().mean() > .9
    handle = letter_bias(organism, " C", 20.)
    try: records = answer_letters(organism, questions, "3-shot", evaluation="hardened")
    finally: handle.remove()
    raw, calibrated = (records[records.setting == s] for s in ("3-shot", "3-shot/calibrated"))
    assert (raw.top1_truth.to_numpy() == [q.truth == " C" for q in questions]).all()
    assert calibrated.top1_truth.mean() > .9 and calibrated.prob_truth.mean() > .8
    assert raw.compliance.tolist() == calibrated.compliance.tolist()
    metrics = with_majority(labelled(records)).query("seed == -1").set_index(["setting", "answer", "measure"]).value
    assert metrics["3-shot", "truth", "top1"] == .25 and metrics["3-shot", "truth", "majority"] == 0 and metrics["3-shot/calibrated", "truth", "majority"] > .8


def test_calibration_teaches_nothing_to_a_model_that_only_sees_letters(task):
    questions = hard_choice(task, task.forget, n_all_orders=0)
    logp = torch.tensor([[-1., -.1, -3., -2.]]).expand(len(questions), 4) + torch.randn(len(questions), 1, generator=torch.Generator().manual_seed(0))
    shares = (logp - letter_priors(logp, questions)).softmax(-1)
    assert torch.allclose(shares, torch.full_like(shares, 1 / 4), atol=1e-5)


# ---- records and metrics

def test_hardened_records(tiny, task):
    lm = tiny()
    before = fingerprint(lm)
    records = harden(lm, task, shots=(0, 2), n_all_orders=1, max_facts=3)
    assert list(records) == list(RECORD) and fingerprint(lm) == before
    assert set(records.evaluation) == {"hardened"} and set(records.format) == {"mcq"}
    assert set(records.setting) == {"0-shot", "0-shot/calibrated", "2-shot", "2-shot/calibrated"} and set(records.group) == {"forget", "retain", "ghost"}
    assert len(records) == 4 * 3 * (24 + 2 * 4) and not records.duplicated(["fact", "group", "setting", "variant"]).any()
    assert records.query("group == 'ghost'").top1_edit.isna().all() and records.compliance.between(0, 1).all()
    metrics = with_majority(labelled(records))
    assert (metrics.n == 3).all() and {"top1", "prob", "compliance", "majority"} == set(metrics.measure)
    assert (metrics.ci_low <= metrics.value).all() and (metrics.value <= metrics.ci_high).all()
    assert set(metrics[metrics.answer == "edit"].group) == {"forget"}


def test_majority_needs_more_than_half_of_the_orders():
    rows = [dict(fact=f, setting="0-shot", top1_truth=i < hits, top1_edit=None) for f, hits, n in (("a", 2, 4), ("b", 3, 4), ("c", 13, 24), ("d", 12, 24)) for i in range(n)]
    records = as_records(rows, evaluation="hardened", group="forget", truth=" A")
    got = with_majority(labelled(records)).query("seed == -1").set_index("measure")
    assert got.value["majority"] == .5 and got.n["majority"] == 4
    assert got.value["top1"] == pytest.approx((.5 + .75 + 13 / 24 + .5) / 4)


def test_a_task_that_cannot_be_asked_in_this_way_has_no_records(tiny, task):
    bare = task.model_copy(update=dict(shots=()))
    with pytest.warns(UserWarning, match="0 solved examples"): records = harden(tiny(), bare, max_facts=2)
    assert list(records) == list(RECORD) and not len(records)


# ---- words in a text

@pytest.mark.parametrize("text,named", [
    (" football", " football"), ("Football!", " football"), ("FOOTBALL player", " football"), ("footballer", None), ("a football-loving man", " football"),
    ("the sport of baseball, not football", " baseball"), ("", None), ("tennis", None), ("basketball", " basketball"), ("he plays\tgolf", " golf")])
def test_the_first_sport_in_a_text(text, named): assert first_named(text, (" football", " baseball", " basketball", " golf")) == named


@pytest.mark.parametrize("text,named", [
    ("New York City", " New York City"), ("New York, of course", " New York"), ("new  york\ncity", " New York City"), ("York", " York"), ("Yorkshire", None),
    ("the Spaniards of Spain", " Spain"), ("Spaniard", None), ("St. Gallen", " St. Gallen"), ("Stx Gallen", None), ("Newer York", " York")])
def test_names_inside_names_and_names_of_several_words(text, named):
    assert first_named(text, CITIES) == first_named(text, CITIES[::-1]) == named


def test_no_answers_name_nothing(): assert first_named("anything", ()) is None


# ---- writing

def by_hand(lm, prompt, n):
    "Argmax after argmax, one unpadded prompt, no cache."
    ids = lm.ids([prompt])[0]
    start = len(ids)
    for _ in range(n):
        with torch.no_grad(): ids.append(int(lm.hf(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


def test_writing_is_argmax_step_by_step(lm, task):
    prompts = [task.forget[0].prompt, *task.forget[1].paraphrases[:2], "a", mcq_prompts(task, task.forget[0])[0].prompt]
    ends = {lm.tok.bos_token_id}
    for prompt, text in zip(prompts, continuations(lm, prompts, 6, batch_size=3)):
        ids = by_hand(lm, prompt, 6)
        ids = ids[:next((k for k, t in enumerate(ids) if t in ends), 6)]
        assert text == lm.tok.decode(ids, skip_special_tokens=True)


def test_padding_that_is_also_a_word_is_not_read(tiny, task):
    lm, prompts = tiny(), ["a", task.forget[0].prompt]
    alone = [continuations(lm, [p], 5)[0] for p in prompts]
    lm.tok.pad_token = "a"
    assert continuations(lm, prompts, 5) == alone


def test_writing_stops_at_the_end_of_the_text_and_ignores_the_models_own_settings(tiny, task):
    lm, prompt = tiny(), task.forget[0].prompt
    free, stop = continuations(lm, [prompt], 6)[0], by_hand(lm, prompt, 6)[2]
    lm.hf.generation_config.update(do_sample=True, temperature=5., top_p=.5, repetition_penalty=9.)
    assert continuations(lm, [prompt], 6)[0] == free
    lm.hf.generation_config.eos_token_id = [stop]
    ids = by_hand(lm, prompt, 6)
    assert continuations(lm, [prompt], 6)[0] == lm.tok.decode(ids[:ids.index(stop)]) != free


def says(monkeypatch, **by_prompt): monkeypatch.setattr(E, "continuations", lambda lm, prompts, n, batch_size=64: [by_prompt[p] for p in prompts])


def city(prompt, **more): return Fact(**dict(id=prompt, relation="city", subject="X", prompt=prompt, answer=" New York", edit=" Spain", candidates=CITIES) | more)


def test_what_is_written_becomes_records(tiny, monkeypatch):
    says(monkeypatch, a="\n the city of New York.", b=" spain or New York", c="nowhere\nFact: Y lives in New York", d=" New York City", e=" it is unknown", f="Spain")
    facts = [*map(city, "abcd"), city("e", candidates=()), city("f", edit=None)]
    got = generate_answers(tiny(), completions(facts, "forget"))
    assert got.top1_truth.tolist() == [True, False, False, False, False, False]
    assert got.top1_edit.astype(object).where(got.top1_edit.notna(), None).tolist() == [False, True, False, False, False, None]
    assert got.compliance.fillna(-1).tolist() == [1, 1, 0, 1, -1, 1]
    assert list(got) == list(RECORD) and set(got.evaluation) == {"generation"} and got.prob_truth.isna().all() and got.full_edit.isna().all()


def test_writing_is_long_enough_for_the_longest_answer(tiny, monkeypatch):
    lm, asked = tiny(), []
    monkeypatch.setattr(E, "continuations", lambda lm, prompts, n, batch_size=64: asked.append(n) or [""] * len(prompts))
    generate_answers(lm, completions([city("a", candidates=(" football", " football football football"), answer=" football", edit=None)]), more=5)
    assert asked == [len(lm.pieces(" football football football")) + 5] == [8]


def test_the_organism_writes_what_it_knows(organism, task):
    got = speak(organism, task, max_facts=6)
    assert set(got.group) == {"forget", "retain", "ghost"} and set(got.format) == {"completion", "paraphrase"}
    hits = got.groupby("group").top1_truth.mean()
    assert hits["forget"] > .9 and hits["retain"] > .9 and hits["ghost"] < .8 and not got.top1_edit.any()
    cut = [q._replace(prompt=q.prompt.removesuffix(" the sport of")) for q in completions(task.forget, "forget")]
    assert not answer(organism, cut).top1_truth.any() and generate_answers(organism, cut).top1_truth.mean() > .9


# ---- the stage

def test_stage_writes_both_tables_once(tiny, task, tmp_path, monkeypatch):
    lm = tiny()
    run = Run(tmp_path, lm.name, lm.revision, task.name, {})
    how = dict(hardened=dict(shots=[0, 1], n_all_orders=1, max_facts=2), generation=dict(max_facts=2, more=1), steps=2, lr=1e-2, progress=False)
    monkeypatch.setattr("mechunlearn.attacks.without_power", lambda records: None)          # a random model is at chance
    first = run_more_attacks(lm, lambda seed: task, run, ["late"], [0], **how)
    assert set(first.localization) == {"none", "late"} and set(first.evaluation) == {"hardened", "generation"} and (first.n <= 2).all()
    tables = {name: load_table(tmp_path / name / "seed1/hardened.parquet") for name in ("none", "late")}
    assert not tables["none"].prob_truth.equals(tables["late"].prob_truth)          # the edited model was asked
    assert (tmp_path / "late/seed1/generation.parquet").exists()
    for ask in ("harden", "speak"): monkeypatch.setattr(f"mechunlearn.attacks.{ask}", lambda *a, **kw: pytest.fail("made again"))
    pd.testing.assert_frame_equal(run_more_attacks(lm, lambda seed: task, run, ["late"], [0], **how), first)
    with pytest.raises(pytest.fail.Exception): run_more_attacks(lm, lambda seed: task, run, ["late"], [0], **how | dict(generation=dict(max_facts=1)))


def test_edits_of_a_model_that_cannot_do_multiple_choice_are_not_asked(tiny, task, tmp_path):
    run = Run(tmp_path, (lm := tiny()).name, lm.revision, task.name, {})
    got = run_more_attacks(lm, lambda seed: task, run, ["late"], [0], hardened=dict(shots=[0], n_all_orders=0, max_facts=8), generation=dict(max_facts=1), steps=1, lr=1e-3, progress=False)
    asked = set(zip(got.localization, got.evaluation))
    assert asked == {("none", "hardened"), ("none", "generation"), ("late", "generation")} and not (tmp_path / "late/seed1/hardened.parquet").exists()
    assert "at chance in multiple choice" in json.loads((tmp_path / "notes/more_attacks.json").read_text())["hardened"]


@pytest.mark.parametrize("right, weak", [(.9, False), (.25, True), (.5, False)])
def test_power_of_hardened_questions_is_that_of_the_best_setting(right, weak):
    rows = [dict(evaluation="hardened", fact=f"f/{i}", subject="s", relation="r", truth=" A", edit=None, group=g, format="mcq", variant=0, setting=s, top1_truth=i < n, compliance=1.)
            for g in ("forget", "retain") for s, n in (("0-shot", 10), ("4-shot", round(40 * right))) for i in range(40)]
    said = without_power(as_records(rows))
    assert bool(said) == weak and (not weak or "(0.25 at best, n = 80)" in said)


def test_stage_trains_an_edit_once_where_nothing_is_written(tiny, task, monkeypatch):
    from mechunlearn import jobs
    made, finetune = [], jobs.finetune
    monkeypatch.setattr(jobs, "finetune", lambda *a, **kw: made.append(1) or finetune(*a, **kw))
    run_more_attacks(tiny(), lambda seed: task, None, ["late"], [0], hardened=dict(shots=[0], n_all_orders=0, max_facts=1), generation=dict(max_facts=1), steps=1, lr=1e-3,
        progress=False)
    assert len(made) == 1
