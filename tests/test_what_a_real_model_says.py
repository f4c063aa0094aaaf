"""Numbers that the pages of a real model (nbs/60 and 70) say in words: each is in the recorded tables. (What teaches something is asserted on the page.)"""

import pytest
from mechunlearn.capability import capability_table
from mechunlearn.claims import orderings, say_tally
from mechunlearn.figures import say
from mechunlearn.recorded_tables import recorded

SIXTEEN, SIXTY_FOUR = (dict(model="gemma-3-270m", forget_size=n) for n in (16, 64))
BY_HAND = ["hand@mlp.0+mlp.2-5", "hand@mlp.1-5", "hand@mlp.2-5", "hand@mlp.0-1"]


def two(values): return [f"{v:.2f}" for v in values]
def placed(table): return recorded(table, **SIXTY_FOUR).query("not localization.str.startswith('hand@')")
def retaught(table, which): return recorded(table, **which).query("attack == 'half retaught'").assign(place=lambda d: d.localization.str.split("#").str[0])
def pooled(rows): return rows[rows.seed == -1].set_index("localization")
def by_seed(rows): return rows[rows.seed >= 0].pivot(index="localization", columns="seed", values="value")


@pytest.fixture(scope="module")
def found(): return recorded("metrics", **SIXTEEN)


@pytest.fixture(scope="module")
def came():
    tests = orderings(recorded("records_small", **SIXTEEN))
    return tests[tests.column == "relearned truth"].set_index("localization").value


def test_what_comes_back_of_sixteen(came, found):
    assert two(came[["late", "attribution-patching", "attribution-patching-mlps", "causal-tracing-mlps", "all-mlps", "nonlocalized"]]) == ["0.50", "0.52", "0.21", "0.04", "0.19", "0.15"]
    each = found[(found.evaluation == "relearning") & (found.group == "forget") & (found.answer == "truth") & (found.measure == "top1") & (found.seed >= 0)]
    each = each[each.step == each.step.max()].pivot(index="localization", columns="seed", values="value")
    lots = each.filter(like="random-mlps#", axis=0).stack()
    assert two([each.loc["flu"].mean(), came["random-mlps"]]) == ["0.29"]*2 and two([lots.min(), lots.max()]) == ["0.06", "0.56"]
    assert each.loc["causal-tracing"].max() == 0 and two(each.loc["flu"]) == ["0.19", "0.12", "0.56"]
    layers = recorded("localizations", **SIXTEEN).groupby("localization").layer.unique()
    assert sorted(layers["flu"]) == [2, 3, 4, 5] and sorted(layers["causal-tracing-mlps"]) == [0, 1, 2, 3]


def test_what_other_words_get(found):
    words = found[(found.evaluation == "standard") & (found.format == "paraphrase") & (found.measure == "top1") & (found.seed == -1)].set_index(["group", "answer", "localization"]).value.sort_index()
    narrow, taught = ["flu", "causal-tracing", "causal-tracing-mlps"], ["attribution-patching-mlps", "late", "all-mlps", "nonlocalized"]
    assert words["forget", "truth"].drop("none").max() < .02 and words["forget", "edit"][narrow].between(.505, .625).all() and words["retain", "truth"][narrow].between(.395, .475).all()
    assert words["retain", "truth"][["flu-path", "attribution-patching", "random", "random-mlps"]].between(.7, .77).all() and words["retain", "truth"][taught].between(.915, .935).all()
    assert words["ghost", "truth"][taught].between(.37, .47).all() and words["ghost", "truth"]["none"] < .12


def test_with_the_text_loss():
    places = lambda table: recorded(table, **SIXTEEN)[lambda d: ~d.localization.str.contains("@")] # without editors, of which the next test is
    text, without = by_seed(places("elsewhere").query("attack == 'half retaught'")), by_seed(retaught("scorecard", SIXTEEN))
    same = ["flu", "causal-tracing-mlps", "nonlocalized", "random-mlps#0"]
    assert set(text.index) == {"none", *same} and text.notna().all(axis=None)
    assert two(text.mean(axis=1)[same]) == ["0.35", "0.04", "0.02", "0.35"] and two(without.mean(axis=1)[same]) == ["0.29", "0.04", "0.15", "0.42"]
    assert recorded("elsewhere_places", **SIXTEEN).query("localization == 'flu'").layer.tolist() == [2, 3, 4, 5]
    tests = orderings(places("elsewhere_facts"))
    assert not tests.verdict.eq("appears").any() and not tests[tests.column == "relearned truth"].differs.any()
    assert set(tests[tests.verdict == "reversed"][["column", "localization"]].itertuples(index=False, name=None)) == {("latent truth", "causal-tracing-mlps"), ("latent truth", "nonlocalized")}
    said = pooled(places("elsewhere").query("attack == 'as trained'"))
    assert (said.value.drop("none") == 0).all() and said.retain_value.drop("none").between(.945, .99).all()
    facts = lambda table: set(recorded(table, **SIXTEEN).query("evaluation == 'standard' and group == 'forget'")[["fact", "seed"]].itertuples(index=False, name=None))
    assert len(facts("elsewhere_facts")) == 48 and len(facts("elsewhere_facts") & facts("records_small")) == 47


