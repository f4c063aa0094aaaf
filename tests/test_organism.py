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
