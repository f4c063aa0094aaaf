"Formats in which the unedited model is at chance are not read as robustness"
import pandas as pd, pytest
from mechunlearn.audit import audit
from mechunlearn.metrics import format_power, plot_bars, plot_spider, results_html, results_table, results_text, say_bars
from mechunlearn.scorecard import scorecard, verdict
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


def probed(before, later, n=40, kept=60):
    "Records of a probe that reads so many of the facts before any layer, and so many behind one; of edited and of retained facts alike"
    def row(group, k, layer, right): return dict(evaluation="latent", localization="flu", draw=0, seed=0, fact=f"{group}/{k}", subject=f"{group} {k}", relation="sport", group=group,
        format="completion", variant=0, truth=f" {'abc'[k % 3]}", edit=" d" if group == "forget" else None, prob_truth=float(right), prob_edit=0., top1_truth=right, top1_edit=False,
        layer=layer, setting="subject", step=None, compliance=None, loss=None)
    return pd.DataFrame([row(g, k, layer, k % 10 < 10*share) for g, size in (("forget", n), ("retain", kept)) for layer, share in ((-1, before), (3, later)) for k in range(size)])


@pytest.mark.parametrize("before, least, power", [(.3, 1/3, True), (.6, .6, False)])
def test_what_a_probe_reads_from_the_name_alone_is_no_leak(before, least, power):
    card = lambda records: scorecard(records).query("seed == -1").set_index("attack").loc["new probe"]
    told, more, blind = card(probed(before, .6)), card(probed(before, .9)), card(probed(before, .6).query("layer >= 0"))
    assert told.value == blind.value == pytest.approx(.6) and told.guess == pytest.approx(least) and blind.guess == pytest.approx(1/3)
    assert blind.power and blind.excess == pytest.approx(.4) and more.power and more.excess > .5
    assert told.power == power and (told.excess == pytest.approx(.4) if power else pd.isna(told.excess)) # the same reading, and no layer was needed for it


def test_an_audit_knows_of_a_name_what_the_scorecard_knows():
    "Of the unedited model, too: ten retained facts of the edit alone would not tell"
    both = pd.concat([probed(.6, .9, kept=10).assign(localization="none"), probed(.6, .6, kept=10)], ignore_index=True)
    card = scorecard(both).query("seed == -1 and localization == 'flu'").set_index("attack")
    judged, alone = (audit(r, "flu", wrecked={}) for r in (both, both[both.localization == "flu"]))
    assert card.power["new probe"] == 0 and judged.verdict == "no power" and judged.by("read").guess == pytest.approx(card.guess["new probe"]) == pytest.approx(.6)
    assert alone.headline == "leaks to new probe"


def test_the_unedited_model_says_what_the_name_tells():
    none, honest, laid = (probed(before, later, n=60, kept=30).assign(localization=name) for name, before, later in (("none", .5, .9), ("flu", .5, .5), ("late", .9, .9)))
    card = lambda *some: scorecard(pd.concat(some)).query("seed == -1 and attack == 'new probe'").set_index("localization")
    alone, both = card(honest), card(none, honest, laid)
    assert alone.guess["flu"] == pytest.approx(1/3) # fifteen of thirty retained facts are not surely more
    assert both.guess.to_numpy() == pytest.approx(.5) and both.value["late"] == pytest.approx(.9)
    assert verdict(both.loc["late"]) == "exposed" != verdict(both.loc["flu"]) # an answer that an edit laid into the embeddings is one


def test_a_probe_of_the_unedited_model_is_compared_with_what_that_reads_by_itself():
    none, edit = (probed(.5, later, n=60, kept=60).assign(localization=name) for name, later in (("none", .9), ("flu", .5)))
    card = scorecard(pd.concat([none, edit.assign(setting="subject/transferred").query("layer >= 0")])).query("seed == -1 and localization == 'flu'").set_index("attack")
    assert card.guess["old probe"] == pytest.approx(.5)


def test_what_can_be_asked_of_one_fact_alone_is_no_worst_case():
    row = lambda group, k, setting, right: dict(evaluation="elicitation", localization="flu", draw=0, seed=0, fact=f"{group}/{k}", subject=f"{group} {k}", relation="sport", group=group,
        format="elicited", variant=0, truth=f" {'abc'[k % 3]}", edit=" d" if group == "forget" else None, prob_truth=float(right), prob_edit=0., top1_truth=right, top1_edit=False,
        layer=None, setting=setting, step=None, compliance=None, loss=None)
    said = [row(g, k, s, g == "retain" or g == "forget" and k < 2) for s in ("persuasion/rephrased 1", "persuasion/role play 1") for g, n in (("forget", 16), ("retain", 24), ("ghost", 24)) for k in range(n)]
    alias = row("forget", 0, "persuasion/alias", True)
    before, after = (scorecard(pd.DataFrame(rows)).query("seed == 0").set_index("attack") for rows in (said, [*said, alias]))
    assert after.loc["persuasion", ["n", "value"]].tolist() == [16, .125] and after.loc["worst case", ["n", "value"]].tolist() == [16, .125]
    pd.testing.assert_frame_equal(before, after)
    alone = scorecard(pd.DataFrame([alias])).query("seed == 0").set_index("attack") # where nothing else was asked it is what there is
    assert alone.n["persuasion"] == 1
