import json, re, shutil, time
from functools import lru_cache
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from mechunlearn import metrics, recorded_tables, report as r, scorecard, store
from mechunlearn.evaluation import SCALED, plot_scale
from mechunlearn.figures import ordered, spread
from mechunlearn.claims import tally
from mechunlearn.metrics import holm_by, opponent
from mechunlearn.frontier import side_of
from mechunlearn.scorecard import with_power
from mechunlearn.stats import wilson
from mechunlearn.store import Broken, Refusal
from synthetic import synthetic_run

SMALL = ("flu", "causal-tracing-mlps", "random-mlps#0", "random-mlps#1", "late")

@pytest.fixture(scope="module")
def run_dir(tmp_path_factory): return synthetic_run(tmp_path_factory.mktemp("run"), SMALL, seeds=(0, 1), n=12)

@pytest.fixture(scope="module")
def found(run_dir): return r.find(run_dir)

@pytest.fixture(scope="module")
def hashes_once():
    "What a table was made with is read from the sources once: no test here changes them"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(recorded_tables, "source_hashes", lru_cache(recorded_tables.source_hashes))
        yield

@pytest.fixture(scope="module")
def kept(run_dir, found, hashes_once, tmp_path_factory):
    "The run as recorded tables"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(recorded_tables, "find", {run_dir: found}.get) # it was read already
        return r.record([run_dir], tmp_path_factory.mktemp("kept")/"recorded")

@pytest.fixture
def unsaved(monkeypatch):
    "Figures are drawn, but not written"
    monkeypatch.setattr(Figure, "savefig", lambda fig, file, **k: None)

@pytest.fixture
def only(monkeypatch):
    "Function: a report has only these sections"
    return lambda *titles: monkeypatch.setattr(r, "SECTIONS", {t: r.SECTIONS[t] for t in titles})

def one(localization="flu", seed=0, draw=0, n=20, truth=0., group="forget", fmt="mcq", variants=1, **more):
    "Records of n facts of which the share `truth` gives the old answer"
    base = dict(localization=localization, draw=draw, seed=seed, evaluation="standard", format=fmt, group=group, relation="sport", truth="a", edit="b")
    return pd.DataFrame([base | dict(fact=f"f{i:03d}", subject=f"s{i}", variant=v, top1_truth=i < truth*n, top1_edit=i >= truth*n, prob_truth=float(i < truth*n),
                                     prob_edit=float(i >= truth*n)) | more for i in range(n) for v in range(variants)])

# reading

def test_records_carry_localization_draw_and_seed(run_dir):
    got = r.records(run_dir)[["localization", "draw", "seed"]].drop_duplicates()
    assert set(got.localization) == {"none", "flu", "causal-tracing-mlps", "random-mlps", "late"}
    assert set(got[got.localization == "random-mlps"].draw) == {0, 1} and set(got.seed) == {0, 1}

def test_unfinished_artefact_is_left_out_and_a_damaged_one_named(tmp_path):
    run = synthetic_run(tmp_path, ("flu",), seeds=(0, 1), n=6, stages=("standard",))
    (run/"flu/seed1/evaluation.parquet.meta.json").unlink()
    assert set(r.records(run).query("localization == 'flu'").seed) == {0}
    with open(run/"flu/seed0/evaluation.parquet", "ab") as f: f.write(b"x")
    with pytest.raises(Broken, match="flu/seed0/evaluation.parquet"): r.records(run)

def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(Refusal, match="run.json"): r.about(tmp_path)
    with pytest.raises(Refusal, match="no records"): r.records(tmp_path)
    with pytest.raises(Refusal, match="no records"): r.per_fact(pd.DataFrame({"a": [1]}))

# counting

def test_n_counts_facts_not_prompts():
    m = r.summarise(one(n=20, truth=.5, variants=4))
    assert set(m.n) == {20}
    narrow, wide = (r.summarise(one(n=20, truth=.5, variants=v)).query("seed == 0 and measure == 'top1' and answer == 'truth'").iloc[0] for v in (4, 1))
    assert (narrow.ci_low, narrow.ci_high) == (wide.ci_low, wide.ci_high)

def test_relearning_halves_are_put_together():
    halves = [one(evaluation="relearning", fmt="completion", step=5, setting=f"half{h}").query("index % 2 == @h") for h in (0, 1)]
    m = r.summarise(pd.concat(halves)).query("seed == 0 and measure == 'top1' and answer == 'truth'")
    assert len(m) == 1 and m.n.item() == 20 and m.setting.isna().all()

def test_no_edit_score_without_an_edit_answer():
    kept = one(group="retain", fmt="completion", edit=None, top1_edit=False, prob_edit=None)
    assert set(r.summarise(kept).answer) == {"truth"}

def test_metrics_have_the_columns_and_honest_intervals(found):
    m = found.metrics
    assert list(m.columns) == r.METRICS and len(m) > 500
    assert m[["value", "ci_low", "ci_high", "n"]].notna().all(axis=None)
    assert (m.ci_low <= m.value).all() and (m.value <= m.ci_high).all() and (m.n > 0).all()
    shares = m[m.measure.isin(["top1", "prob", "accuracy"])]
    assert shares.ci_low.min() >= 0 and shares.ci_high.max() <= 1
    assert {"standard", "relearning", "latent", "probing"} == set(m.evaluation)
    assert set(m[m.evaluation == "latent"].measure) == {"accuracy", "prob"}

def test_random_draws_are_separate_by_seed_and_pooled_together(found):
    m = r.column_rows(found.metrics, "MCQ truth")
    assert set(m[m.seed >= 0].localization) >= {"random-mlps#0", "random-mlps#1"} and "random-mlps" not in set(m[m.seed >= 0].localization)
    pooled = m[(m.seed == -1) & (m.localization == "random-mlps")].iloc[0]
    each = m[m.localization.isin(["random-mlps#0", "random-mlps#1"])]
    assert pooled.n == each.n.max() and np.isclose(pooled.value, each.value.mean()) and pooled.n_params == each.n_params.iloc[0]

def test_difference_is_value_minus_reference():
    data = pd.concat([one("flu", seed=s, truth=t, n=n) for s, t, n in [(0, .1, 20), (1, .3, 10)]] + [one("late", seed=s, truth=.6, n=n) for s, n in [(0, 20), (1, 10)]])
    c = r.compare(data, measure="prob").iloc[0]
    assert np.isclose(c.value - c.reference, c.difference) and c.n == 20

