"Many runs as one table: equal to reading them one by one, made once, of any version that there was."
import json
import numpy as np, pandas as pd, pyarrow as pa, pytest
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
        facts, old = stats.per_fact(mine), stats.per_fact(report.records(run))
        pd.testing.assert_frame_equal(facts, old, check_exact=True, check_dtype=False)
    assert set(report.load(runs, "training").run) == set(table.run) and len(report.load(runs, "probing"))

def test_metrics_are_made_once_and_again_when_a_record_changes(tmp_path, monkeypatch):
    run = synthetic_run(tmp_path/"run", ("flu",), seeds=(0,), n=4, stages=("standard",))
    first = report.load(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(results, "metrics", lambda run: pytest.fail("computed again"))
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
        at = rng.integers(0, groups, n)
        places = [p for g in range(groups) if len(p := np.flatnonzero(at == g))]
        each = np.array([stats.over_seeds(x[p], seeds[p], draws[p], share) for p in places])
        assert stats.over_groups(x, seeds, draws, places, share).tobytes() == each.tobytes() or \
            np.array_equal(stats.over_groups(x, seeds, draws, places, share), each, equal_nan=True)

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
