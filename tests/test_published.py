"""Published values: typed as they are printed, in range, with a defect that is told, and every table and figure of the paper has a counterpart or a reason."""
import importlib
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from mechunlearn import published, report
from mechunlearn.finetuning import LEARNING_RATES
from mechunlearn.published import DISAGREEMENTS, ITEMS, PLACES, authors_runs, beside, beside_text, counterpart, disagreements, model_of, out_of_range, paper_map, plot_beside, plot_injects, plot_settings, published_values, say_beside
from mechunlearn.recorded_tables import recorded
from mechunlearn.store import Refusal
from synthetic import synthetic_run

NBS = Path(__file__).resolve().parents[1] / "nbs"
REFDATA = Path(os.environ.get("MECHUNLEARN_REFDATA") or "/nowhere")
needs_refdata = pytest.mark.skipif(not (REFDATA / "results").exists(), reason="the authors' results are not here (MECHUNLEARN_REFDATA)")
VALUES, MAP = published_values(), paper_map()


def test_values_are_in_their_range():
    assert out_of_range(VALUES).empty
    assert len(out_of_range(VALUES.assign(value=VALUES.value.where(VALUES.index != 3, 1.5)))) == 1
    assert len(out_of_range(VALUES.assign(unit=VALUES.unit.where(VALUES.index != 3, "furlongs")))) == 1


def test_every_row_says_where_it_stands():
    known = {*ITEMS, "text", "authors' run"}
    assert set(VALUES.source) <= known and (VALUES.cite != "").all() and set(VALUES.sign) <= {"=", "~", "<", ">"}
    assert not VALUES.duplicated(["source", "model", "task", "forget_size", "localization", "setting", "quantity", "cite", "value"]).any()
    assert set(VALUES.model) <= {"gemma-7b", "gemma-2-9b", "llama-3-8b", "three models", ""}


def test_tables_are_whole():
    cells = VALUES[VALUES.source.str.startswith("Table")].groupby("source").size().to_dict()
    assert cells == {"Table 1": 6 * 4, "Table 2": 6 * 3 + 12, "Table 3": 6 * 3 * 2, "Table 4": 3 * 6 * 5, "Table 5": 3 * 6 * 5, "Table 6": 3 * 3 * 4, "Table 7": 3 * 3 * 4}


def test_sums_and_shares_come_out():
    wide = VALUES[VALUES.source.isin(["Table 4", "Table 5"])].pivot(index=["source", "localization", "setting"], columns="quantity", values="value")
    total = wide["text accuracy"] + 1 - wide["forget accuracy"] + wide["edit accuracy"] + wide["maintain accuracy"]
    assert (total - wide["overall score"]).abs().max() < .0025
    for source, word in (("Table 2", "trained"), ("Table 3", "masked")):
        t = published_values(source=source).pivot(index="localization", columns="quantity", values="value")
        for part in ("extraction heads", "extraction MLPs", "fact lookup"):
            share = t[f"{word}, {part}"] / t.loc["total", f"{word}, {part}"]
            assert (share - t[f"share {word}, {part}"]).abs().max() < .0006, (source, part)


def test_the_rates_of_the_paper_are_those_that_are_shipped():
    rates = pd.read_csv(Path(published.__file__).parent / "data/learning_rates.csv").query("model != 'organism'")
    for source, column in (("Table 6", "lr"), ("Table 7", "inject")):
        for r in published_values(source=source).itertuples():
            mine = rates[(rates.model.map(model_of) == r.model) & (rates.task == r.task) & (rates.localization == r.localization)]
            mine = mine if pd.isna(r.forget_size) else mine[mine.forget_size == r.forget_size]
            assert mine[column].tolist() == [pytest.approx(r.value)], (source, r)


def test_defects_are_told():
    named = {d for x in VALUES.defect for d in x.split()}
    assert named <= set(DISAGREEMENTS)
    assert all(len(word) > 2 for d in DISAGREEMENTS.values() for word in d), "nothing is left empty"
    assert len({d.topic for d in DISAGREEMENTS.values()}) == len(DISAGREEMENTS)
    table = disagreements()
    assert table.loc["relearning CounterFact", "values"] == (VALUES.defect.str.contains("relearn-edit")).sum() > 0


def test_the_map_is_whole():
    assert MAP.index.tolist() == [f"Table {i}" for i in range(1, 8)] + [f"Figure {i}" for i in range(1, 49)]
    lost = MAP[(MAP.origin == "none") & (MAP.why == "")]
    assert lost.empty, f"neither a counterpart nor a reason: {lost.index.tolist()}"
    assert (MAP["shows"] != "").all()


@pytest.mark.parametrize("by", sorted({i.by for i in ITEMS.values() if i.by}))
def test_counterparts_exist(by):
    module, function = by.split(".")
    assert callable(getattr(importlib.import_module(f"mechunlearn.{module}"), function))
    where = MAP[MAP.by == by].notebook.iloc[0]
    cells = nbformat.read(NBS / where, 4).cells
    assert any(re.search(rf"def {function}\(", c.source) for c in cells)
    if (MAP[MAP.by == by].origin == "lesson").any():
        calls = [c for c in cells if c.cell_type == "code" and re.search(rf"(?<!def )\b{function}\(", c.source) and "#| export" not in c.source]
        assert calls, f"{where} nowhere shows {function}"


