"""Adding runs to the recorded tables keeps what is there, and adds only what is lacking."""
import json
import shutil

import pandas as pd
import pytest

import add_recorded as A
from mechunlearn.recorded_tables import recorded
from mechunlearn.store import save_table
from synthetic import synthetic_run


def rows(localizations, value, size=16):
    return pd.DataFrame([dict(model="m", task="t", forget_size=size, localization=l, evaluation=e, value=value) for l in localizations for e in ("standard", "latent")])


def test_only_what_is_lacking(tmp_path):
    rows(["none", "flu"], 1.).to_parquet(tmp_path / "metrics.parquet")
    assert A.add("metrics", rows(["flu", "random"], 2.), A.KEYS["metrics"], tmp_path) == 2
    now = pd.read_parquet(tmp_path / "metrics.parquet")
    assert now.groupby("localization").value.unique().map(list).to_dict() == {"none": [1.], "flu": [1.], "random": [2.]}
    assert A.add("metrics", rows(["flu", "random"], 3.), A.KEYS["metrics"], tmp_path) == 0
    assert A.add("metrics", rows(["flu"], 3., size=64), A.KEYS["metrics"], tmp_path) == 2 # of other facts
    assert A.add("metrics", rows(["flu"], 4., size=None), A.KEYS["metrics"], tmp_path) == 2 and A.add("metrics", rows(["flu"], 5., size=None), A.KEYS["metrics"], tmp_path) == 0


def test_a_group_is_replaced_as_a_whole(tmp_path):
    rows(["none", "flu"], 1.).to_parquet(tmp_path / "metrics.parquet")
    A.add("metrics", rows(["flu"], 2., size=64), A.KEYS["metrics"], tmp_path)
    assert A.add("metrics", rows(["random"], 3.), A.KEYS["metrics"], tmp_path, replace=True) == 2
    now = pd.read_parquet(tmp_path / "metrics.parquet")
    assert now.groupby(["forget_size", "localization"]).value.unique().map(list).to_dict() == {(64, "flu"): [2.], (16, "random"): [3.]}


def test_evaluations_that_a_run_lacks_may_stay(tmp_path):
    rows(["none", "flu"], 1.).to_parquet(tmp_path / "metrics.parquet")
    new = rows(["flu"], 2.).query("evaluation == 'standard'")
    assert A.add("metrics", new, A.KEYS["metrics"], tmp_path, replace=True, keep=["latent"]) == 1
    now = pd.read_parquet(tmp_path / "metrics.parquet")
    assert sorted(zip(now.localization, now.evaluation, now.value)) == [("flu", "latent", 1.), ("flu", "standard", 2.), ("none", "latent", 1.)]


def test_rows_that_a_run_has_anew_take_the_place_of_theirs_alone(tmp_path):
    rows(["none", "flu"], 1.).assign(setting="plain").to_parquet(tmp_path / "field.parquet")
    A.add("field", rows(["flu"], 1.).assign(setting="turned"), A.KEYS["metrics"], tmp_path, over=True)
    assert A.add("field", rows(["flu", "late"], 2.).query("evaluation == 'standard'").assign(setting="plain"), A.KEYS["metrics"], tmp_path, over=True) == 2
    now = pd.read_parquet(tmp_path / "field.parquet").set_index(["localization", "evaluation", "setting"]).value
    assert now.to_dict() == {(l, e, "plain"): 1. + ((l, e) in (("flu", "standard"), ("late", "standard"))) for l, e in
        (("none", "standard"), ("none", "latent"), ("flu", "latent"), ("flu", "standard"), ("late", "standard"))} | {("flu", e, "turned"): 1. for e in ("standard", "latent")}
    card = lambda attacks, value: rows(["flu"], value)[:1].merge(pd.DataFrame(dict(attack=attacks)), how="cross")
    card(["as trained", "soft prompt", "worst case"], 1.).to_parquet(tmp_path / "field_scorecard.parquet")
    assert A.add("field_scorecard", card(["as trained", "quantized", "worst case, read", "worst case"], 2.), A.KEYS["scorecard"], tmp_path, over=True) == 2
    assert pd.read_parquet(tmp_path / "field_scorecard.parquet").set_index("attack").value.to_dict() == {"as trained": 2., "quantized": 2., "soft prompt": 1., "worst case": 1.}


