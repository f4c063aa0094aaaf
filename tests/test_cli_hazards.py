"What a person can do to a command, its input and a run folder: every answer is one line, and nothing is left out in silence"
import json, shutil

import pandas as pd, pytest

from mechunlearn import cli, report as r, store
from mechunlearn.cli import main
from synthetic import synthetic_run

WHY = {"localization": {"flu-path": "no MLP gives the extraction set more than 0.02 of the answer"}, "probing": {"probing": "no relation of these facts can be probed"}}


def leave_notes(run, notes=WHY):
    (run/"notes").mkdir()
    for stage, found in notes.items(): (run/f"notes/{stage}.json").write_text(json.dumps(found))
    return run


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return leave_notes(synthetic_run(tmp_path_factory.mktemp("small")/"run", ("flu", "late"), seeds=(0,), n=6))


# asked for, and not available

def test_what_could_not_be_made_has_a_row_everywhere(small, capsys):
    why = WHY["localization"]["flu-path"]
    cli.show_run(small, cli.read(["report"]))
    out = capsys.readouterr().out
    assert f"flu-path  not available: {why}" in out and out.count("flu-path  not available") == 3 and "probing  not available: no relation" in out # a row in each part of the table
    assert max(map(len, out.split("report:")[0].splitlines())) <= 120
    cli.show_scorecard(small, cli.read(["attack", "x"]))
    assert f"flu-path  not available: {why}" in capsys.readouterr().out
    cli.show_localizations(small, cli.read(["localize"]))
    out = capsys.readouterr().out
    assert f"flu-path  not available: {why}" in out and "probing  not available" in out
    page = (small/"report.html").read_text()
    assert f"flu-path is not available: {why}" in page and "Not available</h2>" in page and "no relation of these facts can be probed" in page


@pytest.mark.parametrize("show,argv", [(cli.show_run, ["report", "--json"]), (cli.show_scorecard, ["attack", "--json"]), (cli.show_localizations, ["localize", "--json"])])
def test_json_has_a_line_for_it(small, capsys, show, argv):
    show(small, cli.read(argv))
    lines = [json.loads(l) for l in capsys.readouterr().out.splitlines()]
    assert {"localization": "flu-path", "note": WHY["localization"]["flu-path"]} in lines and {"stage": "probing", "what": "probing", "note": WHY["probing"]["probing"]} in lines


def test_a_localization_that_was_made_since_has_no_such_row(small, tmp_path):
    run = shutil.copytree(small, tmp_path/"run")
    (run/"notes/localization.json").write_text(json.dumps({"flu": "it was empty", "random": "no budget"}))
    assert r.unavailable(run).what.tolist() == ["random", "probing"]


def test_localize_without_any_map_shows_the_localizations(small, tmp_path, capsys):
    run = shutil.copytree(small, tmp_path/"run")
    shutil.rmtree(run/"scores")
    cli.show_localizations(run, cli.read(["localize"]))
    out = capsys.readouterr().out
    assert "No map of the layers" in out and "late" in out and "flu-path  not available" in out


# runs that lack most things

LACKS = {"no multiple choice": lambda d: d[d.format != "mcq"], "no edited facts": lambda d: d[d.group != "forget"], "edited facts alone": lambda d: d[d.group == "forget"],
    "no ghosts": lambda d: d[d.group != "ghost"], "one edited fact": lambda d: d[(d.group != "forget") | d.fact.str.endswith("0000")], "no relation": lambda d: d.assign(relation=None),
    "multiple choice alone": lambda d: d[d.format == "mcq"], "equal values": lambda d: d.assign(prob_truth=1., prob_edit=1., loss=d.loss.where(d.loss.isna(), 2.))}

@pytest.mark.parametrize("lack", LACKS)
def test_a_report_of_what_there_is(small, tmp_path, lack):
    run = shutil.copytree(small, tmp_path/"run")
    shutil.rmtree(run/"scores")
    for file in run.glob("*/seed*/*.parquet"):
        if file.stem == "training": continue
        rows = LACKS[lack](pd.read_parquet(file))
        if len(rows): store.save_table(file, rows, {"lack": lack})
        else: file.unlink(); store.sidecar(file).unlink()
    assert main(["report", str(run)]) == 0
    found = r.find(run)
    r.results_text(r.results_table(found.metrics, "prob"), found.gone); r.scorecard_text(found.card, gone=found.gone); r.say_scorecard(found.card, found.broken)


def test_one_fact_and_equal_values_have_no_interval():
    one = pd.DataFrame({"fact": ["a"], "top1_truth": [1.], "prob_truth": [.7]}).assign(localization="flu", draw=0, seed=0, group="forget", format="completion", evaluation="standard", truth="x")
    m = r.summarise(one).query("seed == -1").set_index("measure")
    assert m.ci_low.isna()["prob"] and m.ci_low["top1"] < .3 and m.ci_high["top1"] == 1 # Wilson's interval of one fact is wide, not none
    assert "0.30 [no interval]" in r.results_text(r.results_table(r.summarise(one), "prob"))
    same = pd.concat([one.assign(fact=f, prob_truth=.9) for f in "abcd"])
    assert r.summarise(same).query("measure == 'prob'").ci_high.isna().all()


def test_a_difference_in_every_fact_still_counts():
    flu = pd.DataFrame({"fact": map(str, range(40)), "top1_truth": 0.}).assign(localization="flu", draw=0, seed=0, group="forget", format="mcq", evaluation="standard", truth="x")
    tests = r.orderings(pd.concat([flu, flu.assign(localization="late", top1_truth=1.)]))
    assert tests[tests.column == "MCQ truth"].verdict.tolist() == ["appears"]