def test_closed_forms_with_second_moments_of_a_text():
    again, said = (pooled(recorded("elsewhere", **SIXTEEN).query(f"attack == '{a}'")).loc[["alphaedit@flu", "memit@flu", "rome@flu"]] for a in ("half retaught", "as trained"))
    assert two(again.value) == ["0.75", "0.77", "0.83"] and [f"{p:.3f}" for p in again.p_holm] == ["0.034", "0.044", "0.024"]
    assert two(said.retain_value) == ["0.93", "0.90", "0.62"] and f"{said.value['rome@flu']:.2f}" == "0.16"
    tries = recorded("editor_tries", **SIXTEEN).query("text > 0").set_index(["localization", "settings"]).score
    assert tries.groupby("localization").max().round(2).to_dict() == {"alphaedit@flu": 2.79, "memit@flu": 2.72, "rome@flu": 2.07}
    assert round(tries["alphaedit@flu", '{"threshold": 2, "l2": 10}'] - tries["alphaedit@flu", '{"threshold": 1, "l2": 10}'], 3) == .002


def test_what_sixty_four_leave_of_the_model():
    left = capability_table(recorded("metrics", **SIXTY_FOUR)).set_index(["what", "localization"])
    asked, text = left.loc["atlas"], left.loc["text loss"]
    assert len(asked) == 12 and two([asked.value["none"], asked.value["late"]]) == ["0.65", "0.59"] and two(asked.value.drop(["none", "late"]).agg(["min", "max"])) == ["0.65", "0.68"]
    assert two([text.value["none"], text.value["late"]]) == ["3.47", "3.66"] and two(text.value.drop(["none", "late"]).agg(["min", "max"])) == ["3.48", "3.52"]


def test_sixty_four():
    wide, rows = placed("scorecard").query("seed == -1").set_index(["attack", "localization"]), retaught("scorecard", SIXTY_FOUR)
    probe, each = wide.loc["new probe"].value.drop("none"), rows[rows.seed >= 0].set_index(["place", "seed"]).sort_index()
    back, more = wide.loc["half retaught"], ["flu-path", "random-mlps", "late"]
    rest = ["causal-tracing", "causal-tracing-mlps", "nonlocalized", "attribution-patching-mlps", "random", "attribution-patching", "all-mlps"]
    assert say(*back.loc["flu", ["value", "ci_low", "ci_high"]]) == "0.08 [0.00, 0.18]" and two(back.value[more]) == ["0.67", "0.56", "0.45"] and list(back.p_holm[more].round(3)) == [.017, .024, .046]
    assert two(back.value[rest]) == ["0.11", "0.08", "0.14", "0.16", "0.21", "0.29", "0.37"] and back.p_holm[rest].min() > .7 and set(back.n[rest]) == {120, 95}
    assert (wide.loc["as trained"].value.drop("none") == 0).all() and two([probe["late"]]) == ["0.80"] and two(probe.drop("late").agg(["min", "max"])) == ["0.09", "0.36"]
    kept = placed("metrics").query("seed == -1 and evaluation == 'standard' and format == 'completion' and group == 'retain' and answer == 'truth' and measure == 'top1'").set_index("localization").value
    assert two(kept[["late", "random-mlps", "random", "flu"]]) == ["0.51", "0.73", "0.79", "0.86"] and two(kept.drop(["none", "late", "random-mlps", "random"]).agg(["min", "max"])) == ["0.80", "0.90"]
    assert two(each.value["all-mlps"]) == ["0.30", "0.52", "0.44"] and two([each.retain_value["all-mlps", 1]]) == ["0.60"] and list(each.index[each.power == 0]) == [("all-mlps", 1)]


def test_whether_either_of_two_mlps_is_trained():
    back = placed("scorecard").query("seed == -1 and attack == 'half retaught' and localization != 'none'").set_index("localization").value
    layers = placed("localizations").query("mlp > 0").groupby("localization").layer.agg(set)
    first = {n.split("#")[0] for n, ls in layers.items() if ls & {0, 1}}
    without = back.drop(first)
    assert len(first) == 8 and set(without.index) == {"flu-path", "random-mlps", "late"}
    assert two([back[list(first)].min(), back[list(first)].max(), without.min(), without.max()]) == ["0.08", "0.37", "0.45", "0.67"]


