"Damaged, hostile and odd inputs: each is one clear line, and nobody else's run suffers"
import json, os, shutil
from pathlib import Path

import pandas as pd, pytest

from mechunlearn import runs, store
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
    table = runs.status(two_runs).set_index("run_dir")
    a, b = (table.loc[str(two_runs / m / "t")] for m in "ab")
    fine = (name, damage) in {("notes/localization.json", "no keys"), ("first_seed.json", "null")}
    assert a.damaged == ("" if fine else name.removesuffix(".meta.json")) and b.damaged == "" and b.stages == "0/8" and b.edits == 1
    assert runs.asked_in(two_runs / "b/t").model == "b"
    runs.repair(two_runs / "a/t")
    assert runs.damaged(two_runs / "a/t") == [] and runs.damaged(two_runs / "b/t") == []
    Run(two_runs / "a/t", "a", "r", "t", {}); runs._keep_first_seed(Job(model="a", run_dir=str(two_runs / "a/t")))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", PASSING)
def test_what_a_part_says_may_be_damaged(two_runs, name, damage):
    job = runs.asked_in(two_runs / "a/t"); part = parts(job, False)[0]
    file = two_runs / "a/t" / name
    file.write_text(file.read_text() if file.exists() else '{"state": "done"}')
    DAMAGE[damage](file)
    with runs.View(quiet=True) as view: view.update(part)
    with runs.lock(job.run_dir): assert runs.at_work(job.run_dir)
    assert runs.status(two_runs).damaged.tolist() == ["", ""]
    (part.dir / "log.txt").write_text("ValueError: x")
    assert name != "jobs/all/outcome.json" or runs.outcome(part, 1)["state"] == "failed"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_job_is_named(two_runs, damage):
    first, second = two_runs / "a/t/jobs/all/job.json", two_runs / "a/t/jobs/flu/job.json"
    second.parent.mkdir(); shutil.copy(first, second)
    DAMAGE[damage](first)
    assert runs.asked_in(two_runs / "a/t").model == "a"
    with pytest.raises(Broken, match="job.json is broken"): runs.run_part(first)
    DAMAGE[damage](second)
    with pytest.raises(Broken, match="job.json is broken"): runs.asked_in(two_runs / "a/t")
    assert runs.asked_in(two_runs) is None


def test_a_job_of_another_version_is_read(two_runs):
    file = two_runs / "a/t/jobs/all/job.json"
    told = json.loads(file.read_text()); told["job"] |= {"engine": "x"}; del told["job"]["attacks"], told["stages"]; file.write_text(json.dumps(told))
    assert runs.asked_in(two_runs / "a/t").attacks == "standard" and runs.status(two_runs).damaged.tolist() == ["", ""]


def test_notes_are_part_of_what_an_executed_notebook_shows(two_runs):
    stage, job = runs.MAPS[3], runs.asked_in(two_runs / "a/t")
    assert runs.artefacts(stage, job)["notes/localization.json: flu-probe"] == "no relation"
    shown = Path(job.run_dir) / "notebooks/13_localization.ipynb"
    store.save(shown, {}, lambda p: p.write_text("{}"))
    (Path(job.run_dir) / "notes/localization.json").write_text("{")
    runs.repair(job.run_dir)
    assert store.state(shown, {}) == "missing"


# ---- odd folders

def test_copies_beside_edits_are_no_edits(two_runs):
    root = two_runs / "a/t"
    for name in ("seed0.bak", "seedX", "seed", "seed-1", "seed01", "seed0 (copy)", "seed\u0663"): shutil.copytree(root / "flu/seed0", root / "flu" / name)
    (root / "flu/seed7").write_text("not a folder"); (root / "flu/seed8").mkdir()
    assert runs.edits_in(root) == [("flu", 0, root / "flu/seed0")] and runs.status(two_runs).edits.tolist() == [1, 1]


def test_links_in_a_circle_are_not_followed(two_runs):
    root = two_runs / "a/t"
    (root / "flu/loop").symlink_to(root); (root / "self").symlink_to(root / "self"); (two_runs / "up").symlink_to(two_runs); (root / "notes/gone.json").symlink_to("nowhere")
    assert len(runs.status(two_runs)) == 2 and runs.damaged(root) == [] and len(runs.edits_in(root)) == 1
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


@pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null/home", "/sys"])
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
