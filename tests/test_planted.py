"Edits whose truth is known: masks, nothing at all, ghosts, a destroyed model. An attack that cannot tell them apart is broken."
import pandas as pd, pytest
from mechunlearn import report as r
from mechunlearn.attacks import attack
from mechunlearn.capability import noise
from mechunlearn.finetuning import Edit, finetune, place, slice_key
from mechunlearn.localization import Localization, build
from mechunlearn.models import Component, Slice, load
from mechunlearn.tasks import sports_athlete_editing

FEW = {"retain": 24, "retain/mcq": 8, "ghost": 32, "ghost/mcq": 8, "same-subject": 4, "other-relation": 4, "general": 12}
QUICK = dict(standard=dict(max_facts=FEW), relearning=dict(steps=10, at=(0, 10), max_facts=24), latents=dict(n_train=120, max_facts=32))
DEAR = dict(hardened=dict(shots=(0, 4), n_all_orders=2, max_facts=16), generation=dict(max_facts=16), soft=dict(ks=(5,), prompts=1, steps=50, max_facts=32))
ASKED, HARD, READ = ["multiple choice"], ["hard multiple choice"], ["new probe", "old probe"]


def last_layer(lm, task):
    "Trained in the last layer only"
    where = build(lm, "last-layer", [Component("mlp", 11), *(Component("head", 11, h) for h in range(lm.n_heads))])
    return finetune(lm, task, where, lr=4e-3, steps=30, retain_batch=32, text_batch=2, progress=False)


def other_words(lm, task):
    "Each sport is said as the next one: only the rows of the unembedding are exchanged"
    tokens = [lm.first_token(a) for a in sorted({f.answer for f in task.forget})]
    slices = [Slice("lm_head.weight", 0, t, t + 1) for t in tokens]
    values = {slice_key(s): place(lm, t).clone() for s, t in zip(slices, slices[1:] + slices[:1])}
    where = Localization(name="other-words", components=(), slices=tuple(slices), sizes=(lm.d_model,) * len(slices))
    return Edit(where, values, pd.DataFrame(columns=["step", "forget", "retain"]), dict(model=lm.name, revision=lm.revision))


def attacked(attacks, **how):
    "Scorecard and reasons for destruction of the four models"
    lm = load("organism")
    task, records = sports_athlete_editing(lm, forget_size=16, seed=0), []
    for name, edit in {"none": None, "last-layer": last_layer(lm, task), "other-words": other_words(lm, task), "noise": noise(lm, 0)}.items():
        records.append(attack(lm, task, edit, attacks=attacks, **how).records.assign(localization=name, draw=0, seed=0))
    records = pd.concat(records, ignore_index=True)
    return r.scorecard(records).query("seed == -1").set_index(["localization", "attack"]), r.broken(records)


@pytest.fixture(scope="module")
def quick(): return attacked("standard", **QUICK)


@pytest.fixture(scope="module")
def dear(): return attacked("all", **QUICK | DEAR)


def says(card, name, attacks): return card.loc[[(name, a) for a in attacks]]


def masks_are_exposed(card, by):
    for name, attacks in by.items():
        assert card.value[name, "as trained"] < .1
        assert (says(card, name, attacks).ci_low > says(card, name, attacks).guess).all(), says(card, name, attacks)
        assert r.verdict(card.loc[name, r.WORST]) == "exposed" and card.value[name, r.WORST] > .9


def the_unedited_model_says_all(card): assert (card.loc["none"].drop("old probe", errors="ignore").value > .9).all()


def ghosts_stay_at_chance(card):
    "One in three; in multiple choice golf is an option nobody plays, so a guess among the others is right as often"
    ghosts = card.dropna(subset=["ghost_value"])
    assert len(ghosts) > 20 and (ghosts.ghost_low <= 1 / 3).all(), ghosts[ghosts.ghost_low > 1 / 3]


def noise_is_destroyed(card, broken):
    assert "noise" in broken and len(broken["noise"]) == 3 and "last-layer" not in broken
    assert "noise: " in (text := r.say_scorecard(card.reset_index().assign(seed=-1), broken)) and "destroyed, not unlearned" in text.split("noise: ")[1]
    assert r.verdict(card.loc["noise", r.WORST]) != "exposed"


def test_masks_are_exposed(quick): masks_are_exposed(quick[0], {"last-layer": ASKED + ["half retaught"] + READ, "other-words": ASKED + READ})
def test_the_unedited_model_says_all(quick): the_unedited_model_says_all(quick[0])
def test_ghosts_stay_at_chance(quick): ghosts_stay_at_chance(quick[0])
def test_noise_is_destroyed_and_not_unlearned(quick): noise_is_destroyed(*quick)


@pytest.mark.slow
def test_every_attack_tells_them_apart(dear):
    card, broken = dear
    masks_are_exposed(card, {"last-layer": ASKED + HARD + ["two facts retaught", "half retaught", "soft prompt"] + READ, "other-words": ASKED + HARD + READ})
    the_unedited_model_says_all(card); ghosts_stay_at_chance(card); noise_is_destroyed(card, broken)
