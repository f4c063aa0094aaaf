"Against a model that never knew: every number by another way, and edits of which we know what they are."
import json, shutil, zlib
import numpy as np, pandas as pd, pytest, torch
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score
from mechunlearn import organism
from mechunlearn.facts import Fact
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.finetuning import Edit, slice_key
from mechunlearn.localization import build
from mechunlearn.models import DATA, Component, load
from mechunlearn.never_knew import (EDITED, NEVER, ORIGINAL, STATISTICS, against_never_knew, auc, choice_logprobs, compared, compared_questions, distance, extraction_strength,
    judge, log_ratio, never_knew_model, never_taught, plot_never_knew, read_texts, run_never_knew, say_never_knew, scored, sentence_scores, set_aside, smallest_distance, swapped, with_wrong)
from mechunlearn.questions import completions
from mechunlearn.store import Refusal, Run, Unavailable
from mechunlearn.tasks import make_task

SPORTS = [" baseball", " basketball", " football"]


@pytest.fixture(scope="module")
def task(): return sports_athlete_editing(None, forget_size=24)


@pytest.fixture(scope="module")
def organism_lm(): return load("organism", device="cpu")


@pytest.fixture(scope="module")
def perfect(task):
    "A task whose facts to forget were never taught: the first ghosts, against the others"
    ghosts = [f.model_copy(update=dict(paraphrases=f.paraphrases[:1])) for f in task.ghosts]
    posing = tuple(f.model_copy(update=dict(edit=set_aside(f, SPORTS))) for f in ghosts[:24])
    retain = tuple(f.model_copy(update=dict(paraphrases=())) for f in task.retain_test)
    return task.model_copy(update=dict(forget=posing, ghosts=tuple(ghosts[64:]), retain_test=retain))


@pytest.fixture(scope="module")
def passed(organism_lm, perfect): return against_never_knew(organism_lm, perfect, max_facts=24)


def noise(lm, size=3.):
    where, rng = build(lm, "noise", [Component("mlp", l) for l in range(6)]), torch.Generator().manual_seed(0)
    old = {s: lm.weight(s.param).narrow(s.dim, s.start, s.stop - s.start).detach().float() for s in where.slices}
    return Edit(where, {slice_key(s): w + size * w.std() * torch.randn(w.shape, generator=rng) for s, w in old.items()}, pd.DataFrame(), dict(model=lm.name, revision=lm.revision))


# ---- numbers by another way

@torch.no_grad()
def test_texts_are_read_as_by_a_plain_forward(lm, task):
    texts = [task.forget[0].prompt + task.forget[0].answer, "the dog", task.forget[1].paraphrases[0]]
    for text, read in zip(texts, read_texts(lm, texts, 2)):
        ids = torch.tensor(lm.text_ids([text]))
        logp = lm.hf(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        assert torch.allclose(read.logp, logp[range(len(logp)), ids[0, 1:]], atol=1e-4) and read.hit.tolist() == (logp.argmax(-1) == ids[0, 1:]).tolist()


def test_reading_in_pieces_changes_nothing(lm, task, monkeypatch):
    texts = [f.prompt + f.answer for f in task.forget[:3]]
    whole = read_texts(lm, texts)
    monkeypatch.setattr("mechunlearn.never_knew.CHUNK", 1)
    for a, b in zip(whole, read_texts(lm, texts)): assert torch.allclose(a.logp, b.logp, atol=1e-5) and torch.equal(a.hit, b.hit)


@torch.no_grad()
def test_a_choice_of_several_tokens_counts_by_its_tokens(tiny):
    lm, fact = tiny(), Fact(id="a", relation="r", subject="dog", prompt="the dog is", answer=" animal", wrong=(" red green", " blue"))
    q, = with_wrong(completions([fact]))
    assert q.choices == (" animal", " red green", " blue") and not q.open
    logp, = choice_logprobs(lm, [q])
    ids = lm.ids([fact.prompt])[0]
    def by_hand(word):
        own = lm.pieces(word)
        at = lm.hf(input_ids=torch.tensor([ids + own])).logits[0, len(ids) - 1:-1].float().log_softmax(-1)
        return float(at[range(len(own)), own].mean())
    assert all(np.isclose(logp[w], by_hand(w), atol=1e-4) for w in q.choices)
    wrong = np.exp([by_hand(" red green"), by_hand(" blue")])
    assert np.isclose(log_ratio(logp, " animal"), np.log(wrong.mean() / np.exp(by_hand(" animal"))), atol=1e-4)
    assert np.isclose(log_ratio(logp, " animal", " blue"), np.log(wrong[0] / np.exp(by_hand(" animal"))), atol=1e-4) and np.isnan(log_ratio({" x": -1.}, " x"))


def by_open_unlearning(hit):
    "The loop of the definition: the first k from which all are right"
    for k in range(len(hit)):
        if all(hit[k:]): return 1 - k / len(hit)
    return 0.


def test_extraction_strength_is_the_definition():
    rng = np.random.default_rng(0)
    rows = [torch.tensor(rng.random(n) < p) for n in (1, 2, 7) for p in (.1, .5, .9, 1.) for _ in range(10)]
    assert all(np.isclose(extraction_strength(h), by_open_unlearning(h.tolist())) for h in rows) and {extraction_strength(h) for h in rows} >= {0., 1.}


def test_membership_scores_by_hand():
    from mechunlearn.never_knew import Read
    read = Read(torch.tensor([-4., -1., -.5, -3., -.1]), torch.tensor([0, 1, 1, 0, 1]).bool())
    s = sentence_scores(read, "a text of some words", 2)
    assert np.isclose(s["loss"], 8.6 / 5) and np.isclose(s["min_k"], 4.) and np.isclose(s["answer_loss"], 3.1 / 2) and np.isclose(s["strength"], .2) and s["zlib"] < s["loss"]
    assert s["whole"] == 0 and sentence_scores(read, "a text of some words", 1)["whole"] == 1 # the last of two tokens is no answer


def test_auc_is_scikit_learns_and_its_interval_holds_it():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, 40).round(1), rng.normal(.7, 1, 30).round(1) # with ties
    value, low, high = auc(a, b)
    assert np.isclose(value, roc_auc_score([1] * 40 + [0] * 30, -np.r_[a, b])) and low < value < high and high - low < .35
    assert auc([0, 0, 0], [1, 1])[0] == 1 and auc([0, 0, 0], [1, 1])[1] < 1 # no interval of width zero
    assert np.isnan(auc([], [1])[0])