def test_a_sweep_takes_the_place_of_another(tmp_path, capsys):
    swept = lambda lrs, **more: pd.DataFrame([dict(model="m", task="t", forget_size=16, localization="flu", draw=None, seed=0, lr=lr, inject=1., score=lr) | more for lr in lrs])
    pd.concat([swept([1., 2.]), swept([1.], task="other")]).to_parquet(tmp_path / "sweep.parquet")
    swept([2., 3.]).to_parquet(tmp_path / "new.parquet")
    A.main(["--sweep", str(tmp_path / "new.parquet")], tmp_path)
    assert "sweep: 1 rows" in capsys.readouterr().out and sorted(pd.read_parquet(tmp_path / "sweep.parquet").lr) == [1., 1., 2., 3.]
    A.main(["--sweep", "--replace", str(tmp_path / "new.parquet")], tmp_path)
    assert "sweep: 2 rows" in capsys.readouterr().out
    assert pd.read_parquet(tmp_path / "sweep.parquet").groupby("task").lr.unique().map(sorted).to_dict() == {"t": [2., 3.], "other": [1.]}


def test_a_run_is_added_as_it_would_be_recorded(tmp_path, monkeypatch, capsys):
    run = synthetic_run(tmp_path / "runs", ("flu", "nonlocalized"), seeds=(0, 1), n=16, stages=("localizations", "standard", "relearning"), model="invented")
    for name in A.KEYS:
        recorded(name, forget_size=64).to_parquet(tmp_path / f"{name}.parquet")
    monkeypatch.setattr(A.R, "check_recorded", lambda folder: ["frontier"])
    A.main([str(run)], tmp_path)
    assert "metrics: 0 rows" not in capsys.readouterr().out
    table = pd.read_parquet(tmp_path / "metrics.parquet")
    new = table[table.model == "invented"]
    assert {"flu", "nonlocalized"} <= set(new.localization) and set(table[table.model == "organism"].localization) == set(recorded("metrics", forget_size=64).localization)
    monkeypatch.setattr(A.R, "check_recorded", lambda folder: ["metrics"])
    with pytest.raises(SystemExit, match="other sources: metrics"):
        A.main([str(run)], tmp_path)


def test_a_worst_case_of_other_attacks_is_not_put_beside(tmp_path):
    card = lambda localization, attacks: pd.DataFrame([dict(model="m", task="t", forget_size=16, localization=localization, attack=a, value=0.) for a in attacks])
    card("flu", ["as trained", "new probe"]).to_parquet(tmp_path / "scorecard.parquet")
    assert A.add("scorecard", card("random", ["as trained"]), A.KEYS["scorecard"], tmp_path) == 0
    assert A.add("scorecard", card("random", ["as trained", "new probe"]), A.KEYS["scorecard"], tmp_path) == 2


def test_facts_are_kept_where_there_is_flu_to_compare_with(tmp_path):
    rows(["none", "flu"], 1.).to_parquet(tmp_path / "records_small.parquet")
    keys = A.KEYS["records_small"]
    assert A.add("records_small", rows(["random"], 2.), keys, tmp_path) == 2  # beside FLU of the same group
    assert A.add("records_small", rows(["none", "random"], 3., size=64), keys, tmp_path) == 0
    assert A.add("records_small", rows(["flu", "random"], 4., size=64), keys, tmp_path) == 4


def test_a_grid_of_editors_has_tables_of_its_own(tmp_path, monkeypatch, capsys):
    run = synthetic_run(tmp_path / "runs", ("flu", "nonlocalized"), seeds=(0, 1), n=16, stages=("localizations", "standard", "relearning"), model="invented")
    for name in ("editors", "editors_scorecard"): recorded(name, forget_size=16).to_parquet(tmp_path / f"{name}.parquet")
    monkeypatch.setattr(A.R, "check_recorded", lambda folder: ["metrics"])
    A.main(["--editors", str(run)], tmp_path)
    assert sorted(p.stem for p in tmp_path.glob("*.parquet")) == ["editors", "editors_scorecard"]
    for name in ("editors", "editors_scorecard"):
        table = pd.read_parquet(tmp_path / f"{name}.parquet")
        assert {"flu", "nonlocalized"} <= set(table[table.model == "invented"].localization)
        assert len(table[table.model == "organism"]) == len(recorded(name, forget_size=16))
    monkeypatch.setattr(A.R, "check_recorded", lambda folder: ["editors"])
    with pytest.raises(SystemExit, match="other sources: editors"): A.main(["--editors", str(run)], tmp_path)


def test_the_fields_attacks_have_tables_that_are_made_when_they_are_not_there(tmp_path, monkeypatch):
    run = synthetic_run(tmp_path / "runs", ("flu",), seeds=(0,), n=16, stages=("localizations", "standard", "relearning"), model="invented")
    monkeypatch.setattr(A.R, "check_recorded", lambda folder: ["metrics", "editors"])
    A.main(["--field", str(run)], tmp_path)
    first = pd.read_parquet(tmp_path / "field_scorecard.parquet")
    A.main(["--field", str(run)], tmp_path) # nothing twice
    assert sorted(p.stem for p in tmp_path.glob("*.parquet")) == ["field", "field_scorecard"] and len(first) == len(pd.read_parquet(tmp_path / "field_scorecard.parquet"))


