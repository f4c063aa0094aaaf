"Facts that give a map nothing to go on: the run goes on without it and says why. And what maps are computed in."
import copy, json
import numpy as np, pandas as pd, pytest, torch
from mechunlearn import store
from mechunlearn.facts import Fact, Task
from mechunlearn.localization import Evidence, EmptyFLU, layer_table, layer_text, localize_all, mechanisms, run_localization, run_removal
from mechunlearn.models import components, load, wrap
from mechunlearn.patching import NoExtraction, run_direct, run_paths
from mechunlearn.probing import available, run_probing
from mechunlearn.store import Refusal, Run, Unavailable
from mechunlearn.tasks import make_task
from mechunlearn.tracing import plot_components, plot_trace, run_attribution_patching, run_tracing, swap_subject, token_map

MAPS = {"probing": run_probing, "causal tracing": run_tracing, "attribution patching": run_attribution_patching, "map by token": token_map,
        "direct effects": run_direct, "paths to extraction": run_paths}


def three(answers=(" golf", " golf", " golf")):
    "Three facts without relations of their own, and two to keep"
    names = ["dog", "sport", "player", "league", "court"]
    f = tuple(Fact(id=f"own/{i}", relation="own" if i < 3 else "", subject=s, answer=a, prompt=f"Fact: {s} plays the sport of")
              for i, (s, a) in enumerate(zip(names, (*answers, " golf", " golf"))))
    return Task(name="counterfact-editing", source="own", forget=f[:3], retain=f[3:4], retain_test=f[4:])

def maps(lm, task, run): return {what: available(run, "maps", what, lambda: make(lm, lambda seed: task, run, progress=False)) for what, make in MAPS.items()}


def test_a_run_goes_on_without_maps(tiny, tmp_path):
    lm, task = tiny("llama"), three()
    run = Run(tmp_path, lm.name, lm.revision, task.name, {})
    assert all(m is None for m in maps(lm, task, run).values()) and set(store.notes(tmp_path)["maps"]) == set(MAPS)
    t = run_localization(lm, lambda seed: task, run, ["all-mlps", "flu", "random-mlps", "causal-tracing", "extraction"], draws=1, progress=False)
    assert list(t.localization) == ["all-mlps", "flu", "random-mlps#0", "causal-tracing", "extraction"] and t.note[0] == "" and t.note[1:].str.len().min() > 20
    assert store.notes(tmp_path)["localization"] == dict(zip(t.localization[1:], t.note[1:]))
    assert layer_table(tmp_path).empty and layer_text(layer_table(tmp_path)) == "no map is available for these facts"
    assert mechanisms(Evidence(lm, task, run)) == {}


def test_a_run_of_which_nothing_can_be_made_is_refused_with_the_reasons(tiny, tmp_path):
    lm, task = tiny("llama"), three()
    run = Run(tmp_path, lm.name, lm.revision, task.name, {})
    with pytest.raises(Refusal, match="none of the localizations can be made: flu, random#0: no two of these facts.*; flu-probe: no relation") as e:
        run_localization(lm, lambda seed: task, run, ["flu", "flu-probe", "random"], draws=1, progress=False)
    assert not isinstance(e.value, Unavailable) and "\n" not in str(e.value) and set(store.notes(tmp_path)["localization"]) == {"flu", "flu-probe", "random#0"}


def test_a_reason_is_taken_back(tiny, tmp_path):
    lm, task = tiny("llama"), three()
    run = Run(tmp_path, lm.name, lm.revision, task.name, {})
    run_localization(lm, lambda seed: task, run, ["all-mlps", "random-mlps#0"], progress=False)
    assert set(store.notes(tmp_path)["localization"]) == {"random-mlps#0"}
    run_localization(lm, lambda seed: task, run, ["all-mlps", "random-mlps#0"], budget=5000, progress=False)
    assert "localization" not in store.notes(tmp_path)


