import collections, random
import numpy as np, pandas as pd, pytest, torch
from plain import every_shape, projections
from mechunlearn import localization, models, stats
from mechunlearn.facts import Fact, Task
from mechunlearn.localization import (EmptyFLU, Evidence, Localization, agreement, at_random, build, by_hand, by_hand_in_part, by_score, chosen_by_fact, compare, control_draws,
    describe, fill, late, layer_table, layer_text, localizations_for, localize, localize_all, localize_each, mechanism_table, mechanisms, neuron_size,
    overlap, plot_localizations, plot_mechanisms, run_localization, say_localizations, say_shared, split_name, trained,
    subject_removal, tracing_of, units)
from mechunlearn.models import Component, components, load, n_params, slices
from mechunlearn.store import Refusal, Run
from mechunlearn.tasks import make_task
from mechunlearn.tracing import swap_cases

NAMES = ["flu", "flu-probe", "flu-path", "causal-tracing", "causal-tracing-mlps", "random", "random-mlps", "late", "extraction", "flu-with-attention",
    "hand@mlp.0-1+head.2.3", "all-mlps", "nonlocalized"]


def task(name="sports-athlete-editing"):
    f = tuple(Fact(id=f"{i}", relation="r", subject=f"s{i}", answer=" a", candidates=(" a",), prompt=f"s{i} of") for i in range(6))
    return Task(name=name, source="world", forget=f[:2], retain=f[2:4], retain_test=f[4:])

def evidence(lm, flu=(0, 1), seed=0, run=None):
    "Evidence whose curve and scores are made up"
    ev, comps = Evidence(lm, task(), run), components(lm)
    score = np.random.default_rng(seed).normal(size=len(comps))
    ev.layers, ev.tracing = list(flu), pd.DataFrame({"component": [str(c) for c in comps], "score": score})
    ev.all_paths = ev.tracing.assign(kind=[c.kind for c in comps], score=np.abs(score) / 10)
    ev.paths = ev.all_paths[ev.all_paths.kind == "mlp"]
    ev.direct = ev.all_paths.assign(ci_low=.01, ci_high=1)
    return ev

def mask(lm, loc):
    "Trained entries by parameter, by assignment"
    out = collections.defaultdict(lambda: None)
    for s in loc.slices:
        w = lm.weight(s.param)
        assert 0 <= s.start < s.stop <= w.shape[s.dim]
        if out[s.param] is None: out[s.param] = torch.zeros(w.shape, dtype=torch.bool)
        part = out[s.param].narrow(s.dim, s.start, s.stop - s.start)
        assert not part.any(), "a weight is in two slices"
        part.fill_(True)
    return out

def shared(a, b): return sum((a[k] & b[k]).sum().item() for k in set(a) & set(b))


# ---- counting

@pytest.mark.parametrize("name", NAMES)
def test_counts_equal_masks(lm, name):
    l = localize(lm, task(), name, evidence=evidence(lm))
    m = mask(lm, l)
    assert l.n_params == sum(v.sum().item() for v in m.values()) == n_params(lm, list(l.slices))

@every_shape
def test_overlap_equals_masks(lm):
    made = list(localize_all(lm, task(), NAMES, draws=3, evidence=evidence(lm))[0].values())
    made.append(build(lm, "part", [Component("head", 1, 2)], part=(1, 7)))
    masks = [mask(lm, l) for l in made]
    for a, ma in zip(made, masks):
        for b, mb in zip(made, masks): assert overlap(a, b) == pytest.approx(shared(ma, mb) / a.n_params, abs=1e-12)
    assert all(overlap(a, a) == 1 for a in made)

def test_shared_keys_and_values_are_counted_once(tiny):
    lm = tiny("llama")
    one, both = (build(lm, "x", [Component("head", 0, h) for h in hs]) for hs in ([0], [0, 1]))
    assert one.n_params == 4 * 8 * 32 and both.n_params == 6 * 8 * 32


# ---- budgets