def test_what_edits_are_compared_with_is_kept_fact_by_fact(tmp_path, capsys):
    run = synthetic_run(tmp_path / "runs", ("flu",), seeds=(0,), n=16, stages=("localizations", "standard"), model="invented")
    with pytest.raises(SystemExit, match="has no never_knew.parquet"): A.main(["--never-knew", str(run)], tmp_path)
    said = lambda setting, groups: pd.DataFrame([dict(fact=f"{g}/{i}", group=g, format=f, setting=setting, top1_truth=g == "retain", variant=0, prob_truth=.5, loss=1. + i) | {s: i * .1 for s in A.never_knew.STATISTICS}
                                                 for g in groups for i in range(8) for f in ("completion", "paraphrase")])
    both = pd.concat([said("edited", ("forget", "ghost", "retain")), said("original", ("forget", "ghost", "retain"))])
    for place in ("flu", "random-mlps#1"): save_table(run / place / "seed0" / "never_knew.parquet", both, {"invented": True})
    A.main(["--never-knew", str(run)], tmp_path)
    A.main(["--never-knew", str(run)], tmp_path) # nothing twice
    assert [line.rsplit(": ")[-1] for line in capsys.readouterr().out.splitlines()] == ["192 rows added", "0 rows added"]
    table = recorded("never_knew", tmp_path, forget_size=16)
    assert table.groupby(["localization", "draw", "seed"]).size().to_dict() == {("flu", 0, 0): 96, ("random-mlps", 1, 0): 96}
    now = A.never_knew.compared(both.assign(localization="flu", draw=0, seed=0))
    pd.testing.assert_frame_equal(A.never_knew.compared(table[table.localization == "flu"].drop(columns=A.R.WHICH)), now)
    assert json.loads((tmp_path / "sources.json").read_text())["never_knew"] == A.R.source_hashes("never_knew")
    (tmp_path / "sources.json").write_text('{"never_knew": {}}')
    with pytest.raises(SystemExit, match="other sources: never_knew"): A.main(["--never-knew", str(run)], tmp_path)


def test_the_same_command_elsewhere_has_tables_of_its_own(tmp_path):
    run = synthetic_run(tmp_path / "runs", ("flu", "late"), seeds=(0,), n=16, stages=("localizations", "standard", "relearning"), model="invented")
    A.main(["--elsewhere", str(run)], tmp_path)
    names = ["elsewhere", "elsewhere_facts", "elsewhere_places"]
    assert sorted(p.stem for p in tmp_path.glob("*.parquet")) == names == sorted(json.loads((tmp_path / "sources.json").read_text()))
    first = {n: pd.read_parquet(tmp_path / f"{n}.parquet") for n in names}
    assert all({"flu", "late"} <= set(t.localization) for t in first.values()) and A.R.check_recorded(tmp_path) == list(A.R.RECORDED)
    A.main(["--elsewhere", str(run)], tmp_path) # nothing twice
    assert all(len(pd.read_parquet(tmp_path / f"{n}.parquet")) == len(t) for n, t in first.items())


def test_trainings_of_several_runs_are_counted_together(tmp_path):
    run, out = synthetic_run(tmp_path / "all", ("flu", "late"), seeds=(0, 1), n=16, stages=("localizations", "standard", "relearning", "latent"), model="invented"), tmp_path / "tables"
    out.mkdir()
    for part, lacks in (("first", 1), ("second", 0)):
        shutil.copytree(run, tmp_path / part)
        for folder in (tmp_path / part).glob(f"*/seed{lacks}"): shutil.rmtree(folder)
    for part in ("first", "second", "second"): A.main(["--facts", str(tmp_path / part)], out) # the last again
    found, table = A.scorecard.find(run), recorded("field_facts", out, model="invented")
    assert len(table) == len(found.facts) and json.loads((out / "sources.json").read_text()) == {"field_facts": A.R.source_hashes("field_facts")}
    sort = lambda t: t.sort_values(["localization", "seed", "attack"])[A.scorecard.CARD].reset_index(drop=True)
    pd.testing.assert_frame_equal(sort(A.scorecard.scorecard(table)), sort(A.scorecard.scorecard(found.facts)), check_dtype=False)
    (out / "sources.json").write_text('{"field_facts": {}}')
    with pytest.raises(SystemExit, match="other sources: field_facts"): A.main(["--facts", str(run)], out)