def test_a_counterpart_that_does_not_exist_is_noticed(monkeypatch):
    monkeypatch.setitem(published.ITEMS, "Figure 36", ITEMS["Figure 36"]._replace(by="relearning.plot_no_such"))
    with pytest.raises(Refusal, match="plot_no_such"):
        paper_map()


@pytest.mark.parametrize("name", [n for n, i in ITEMS.items() if MAP.origin[n] == "recorded" and n not in [m for m, j in ITEMS.items() if j == i][1:]])
def test_recorded_counterparts_are_drawn(name):
    for task in ITEMS[name].tasks:
        if len(published._recorded_rows(ITEMS[name], task)):
            assert isinstance(counterpart(name, task), Figure)


def test_what_is_not_there_is_refused_in_one_line():
    for name, said in (("Figure 49", "Valid"), ("Figure 1", "a drawing"), ("Figure 19", "21_weight_masking"), ("Figure 47", "no soft prompt")):
        with pytest.raises(Refusal, match=said):
            counterpart(name)
    with pytest.raises(Refusal, match="did you mean"):
        counterpart("Figure 2", "sport-athlete-editing")
    with pytest.raises(Refusal, match="column"):
        published_values(nothing=1)


# beside: a brute-force reading of what stands side by side

ours = recorded("metrics", forget_size=64)


@pytest.mark.parametrize("name,theirs", [("google/gemma-7b", "gemma-7b"), ("/data/meta-llama/Meta-Llama-3-8B", "llama-3-8b"), ("google/gemma-2-9b", "gemma-2-9b"), ("organism", None), ("google/gemma-7b-it", None)])
def test_differences_only_for_the_same_model(name, theirs):
    extra = pd.DataFrame([dict(VALUES.iloc[0], model=m, task="sports-athlete-editing", localization="flu", quantity="MCQ edit accuracy", value=.5, setting="", sign="=", n=pd.NA)
                          for m in ("gemma-7b", "gemma-2-9b", "llama-3-8b", "three models")]).astype(VALUES.dtypes)
    rows = beside(ours.assign(model=name), theirs=pd.concat([VALUES, extra], ignore_index=True))
    assert (rows.difference.notna() == (rows.model == theirs)).all() and rows.difference.notna().any() == (theirs is not None)
    same = rows[rows.difference.notna()]
    assert np.allclose(same.difference, same.ours - same.theirs)
    text = beside_text(rows)
    assert (text["ours - theirs"] == "other model").sum() == rows.difference.isna().sum()


@pytest.mark.parametrize("quantity,fmt,group,answer,turned", [("forget accuracy", "completion", "forget", "truth", False), ("edit accuracy", "completion", "forget", "edit", False),
    ("maintain accuracy", "completion", "retain", "truth", False), ("MCQ forget accuracy", "mcq", "forget", "truth", False), ("MCQ maintain accuracy", "mcq", "retain", "truth", False)])
def test_ours_is_the_probability_of_the_same_thing(quantity, fmt, group, answer, turned):
    extra = pd.DataFrame([dict(VALUES.iloc[0], task="sports-athlete-editing", localization="nonlocalized", quantity=quantity, value=.25, setting="", n=pd.NA)]).astype(VALUES.dtypes)
    row = beside(ours, theirs=extra).iloc[0]
    mine = ours[(ours.seed == -1) & (ours.evaluation == "standard") & (ours.format == fmt) & (ours.group == group) & (ours.answer == answer) & (ours.measure == "prob") & (ours.localization == "nonlocalized")]
    assert row.ours == pytest.approx(mine.value.item()) and row.ci_low == pytest.approx(mine.ci_low.item()) and row.ci_high == pytest.approx(mine.ci_high.item())


def test_sweeps_and_other_sizes_stay_out():
    rows = beside(ours)
    assert not rows.setting.str.contains("lr=|inject=").any()
    cf = recorded("metrics", task="counterfact-editing")
    assert not beside(cf).source.isin(["Table 4", "Table 5"]).any()
    small = beside(recorded("metrics", forget_size=16), "gemma-2-9b")
    assert set(small.theirs) <= set(VALUES[(VALUES.forget_size != 64).fillna(True)].value)
    with pytest.raises(Refusal, match="gemma-2-9b"):
        beside(ours, "gemma-2-9")


def test_nothing_published_is_said():
    rows = beside(recorded("metrics", task="counterfact-at-scale", forget_size=30).query("localization == 'none'"))
    assert rows.empty and say_beside(rows).startswith("Nothing")


def test_figures_take_one_row_and_other_weights():
    assert isinstance(plot_beside(beside(ours).head(1)), Figure)
    sweep = recorded("sweep", forget_size=64)
    assert isinstance(plot_injects(pd.concat([sweep.assign(inject=w) for w in (.5, 2)])), Figure)


