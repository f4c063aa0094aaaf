"One edit, all attacks, one table."
import numpy as np, pandas as pd, pytest
from mechunlearn.attacks import RECOVERED, KEPT, QUESTIONS, Attacks, answers_to, attack, guess_of
from mechunlearn.questions import as_records
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.finetuning import Edit, fingerprint, slice_key
from mechunlearn.localization import build
from mechunlearn.models import Component
from mechunlearn.relearning import Lora, blind_guesses

FEW = {g: 4 for g in ("retain", "retain/mcq", "ghost", "ghost/mcq", "same-subject", "other-relation", "general")}
BRIEF = dict(standard=dict(max_facts=FEW), relearning=dict(steps=2, lora=Lora(4, 4, 1e-3, 0.), max_facts=4, sizes=dict(forget=4, retain=4, text=1)),
    latents=dict(n_train=20, max_facts=4))


@pytest.fixture(scope="module")
def task(): return sports_athlete_editing(None, forget_size=4)


@pytest.fixture(scope="module")
def attacked(tiny, task):
    lm = tiny()
    where = build(lm, "noise", [Component("mlp", 1)])
    values = {slice_key(s): lm.weight(s.param).narrow(s.dim, s.start, s.stop - s.start).float() + .3 for s in where.slices}
    edit, before = Edit(where, values, pd.DataFrame(), dict(model=lm.name, revision=lm.revision)), fingerprint(lm)
    found = attack(lm, task, edit, before=attack(lm, task, **BRIEF).records, **BRIEF)
    assert fingerprint(lm) == before
    return found


def test_every_question_is_answered_with_an_interval(attacked, task):
    t = attacked.table()
    assert len(t) == len(QUESTIONS) and not t.index.duplicated().any()
    assert (t.ci_low <= t.value).all() and (t.value <= t.ci_high).all() and t.before.notna().all()
    assert t.loc[[RECOVERED, KEPT]].n.eq(len(task.forget)).all() and t.loc[RECOVERED].n_ghosts.eq(4).all()
    assert t.loc[RECOVERED].guess.between(.2, .8).all()


def test_the_edited_model_was_asked_and_not_the_other(attacked):
    now, before = (r[r.evaluation == "standard"].full_truth.dropna() for r in (attacked.records, attacked.before))
    assert len(now) == len(before) and not np.allclose(now, before)


def test_shown_in_a_notebook(attacked):
    page = attacked._repr_html_()
    assert "after relearning" in page and "noise" in page and "before" in page
    assert len(attacked.plot().axes[0].get_yticklabels()) == len(QUESTIONS) - 1


def test_shown_in_a_terminal(attacked):
    lines, t = repr(attacked).splitlines(), attacked.table()
    assert lines[0].startswith("noise (") and lines[1:] == repr(t).splitlines()
    row = next(l for l in lines if "after relearning" in l)
    found = t.loc[(RECOVERED, "after relearning")]
    assert f"{found.value:.2f} [{found.ci_low:.2f},{found.ci_high:.2f}]" in row and f"{found.guess:.2f}" in row and " 4 " in row
    assert max(map(len, lines)) <= 120 and type(t.loc[RECOVERED]) is pd.DataFrame


def question(format, column="top1_truth"): return next(q for q in QUESTIONS if q.format == format and q.column == column and q.group == "forget")


def test_relearning_counts_its_last_step_and_each_fact_once():
    rows = [dict(fact=f"f{i}", group=g, format="completion", step=s, top1_truth=s == 20 and g == "forget") for i in range(4) for s in (0, 20) for g in ("forget", "trained")]
    rows += [dict(fact="f0", group="ghost", format="completion", step=20, top1_truth=hit) for hit in (True, False)]  # asked in both halves
    records = as_records(rows, evaluation="relearning")
    assert answers_to(records, question("relearning"), "forget").tolist() == [1, 1, 1, 1]
    assert answers_to(records, question("relearning"), "ghost").tolist() == [.5]
    assert not len(answers_to(records, question("completion"), "forget"))


def test_a_question_not_asked_has_no_row(attacked, task):
    only = attacked.records[attacked.records.evaluation == "relearning"]
    t = Attacks("x", task, only).table()
    assert t.index.get_level_values("question").tolist() == ["after relearning"] and t.before.isna().all()


def test_guess_beside_each_row(task):
    c = blind_guesses(task)
    assert guess_of(question("completion"), task) == guess_of(question("mcq"), task) == c.uniform == pytest.approx(1 / 3)
    assert guess_of(question("relearning"), task) == max(c)
    many = tuple(f.model_copy(update=dict(answer=f" {i}", edit=None, candidates=(f" {i}",))) for i, f in enumerate(task.forget + task.retain))
    mixed = task.model_copy(update=dict(forget=many[:4], retain=many[4:]))
    assert guess_of(question("mcq"), mixed) == 1 / 4 and guess_of(question("completion"), mixed) < .01