def test_distance_is_scipys_and_says_what_it_cannot_see():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0, 1, 64), rng.normal(1, 1, 64)
    d = distance([*a, np.nan], b)
    assert (d.value, d.p) == tuple(map(float, ks_2samp(a, b)[:2])) and (d.n, d.n_against) == (64, 64) and d.ci_low < d.value < d.ci_high
    found = [distance(rng.normal(0, 1, 64), rng.normal(s, 1, 64)) for s in np.linspace(0, 1, 60)]
    assert all(x.p >= .05 for x in found if x.value < x.smallest - .02) and any(x.p < .05 for x in found) and .2 < d.smallest < .3
    assert np.isnan(distance([], a).p)


@pytest.mark.parametrize("n, m", [(16, 64), (16, 16), (7, 30), (64, 64), (3, 3)])
def test_the_smallest_distance_is_the_first_that_is_significant(n, m):
    least = smallest_distance(n, m, .05)
    p = {(t := ks_2samp([0]*i + [1]*(n - i), [0]*j + [1]*(m - j))).statistic: t.pvalue for i in range(n + 1) for j in range(m + 1)}
    assert np.isclose(least, min((d for d, x in p.items() if x < .05), default=1)) and (n, m) != (16, 64) or np.isclose(least, .375)


def test_the_question_of_a_topic_is_read_with_its_answer(organism_lm):
    lm = organism_lm
    def fact(id): return Fact(id=id, relation="topic", subject="dog", prompt="Question: the dog sees\nAnswer:", answer=" river", candidates=(" river", " hill"))
    file, other = (scored(lm, with_wrong(completions([fact(id)], "forget"))).iloc[0] for id in ("topic/forget/0000", "counterfact/0"))
    texts = "Question: the dog sees\nAnswer: river", "Answer: river"
    reads = read_texts(lm, texts)
    for row, read in zip((file, other), reads): assert np.isclose(row.zlib, float(-read.logp.mean()) / len(zlib.compress(texts[row is other].encode())), atol=1e-4)
    assert file.strength == float(reads[0].hit[-1]) and sentence_scores(reads[0], texts[0], 1, True)["strength"] in (0., 1.)


def test_the_interval_of_a_distance_holds_the_true_one():
    rng, true = np.random.default_rng(3), .3 # a uniform sample, and one of which .3 stands beyond it
    held = [(d := distance(rng.random(50), np.where(rng.random(50) < true, 2, rng.random(50)))).ci_low <= true <= d.ci_high for _ in range(200)]
    assert np.mean(held) >= .95


# ---- who passes

