"Edits of a run that are not fine-tunings: memit@flu, mask@all-mlps"
import pytest, torch
from mechunlearn.editors import EDITORS, check_bounds, edit_with, written
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.figures import LOOKS, MARKS, look, ordered
from mechunlearn.finetuning import fingerprint, load_edit, missing_rates, parse_slice, place
from mechunlearn.grids import check_job, estimate, make_job
from mechunlearn.jobs import edit_jobs, made_by, run_finetuning
from mechunlearn.localization import build, localizations_for, localize, split_name
from mechunlearn.losses import LOSSES
from mechunlearn.models import Component, load
from mechunlearn.metrics import opponent
from mechunlearn.rates import _installs
from mechunlearn.stats import BY_EDITORS, BY_LOSSES, edited_by, said_size, sized
from mechunlearn.store import Refusal, Run

QUICK = {"rome": dict(n_contexts=1, aim=dict(steps=2, lr=.1)), "memit": dict(n_contexts=1, weight=10., aim=dict(steps=2, lr=.1)),
         "alphaedit": dict(n_contexts=1, l2=.1, threshold=.5, aim=dict(steps=2)), "rmu": dict(steps=2, batch=3, lr=1e-2),
         "lora": dict(steps=2, batch=4, retain_batch=4, text_batch=2, lr=1e-2), "mask": dict(k=7, steps=2, batch=4, retain_batch=4, text_batch=2)}
QUICK |= {loss: dict(lr=1e-2, steps=2, batch=4, retain_batch=4, text_batch=2) for loss in BY_LOSSES}


def task_of(lm):
    def task(seed):
        t = sports_athlete_editing(lm, forget_size=4, seed=seed)
        near = [f.model_copy(update=dict(prompt=f"Fact: {f.subject} plays")) for f in t.forget]
        return t.model_copy(update=dict(forget=tuple(near), retain=t.retain[:8], retain_test=t.retain_test[:6], text_train=t.text_train[:8], text_test=t.text_test[:2]))
    return task


def test_names():
    assert set(BY_EDITORS) == {*EDITORS, "mask", *LOSSES} == set(MARKS) and list(BY_LOSSES) == list(LOSSES)
    assert edited_by("memit@hand@mlp.1") == ("memit", "hand@mlp.1") and edited_by("edited@x") == ("", "edited@x") and edited_by("mask@") == ("", "mask@")
    assert split_name("memit@random-mlps", draw=2) == ("memit@random-mlps#2", "random-mlps", 2)
    assert localizations_for(["mask@random", "flu"], 2) == ["mask@random#0", "mask@random#1", "flu"]
    with pytest.raises(Refusal, match="unknown localization 'fluu'"): split_name("memit@fluu")
    assert missing_rates("nobody/model", "sports-athlete-editing", 4, ["memit@flu", "flu"]).keys() == {"flu"}


def test_a_name_may_say_a_size():
    assert sized("mask-2000") == ("mask", 2000) and sized("lora-4") == ("lora", 4)
    for other in ("mask", "mask-", "mask-0", "mask-02", "mask-x", "mask-2-3", "rome-3", "mask-" + "9"*13): assert sized(other) == (other, None)
    assert edited_by("mask-2000@random#1") == ("mask", "random#1") and said_size("mask-2000@flu") == 2000
    assert said_size("mask@flu") is None and said_size("hand@mlp.1:4") is None and edited_by("rome-3@flu") == ("", "rome-3@flu")
    assert split_name("mask-50@random-mlps", draw=2) == ("mask-50@random-mlps#2", "random-mlps", 2)
    with pytest.raises(Refusal, match="unknown localization 'rome-3@flu'"): split_name("rome-3@flu")
    assert ordered(["mask-32000@flu", "mask-500@flu", "lora-64@flu", "lora-4@flu", "mask-2000@flu"]) == ["lora-4@flu", "lora-64@flu", "mask-500@flu", "mask-2000@flu", "mask-32000@flu"]


