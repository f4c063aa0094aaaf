"Wrong input is answered in one line; right input comes through"
import json, subprocess, sys
from types import SimpleNamespace

import pandas as pd, pytest

from mechunlearn import cli, grids, options, progress, runs
from mechunlearn.cli import main, read
from mechunlearn.jobs import labelled
from mechunlearn.store import save_json


@pytest.fixture
def nothing_starts(monkeypatch):
    "A process that is started is an error"
    def start(*a, **k): raise AssertionError("work was started")
    monkeypatch.setattr(runs, "start", start)


@pytest.mark.parametrize("argv,message", [
    (["runn"], "unknown command 'runn', did you mean 'run'"), (["run", "--modle", "organism"], "did you mean '--model'"), (["run", "--forget-sise=3"], "did you mean '--forget-size'"),
    (["run", "extra"], "'extra' is one word too many"), (["run", "--forget-size", "many"], "--forget-size: a whole number"), (["run", "--model"], "--model: expected one argument"),
    (["run", "--seeds", "0,x"], "--seeds: whole numbers"), (["run", "--seeds", ""], "--seeds: whole numbers"), (["run", "--set", "steps"], "KEY=VALUE"),
    (["run", "--set", "stepps=3"], "did you mean 'steps'"), (["run", "--set", "steps=many"], "steps: input should be a valid integer"), (["run", "--draws", "0"], "draws: "),
    (["run", "--seeds", "0,-1"], "seeds are 0 or larger"), (["run", "--localizations", ","], "no localization is named"), (["run", "--set", "lr=[1"], "not YAML"),
    (["run", "--dtype", "float8", "--dry-run"], "dtype: "), (["run", "--set", "corruption=zap"], "corruption: "), (["run", "--quantize", "3bit"], "quantize: "),
    (["run", "--batch-size", "0"], "batch_size: "), (["run", "--model", "organsim"], "did you mean 'organism'"), (["run", "--task", "sport-athlete-editing"], "did you mean 'sports-athlete-editing'"),
    (["run", "--localizations", "flu,random-mlp"], "did you mean 'random-mlps'"), (["run", "--localizations", "flu#2"], "flu#2"), (["run", "--inject", "gold"], "did you mean 'golf'"),
    (["run", "--forget-size", "0"], "forget_size"), (["run", "--forget-size", "100000"], "too large"), (["run", "--facts", "nowhere.csv"], "nowhere.csv"),
    (["run", "--paper-split"], "paper_split"), (["run", "--workers", "0"], "--workers: at least 1"), (["run", "--recompute", "some"], "Valid: damaged, all"),
    (["batch"], "required: grid"), (["batch", "no.yaml"], "cannot read the grid no.yaml"), (["status", "nowhere"], "there are no runs in nowhere"), (["report", "nowhere"], "there are no runs in nowhere"),
    (["organism", "--retrain"], "--retrain needs --out"), (["organism", "--without", "f.csv"], "give --retrain as well"), (["localize", "--task", "x"], "unknown task 'x'"), (["check", "--model", "no/such/model"], "model"), (["localise"], "did you mean 'localize'"),
    (["localize", "--layers", "2-99"], "has 12 layers"), (["localize", "--components", "mlp"], "Say --layers"), (["sweep", "--lrs", "0"], "--lrs: positive numbers"),
    (["attack", "nowhere"], "nowhere is not a run folder"), (["attack", "x", "--edited", "y"], "not both"), (["attack", "--base", "organism", "--edited", "nowhere"], "nowhere"),
    (["attack", "--edited", "nowhere"], "with --base"), (["attack", "--base", "organism-late"], "with --model organism-late"), (["attack", "x", "--base", "organism"], "not both"),
    (["attack", "--model", "organism-late", "--base", "organism", "--edited", "y"], "leave out --model"),
    (["run", "--localizations", "edited@x"], "name its folder with --edited"), (["run", "--attacks", "some"], "Valid: standard, all"),
    (["run", "--task", "full-sports-editing", "--sport", "curling"], "unknown sport"), (["run", "--task", "full-sports-editing", "--forget-size", "3"], "unknown option"), (["localize", "--layers", "x"], "names no components")])
