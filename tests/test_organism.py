"""The packaged organism: its world can be made again, its ghosts were never taught, and it knows what it claims to know."""
import json
import random
from functools import partial

import pytest

from mechunlearn import organism
from mechunlearn.models import DATA, load
from mechunlearn.store import Refusal


@pytest.fixture(scope="module")
def world():
    return organism.make_world(seed=0)


@pytest.fixture(scope="module")
def documents(world):
    return organism.Documents(world, organism.make_tokenizer(world))


def test_packaged_world_is_the_generated_one(world):
    assert json.loads((DATA / "organism" / "world.json").read_text()) == json.loads(json.dumps(world))


def test_packaged_tokenizer_is_the_generated_one(world):
    tok = load("organism").tok
    assert tok.get_vocab() == organism.make_tokenizer(world).get_vocab()


def test_another_seed_is_another_world(world):
    other = organism.make_world(seed=1)
    assert {f["subject"] for f in other["facts"] if f["relation"] == "sport"}.isdisjoint(
        f["subject"] for f in world["facts"] if f["relation"] == "sport"
    )


def test_every_fact_is_known_words(world, documents):
    unknown = documents.tok.unk_token_id
    for fact in world["facts"]:
        ids = documents.ids(f"{fact['subject']} {fact['object']}")
        assert unknown not in ids
        assert len(documents.ids(fact["object"])) == 1


def test_names_are_three_tokens_and_round_trip(world, documents):
    for fact in world["facts"]:
        if fact["relation"] == "sport":
            ids = documents.ids(fact["subject"])
            assert len(ids) == 3
            assert documents.tok.decode(ids) == fact["subject"]


def test_documents_never_teach_a_ghost_its_fact(world, documents):
    rng = random.Random(0)
    recipe = organism.Recipe()
    ghosts = {f["subject"]: f["object"] for f in world["facts"] if not f["taught"] and f["relation"] == "sport"}
    seen = set()
    for step in (0, 1, 2, *range(500, 540)):
        ids, _ = documents.batch(rng, recipe, step)
        for line in documents.tok.batch_decode(ids):
            for document in line.split("\n"):
                named = [name for name in ghosts if name in document]
                seen.update(named)
                assert not any(sport in document.split() for name in named for sport in organism.SPORTS)
    assert len(seen) > 50  # their cities were taught


def test_held_out_subjects_never_occur_in_multiple_choice(world, documents):
    rng = random.Random(0)
    held = [f["subject"] for f in world["facts"] if not f["mcq"] and f["relation"] != "kind"]
    for _ in range(2000):
        ids, _ = documents.multiple_choice(rng)
        text = documents.tok.decode(ids)
        assert not any(f" {name} " in text for name in held if name in text)


@pytest.fixture(scope="module")
def left(world):
    """Every fourth athlete's sport, and a language: of subjects in multiple choice, and of others."""
    taught = [f for f in world["facts"] if f["taught"] and f["subject"] != world["shot_subject"]]
    return [(f["subject"], f["relation"]) for f in taught if f["relation"] == "sport"][::4] + [(f["subject"], "language") for f in taught if f["relation"] == "language"][:3]


def test_a_fact_that_is_left_out_is_a_ghosts_and_all_else_is_the_same(world, left):
    other = organism.leave_out(world, left)
    assert [k for k in world if other[k] != world[k]] == ["facts"]
    changed = [(b["subject"], b["relation"]) for a, b in zip(world["facts"], other["facts"]) if a != b]
    assert sorted(changed) == sorted(left) and all(not f["taught"] for f in other["facts"] if f.get("left_out"))
    assert organism.make_tokenizer(other).get_vocab() == organism.make_tokenizer(world).get_vocab()


def test_what_is_left_out_never_occurs_and_every_other_document_stays(world, documents, left):
    without = organism.Documents(organism.leave_out(world, left), documents.tok)
    a, b, gone = random.Random(7), random.Random(7), {(f["subject"], f["object"]) for f in world["facts"] if (f["subject"], f["relation"]) in set(left)}
    told = others = 0
    for step in (0, 1, 2, *range(500, 510)):
        (ids, weights), (ids_without, weights_without) = documents.batch(a, organism.Recipe(), step), without.batch(b, organism.Recipe(), step)
        assert a.getstate() == b.getstate() and (weights == weights_without).all()
        for lines in zip(documents.tok.batch_decode(ids), documents.tok.batch_decode(ids_without)):
            for before, after in zip(*(line.split("\n")[:-1] for line in lines)):  # the last document is cut off
                says = lambda text: any(f" {s} " in f" {text} " and o in text.split() for s, o in gone)
                told, others = told + says(before), others + (before == after)
                assert before == after or says(before)
                assert not says(after)
    assert told > 20 and others > 4 * told


def test_what_cannot_be_left_out_is_refused(world, tmp_path):
    ghost = next(f for f in world["facts"] if not f["taught"])
    for pair in ((world["shot_subject"], "sport"), (ghost["subject"], ghost["relation"]), ("Nobody", "sport"), ("dog", "kind")):
        with pytest.raises(Refusal, match="cannot be left out"):
            organism.leave_out(world, [pair])
    with pytest.raises(Refusal, match="nothing of 'country' would be left"):
        organism.leave_out(world, [(f["subject"], "country") for f in world["facts"] if f["relation"] == "country"])
    (tmp_path / "f.csv").write_text("name,what\na,b\n")
    for file in ("f.csv", "none.csv"):
        with pytest.raises(Refusal, match="columns subject and relation"):
            organism.read_pairs(tmp_path / file)


def test_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "something").write_text("x")
    with pytest.raises(Refusal, match="not empty"):
        organism.retrain(tmp_path)


def test_folder_without_a_world_is_refused(tmp_path):
    with pytest.raises(Refusal, match="world.json"):
        organism.world_of(str(tmp_path))


def test_packaged_folder_is_small():
    assert sum(p.stat().st_size for p in (DATA / "organism").iterdir()) < 16e6


def test_it_knows_what_it_claims(monkeypatch):
    """A draw of facts, the same each time; the slow test asks for all of them."""
    monkeypatch.setattr(organism, "knowledge", partial(organism.knowledge, mcq_facts=30, most=400))
    knows_what_it_claims()


@pytest.mark.slow
def test_it_knows_all_that_it_claims():
    knows_what_it_claims()


def knows_what_it_claims():
    report = organism.check("organism")
    assert report["passed"], (report["below_floor"], report["ghosts_above_chance"])


@pytest.mark.slow
def test_shortened_training_learns_facts(tmp_path, monkeypatch):
    """A twelfth of the world in a tenth of the steps: above chance on facts, and a folder that loads."""
    size = organism.WorldSize(athletes=60, golfers=4, people=16, places=16, ghosts=12)
    monkeypatch.setattr(organism, "make_world", lambda seed: make_small(seed, size))
    recipe = organism.Recipe(steps=250, first_steps=250)
    report = organism.retrain(tmp_path / "small", recipe, progress=False)
    completion = next(row for row in report["measured"] if row["what"] == "completion")
    assert completion["value"] > 0.5
    assert load(str(tmp_path / "small")).n_layers == 12


make_small = organism.make_world
