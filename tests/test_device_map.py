"A model spread over two devices (`--device-map auto` on two GPUs): maps, edit and attacks go through, and say the same as on one"
import pandas as pd
import pytest
import torch
from fake_devices import TwoDevices, spread
from mechunlearn import relearning
from mechunlearn.attacks import attack
from mechunlearn.editors import edit_with
from mechunlearn.finetuning import finetune
from mechunlearn.localization import Evidence, build, localize
from mechunlearn.masking import learn_mask
from mechunlearn.models import Component, load
from mechunlearn.tasks import sports_athlete_editing

MAPS = ["flu", "causal-tracing", "attribution-patching", "flu-path", "extraction", "random-mlps"]
FEW = {"retain": 4, "retain/mcq": 2, "ghost": 4, "ghost/mcq": 2, "same-subject": 4, "other-relation": 4, "general": 2}
BRIEF = dict(standard=dict(max_facts=FEW), relearning=dict(steps=2, at=(0, 2), sides=(0,), max_facts=4, sizes=dict(forget=4, retain=2, text=1)),
    latents=dict(n_train=60, max_facts=4), hardened=dict(shots=(0, 2), n_all_orders=1, max_facts=4), generation=dict(max_facts=4),
    soft=dict(ks=(3,), prompts=1, steps=2, max_facts=4), progress=False)


def test_what_meets_on_two_devices_is_noticed():
    with TwoDevices():
        a, b = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")
        for wrong in (lambda: a + b, lambda: torch.stack([a, b]), lambda: torch.where(a > 0, a, b), lambda: a @ b):
            with pytest.raises(RuntimeError, match="same device"): wrong()
        assert (a + b.to(a.device)).device == torch.device("cuda:0") and (a + 1).cpu().device == torch.device("cpu")


def made(lm, attacks):
    "Everything that is drawn, trained and asked of a model"
    task = sports_athlete_editing(lm, forget_size=4, seed=0)
    task = task.model_copy(update=dict(retain=task.retain[::3], retain_test=task.retain_test[::3], text_test=task.text_test[:8]))
    evidence = Evidence(lm, task, progress=False, n_noise=2)
    found = {name: localize(lm, task, name, evidence=evidence) for name in MAPS}
    found["residual"] = localize(lm, task, "flu-path", evidence=Evidence(lm, task, progress=False, receiver="residual"))
    edit = finetune(lm, task, localize(lm, task, "all-mlps", evidence=evidence), steps=2, lr=1e-3, inject=1., progress=False)
    records = attack(lm, task, edit, attacks=attacks, **BRIEF).records
    return {n: (w.components, w.n_params) for n, w in found.items()}, edit.curve, records


@pytest.mark.parametrize("attacks", ["standard", pytest.param("all", marks=pytest.mark.slow)])
def test_maps_edit_and_attacks_of_a_spread_model(monkeypatch, attacks):
    monkeypatch.setattr(relearning, "LOW", {name: (split, (0,), 2) for name, (split, *_) in relearning.LOW.items()}) # one side, two steps
    here = made(load("organism"), attacks)
    with TwoDevices():
        lm = spread(load("organism"))
        assert {p.device.index for p in lm.hf.parameters()} == {0, 1}
        there = made(lm, attacks)
    assert here[0] == there[0]
    for one, other in zip(here[1:], there[1:]):
        pd.testing.assert_frame_equal(*(t.select_dtypes("number").drop(columns=["seconds"], errors="ignore").reset_index(drop=True) for t in (one, other)), rtol=1e-4, atol=1e-5)


SMALL = dict(rome=dict(n_contexts=0), memit=dict(n_contexts=0), alphaedit=dict(n_contexts=0), rmu=dict(steps=2, batch=4, progress=False),
             lora=dict(steps=2, batch=4, retain_batch=2, text_batch=1, progress=False), npo=dict(steps=2, lr=1e-3, batch=4, retain_batch=2, text_batch=1, progress=False))


@pytest.mark.parametrize("method", [*SMALL, "mask"])
def test_an_editor_and_a_mask_of_a_spread_model(method):
    def made(lm):
        task = sports_athlete_editing(lm, forget_size=4, seed=0)
        task = task.model_copy(update=dict(retain=task.retain[::3], text_train=task.text_train[:16]))
        where = build(lm, "both halves", [Component("mlp", l) for l in range(4, 8)])
        if method == "mask": return learn_mask(lm, task, where, steps=2, batch=4, retain_batch=2, text_batch=1, progress=False).edit(lm, 500)
        if method == "npo": return finetune(lm, task, where, loss="npo", **SMALL[method])
        return edit_with(lm, task, where, method, **SMALL[method])
    here = made(load("organism")).values
    with TwoDevices(): there = made(spread(load("organism"))).values
    assert here.keys() == there.keys() and here
    for name in here: torch.testing.assert_close(there[name].detach().as_subclass(torch.Tensor), here[name], rtol=1e-3, atol=1e-5)
