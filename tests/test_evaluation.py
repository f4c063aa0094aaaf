import numpy as np, pandas as pd, pytest, torch
from mechunlearn import evaluation as E
from mechunlearn.evaluation import FORMATS, evaluate, questionnaire, run_evaluation
from mechunlearn.jobs import labelled
from mechunlearn.questions import RECORD, answer, as_records, completions, multiple_choice, paraphrases, some, text_loss
from mechunlearn.facts import LETTERS, Fact
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.stats import over_seeds, summarise
from mechunlearn.store import Run, load_table

FEW = {g: 2 for g in FORMATS if g != "text"}


@pytest.fixture(scope="module")
def small(tiny):
    "A tiny model and a task of the world."
    lm = tiny("qwen3")
    task = sports_athlete_editing(lm, forget_size=4)
    return lm, task.model_copy(update=dict(text_train=task.text_train[:20], text_test=task.text_test[:5]))


def last(lm, prompt):
    "Probabilities after one unpadded prompt."
    with torch.no_grad(): return lm.hf(torch.tensor(lm.ids([prompt]))).logits[0, -1].float().softmax(-1)


# ---- answers

def test_probabilities_are_those_of_a_plain_forward(lm):
    task = sports_athlete_editing(lm, forget_size=3)
    asked = completions(task.forget, "forget") + paraphrases(task.forget, "forget") + completions(task.same_subject, "same-subject")
    records = answer(lm, asked, batch_size=4)
    assert len({len(q.choices) for q in asked}) > 1     # relations with fewer and with more candidates in one call
    for q, r in zip(asked, records.itertuples()):
        p, ids = last(lm, q.prompt), [lm.first_token(w) for w in q.choices]
        assert r.full_truth == pytest.approx(float(p[lm.first_token(q.truth)]), rel=1e-3)
        assert r.prob_truth == pytest.approx(float(p[lm.first_token(q.truth)] / p[ids].sum()), rel=1e-3)
        assert r.top1_truth == (int(p.argmax()) == lm.first_token(q.truth))
        if q.edit: assert r.prob_edit == pytest.approx(float(p[lm.first_token(q.edit)] / p[ids].sum()), rel=1e-3)
        else: assert pd.isna(r.edit) and pd.isna(r.prob_edit) and pd.isna(r.top1_edit)


def test_multiple_choice_is_scored_by_letters(small):
    lm, task = small
    asked = multiple_choice(task, task.forget, "forget")
    assert len(asked) == 4 * len(task.forget)
    for q, r in zip(asked, answer(lm, asked).itertuples()):
        p, options = last(lm, q.prompt), q.prompt.rsplit("Question:", 1)[1]
        letters = torch.tensor([float(p[lm.token_id(w)]) for w in LETTERS])
        assert f"{q.truth.strip()}:{q.fact.answer}" in options and f"{q.edit.strip()}:{q.fact.edit}" in options
        assert r.compliance == pytest.approx(float(letters.sum()), rel=1e-3)
        assert r.prob_edit == pytest.approx(float(letters[LETTERS.index(q.edit)] / letters.sum()), rel=1e-3)
        assert r.top1_truth == (LETTERS[int(letters.argmax())] == q.truth)


def test_every_letter_is_the_truth_equally_often(small):
    lm, task = small
    asked = multiple_choice(task, task.retain_test[:6])
    assert all([q.truth for q in asked].count(letter) == 6 for letter in LETTERS)


def test_top1_of_a_completion_is_over_the_whole_vocabulary(small):
    lm, task = small
    q = completions(task.forget[:1])[0]
    best = lm.tok.convert_ids_to_tokens(int(last(lm, q.prompt).argmax()))
    sure = Fact(id="x", relation="sport", subject=q.fact.subject, prompt=q.prompt, answer=" " + best, candidates=(" " + best, " golf"))
    unlike = sure.model_copy(update=dict(answer=" golf"))
    got = answer(lm, completions([sure, unlike]))
    assert got.top1_truth.tolist() == [True, False] and got.prob_truth[0] > .5