def test_sizes_of_one_editor_are_jobs_of_their_own(tiny, tmp_path):
    lm = tiny("llama")
    run = Run(tmp_path, "tiny", lm.revision, "t", {})
    editors = QUICK | {"lora": QUICK["lora"] | dict(rank=3), "lora-2": dict(lr=3e-3), "lora@hand@mlp.1": dict(alpha=4.), "lora-2@hand@mlp.1": dict(steps=1)}
    masks = edit_jobs(lm, task_of(lm), run, ["mask-5@hand@mlp.1", "mask@hand@mlp.1"], (0,), editors=editors)
    assert [j.editing["k"] for j in masks] == [5, 7]
    for job in masks:
        edit = job.edit()
        changed = sum(int((v != place(lm, parse_slice(k))).sum()) for k, v in edit.values.items())
        assert edit.localization.name == job.name and changed == job.editing["k"]
    two, other, usual = edit_jobs(lm, task_of(lm), run, ["lora-2@hand@mlp.1", "lora-2@hand@mlp.2", "lora@hand@mlp.2"], (0,), editors=editors)
    assert two.editing == QUICK["lora"] | dict(rank=2, lr=3e-3, alpha=4., steps=1)
    assert other.editing == QUICK["lora"] | dict(rank=2, lr=3e-3) and usual.editing == QUICK["lora"] | dict(rank=3)
    assert two.edit().config["rank"] == 2 and load_edit(two.folder).localization.name == "lora-2@hand@mlp.1"


def test_they_are_drawn_in_the_colour_of_their_place_after_the_fine_tunings():
    for name in BY_EDITORS:
        assert look(f"{name}@flu")["color"] == LOOKS["flu"][0] and look(f"{name}@flu")["marker"] == MARKS[name] != look("flu")["marker"]
    assert ordered(["memit@flu", "late", "rome@late", "none", "flu", "rome@flu"]) == ["none", "flu", "late", "memit@flu", "rome@flu", "rome@late"]
    assert opponent("memit@flu") == "memit@flu"


@pytest.mark.parametrize("editor", BY_EDITORS)
def test_each_is_a_job_like_any_other(tiny, tmp_path, editor):
    lm = tiny("llama")
    run, name, before = Run(tmp_path, "tiny", lm.revision, "t", {}), f"{editor}@hand@mlp.1", fingerprint(lm)
    def jobs(**more): return edit_jobs(lm, task_of(lm), run, [name], (0, 1), **{"editors": QUICK, "lr": 1e-2, "inject": 1.} | more)
    first, second = jobs()
    edit = first.edit()
    assert edit.localization.name == name == first.name and fingerprint(lm) == before
    assert first.editor == editor and first.folder != second.folder and first.causes() != second.causes()
    again = jobs()[0].edit()
    assert all(torch.equal(again.values[k], edit.values[k]) for k in edit.values) and load_edit(first.folder).config == edit.config
    assert jobs(steps=9)[0].causes() == first.causes() # a setting of fine-tuning
    other = dict(QUICK, **{editor: QUICK[editor] | (dict(k=8) if editor == "mask" else dict(clip=.5) if editor in LOSSES else dict(layers=[1]) if editor != "rome" else dict(layer=1))})
    assert jobs(editors=other)[0].causes() != first.causes()
    with edit.applied(lm): assert fingerprint(lm) != before
    assert fingerprint(lm) == before


def test_it_is_what_the_editor_makes_by_hand(tiny):
    lm = tiny("llama")
    task = task_of(lm)(0)
    job, = edit_jobs(lm, task_of(lm), None, ["lora@hand@mlp.1"], (0,), editors=QUICK)
    where = job.where.model_copy(update=dict(name="hand@mlp.1"))
    by_hand = EDITORS["lora"](lm, task, where, **QUICK["lora"])
    assert all(torch.equal(v, job.edit().values[k]) for k, v in by_hand.values.items())


@pytest.mark.parametrize("loss", BY_LOSSES)
def test_a_loss_at_a_place_is_the_fine_tuning_by_that_loss(tiny, loss):
    lm, how = tiny("llama"), dict(lr=1e-2, steps=2, batch=4, retain_batch=4, text_batch=2)
    at, = edit_jobs(lm, task_of(lm), None, [f"{loss}@hand@mlp.1"], (0,), editors={loss: how})
    setting, = edit_jobs(lm, task_of(lm), None, ["hand@mlp.1"], (0,), loss=loss, inject=1., **how)
    a, b = at.edit(), setting.edit()
    assert all(torch.equal(v, a.values[k]) for k, v in b.values.items()) and a.curve.equals(b.curve) and a.config == b.config


