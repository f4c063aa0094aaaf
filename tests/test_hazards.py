"Damaged, hostile and odd inputs: each is one clear line, and nobody else's run suffers"
import json, os, shutil
from pathlib import Path

import pandas as pd, pytest

from mechunlearn import grids, progress, runs, store
from mechunlearn.runs import Job, Part, parts
from mechunlearn.store import Broken, Refusal, Run, Unavailable


# ---- what is not available

def test_notes_are_kept_taken_back_and_read(tmp_path):
    run = Run(tmp_path, "m", "r", "t", {})
    store.note(None, "localization", "flu", "no relation"); store.note(Run(None, "m", "r", "t", {}), "localization", "flu", "no relation")
    assert store.notes(tmp_path) == {}
    store.note(run, "localization", "flu", "no relation"); store.note(run, "localization", "flu-path", "nobody to swap with"); store.note(run, "latent", "probe", "no retain")
    assert store.notes(tmp_path) == {"localization": {"flu": "no relation", "flu-path": "nobody to swap with"}, "latent": {"probe": "no retain"}}
    store.note(run, "localization", "flu", None); store.note(run, "latent", "probe", None); store.note(run, "never", "x", None)
    assert store.notes(tmp_path) == {"localization": {"flu-path": "nobody to swap with"}}


def test_notes_of_processes_side_by_side_are_all_kept(tmp_path):
    import subprocess, sys
    code = "import sys; from mechunlearn.store import Run, note; [note(Run(sys.argv[1], 'm', 'r', 't', {}), 'relearning', f'{sys.argv[2]}-{k}', 'x') for k in range(20)]"
    ps = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)]) for n in range(3)]
    assert [p.wait(60) for p in ps] == [0, 0, 0] and len(store.notes(tmp_path)["relearning"]) == 60


@pytest.mark.parametrize("text", ["", "[]", "{", "\0\1"])
def test_damaged_notes_are_named_and_written_again(tmp_path, text):
    run = Run(tmp_path, "m", "r", "t", {})
    store.note(run, "latent", "probe", "no retain")
    (tmp_path / "notes/latent.json").write_text(text)
    with pytest.raises(Broken, match="latent.json"): store.notes(tmp_path)
    store.note(run, "latent", "probe", "no retain")
    assert store.notes(tmp_path) == {"latent": {"probe": "no retain"}}


def test_refusals_of_every_kind_are_known_by_name():
    assert {"Refusal", "Broken", "Unavailable", "EmptyFLU", "NoExtraction", "Missing"} <= set(runs.REFUSALS)
    source = "class A(Refusal):\n    pass\nclass B(store.A, Other): pass\nclass C(Exception): pass\nclass Refusal(Exception): pass"
    assert runs._named_below("Refusal", [source]) == ("A", "B", "Refusal")
    assert runs.explain("Unavailable", "no relation") == ("no relation", True) and issubclass(Unavailable, Refusal)


# ---- one damaged small file

@pytest.fixture
def two_runs(tmp_path):
    "A folder of two runs as a killed command leaves them"
    for model in "ab":
        job = Job(model=model, task="t", options={}, localizations=["flu"], seeds=[0], run_dir=str(tmp_path / model / "t"))
        run, part = Run(job.run_dir, model, "r", "t", {}), parts(job, False)[0]
        store.write_json(run.path("first_seed.json"), 0)
        store.save_json(run.path("localizations", "flu.json"), {"name": "flu", "sizes": [3], "components": []}, {})
        store.save_table(run.path("flu", "seed0", "training.parquet"), pd.DataFrame({"step": [0]}), {})
        store.note(run, "localization", "flu-probe", "no relation")
        store.write_json(part.dir / "job.json", part.model_dump(mode="json"))
        store.write_json(part.dir / "bar.json", [["edits", 1, 2]])
        (part.dir / "steps.jsonl").write_text(json.dumps({"stage": "finetuning", "number": 5, "of": 8, "start": 0, "state": "running", "seconds": 0}) + "\n")
    return tmp_path