def test_budget_is_met_to_less_than_a_neuron(lm):
    rng, step = random.Random(0), neuron_size(lm)
    total = build(lm, "all", components(lm, ("mlp",))).n_params
    for k in range(40):
        budget = rng.randint(step, total)
        for name in ("causal-tracing", "causal-tracing-mlps", f"random#{k}", f"random-mlps#{k}"):
            l = localize(lm, task(), name, budget=budget, evidence=evidence(lm, seed=k))
            assert 0 <= budget - l.n_params
            if not {str(c) for c in components(lm, ("mlp",))} <= set(l.components): assert budget - l.n_params < step and l.matched
            mask(lm, l)

def test_flu_gives_the_budget(lm):
    ev = evidence(lm, (1,))
    flu = localize(lm, task(), "flu", evidence=ev)
    assert flu.components == ("mlp.1",) and flu.matched and flu.neurons is None
    assert flu.budget == flu.n_params == n_params(lm, slices(lm, "mlp.1"))
    mlps = localize(lm, task(), "random-mlps", evidence=ev)
    assert len(mlps.components) == 1 and mlps.n_params == flu.n_params and mlps.neurons is None
    assert 0 <= flu.n_params - localize(lm, task(), "causal-tracing", evidence=ev).n_params < neuron_size(lm)

def test_best_components_come_first(lm):
    ev = evidence(lm)
    order = ev.tracing.sort_values("score", key=abs, ascending=False).component.tolist()
    l = localize(lm, task(), "causal-tracing", evidence=ev)
    assert list(l.components) == order[:len(l.components)]
    wider = build(lm, "x", [Component.parse(c) for c in order[:len(l.components) + 1]])
    assert wider.n_params > l.budget
    if l.neurons: assert f"mlp.{l.neurons[0]}" == next(c for c in order[len(l.components):] if c.startswith("mlp"))

def test_fill_by_hand(tiny):
    lm = tiny("qwen3") # an MLP has 48 neurons of 3*32, a head 4*8*32
    step, head, mlp = 96, 1024, 48 * 96
    rank = [[c] for c in map(Component.parse, ["head.0.0", "mlp.2", "head.1.1", "mlp.0"])]
    assert fill(lm, rank, head) == ([rank[0][0]], None)
    assert fill(lm, rank, head + 5 * step + 95) == ([rank[0][0]], (2, 5))
    assert fill(lm, rank, head + mlp) == ([rank[0][0], rank[1][0]], None)
    assert fill(lm, rank, head + mlp + step) == ([rank[0][0], rank[1][0]], (0, 1))
    assert fill(lm, rank, step - 1) == ([], None)

def test_paper_budget_overshoots_by_whole_layers(lm):
    for name in ("causal-tracing", "causal-tracing-mlps", "random", "random-mlps"):
        for flu in ((0,), (0, 1)):
            ev = evidence(lm, flu)
            l = localize(lm, task(), name, paper_budget=True, evidence=ev)
            assert l.n_params >= l.budget and l.neurons is None
            parsed = [Component.parse(c) for c in l.components]
            heads = collections.Counter(c.layer for c in parsed if c.kind == "head")
            assert set(heads.values()) <= {lm.n_heads}
            last = (parsed[-1].kind, parsed[-1].layer)
            without = [c for c in parsed if (c.kind, c.layer) != last]
            assert not without or build(lm, "x", without).n_params < l.budget

def test_paper_units_rank_by_the_signed_sum(tiny):
    lm = tiny("qwen3")
    score = {str(c): 0. for c in components(lm)} | {"head.0.0": 5., "head.0.1": -5., "head.1.0": -2., "head.1.1": -2., "mlp.2": 3.}
    order = by_score(pd.DataFrame({"component": list(score), "score": list(score.values())}), units(lm, whole_layers=True))
    assert [(u[0].kind, u[0].layer) for u in order[:2]] == [("head", 1), ("mlp", 2)]

def test_impossible_budgets_are_refused(lm):
    total = build(lm, "all", components(lm, ("mlp",))).n_params
    with pytest.raises(Refusal, match="more than"): localize(lm, task(), "random-mlps", budget=total + 1, evidence=evidence(lm))
    with pytest.raises(Refusal, match="less than one MLP neuron"): localize(lm, task(), "random", budget=1, evidence=evidence(lm))

