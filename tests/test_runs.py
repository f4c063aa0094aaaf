"The pipeline's machinery on small fake stages, and the real one killed at random moments"
import builtins, importlib, inspect, json, os, random, re, signal, subprocess, symtable, sys, textwrap, time
from pathlib import Path

import nbformat, psutil, pytest, yaml

from mechunlearn import grids, progress, runs, store
from mechunlearn.runs import PIPELINE, STANDARD, Failed, Job, Part, Settings, Stage, estimate, explain, folder, grid, lock, parts, repair, run_batch, run_job, status
from mechunlearn.store import Refusal


# ---- fake stages

def notebook(path, *cells):
    "A notebook of (source, tag) cells with the parameters of every stage"
    given = "\n".join(f"{k} = {v!r}" for k, v in Job(model="m", run_dir="x").parameters.items())
    made = [nbformat.v4.new_code_cell(s, metadata={"tags": [t] if t else []}) for s, t in [(given, "parameters"), *cells]]
    meta = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=meta), path)
    return Stage(Path(path).stem, str(path), (f"{Path(path).stem}-{{seed}}.json",))


@pytest.fixture
def two(tmp_path):
    "Two cheap stages; each call of the second one's work is counted in a file"
    one = notebook(tmp_path / "one.ipynb", ("raise SystemError('a lesson was executed')", "lesson"),
        ("from mechunlearn.store import make\nfor s in seeds: make(f'{run_dir}/one-{s}.json', {'seed': s}, lambda: s)", None))
    work = f"""
        from pathlib import Path
        from tqdm.auto import tqdm
        def work(s):
            with open({str(tmp_path / "count")!r}, "a") as f: f.write(f"{{s}} ")
            return [model, s]
        for s in tqdm(seeds, "two"): make(f"{{run_dir}}/two-{{s}}.json", {{"seed": s, "model": model}}, lambda: work(s))"""
    return one, notebook(tmp_path / "two.ipynb", ("from mechunlearn.store import make, Refusal", None), (textwrap.dedent(work), None))


def job(tmp_path, **kw): return Job(**{"model": "m", "run_dir": str(tmp_path / "out/m/t"), **kw})


def states(made): return [m["state"] for m in made]


# ---- one job

def test_stages_run_once_and_notice_every_change(two, tmp_path):
    j, out, count = job(tmp_path, seeds=[0, 1]), tmp_path / "out/m/t", tmp_path / "count"
    assert states(run_job(j, two)) == ["done", "done"] and count.read_text() == "0 1 "
    shown = nbformat.read(out / "notebooks/two.ipynb", 4)
    assert "seeds = [0, 1]" in next(c.source for c in shown.cells if "injected-parameters" in c.metadata.tags)
    assert "lesson" not in str(nbformat.read(out / "notebooks/one.ipynb", 4))
    assert states(run_job(j, two)) == ["skipped", "skipped"]
    assert states(run_job(j.model_copy(update={"seeds": [0, 1, 2]}), two)) == ["done", "done"] and count.read_text() == "0 1 2 "
    assert states(run_job(j.model_copy(update={"seeds": [0, 1, 2]}), two)) == ["skipped", "skipped"]
    j = j.model_copy(update={"seeds": [0, 1, 2]})

    (out / "two-1.json").unlink()
    assert states(run_job(j, two)) == ["skipped", "done"] and count.read_text() == "0 1 2 1 "
    executed = out / "notebooks/one.ipynb"; executed.write_bytes(executed.read_bytes()[:100])
    assert states(run_job(j, two)) == ["done", "skipped"]
    (out / "two-1.json").write_text("[]")
    with pytest.raises(Failed, match="two-1.json is broken") as e: run_job(j, two)
    assert e.value.refused and "--recompute" in str(e.value)
    assert [p.name for p in repair(out)] == ["two-1.json"] and states(run_job(j, two)) == ["skipped", "done"]
    assert json.loads((out / "two-1.json").read_text()) == ["m", 1] and not list(out.glob("notebooks/*.failed.ipynb"))