def asked_in(run_dir): return progress.jobs_in(run_dir)[0][0]


def folder_instead(p): p.unlink(); (p / "more").mkdir(parents=True)


DAMAGE = {"empty": lambda p: p.write_bytes(b""), "truncated": lambda p: p.write_bytes(p.read_bytes()[:-3]), "binary": lambda p: p.write_bytes(bytes(range(256))),
          "list": lambda p: p.write_text("[1, 2]"), "null": lambda p: p.write_text("null"), "no keys": lambda p: p.write_text("{}"), "text": lambda p: p.write_text('"x"'),
          "deep": lambda p: p.write_text("["*10**5), "a folder": folder_instead}
KEPT = ["run.json", "first_seed.json", "jobs/all/job.json", "localizations/flu.json", "localizations/flu.json.meta.json", "flu/seed0/training.parquet",
        "flu/seed0/training.parquet.meta.json", "notes/localization.json"]
PASSING = ["jobs/all/steps.jsonl", "jobs/all/bar.json", "jobs/all/outcome.json"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", KEPT)
def test_a_damaged_file_is_named_and_mended_and_the_other_run_is_fine(two_runs, name, damage):
    file = two_runs / "a/t" / name
    DAMAGE[damage](file)
    table = progress.status(two_runs).set_index("run_dir")
    a, b = (table.loc[str(two_runs / m / "t")] for m in "ab")
    fine = (name, damage) in {("notes/localization.json", "no keys"), ("first_seed.json", "null")}
    assert a.damaged == ("" if fine else name.removesuffix(".meta.json")) and b.damaged == "" and b.stages == "0/8" and b.edits == 1
    assert asked_in(two_runs / "b/t").model == "b"
    progress.repair(two_runs / "a/t")
    assert progress.damaged(two_runs / "a/t") == [] and progress.damaged(two_runs / "b/t") == []
    Run(two_runs / "a/t", "a", "r", "t", {}); progress.keep_first_seed(two_runs / "a/t", 0)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", PASSING)
def test_what_a_part_says_may_be_damaged(two_runs, name, damage):
    job = asked_in(two_runs / "a/t"); part = parts(job, False)[0]
    file = two_runs / "a/t" / name
    file.write_text(file.read_text() if file.exists() else '{"state": "done"}')
    DAMAGE[damage](file)
    with progress.View(quiet=True) as view: view.update(part)
    with runs.lock(job.run_dir): assert progress.at_work(job.run_dir)
    assert progress.status(two_runs).damaged.tolist() == ["", ""]
    (part.dir / "log.txt").write_text("ValueError: x")
    assert name != "jobs/all/outcome.json" or runs.outcome(part, 1)["state"] == "failed"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_job_is_named(two_runs, damage):
    first, second = two_runs / "a/t/jobs/all/job.json", two_runs / "a/t/jobs/flu/job.json"
    second.parent.mkdir(); shutil.copy(first, second)
    DAMAGE[damage](first)
    assert asked_in(two_runs / "a/t").model == "a"
    with pytest.raises(Broken, match="job.json is broken"): runs.run_part(first)
    DAMAGE[damage](second)
    jobs, bad = progress.jobs_in(two_runs / "a/t")
    assert jobs == [] and [e.path for e in bad] == [first, second] and progress.jobs_in(two_runs) == ([], [])


def test_a_job_of_another_version_is_read(two_runs):
    file = two_runs / "a/t/jobs/all/job.json"
    told = json.loads(file.read_text()); told["job"] |= {"engine": "x"}; del told["job"]["attacks"], told["stages"]; file.write_text(json.dumps(told))
    assert asked_in(two_runs / "a/t").attacks == "standard" and progress.status(two_runs).damaged.tolist() == ["", ""]


def test_notes_are_part_of_what_an_executed_notebook_shows(two_runs):
    stage, job = grids.MAPS[3], asked_in(two_runs / "a/t")
    assert runs.artefacts(stage, job)["notes/localization.json: flu-probe"] == "no relation"
    shown = Path(job.run_dir) / "notebooks/13_localization.ipynb"
    store.save(shown, {}, lambda p: p.write_text("{}"))
    (Path(job.run_dir) / "notes/localization.json").write_text("{")
    progress.repair(job.run_dir)
    assert store.state(shown, {}) == "missing"


# ---- odd folders

def test_copies_beside_edits_are_no_edits(two_runs):
    root = two_runs / "a/t"
    for name in ("seed0.bak", "seedX", "seed", "seed-1", "seed01", "seed0 (copy)", "seed\u0663"): shutil.copytree(root / "flu/seed0", root / "flu" / name)
    (root / "flu/seed7").write_text("not a folder"); (root / "flu/seed8").mkdir()
    assert progress.edits_in(root) == [("flu", 0, root / "flu/seed0")] and progress.status(two_runs).edits.tolist() == [1, 1]


def test_links_in_a_circle_are_not_followed(two_runs):
    root = two_runs / "a/t"
    (root / "flu/loop").symlink_to(root); (root / "self").symlink_to(root / "self"); (two_runs / "up").symlink_to(two_runs); (root / "notes/gone.json").symlink_to("nowhere")
    assert len(progress.status(two_runs)) == 2 and progress.damaged(root) == [] and len(progress.edits_in(root)) == 1
    with runs.lock(root): pass


# ---- the working folder, the home, the disk

EVIL = ("yaml", "mechunlearn", "torch", "random", "pathlib", "fnmatch", "papermill", "tqdm", "ipykernel_launcher", "sitecustomize")


def stage_of(folder, code):
    from test_runs import notebook
    return notebook(folder / "only.ipynb", (code, None))


@pytest.fixture
def evil_folder(tmp_path, monkeypatch):
    "A working folder whose modules have the names of others"
    (tmp_path / "evil").mkdir(); monkeypatch.chdir(tmp_path / "evil")
    for name in EVIL: (tmp_path / "evil" / f"{name}.py").write_text(f"open({str(tmp_path / 'taken')!r}, 'a').write({name!r}); raise SystemExit('the wrong module')")
    return tmp_path


def test_workers_and_kernels_do_not_import_from_the_working_folder(evil_folder, monkeypatch):
    home = evil_folder / "home"
    for d in (home / ".ipython/profile_default/startup", home / "bin"): d.mkdir(parents=True)
    (home / ".ipython/profile_default/startup/00.py").write_text("raise SystemExit('a startup file')\n")
    (home / "start.py").write_text("raise SystemExit('a startup file')\n"); (home / "mine.py").write_text("found = 7")
    monkeypatch.setenv("HOME", str(home)); monkeypatch.setenv("PYTHONSTARTUP", str(home / "start.py"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(home), os.environ.get("PYTHONPATH", ""), ""]))
    stage = stage_of(evil_folder, """
import sys, os, yaml, torch, random, fnmatch, papermill, mechunlearn, mine
from mechunlearn.store import make
make(f'{run_dir}/only-0.json', {}, lambda: [sys.path, mine.found, os.getcwd(), __import__('matplotlib').get_configdir()])""")
    job = Job(model="m", run_dir=str(evil_folder / "out/m/t"))
    out = runs.run_batch([job], quiet=True, stages=(stage,))[0]
    assert out["state"] == "done", out
    path, found, cwd, config = json.loads((evil_folder / "out/m/t/only-0.json").read_text())
    assert "" not in path and cwd not in path and cwd == str(evil_folder / "evil") and found == 7 and not (evil_folder / "taken").exists()
    assert config.startswith(str(home)) and not (home / ".ipython/profile_default/history.sqlite").exists()