def test_how_a_step_is_made_reaches_editors(tiny, monkeypatch):
    lm, seen = tiny("llama"), []
    names = ["npo@hand@mlp.1", "lora@hand@mlp.1", "mask@hand@mlp.1", "memit@hand@mlp.1"]
    jobs = edit_jobs(lm, task_of(lm), None, names, (0,), micro_batch=3, checkpoint=True, optimizer="adamw-8bit", editors={"npo": {"lr": 1e-3}, "mask": {"k": 9}})
    monkeypatch.setattr("mechunlearn.jobs.edit_named", lambda name, lm, task, where, **how: seen.append(how))
    for job in jobs: job.by_editor()
    assert seen == [dict(micro_batch=3, checkpoint=True, optimizer="adamw-8bit", lr=1e-3), dict(micro_batch=3), dict(micro_batch=3, k=9), {}]
    assert jobs[0].causes()["editor"] == dict(optimizer="adamw-8bit", lr=1e-3) # a step made otherwise is the same step, with another optimizer it is not


def test_an_equation_without_an_answer_is_refused(tiny):
    lm = tiny("llama")
    task, where = task_of(lm)(0), build(lm, "hand@mlp.1", [Component("mlp", 1)])
    check_bounds("rome", dict(layer=0, ridge=0., n_contexts=0)) # these may be
    for editor, how in (("memit", dict(weight=0)), ("alphaedit", dict(l2=0.)), ("lora", dict(rank=0))):
        with pytest.raises(Refusal, match=f"{editor}.{next(iter(how))}: 0 is not above 0"): edit_with(lm, task, where, editor, **how)


def test_a_loss_at_a_place_needs_a_rate(tiny):
    lm = tiny("llama")
    job, = edit_jobs(lm, task_of(lm), None, ["npo@hand@mlp.1"], (0,))
    with pytest.raises(Refusal, match="npo@... needs a learning rate of its own: --set editors.npo.lr"): job.edit()


def test_the_rate_of_a_loss_is_asked_for_before_a_model_is_loaded(tmp_path, capsys):
    from mechunlearn.cli import main
    argv = ["run", "--forget-size", "16", "--localizations", "flu,npo@late", "--out", str(tmp_path)]
    assert main(argv) == 2 and "npo@late needs a learning rate of its own: --set editors.npo.lr=..." in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert main([*argv, "--dry-run", "--set", "editors.npo.lr=.004"]) == 0


def test_a_sweep_does_not_ask_for_answers_that_a_loss_does_not_install():
    assert not _installs("npo", {}) and not _installs("rmu", {}) and not _installs("dpo", {}) and _installs("idk", {"preferred": "edit"})
    assert _installs("injection", {}) and _installs("rome", {})


def test_fine_tunings_beside_them_are_what_they_are_alone(tiny):
    lm, how = tiny("llama"), dict(lr=1e-2, inject=1., steps=2, batch=4, retain_batch=4, text_batch=2, progress=False)
    alone, = edit_jobs(lm, task_of(lm), None, ["hand@mlp.1"], (0,), **how)
    beside, mask = edit_jobs(lm, task_of(lm), None, ["hand@mlp.1", "mask@hand@mlp.1"], (0,), editors=QUICK, **how)
    assert alone.causes() == beside.causes() and all(torch.equal(v, beside.edit().values[k]) for k, v in alone.edit().values.items())
    curves = run_finetuning(lm, task_of(lm), None, ["hand@mlp.1", "mask@hand@mlp.1"], (0,), editors=QUICK, **how)
    assert set(curves.localization) == {"hand@mlp.1", "mask@hand@mlp.1"}