def test_an_error_in_a_kernel_is_one_line_and_its_notebook_stays(two, tmp_path):
    bad = notebook(tmp_path / "bad.ipynb", ("def f(): return {}['layer']\nf()", None), ("open('never', 'w')", None))
    with pytest.raises(Failed) as e: run_job(job(tmp_path), (bad,))
    assert str(e.value) == "KeyError: 'layer'" and not e.value.refused
    assert e.value.notebook.name == "bad.failed.ipynb" and "return {}['layer']" in e.value.notebook.read_text()
    assert not (tmp_path / "out/m/t/notebooks/bad.ipynb").exists()


def test_a_notebook_without_the_parameters_is_refused(tmp_path):
    stage = notebook(tmp_path / "s.ipynb", ("1", None))
    nb = nbformat.read(stage.notebook, 4)
    nb.cells[0].source = nb.cells[0].source.replace("settings =", "setings ="); nbformat.write(nb, stage.notebook)
    with pytest.raises(Refusal, match="no parameter settings"): run_job(job(tmp_path), (stage,))


@pytest.mark.parametrize("name,text,line,refused", [
    ("Refusal", "unknown task 'x'", "unknown task 'x'", True), ("Broken", "a.json is broken: ...", "a.json is broken: ...", True),
    ("OutOfMemoryError", "CUDA out of memory. Tried 2 GiB\nmore", "--batch-size", False),
    ("RuntimeError", "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory", "--batch-size", False),
    ("DeadKernelError", "Kernel died", "the kernel died", False), ("ValueError", "", "ValueError: ", False)])
def test_errors_are_explained_in_one_line(name, text, line, refused):
    said, is_refusal = explain(name, text)
    assert line in said and "\n" not in said and is_refusal == refused


def test_every_refusal_is_known():
    "A kernel hands over the name of an error's class, not the class"
    for stage in PIPELINE: importlib.import_module(f"mechunlearn.{stage.name}")
    below = lambda c: {c.__name__} | {n for s in c.__subclasses__() for n in below(s)}
    assert below(Refusal) <= set(runs.REFUSALS)


def test_relay_writes_where_bars_are(tmp_path):
    code = f"""
        from mechunlearn.runs import relay, read_json; relay({str(tmp_path / "bar.json")!r})
        from tqdm.auto import tqdm
        import time
        for a in tqdm(range(3), "outer", disable=None):
            time.sleep(.6)
            for b in tqdm(range(50), desc="inner: ", disable=None, mininterval=0): seen = read_json({str(tmp_path / "bar.json")!r})
        print(seen)"""
    p = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert p.stdout.strip() == "[['outer', 2, 3], ['inner', 0, 50]]" and not p.stderr


# ---- batches