def test_a_working_folder_on_the_python_path_is_used(evil_folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(evil_folder / "evil"), os.environ.get("PYTHONPATH", "")]))
    for f in (evil_folder / "evil").iterdir(): f.unlink()
    (evil_folder / "evil/mine.py").write_text("found = 7")
    stage = stage_of(evil_folder, "import mine\nfrom mechunlearn.store import make\nmake(f'{run_dir}/only-0.json', {}, lambda: mine.found)")
    assert runs.run_batch([Job(model="m", run_dir="out/m/t")], quiet=True, stages=(stage,))[0]["state"] == "done"


@pytest.mark.parametrize("home", ["/dev/null/home", *(pytest.param(h, marks=pytest.mark.slow) for h in ("/proc/nowhere", "/sys"))])
def test_a_home_that_cannot_be_written_is_none_of_our_business(tmp_path, monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    for v in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR", "IPYTHONDIR"): monkeypatch.delenv(v, raising=False)
    stage = stage_of(tmp_path, "import matplotlib.pyplot as plt\nplt.plot([1]);\nfrom mechunlearn.store import make\nmake(f'{run_dir}/only-0.json', {}, lambda: 1)")
    job = Job(model="m", run_dir=str(tmp_path / "out/m/t"))
    assert runs.run_batch([job], quiet=True, stages=(stage,))[0]["state"] == "done"
    assert "not a writable" not in (tmp_path / "out/m/t/notebooks/only.ipynb").read_text()


@pytest.mark.parametrize("out", ["/proc/x", "/dev/null", "/dev/null/x/y", "/sys/x"])
def test_a_folder_that_cannot_be_written_is_refused_before_work(out):
    with pytest.raises(Refusal, match="cannot write to .*choose another --out"): runs.run_batch([Job(model="m", run_dir=out + "/m/t")], quiet=True)
    with pytest.raises(Refusal, match="cannot write to"), runs.lock(out): pass


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(tmp): raise OSError(28, "No space left on device")
    class Rust(Exception): pass
    def rust(tmp): raise Rust("I/O error: No space left on device (os error 28)")
    for write in (full, rust):
        with pytest.raises(OSError, match="edit.safetensors") as e: store.save(tmp_path / "edit.safetensors", {}, write)
        assert e.value.errno == 28 and e.value.filename == str(tmp_path / "edit.safetensors")
    said, refused = runs.explain("OSError", str(e.value))
    assert "the disk is full" in said and "edit.safetensors" in said and not refused
    stage = stage_of(tmp_path, "raise OSError(28, 'No space left on device', 'a.parquet')")
    with pytest.raises(runs.Failed, match="the disk is full .*a.parquet"): runs.execute(stage, Job(model="m", run_dir=str(tmp_path)), tmp_path / "nb")
    import papermill
    monkeypatch.setattr(papermill, "execute_notebook", lambda *a, **kw: full(None))
    with pytest.raises(runs.Failed, match="the disk is full .*only.ipynb"): runs.execute(stage, Job(model="m", run_dir=str(tmp_path)), tmp_path / "nb")


def test_a_killed_kernel_is_not_out_of_memory_unless_the_system_says_so(tmp_path, monkeypatch):
    stage = stage_of(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    go = lambda: runs.execute(stage, Job(model="m", run_dir=str(tmp_path)), tmp_path / "nb")
    with pytest.raises(runs.Failed, match="^the kernel died: it was killed"): go()
    kills = iter((3, 4)); monkeypatch.setattr(runs, "out_of_memory_kills", lambda: next(kills))
    with pytest.raises(runs.Failed, match="^out of memory .*--batch-size"): go()


def test_the_lock_leaves_temporaries_of_a_living_process(tmp_path):
    mine, dead = tmp_path / f".a.json.{os.getpid()}-ab.tmp", tmp_path / ".a.json.99999999-ab.tmp"
    mine.write_text(""); dead.write_text("")
    with runs.lock(tmp_path): assert mine.exists() and not dead.exists()
    os.utime(mine, (0, 0)) # older than the process: of another one with this number
    with runs.lock(tmp_path): assert not mine.exists()


# ---- values

BAD = [{"lr": x} for x in (-1, 0, float("nan"), float("inf"), True, "fast", [1e-3], 2)] + [
    {"noise": float("nan")}, {"noise": float("inf")}, {"noise": -1}, {"noise": 0}, {"clip": 0}, {"clip": float("nan")}, {"inject": -1}, {"inject": float("inf")},
    {"max_facts": {"retian": 3}}, {"max_facts": {"retain": -1}}, {"max_facts": {"retain/mqc": 3}}, {"max_facts": {"retain": True}}, {"max_facts": 3}, {"max_facts": {"": 3}},
    {"device": "gpu"}, {"device": "cuda:-1"}, {"device": "cuda:x"}, {"device": ""}, {"device_map": "disk"}, {"device_map": {"": "cpu"}}, {"dtype": "int8"}, {"quantize": "2bit"},
    {"draws": 0}, {"draws": 10**9}, {"draws": True}, {"steps": 10**30}, {"steps": 1.5}, {"steps": True}, {"batch_size": 0}, {"budget": -3}, {"budget": 2**70},
    {"relearning": {"lora": {"lr": 0}}}, {"relearning": {"lora": {"dropout": 1}}}, {"relearning": {"lora": {"rank": -1}}}, {"relearning": {"lora": 3}},
    {"relearning": {"grid": {"lrs": [1e-3, float("nan")]}}}, {"relearning": {"grid": {"ranks": []}}}, {"relearning": {"grid": {"steps": [0]}}}, {"relearning": {"grid": {"seeds": [-1]}}},
    {"relearning": {"max_facts": 0}}, {"soft": {"ks": [0]}}, {"soft": {"ks": []}}, {"hardened": {"shots": [-1]}}, {"generation": {"more": -1}}, {"capabilities": {"limit": 0}}, {"capabilities": []}, {1: 2}]


@pytest.mark.parametrize("bad", BAD, ids=repr)
def test_a_value_out_of_bounds_is_refused_whichever_way_it_comes(tmp_path, bad):
    import yaml
    ways = [lambda: grids.parse(grids.Settings, bad, "settings"), lambda: grids.make_job("organism", "sports-athlete-editing", {}, ["late"], [0], bad, tmp_path),
            lambda: grids.check_job(Job(model="organism", localizations=["late"], settings=bad, run_dir=str(tmp_path)))]
    (tmp_path / "g.yaml").write_text(yaml.safe_dump({"models": ["organism"], "localizations": ["late"], "settings": bad}))
    for way in (*ways, lambda: grids.grid(tmp_path / "g.yaml")):
        with pytest.raises(Refusal) as e: way()
        assert "\n" not in str(e.value) and len(str(e.value)) < 700


def test_groups_and_forms_are_those_of_evaluations():
    from mechunlearn.evaluation import FORMATS, HELD_OUT, MAX_FACTS, OPEN
    assert set(grids.GROUPS) == {*FORMATS, *HELD_OUT} and set(grids.ASKED) == {f for d in (FORMATS, HELD_OUT, OPEN) for forms in d.values() for f in forms}
    assert grids.parse(grids.Settings, {"max_facts": MAX_FACTS}, "settings").max_facts == MAX_FACTS


@pytest.mark.parametrize("seeds", [[-1], [2**32], [10**23], [], list(range(1001))])
def test_seeds_have_bounds(tmp_path, seeds):
    with pytest.raises(Refusal, match="seeds") as e: grids.check_job(Job(model="organism", localizations=["late"], seeds=seeds, run_dir=str(tmp_path)))
    assert len(str(e.value)) < 200
    import numpy as np, torch
    np.random.RandomState(grids.MAX_SEED); torch.manual_seed(grids.MAX_SEED)
    with pytest.raises(ValueError): np.random.RandomState(grids.MAX_SEED + 1)


@pytest.mark.parametrize("device", ["cuda:99", "xpu", "mps"])
def test_a_device_that_is_not_there_is_refused(tmp_path, device):
    for key in ("device", "device_map"):
        with pytest.raises(Refusal, match=f"{device} is not there"): grids.check_job(Job(model="organism", localizations=["late"], settings={key: device}, run_dir=str(tmp_path)))


GRID = {"models": ["organism"], "localizations": ["late"]}


@pytest.mark.parametrize("more", [
    {"lrs": [-1.]}, {"lrs": [0]}, {"lrs": [float("nan")]}, {"lrs": [float("inf")]}, {"lrs": []}, {"lrs": [True]}, {"seeds": [10**23]}, {"seeds": [-1]}, {"seeds": [True]}, {"seeds": [1.5]}, {"seeds": []},
    {"seeds": list(range(2000))}, {"draws": 10**9}, {"draws": True}, {"out": "a\0b"}, {"models": [3]}, {"models": "organism"}, {"tasks": []}, {"tasks": [3]}, {"keep_edits": 7},
    {"tasks": [{"name": "sports-athlete-editing", "forget_size": []}]}, {"tasks": [{"name": "sports-athlete-editing", "forget_size": [[16]]}]}, {"tasks": [{"name": ["sports-athlete-editing"]}]},
    {"tasks": [{"name": "sports-athlete-editing", "localizations": []}]}, {"tasks": [{"name": "sports-athlete-editing", "seeds": []}]}, {"tasks": [{"name": "sports-athlete-editing", "draws": 10**9}]},
    {"tasks": [{"name": "sports-athlete-editing", "forget_size": list(range(1, 3000)), "inject": ["other", "golf"]*20}]}, {"tasks": [{"name": "../../x"}]},
    {"models": ["organism"]*200, "lrs": [k/1e4 for k in range(1, 200)]}], ids=lambda m: repr(m)[:60])
def test_a_grid_out_of_bounds_is_refused(tmp_path, more):
    import yaml
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(GRID | more))
    with pytest.raises(Refusal) as e: grids.grid(tmp_path / "g.yaml")
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_the_same_job_twice_is_one_and_near_rates_are_two(tmp_path):
    (tmp_path / "g.yaml").write_text("models: [organism, organism]\nlocalizations: [late]\nlrs: [0.001, 1e-3, 0.00100000001]\ntasks: [{name: sports-athlete-editing, forget_size: [16, 16]}]")
    jobs = grids.grid(tmp_path / "g.yaml")
    assert [j.settings["lr"] for j in jobs] == [.001, .00100000001] and len({j.run_dir for j in jobs}) == 2


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a]*10)}]\n" for a, b in zip("abcdefgh", "bcdefghi")) + "models: *i\nlocalizations: [late]"
FINE = "models: [organism]\nlocalizations: [late]\n"