def test_scores_that_are_nan_are_refused(lm):
    ev = evidence(lm)
    ev.tracing = ev.tracing.assign(score=np.nan)
    with pytest.raises(Refusal, match="no scores"): localize(lm, task(), "causal-tracing", evidence=ev)


# ---- draws

def test_draws_are_reproducible_and_differ(lm):
    a, b = ([localize(lm, task(), f"random#{k}", evidence=evidence(lm)).components for k in range(8)] for _ in range(2))
    assert a == b and len(set(a)) > 4
    assert localize(lm, task(), "random", draw=3, evidence=evidence(lm)) == localize(lm, task(), "random#3", evidence=evidence(lm))

@pytest.mark.parametrize("name", ["random", "random-mlps"])
def test_draws_are_uniform(tiny, name):
    lm = tiny("llama")
    u = units(lm, ("mlp", "head") if name == "random" else ("mlp",))
    n, first, last = 3000, collections.Counter(), collections.Counter()
    for k in range(n):
        order = at_random(u, name, k)
        assert sorted(order) == sorted(u)
        first[str(order[0][0])] += 1; last[str(order[-1][0])] += 1
    for count in (first, last):
        chi2 = sum((count[str(x[0])] - n / len(u)) ** 2 / (n / len(u)) for x in u)
        assert chi2 < len(u) + 4 * (2 * len(u)) ** .5


# ---- definitions

@pytest.mark.parametrize("n,first", [(12, 8), (8, 6), (28, 19), (42, 28), (32, 22), (3, 2)])
def test_late_is_the_last_third(n, first, monkeypatch):
    lm = type("L", (), dict(n_layers=n, n_heads=2))()
    assert sorted({c.layer for c in late(lm)}) == list(range(first, n)) and len(late(lm)) == 3 * (n - first)

@every_shape
def test_fixed_ones(lm):
    ev = evidence(lm)
    made = {n: localize(lm, task(), n, evidence=ev) for n in ("late", "all-mlps", "nonlocalized")}
    assert not any(l.matched for l in made.values()) and all(l.budget is None for l in made.values())
    every = {s.param for s in made["nonlocalized"].slices}
    assert every == set(projections(lm.hf))
    assert made["nonlocalized"].n_params == sum(lm.weight(n).numel() for n in every)
    assert overlap(made["late"], made["nonlocalized"]) == overlap(made["all-mlps"], made["nonlocalized"]) == 1
    layers = trained(made).set_index("localization")
    assert layers.loc["nonlocalized", "layer"].tolist() == [0, 1, 2] and layers.loc["late", "layer"] == 2
    assert (layers.mlp == 1).all() and (layers.drop("all-mlps").heads == lm.n_heads).all() and (layers.loc["all-mlps", "heads"] == 0).all()

@every_shape
def test_a_part_of_an_mlp_is_drawn_as_one(lm):
    some = build(lm, "x", [Component("mlp", 0), Component("head", 1, 2)], part=(1, 12))
    for saved in (some, some.to_json()):
        assert trained({"x": saved}).to_dict("list") == {"localization": ["x", "x"], "layer": [0, 1], "mlp": [1, 12 / lm.d_mlp], "heads": [0, 1]}


# ---- names

def test_names():
    assert split_name("random-mlps#2") == ("random-mlps#2", "random-mlps", 2) and split_name("random", draw=4) == ("random#4", "random", 4)
    assert split_name("flu") == ("flu", "flu-probe", None)
    assert localizations_for(["random", "flu", "random#9", "flu"], 2) == ["random#0", "random#1", "flu", "random#9"]

@pytest.mark.parametrize("bad,hint", [("random-mlp", "did you mean 'random-mlps'"), ("FLU", "did you mean 'flu'"), ("flu#1", "#k"),
                                      ("random#x", "#k"), ("", "unknown")])
def test_bad_names_are_refused(tiny, bad, hint):
    with pytest.raises(Refusal, match=hint): localize(tiny(), task(), bad, evidence=None)