def test_records_of_other_settings_are_left_out(tmp_path, only):
    only("What was done")
    here = synthetic_run(tmp_path, ("flu",), seeds=(0, 1), n=6, stages=("standard",))
    path = next(here.glob("flu/seed0/evaluation.parquet"))
    table, causes = store.load_table(path), store.read_meta(path)["causes"]
    n = len(r.records(here))
    for side in here.glob("flu/seed1/evaluation.parquet.meta.json"):
        meta = json.loads(side.read_text()); meta["provenance"]["time"] = "2001-01-01T00:00:00+00:00"; side.write_text(json.dumps(meta))
    store.save_table(path, table, causes | {"training": {"steps": 3}})
    assert len(r.records(here)) < n and (found := r.find(here)).old == ["flu/seed1"] and "flu/seed1" in r.page(found)

@pytest.mark.parametrize("stem", ["low_resource", "relearning_grid", "soft", "hardened", "generation", "capability", "inside"])
def test_attacks_made_with_other_settings_are_not_pooled(stem, tmp_path):
    run = synthetic_run(tmp_path, ("flu",), seeds=(0, 1), n=6, stages=("standard",))
    table = store.load_table(run/"flu/seed0/evaluation.parquet")
    for seed in (0, 1): store.save_table(run/f"flu/seed{seed}/{stem}.parquet", table, {"seed": seed, stem: {"steps": seed}})
    assert r.finished(run).query("stem == @stem").used.sum() == 1

def test_what_edits_left_besides_facts():
    asked = [one(name, n=20, fmt="benchmark", group="sciq", truth=truth) for name, truth in (("none", 1.), ("flu", .5))]
    rows = pd.concat(asked).assign(evaluation="capability")
    table = r.capability_table(r.summarise(rows))
    assert table.localization.tolist() == ["none", "flu"] and table.value.tolist() == [1., .5] and table.what.eq("sciq").all()
    text = r.capability_text(table)
    assert "unedited" in text and f"sciq (n={table.n.max()})" in text and "0.50 [" in text
    assert r.capability_table(r.summarise(one("flu"))).empty

def test_pooling_weighs_seeds_that_disagree():
    same, differ = (r.summarise(pd.concat([one(seed=s, truth=t) for s, t in enumerate(ts)])) for ts in ([.5, .5, .5], [0., .5, 1.]))
    width = lambda m: (lambda x: x.ci_high - x.ci_low)(m.query("seed == -1 and measure == 'top1' and answer == 'truth'").iloc[0])
    assert width(differ) > 2*width(same)
    m = r.summarise(pd.concat([one(seed=s, truth=0.) for s in range(3)])).query("seed == -1 and answer == 'truth' and measure == 'top1'").iloc[0]
    assert (m.value, m.ci_low, m.ci_high) == pytest.approx((0, *wilson(0, 20)))  # the same 20 facts three times

# comparing

def test_compare_pairs_facts_of_the_same_seed():
    data = pd.concat([one("flu", seed=s, truth=.0, n=40) for s in (0, 1)] + [one("late", seed=s, truth=.6, n=40) for s in (0, 1, 2)] + [one("all-mlps", seed=0, truth=0., n=40)])
    c = r.compare(data.sample(frac=1, random_state=0)).set_index("localization")
    assert c.n.to_dict() == {"late": 40, "all-mlps": 40} and np.isclose(c.difference["late"], .6)
    assert c.test.to_dict() == {"late": "McNemar, t over 2 seeds", "all-mlps": "McNemar"}
    assert c.p["all-mlps"] == 1 and c.p_holm["late"] == c.p["late"] < 1e-4 and c.differs.to_dict() == {"late": True, "all-mlps": False}

def test_a_family_is_one_quantity_against_the_papers_opponents():
    names = ["causal-tracing", "causal-tracing-mlps", "random-mlps#1", "all-mlps", "late", "somebody@theirs"]
    got = holm_by(pd.DataFrame({"localization": names, "difference": .5, "p": .01})).set_index("localization")
    assert np.allclose(got.p_holm, [.04, .04, .04, .04, .01, .01]) and got.differs.all()
    assert [opponent(n) for n in names] == ["causal tracing", "causal tracing", "random", "all MLPs", "late", "somebody@theirs"]
    two = pd.concat([pd.DataFrame({"localization": names, "difference": .04, "p": .01, "attack": a}) for a in "ab"])
    assert holm_by(two, "attack").p_holm.max() == .04 and not holm_by(two, "attack").differs.any()

def test_means_of_several_prompts_use_the_bootstrap():
    mixed = lambda name, k: pd.concat([one(name, n=20, variants=1, truth=t).assign(variant=v) for v, t in enumerate(k)])
    c = r.compare(pd.concat([mixed("flu", [0, .1, .1, 0]), mixed("late", [.9, 1, .8, 1])]))
    assert c.test.item() == "paired bootstrap" and c.ci_low.item() > .5 and c.p.item() == c.p_facts.item()

def test_a_reference_is_needed_and_can_be_chosen():
    data = pd.concat([one("late"), one("all-mlps", truth=.5)])
    assert r.compare(data).empty and r.compare(data, against="late").localization.tolist() == ["all-mlps"]
    with pytest.raises(Refusal, match="did you mean 'MCQ truth'"): r.compare(data, "MCQ truht")

@pytest.mark.parametrize("flu,late,verdict", [(0., .9, "appears"), (.9, 0., "reversed"), (.1, .15, "no difference seen")])
def test_verdicts(flu, late, verdict):
    tests = r.orderings(pd.concat([one("flu", truth=flu, n=40), one("late", truth=late, n=40)]))
    got = tests.set_index("column").verdict
    assert got["MCQ truth"] == got["MCQ edit"] == verdict
    assert ("REVERSED" in " ".join(r.say_orderings(tests))) == (verdict == "reversed")
    assert ("means little here" in r.say_tally(tests)) == (verdict == "no difference seen") != ("can see a difference" in r.say_tally(tests))

