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
