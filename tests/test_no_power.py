"Formats in which the unedited model is at chance are not read as robustness"
import pandas as pd, pytest
from mechunlearn.metrics import format_power, plot_bars, plot_spider, results_html, results_table, results_text, say_bars
from mechunlearn.stats import METRICS, METRIC_TYPES, Chance


def rows(base, n=64):
    "Metrics of the unedited model and of two edits; `base` is what it gets in multiple choice"
    def row(name, format, group, answer, v): return dict(model="m", task="t", forget_size=16, localization=name, n_params=0 if name == "none" else 10, seed=-1,
        evaluation="standard", format=format, group=group, answer=answer, measure="top1", value=v, n=n, ci_low=max(v - .1, 0), ci_high=min(v + .1, 1))
    out = []
    for name in ("none", "flu", "late"):
        old = name == "none"
        out += [row(name, "completion", "forget", "truth", 1. if old else 0.), row(name, "completion", "forget", "edit", 0. if old else 1.),
                row(name, "completion", "retain", "truth", .95), row(name, "paraphrase", "forget", "edit", 0. if old else .9), row(name, "paraphrase", "forget", "truth", .8 if old else .1)]
        out += [row(name, "mcq", g, a, base if a == "truth" else .25) for g in ("forget", "retain") for a in ("truth", "edit")]
    return pd.DataFrame(out).reindex(columns=METRICS).astype(METRIC_TYPES)


@pytest.mark.parametrize("base, power", [(.27, False), (.40, False), (.55, True), (.9, True)])
def test_multiple_choice_counts_where_the_unedited_model_can_do_it(base, power):
    m = rows(base)
    found = format_power(m)
    assert found.power["mcq"] == power and found.power["paraphrase"] and found.n["mcq"] == 128 and abs(found.value["mcq"] - base) < 1e-9
    text, html, said = results_text(results_table(m)), results_html(results_table(m)).as_raw_html(), say_bars(m)
    assert all(("o power" in x) != power for x in (text, html, said))
    if power: return
    cells = [line for line in text.splitlines() if line.lstrip().startswith(("flu", "late"))]
    assert sum(line.count("no power here") for line in cells) == 2 * 3 and f"{base:.2f} of 128 facts right (guessing: 0.25)" in text
    assert "MCQ" not in "".join(t.get_text() for t in plot_spider(m).axes[0].get_xticklabels())
    assert any("no power" in a.get_title(loc="left") for a in plot_bars(m).axes)


def test_few_facts_have_no_power():
    assert not format_power(rows(.45, n=8)).power["mcq"] and format_power(rows(.45, n=400)).power["mcq"]


def test_guessing_among_few_answers_is_counted():
    m, guess = rows(.9), Chance(.75, .8)
    assert format_power(m).power["paraphrase"] and not format_power(m, guess).power["paraphrase"]
    axes = lambda guess: "".join(t.get_text() for t in plot_spider(m, guess=guess).axes[0].get_xticklabels())
    assert "paraphrase" in axes(None) and "paraphrase" not in axes(guess)


def test_nothing_is_said_where_the_unedited_model_was_not_asked():
    m = rows(.27)
    m = m[m.localization != "none"]
    assert format_power(m).empty and "o power" not in results_text(results_table(m))