@pytest.mark.parametrize("task,names,settings,why", [
    ("sports-athlete-editing", ["mask@flu"], {}, "needs a number of weights"),
    ("sports-athlete-editing", ["mask@flu"], {"editors": {"mask": {"n": 3}}}, "unknown setting of mask 'n'"),
    ("sports-athlete-editing", ["mask@flu"], {"editors": {"mask": {"k": 0}}}, "editors.mask.k: input should be greater than or equal to 1"),
    ("sports-athlete-editing", ["memit@flu"], {"editors": {"memit": {"weight": "much"}}}, "editors.memit.weight: input should be a valid number"),
    ("sports-athlete-editing", ["rome@flu"], {"editors": {"rome": {"aim": {"steps": "x"}}}}, "editors.rome.aim: input should be a valid integer"),
    ("sports-athlete-editing", ["rome@flu"], {"editors": {"rome": {"aim": {"stops": 3}}}}, "editors.rome.aim: extra inputs"),
    ("sports-athlete-editing", ["memit@flu"], {"editors": {"memti": {}}}, "unknown editor 'memti', did you mean 'memit'"),
    ("sports-athlete-editing", ["mask-5@flu"], {"editors": {"mask-5": {"n": 3}}}, "unknown setting of mask 'n'"),
    ("sports-athlete-editing", ["lora@flu"], {"editors": {"rome-3": {}}}, "unknown editor 'rome-3'"),
    ("sports-athlete-editing", ["hand@mlp.1:0"], {}, "give 1 to 384 neurons"),
    ("sports-athlete-editing", ["hand@mlp.1+mlp.1:3"], {}, "not whole already"),
    ("sports-athlete-editing", ["memit@flu"], {"loss": "npo"}, "has a loss of its own"),
    ("sports-athlete-editing", ["npo@flu"], {"loss": "npo"}, "has a loss of its own"),
    ("sports-athlete-editing", ["lora@flu"], {"rest": "4bit"}, "rest=4bit is for fine-tuning"),
    ("sports-athlete-editing", ["npo@flu"], {"editors": {"npo": {"lr": 0}}}, "editors.npo.lr"),
    ("sports-athlete-editing", ["lora@flu"], {"editors": {"lora": {"rank": 0}}}, "editors.lora.rank: 0 is not above 0"),
    ("sports-athlete-editing", ["rmu@flu"], {"editors": {"rmu": {"lr": -1}}}, "editors.rmu.lr: -1 is not above 0"),
    ("sports-athlete-editing", ["rmu@flu"], {"editors": {"rmu": {"batch": 0}}}, "editors.rmu.batch: 0 is not above 0"),
    ("sports-athlete-editing", ["memit@flu"], {"editors": {"memit": {"weight": 0}}}, "editors.memit.weight: 0 is not above 0"),
    ("sports-athlete-editing", ["alphaedit@flu"], {"editors": {"alphaedit": {"l2": 0}}}, "editors.alphaedit.l2: 0 is not above 0"),
    ("sports-athlete-editing", ["rome@flu"], {"editors": {"rome": {"aim": {"clamp": 0}}}}, "editors.rome.aim.clamp: 0 is not above 0"),
    ("sports-athlete-editing", ["rome@flu"], {"editors": {"rome": {"n_contexts": -1}}}, "editors.rome.n_contexts: -1 is not 0 or more"),
    ("sports-athlete-editing", ["npo@flu"], {"editors": {"npo": {"loss": "dpo"}}}, "unknown setting of npo 'loss'"),
    ("sports-athlete-editing", ["memit@hand@head.0.1"], {}, "has no whole MLP, and editors write into MLPs"),
    ("sports-athlete-editing", ["memit@flu"], {"editors": {"memit": {"layers": [1, 99]}}}, "organism has no MLP in layer 99"),
    ("sequential-counterfact-editing", ["memit@flu"], {}, "come in parts")])
def test_what_cannot_be_is_refused_before_a_model_is_loaded(tmp_path, task, names, settings, why):
    with pytest.raises(Refusal, match=why): check_job(make_job("organism", task, {}, names, [0], settings, tmp_path))


def test_a_mask_by_hand_needs_its_size(tiny, monkeypatch):
    lm = tiny("llama")
    job, = edit_jobs(lm, task_of(lm), None, ["mask@hand@mlp.1"], (0,))
    with pytest.raises(Refusal, match="editors.mask.k"): made_by("mask", lm, job.task, job.where)
    monkeypatch.setattr("mechunlearn.jobs.learn_mask", lambda *a, **k: pytest.fail("learned"))
    for k in (job.where.n_params + 1, -1, 2.5):
        with pytest.raises(Refusal, match=f"cannot mask {k} weights of .* from 0 to {job.where.n_params}"): made_by("mask", lm, job.task, job.where, k=k)


