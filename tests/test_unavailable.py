"Attacks that cannot be made for some facts; what cannot be trained is said before work"
import pandas as pd
import pytest
from mechunlearn.attacks import attack, run_more_attacks
from mechunlearn.capability import capability, run_capability
from mechunlearn.evaluation import run_evaluation
from mechunlearn.facts import Fact, Task
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.finetuning import can_train, finetune, missing_rates
from mechunlearn.jobs import run_finetuning
from mechunlearn.latent import latent, run_latent
from mechunlearn.localization import build
from mechunlearn.models import components
from mechunlearn.relearning import relearn, run_relearning
from mechunlearn.softprompts import run_soft_prompts
from mechunlearn.store import Refusal, Run, Unavailable, load_table, notes

HOW = dict(lr=1e-2, steps=2, progress=False)


def own(n, edits=True):
    "A user's facts: no relation, no options, no examples, no text, no ghosts"
    texts = [("the bright fox", " golf", " football"), ("every bed", " football", " golf"), ("some tall deers", " golf", " football"), ("the market", " river", " saw")]
    fact = lambda i, s, a, e: Fact(id=f"own/{i}", relation="", subject=s, prompt=f"Fact: {s} watches", answer=a, edit=e)
    forget = tuple(fact(i, *t) for i, t in enumerate(texts[:n]))
    if not edits: forget = tuple(f.model_copy(update=dict(edit=None)) for f in forget)
    return Task(name="counterfact-editing", source="counterfact", update="edit" if edits else "unlearn", forget=forget,
        retain=(fact(8, *texts[3]).model_copy(update=dict(edit=None, subject="the saw", prompt="Fact: the saw watches")),),
        retain_test=(fact(9, *texts[3]).model_copy(update=dict(edit=None, subject="a river", prompt="Fact: a river watches")),))


def stages(lm, task, run):
    args = lm, lambda seed: task, run, ["all-mlps"], [0]
    return dict(finetuning=run_finetuning(*args, **HOW), evaluation=run_evaluation(*args, **HOW),
        relearning=run_relearning(*args, relearning=dict(steps=2, low_resource=True, grid=dict(ranks=(4,), lrs=(1e-3,), steps=(2,))), **HOW), latent=run_latent(*args, **HOW),
        soft=run_soft_prompts(*args, soft=dict(ks=[1], prompts=1, steps=1), **HOW), more=run_more_attacks(*args, **HOW), capability=run_capability(*args, **HOW))


@pytest.mark.parametrize("n, edits", [(1, True), pytest.param(2, True, marks=pytest.mark.slow), (3, True), pytest.param(3, False, marks=pytest.mark.slow)])
def test_every_stage_goes_on(tiny, tmp_path, n, edits, capsys):
    lm, task = tiny("llama"), own(n, edits)
    run = Run(tmp_path / "run", lm.name, lm.revision, task.name, {})
    got, said = stages(lm, task, run), notes(tmp_path / "run")
    assert "kept facts of the same relation" in said["latent"]["probes"] and "give texts" in said["capability"]["capability"] and "four options" in said["more_attacks"]["hardened"]
    assert ("relearning" in said.get("relearning", {})) == (n == 1) == ("soft prompts" in said.get("soft", {})) and "generation" not in said["more_attacks"]
    assert set(got["evaluation"].localization) == {"none", "all-mlps"} and got["latent"].empty and got["capability"].empty and got["relearning"].empty == (n == 1)
    assert load_table(run.path("all-mlps", "seed0", "low_resource.parquet")).setting.str.startswith("all facts").any()
    assert "probes: not available:" in capsys.readouterr().out
    for table in got.values(): assert {"localization", "seed"} <= set(table)
    for key in ("relearning", "soft", "latent", "capability"): # the cells of "Run it"
        index, columns = ("localization", ["group"]) if key != "latent" else ("localization", "layer")
        got[key].pivot_table(index=index, columns=columns, values="value", sort=False)


def test_a_note_goes_when_the_attack_can_be_made(tiny, tmp_path):
    lm = tiny("llama")
    run = Run(tmp_path / "run", lm.name, lm.revision, "t", {})
    go = lambda n: run_relearning(lm, lambda seed: own(n), run, ["all-mlps"], [0], relearning=dict(steps=1), **HOW)
    go(1)
    assert notes(tmp_path / "run")["relearning"]
    go(2)
    assert "relearning" not in notes(tmp_path / "run")


@pytest.mark.parametrize("which", ["standard", "all"])
def test_one_edit_is_attacked_by_what_there_is(tiny, which):
    lm, task = tiny("llama"), own(1)
    edit = finetune(lm, task, build(lm, "all", components(lm)), **HOW)
    found = attack(lm, task, edit, attacks=which)
    assert {"relearn", "latent"} <= set(found.missing) and ("soften" in found.missing) == (which == "all")
    assert len(found.table()) and "not available" in found._repr_html_()
    found.plot()


def test_relations_that_cannot_be_probed_are_left_out(tiny):
    lm = tiny("llama")
    task = sports_athlete_editing(lm, forget_size=4)
    more = own(1)
    mixed = task.model_copy(update=dict(forget=task.forget + more.forget, retain=task.retain[::5] + more.retain))
    records = latent(lm, mixed, max_facts=2)
    assert set(records[records.group == "forget"].fact) == {f.id for f in task.forget}
    for ask in (lambda: latent(lm, more), lambda: relearn(lm, more), lambda: capability(lm, more)):
        with pytest.raises(Unavailable): ask()


# ---- before any work

def test_missing_rates_are_named():
    table = pd.DataFrame([("m", "t", 64, "flu", 1e-5, 1., 1., "x")], columns=["model", "task", "forget_size", "localization", "lr", "inject", "score", "source"])
    assert missing_rates("m", "t", 64, ["none", "flu", "random-mlps#3", "edited@x", "hand@mlp.2-5"], table) == {}
    got = missing_rates("org/new", "t", 64, ["flu", "nonlocalized"], table)
    assert set(got) == {"flu", "nonlocalized"} and "mechunlearn sweep --model org/new --task t" in got["flu"] and "run --sweep" in got["flu"]
    assert missing_rates("organism", "sports-athlete-editing", 64, ["flu", "late", "nonlocalized"], table) == {}  # the committed table has them


@pytest.mark.parametrize("settings, why", [({}, None), (dict(dtype="bfloat16"), None), (dict(quantize="4bit"), None), (dict(device_map="auto"), None),
    (dict(device_map={"model": 0, "lm_head": "disk"}), None), (dict(optimizer="paged-adamw-8bit", device="cpu"), "only a CPU"), (dict(device_map={"": "cpu"}), None)])
def test_what_cannot_be_edited(settings, why):
    got = can_train(settings)
    assert (got is None) if why is None else why in got


def test_offloaded_weights_are_one_line(tiny, tmp_path):
    from accelerate import cpu_offload, disk_offload
    task = sports_athlete_editing(None, forget_size=4)
    for offload in (lambda hf: cpu_offload(hf, execution_device="cpu"), lambda hf: disk_offload(hf, tmp_path / "off", execution_device="cpu")):
        lm = tiny("llama")
        where = build(lm, "all", components(lm))
        edit = finetune(lm, task, where, **HOW)
        offload(lm.hf)
        for go in (lambda: finetune(lm, task, where, **HOW), lambda: relearn(lm, task, None, steps=1), lambda: edit.applied(lm).__enter__()):
            with pytest.raises(Refusal, match="offloaded to CPU or disk"): go()
