"Many runs as one table: equal to reading them one by one, made once, of any version that there was."
import json
import numpy as np
import pandas as pd
import pytest
from mechunlearn import report, results, stats, store
from mechunlearn.cli import main
from synthetic import synthetic_run

STAGES = ("maps", "localizations", "training", "standard", "relearning")

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for k, edits in enumerate((("flu", "late"), ("flu", "random-mlps#0", "random-mlps#1"), ("late",))):
        synthetic_run(folder/f"model-{k}/sports-athlete-editing-{4 + k}", edits, seeds=(0, 1), n=4 + k, stages=STAGES, model=f"model-{k}")
    return folder

def by_hand(folder): return {str(r.relative_to(folder)): report.metrics(r) for r in results.runs_below(folder)}

def test_one_table_is_each_run_read_by_itself(runs):
    table = report.load(runs)
    assert list(table.columns) == ["run", *stats.METRICS]
    each = by_hand(runs)
    assert table.run.unique().tolist() == list(each)
    for run, old in each.items():
        pd.testing.assert_frame_equal(table[table.run == run].drop(columns="run").reset_index(drop=True), old, check_exact=True)

def test_records_of_all_runs(runs):
    table = report.load(runs, "records")
    for run in results.runs_below(runs):
        mine = table[table.run == str(run.relative_to(runs))]
        facts, old = stats.per_fact(mine).drop(columns="run"), stats.per_fact(report.records(run))
        pd.testing.assert_frame_equal(facts, old, check_exact=True, check_dtype=False)
    assert set(report.load(runs, "training").run) == set(table.run) and len(report.load(runs, "probing"))

def test_metrics_are_made_once_and_again_when_a_record_changes(tmp_path, monkeypatch):
    run = synthetic_run(tmp_path/"run", ("flu",), seeds=(0,), n=4, stages=("standard",))
    first = report.load(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(results, "_metrics_of", lambda runs: pytest.fail("computed again"))
        pd.testing.assert_frame_equal(report.load(tmp_path), first, check_exact=True)
    file = run/"flu/seed0/evaluation.parquet"
    rows = store.load_table(file)
    store.save_table(file, rows.assign(top1_truth=False), {"another": True})
    again = report.load(tmp_path)
    assert not again.value.equals(first.value)
    pd.testing.assert_frame_equal(again.drop(columns="run"), report.metrics(run), check_exact=True)

def test_an_older_schema_is_read_and_a_newer_one_refused(runs, tmp_path, monkeypatch):
    run = results.runs_below(runs)[0]
    old = report.load(run)
    def keep(version, rows):
        (tmp_path/"old").mkdir(exist_ok=True)
        (tmp_path/"old/run.json").write_text((run/"run.json").read_text())
        file = store.save_table(tmp_path/"old/metrics.parquet", rows, {"records": {}})
        meta = json.loads(store.sidecar(file).read_text())
        meta |= {"schema": version, "hash": store.cause_hash(meta["causes"], version)}
        store.sidecar(file).write_text(json.dumps(meta))
    keep(0, old.drop(columns=["run", "setting"]).rename(columns={"value": "mean"}))
    monkeypatch.setitem(results.UPGRADES, 0, lambda t: t.rename_columns(["value" if c == "mean" else c for c in t.column_names]))
    table = report.load(tmp_path)
    assert table.value.equals(old.value) and "mean" not in table
    store.save_table(tmp_path/"new/metrics.parquet", old.drop(columns="run"), {"records": {}})
    (tmp_path/"new/run.json").write_text((run/"run.json").read_text())
    both = report.load(tmp_path)
    assert both[both.run == "old"].setting.isna().all() and len(both) == 2*len(old)
    keep(store.SCHEMA + 1, old.drop(columns="run"))
    with pytest.raises(store.Refusal, match="install a newer one"): report.load(tmp_path)

def test_what_cannot_be_read_is_named(runs, tmp_path):
    with pytest.raises(store.Refusal, match="no runs"): report.load(tmp_path)
    with pytest.raises(store.Refusal, match="did you mean 'metrics'"): report.load(runs, "metric")
    (tmp_path/"run.json").write_text((results.runs_below(runs)[0]/"run.json").read_text())
    with pytest.raises(store.Refusal, match="has metrics yet"): report.load(tmp_path)

def test_the_overview_says_what_the_results_tables_say(runs):
    seen = report.overview(report.load(runs))
    for run, m in by_hand(runs).items():
        table = report.results_table(m)
        mine = seen[seen.run == run].set_index("localization")
        for c in results.GLANCE:
            if c in table.columns.get_level_values(0): pd.testing.assert_series_equal(mine[c], table[(c, "value")].reindex(mine.index), check_exact=True, check_names=False)

@pytest.mark.parametrize("share", [True, False])
def test_intervals_of_many_groups_are_those_of_each(share):
    rng = np.random.default_rng(share)
    for _ in range(30):
        n, groups = int(rng.integers(1, 400)), int(rng.integers(1, 12))
        x = rng.choice([0., 1.], n) if rng.random() < .4 else rng.random(n)*(1 if share else 5)
        if rng.random() < .2: x = np.full(n, x[0])
        seeds, draws = rng.integers(0, rng.integers(1, 12), n), rng.integers(0, rng.integers(1, 12), n)
        at = np.unique(rng.integers(0, groups, n), return_inverse=True)[1]
        each = np.array([stats.over_seeds(x[p], seeds[p], draws[p], share) for g in range(at.max() + 1) for p in [at == g]])
        assert np.array_equal(stats.over_groups(x, at, seeds, draws, share), each, equal_nan=True)

def test_holm_is_that_of_statsmodels():
    from statsmodels.stats.multitest import multipletests
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 50):
        p = rng.choice([0, .01, .02, .5, 1, *rng.random(20)], n)
        assert np.array_equal(stats.holm(p), multipletests(p, method="holm")[1])
    assert np.isnan(stats.holm([np.nan, .2])[0]) and stats.holm([np.nan, .2])[1] == .2 and not len(stats.holm([]))