@pytest.mark.parametrize("data,message", [
    (FINE.encode("utf-16")[:-1], "UTF-8"), ("models: [organism] # caf\xe9\nlocalizations: [late]".encode("latin-1"), "UTF-8"), (bytes(range(256)), "UTF-8"), (b"\x7fELF\0\0\0", "not YAML"),
    (b"models: [organism]\0\n", "not YAML"), (b"[" * 10**5, "nested too deeply"), (b"a: " + b"{b: " * 5000, "nested too deeply"), (BOMB.encode(), "unfolds into"),
    (b"models: &a [*a]\nlocalizations: [late]", "unfolds into"), (b"models:\n\t- organism", "not YAML"), (b"x" * 2 * 10**6, "too large"), (b"models: [organism]\nmodels: [organism-late]\nlocalizations: [late]", "models stands there twice"),
    (b"models: !!python/object/apply:os.system [ls]\nlocalizations: [late]", "not YAML"), (b"models: [organism]\nlocalizations: [late]\nseeds: [2024-99-99]", "not YAML"), (b"{[a]: 3}", "not YAML"),
    (b"models: [organism]\nlocalizations: [late]\nseeds: [" + b"9" * 9000 + b"]", "not YAML"), (b"", "dictionary"), (b"---\n---\n", "not YAML"), (b"%YAML 9\n", "not YAML"), (b"x: !!int y", "not YAML"), (b"x: !!bool y", "not YAML")],
    ids=range(21))