def test_wrong_input_is_one_line_and_two(argv, message, capsys, nothing_starts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("mechunlearn: ") and message in said.err
    assert said.err.count("\n") == 1 and "Traceback" not in said.err


def test_as_a_command(tmp_path, capsys):
    run = lambda *argv: subprocess.run([sys.executable, "-m", "mechunlearn.cli", *argv], capture_output=True, text=True, cwd=tmp_path)
    p = run("run", "--model", "organsim")
    assert (p.returncode, p.stdout) == (2, "") and p.stderr.startswith("mechunlearn: unknown") and p.stderr.count("\n") == 1
    p = run("--help")
    assert p.returncode == 0 and all(c in p.stdout for c in cli.COMMANDS if c != "_job") and "_job" not in p.stdout
    with pytest.raises(SystemExit, match="^2$"): main([])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^0$"): main(["--version"])
    assert capsys.readouterr().out.startswith("mechunlearn 0.")


def test_help_imports_nothing_heavy():
    code = "import sys; from mechunlearn.cli import main\ntry: main(['run', '--help'])\nexcept SystemExit: pass\nprint([m for m in ('torch', 'pandas', 'numpy', 'papermill') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "[]"


def test_options_become_a_job(monkeypatch):
    monkeypatch.setattr(grids, "check_job", lambda job: None)
    job = options.job_of(read(["run", "--model", "google/gemma-7b", "--forget-size", "16", "--inject", "golf", "--localizations", "flu,late", "--seeds", "0,2", "--draws", "3",
                           "--dtype", "bfloat16", "--set", "steps=5", "--set", "relearning={lora: {rank: 8}}", "--out", "o", "--keep-edits"]))
    assert job.options == {"forget_size": 16, "facts": "sports", "inject": "golf"} and job.run_dir == "o/gemma-7b/sports-athlete-editing-16-inject-golf"
    assert job.settings == {"draws": 3, "dtype": "bfloat16", "steps": 5, "relearning": {"lora": {"rank": 8}}} and job.seeds == [0, 2] and job.keep_edits


@pytest.mark.parametrize("argv,chosen", [([], options.names(options.LOCALIZATIONS)), (["--layers", "2-5"], ["hand@mlp.2-5"]), (["--layers", "3", "--components", "mlp,head"], ["hand@mlp.3+head.3"]),
    (["--components", "head.5.1,mlp.2", "--localizations", "flu"], ["flu", "hand@head.5.1+mlp.2"]), (["--localizations", "late"], ["late"])])
def test_a_set_by_hand_is_one_more_name(argv, chosen): assert options.job_of(read(["localize", *argv])).localizations == chosen


@pytest.mark.parametrize("states,code", [(["done"], 0), (["refused"], 2), (["failed"], 1), (["done", "refused"], 1), (["failed", "done"], 1)])
def test_exit_codes(states, code, monkeypatch, capsys):
    done = [{"state": s, "why": f"because {k}", "notebook": "x.ipynb", "run_dir": f"r{k}"} for k, s in enumerate(states)]
    monkeypatch.setattr(runs, "run_batch", lambda *a: done)
    shown = []
    assert cli.do_jobs([SimpleNamespace(settings={})]*len(states), read(["run"]), show=lambda f, a: shown.append(f)) == code
    assert shown == [f"r{k}" for k, s in enumerate(states) if s == "done"]
    assert capsys.readouterr().err.splitlines() == [f"r{k} {s}: because {k}" + (" (traceback: x.ipynb)" if s == "failed" else "") for k, s in enumerate(states) if s != "done"]


def test_ctrl_c_is_130(monkeypatch, capsys):
    def interrupted(args): raise KeyboardInterrupt
    monkeypatch.setitem(cli.COMMANDS, "status", (interrupted, *cli.COMMANDS["status"][1:]))
    assert main(["status"]) == 130 and capsys.readouterr().err == "mechunlearn: stopped; the same command goes on from here\n"


def test_dry_run_starts_nothing(nothing_starts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--dry-run", "--forget-size", "16", "--localizations", "flu,late,random-mlps", "--draws", "2"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("flu", "late", "random-mlps", "as flu (at most", "1 jobs, 4 edits")) and not list(tmp_path.iterdir())


def test_check_reads_the_tokenizer(capsys):
    assert main(["check"]) == 0
    assert "12 layers" in capsys.readouterr().out
    assert main(["check", "--facts", "world", "--forget-size", "100000"]) == 2


def test_a_run_is_shown_as_table_or_json(tmp_path, monkeypatch, capsys):
    from mechunlearn import report
    metrics = pd.DataFrame({"localization": ["flu"], "value": [.5], "layer": pd.array([None], dtype="Int64")})
    found = SimpleNamespace(facts=(), metrics=metrics, gone=metrics[:0], guess=None, curve=pd.DataFrame({"layer": [-1, 0, 1, 2], "in_flu": [None, .25, 1, .97]}), where={"flu": 0}, flu=[1, 2])
    stubs = {"find": lambda d: found, "write_report": lambda d, found: "r/report.html", "results_table": lambda m, guess: m, "results_text": lambda t, gone: "TABLE", "parts_table": lambda m: [], "capability_table": lambda m: []}
    for name, fn in stubs.items():
        monkeypatch.setattr(report, name, fn)
    cli.show_run(tmp_path, read(["run"])); out = capsys.readouterr().out
    assert out.startswith("TABLE") and "r/report.html" in out and f"executed notebooks: {tmp_path}/notebooks" in out
    assert "FLU trains the MLPs of layers 1–2. With other test facts layers come and go: layer 0 in 0.25 of resamples." in out
    cli.show_run(tmp_path, read(["run", "--json"]))
    assert [json.loads(l) for l in capsys.readouterr().out.splitlines()] == [{"localization": "flu", "value": .5, "layer": None}]


@pytest.mark.parametrize("passed,code", [(True, 0), (False, 1)])
def test_organism_prints_json(passed, code, monkeypatch, capsys):
    from mechunlearn import organism
    rows = [{"what": "completion", "value": .5, "n": 4, "floor": .98}]
    monkeypatch.setattr(organism, "check", lambda model: {"model": model, "passed": passed, "below_floor": [], "ghosts_above_chance": [], "measured": rows})
    assert main(["organism", "--check"]) == code
    said = capsys.readouterr()
    assert json.loads(said.out)["measured"] == rows and "completion" in said.err


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys, nothing_starts):
    (tmp_path/"file").write_text("not a folder")
    assert main(["run", "--out", str(tmp_path/"file"/"runs")]) == 2
    said = capsys.readouterr()
    assert "cannot write to" in said.err and said.err.count("\n") == 1


def test_report_goes_on_after_an_unfinished_run(tmp_path, capsys, monkeypatch):
    from matplotlib.figure import Figure
    from synthetic import synthetic_run
    monkeypatch.setattr(Figure, "savefig", lambda fig, file, **k: None) # figures are drawn, but not written
    synthetic_run(tmp_path/"b", ("flu",), seeds=(0,), n=6, stages=("localizations", "training", "standard"))
    (tmp_path/"a").mkdir(); (tmp_path/"a"/"run.json").write_text(json.dumps({"model": "m", "revision": "r", "task": "t", "options": {}}))
    assert main(["report", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "no records yet" in said.err and "report.html" in said.out
    assert main(["report", str(tmp_path/"a")]) == 2


TINY = ["--set", "steps=1", "--set", "batch=4", "--set", "retain_batch=4", "--set", "text_batch=1"]

def test_a_sweep_leaves_the_rates_that_later_runs_use(tmp_path, capsys):
    from mechunlearn.finetuning import rates
    from mechunlearn.localization import localize
    from mechunlearn.models import load
    from mechunlearn.store import Run
    from mechunlearn.tasks import make_task
    argv = ["sweep", "--forget-size", "16", "--localizations", "late", "--lrs", "1e-3,2e-3", "--injects", "1,5", *TINY, "--out", str(tmp_path), "--quiet"]
    assert main(argv) == 0
    folder, said = tmp_path / "organism/sports-athlete-editing-16", capsys.readouterr()
    assert "at the edge of the grid" in said.err and (folder / "sweep.png").stat().st_size > 1000
    swept, best = pd.read_parquet(folder / "sweep.parquet"), pd.read_csv(folder / "learning_rates.csv").iloc[0]
    first, second = swept[swept.inject == 1], swept[swept.inject == 5]
    assert first.lr.tolist() == [1e-3, 2e-3] and second.lr.tolist() == [first.set_index("lr").score.idxmax()]
    top = swept.loc[swept.score.idxmax()]
    lm = load("organism"); task = make_task("sports-athlete-editing", lm, forget_size=16)
    where, run = localize(lm, task, "late"), Run(folder, lm.name, lm.revision, task.name, {"forget_size": 16})
    assert rates(lm, task, where, None, None, run) == (best.lr, best.inject) == (top.lr, top.inject) != rates(lm, task, where, None, None)
    stamp = (folder / "sweep.parquet").stat().st_mtime_ns
    assert main([*argv, "--json"]) == 0 and json.loads(capsys.readouterr().out)["lr"] == best.lr
    assert (folder / "sweep.parquet").stat().st_mtime_ns == stamp # not made again


def test_a_sweep_of_editors_says_the_best_settings_as_a_grid_file_has_them(tmp_path, capsys):
    import yaml
    argv = ["sweep", "--forget-size", "16", "--localizations", "lora-4@late", "--try", "lora.lr=4e-3,1e30", "--try", "lora.alpha=4,8,16", "--set", "editors.lora.steps=2", "--out", str(tmp_path), "--quiet"]
    assert main([*argv, "--dry-run"]) == 0 and "6 edits of dev facts" in capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    said, folder = capsys.readouterr(), tmp_path / "organism/sports-athlete-editing-16"
    best, table = json.loads(said.out), pd.read_parquet(folder / "editors_sweep.parquet")
    top = table.loc[table.score.idxmax()]
    assert json.loads(top.settings)["lr"] == 4e-3 and best["settings"] == top.settings and best["score"] == pytest.approx(top.score) and best["at_edge"] == ", ".join(["lr"] + ["alpha"] * (json.loads(top.settings)["alpha"] != 8))
    assert table.score.isna().sum() == 3 and table.why[table.score.isna()].str.contains("diverged").all() and "diverged" in said.err
    pasted = yaml.safe_load(said.err.partition("for a grid file:")[2].partition("scores:")[0])
    assert pasted == {"settings": {"editors": {"lora-4@late": {"steps": 2, "rank": 4, **json.loads(top.settings)}}}}
    file = next((folder / "sweep").glob("*.parquet")); stamp = file.stat().st_mtime_ns
    turned = [*argv[:5], *argv[7:9], *argv[5:7], *argv[9:]]
    assert turned[5:9] == ["--try", "lora.alpha=4,8,16", "--try", "lora.lr=4e-3,1e30"] and main(turned) == 0 and file.stat().st_mtime_ns == stamp # not edited again
    random = ["sweep", "--forget-size", "16", "--localizations", "memit@random-mlps", "--try", "memit.weight=10", "--set", "editors.memit.n_contexts=1", "--set", "editors.memit.aim={steps: 2}", "--out", str(tmp_path), "--quiet"]
    capsys.readouterr()
    assert main(random) == 0 and list(yaml.safe_load(capsys.readouterr().err.partition("for a grid file:")[2].partition("scores:")[0])["settings"]["editors"]) == ["memit@random-mlps"]


def test_export_is_a_plain_folder_or_a_difference(tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM
    from mechunlearn.finetuning import finetune, parse_slice
    from mechunlearn.localization import localize
    from mechunlearn.models import load
    from mechunlearn.store import load_tensors
    from mechunlearn.tasks import make_task
    lm = load("organism"); task = make_task("sports-athlete-editing", lm, forget_size=16)
    edit, run = finetune(lm, task, localize(lm, task, "late"), lr=1e-3, steps=1, batch=4, retain_batch=4, text_batch=1, progress=False), tmp_path / "run"
    edit.save(run / "late" / "seed0")
    (run / "jobs/all").mkdir(parents=True)
    (run / "jobs/all/job.json").write_text(json.dumps({"job": {"model": "organism", "settings": {}, "run_dir": str(run)}}))
    words = lambda out, *more: ["export", str(run), "--localization", "late", "--out", str(tmp_path / out), *more]
    assert main(words("whole")) == 0 and main(words("part", "--delta")) == 0
    plain, delta = AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), load_tensors(tmp_path / "part/delta.safetensors")
    with edit.applied(lm): assert all(torch.equal(w, lm.weight(n)) for n, w in plain.named_parameters())
    for k, v in delta.items():
        s = parse_slice(k)
        torch.testing.assert_close(lm.weight(s.param).narrow(s.dim, s.start, s.stop - s.start) + v, edit.values[k], rtol=0, atol=1e-6)
    assert any(v.abs().max() > 0 for v in delta.values()) and json.loads((tmp_path / "part/edit.json").read_text())["config"]["lr"] == 1e-3
    assert main(words("whole")) == 2 and "is not empty" in capsys.readouterr().err
    assert main(["export", str(run), "--localization", "lat", "--out", "x"]) == 2 and "did you mean 'late'" in capsys.readouterr().err
    (run / "late/seed0/edit.safetensors").unlink()
    assert main(words("again")) == 2 and "--keep-edits" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--out", "x"]) == 2 and "not a run folder" in capsys.readouterr().err


def test_attack_takes_up_what_a_run_left(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    old = grids.make_job("organism", "sports-athlete-editing", {"forget_size": 3}, ["flu", "random-mlps"], [2, 0], {"draws": 2, "steps": 3})
    root = tmp_path / old.run_dir
    for folder in ("jobs/all", *(f"{l}/seed{s}" for l in ("flu", "random-mlps#0", "random-mlps#1") for s in (0, 2))): (root / folder).mkdir(parents=True)
    (root / "jobs/all/job.json").write_text(progress.Part(job=old, label="all", stages=grids.STANDARD).model_dump_json())
    assert main(["attack", str(root)]) == 2 and "there are no edits" in capsys.readouterr().err
    for folder in root.glob("*/seed*"): (folder / "training.parquet").touch()
    (root / "first_seed.json").write_text("2")
    seen = []
    monkeypatch.setattr(cli, "do_jobs", lambda jobs, args, stages, show: seen.append((jobs[0], stages)) or 0)
    assert main(["attack", str(root), "--grid", "--set", "batch_size=8"]) == 0
    job, stages = seen[0]
    assert job.localizations == ["flu", "random-mlps#0", "random-mlps#1"] and job.seeds == [2, 0] and job.run_dir == str(root) and stages == grids.PIPELINE[5:10]
    assert job.settings == {"draws": 2, "steps": 3, "batch_size": 8, "relearning": {"low_resource": True, "grid": {}}} and job.options == old.options
    tensors = root / "flu/seed0/edit.safetensors"
    monkeypatch.setattr(cli, "do_jobs", lambda *a: tensors.touch() or 0)  # trained again for the attacks: not kept
    assert main(["attack", str(root)]) == 0 and not tensors.exists()
    assert main(["attack", str(root), "--keep-edits"]) == 0 and tensors.exists()
    assert main(["attack", str(root)]) == 0 and tensors.exists()  # it was there before
    monkeypatch.setattr(cli, "do_jobs", lambda jobs, args, stages, show: seen.append((jobs[0], stages)) or 0)
    assert main(["attack", "--base", "organism", "--edited", "organism-late", "--forget-size", "3"]) == 0
    assert seen[1][0].localizations == ["edited@organism-late"] and seen[1][0].settings["edited"] == "organism-late" and seen[1][0].attacks == "all"


def test_two_folders_of_one_name_are_two_edits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(cli, "do_jobs", lambda jobs, args, stages, show: seen.append(jobs[0]) or 0)
    monkeypatch.setattr(grids, "check_job", lambda *a, **k: None)
    monkeypatch.setattr(options, "no_rates", lambda job: [])
    def named(folder):
        (tmp_path/folder).mkdir(parents=True, exist_ok=True)
        assert main(["attack", "--base", "organism", "--edited", folder]) == 0
        job = seen[-1]
        save_json(tmp_path/job.run_dir/f"edited/{job.localizations[0]}.json", {"folder": folder, "place": str((tmp_path/folder).resolve())}, {})
        return job.localizations[0]
    first, second, odd, final = map(named, ("a/theirs", "b/theirs", "x#1", "x#final"))
    assert first == named("a/theirs") == "edited@theirs" and second == named("b/theirs") != first and second.startswith("edited@theirs-")
    assert (odd, final) == ("edited@x-1", "edited@x-final") and labelled(pd.DataFrame({"fact": ["f"]}), final).draw.item() == 0
