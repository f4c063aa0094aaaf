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
from mechunlearn.published import DISAGREEMENTS, ITEMS, PLACES, beside, beside_text, counterpart, disagreements, mean_of_runs, model_of, out_of_range, paper_map, plot_beside, plot_injects, plot_settings, published_values, say_beside
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
    drawn = [f"Figure {i}" for i in (*range(2, 8), 9, *range(19, 49))]
    assert (MAP.runs[drawn] > 0).all() and published._named("results_sweeps") == [] and published._named("x, Figures 23-25, 46") == ["Figure 23", "Figure 24", "Figure 25", "Figure 46"]


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


def test_what_is_not_there_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(published, "recorded", lambda *a, metrics=recorded("metrics", task="counterfact-editing").query("evaluation != 'soft-prompt'"), **k: metrics)
    for name, said in (("Figure 49", "Valid"), ("Figure 1", "a drawing"), ("Figure 19", "21_weight_masking"), ("Figure 47", "no recorded run of counterfact-editing")):
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
    weights = published._recorded_rows(ITEMS["Table 5"], "counterfact-editing") # all at one rate, the weight 1 of the rates' sweep among them
    assert weights.lr.nunique() == 1 and all(sorted(r.inject) == [.1, .2, .5, 1, 2, 5] for _, r in weights.groupby("localization"))


# the authors' files, where somebody has them

def made(): return importlib.import_module("make_published")


@needs_refdata
def test_what_is_listed_is_what_the_files_hold(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_published.py", "--check"])
    with pytest.raises(SystemExit) as end: made().main()
    assert not end.value.code and not capsys.readouterr().out


@needs_refdata
@pytest.mark.parametrize("seed", range(3))
def test_any_number_of_a_run_is_found_again(seed):
    "Picked at random from their files, and looked up by its names"
    runs = pd.read_csv(REFDATA / "results/final_metrics.csv").query("task in @made().TASKS").sample(20, random_state=seed)
    for _, r in runs.iterrows():
        which = dict(source="authors' run", task=r.task.replace("_", "-"), model=r.model, localization=r.localization.replace("attrib", "attribution").replace("_", "-"))
        mine = published_values(**which)
        mine = mine[(mine.forget_size.astype(str) == str(r.forget_split)) | (mine.setting == r.forget_split)]
        for column, quantity in (made().TRAINED | made().ASKED).items():
            if column == "trainable_params" or pd.isna(r[column]): continue
            value = mine[mine.quantity == quantity].query("not setting.str.contains('lr=|inject=|zeros')").value
            assert value.tolist() == [pytest.approx(r[column], abs=.00051)], (dict(r), column)


@needs_refdata
def test_a_wrong_number_is_noticed(capsys, monkeypatch, tmp_path):
    lines = made().FILE.read_text().replace("0.932", "0.931", 1)
    (tmp_path / "published.csv").write_text(lines)
    monkeypatch.setattr(made(), "FILE", tmp_path / "published.csv"); monkeypatch.setattr("sys.argv", ["make_published.py", "--check"])
    with pytest.raises(SystemExit) as end: made().main()
    assert end.value.code and "missing:" in capsys.readouterr().out


def test_lines_of_several_localizations_are_taken_apart():
    raw = pd.read_csv(Path(published.__file__).parent / "data/published.csv", dtype=str, keep_default_na=False)
    assert len(VALUES) == raw.value.str.split().map(len).sum() > 10000
    several = raw[raw.value.str.contains(" ")]
    assert all(len(v.split()) == (9 if n == "all nine" else len(n.split())) for n, v in zip(several.localization, several.value))
    assert not VALUES.value.isna().any() and not VALUES[VALUES.source == "authors' run"].localization.str.contains("all nine").any()
    said = VALUES.defect.str.contains("unseeded") & ~VALUES.localization.str.startswith("random")
    assert not said.any() and VALUES.defect.str.contains("unseeded").sum() > 1000


def test_means_are_those_of_the_authors_notebooks():
    "Printed by the authors for the localizations of Figures 3, 5 and 6"
    of = lambda task: mean_of_runs(task).pivot(index="localization", columns="quantity", values="value")
    sa, fs, cf = of("sports-athlete-editing"), of("full-sports-editing"), of("counterfact-editing")
    assert [round(sa["relearned accuracy"][n], 3) for n in PLACES] == pytest.approx([.199, .469, .631, .824, .903, .312, .264, .275, .291], abs=.0011)
    assert [round(sa["MCQ edit accuracy"][n], 3) for n in PLACES] == pytest.approx([.862, .152, .371, .082, .032, .303, .632, .246, .327], abs=.0011)
    assert fs["MCQ edit accuracy"]["flu"] == pytest.approx(.487, abs=.0011) and cf["MCQ edit accuracy"]["flu"] == pytest.approx(.545, abs=.0011)
    assert cf["MCQ edit accuracy"].drop("flu").max() == pytest.approx(.236, abs=.0011) and cf["neighborhood edit accuracy"].max() == pytest.approx(.108, abs=.0011)
    assert set(mean_of_runs("sports-athlete-editing").setting) == {"mean of 6 runs"} and set(mean_of_runs("sports-athlete-editing", 64).setting) == {"mean of 3 runs"}


def test_settings_of_the_runs_are_those_of_the_paper():
    used = {"sports-athlete-editing": 64, "full-sports-editing": "basketball", "counterfact-editing": None}
    for source, quantity in (("Table 6", "learning rate"), ("Table 7", "inject coefficient")):
        for r in published_values(source=source).itertuples():
            got = published_values(source="authors' run", quantity=quantity, task=r.task, model=r.model, localization=r.localization)
            got = got[(got.forget_size == (used[r.task] or r.forget_size)).fillna(False) | (got.setting == used[r.task])]
            assert got.value.tolist() == [pytest.approx(r.value)], (source, r)


def test_their_runs_stand_beside_ours():
    rows = beside(ours.assign(model="google/gemma-7b"))
    own = rows[rows.difference.notna()]
    assert (own.model == "gemma-7b").all() and len(own) > 40 and own.localization.nunique() >= 6 and own.quantity.nunique() >= 7
    assert set(rows.model) == {"gemma-7b", "three models"} and not rows.setting.str.contains("lr=|zeros").any()
    assert set(beside(ours)[beside(ours).source == "authors' run"].model) == {"three models"}


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
    assert sorted(l.get_xdata()[0] for l in drawn if l.get_marker() == "D" and len(l.get_xdata())) == sorted(theirs.lr)