def test_a_grid_file_may_be_anything(tmp_path, data, message):
    (tmp_path / "g.yaml").write_bytes(data)
    with pytest.raises(Refusal, match="g.yaml") as e: grids.grid(tmp_path / "g.yaml")
    assert message in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 500


def test_a_grid_in_another_encoding_with_a_mark_or_with_anchors_is_fine(tmp_path):
    for data in (FINE.encode("utf-16"), FINE.encode("utf-8-sig"), FINE.replace("\n", "\r\n").encode(), b"localizations: &l [late]\nmodels: [organism]\ntasks: [{name: sports-athlete-editing, localizations: *l}]"):
        (tmp_path / "g.yaml").write_bytes(data)
        assert grids.grid(tmp_path / "g.yaml")[0].localizations == ["late"]
    for odd in (tmp_path, tmp_path / "none.yaml", tmp_path / "g.yaml" / "x"):
        with pytest.raises(Refusal, match="cannot read the grid"): grids.grid(odd)


# ---- names

@pytest.mark.parametrize("name", ["edited@../..", "edited@/tmp/x", "hand@mlp.1/../../x", "../late", "..", "late\n", "late\0", "hand@" + "+".join(f"mlp.{k}" for k in range(100)), ""])
def test_names_stay_in_their_folder(tmp_path, name):
    with pytest.raises(Refusal) as e: grids.check_job(Job(model="organism", localizations=[name], settings={"edited": "."}, run_dir=str(tmp_path / "r")))
    assert "\n" not in str(e.value)
    with pytest.raises(Refusal): Run(tmp_path / "r", "m", "r", "t", {}).edit_dir(name, 0)
    with pytest.raises(Refusal): Part(job=Job(model="m", run_dir="r"), label=name, stages=()).dir
    assert sorted(p.name for p in tmp_path.rglob("*")) in ([], ["r", "run.json"])