def test_the_tally_is_the_papers_comparison():
    edits = [("flu", .0), ("causal-tracing", .9), ("all-mlps", .0), ("random#0", .6), ("random#1", .6), ("late", .9), ("mine", .9)]
    rows = [one(n.split("#")[0], truth=t, n=40, draw=int(n.partition("#")[2] or 0), seed=s) for n, t in edits for s in (0, 1, 2)]
    tests = r.orderings(pd.concat(rows))
    got = tally(tests).set_index("opponent")
    assert list(got.index) == ["causal tracing", "all MLPs", "random"] and (got.tested == 2).all() # MCQ truth and MCQ edit
    assert got.appears.to_dict() == {"causal tracing": 2, "all MLPs": 0, "random": 2} and not got.reversed.any()
    said = r.say_tally(tests)
    assert "tested 6 times" in said and "4 appear, none is reversed, and in the other 2" in said and "2 of 2 against causal tracing" in said
    assert "late, which is not in the paper" in said.split(". ")[-1] and "differs from FLU in 2 of 2" in said and "mine" not in said
    ticks = [t.get_text() for t in r.plot_orderings(tests).axes[0].get_xticklabels()]
    assert ticks == ["causal-tracing", "all-mlps", "random", "mine", "late (control)"]
    assert "late" not in r.say_tally(tests[tests.localization != "late"]) and r.say_tally(tests[tests.localization == "late"]).startswith("late")

def test_what_the_paper_does_not_report_is_no_ordering_of_it():
    rows = [one(n, truth=t, n=40, group="retain", seed=s) for n, t in [("flu", .9), ("all-mlps", .1), ("random", .9)] for s in (0, 1)]
    tests = r.orderings(pd.concat(rows))
    assert set(tests.column) == {"MCQ retain"} and set(tests.verdict) == {"appears", "no difference seen"} and tally(tests).empty
    assert r.say_tally(tests) == "Of MCQ retain, which the authors measured and the paper does not report: FLU is ahead in 1 of 2 tests and behind in 0."

def test_what_only_these_facts_show_is_said_in_a_clause():
    rows = [one(n, truth=t, n=40, seed=s) for n, ts in [("flu", (0, 0, 0)), ("all-mlps", (.0, .8, .1))] for s, t in enumerate(ts)]
    tests = r.orderings(pd.concat(rows))
    assert (tests.verdict == "no difference seen").all() and "on these facts alone, another training not considered, 2 are seen and none is reversed" in r.say_tally(tests)

@pytest.mark.parametrize("twice,said,marks", [(("flu", "all-mlps"), "2 of them, those against nonlocalized, rest on one training", 2), ((), "All of them rest on one training", 4),
                                              (("flu", "all-mlps", "nonlocalized"), None, 0)])
def test_what_rests_on_one_training_is_said_and_marked(twice, said, marks):
    rows = [one(n, n=40, truth=.1, seed=s) for n in ("flu", "all-mlps", "nonlocalized") for s in ((0, 1) if n in twice else (0,))]
    tests = r.orderings(pd.concat(rows))
    assert (said in r.say_tally(tests)) if said else "one training" not in r.say_tally(tests)
    drawn = [t.get_text() for t in r.plot_orderings(tests).axes[0].texts]
    assert sum(t.endswith("¹") for t in drawn) == marks and any("one training" in t for t in drawn) == bool(marks)

def test_claims_of_equality_are_never_confirmed():
    tests = r.orderings(pd.concat([one(n, fmt="completion", truth=t) for n, t in [("flu", 0.), ("late", .8), ("all-mlps", 0.)]]))
    assert tests[tests.column == "forget error"].set_index("localization").verdict.to_dict() == {"late": "differs", "all-mlps": "no difference seen"}

def test_chance_is_counted_from_the_facts():
    facts = pd.concat([one(fmt="completion", n=1).assign(fact=i, truth="abc"[i % 3], edit="bca"[i % 3]) for i in range(9)])
    assert np.allclose(r.chance(facts), (1/3, 1/2))
    assert np.isnan(r.chance(one(fmt="mcq"))).all()

def test_frontier_takes_the_better_attack():
    data = pd.concat([one("flu", truth=.2), one("flu", evaluation="relearning", fmt="completion", truth=.5, step=3), one("flu", evaluation="relearning", fmt="completion", step=0, truth=1.),
                      one("flu", group="same-subject", fmt="completion", truth=.9, edit=None)])
    f = r.frontier(r.summarise(data)).query("seed == -1").iloc[0]
    assert f.attack == "relearning" and np.isclose(f.robust, .5) and np.isclose(f.kept, .9)
    assert f.robust_low <= f.robust <= f.robust_high and f.kept_low <= f.kept <= f.kept_high

def test_frontier_compares_like_with_like(found):
    m = found.metrics
    unfinished = m[~((m.evaluation == "relearning") & (m.localization == "late"))]
    assert "late" in set(r.frontier(m).localization) and "late" not in set(r.frontier(unfinished).localization)
    none_yet = m[(m.evaluation != "relearning") | (m.localization == "none")]
    assert "late" in set(r.frontier(none_yet).localization) and set(r.frontier(none_yet).attacks) == {"MCQ"}
    assert "Against MCQ, no other edit" in r.say_frontier(none_yet)

# tables

def test_table_says_what_is_budget_matched(found):
    table = r.results_table(found.metrics)
    assert table[("matched", "value")].to_dict() == {"none": "–", "flu": "yes", "causal-tracing-mlps": "yes", "random-mlps": "yes", "late": "no"}
    assert table.loc["none", ("MCQ truth", "value")] == 1 and pd.isna(table.loc["none", ("relearned truth", "value")])
    assert (table[("forget error", "lo")] <= table[("forget error", "value")]).all()

def test_text_fits_a_terminal(found):
    m = found.metrics.assign(localization=found.metrics.localization.replace("causal-tracing-mlps", "attribution-patching-mlps"))
    text = r.results_text(r.results_table(m))
    assert max(map(len, text.splitlines())) <= 120
    assert "n=24" in text and "Not budget-matched" in text and re.search(r"\d\.\d\d \[\d\.\d\d,\d\.\d\d\]", text) and "unedited" in text

def test_a_table_says_how_many_trainings_stand_behind_a_row(found):
    few = found.metrics[~((found.metrics.localization == "late") & (found.metrics.seed > 0))]
    made, table = metrics.trainings(few), r.results_table(few)
    random = found.metrics[found.metrics.localization.str.startswith("random-mlps#") & (found.metrics.seed >= 0)]
    assert made["flu"] == found.metrics[found.metrics.seed >= 0].seed.nunique() > made["late"] == 1
    assert made["random-mlps"] == len(random[["localization", "seed"]].drop_duplicates()) == sum(n for k, n in made.items() if k.startswith("random-mlps#"))
    elsewhere = found.metrics.assign(localization=found.metrics.localization.replace("flu", "edited@theirs"))
    assert metrics.trainings(elsewhere)["edited@theirs"] == 1 # asked with several seeds, made once
    assert re.search(rf"Trainings behind a row .*: {made['flu']}; .*late 1", " ".join(r.results_text(table).split()))
    assert f"Trainings behind a row (seeds, and draws of random places): {made['flu']}" in r.results_html(table).as_raw_html()