def test_flu_of_counterfact_is_path_patching(monkeypatch):
    if "flu-path" not in localization.FIXED: monkeypatch.setitem(localization.FIXED, "flu-path", lambda ev: [])
    assert split_name("flu", task("counterfact-editing")) == ("flu", "flu-path", None)


# ---- an empty FLU

def test_empty_flu_is_reported(lm):
    ev = evidence(lm, ())
    for name in ("flu", "random-mlps", "causal-tracing"):
        with pytest.raises(EmptyFLU, match="budget="): localize(lm, task(), name, evidence=ev)
    made, refused = localize_all(lm, task(), ["flu", "late", "random"], draws=1, evidence=ev)
    assert list(made) == ["late"] and list(refused) == ["flu", "random#0"]
    with pytest.raises(Refusal, match="none of the localizations can be made: flu: probe"): localize_all(lm, task(), ["flu"], evidence=ev)
    assert localize(lm, task(), "random", budget=2000, evidence=ev).n_params <= 2000

def test_curve_decides_flu(lm):
    ev = Evidence(lm, task())
    acc = [.3, .3, .9, .9]
    rows = [(l - 1, "subject", c, a, 200, *stats.wilson(a * 200, 200)) for l, x in enumerate(acc) for c, a in ((False, x), (True, .3))]
    ev.curve = pd.DataFrame(rows, columns=["layer", "position", "control", "accuracy", "n_test", "ci_low", "ci_high"])
    assert ev.layers == [1] and [str(c) for c in ev.flu()] == ["mlp.1"]


# ---- files, tables, figures

def test_json_round_trip(lm):
    for l in localize_all(lm, task(), NAMES, draws=1, evidence=evidence(lm))[0].values():
        again = Localization.from_json(l.to_json())
        assert again.to_json() == l.to_json() and again == l.model_copy(update={"whole": None}) and again.slices[0].param == l.slices[0].param and hash(again.slices) == hash(l.slices)

def test_run_folder_is_used(tiny, tmp_path, monkeypatch):
    lm = tiny()
    run = Run(tmp_path, lm.name, lm.revision, "sports-athlete-editing", {})
    first = localize(lm, task(), "causal-tracing", run, evidence=evidence(lm, run=run))
    assert (tmp_path / "localizations" / "causal-tracing.json").exists()
    monkeypatch.setattr(localization, "_choose", None)
    assert localize(lm, task(), "causal-tracing", run) == first
    with pytest.raises(TypeError): localize(lm, task(), "causal-tracing", run, budget=5000)
    with pytest.raises(TypeError): localize(lm, task(), "causal-tracing", run, corruption="noise")

def test_stage(tiny, monkeypatch, tmp_path):
    lm = tiny("llama")
    monkeypatch.setattr(Evidence, "layers", [1])
    monkeypatch.setattr(Evidence, "tracing", evidence(lm).tracing)
    run = Run(tmp_path, lm.name, lm.revision, "sports-athlete-editing", {})
    t = run_localization(lm, lambda seed: task(), run, ["flu", "random", "causal-tracing", "late"], seeds=[4], draws=2, lr=1)
    assert list(t.localization) == ["flu", "random#0", "random#1", "causal-tracing", "late"] and list(t.matched) == [True] * 4 + [False]
    assert t.overlap[0] == 1 and t.overlap.between(0, 1).all() and (t.note == "").all()
    assert {p.name for p in (tmp_path / "localizations").glob("*.json") if not p.name.endswith("meta.json")} == {
        "flu.json", "random#0.json", "random#1.json", "causal-tracing.json", "late.json"}
    monkeypatch.setattr(Evidence, "layers", [])
    t = run_localization(lm, lambda seed: task(), None, ["flu", "late"])
    assert list(t.localization) == ["late", "flu"] and t.note[1].startswith("probe accuracy") and np.isnan(t.overlap[0])

