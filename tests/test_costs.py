"""What a grid takes: counted work, timed rates, what fits on a card, what is missing."""

import pandas as pd
import pytest, yaml
from mechunlearn import costs
from mechunlearn.cli import main
from mechunlearn.costs import CARDS, CORES, WAYS, card_of, hours, measured, needs, read_results, shape, speeds, way_for, work
from mechunlearn.grids import grid, make_job
from mechunlearn.store import Refusal

PAPER = grid("configs/paper.yaml") if __import__("os").path.exists("configs/paper.yaml") else []
SIZES = {"google/gemma-7b": 8_537_680_896, "google/gemma-2-9b": 9_241_705_984, "meta-llama/Meta-Llama-3-8B": 8_030_261_248} # as their model cards say


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    for name in ("MECHUNLEARN_SPORTS", "MECHUNLEARN_COUNTERFACT", "MECHUNLEARN_REFDATA"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MECHUNLEARN_CACHE", str(tmp_path / "cache"))


def test_the_copy_in_the_package_is_what_the_benchmarks_say():
    kept = pd.read_csv(costs.DATA / "measured.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(kept, measured(), check_dtype=False), "python -c 'from mechunlearn.costs import keep_measured; keep_measured()'"


@pytest.mark.parametrize("model,n", SIZES.items())
def test_known_shapes_are_those_of_the_published_models(model, n):
    assert shape(model).hf.num_parameters() == n and shape(model).name == model


def test_a_line_without_a_time_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"name": "machine", "device": "X", "model": "m", "parameters": 5, "facts": 3}\n{"name": "step/a", "tflop": 1.0, "peak_gb": 2, "failed": "Diverged"}\n'
                                      '{"name": "step/b", "tflop": 4.0, "seconds": 2.0, "peak_gb": 2}\n')
    (tmp_path / "b.jsonl").write_text('{"device": "X"}\n{"name": "text-loss", "ours_s": 1}\n')
    table = read_results(tmp_path)
    assert table.stage.tolist() == ["step/b"] and table.facts.tolist() == [3] and table.machine.tolist() == ["X"]


def test_counted_work_of_a_step_is_that_of_the_large_model():
    job = make_job("google/gemma-2-9b", "sports-athlete-editing", {"forget_size": 64}, ["flu"], [0], {})
    step = work(job, shape(job.model))[1]["finetuning"] / 50
    assert step == pytest.approx(measured().query("stage == 'step/adamw'").tflop.iloc[0], rel=.1)


def test_more_facts_steps_and_weights_are_more_work():
    lm = shape("google/gemma-2-9b")
    of = lambda n, **settings: work(make_job("google/gemma-2-9b", "sports-athlete-editing", {"forget_size": n}, ["flu"], [0], settings), lm)[1]
    assert all(of(64)[s] > of(16)[s] for s in of(16)) and of(16, steps=100)["finetuning"] == pytest.approx(2 * of(16)["finetuning"])
    assert "capability" in of(16, capabilities={"names": ["sciq"]}) and "capability" not in of(16)
    other = work(make_job("meta-llama/Meta-Llama-3-8B", "sports-athlete-editing", {"forget_size": 16}, ["flu"], [0], {}), shape("meta-llama/Meta-Llama-3-8B"))[1]
    assert other["evaluation"] < of(16)["evaluation"]


def test_rates_have_a_range_and_slower_cards_are_slower():
    for stage in ("finetuning", "evaluation", "nothing"):
        low, mid, high = speeds(stage, CARDS["H100 80GB"])
        assert low < mid < high and speeds(stage, CARDS["A100 80GB"])[1] == pytest.approx(mid * 312 / 989)
    alone = measured().query("stage == 'step/adamw' and beside == ''").iloc[0]
    assert speeds("finetuning", CARDS["H100 80GB"])[0] < alone.tflop / alone.seconds < speeds("finetuning", CARDS["H100 80GB"])[2]
    assert speeds("finetuning", CORES)[1] == pytest.approx(105.59 / 622.25)


def test_hours_are_those_of_the_run_that_was_timed():
    "Six edits of Gemma 3 270M: what was timed must come out again"
    import mechunlearn.cli, mechunlearn.localization # before anything is put in place of `components`, which they would keep
    timed = measured().query("source == @costs.REFERENCE")
    class Small:
        class hf: num_parameters = staticmethod(lambda: 268_098_176)
    job = make_job("gemma-3-270m", "sports-athlete-editing", {"forget_size": 16, "facts": "athletes"}, ["flu"], [0], {})
    with pytest.MonkeyPatch.context() as m:
        m.setattr(costs, "block_weights", lambda lm: costs.GEMMA["weights"]); m.setattr("mechunlearn.models.components", lambda lm, *_: [0] * costs.GEMMA["components"])
        m.setattr(costs, "reading", lambda job: 1.)
        table = hours(job, Small, CORES)
    assert (table.hours["maps"] + 6 * table.hours["edit"]) * 3600 == pytest.approx(timed.seconds.sum(), rel=.05)


@pytest.mark.parametrize("said,name,gb", [("H100 80GB", "H100 80GB", 80), ("h100", "H100 80GB", 80), ("a100 40gb", "A100 40GB", 40), ("24", "a card of 24 GB", 24), ("48 GB", "a card of 48 GB", 48)])
def test_cards_by_name_or_gigabytes(said, name, gb): assert card_of(said)[:2] == (name, gb)


@pytest.mark.parametrize("said", ["H1000 80GB", "-3", "0", "big", "nan"])
def test_a_card_that_nobody_knows_is_refused(said):
    with pytest.raises(Refusal, match="unknown card"): card_of(said)