def test_a_failing_job_leaves_the_others_alone(two, tmp_path, capfd):
    sick = notebook(tmp_path / "sick.ipynb", ("if model == 'b': raise ValueError('no such layer')", None))
    jobs = [job(tmp_path, model=m, run_dir=str(tmp_path / f"out/{m}/t")) for m in "ab"]
    a, b = run_batch(jobs, 2, stages=(*two, sick))
    assert a["state"] == "done" and (b["state"], b["why"]) == ("failed", "ValueError: no such layer") and Path(b["notebook"]).exists()
    assert a["threads"] == max(1, len(os.sched_getaffinity(0))//2) and (tmp_path / "out/b/t/two-0.json").exists()
    meta = store.read_meta(tmp_path / "out/a/t/two-0.json")
    assert meta["provenance"]["threads"] == a["threads"]
    said = capfd.readouterr()
    lines = [l.split(":")[0] for l in said.err.splitlines()]
    assert sorted(lines) == ["a/t  1/3 one", "a/t  2/3 two", "a/t  3/3 sick", "b/t  1/3 one", "b/t  2/3 two", "b/t  failed"]
    assert said.out == "" and "\x1b" not in said.err
    table = status(tmp_path / "out").set_index("run_dir")
    assert table.failed.tolist() == ["", "sick"]


def test_the_same_folder_twice_is_refused(tmp_path):
    with pytest.raises(Refusal, match="two jobs have the folder"): run_batch([job(tmp_path), job(tmp_path, seeds=[1])])


def test_a_second_command_in_the_folder_is_refused(tmp_path):
    with lock(tmp_path):
        p = subprocess.run([sys.executable, "-c", f"from mechunlearn.runs import lock\nwith lock({str(tmp_path)!r}): pass"], capture_output=True, text=True)
    assert "Refusal: another command is at work" in p.stderr
    with lock(tmp_path): pass


def test_seeds_can_be_added_but_the_first_stays(two, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_schedule", lambda todo, workers, view: {(p.job.run_dir, p.label): {"state": "done"} for p in todo})
    for seeds in ([0], [0, 1]): assert run_batch([job(tmp_path, seeds=seeds)], stages=two)[0]["state"] == "done"
    with pytest.raises(Refusal, match="--seeds 0,1"): run_batch([job(tmp_path, seeds=[1])], stages=two)


def test_lock_removes_what_a_kill_left(tmp_path):
    (tmp_path / "flu").mkdir(); (tmp_path / "flu/.edit.safetensors.99999999-ab.tmp").write_text("x"); (tmp_path / "flu/edit.safetensors").write_text("x")
    with lock(tmp_path): assert [p.name for p in (tmp_path / "flu").iterdir()] == ["edit.safetensors"]


def test_parts_cover_everything_once_and_never_share_an_artefact():
    j = Job(model="m", localizations=["flu", "random-mlps", "late"], run_dir="r")
    assert [p.label for p in parts(j, False)] == ["all"] == [p.label for p in parts(j.model_copy(update={"localizations": ["flu"]}), True)]
    made = {p.label: p for p in parts(j, True)}
    assert list(made) == ["maps", "none", "flu", "random-mlps", "late", "all"] and made["all"].stages == STANDARD
    for l in j.localizations:
        assert made[l].job.localizations == [l] and set(made[l].after) == {"maps", "none"} and not set(made[l].stages) & set(grids.MAPS)
    assert set(made["all"].after) == set(made) - {"all"}
    assert Part.model_validate_json(made["flu"].model_dump_json()) == made["flu"]


def test_what_an_edit_goes_through():
    stages = lambda **kw: [s.name for s in Job(model="m", run_dir="r", **kw).stages][8:]
    assert stages() == [] and stages(attacks="all") == ["softprompts", "attacks"]
    assert stages(settings={"capabilities": {"names": ["sciq"]}}) == ["capability"] and stages(attacks="all", settings={"capabilities": {}})[-1] == "capability"


def test_benchmarks_are_refused_before_anything_is_trained(tmp_path, monkeypatch):
    asks = job(tmp_path, model="organism", localizations=["late"], settings={"capabilities": {"names": ["sciq"]}})
    monkeypatch.setattr(grids, "find_spec", lambda name: None)
    with pytest.raises(Refusal, match=r"pip install mechunlearn\[capability\]"): grids.check_job(asks)
    grids.check_job(asks.model_copy(update={"settings": {"capabilities": {"texts": "pile.txt"}}}))


def test_a_part_waits_and_is_not_run_when_what_it_needs_failed(tmp_path, monkeypatch):
    order = []
    class Fake:
        returncode = 0
        def poll(self): return 0
    monkeypatch.setattr(runs, "start", lambda p, slot, n: order.append((p.label, slot)) or Fake())
    monkeypatch.setattr(runs, "outcome", lambda p, code: {"state": "failed" if p.label == "late" else "done", "why": "late died"})
    j = job(tmp_path, localizations=["flu", "late"])
    out = run_batch([j], 3, quiet=True)
    assert [l for l, _ in order[:2]] == ["maps", "none"] and {l for l, _ in order[2:]} == {"flu", "late"}
    assert out[0]["state"] == "failed" and out[0]["why"] == "late died"


def test_each_worker_has_a_gpu(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(runs.subprocess, "Popen", lambda cmd, env, **kw: seen.append(env.get("CUDA_VISIBLE_DEVICES")))
    for slot, workers in ((0, 3), (1, 3), (2, 3), (0, 1)): runs.start(parts(job(tmp_path), False)[0], slot, workers)
    assert seen == ["3", "5", "3", "3,5"]


def test_a_process_that_dies_without_a_word_is_reported(tmp_path):
    part = parts(job(tmp_path), False)[0]
    part.dir.mkdir(parents=True); (part.dir / "log.txt").write_text("first\nImportError: no torch\n")
    assert runs.outcome(part, 1)["why"] == "ImportError: no torch" and "signal 9 (by somebody" in runs.outcome(part, -9)["why"]


def test_edits_go_and_records_stay(tmp_path):
    one = job(tmp_path).model_copy(update={"localizations": ["late"], "seeds": [0]})
    here = Path(one.run_dir)/"flu/seed0"; here.mkdir(parents=True)
    for name in ("edit.safetensors", "edit.safetensors.meta.json", "training.parquet", "evaluation.parquet"): (here/name).write_text("1234")
    left = lambda: sorted(p.name for p in here.iterdir())
    assert runs.drop_edits(one) == 0
    one = one.model_copy(update={"localizations": ["flu"]})
    assert runs.drop_edits(one) == 4 and left() == ["evaluation.parquet", "training.parquet"]
    runs.want_edits(one)
    assert left() == ["evaluation.parquet"]


def test_a_refused_localization_does_not_stop_the_others(tmp_path, monkeypatch):
    states = {"flu": "refused"}
    monkeypatch.setattr(runs, "start", lambda part, slot, workers: type("P", (), {"poll": lambda self: 0, "returncode": 0})())
    monkeypatch.setattr(runs, "outcome", lambda part, code: {"state": states.get(part.label, "done"), "why": part.label})
    todo = parts(job(tmp_path).model_copy(update={"localizations": ["flu", "late"]}), True)
    end = lambda: {label: out["state"] for (_, label), out in runs._schedule(todo, 2, progress.View(quiet=True)).items()}
    assert end() == {"maps": "done", "none": "done", "flu": "refused", "late": "done", "all": "done"}
    states["flu"] = "failed"; assert end()["all"] == "failed"
    states["none"] = "refused"; assert end()["late"] == "refused"


# ---- killed, and continued

def command(tmp_path, stages, *argv):
    "A script that is `mechunlearn`, with fake stages"
    script = tmp_path / "command.py"
    script.write_text(textwrap.dedent(f"""
        import sys
        from mechunlearn import cli, grids, options
        grids.STANDARD = tuple(grids.Stage(*s) for s in {[tuple(s) for s in stages]!r})
        options.ready, cli.show_run = lambda job, args: None, lambda folder, args: print("finished", folder)
        sys.exit(cli.main(sys.argv[1:]))"""))
    return [sys.executable, str(script), "run", "--model", "m", "--forget-size", "1", "--out", str(tmp_path / "out"), *argv]


@pytest.fixture
def here(monkeypatch, tmp_path, capfd):
    "Function: the same command in this process; what it says"
    from mechunlearn import cli, options
    def go(stages, *argv):
        for module in (grids, runs): monkeypatch.setattr(module, "STANDARD", tuple(stages))
        monkeypatch.setattr(options, "ready", lambda job, args: None); monkeypatch.setattr(cli, "show_run", lambda folder, args: print("finished", folder))
        capfd.readouterr()
        assert cli.main(command(tmp_path, stages, *argv)[2:]) == 0
        return capfd.readouterr()
    return go


@pytest.fixture
def steps(tmp_path):
    "One stage that makes a file a seed, 0.3 s each"
    code = f"""
        import time, os
        from mechunlearn.store import make
        def work(s):
            time.sleep(.3)
            with open({str(tmp_path / "count")!r}, "a") as f: f.write(f"{{s}} ")
            return s*s
        for s in seeds: make(f"{{run_dir}}/steps-{{s}}.json", {{"seed": s}}, lambda: work(s))"""
    return (notebook(tmp_path / "steps.ipynb", (textwrap.dedent(code), None)),)


def wait_for(test, seconds=120):
    end = time.time() + seconds
    while not test():
        assert time.time() < end, "waited too long"
        time.sleep(.05)


def descendants(pid): return psutil.Process(pid).children(recursive=True)


def as_in_a_terminal(): signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it


@pytest.mark.parametrize("sig,code", [(signal.SIGINT, 130), pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow)])
def test_stopped_run_leaves_no_process_and_goes_on(steps, tmp_path, here, sig, code):
    seeds = ["--seeds", "0,1,2,3,4"]
    p = subprocess.Popen(command(tmp_path, steps, *seeds), stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal)
    wait_for(lambda: (tmp_path / "count").exists())
    alive = descendants(p.pid)
    assert status(tmp_path / "out").now.tolist() == ["all: steps"]
    assert len(alive) >= 2
    p.send_signal(sig)
    assert p.wait(60) == code
    err = p.stderr.read(); p.stderr.close()
    assert "Traceback" not in err and (sig == signal.SIGKILL or err.splitlines()[-1] == "mechunlearn: stopped; the same command goes on from here")
    gone, still = psutil.wait_procs(alive, 30)
    assert not still
    assert "finished" in here(steps, *seeds).out
    counts = (tmp_path / "count").read_text().split()
    assert sorted(set(counts)) == list("01234") and len(counts) <= 6
    if sig == signal.SIGKILL: return
    assert "was done before" in here(steps, *seeds).err and (tmp_path / "count").read_text().split() == counts


@pytest.mark.slow
def test_killed_at_random_moments_gives_the_same_metrics(tmp_path):
    "The organism, small; each attempt is killed later than the one before, until one finishes"
    from mechunlearn.report import metrics
    argv = [sys.executable, "-m", "mechunlearn.cli", "run", "--forget-size", "16", "--localizations", "flu", "--quiet", "--set", "steps=3",
            "--set", "relearning={steps: 2, max_facts: 8}", "--set", "latents={n_train: 60, max_facts: 8}",
            "--set", "max_facts={retain: 8, retain/mcq: 4, same-subject: 8, other-relation: 8, ghost: 8, ghost/mcq: 4, general: 4}"]
    whole, torn = (tmp_path / n / "organism/sports-athlete-editing-16" for n in ("whole", "torn"))
    subprocess.run([*argv, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    rng, kills, limit = random.Random(0), 0, 5.
    while True:
        p = subprocess.Popen([*argv, "--out", str(tmp_path / "torn")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             preexec_fn=as_in_a_terminal)
        try: assert p.wait(rng.uniform(.5, 1)*limit) == 0; break
        except subprocess.TimeoutExpired: pass
        alive = descendants(p.pid); p.send_signal(rng.choice([signal.SIGINT, signal.SIGKILL])); p.wait(60)
        assert not psutil.wait_procs(alive, 30)[1]
        kills, limit = kills + 1, limit*1.4
    assert kills >= 2 and not progress.damaged(torn)
    a, b = metrics(whole), metrics(torn)
    keys = [c for c in a.columns if c not in ("value", "ci_low", "ci_high")]
    import pandas as pd
    pd.testing.assert_frame_equal(a.sort_values(keys, ignore_index=True), b.sort_values(keys, ignore_index=True))


# ---- what people write

def test_stage_notebooks_take_the_parameters_and_hold_no_lessons():
    for stage in PIPELINE:
        nb = runs._prepare(stage, Job(model="organism", run_dir="x"))
        assert not [c for c in nb.cells if "lesson" in c.metadata.get("tags", [])], stage.notebook
        assert any(c.source.startswith("## Run it") for c in nb.cells) and not any(c.source.startswith("## What we found") for c in nb.cells)
        assert not any(c.get("outputs") for c in nb.cells)


def names_missing(code):
    "Names that a script reads and neither makes nor imports"
    top = symtable.symtable(code, "notebook", "exec")
    below = lambda t: [t, *(x for c in t.get_children() for x in below(c))]
    made = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    read = {s.get_name() for t in below(top) for s in t.get_symbols() if s.is_referenced() and (t is top or s.is_global() and not s.is_local())}
    return read - made - set(dir(builtins)) - {"display"}


def test_stage_notebooks_name_all_they_use():
    assert names_missing("from os import path\ndef f(a): return a + b + path\nf(c)") == {"b", "c"}
    for stage in PIPELINE:
        code = "\n".join(c.source for c in runs.stage_notebook(stage).cells if c.cell_type == "code")
        assert not names_missing(re.sub(r"^[%!].*$", "", code, flags=re.M)), stage.notebook


def test_settings_are_exactly_what_the_stages_take():
    from mechunlearn import models
    from mechunlearn.jobs import TRAINING
    rooms = [f"mechunlearn.{'jobs' if s.name == 'finetuning' else s.name}" for s in PIPELINE] # where each stage's function stands
    functions = [fn for room in rooms for n, fn in vars(importlib.import_module(room)).items()
                 if n.startswith("run_") and "task_for_seed" in inspect.signature(fn).parameters and fn.__module__ == room]
    assert len({fn.__module__ for fn in functions}) == len(PIPELINE)
    taken = {p.name for fn in functions for p in inspect.signature(fn).parameters.values() if p.kind is not p.VAR_KEYWORD}
    taken |= {*TRAINING, "micro_batch", "checkpoint", "packed", "remember", "edited", "editors", *inspect.signature(models.load).parameters}
    assert set(Settings.model_fields) == taken - {"lm", "task_for_seed", "run", "localizations", "seeds", "recompute", "model", "progress"}


@pytest.mark.parametrize("text,message", [
    ("models: [organism]\nlocalizations: [flu]\nsead: [0]", "did you mean 'seeds'"), ("models: [organism]\nlocalizations: [flu]\nseeds: 3", "seeds: input should be a valid list"),
    ("models: [organism]", "localizations is missing"), ("models: []\nlocalizations: [flu]", "models: "), ("models: [a\n", "not YAML"), ("", "g.yaml: "), ("- a", "g.yaml: "),
    ("models: [organism]\nlocalizations: [flu]\nsettings: {batchsize: 3}", "did you mean 'batch_size'"), ("models: [organism]\nlocalizations: [flu]\ndraws: 0", "draws: "),
    ("models: [organism]\nlocalizations: [flu]\nsettings: {relearning: {lora: {rang: 3}}}", "did you mean 'rank'"),
    ("models: [organism]\nlocalizations: [flu]\nsettings: {relearning: {grid: {rangs: [3]}}}", "did you mean 'ranks'"),
    ("models: [organism]\nlocalizations: [flu]\ntasks: [{forget_size: 3}]", "needs a name")])
def test_bad_grids_are_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(Refusal, match="g.yaml") as e: grid(tmp_path / "g.yaml")
    assert message in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(Refusal, match="cannot read the grid"): grid(tmp_path / "no.yaml")


def test_grid_is_the_product_of_models_and_options(tmp_path):
    g = {"models": ["organism", "google/gemma-7b"], "localizations": ["flu", "flu", "late"], "seeds": [0, 2], "draws": 3, "out": "here", "keep_edits": True,
         "tasks": [{"name": "sports-athlete-editing", "forget_size": [16, 64], "inject": ["other", "golf"]}, "sports-athlete-editing"],
         "settings": {"batch_size": 8, "relearning": {"steps": 2}}}
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(g))
    jobs = grid(tmp_path / "g.yaml")
    assert len(jobs) == 2*(4 + 1) and {len(j.localizations) for j in jobs} == {2}
    assert all(j.settings == {"draws": 3, "batch_size": 8, "relearning": {"steps": 2}} and j.keep_edits and j.seeds == [0, 2] for j in jobs)
    assert jobs[0].run_dir == "here/organism/sports-athlete-editing-16" and jobs[3].run_dir == "here/gemma-7b/sports-athlete-editing-16-inject-golf"
    assert "facts" not in jobs[0].options and jobs[1].options["facts"] == "sports"
    assert grid(tmp_path / "g.yaml", "there")[0].run_dir.startswith("there/")
    g["tasks"] = [{"name": "counterfact-at-scale", "forget_size": [30, 100], "localizations": ["flu-path"], "seeds": [5], "draws": 2}, "full-sports-editing"]
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(g))
    jobs = grid(tmp_path / "g.yaml")
    assert [(j.localizations, j.seeds, j.settings["draws"]) for j in jobs[::2]] == [(["flu-path"], [5], 2)] * 2 + [(["flu", "late"], [0, 2], 3)]
    assert jobs[1].options == {"forget_size": 30, "facts": "counterfact"} and "forget_size" not in jobs[4].options
    g["tasks"][0]["seeds"] = "all"
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(g))
    with pytest.raises(Refusal, match="counterfact-at-scale: seeds"): grid(tmp_path / "g.yaml")


def test_committed_grids_are_grids():
    files = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    assert files
    for f in files: assert grid(f)


def test_a_grid_of_learning_rates(tmp_path):
    file = tmp_path/"g.yaml"
    file.write_text("models: [organism]\nlocalizations: [flu]\nlrs: [0.001, 0.002]\nsettings: {steps: 9}")
    jobs = grid(file)
    assert [j.settings["lr"] for j in jobs] == [.001, .002] and len({j.run_dir for j in jobs}) == 2 and all(j.settings["steps"] == 9 for j in jobs)


def test_folders_differ_when_jobs_do():
    some = [{"forget_size": 16}, {"forget_size": 64}, {"forget_size": 16, "inject": "golf"}, {"forget_size": 16, "paper_split": True},
            {"forget_size": 16, "facts": "a/b.csv"}, {"forget_size": 16, "facts": "c.csv"}]
    assert len({folder("out", "m", "t", o) for o in some} | {folder("out", "m", "t", some[0], lr) for lr in (1e-3, 2e-3)}) == len(some) + 2


def test_estimate_counts_what_is_known(tmp_path):
    j = grids.make_job("organism", "sports-athlete-editing", {"forget_size": 16}, ["flu", "random-mlps", "nonlocalized"], [0, 1], {"draws": 2}, tmp_path)
    e = estimate(j).set_index("localization")
    assert e.exact.to_dict() == {"flu": False, "random-mlps": False, "nonlocalized": True} and e.edits.tolist() == [2, 4, 2]
    assert e.trained["flu"] < e.trained["nonlocalized"] and e.disk_gb["nonlocalized"] == pytest.approx(8*e.trained["nonlocalized"]/1e9)
    (Path(j.run_dir) / "localizations").mkdir(parents=True)
    (Path(j.run_dir) / "localizations/flu.json").write_text(json.dumps({"name": "flu", "components": ["mlp.1", "mlp.2"], "slices": [["a", 0, 0, 1], ["b", 0, 0, 1]], "sizes": [10, 20]}))
    known = estimate(j.model_copy(update={"settings": {"budget": 500}})).set_index("localization")
    assert known.exact.all() and known.trained["flu"] == 30 and known.trained["random-mlps"] == 500


def test_repair_takes_only_what_is_damaged_unless_told(tmp_path):
    for n in "ab": store.save_json(tmp_path / f"{n}.json", n, {})
    (tmp_path / "b.json").write_text("x"); (tmp_path / "run.json").write_text("{")
    assert [p.name for p in progress.damaged(tmp_path)] == ["b.json", "run.json"]
    assert [p.name for p in repair(tmp_path)] == ["b.json", "run.json"] and sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.json.meta.json"]
    assert [p.name for p in repair(tmp_path, everything=True)] == ["a.json"] and not list(tmp_path.iterdir())


def test_three_facts_of_ones_own_are_enough_on_the_organism(tmp_path, monkeypatch):
    from mechunlearn.tasks import make_task
    for v in [v for v in os.environ if v.startswith("MECHUNLEARN_")]: monkeypatch.delenv(v)
    monkeypatch.setenv("MECHUNLEARN_CACHE", str(tmp_path))
    some = [f for f in make_task("counterfact-editing").retain if f.relation == "city"][:3]
    rows = ["subject,relation,prompt,answer,edit"] + [f"{f.subject},city,{f.prompt},{f.answer.strip()},{f.wrong[0].strip()}" for f in some]
    (tmp_path / "my.csv").write_text("\n".join(rows))
    job = grids.make_job("organism", "counterfact-editing", {"facts": str(tmp_path / "my.csv")}, ["all-mlps"], [0], {}, tmp_path)
    grids.check_job(job) # what must stay is taken from the world; CounterFact is not needed
    assert "forget_size" not in job.options