def test_views(lm):
    ev = evidence(lm)
    made, _ = localize_all(lm, task(), NAMES, draws=1, evidence=ev)
    assert compare(made).set_index("localization").overlap["flu"] == 1
    assert plot_localizations(trained(made)).axes[0].get_xlabel() == "layer"
    assert say_localizations(made) == say_localizations({n: l.to_json() for n, l in made.items()}) and "Not matched" in say_localizations(made)
    assert say_shared(trained(made)).startswith("Of the 2 MLPs that flu trains, flu-probe trains 2")
    some = build(lm, "x", map(Component.parse, ["mlp.0", "mlp.1", "head.2.3"]), part=(2, 5))
    assert describe(some) == "MLP 0-1; heads 2.3; 5 neurons of MLP 2"
    assert tracing_of(ev, some) == pytest.approx(ev.tracing.score[:2].sum())
    d = control_draws(ev, n=4)
    assert len(d) == 8 and d.overlap.between(0, 1).all()


# ---- the mechanism, one fact at a time, by hand

def test_flu_by_paths_and_extraction_follow_their_scores(tiny):
    lm = tiny("qwen3"); ev = evidence(lm)
    ev.paths = pd.DataFrame({"component": ["mlp.0", "mlp.1", "mlp.2"], "score": [.03, .0, -.5]})
    ev.direct = ev.direct.assign(score=np.where(ev.direct.component.isin(["mlp.2", "head.2.1"]), -.3, .01))
    assert localize(lm, task(), "flu-path", evidence=ev).components == ("mlp.0",)
    assert localize(lm, task(), "extraction", evidence=ev).components == ("mlp.2", "head.2.1")
    parts = mechanisms(ev)
    assert {k: v.components for k, v in parts.items()} == {"extraction heads": ("head.2.1",), "extraction MLPs": ("mlp.2",),
        "lookup (probes)": ("mlp.0", "mlp.1"), "lookup (paths)": ("mlp.0",)}
    table = mechanism_table(ev, {"late": localize(lm, task(), "late", evidence=ev)}).set_index("mechanism")
    assert table.share.to_dict() == {"extraction heads": 1, "extraction MLPs": 1, "lookup (probes)": 0, "lookup (paths)": 0}
    assert table.shared["extraction MLPs"] == parts["extraction MLPs"].n_params == 3 * 32 * 48
    plot_mechanisms(table.reset_index())

def test_an_empty_flu_by_paths_says_so(tiny):
    lm = tiny("qwen3"); ev = evidence(lm); ev.paths = ev.paths.assign(score=0.)
    with pytest.raises(EmptyFLU, match="no MLP gives the extraction set"): localize(lm, task(), "flu-path", evidence=ev)
    ev.task = task("counterfact-editing")
    with pytest.raises(EmptyFLU, match="by paths"): localize(lm, ev.task, "random", evidence=ev)
    ev.task, ev.direct = task(), ev.direct.assign(score=0.)
    made, refused = localize_all(lm, task(), ["flu", "flu-path", "extraction"], evidence=ev)
    assert list(made) == ["flu"] and "no component writes" in refused["extraction"]

def test_flu_of_counterfact_is_by_paths(tiny):
    lm = tiny("qwen3"); ev = evidence(lm); ev.task = task("counterfact-editing")
    ev.paths = ev.paths.assign(score=[0, 0, 1])
    assert localize(lm, ev.task, "flu", evidence=ev).components == ("mlp.2",)
    assert localize(lm, ev.task, "random", evidence=ev).budget == 3 * 32 * 48

@pytest.mark.parametrize("name,kind,layers", [("google/gemma-2-9b", "sports-athlete-editing", range(2, 7)), ("Meta-Llama-3-8B", "sports-unlearning", range(1, 5)),
    ("google/gemma-7b", "counterfact-editing", (1, 3, 4, 6, 12))])
def test_published_sets(tiny, name, kind, layers):
    lm = tiny("llama", num_hidden_layers=13); lm.name = name
    assert localize(lm, task(kind), "flu@published", evidence=Evidence(lm, task(kind))).components == tuple(f"mlp.{l}" for l in layers)

def test_published_sets_of_another_model_are_refused(lm):
    with pytest.raises(Refusal, match="nothing is published for 'tiny-.*gemma-7b, gemma-2-9b, llama-3-8b"): localize(lm, task(), "flu@published")

