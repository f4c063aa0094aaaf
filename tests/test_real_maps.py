"Maps of the athletes' table with real tokenizers, whose names have two to six pieces."
import os
from collections import Counter
from pathlib import Path
import pytest
from mechunlearn import tracing
from mechunlearn.models import load
from mechunlearn.store import Run, Unavailable, read_meta
from mechunlearn.tasks import make_task
from mechunlearn.tracing import GRID_FACTS, GRID_LEAST, swap_cases, token_map

REFDATA = Path(os.environ.get("MECHUNLEARN_REFDATA", "none"))
SPORTS = "sports-athlete-editing"


@pytest.fixture
def athletes(stand_in):
    "Function: a stand-in with a real tokenizer, and its task on the athletes' table"
    if not (REFDATA / "sports").exists(): pytest.skip("no athletes' table: MECHUNLEARN_REFDATA")
    def make(name, size):
        lm = stand_in(name)
        return lm, make_task(SPORTS, lm, facts="sports", forget_size=size)
    return make


@pytest.mark.parametrize("size", [16, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["llama-3", pytest.param("qwen3", marks=pytest.mark.slow), "gemma"])
def test_the_map_by_token_has_facts(athletes, name, size, tmp_path):
    lm, task = athletes(name, size)
    cases = tracing._alike(lm, task)
    shapes = {(len(lm.ids([c.fact.prompt])[0]), c.span) for c in cases}
    pool = {f.id for f in (*task.localize_on, *task.dev_retain)}
    paired = swap_cases(lm, task.localize_on, tracing._pool(task))
    traced, layouts = {c.fact.id for c in paired}, Counter((len(lm.ids([c.fact.prompt])[0]), c.span) for c in paired)
    assert len(shapes) == 1 and {c.other.id for c in cases} <= pool and {c.fact.id for c in cases} <= traced
    assert len(cases) == min(GRID_FACTS, max(layouts.values())) >= (GRID_FACTS if size == 64 else GRID_LEAST) and all(c.other.answer != c.fact.answer for c in cases)
    run = Run(tmp_path, lm.name, lm.revision, task.name, {})
    grid = token_map(lm, lambda seed: task, run, progress=False)
    assert (grid.n == len(cases)).all() and (grid.groupby("kind").size() == lm.n_layers * -cases[0].span[0]).all()
    assert "pairs" in read_meta(tmp_path / "scores" / "trace-grid.parquet")["causes"]


def test_few_alike_are_no_map(athletes):
    lm, task = athletes("gemma", 16)
    layouts = {}
    for f, span in zip(task.localize_on, tracing._spans(lm, task.localize_on)): layouts.setdefault(span, []).append(f)
    few = tuple(f for fs in layouts.values() for f in fs[:GRID_LEAST - 1])
    with pytest.raises(Unavailable, match=f"{GRID_LEAST} are needed"): token_map(lm, lambda seed: task.model_copy(update={"dev_forget": few}), progress=False)


def test_the_organism_is_mapped_as_before():
    lm = load("organism")
    for size in (16, 64):
        task = make_task(SPORTS, lm, forget_size=size)
        assert tracing._alike(lm, task) == swap_cases(lm, task.localize_on[:GRID_FACTS]) and tracing._first(task, tracing._alike(lm, task))
    task = make_task("full-sports-editing", lm)
    first = task.localize_on[:GRID_FACTS]
    assert tracing._alike(lm, task) == swap_cases(lm, first, [*first, *task.dev_retain]) and tracing._first(task, tracing._alike(lm, task))