def test_the_same_in_bfloat16():
    def shares(table, seed): return recorded(table, **SIXTY_FOUR).query("seed == @seed and not attack.str.startswith('worst') and localization != 'none'").assign(localization=lambda d: d.localization.str.split("#").str[0]).set_index(["attack", "localization"])
    both = shares("scorecard", 0).join(shares("elsewhere", -1)[["value", "ci_low", "ci_high"]].add_prefix("b_"), how="inner")
    outside = both[~both.value.between(both.b_ci_low, both.b_ci_high)].index
    assert len(both) == 66 and len(both.loc["half retaught"]) == 11 and not outside.get_level_values(0).isin(["half retaught"]).any()
    assert set(outside) == {("in other words", "all-mlps"), ("in other words", "nonlocalized"), ("old probe", "attribution-patching-mlps"), *(("new probe", n) for n in ("all-mlps", "causal-tracing-mlps", "attribution-patching", "attribution-patching-mlps"))}
    before = orderings(recorded("elsewhere_facts", **SIXTY_FOUR))
    assert "8 appear, 1 is reversed" in say_tally(before) and before[before.verdict == "reversed"].localization.tolist() == ["attribution-patching-mlps"] and before[before.verdict == "appears"].localization.eq("attribution-patching").sum() == 3
    named = lambda table: set(recorded(table, **SIXTY_FOUR).query("group == 'forget' and seed == 0").fact)
    assert named("records_small") == named("elsewhere_facts")
    places = recorded("localizations", **SIXTY_FOUR).query("mlp > 0").groupby("localization").layer.agg(set)
    assert all(places[n] == set(ls) for n, ls in recorded("elsewhere_places", **SIXTY_FOUR).query("mlp > 0").groupby("localization").layer)


def test_edits_by_hand():
    hand = pooled(retaught("scorecard", SIXTY_FOUR)).loc[BY_HAND]
    asked = recorded("records_small", **SIXTY_FOUR).query("evaluation == 'standard' and format == 'completion' and group == 'forget' and localization != 'none'")
    assert asked.top1_edit.min() == 1 and asked.top1_truth.max() == 0 and asked.fact.nunique() == 120 and asked.localization.isin(BY_HAND).sum() == 4*64
    assert two(hand.value) == ["0.12", "0.12", "0.55", "0.25"] and hand.p_holm["hand@mlp.2-5"] < .001 and f"{hand.p_holm['hand@mlp.0-1']:.2f}" == "0.02" and hand.p_holm[BY_HAND[:2]].min() > .9
    places = recorded("localizations", **SIXTY_FOUR).groupby("localization").layer.agg(sorted)
    assert places["flu"] == [0, 1, 2, 3, 4, 5] and places[BY_HAND].tolist() == [[0, 2, 3, 4, 5], [1, 2, 3, 4, 5], [2, 3, 4, 5], [0, 1]]
    drawn = recorded("flu_sets", **SIXTY_FOUR).query("rise == .05 and rule == 'before-extraction'").set_index("layer").share
    assert [f"{drawn[l]:.3f}" for l in (0, 1)] == ["0.430", "0.665"]
    assert two(recorded("probing", **SIXTY_FOUR).query("position == 'subject'").drop_duplicates("layer").set_index("layer").in_flu[[0, 1]]) == ["0.74", "0.89"]


# ---- page 70

def test_ways_to_ask_on_gemma():
    said = recorded("field", model="gemma-3-270m").query("evaluation == 'elicitation' and seed == -1 and measure == 'top1' and answer == 'truth'").set_index(["setting", "group", "localization"]).value
    assert said["sampled/any of 16", "forget"].drop("none").max() == 0 == said["persuasion/denied", "forget"].drop("none").max() and round(said["persuasion/denied", "retain", "none"], 2) == .06
    assert said["persuasion/denied", "retain"].drop("none").between(.78, 1).all() and said["persuasion/alias", "forget"].min() == 1
    turned = recorded("field_scorecard", model="gemma-3-270m").query("attack == 'reversed question' and seed >= 0").set_index(["localization", "seed"]).sort_index()
    assert two(turned.ghost_value.drop("none").agg(["min", "max"])) == ["0.25", "0.54"] and turned.value["late"].round(2).tolist() == [.81, .69, .44] and turned.value["none"].between(.75, .88).all()


def test_reading_and_rounding_on_gemma():
    shown = recorded("field_scorecard", model="gemma-3-270m").query("seed == -1").pivot(index="attack", columns="localization", values="value")
    assert shown.loc["soft prompt", ["late", "flu"]].round(2).tolist() == [.88, .38] and shown.loc["latent perturbation", ["late", "flu"]].round(2).tolist() == [.69, .31]
    assert (shown.loc["adversarial suffix", ["late", "flu"]] == .25).all() and shown.loc[["logit lens", "tuned lens"], "flu"].round(2).tolist() == [0, .12] and shown.flu["new probe"] == .5
    assert shown.loc[["quantized", "damaged", "direction removed", "tuned on other text"], "flu"].between(.185, .235).all()
    others = shown[["causal-tracing-mlps", "all-mlps", "nonlocalized"]]
    assert others.loc["soft prompt"].between(.12, .25).all() and others.loc[["logit lens", "tuned lens"]].max(axis=None) < .13 and round(others["all-mlps"]["new probe"], 2) == .56