def test_sets_by_hand(lm):
    names = lambda text: [str(c) for c in by_hand(lm, text)]
    assert names("mlp.0-1") == ["mlp.0", "mlp.1"] and names("head.2+mlp.1") == ["mlp.1", *(f"head.2.{h}" for h in range(4))]
    assert names("head.1.2+head.1.2") == ["head.1.2"] and len(names("head.0-2")) == 12
    l = localize(lm, task(), "hand@mlp.1+head.0.1")
    assert l.name == "hand@mlp.1+head.0.1" and l.components == ("mlp.1", "head.0.1") and not l.matched

def test_neurons_by_hand(lm):
    l = localize(lm, task(), "hand@mlp.0+mlp.1:5")
    assert l.components == ("mlp.0",) and l.neurons == (1, 5) and l.n_params == build(lm, "x", by_hand(lm, "mlp.0")).n_params + 5*l.step
    alone = localize(lm, task(), f"hand@mlp.2:{lm.d_mlp}")
    assert alone.slices == localize(lm, task(), "hand@mlp.2").slices and alone.components == ()
    for text in ("mlp.1:0", "mlp.1+mlp.1:2", f"mlp.1:{lm.d_mlp + 1}"):
        with pytest.raises(Refusal, match="give 1 to .* neurons of an MLP that is not whole already"): by_hand_in_part(lm, text)
    for text in ("mlp.1:2+mlp.2", "mlp.1-2:3", "head.1:2", "mlp.9:1"):
        with pytest.raises(Refusal, match="names no components|has 3 layers"): by_hand_in_part(lm, text)

@pytest.mark.parametrize("text", ["", "mlp", "mlp.3", "mlp.1-7", "mlp.2-1", "mlp.1.2", "head.0.4", "attn.1", "mlp.0,mlp.1"])
def test_sets_by_hand_that_are_not_there_are_refused(tiny, text):
    with pytest.raises(Refusal, match="names no components|has 3 layers"): by_hand(tiny("qwen3"), text)

def test_each_fact_chooses_two_deviations_above_its_median():
    columns = [f"mlp.{l}" for l in range(12)]
    one, none = np.zeros(12), np.tile([0., .1], 6)
    one[[3, 4]] = .5
    low = np.zeros(12); low[5] = -.9
    each = chosen_by_fact(pd.DataFrame([one + 7, none, low, np.full(12, np.nan)], index=list("abcd"), columns=columns))
    assert each["a"] == ("mlp.3", "mlp.4") and len(each["b"]) == 1 and each["c"] != ("mlp.5",) and len(each["d"]) >= 1

def test_facts_with_one_set_are_edited_together(lm):
    from test_tracing import make_facts
    facts, ev = make_facts(), evidence(lm)
    lm.hf.model.norm.weight.data += 30 # larger logits
    ev.task = Task(name="sports-athlete-editing", source="world", forget=tuple(facts[:6]), retain=tuple(facts[6:]), retain_test=())
    groups = localize_each(ev, progress=False)
    assert sorted(sum(groups.values(), [])) == sorted(f.id for f in facts[:6])
    assert [len(g) for g in groups.values()] == sorted(map(len, groups.values()), reverse=True) and all(c.startswith("mlp") for g in groups for c in g)
    assert sorted(sum(localize_each(ev, attention=True, progress=False).values(), [])) == sorted(f.id for f in facts[:6])

def test_facts_without_scores_cannot_be_localized_one_by_one():
    with pytest.raises(EmptyFLU, match="nothing to localize"): chosen_by_fact(pd.DataFrame({"mlp.0": [np.nan, np.nan]}))

def test_layer_table_reads_what_is_there(tiny, tmp_path):
    (tmp_path / "scores").mkdir()
    with pytest.raises(Refusal, match="no scores"): layer_table(tmp_path)
    rows = dict(kind=["mlp", "mlp", "head"], layer=[0, 1, 1], score=[.1, .2, .9], ci_low=[0, .1, .8], ci_high=[.2, .3, 1.], n=[8, 8, 8])
    pd.DataFrame(rows).to_parquet(tmp_path / "scores/direct-effect.parquet")
    pd.DataFrame(rows).to_parquet(tmp_path / "scores/causal-tracing-swap.parquet")
    t = layer_table(tmp_path)
    assert t.method.tolist() == ["causal tracing"] * 2 + ["direct effect"] * 2 and t.value.tolist() == [.1, .2] * 2
    text = layer_text(t, [1])
    assert "causal tracing (n=8)" in text and "0.20 [0.10,0.30]" in text and "1*" in text