def test_tables_of_two_runs_are_not_mixed(found):
    with pytest.raises(Refusal, match="mixes runs"): r.results_table(pd.concat([found.metrics, found.metrics.assign(model="another")]))

# figures

FIGURES = ("plot_bars", "plot_frontier", "plot_relearning", "plot_latent")

@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("keep", [("flu",), ("none", "late"), ("none", "flu", "random-mlps", "random-mlps#0")])
def test_figures_of_few_localizations(found, name, keep):
    m = found.metrics[found.metrics.localization.isin(keep)]
    assert isinstance(getattr(r, name)(m), Figure)
    says = getattr(r, name.replace("plot", "say"))(m)
    assert says.endswith(".") and "nan" not in says and len(says) > 40

def test_figures_show_themselves(found): assert r.plot_bars(found.metrics)._repr_png_().startswith(b"\x89PNG")

def test_map_figures(found):
    for plot, say, data in [(r.plot_probe, r.say_probe, found.curve), (r.plot_components, r.say_components, found.traced), (r.plot_trace, r.say_trace, found.grid)]:
        assert isinstance(plot(data, found.flu), Figure) and isinstance(plot(data), Figure) and "nan" not in say(data, found.flu)
    assert found.flu == [1, 2, 3] and isinstance(r.plot_training(found.curves), Figure)
    assert "late" in r.say_training(found.curves) and "late 2.0 times" in r.say_localizations(found.where)

def test_frontier_labels_do_not_cover_each_other(found):
    rng = np.random.default_rng(0)
    m = pd.concat([found.metrics[found.metrics.localization == "flu"].assign(localization=n, value=lambda d: (d.value + rng.normal(0, .004)).clip(0, 1))
                   for n in ("flu", "flu-path", "late", "all-mlps", "nonlocalized", "causal-tracing", "attribution-patching-mlps")])
    fig = r.plot_frontier(m); fig.draw_without_rendering()
    texts = [t for t in fig.axes[0].texts if t.get_text() in set(m.localization)]
    boxes = [type(t).__mro__[1].get_window_extent(t, fig.canvas.get_renderer()) for t in texts]
    assert len(boxes) == 7 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])

@pytest.mark.parametrize("ys", [[.5]*4, [1., .99, .98], [0., 0., 1.], []])
def test_spread_keeps_the_gap_and_the_order(ys):
    at = spread(ys, .1)
    assert np.all(np.diff(np.sort(at)) >= .1 - 1e-9) and list(np.argsort(at, kind="stable")) == list(np.argsort(ys, kind="stable"))
    assert len(at) == 0 or (at.min() >= -1e-9 and at.max() <= 1 + 1e-9)

def test_before_after_names_the_words(found):
    table = r.before_after(found.facts, n=2)
    assert len(table) == 4 and set(table["asked in"]) == {"completion", "MCQ"}
    assert (table.before.str.split(" ").str[0] == table["old answer"]).all()
    assert table["old answer"].isin(["football", "baseball", "basketball"]).all()

# report

@pytest.fixture(scope="module")
def written(run_dir, tmp_path_factory): return r.write_report(run_dir, tmp_path_factory.mktemp("report")/"report.html").read_text()

def test_report_is_one_file_without_outside_resources(run_dir, written):
    page = written
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", page) and "@import" not in page and "<script" not in page
    assert page.count("<img alt=") == 14 and "class=\"missing\"" not in page
    assert [t for t in r.SECTIONS if f">{r.html.escape(t)}</h2>" in page] == [t for t in r.SECTIONS if t not in ("Not available", "What an attack costs", "Part after part", "Besides facts")] # where there is any such; where time was taken; for sequences; where asked
    pd.testing.assert_frame_equal(store.load_table(run_dir/"metrics.parquet"), r.metrics(run_dir))