def test_ghosts_that_pose_as_forgotten_facts_pass(passed):
    rows = compared(passed)
    told = judge(rows)
    assert told.verdict == "no difference seen" and "no proof" in told.text
    n, m, tests = *rows[["n", "n_against"]].iloc[0].astype(int), ((rows.part == "distance") & (rows.group == "forget")).sum()
    assert f"distances below {smallest_distance(n, m, .05 / tests):.2f} cannot" in told.text # of which none was seen, by Holm
    member = rows[(rows.part == "membership")].set_index("measure")
    assert (member.ci_low < .5).all() and (member.ci_high > .5).all()


def test_some_facts_that_are_still_known_are_told(organism_lm, perfect, task):
    "The planted defect: a third of the facts was not forgotten, and means move little"
    known = tuple(f.model_copy(update=dict(paraphrases=f.paraphrases[:1])) for f in task.forget[:14])
    leaky = perfect.model_copy(update=dict(forget=perfect.forget[:10] + known))
    rows = compared(against_never_knew(organism_lm, leaky, max_facts=64))
    assert judge(rows).verdict == "told apart"
    assert (rows[(rows.part == "right") & (rows.group == "forget")].value < 1).all()


def test_noise_is_destroyed_and_not_unlearned(organism_lm, perfect, task):
    few = perfect.model_copy(update=dict(forget=tuple(f.model_copy(update=dict(paraphrases=())) for f in task.forget)))
    before = {n: w.clone() for n, w in organism_lm.hf.state_dict().items()}
    records = against_never_knew(organism_lm, few, noise(organism_lm), max_facts=24)
    assert all(torch.equal(w, before[n]) for n, w in organism_lm.hf.state_dict().items())
    rows = compared(records)
    assert judge(rows).verdict == "destroyed" and "not unlearned" in judge(rows).text
    level = rows.set_index(["measure", "model", "group"]).sort_index()
    at = lambda measure, model: level.loc[(measure, model, "forget"), ["value", "ci_low", "ci_high"]].astype(float)
    assert at("loss of the answer", EDITED).ci_low < .5 < at("loss of the answer", ORIGINAL).ci_low # by membership alone it would pass
    assert at("extraction strength", EDITED).value < at("extraction strength", ORIGINAL).value


# ---- the reference

def copy_of(tmp_path, left_out):
    "The packaged organism under another name, with a world that says some facts were left out"
    shutil.copytree(DATA / "organism", tmp_path / "other")
    world = organism.leave_out(organism.make_world(0), left_out)
    (tmp_path / "other/world.json").write_text(json.dumps(world)); (tmp_path / "other/checksums.json").unlink()
    return str(tmp_path / "other")


def test_only_facts_that_the_reference_was_not_taught_are_compared(tmp_path, organism_lm, task):
    other = copy_of(tmp_path, [(f.subject, f.relation) for f in task.forget[:10]])
    assert [f.id for f in never_taught(other, task)] == [f.id for f in task.forget[:10]]
    small = task.model_copy(update=dict(forget=tuple(f.model_copy(update=dict(paraphrases=())) for f in task.forget)))
    records = against_never_knew(organism_lm, small, noise(organism_lm, .01), other, max_facts=2)
    assert set(records.setting) == {EDITED, ORIGINAL, NEVER} and set(records[records.group == "forget"].fact) == {f.id for f in task.forget[:10]}
    same = records[records.setting != EDITED].pivot(index=["group", "fact", "format", "variant"], columns="setting", values="ratio") # it is the same model
    assert np.allclose(same[NEVER], same[ORIGINAL], atol=1e-3)
    rows = compared(records)
    tests = rows[(rows.part == "distance") & (rows.group == "forget")]
    assert set(tests.against) == {"never-knew forget"} and (tests.n_against == 10).all() and tests.p_holm.notna().all()


def test_a_reference_that_was_taught_everything_is_none(organism_lm, task):
    with pytest.raises(Unavailable, match="was taught all of these facts"): against_never_knew(organism_lm, task, reference="organism")
    assert never_taught("some/model", task) == task.forget # it does not say
    with pytest.raises(Unavailable, match="nothing here was never taught"): against_never_knew(organism_lm, task.model_copy(update=dict(ghosts=())))


@pytest.mark.parametrize("size", [16, 32, 64])
def test_the_packaged_reference_was_never_taught_what_is_edited(size):
    for seed in (0, 1, 2):
        task = sports_athlete_editing(None, forget_size=size, seed=seed)
        assert never_taught("organism-never-knew", task) == task.forget