def test_agreement_is_spearmans_correlation_with_removal():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(40, 1)) * .01 + np.arange(12) # every fact has the same order
    t = agreement({"removal": truth, "same": truth ** 3, "reverse": -truth, "noise": rng.normal(size=(40, 12))}, n_boot=100).set_index("method")
    assert t.loc["same", ["rho", "ci_low", "ci_high"]].tolist() == [1, 1, 1] and t.rho["reverse"] == -1 and (t.n == 40).all()
    assert t.ci_low["noise"] < t.rho["noise"] < t.ci_high["noise"] and abs(t.rho["noise"]) < .9


def test_a_localization_says_what_it_is(lm):
    made, _ = localize_all(lm, task(), ["flu", "random", "late"], draws=1, evidence=evidence(lm))
    every = localize(lm, task(), "nonlocalized", evidence=evidence(lm)).n_params
    size = made["flu"].n_params
    assert repr(made["flu"]) == str(made["flu"]) == f"Localization(flu: MLP 0-1; {size:,} weights ({size / every:.0%} of the model's MLPs and heads), the budget of the others)"
    assert f"matched to a budget of {size:,}" in repr(made["random#0"]) and "not matched to a budget" in repr(made["late"])
    assert "<b>flu</b>: MLP 0-1" in made["flu"]._repr_html_() and "%" not in repr(Localization.from_json(made["flu"].to_json()))


# ---- the rule of FLU, and what removal says of it

def _bent(monkeypatch):
    "A probe curve that rises at the subject in layer 0, and in layer 2 with everything else"
    rows = [(l - 1, pos, c, .3 if c else a, 200, a - .05, a + .05) for pos, acc in (("subject", [.3, .7, .7, .95]), ("last", [.3, .3, .3, .95]))
            for l, a in enumerate(acc) for c in (False, True)]
    curve = pd.DataFrame(rows, columns=["layer", "position", "control", "accuracy", "n_test", "ci_low", "ci_high"])
    monkeypatch.setattr(localization, "run_probing", lambda *args, **kw: curve)

def test_flu_rule_is_a_setting_and_a_cause(tiny, tmp_path, monkeypatch):
    _bent(monkeypatch)
    lm = tiny(num_hidden_layers=3)
    run = Run(tmp_path, lm.name, lm.revision, "t", {})
    wide = {"flu_rule": "first-to-last-rise"}
    layers = [localize(lm, task(), "flu", run, **how).components for how in ({}, wide, {})]
    assert layers == [("mlp.0",), ("mlp.0", "mlp.1", "mlp.2"), ("mlp.0",)] and layers[0] == localize(lm, task(), "flu", flu_rule=None).components
    with pytest.raises(Refusal, match="flu_rule"): localize(lm, task(), "flu", flu_rule="widest")


def _by_hooks(lm, case, layers):
    "Logit difference of one case when MLPs say at the subject what they say in the other prompt, with plain hooks"
    ids, other = (torch.tensor(lm.ids([p])) for p in (case.fact.prompt, case.corrupt))
    at, said = slice(ids.shape[1] + case.span[0], ids.shape[1] + case.span[1]), {}
    def keep(l): return lambda m, a, out: said.update({l: out.clone()})
    def put(l):
        def hook(m, a, out):
            out = out.clone(); out[:, at] = said[l][:, at]
            return out
        return hook
    for make, prompt in ((keep, other), (put, ids)):
        hooks = [lm.hf.get_submodule(lm.path("mlp", l)).register_forward_hook(make(l)) for l in layers]
        logits = lm.hf(prompt).logits[0, -1]
        for h in hooks: h.remove()
    return (logits[case.answers[0]] - logits[case.answers[1]]).item()