def test_a_mask_larger_than_a_known_place_is_refused_before_a_run(tmp_path):
    job = make_job("organism", "sports-athlete-editing", {}, ["mask-999999999@late"], [0], {}, tmp_path)
    with pytest.raises(Refusal, match="mask-999999999@late cannot be: there are 1146880 weights"): estimate(job)
    job = make_job("organism", "sports-athlete-editing", {}, ["mask@late"], [0], {"editors": {"mask": {"k": 999999999}}}, tmp_path)
    with pytest.raises(Refusal, match="mask@late cannot be"): estimate(job)


def test_a_dry_run_knows_what_an_editor_writes(tmp_path):
    names = [*(f"{e}@hand@mlp.1-3" for e in ("rome", "memit", "alphaedit", "rmu", "lora", "npo")), "mask-50@hand@mlp.1-3", "hand@mlp.1-3"]
    job = make_job("organism", "sports-athlete-editing", {"forget_size": 16}, names, [0], {"dtype": "float32"}, tmp_path)
    said, lm = estimate(job).set_index("localization"), load("organism")
    one = lm.d_model * lm.d_mlp # of three matrices of an MLP
    assert [*said.trained] == [one, 3*one, 3*one, 3*one, *[9*one]*4]
    around = (said.memory_gb["memit@hand@mlp.1-3"]*1e9 - sum(p.numel() for p in lm.hf.parameters())*4 - 8*3*one) / (8*lm.d_mlp**2)
    assert around == pytest.approx(2*3) # the second moment of each layer, and what is solved with


def test_heads_of_a_place_are_not_counted_as_mlps(tmp_path):
    lm, sizes = load("organism"), dict(rmu=dict(steps=1, batch=2), lora=dict(steps=1, batch=2, retain_batch=2, text_batch=1), memit=dict(n_contexts=0, layers=[8, 9]))
    job = make_job("organism", "sports-athlete-editing", {"forget_size": 16}, [f"{e}@late" for e in sizes], [0], {"editors": sizes}, tmp_path)
    task = sports_athlete_editing(lm, forget_size=16)
    where, said = localize(lm, task, "late"), estimate(job).set_index("localization").trained
    assert any(c.startswith("head.") for c in where.components)
    for name, how in sizes.items():
        edit = edit_with(lm, task, where, name, **how | ({} if name == "memit" else {"progress": False}))
        assert said[f"{name}@late"] == edit.localization.n_params < where.n_params
        assert written(lm, where, name, how.get("layers")) == edit.localization.n_params


def test_a_sweep_before_a_run_leaves_editors_out(capsys, tmp_path):
    from mechunlearn.cli import read
    from mechunlearn.options import job_of, sweep_words, trained_in
    job = job_of(read(["run", "--model", "organism", "--localizations", "flu,memit@flu,late", "--out", str(tmp_path)]))
    assert trained_in(job) == ["flu", "late"] and "memit" not in " ".join(sweep_words(job, trained_in(job)))
    with pytest.raises(Refusal, match="memit cannot edit a quantized model.*fine-tune: flu"): job_of(read(["run", "--model", "organism", "--localizations", "memit@flu", "--quantize", "8bit", "--out", str(tmp_path)]))


def test_numbers_that_yaml_reads_as_words_are_numbers():
    job = make_job("organism", "sports-athlete-editing", {"forget_size": 16}, ["lora@flu"], [0], {"editors": {"lora": {"lr": "1e-3"}, "rome": {"aim": {"clamp": "6"}}}})
    assert job.settings["editors"] == {"lora": {"lr": 1e-3}, "rome": {"aim": {"clamp": 6.}}}
    whole = make_job("organism", "sports-athlete-editing", {"forget_size": 16}, ["memit@flu"], [0], {"editors": {"memit": {"weight": 100}, "lora": {"steps": 10.}}}).settings["editors"]
    assert type(whole["memit"]["weight"]) is int and type(whole["lora"]["steps"]) is int # what was written names the artefacts of older runs