def test_the_plainest_way_that_fits_is_taken(monkeypatch):
    "Of a Gemma 2 9B with six layers"
    known = costs.SHAPES["google/gemma-2-9b"]
    monkeypatch.setitem(costs.SHAPES, "short", known._replace(sizes=known.sizes | {"num_hidden_layers": 6}))
    where, lm, card = ("flu", (1, 2)), shape("short"), card_of("24")
    gb = {way: needs(lm, where, way)/1e9 for way in WAYS}
    assert list(gb.values()) == sorted(gb.values(), reverse=True) and len(set(gb.values())) == len(WAYS)
    for way in WAYS: assert way_for(lm, where, card._replace(gb=gb[way] + .01)) == (way, gb[way])
    assert way_for(lm, where, card._replace(gb=min(gb.values()) - .01))[0] is None


def test_the_memory_of_a_step_is_what_was_measured_on_the_card():
    way, gb = way_for(shape("google/gemma-2-9b"), ("flu", (2, 3, 4, 5, 6)), card_of("80"))
    assert way == "adamw" and gb == pytest.approx(measured().query("stage == 'step/adamw'").peak_gb.iloc[0], rel=.1)
    assert way_for(shape("google/gemma-2-9b"), ("flu", (2, 3, 4, 5, 6)), card_of("10"))[0] is None


@pytest.mark.slow
def test_the_plainest_way_for_nine_billion_weights():
    where, lm = ("flu", (2, 3, 4, 5, 6)), shape("google/gemma-2-9b")
    (big, a), (mid, b), (small, c), (none, d) = (way_for(lm, where, card_of(str(gb))) for gb in (80, 33, 24, 10))
    assert (big, none) == ("adamw", None) and mid == "adamw-8bit" and small == "adamw-8bit, checkpoint, 4bit" and a > b > c
    step = measured().query("stage == 'step/adamw'").peak_gb.iloc[0]
    assert a == pytest.approx(step, rel=.1) # what was measured on the card


@pytest.mark.skipif(not PAPER, reason="needs the checkout's configs")
@pytest.mark.slow
def test_the_papers_grid_is_tried_dry_without_its_data_and_models(capsys):
    assert main(["batch", "configs/paper.yaml", "--dry-run", "--card", "A100 80GB"]) == 0
    out = capsys.readouterr().out
    assert out.count("(maps)") == len(PAPER) and "39 jobs, 1089 edits" in out and "published: 770,703,360" in out
    assert "312 to 989 TFLOP/s" in out and "estimate" in out and out.count("licence at") == len(SIZES) and "missing here: no sports data" in out


@pytest.mark.skipif(not PAPER, reason="needs the checkout's configs")
def test_a_wrong_name_is_refused_all_the_same(tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text("models: [google/gemma-7b]\nlocalizations: [flue]\n")
    assert main(["batch", str(tmp_path / "grid.yaml"), "--dry-run"]) == 2 and "flue" in capsys.readouterr().err


@pytest.mark.skipif(not PAPER, reason="needs the checkout's configs")
@pytest.mark.parametrize("models,missing", [(["google/gemma-2-9b"], 5), pytest.param(list(SIZES), 9, marks=pytest.mark.slow)], ids=["one", "all"])
def test_one_screen_about_the_papers_models(models, missing, capsys, tmp_path):
    told = yaml.safe_load(open("configs/paper.yaml"))
    assert set(told["models"]) == set(SIZES)
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(told | {"models": models}))
    assert main(["check", str(tmp_path / "grid.yaml"), "--card", "H100 80GB"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and lines[0] == "card: H100 80GB"
    assert sum("bfloat16, adamw" in l for l in lines) == len(models) and sum("too large" in l for l in lines) == 2*len(models)
    assert sum(l.startswith("missing") for l in lines) == missing


def test_a_small_model_gets_no_hours(capsys, tmp_path):
    assert main(["run", "--forget-size", "16", "--localizations", "late", "--dry-run", "--out", str(tmp_path)]) == 0
    assert "hours" not in capsys.readouterr().out


def test_a_model_that_is_not_here_is_told_about_all_the_same(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["check", "--model", "google/gemma-2-9b", "--card", "A100 40GB"]) == 2
    said = capsys.readouterr()
    assert "9,241,705,984 parameters" in said.out and "card: A100 40GB" in said.out and "bfloat16, adamw" in said.out and "cannot load 'google/gemma-2-9b'" in said.err


def test_a_tokenizer_is_read_once_and_again_when_it_has_changed(tmp_path):
    import os, shutil
    from mechunlearn.grids import make_job, skeleton
    from mechunlearn.loading import packaged
    folder = shutil.copytree(packaged()["organism"], tmp_path / "model")
    tok = lambda: skeleton(make_job(str(folder), "sports-athlete-editing", {}, ["flu"], [0], {})).tok
    first = tok()
    assert tok() is first
    os.utime(folder / "tokenizer.json", (1, 1))
    assert tok() is not first


def test_further_attacks_are_in_the_hours():
    job = lambda attacks: make_job("google/gemma-2-9b", "sports-athlete-editing", {"forget_size": 16}, ["flu"], [0], {}, attacks=attacks)
    plain, more, field = (hours(job(a), shape("google/gemma-2-9b"), card_of("H100 80GB")) for a in ("standard", "all", "field"))
    assert (field > more).all(axis=None) and (more > 1.2*plain).all(axis=None)
    assert field.hours["maps"] - plain.hours["maps"] == pytest.approx(field.hours["edit"] - plain.hours["edit"], rel=1e-6) # the unedited model is attacked, too