@pytest.mark.parametrize("options", [{"facts": "../../etc/passwd"}, {"facts": ".."}, {"sport": "../x"}, {"inject": "a/b"}, {"facts": "x" * 300}, {"text": "/"}, {"facts": "a\nb"}])
@pytest.mark.parametrize("model", ["..", "../..", "/", "a/..", "organism", "."])
def test_a_run_folder_is_two_below_out(tmp_path, options, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Path(folder := grids.folder(tmp_path / "out", model, "sports-athlete-editing", options)).relative_to(tmp_path / "out")
    assert len(made.parts) == 2 and ".." not in made.parts and folder.isprintable()
    Path(folder).mkdir(parents=True); assert Path(folder).resolve().is_relative_to(tmp_path / "out")


# ---- off a terminal

def test_a_long_stage_says_how_far_it_is(two_runs, monkeypatch, capsys):
    part = parts(asked_in(two_runs / "a/t"), False)[0]
    now = iter(range(1000, 10000, 20)) # every look is 20 s after the one before
    monkeypatch.setattr(runs.time, "time", lambda: next(now))
    (part.dir / "steps.jsonl").write_text(json.dumps({"stage": "probing", "number": 1, "of": 8, "start": 900, "state": "done", "seconds": 30}) + "\n" +
                                          json.dumps({"stage": "finetuning", "number": 5, "of": 8, "start": 1000, "state": "running", "seconds": 0}) + "\n")
    view = progress.View()
    for n in range(10): store.write_json(part.dir / "bar.json", [["edits", n // 5, 2], ["steps", n % 5, 5], ["", 3, None]]); view.update(part)
    said = capsys.readouterr().err.splitlines()
    assert said == ["a/t  1/8 probing: 30 s", "a/t  5/8 finetuning: steps 3/5, about 2 min left", "a/t  5/8 finetuning: steps 1/5, about 80 s left", "a/t  5/8 finetuning: steps 4/5, about 20 s left"]
    (part.dir / "bar.json").unlink(); view.update(part); view.update(part); view.update(part)
    assert capsys.readouterr().err.splitlines() == ["a/t  5/8 finetuning: 4 min so far"]
    quiet = progress.View(quiet=True); quiet.every = 0
    for _ in range(5): quiet.update(part)
    assert capsys.readouterr().err == ""


def test_a_real_part_off_a_terminal(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(progress.View, "every", .5)
    stage = stage_of(tmp_path, "import time\nfrom tqdm.auto import tqdm\nfrom mechunlearn.store import make\nfor k in tqdm(range(4), 'edits'): time.sleep(.8)\nmake(f'{run_dir}/only-0.json', {}, lambda: 1)")
    assert runs.run_batch([Job(model="m", run_dir=str(tmp_path / "out/m/t"))], stages=(stage,))[0]["state"] == "done"
    said = capfd.readouterr().err.splitlines()
    assert any("m/t  1/1 only: edits " in l and "/4, about" in l and l.endswith("s left") for l in said) and len(said) < 20 and said[-1].startswith("m/t  1/1 only: ")


# ---- by hand

@pytest.mark.slow
def test_a_stage_by_hand_from_another_folder(tmp_path, monkeypatch):
    "The line in 40, as it stands there"
    import nbformat, shlex, subprocess, sys
    text = "\n".join(c.source for c in nbformat.read(Path(__file__).parents[1] / "nbs/40_runs.ipynb", 4).cells if c.cell_type == "markdown")
    line = next(l for l in text.splitlines() if l.startswith("papermill path/to/nbs")).replace("path/to/nbs/10_probing.ipynb", str(grids.find_notebook(grids.PIPELINE[0])))
    monkeypatch.chdir(tmp_path)
    done = subprocess.run([sys.executable, "-P", "-m", *shlex.split(line), "-p", "run_dir", "r", "--no-progress-bar"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(store.load_table("r/scores/probing.parquet")) and "injected-parameters" in Path("probing.ipynb").read_text()


def test_a_cache_that_cannot_be_written_or_read_does_not_matter(tmp_path):
    for path in ("/proc/no/known/a.json", "/dev/null/a.json"): assert store.make(path, {}, lambda: [1], optional=True) == [1]
    with pytest.raises(OSError, match="/proc/no"): store.make("/proc/no/known/a.json", {}, lambda: [1])
    kept = tmp_path / "a.json"
    store.make(kept, {}, lambda: [1]); kept.write_text("x")
    assert store.make(kept, {}, lambda: [2], optional=True) == [2] and store.load_json(kept) == [2]


def test_a_kernel_that_does_not_come_up_is_asked_again():
    from mechunlearn.runs import _with_kernel
    calls = []
    def run():
        calls.append(1)
        if len(calls) < 3: raise RuntimeError("Kernel died before replying to kernel_info")
        return "done"
    assert _with_kernel(run) == "done" and len(calls) == 3
    def never(): calls.append(1); raise RuntimeError("Kernel died before replying to kernel_info")
    calls.clear()
    with pytest.raises(RuntimeError): _with_kernel(never)
    assert len(calls) == 3
    def other(): calls.append(1); raise RuntimeError("something else")
    calls.clear()
    with pytest.raises(RuntimeError): _with_kernel(other)
    assert len(calls) == 1