@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma", "gemma2"])
def test_removal_at_the_subject_is_what_hooks_do(tiny, family):
    lm = tiny(family)
    facts = [Fact(id=str(i), relation="r", subject=s, answer=a, candidates=(" golf", " football"), prompt=f"{shot}{s} plays the sport of")
             for i, (s, a, shot) in enumerate([("dog", " golf", ""), ("player", " football", ""), ("the dog", " golf", "of "), ("the player", " football", "")])]
    cases = swap_cases(lm, facts)
    windows = [range(l, l + 1) for l in range(lm.n_layers)] + [range(lm.n_layers)]
    got = subject_removal(lm, facts, windows, batch_size=2)
    with torch.no_grad():
        clean, bad = (np.array([_by_hooks(lm, c if k else c._replace(fact=c.fact.model_copy(update={"prompt": c.corrupt})), []) for c in cases]) for k in (1, 0))
        left = np.array([[_by_hooks(lm, c, w) for c in cases] for w in windows])
    want = (clean - left).mean(1) / (clean - bad).mean()
    np.testing.assert_allclose(got.share, want, atol=1e-3, rtol=1e-3)
    assert (got.n == len(cases)).all() and got[["first", "last"]].values.tolist() == [[w[0], w[-1]] for w in windows]


STARS = {" basketball": "Kobe Bryant,LeBron James,Stephen Curry,Kevin Durant,Tim Duncan,Scottie Pippen",
         " baseball": "Babe Ruth,Derek Jeter,Mickey Mantle,Barry Bonds,Mike Trout,Hank Aaron",
         " football": "Tom Brady,Peyton Manning,Joe Montana,Aaron Rodgers,Brett Favre,Eli Manning"}

def test_in_gemma_the_lookup_is_in_early_mlps(real_model):
    if "gemma3_text" not in models.FAMILIES: pytest.skip("this version has no names for Gemma 3")
    lm = load(str(real_model("gemma-3-270m")), dtype="float32")
    facts = [Fact(id=f"{a}{s}", relation="sport", subject=s, answer=a, candidates=tuple(STARS), prompt=f"Fact: Tiger Woods plays the sport of golf\nFact: {s} plays the sport of")
             for a, names in STARS.items() for s in names.split(",")]
    lost = subject_removal(lm, facts, [range(1, 4), range(2, 6), range(6, 13), range(12, 18)]).share
    assert lost[0] > .7 and lost[1] > .6 and lost[2] < .2 and lost[3] < .1, lost


# ---- removal at the subject, as a stage

def test_removal_is_kept_with_a_run_and_said(tmp_path, monkeypatch):
    lm = load("organism")
    task = make_task("sports-athlete-editing", forget_size=16)
    run = Run(tmp_path, lm.name, lm.revision, task.name, {})
    ev = Evidence(lm, task, run, progress=False)
    table = ev.removed
    assert (tmp_path / "scores/removal.parquet").exists() and len(table) == 2 * lm.n_layers + 1 and ev.lookup
    own = table.iloc[-1]
    assert (own["first"], own["last"]) == (ev.lookup[0], ev.lookup[-1]) and own.ci_low <= own.share <= own.ci_high
    said = localization.say_lookup(table, ev.lookup)
    assert f"{own.share:.2f} [" in said and ", ".join(map(str, ev.lookup)) in said and "all after them" in said
    assert "FLU" not in localization.say_lookup(table.iloc[:-1])
    monkeypatch.setattr(localization, "subject_removal", lambda *a, **k: pytest.fail("made again"))
    pd.testing.assert_frame_equal(Evidence(lm, task, run, progress=False).removed, table)


def test_removal_needs_no_flu(monkeypatch):
    lm, task = load("organism"), make_task("sports-athlete-editing", forget_size=16)
    def none(self): raise EmptyFLU("no FLU")
    monkeypatch.setattr(Evidence, "flu", none)
    ev = Evidence(lm, task, progress=False)
    assert ev.lookup == [] and len(ev.removed) == 2 * lm.n_layers