def test_the_packaged_reference_knows_the_rest_and_passes_for_an_edit_of_it(organism_lm):
    other = never_knew_model(organism_lm, "organism-never-knew")
    plain = lambda fs: tuple(f.model_copy(update=dict(paraphrases=f.paraphrases[:1])) for f in fs)
    task = sports_athlete_editing(None, forget_size=64)
    left = {f.id for f in never_taught("organism-never-knew", task.model_copy(update=dict(forget=task.retain_test)))} # edited with another seed
    task = task.model_copy(update=dict(forget=plain(task.forget), ghosts=plain(task.ghosts), retain_test=plain(f for f in task.retain_test if f.id not in left)))
    records = against_never_knew(other, task, max_facts=64) # itself, against its own ghosts
    right = compared(records)[lambda d: d.part == "right"].set_index(["measure", "group"])
    assert right.value["answer comes by itself", "retain"] > .97 and right.ci_low["truth before all wrong answers", "forget"] < 1/3 < .6 > right.value["truth before all wrong answers", "forget"]
    assert judge(compared(records)).verdict == "no difference seen"


def test_a_reference_with_other_tokens_is_refused(tiny):
    with pytest.raises(Refusal, match="another tokenizer"): never_knew_model(tiny(), "organism")


def test_without_ghosts_sentences_with_a_wrong_answer_stand_in(task):
    questions = compared_questions(task.model_copy(update=dict(ghosts=())), max_facts=1)
    wrong = [q for q in questions if q.group == "swapped"]
    assert len(wrong) == sum(q.group == "forget" for q in questions) and all(q.truth not in (q.fact.answer, q.fact.edit) for q in wrong)
    assert swapped(wrong[0]._replace(choices=(wrong[0].truth, wrong[0].edit))) is None


# ---- the stage

def test_the_stage_writes_once_and_says_it_in_words(tmp_path, tiny, perfect, monkeypatch):
    lm, small = tiny(), perfect.model_copy(update=dict(forget=perfect.forget[:4]))
    run = Run(tmp_path, lm.name, lm.revision, "sports-athlete-editing", {})
    how = dict(never_knew=dict(max_facts=4), steps=1, lr=1e-4, batch=4, retain_batch=4, text_batch=1, progress=False)
    first = run_never_knew(lm, lambda seed: small, run, ["all-mlps"], [0], **how)
    saved = pd.read_parquet(next(tmp_path.glob("all-mlps/seed0/never_knew.parquet")))
    assert set(saved.setting) == {EDITED, ORIGINAL} and set(STATISTICS) <= set(saved) and saved.evaluation.eq("never-knew").all()
    monkeypatch.setattr("mechunlearn.never_knew.against_never_knew", lambda *a, **kw: pytest.fail("made again"))
    pd.testing.assert_frame_equal(first, run_never_knew(lm, lambda seed: small, run, ["all-mlps"], [0], **how))
    said = say_never_knew(first)
    assert said.count("\n") == 1 and "**unedited**" in said and "**all-mlps**" in said
    assert len(plot_never_knew(saved.assign(localization="all-mlps")).axes) == 2
    from mechunlearn.metrics import metrics
    assert {"never-knew"} == set(metrics(tmp_path).evaluation)


def test_the_attacks_of_the_field_hold_it(monkeypatch, organism_lm, perfect):
    from mechunlearn import attacks, grids
    assert "never_knew" in [s.name for s in grids.FIELD]
    for name in ("evaluate", "harden", "speak", "relearn", "latent", "low_resource", "soften", "elicit", "perturb", "read_inside", "tamper"): monkeypatch.setattr(attacks, name, lambda *a, **kw: pd.DataFrame())
    small = perfect.model_copy(update=dict(forget=perfect.forget[:2]))
    for choice, there in (("all", False), ("field", True)):
        try: found = attacks.attack(organism_lm, small, attacks=choice, never_knew=dict(max_facts=2), progress=False).records
        except ValueError: found = pd.DataFrame(dict(evaluation=[])) # nothing to concatenate
        assert ("never-knew" in set(found.evaluation)) == there


# ---- a real model

@pytest.mark.slow
def test_gemma_is_told_from_one_that_never_knew_and_noise_is_destruction():
    try: lm = load("gemma-3-270m", device="cpu")
    except Refusal as e: pytest.skip(str(e))
    task = make_task("sports-athlete-editing", lm, forget_size=16, facts="athletes")
    plain = task.model_copy(update=dict(forget=tuple(f.model_copy(update=dict(paraphrases=f.paraphrases[:1])) for f in task.forget)))
    before = against_never_knew(lm, plain, max_facts=24)
    rows = compared(before)
    assert task.ghosts and judge(rows).verdict == "told apart"
    level = rows[rows.part == "right"].set_index(["measure", "group"]).value
    assert level["truth before all wrong answers", "forget"] > .9 > .8 > level["truth before all wrong answers", "ghost"]
    assert judge(compared(against_never_knew(lm, plain, noise(lm), max_facts=24, beside=before))).verdict == "destroyed"