def test_the_command_shows_many_runs_as_one_table(runs, tmp_path, monkeypatch, capsys):
    from mechunlearn import cli
    monkeypatch.setattr(cli, "MANY", 2)
    assert main(["report", str(runs)]) == 0
    said = capsys.readouterr().out
    assert "3 runs" in said and all(f"model-{k}/" in said for k in range(3)) and not list(runs.rglob("report.html"))
    assert main(["report", str(runs), "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(report.load(runs))

def test_json_of_many_runs_says_what_is_not_available(tmp_path, monkeypatch, capsys):
    from mechunlearn import cli
    monkeypatch.setattr(cli, "MANY", 1)
    for k in range(2): synthetic_run(tmp_path/f"run-{k}", ("flu",), seeds=(0,), n=4, stages=("standard",))
    store.write_json(tmp_path/"run-1/notes/relearning.json", {"low resource": "too few facts"})
    store.write_json(tmp_path/"run-1/notes/localization.json", {"late": "this model has no late layers"})
    assert main(["report", str(tmp_path), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows, notes = [l for l in lines if "note" not in l], [l for l in lines if "note" in l]
    assert {l["run"] for l in rows} == {"run-0", "run-1"} and len(rows) == len(report.load(tmp_path)) and list(rows[0]) == ["run", *stats.METRICS]
    assert notes == [{"run": "run-1", "localization": "late", "note": "this model has no late layers"},
                     {"run": "run-1", "stage": "relearning", "what": "low resource", "note": "too few facts"}]
    assert main(["report", str(tmp_path)]) == 0 and "2 things could not be made, in 1 of the runs" in capsys.readouterr().out
    (tmp_path/"run-1/notes/relearning.json").write_text("{")
    assert main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "relearning.json" in said.err and all(f"run-{k}" in said.out for k in range(2))

@pytest.mark.parametrize("how", ["bytes", "sidecar", "columns", "no records"])
def test_one_bad_run_among_many_is_named_and_the_others_shown(tmp_path, monkeypatch, capsys, how):
    from mechunlearn import cli
    monkeypatch.setattr(cli, "MANY", 2)
    for k in range(4): synthetic_run(tmp_path/f"run-{k}", ("flu",), seeds=(0,), n=4 + k, stages=("standard",) if (how, k) != ("no records", 2) else ())
    file = tmp_path/"run-2/flu/seed0/evaluation.parquet"
    if how == "bytes": file.write_bytes(file.read_bytes()[:-100])
    if how == "sidecar": store.sidecar(file).write_text("{")
    if how == "columns": store.save_table(file, pd.DataFrame({"fact": [1]}), {"another": True})
    assert main(["report", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "run-1" in said.out and "run-3" in said.out and "run-2" not in said.out and "1 of 4 runs are not in the table" in said.err
    assert how == "no records" or "run-2" in said.err.splitlines()[0]
    skipped = []
    table = report.load(tmp_path, skip=lambda run, e: skipped.append(run.name))
    assert skipped == ["run-2"]*(how != "no records") and table.run.unique().tolist() == ["run-0", "run-1", "run-3"]

def test_a_folder_that_cannot_be_written_to_is_read(runs, monkeypatch):
    def full(*args): raise PermissionError(13, "Permission denied")
    want = report.load(runs)
    for file in runs.rglob("metrics.parquet"): file.unlink()
    with monkeypatch.context() as m:
        m.setattr(results, "save_table", full)
        pd.testing.assert_frame_equal(report.load(runs), want, check_exact=True)
    pd.testing.assert_frame_equal(report.load(runs), want, check_exact=True)

@pytest.mark.parametrize("at_once", [1, 40_000, 10**9])
def test_metrics_do_not_depend_on_which_runs_are_summarised_together(runs, monkeypatch, at_once):
    monkeypatch.setattr(results, "AT_ONCE", at_once)
    for file in runs.rglob("metrics.parquet*"): file.unlink()
    table = report.load(runs)
    for run, old in by_hand(runs).items():
        pd.testing.assert_frame_equal(table[table.run == run].drop(columns="run").reset_index(drop=True), old, check_exact=True)

def test_records_of_several_runs_are_not_pooled(runs):
    with pytest.raises(store.Refusal, match="several runs"): stats.summarise(report.load(runs, "records"))