@pytest.mark.parametrize("titles", [("What was done", "Results", "Relearning", "Training", "Before and after"), pytest.param(tuple(r.SECTIONS), marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_same_run_gives_the_same_report(found, written, titles):
    for t in titles: assert r.SECTIONS[t][0](found) in written, t

@pytest.mark.slow
def test_the_same_run_gives_the_same_file(run_dir, written, tmp_path): assert r.write_report(run_dir, tmp_path/"again.html").read_text() == written

@pytest.mark.parametrize("stages,says", [((), "none yet"), (("maps",), "The results table is missing"), (("standard", "localizations"), "relearning</b> has not run"),
                                         (("maps", "localizations", "training"), "Latent knowledge is missing")])
def test_unfinished_runs_say_what_is_missing(tmp_path, stages, says, unsaved):
    page = r.write_report(synthetic_run(tmp_path/"run", ("flu", "late"), seeds=(0,), n=6, stages=stages)).read_text()
    assert says in page and "How to make it again" in page and ("One seed only" in page) == ("standard" in stages)

def test_a_run_of_nothing_but_somebodys_edit(tmp_path, unsaved):
    run = synthetic_run(tmp_path, ("late",), seeds=(0,), n=8, stages=("standard", "relearning", "latent"))
    (run/"late").rename(run/"edited@theirs")
    store.save_json(run/"localizations/edited@theirs.json", {"name": "edited@theirs", "components": [], "neurons": None, "slices": [], "sizes": [9], "budget": None}, {})
    page = r.write_report(run).read_text()
    assert "edited@theirs" in page and "exposed" in page and "no FLU localization to compare sizes" in page

def test_names_are_escaped(tmp_path, unsaved):
    run = synthetic_run(tmp_path, ("flu",), seeds=(0,), n=6, stages=("standard",), model="<script>alert(1)</script>")
    assert "<script" not in r.write_report(run).read_text()

def test_command_repeats_the_options(found):
    about = {"model": "m", "task": "t", "options": {"forget_size": 8, "paper_split": True, "inject": None}}
    assert r.command(found._replace(about=about)) == ("mechunlearn run --model m --task t --forget-size 8 --paper-split "
        "--localizations flu,causal-tracing-mlps,random-mlps,late --draws 2 --seeds 0,1 --out runs")

# recorded tables

RECORDED = Path(__file__).parent.parent/"nbs/recorded"

@pytest.mark.skipif(not (RECORDED/"sources.json").exists(), reason="nothing was recorded yet")
def test_what_the_notebooks_show_is_not_stale(hashes_once): assert r.check_recorded(RECORDED) == []

def test_recorded_tables_give_the_same_results(found, kept):
    out = kept
    tables = {t: pd.read_parquet(out/f"{t}.parquet") for t in r.RECORDED}
    assert sum(p.stat().st_size for p in out.iterdir()) < 400_000
    pd.testing.assert_frame_equal(r.results_table(tables["metrics"]), r.results_table(found.metrics))
    pd.testing.assert_frame_equal(r.orderings(tables["records_small"]), r.orderings(found.facts), rtol=1e-5, atol=1e-6)
    pd.testing.assert_frame_equal(r.before_after(tables["records_small"]), r.before_after(found.facts))
    assert np.allclose(r.chance(tables["records_small"]), found.guess)
    for name in FIGURES: getattr(r, name)(tables["metrics"])
    r.plot_probe(tables["probing"], tables["probing"].query("flu").layer.unique()); r.plot_trace(tables["trace_grid"]); r.plot_components(tables["traced"])
    pd.testing.assert_frame_equal(tables["removal"][found.removed.columns], found.removed)
    r.plot_localizations(tables["localizations"]); r.plot_training(tables["training"])

def test_stale_tables_are_named(kept, tmp_path):
    assert r.check_recorded(tmp_path/"nothing") == list(r.RECORDED)
    out = shutil.copytree(kept, tmp_path/"kept")
    assert r.check_recorded(out) == []
    known = json.loads((out/"sources.json").read_text()); known["probing"]["code"] = "another"
    (out/"sources.json").write_text(json.dumps(known)); (out/"training.parquet").unlink()
    assert r.check_recorded(out) == ["probing", "training"]

def source_pair(folder):
    "Two versions of a module that differ in g only"
    for name, g in (("d", 1), ("e", 2)): (folder/f"{name}.py").write_text(f"def f(): return 0\n\ndef g(): return {g}\n")
    d, e = folder/"d.py", folder/"e.py"
    return r.source_hash(d, ("f",)) == r.source_hash(e, ("f",)) and r.source_hash(d, ("g",)) != r.source_hash(e, ("g",))

def test_comments_do_not_make_results_stale(tmp_path):
    for name, text in {"a.py": "# %% nbs/1\nx = 1\n", "b.py": "\n# other words\n\nx = 1   \n", "c.py": "x = 2\n"}.items(): (tmp_path/name).write_text(text)
    a, b, c = (r.source_hash(tmp_path/f"{n}.py") for n in "abc")
    assert source_pair(tmp_path)
    assert a == b != c and r.source_hash(tmp_path/"none.py") == ""

def test_runs_of_the_same_facts_are_kept_as_one(tmp_path, hashes_once):
    stages = ("localizations", "training", "standard", "relearning")
    runs = [synthetic_run(tmp_path/str(k), ("flu", "late"), seeds=seeds, n=12, stages=stages + more) for k, (seeds, more) in enumerate([((0,), ()), ((0, 1), ("latent",))])]
    for f in runs[0].glob("*/seed*/edit.json"):
        store.save_json(f, {"localization": {}, "config": {"lr": 2e-3, "inject": 1., "steps": 50}}, {"lr": 2e-3})
    kept = r.record(runs, tmp_path/"kept")
    worst, rows = (x for _, x in r.recorded("frontier", kept).groupby("attacks", sort=False))
    assert set(worst.lr) == {4e-3} and len(worst) == 6 and worst.attacks.iloc[0] == "the worst of 5 attacks" and rows.attacks.iloc[0] == "the worst of 4 attacks"
    assert set(zip(rows.localization, rows.lr, rows.seed)) == {(n, *p) for n in ("flu", "late") for p in ((4e-3, -1), (4e-3, 0), (4e-3, 1), (2e-3, -1), (2e-3, 0))}
    assert set(r.recorded("scorecard", kept).seed) == {-1, 0, 1} and len(r.recorded("metrics", kept)) == len(recorded_tables._slim(r.metrics(runs[1])))
    assert "flu at 0.00" in r.say_rates(rows) and r.plot_rates(rows)._repr_png_()[:4] == b"\x89PNG"

def test_of_two_runs_at_one_rate_the_one_with_more_seeds_counts(tmp_path):
    runs = [synthetic_run(tmp_path/str(k), ("flu",), seeds=seeds, n=8, stages=("training", "standard")) for k, seeds in enumerate([(0,), (0, 1)])]
    assert sorted(r.over_rates([r.find(x) for x in runs]).seed) == [-1, 0, 1]

def test_a_table_depends_on_what_its_stage_needs(tmp_path):
    (tmp_path/"one.py").write_text("from mechunlearn.two import helper\n\ndef stage(): return helper()\n\ndef figure(): return other()\n")
    (tmp_path/"two.py").write_text("__all__ = ['helper']\nLIMIT = 3\n\nclass Box: pass\n\nclass Bag: pass\n\n@patch\ndef size(self:Box): return LIMIT\n\n"
        "@patch\ndef weight(self:Bag): return 1\n\ndef helper():\n    weight = 2\n    return Box().size().weight\n\ndef other(): return stage()\n")
    need = r.needed([tmp_path/"one.py", tmp_path/"two.py"], ("stage",))
    assert need == {"one": {"stage"}, "two": {"helper", "Box", "size", "LIMIT"}}
    (tmp_path/"copy").mkdir(); copy = tmp_path/"copy"/"two.py"
    for old, new, same in [("other(): return stage()", "other(): return 7", True), ("weight = 2", "weight = 2 # two", True), ("LIMIT = 3", "LIMIT = 4", False)]:
        recorded_tables._statements.cache_clear(); copy.write_text((tmp_path/"two.py").read_text().replace(old, new))
        assert (r.source_hash(copy, need["two"]) == r.source_hash(tmp_path/"two.py", need["two"])) is same

# sequences and scale

def sequence(n=8, parts=3, lost=.25):
    "Each part's facts take the edit answer at their turn; in the end part 1 has lost a quarter of it"
    rows = []
    for step in range(parts + 1):
        for part in range(1, parts + 1):
            done = 0. if step < part else 1 - lost if part == 1 and step == parts else 1.
            rows.append(one(truth=1 - done, fmt="completion", n=n, evaluation="sequence", setting=f"part {part}", step=step).assign(fact=lambda d: f"p{part}" + d.fact))
    return pd.concat(rows, ignore_index=True)

# the scorecard

def probes(name, by_layer, n=200, seed=0):
    "Latent records: at each layer an independent random share of the facts is read right"
    rng = np.random.default_rng(seed)
    rows = [one(name, n=n, evaluation="latent", fmt="completion", setting="subject", layer=l).assign(top1_truth=rng.random(n) < p) for l, p in enumerate(by_layer)]
    return pd.concat(rows)

def test_the_best_of_many_variants_is_not_luck():
    rows = r.under_attack(pd.concat([one("flu", n=200, fmt="completion", truth=0), probes("flu", [1/3]*40)]))
    card = r.scorecard(rows).query("seed == -1").set_index("attack")
    best = probes("flu", [1/3]*40).groupby("layer").top1_truth.mean().max()
    assert best > .39 and abs(card.value["new probe"] - 1/3) < .05 and card.n["new probe"] == 200

def test_the_worst_case_is_furthest_above_guessing():
    truths = {"completion": 0., "mcq": .45, "paraphrase": .4}
    rows = pd.concat([one("flu", n=40, fmt=f, truth=t) for f, t in truths.items()] + [one("flu", n=8, fmt="completion", group="retain", relation=rel, truth=1)
                     for rel in ("sport",)] + [one("none", n=40, fmt=f, truth=1) for f in truths])
    rows["truth"] = np.where(rows.fact.str[-1].astype(int) % 2 == 0, "a", "b"); rows["edit"] = "c"
    card = r.scorecard(rows).query("seed == -1")
    assert r.guesses(r.per_fact(rows)) | {"multiple choice": .5} == r.guesses(r.per_fact(rows)) # two answers are somebody's truth
    worst = card[card.attack == r.WORST].set_index("localization")
    assert worst.which["flu"] == "multiple choice" and worst.value["none"] == 1 and worst.guess["flu"] == .5

@pytest.mark.parametrize("kept,chosen", [(.9, ("k20", .9, .9)), (.2, ("k20", .9, .2))])
def test_chosen_variants_are_those_whose_retained_facts_are_shown(kept, chosen):
    "The longest prompt gets most old answers, and counts even if it breaks the retained facts"
    hit = lambda k, t, kept: [one("flu", n=20, evaluation="soft-prompt", fmt="completion", setting=f"half0/k{k}/seed1", step=9, truth=t),
                              one("flu", n=20, evaluation="soft-prompt", fmt="completion", setting=f"half0/k{k}/seed1", step=9, truth=kept, group="retain")]
    base = [one("flu", n=20, fmt="completion"), one("flu", n=20, fmt="completion", group="retain", truth=1)]
    rows = pd.concat(base + hit(0, 1, 1) + hit(5, .1, .95) + hit(20, .9, kept))
    rows["truth"] = np.where(rows.fact.str[-1].astype(int) % 2 == 0, "a", "b"); rows["edit"] = "c"
    soft = r.scorecard(rows).query("seed == -1").set_index("attack").loc["soft prompt"]
    assert (soft.which, soft.value, soft.retain_value) == (chosen[0], *map(pytest.approx, chosen[1:])) # k0 is no soft prompt
    rows.loc[rows.setting.fillna("").str.contains("k20") & (rows.group == "forget") & (rows.fact > "f011"), "top1_truth"] = False
    soft = r.scorecard(rows).query("seed == -1").set_index("attack").loc["soft prompt"]
    assert kept > .5 or (soft.which, soft.value) == ("k5", pytest.approx(.1)) # nor does one that gets few of either

def test_two_facts_count_at_their_last_step_and_all_facts_not_at_all():
    rows = [one("flu", n=20, evaluation="low-resource", fmt="completion", setting=f"{what}/half0", step=k, truth=t)
            for what, k, t in (("two facts", 0, .9), ("two facts", 10, .2), ("all facts", 20, 1.))]
    card = r.scorecard(pd.concat([one("flu", n=20, fmt="completion"), *rows])).query("seed == -1").set_index("attack")
    assert card.value["two facts retaught"] == pytest.approx(.2)

@pytest.mark.parametrize("power,excess,low,high,said", [(1, .5, .2, .8, "exposed"), (1, .1, -.2, .4, "no difference seen from guessing"), (.5, .5, .2, .8, "exposed"),
                         (1, -.9, -1, -.4, "below guessing"), (0, np.nan, np.nan, np.nan, "no attack has power here, hence no verdict")])
def test_what_the_worst_case_says(power, excess, low, high, said):
    assert r.verdict(pd.Series(dict(power=power, excess=excess, excess_low=low, excess_high=high))) == said

def test_recorded_scorecards_of_before_are_read(found):
    before = found.card.drop(columns=["power", "excess", "excess_low", "excess_high"])
    now = with_power(before)
    assert now.earlier.all() and set(now.power.dropna()) <= {0, 1} and now.excess[now.power == 0].isna().all()
    half = with_power(found.card.assign(power=np.where(found.card.attack == "multiple choice", np.nan, found.card.power))) # beside rows of today, as in a recorded table
    assert half.earlier.equals((half.attack == "multiple choice") & (half.retain_n > 0)) and half.power[half.earlier].notna().all()
    assert "recorded when" in r.say_scorecard(before) and "recorded when" not in r.say_scorecard(found.card)
    for shown in (r.scorecard_text(before), r.say_attack(before, "multiple choice")): assert "nan" not in shown
    for fig in (r.plot_scorecard(before), r.plot_attack(before, "multiple choice")): assert isinstance(fig, Figure)

def test_a_frontier_of_before_is_read(found):
    old = r.at_worst(found.card, found.metrics).drop(columns="power")
    assert "earlier rule" in r.say_frontier(found.metrics, rows=old) and isinstance(r.plot_frontier(found.metrics, rows=old), Figure)

def test_where_nothing_is_known_about_the_same_people_retained_facts_are_the_side_effect(found):
    m = found.metrics[found.metrics.group != "same-subject"]
    rows = r.frontier(m)
    assert side_of(found.metrics) == "same subject" and side_of(m) == "maintain" and set(rows.side) == {"maintain"} and len(rows)
    assert set(rows.kept) <= set(m[(m.group == "retain") & (m.format == "completion")].value) and "of the facts that were to be retained still right" in r.say_frontier(m)
    assert r.plot_frontier(m).axes[0].get_xlabel() == "facts that were to be retained that are still right"
    assert set(r.at_worst(found.card, m).side) == {"maintain"} and "of the other facts still right" in r.say_frontier(found.metrics)


def test_a_format_without_power_has_no_place_in_the_frontier(found):
    m = found.metrics.copy()
    weak = (m.localization == "none") & (m.format == "mcq") & (m.answer == "truth") & (m.measure == "top1") & m.group.isin(["forget", "retain"])
    m.loc[weak, "value"] = .25
    assert "MCQ" in r.frontier(found.metrics).attacks.iloc[0] and set(r.frontier(m).attacks) == {"relearning"}


def test_an_edit_without_power_has_no_place_in_the_frontier(found):
    rows = r.at_worst(found.card, found.metrics)
    rows.loc[rows.localization == "late", ["robust", "robust_low", "robust_high", "power"]] = [np.nan, np.nan, np.nan, 0]
    assert "No attack has power against late" in (said := r.say_frontier(found.metrics, rows=rows)) and "nan" not in said
    assert "late" not in [t.get_text() for t in r.plot_frontier(found.metrics, rows=rows).axes[0].texts]
    none = rows.assign(robust=np.nan)
    assert r.say_frontier(found.metrics, rows=none).startswith("No attack has power") and r.plot_frontier(found.metrics, rows=none)._repr_png_()

def test_the_empty_stretch_of_the_frontier_is_squeezed(found):
    pooled = found.metrics
    fig = r.plot_frontier(pooled, rows=r.at_worst(found.card, pooled).assign(robust=.95, robust_low=.9, robust_high=1.))
    assert "axis squeezed here" in [t.get_text() for t in fig.axes[0].texts] and fig.axes[0].get_yscale() == "function"

def test_a_destroyed_model_is_not_called_unlearned():
    rows = pd.concat([one("none", n=30, fmt="completion", truth=1), one("none", n=30, fmt="completion", group="retain", truth=1),
                      one("flu", n=30, fmt="completion"), one("flu", n=30, fmt="completion", group="retain", truth=0)])
    rows["truth"] = rows.fact.str[-1]  # ten answers: guessing is right one time in ten
    broken = r.broken(rows)
    assert list(broken) == ["flu"] and "destroyed, not unlearned: retained facts right" in r.say_scorecard(r.scorecard(rows), broken)
    rows.loc[(rows.localization == "flu") & (rows.group == "forget"), "top1_truth"] = True
    assert "destroyed" in (said := r.say_scorecard(r.scorecard(rows), broken)) and ": exposed" in said  # both, where both are true
    rows.loc[(rows.localization == "flu") & (rows.group == "retain"), "top1_truth"] = True
    assert r.broken(rows) == {} and "destroyed" not in r.say_scorecard(r.scorecard(rows), {})

def test_scorecard_of_a_run(found):
    card = found.card
    pooled = card[card.seed == -1]
    assert set(pooled.localization) == {"none", "flu", "causal-tracing-mlps", "random-mlps", "late"} and {"random-mlps#0", "random-mlps#1"} <= set(card.localization)
    assert (card.ci_low <= card.value).all() and (card.value <= card.ci_high).all() and card.p_holm.notna().any() and card[card.seed >= 0].p_holm.isna().all() and set(r.CARD) <= set(card)
    same = r.column_rows(found.metrics, "MCQ truth").query("seed == -1").set_index("localization")
    asked = pooled[pooled.attack == "multiple choice"].set_index("localization")
    for c in ("value", "n", "ci_low", "ci_high"): assert asked[c].to_dict() == pytest.approx(same[c].reindex(asked.index).to_dict())
    text = r.scorecard_text(card)
    assert max(map(len, text.splitlines())) <= 120 and "unedited" in text and "worst case" in text and "kept" in text
    assert set(r.at_worst(card, found.metrics).columns) == set(r.frontier(found.metrics).columns) | {"power"}
    for fig in (r.plot_scorecard(card), r.plot_spider(found.metrics), r.plot_frontier(found.metrics, rows=r.at_worst(card, found.metrics))):
        assert isinstance(fig, Figure) and fig._repr_png_()

def test_what_an_attack_cost_is_read_from_its_artefact(tmp_path):
    run = synthetic_run(tmp_path, ("flu",), seeds=(0,), n=6, stages=("standard", "relearning"))
    old = store.load_table(run/"flu/seed0/relearning.parquet")
    store.make(run/"flu/seed0/relearning.parquet", store.read_meta(run/"flu/seed0/relearning.parquet")["causes"], lambda: time.sleep(.05) or old, recompute=True)
    took = r.costs(run)
    assert took.attack.tolist() == ["half retaught"] and took.seconds.item() >= .05
    card = r.scorecard(r.records(run), took)
    assert " s" in r.scorecard_text(card) and card[card.attack == "multiple choice"].seconds.isna().all()


def test_names_of_many_edits_stand_in_a_legend():
    names = [f"{e}@{p}" for p in ("late", "flu") for e in ("rome", "memit", "alphaedit", "rmu", "lora", "npo", "dpo")]
    rows = pd.DataFrame(dict(localization=[*names, "flu"], seed=-1, kept=.9, kept_low=.8, kept_high=1., robust=.8, robust_low=.7, robust_high=.9, attacks="3 attacks"))
    fig = r.plot_frontier(None, rows=rows)
    shown = [t.get_text() for t in fig.legends[0].get_texts()]
    said = lambda fig: {t.get_text() for t in fig.axes[0].texts} & {*names, "flu"}
    assert shown == ordered(rows.localization) and shown[0] == "flu" and not said(fig)
    few = r.plot_frontier(None, rows=rows[rows.localization.isin(names[:3])])
    assert not few.legends and said(few) == set(names[:3])


def test_what_a_new_table_cost_is_read_from_what_it_holds(tmp_path, only):
    only("What an attack costs")
    run = synthetic_run(tmp_path, ("flu",), seeds=(0, 1), n=6, stages=("standard",))
    assert len(r.costs(run)) == 0 and r.scorecard(r.records(run), r.costs(run)).seconds.isna().all()
    for seed, took in ((0, 2.), (1, 4.)):
        table = store.load_table(run/f"flu/seed{seed}/evaluation.parquet")
        for name, of in ((f"part{k}", "hardened") for k in (1, 2)): # an attack in two tables costs both
            store.save_table(run/f"flu/seed{seed}/{name}.parquet", table.assign(evaluation=of, setting="0-shot"), {"invented": name}, took)
    assert r.costs(run).to_dict("records") == [dict(localization="flu", attack="hard multiple choice", seconds=6.)]
    assert "What an attack costs" not in r.page(r.find(run)) # there is but one price
    store.save_table(run/"flu/seed0/evaluation.parquet", store.load_table(run/"flu/seed0/evaluation.parquet"), {"invented": "evaluation", "seed": 0}, 1.)
    page = r.page(r.find(run))
    assert "What an attack costs" in page and re.search(r"flu: [a-z ]+ at any price up to 6 s|flu: exposed from [16] s on", page)

def test_an_attack_costs_what_its_own_settings_took(tmp_path):
    run = synthetic_run(tmp_path, ("flu",), seeds=(0,), n=6, stages=("standard",))
    table = store.load_table(run/"flu/seed0/evaluation.parquet")
    settings = ["half0/in context/true 2", "half1/in context/true 2", "persuasion/denied", "plain"]
    parts = [table.assign(evaluation="elicitation", setting=s) for s in settings]
    records = pd.concat(parts)
    records.attrs["took"] = dict(shared=1., by={"elicitation": dict(zip(settings, (2., 3., 8., 16.)))})
    saved = store.save_table(run/"flu/seed0/elicitation.parquet", records, {"invented": "elicitation"}, 30.)
    assert r.costs(run).set_index("attack").seconds.to_dict() == {"in context": 6., "persuasion": 9.}
    assert not store.load_table(saved).attrs and records.attrs

def made_up(attacks, names=("none", "flu", "late"), **more):
    "A scorecard of these attacks"
    rows = [dict(localization=n, seed=-1, attack=a, which=a, guess=.33, power=1., value=.5, n=64, ci_low=.4, ci_high=.6, retain_value=.9, retain_n=64, ghost_value=.3,
                 excess=.2, excess_low=.1, excess_high=.3, difference=np.nan, p_holm=np.nan) | more for n in names for a in attacks]
    return pd.DataFrame(rows)

def test_columns_are_grouped_by_what_the_attacker_needs():
    attacks = list(r.SCORED)[::-1] + ["worst case, train", "worst case, prompt", "worst case, read", r.WORST]
    fig, text = r.plot_scorecard(made_up(attacks)), r.scorecard_text(made_up(attacks, seconds=12.))
    heads = [[t.get_text().splitlines()[0] for t in ax.get_xticklabels()] for ax in fig.axes]
    needs = [r.SCORED[h].needs for line in heads for h in line if h in r.SCORED]
    assert needs == sorted(needs, key=["prompt", "read", "train"].index) and [h for line in heads for h in line if h.startswith(r.WORST)] == \
        ["worst case, prompt", "worst case, read", "worst case, train", r.WORST]
    assert {t.get_text() for ax in fig.axes for t in ax.texts} >= {"prompts", "weights read", "weights trained"}
    assert text.index("[prompts]") < text.index("[weights read]") < text.index("[weights trained]") and max(map(len, text.splitlines())) <= 120
    few = r.plot_scorecard(made_up(["as trained", r.WORST], seconds=12.)).axes
    assert [t.get_text() for t in few[0].get_xticklabels()] == ["as trained\nn=64, guess 0.33\n12 s", "worst case\nn=64, guess 0.33\n12 s"] and len(few) == 1

def test_what_is_surely_above_a_guess_is_framed():
    card = made_up(["as trained", "half retaught"])
    at = lambda n, a: (card.localization == n) & (card.attack == a)
    card.loc[at("flu", "as trained"), "excess_low"] = -.1
    card.loc[at("flu", "half retaught"), "power"] = 0.
    card.loc[at("late", "half retaught"), "excess_low"] = np.nan
    ax, = r.plot_scorecard(card).axes
    assert {(round(p.get_x() + .48), round(p.get_y() + .47)) for p in ax.patches} == {(0, 0), (1, 0), (0, 2)} # not flu's, and not what is unknown
    assert sum(t.get_text() == "ghosts 0.30" for t in ax.texts) == 6

def test_twenty_attacks_stay_legible(monkeypatch):
    more = {f"field {k}": r.Attack(f"field {k}", f"field-{k}", needs=("prompt", "read", "read", "train")[k % 4]) for k in range(14)}
    monkeypatch.setattr(scorecard, "SCORED", r.SCORED | more)
    attacks = [*scorecard.SCORED, *map(scorecard.worst_of, scorecard.NEEDS), r.WORST]
    fig = r.plot_scorecard(made_up(attacks))
    heads = [[t.get_text().splitlines()[0] for t in ax.get_xticklabels()] for ax in fig.axes]
    assert sorted(h for line in heads for h in line) == sorted(attacks) and all(len(line) <= 13 for line in heads) and all(len(line) > 1 for line in heads)
    assert len({ax.get_xlim() for ax in fig.axes}) == 1 and fig.get_figwidth() < 14 # cells of one size, on a page that need not shrink it

def test_a_sequence_shows_what_later_parts_do_to_earlier_ones(tmp_path, only):
    only("Part after part")
    run = synthetic_run(tmp_path/"run", ("flu",), seeds=(0,), n=8, stages=("localizations", "training", "standard"))
    assert not len(r.parts_table(r.metrics(run))) and "Part after part" not in r.write_report(run).read_text()
    store.save_table(run/"flu/seed0/sequence.parquet", sequence().drop(columns=["localization", "draw", "seed"]), {"invented": True})
    m = r.metrics(run)
    t = r.parts_table(m).set_index(["part", "when"])
    assert t.value[1, "own training"] == 1 and t.value[1, "end"] == .75 and t.value[3, "end"] == t.value[3, "own training"] == 1 and (t.n == 8).all()
    assert ((t.ci_low <= t.value) & (t.value <= t.ci_high)).all() and r.parts_table(m, "truth").set_index(["part", "when"]).value[1, "end"] == .25
    assert re.search(r"flu 1\.00 \[[\d.,]+\] > 0\.75", r.parts_text(t.reset_index())) and "part 3 (n=8)" in r.parts_text(t.reset_index())
    assert "flu 0.12" in r.say_parts(t.reset_index()) # the mean of a quarter and nothing
    assert isinstance(r.plot_parts(m), Figure) and "<h2 id=\"part-after-part\">" in r.write_report(run).read_text()

def test_scale_is_drawn_over_the_number_of_facts(found):
    both = pd.concat([found.metrics, found.metrics.assign(forget_size=100)])
    axes = plot_scale(both).axes
    assert [a.get_title()[:-2] or a.get_title(loc="left")[:-2] for a in axes] == list(SCALED)
    x, y = axes[1].containers[0].lines[0].get_data()
    want = r.column_rows(found.metrics[found.metrics.seed == -1], "MCQ truth").set_index("localization").value["none"]
    assert list(x) == [12, 100] and np.allclose(y, want)

def test_answers_are_listed_where_nothing_is_installed(found, monkeypatch):
    table = r.before_after(found.facts).assign(**{"edit answer": np.nan}) # unlearning
    monkeypatch.setattr(r, "before_after", lambda facts: table)
    assert "<td>–</td>" in r._examples(found)