def test_three_facts_of_a_users_own(tmp_path, capsys):
    lm = load("organism")
    athletes = [f for f in make_task("sports-athlete-editing", lm, forget_size=16).forget]
    rows = [dict(subject=f.subject, prompt=f.prompt, answer=f.answer.strip(), edit=f.edit.strip()) for f in athletes[:3]]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = make_task("counterfact-editing", lm, facts=str(tmp_path / "own.jsonl"))
    run = Run(tmp_path / "run", lm.name, lm.revision, task.name, {})
    made = maps(lm, task, run)
    assert made["probing"] is None and made["map by token"] is None and "probing is not available: no relation" in capsys.readouterr().out
    t = run_localization(lm, lambda seed: task, run, ["all-mlps", "flu"], progress=False)
    assert t.localization[0] == "all-mlps" and t.n_params[0] > 0 and "flu" in set(t.localization)


def test_an_empty_extraction_set_does_not_matter_to_probes(tiny, monkeypatch):
    lm = tiny("llama")
    ev, comps = Evidence(lm, three().model_copy(update={"name": "sports-athlete-editing"})), components(lm)
    ev.layers = [0]
    ev.direct = pd.DataFrame({"component": [str(c) for c in comps], "kind": [c.kind for c in comps], "score": 0., "ci_low": -1., "ci_high": 1.})
    made, why = localize_all(lm, ev.task, ["flu", "extraction", "late"], evidence=ev)
    assert list(made) == ["flu", "late"] and why["extraction"].startswith("no component writes the answer")


def test_scores_that_are_nan_are_no_scores(tiny):
    lm, ev = tiny("llama"), None
    ev, comps = Evidence(lm, three()), components(lm)
    ev.tracing = pd.DataFrame({"component": [str(c) for c in comps], "score": np.nan})
    made, why = localize_all(lm, ev.task, ["causal-tracing", "all-mlps"], evidence=ev, budget=5000)
    assert list(made) == ["all-mlps"] and "no scores" in why["causal-tracing"]


def test_published_sets_of_another_model_are_a_row(tiny):
    made, why = localize_all(tiny("llama"), three(), ["flu@published", "all-mlps"])
    assert list(made) == ["all-mlps"] and "nothing is published" in why["flu@published"]


def test_every_reason_is_one_kind(): assert issubclass(EmptyFLU, Unavailable) and issubclass(NoExtraction, Unavailable)


def test_maps_of_nan_are_drawn_and_printed(tmp_path):
    t = pd.DataFrame({"component": ["mlp.0", "mlp.1"], "kind": "mlp", "layer": [0, 1], "head": pd.array([None, None], dtype="Int64"), "score": np.nan,
                      "ci_low": np.nan, "ci_high": np.nan, "n": 3})
    plot_components(t)
    plot_trace(t.assign(position=[-1, -1], token="of"))
    (tmp_path / "scores").mkdir()
    t.to_parquet(tmp_path / "scores/causal-tracing-swap.parquet")
    assert "-" in layer_text(layer_table(tmp_path)) and "nan" not in layer_text(layer_table(tmp_path))


@pytest.mark.parametrize("subject,prompt,swapped", [
    ("Al", "Al of Algeria plays", "dog of Algeria plays"), ("Rome", "In Romeo and Rome, Romeo's", "In Romeo and dog, Romeo's"),
    ("cat", "cat or cat plays", "cat or dog plays"), ("O'Neil", "O'Neil met O'Neils", "dog met O'Neils"), ("大谷", "野球の大谷選手は", "野球のdog選手は")])
def test_whole_words_are_swapped(subject, prompt, swapped):
    assert swap_subject(Fact(id="x", relation="", subject=subject, answer=" golf", prompt=prompt), "dog") == swapped


def test_maps_of_a_rounded_model_are_computed_in_float32():
    half = load("organism", dtype="bfloat16")
    whole = wrap(copy.deepcopy(half.hf).float(), half.tok, half.name, "float32")
    task = make_task("sports-athlete-editing", half, forget_size=8)
    task = task.model_copy(update={k: getattr(task, k)[:12] for k in ("dev_forget", "dev_retain")})
    all_of = lambda lm: maps(lm, task, None) | {"removal": run_removal(lm, task), "each": pd.Series(Evidence(lm, task, progress=False).each)}
    rounded, exact = all_of(half), all_of(whole)
    assert len(exact) == 8 and all(m is not None and len(m) for m in exact.values()) and half.hf.dtype == torch.bfloat16
    for what, made in exact.items(): assert rounded[what].equals(made), what