# the authors' files, where somebody has them

def _rounded(text):
    "Half a unit of the last digit that was typed"
    digits = len(str(text).partition(".")[2])
    return .51 * 10**-digits


@needs_refdata
def test_typed_figures_are_those_of_the_authors_files():
    runs, typed = authors_runs(REFDATA), VALUES[VALUES.source == "authors' run"]
    typed = typed[typed.quantity.isin(set(runs.quantity)) & typed.localization.isin(PLACES) & ~typed.task.str.contains("scale|unlearning")]
    assert len(typed) > 25
    for r in typed.itertuples():
        same = runs[(runs.task == r.task) & (runs.quantity == r.quantity) & (runs.localization == r.localization)]
        if r.model != "three models":
            same = same[(same.model == r.model) & (same.forget_size == r.forget_size)]
            assert len(same) == 1, r
        elif r.setting.startswith("mean of"):
            assert len(same) == int(r.setting.split()[2]), r
        assert abs(same.value.mean() - r.value) <= _rounded(r.value), (r, same.value.mean())


@needs_refdata
def test_settings_and_sizes_are_those_of_the_authors_files():
    runs = pd.read_csv(REFDATA / "results/final_metrics.csv")
    sizes = VALUES[(VALUES.quantity == "parameters trained") & (VALUES.source == "authors' run")]
    for r in sizes.itertuples():
        got = runs[(runs.task == "sports_athlete_editing") & (runs.model == r.model) & (runs.localization == r.localization.replace("attribution", "attrib").replace("-", "_"))]
        assert set(got.trainable_params.astype(float)) == {r.value}, r
    used = {"sports-athlete-editing": "64", "counterfact-editing": None, "full-sports-editing": "basketball"}
    for source, column in (("Table 6", "lr"), ("Table 7", "inject_coef")):
        for r in published_values(source=source).itertuples():
            split = used[r.task] or str(r.forget_size)
            got = runs[(runs.task == r.task.replace("-", "_")) & (runs.model == r.model) & (runs.forget_split.astype(str) == split) & (runs.localization == r.localization.replace("-", "_"))]
            assert got[column].tolist() == [pytest.approx(r.value)], (source, r)


@needs_refdata
def test_masks_are_those_of_the_authors_files():
    masks = pd.read_csv(REFDATA / "results/weight_masking.csv").query("model == 'gemma-2-9b' and setting == 'counterfact-edit'")
    names = {"masked forget accuracy": "Normal/forget", "masked maintain accuracy": "Normal/maintain", "masked MCQ forget accuracy": "MC/forget", "masked MCQ maintain accuracy": "MC/maintain"}
    typed = VALUES[VALUES.quantity.isin(names) & (VALUES.source == "authors' run") & (VALUES.localization != "none")]
    for r in typed.itertuples():
        got = masks[(masks.localization == r.localization.replace("attribution", "attrib").replace("-", "_")) & (masks.metric == names[r.quantity])]
        assert abs(got.loc[got.n_weights_masked.idxmax(), "value"] - r.value) <= _rounded(r.value), r


@needs_refdata
def test_their_runs_stand_beside_ours():
    runs = authors_runs(REFDATA)
    assert out_of_range(runs).empty and set(runs.columns) == set(VALUES.columns) and set(runs.localization) == set(PLACES)
    rows = beside(ours.assign(model="google/gemma-7b"), "gemma-7b", runs)
    assert rows.difference.notna().all() and rows.localization.nunique() >= 6


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(Refusal, match="final_metrics.csv"):
        authors_runs(tmp_path)


@pytest.mark.parametrize("model,said", [("google/gemma-2-9b", "of the same model"), ("invented-model", "of another model")])
def test_the_report_shows_them(tmp_path, model, said):
    found = report.find(synthetic_run(tmp_path, ("flu", "causal-tracing-mlps", "nonlocalized"), seeds=(0, 1), n=16, stages=("localizations", "standard", "relearning"), model=model))
    block = report._published(found)
    assert said in block and "other model" in block and "Figure 6" in block
    rows = beside(found.metrics)
    assert all(f"{d:+.2f}" in block for d in rows.difference.dropna()) and rows.difference.notna().any() == (model != "invented-model")


def test_only_the_papers_own_settings_are_drawn_as_the_papers():
    rates = pd.read_csv(LEARNING_RATES)
    rates = rates[(rates.task == "sports-athlete-editing") & rates.localization.isin(PLACES)]
    theirs = rates[rates.model.isin(["google/gemma-7b", "google/gemma-2-9b", "meta-llama/Meta-Llama-3-8B"])]
    drawn = [line for line in plot_settings(rates).axes[0].lines]
    assert len(rates[rates.model == "gemma-3-270m"]) and len(theirs)
    assert sorted(l.get_xdata()[0] for l in drawn if l.get_marker() == "D") == sorted(theirs.lr)