def test_records_have_their_columns_and_types_even_when_empty(small, tmp_path):
    lm, task = small
    full, empty = answer(lm, completions(task.forget), evaluation="relearning", step=3), answer(lm, [])
    assert list(full) == list(empty) == list(RECORD) and full.dtypes.equals(empty.dtypes)
    assert (full.step == 3).all() and full.layer.isna().all()
    full.to_parquet(tmp_path / "r.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "r.parquet"), full)


# ---- text

def test_text_loss_is_that_of_each_text_alone(lm):
    texts = ["the bright fox watches a river .", "a .", "some tall deers like the market and then the saw sees every bed ."]
    got = text_loss(lm, texts, batch_size=2)
    for text, r in zip(texts, got.itertuples()):
        ids = torch.tensor(lm.ids([text]))
        with torch.no_grad(): own = float(lm.hf(ids, labels=ids).loss)
        assert r.loss == pytest.approx(own, rel=1e-4) and r.n_tokens == ids.shape[1] - 1


# ---- who is asked

def test_some_is_fixed_nested_and_in_order(small):
    facts = list(small[1].retain_test)
    few, more = some(facts, 7), some(facts, 30)
    assert len(few) == 7 and set(f.id for f in few) < set(f.id for f in more)
    assert [f.id for f in some(facts[::-1], 7)] == [f.id for f in few][::-1]
    assert some(facts, None) == some(facts, 10**6) == facts


def test_questionnaire_holds_the_groups_and_formats_asked_for(small):
    task = small[1]
    asked = questionnaire(task, {"forget": ("completion",), "ghost": ("mcq",)}, {"ghost/mcq": 2, "ghost": 50})
    assert [(q.group, q.format) for q in asked] == [("forget", "completion")] * 4 + [("ghost", "mcq")] * 8
    limit = questionnaire(task, max_facts={"retain": 6, "retain/mcq": 3})
    count = lambda f: len({q.fact.id for q in limit if (q.group, q.format) == ("retain", f)})
    assert (count("completion"), count("paraphrase"), count("mcq")) == (6, 6, 3)


def test_evaluate_asks_every_group_and_the_texts(small):
    lm, task = small
    records = evaluate(lm, task, max_facts=FEW)
    assert set(zip(records.group, records.format)) == {(g, f) for g in [*task.groups(), "text"] for f in FORMATS[g]}
    assert (records.evaluation == "standard").all() and records.duplicated(["fact", "group", "format", "variant"]).sum() == 0
    assert "text" not in set(evaluate(lm, task, {"forget": ("completion",)}).group)


# ---- summaries

def rows(**columns):
    "Pooled rows with intervals of some records."
    records = as_records(pd.DataFrame(columns).to_dict("records"), evaluation="standard", group="forget", format="mcq", truth=" A", edit=" B")
    return summarise(labelled(records)).query("seed == -1")


def test_a_fact_counts_once_however_often_it_is_asked():
    row, = rows(fact=["a", "a", "a", "a", "b"], top1_truth=[True, False, False, False, True]).to_dict("records")
    assert row["n"] == 2 and row["value"] == pytest.approx((.25 + 1) / 2) and row["measure"] == "top1" and row["answer"] == "truth"


def test_summary_tells_steps_layers_and_missing_apart():
    got = rows(fact=["a", "b"] * 3, prob_truth=[0., 1, 1, 1, .5, .5], step=[0, 0, 5, 5, None, None])
    assert got.value.tolist() == [.5, 1, .5] and got.step.isna().tolist() == [False, False, True]


def test_what_no_row_has_is_not_a_metric():
    got = rows(fact=["a", "b"], prob_truth=[.2, .4], compliance=[.9, None])
    assert list(zip(got.measure, got.n)) == [("prob", 2), ("compliance", 1)] and got.answer.isna().tolist() == [False, True]


@pytest.mark.parametrize("measure", ["top1", "prob", "loss"])
@pytest.mark.parametrize("values", [[0.] * 5, [1.] * 5, [0., .25, 1.], [.5]])
def test_intervals_hold_their_value(values, measure):
    n = len(values)
    value, low, high = over_seeds(values, [0] * n, share=measure != "loss")
    none = measure == "loss" and len(set(values)) == 1                 # nothing varies
    assert np.isnan(low) and np.isnan(high) if none else low <= value <= high and low < high


def test_labels_say_of_which_edit_records_are():
    records = as_records([dict(fact="a", top1_truth=True)])
    assert labelled(records, "random-mlps#2", 3)[["localization", "draw", "seed"]].values.tolist() == [["random-mlps", 2, 3]]
    assert labelled(records)[["localization", "draw", "seed"]].values.tolist() == [["none", 0, 0]]


# ---- the stage

def test_stage_writes_records_once(small, tmp_path, monkeypatch):
    lm, task = small
    run = Run(tmp_path / "run", lm.name, lm.revision, task.name, task.options)
    go = lambda: run_evaluation(lm, lambda seed: task, run, ["late"], [0], max_facts=FEW, lr=1e-3, steps=2, progress=False)
    first = go()
    assert set(first.localization) == {"none", "late"}
    records = {name: load_table(run.path(name, "seed0", "evaluation.parquet")) for name in ("none", "late")}
    assert not records["none"].full_truth.equals(records["late"].full_truth)
    (run.path("late", "seed0", "edit.safetensors")).unlink()      # a finished record does not need its edit

    def never(*a, **k): raise AssertionError("computed again")
    monkeypatch.setattr(E, "evaluate", never)
    pd.testing.assert_frame_equal(go(), first)
    with pytest.raises(AssertionError):                            # other causes: computed again
        run_evaluation(lm, lambda seed: task, run, ["late"], [0], max_facts={"forget": 1}, lr=1e-3, steps=2, progress=False)
