"What a person can do to a command, its input and a run folder: every answer is one line, and nothing is left out in silence"
import json, pickle, shutil

import pandas as pd, pytest, torch

from mechunlearn import cli, options, report as r, scorecard, store
from mechunlearn.cli import main
from synthetic import synthetic_run

WHY = {"localization": {"flu-path": "no MLP gives the extraction set more than 0.02 of the answer"}, "probing": {"probing": "no relation of these facts can be probed"}}


@pytest.fixture(autouse=True)
def no_images(monkeypatch):
    "Figures are drawn, but not written"
    monkeypatch.setattr(r, "_image", lambda fig, alt: f'<img alt="{r.html.escape(alt, quote=True)}">')


@pytest.fixture(scope="module", autouse=True)
def cards_once():
    "The scorecard of the same records is made once: copies of a run have the same"
    make, known = scorecard.scorecard, {}
    def once(*given):
        if (key := pickle.dumps(given)) not in known: known[key] = make(*given)
        return known[key].copy()
    with pytest.MonkeyPatch.context() as m:
        for module in (scorecard, r): m.setattr(module, "scorecard", once)
        yield


@pytest.fixture
def short_page(monkeypatch):
    "A report without figures"
    monkeypatch.setattr(r, "SECTIONS", {k: r.SECTIONS[k] for k in ("What was done", "Results", "Not available")})


def leave_notes(run, notes=WHY):
    (run/"notes").mkdir()
    for stage, found in notes.items(): (run/f"notes/{stage}.json").write_text(json.dumps(found))
    return run


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return leave_notes(synthetic_run(tmp_path_factory.mktemp("small")/"run", ("flu", "late"), seeds=(0,), n=4))


# asked for, and not available

def test_what_could_not_be_made_has_a_row_everywhere(small, capsys, short_page):
    why = WHY["localization"]["flu-path"]
    cli.show_run(small, cli.read(["report"]))
    out = capsys.readouterr().out
    assert f"flu-path  not available: {why}" in out and out.count("flu-path  not available") == 3 and "probing  not available: no relation" in out # a row in each part of the table
    assert max(map(len, out.split("report:")[0].splitlines())) <= 120
    cli.show_scorecard(small, cli.read(["attack", "x"]))
    assert f"flu-path  not available: {why}" in capsys.readouterr().out
    cli.show_localizations(small, cli.read(["localize"]))
    out = capsys.readouterr().out
    assert f"flu-path  not available: {why}" in out and "probing  not available" in out
    page = (small/"report.html").read_text()
    assert f"flu-path is not available: {why}" in page and "Not available</h2>" in page and "no relation of these facts can be probed" in page


@pytest.mark.parametrize("show,argv", [(cli.show_run, ["report", "--json"]), (cli.show_scorecard, ["attack", "--json"]), (cli.show_localizations, ["localize", "--json"])])
def test_json_has_a_line_for_it(small, capsys, show, argv, short_page):
    show(small, cli.read(argv))
    lines = [json.loads(l) for l in capsys.readouterr().out.splitlines()]
    assert {"localization": "flu-path", "note": WHY["localization"]["flu-path"]} in lines and {"stage": "probing", "what": "probing", "note": WHY["probing"]["probing"]} in lines


def test_how_an_edited_model_was_read_comes_with_its_verdict(small, tmp_path, capsys, short_page):
    run = shutil.copytree(small, tmp_path/"run")
    store.save_json(run/"edited/late.json", {"quantized": True, "dtype": "bfloat16", "survives": {"weights": .12, "norm": .4}, "folder": "my/late", "place": "/my/late"}, {})
    cli.show_scorecard(run, cli.read(["attack", "x", "--json"]))
    said = {s["localization"]: s for s in map(json.loads, capsys.readouterr().out.splitlines()) if "verdict" in s}
    assert said["late"]["quantized"] and said["late"]["survives"]["weights"] == .12 and "quantized" not in said["flu"] and said["late"]["before"]["n"] == 4
    cli.show_scorecard(run, cli.read(["attack", "x"]))
    assert "The edited model is quantized" in " ".join(capsys.readouterr().out.split()) and "12% of the weights" in (run/"model_card.md").read_text()


def test_the_worst_case_of_what_one_can_afford(small, capsys, short_page, monkeypatch):
    found = r.find(small)
    price = lambda least: pd.DataFrame([dict(localization=n, attack=a, seconds=s) for n in ("flu", "late") for a, s in (("as trained", least), ("half retaught", 300.))])
    for least, words in ((None, "Within 60 s an edit: nothing: no attack says how long it took."), (10., "Within 60 s an edit: flu: the strongest attack (as trained)"), (90., "Within 60 s an edit: nothing; the quickest attack took 90 s.")):
        monkeypatch.setattr(r, "find", lambda run: found._replace(seconds=price(least) if least else price(0.)[:0]))
        cli.show_scorecard(small, cli.read(["attack", "x", "--within", "60"]))
        assert words in capsys.readouterr().out.replace("\n", " ")
    monkeypatch.setattr(r, "find", lambda run: found._replace(seconds=price(10.)))
    cli.show_scorecard(small, cli.read(["attack", "x", "--within", "60", "--json"]))
    rows = [s for s in map(json.loads, capsys.readouterr().out.splitlines()) if s.get("attack") == "worst case within 60 s"]
    assert {s["localization"] for s in rows} == {"flu", "late"} and all(s["which"] == "as trained" and s["seconds"] == 60 for s in rows)


def test_a_localization_that_was_made_since_has_no_such_row(small, tmp_path):
    run = shutil.copytree(small, tmp_path/"run")
    (run/"notes/localization.json").write_text(json.dumps({"flu": "it was empty", "random": "no budget"}))
    assert r.unavailable(run).what.tolist() == ["random", "probing"]


def test_localize_without_any_map_shows_the_localizations(small, tmp_path, capsys):
    run = shutil.copytree(small, tmp_path/"run")
    shutil.rmtree(run/"scores")
    cli.show_localizations(run, cli.read(["localize"]))
    out = capsys.readouterr().out
    assert "No map of the layers" in out and "late" in out and "flu-path  not available" in out


# runs that lack most things

LACKS = {"no multiple choice": lambda d: d[d.format != "mcq"], "no edited facts": lambda d: d[d.group != "forget"], "edited facts alone": lambda d: d[d.group == "forget"],
    "no ghosts": lambda d: d[d.group != "ghost"], "one edited fact": lambda d: d[(d.group != "forget") | d.fact.str.endswith("0000")], "no relation": lambda d: d.assign(relation=None),
    "multiple choice alone": lambda d: d[d.format == "mcq"], "equal values": lambda d: d.assign(prob_truth=1., prob_edit=1., loss=d.loss.where(d.loss.isna(), 2.))}

OFTEN = ("no multiple choice", "no edited facts", "one edited fact") # the others are slow

@pytest.mark.parametrize("lack", [pytest.param(l, marks=() if l in OFTEN else pytest.mark.slow) for l in LACKS])
def test_a_report_of_what_there_is(small, tmp_path, lack, monkeypatch):
    page, seen = r.page, []
    monkeypatch.setattr(r, "page", lambda found: seen.append(found) or page(found))
    run = shutil.copytree(small, tmp_path/"run")
    shutil.rmtree(run/"scores")
    for file in run.glob("*/seed*/*.parquet"):
        if file.stem == "training": continue
        rows = LACKS[lack](pd.read_parquet(file))
        if len(rows): store.save_table(file, rows, {"lack": lack})
        else: file.unlink(); store.sidecar(file).unlink()
    assert main(["report", str(run)]) == 0
    (found,) = seen
    r.results_text(r.results_table(found.metrics, "prob"), found.gone); r.scorecard_text(found.card, gone=found.gone); r.say_scorecard(found.card, found.broken)


def test_one_fact_and_equal_values_are_not_certain():
    one = pd.DataFrame({"fact": ["a"], "top1_truth": [1.], "prob_truth": [.7]}).assign(localization="flu", draw=0, seed=0, group="forget", format="completion", evaluation="standard", truth="x")
    text = one.assign(group="text", format="text", loss=2., truth=None)
    m = r.summarise(pd.concat([one, text])).query("seed == -1").set_index("measure")
    assert all(m.ci_low[k] < .3 and m.ci_high[k] > .9 for k in ("top1", "prob")) and m.ci_low.isna()["loss"]
    assert "2.00 [no interval]" in r.results_text(r.results_table(r.summarise(pd.concat([one, text]))))
    same = pd.concat([one.assign(fact=f, prob_truth=.9) for f in "abcd"] + [text.assign(fact=f) for f in "ab"])
    m = r.summarise(same).query("seed == -1").set_index("measure")
    assert m.ci_low["prob"] < .8 < .9 < m.ci_high["prob"] and m.ci_high.isna()["loss"]


def test_a_difference_in_every_fact_still_counts():
    flu = pd.DataFrame({"fact": map(str, range(40)), "top1_truth": 0.}).assign(localization="flu", draw=0, seed=0, group="forget", format="mcq", evaluation="standard", truth="x")
    tests = r.orderings(pd.concat([flu, flu.assign(localization="late", top1_truth=1.)]))
    assert tests[tests.column == "MCQ truth"].verdict.tolist() == ["appears"]


# options and settings

@pytest.fixture
def nothing_starts(monkeypatch):
    "A process that is started is an error"
    from mechunlearn import models, runs
    def start(*a, **k): raise AssertionError("work was started")
    for where, name in ((runs, "start"), (models, "load"), (cli.subprocess, "run")): monkeypatch.setattr(where, name, start)


def refused(argv, capsys, says=""):
    "Whether a command is answered with one line and 2"
    assert main(argv) == 2, argv
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("mechunlearn: ") and says in said.err, said


NUMBERS = ["-1", "nan", "inf", "1e400", "9"*24, "", "1,,2", "0,0", "٣", "1_0", "2147483648", "0x1", " ", "9"*5000]

@pytest.mark.parametrize("option", ["--seeds", "--draws", "--workers", "--batch-size", "--forget-size", "--parts"])
def test_numbers_that_are_none(option, capsys, nothing_starts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = ["--task", "sequential-counterfact-editing"] if option == "--parts" else []
    for n in NUMBERS + ([] if option == "--seeds" else ["0"]): refused(["run", f"{option}={n}", *task], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--lrs", "--injects"])
def test_rates_that_are_none(option, capsys, nothing_starts):
    for n in ["-1", "0", "nan", "inf", "-inf", "1e400", "1e-400", "", "1,,2", "1,1", "1,1.0", "٣", "many", ","]: refused(["sweep", f"{option}={n}"], capsys, option)


@pytest.mark.parametrize("words,message", [("memit@flu", "say which settings to try, such as --try memit.weight="), ("memit@flu --try memit.weigth=1,2", "did you mean 'weight'"),
    ("memit@flu,flu --try memit.weight=1", "sweep one after the other"), ("memit@flu --try memit.weight=1 --try memit.weight=2", "given twice"), ("lora@flu --try lora.steps=1.5", "integer"),
    ("memit@flu --set editors.memit.weight=10 --try memit.weight.x=1", "inside a setting"), ("memit@flu --try memit.weight=1 --try rome.ridge=1", "--try rome.ridge is of no edit here"), ("flu --try rome.ridge=1", "such as rome@flu"),
    ("memit@flu --try memit", "EDITOR.SETTING=VALUES"), ("memit@flu --try memit.weight=", "EDITOR.SETTING=VALUES"), ("memit@flu --try memit.weight=a,b", "valid number"), ("mask@flu --try mask.lr=1", "needs a number of weights"),
    ("memit@flu --try memit.weight=1 --lrs 1e-3", "--lrs is for fine-tuning"), ("memit@flu --try memit.weight=1 --set steps=3", "does not use the setting steps"), ("rome@flu --try rome.aim.clam=4", "aim")])
def test_settings_that_cannot_be_swept(words, message, capsys, nothing_starts):
    refused(["sweep", "--forget-size", "16", "--localizations", *words.split()], capsys, message)


@pytest.mark.parametrize("said,message", [(["lr=nan"], "lr"), (["lr=inf"], "lr"), (["lr=1e400"], "lr"), (["steps=-1"], "steps"), (["noise=nan"], "noise"), (["relearning.steps=0"], "relearning.steps"),
    (["relearning.stepps=3"], "did you mean 'steps'"), (["relearning={stepps: 3}"], "did you mean 'steps'"), (["steps=1", "steps=2"], "steps is given twice"), (["relearning.steps=1", "relearning={steps: 2}"], "relearning.steps is given twice"),
    (["steps.more=1"], ""), (["=3"], "KEY=VALUE"), (["a..b=3"], "KEY=VALUE"), (["steps"], "KEY=VALUE"), (["steps=" + "["*3000], "--set steps"), (["steps=2020-99-99"], "not YAML"), (["steps={[1]: 2}"], "not YAML"),
    (["relearning={1: 2}"], ""), (["relearning={steps: 1, steps: 2}"], "twice"), (["edited=../.."], ""), (["lr="], ""), (["device=12"], "device"), (["max_facts={nobody: 3}"], ""), (["max_facts={forget: -1}"], "")])
def test_settings_go_through_one_gate(said, message, capsys, nothing_starts):
    if said == ["lr="]: return # nothing: the default
    refused(["run", *(w for s in said for w in ("--set", s))], capsys, message)


def test_an_option_and_the_same_setting(capsys, nothing_starts):
    refused(["run", "--batch-size", "4", "--set", "batch_size=8"], capsys, "batch_size is given twice")
    refused(["run", "--draws", "4", "--set", "draws=8"], capsys, "draws is given twice")
    args = cli.read(["run", "--set", "draws=3", "--set", "relearning.steps=5", "--set", "relearning={lora: {rank: 8}}", "--set", "relearning.lora.alpha=2", "--revision", "main"])
    assert options.settings_of(args) == {"draws": 3, "relearning": {"steps": 5, "lora": {"rank": 8, "alpha": 2.}}, "revision": "main"}
    assert options.settings_of(cli.read(["attack", "--set", "relearning.grid.ranks=[1]"]), {"relearning": {"low_resource": True, "grid": {}}}) == {"relearning": {"low_resource": True, "grid": {"ranks": [1]}}}


# before work

@pytest.mark.parametrize("argv,message", [(["run", "--device", "cpu", "--set", "optimizer=paged-adamw-8bit"], "only a CPU"), (["edit", "--device", "mps", "--set", "optimizer=adamw-8bit", "--localizations", "late"], "mps"),
    (["run", "--device", "cuda:77"], "is not there"), (["run", "--device", "gpu"], "device"), (["localize", "--device", "cuda:77"], "is not there"), (["sweep", "--set", "lr=1e-3"], "--lrs"), (["sweep", "--set", "budget=9"], "does not use the setting budget"),
    (["sweep", "--task", "sequential-counterfact-editing"], "no facts set aside"), (["run", "--model", "~nouser-here/x"], "no such user"), (["run", "--facts", "~nouser-here/x.csv"], "no such user"),
    (["run", "--out", "~nouser-here/x"], "no such user"), (["attack", "--base", "organism", "--edited", "~nouser-here/x"], "no such user"), (["check", "--model", "~nouser-here/x"], "no such user"),
    (["run", "--set", "edited=organism-late"], "attack --base A --edited B"), (["attack", "--edited", ""], "--edited is empty"), (["run", "--model", ""], "--model is empty"), (["run", "--out", ""], "--out is empty")])
def test_said_before_work(argv, message, capsys, nothing_starts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(argv, capsys, message)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_rates(monkeypatch):
    "The committed table has no entry"
    from mechunlearn import finetuning
    table = pd.read_csv(finetuning.LEARNING_RATES).iloc[:0]
    monkeypatch.setattr(finetuning.pd, "read_csv", lambda f, **k: table if str(f) == str(finetuning.LEARNING_RATES) else pd.DataFrame(pd.io.parsers.read_csv(f, **k)))


def test_a_model_without_rates_is_offered_the_sweep(no_rates, capsys, nothing_starts, tmp_path, monkeypatch):
    argv = ["run", "--forget-size", "16", "--localizations", "flu,random-mlps,late,all-mlps", "--set", "steps=9", "--out", str(tmp_path/"runs")]
    refused(argv, capsys, "no learning rate for flu, random-mlps, late, all-mlps of organism on sports-athlete-editing")
    main(argv); said = capsys.readouterr().err
    words = cli.shlex.split(said.split(" or by: ")[1])[1:]
    assert words[0] == "sweep" and words[words.index("--localizations") + 1] == "flu,late,all-mlps" # one of each group
    swept = options.job_of(cli.read(words))
    assert swept.run_dir == str(tmp_path/"runs/organism/sports-athlete-editing-16") and swept.settings["steps"] == 9
    assert main([*argv, "--set", "lr=1e-3", "--dry-run"]) == 0
    capsys.readouterr()
    assert main([*argv, "--dry-run"]) == 0 and "no learning rate" in capsys.readouterr().err # what it would need is shown all the same
    (tmp_path/"runs/organism/sports-athlete-editing-16").mkdir(parents=True)
    rows = [{"model": "organism", "task": "sports-athlete-editing", "forget_size": 16, "localization": l, "lr": 1e-3, "inject": 1., "score": 3., "source": "sweep"} for l in ("flu", "late", "all-mlps")]
    pd.DataFrame(rows).to_csv(tmp_path/"runs/organism/sports-athlete-editing-16/learning_rates.csv", index=False)
    assert options.no_rates(swept) == []


def test_run_with_a_sweep_before_it(no_rates, monkeypatch, tmp_path):
    seen = []
    class Done: returncode = 0
    monkeypatch.setattr(cli.subprocess, "run", lambda words, **k: seen.append(words) or Done)
    monkeypatch.setattr(cli, "do_jobs", lambda jobs, args, *a: seen.append(jobs[0].run_dir) or 0)
    argv = ["run", "--sweep", "--localizations", "flu,late", "--out", str(tmp_path), "--quiet"]
    assert main(argv) == 0 and "sweep" in seen[0] and seen[1].startswith(str(tmp_path))
    Done.returncode = 2; seen.clear()
    assert main(argv) == 2 and len(seen) == 1 # nothing is run after a sweep that failed


def test_a_sweep_can_be_tried_dry(capsys, nothing_starts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "--dry-run", "--forget-size", "16", "--localizations", "late,flu", "--lrs", "1e-3,2e-3", "--injects", "1,5", "--seeds", "0,1"]) == 0
    out = capsys.readouterr().out
    assert "12 edits of dev facts" in out and "0.001, 0.002" in out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("task,facts", [("sports-athlete-editing", "athletes"), ("full-sports-editing", "athletes"), ("counterfact-editing", "atlas")])
def test_a_sweep_knows_every_source(task, facts, capsys, nothing_starts, tmp_path):
    argv = ["sweep", "--dry-run", "--task", task, "--facts", facts, "--localizations", "late", "--out", str(tmp_path)]
    assert main(argv) == 0 and "edits of dev facts" in capsys.readouterr().out


# errors that nobody foresaw

@pytest.mark.parametrize("error", [RecursionError("too deep"), MemoryError(), KeyError("x"), ValueError("two\nlines"), AssertionError()])
def test_an_unforeseen_error_is_one_line_and_a_file(error, monkeypatch, capsys):
    def fails(args): raise error
    monkeypatch.setitem(cli.COMMANDS, "status", (fails, *cli.COMMANDS["status"][1:]))
    assert main(["status"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and type(error).__name__ in said
    file = cli.Path(said.split("(traceback: ")[1].rstrip(")\n"))
    assert "in fails" in file.read_text(); file.unlink()


def test_a_terminal_of_ascii_and_a_closed_pipe(small, tmp_path):
    run = shutil.copytree(small, tmp_path/"runs/run")
    code = "import sys; from mechunlearn import cli, report; report.write_report = lambda run, found: 'no page'; sys.exit(cli.main())"
    p = cli.subprocess.run([cli.sys.executable, "-c", code, "report", str(run)], env={**cli.os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert p.returncode == 0 and b"^" in p.stdout and p.stdout.isascii() and b"Traceback" not in p.stderr
    p = cli.subprocess.run(f"{cli.sys.executable} -m mechunlearn.cli status {tmp_path/'runs'} | true; exit ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash", capture_output=True)
    assert p.returncode in (0, 141) and p.stderr == b""


# damaged folders

BYTES = {"empty": b"", "half": b'{"model": "inv', "no JSON": b"\xff\xfe\x00\x80", "another kind": b"[1, 2]", "deep": b"["*100_000, "no keys": b"{}"}
SMALL = ["run.json", "jobs/all/job.json", "first_seed.json", "notes/localization.json", "localizations/late.json", "localizations/late.json.meta.json", "late/seed0/evaluation.parquet.meta.json",
         "late/seed0/edit.json", "late/seed0/evaluation.parquet", "late/seed0/training.parquet", "late/seed0/edit.safetensors", "scores/probing.parquet", "notebooks/10_probing.ipynb.meta.json"]

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Two small runs with every kind of file"
    from mechunlearn.runs import STANDARD, Part, make_job
    out = tmp_path_factory.mktemp("whole")
    small = leave_notes(synthetic_run(out/"b", ("late",), seeds=(0,), n=3, stages=("maps", "localizations", "training", "standard")))
    for name in ("a", "b"):
        run = small if name == "b" else shutil.copytree(small, out/name)
        job = make_job("organism", "sports-athlete-editing", {"forget_size": 6}, ["flu", "late"], [0], {"draws": 1}).model_copy(update={"run_dir": str(run)})
        (run/"jobs/all").mkdir(parents=True); (run/"notebooks").mkdir()
        (run/"jobs/all/job.json").write_text(Part(job=job, label="all", stages=STANDARD).model_dump_json())
        (run/"first_seed.json").write_text("0")
        store.save_json(run/"notebooks/10_probing.ipynb", {}, {"artefacts": {}})
        store.save_tensors(run/"late/seed0/edit.safetensors", {"x": torch.zeros(3)}, {})
    return out

FEW = ("half", "no keys")
DAMAGED = [pytest.param(f, FEW, id=f) for f in SMALL] + [pytest.param(f, tuple(k for k in BYTES if k not in FEW), id=f"{f}, more", marks=pytest.mark.slow) for f in ("run.json", "jobs/all/job.json")]

@pytest.mark.parametrize("file,kinds", DAMAGED)
def test_a_damaged_file_is_named_and_the_others_go_on(whole, file, kinds, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(r, "page", lambda found: "") # figures take their time
    monkeypatch.setattr(cli, "do_jobs", lambda *a, **k: 0)
    monkeypatch.setattr("mechunlearn.checkpoints.export", lambda *a: "exported"); monkeypatch.setattr("mechunlearn.models.load", lambda *a, **k: None)
    for kind in kinds:
        data = BYTES[kind]
        if kind == "no keys" and file == "notes/localization.json": continue # nothing is noted
        out = shutil.copytree(whole, tmp_path/kind)
        (out/"a"/file).write_bytes(data)
        for argv in (["status", str(out)], ["report", str(out)], ["attack", str(out/"a")], ["export", str(out/"a"), "--localization", "late", "--out", str(tmp_path/"new")]):
            code = main(argv); said = capsys.readouterr()
            assert "traceback" not in said.err.lower(), (kind, argv, said.err)
            assert code in (0, 1, 2) and said.err.count("\n") <= 1
            if argv[0] == "report": assert "report:" in said.out # of the other
            if argv[0] == "status": assert code == 1 and file.removesuffix(".meta.json").split("/")[-1] in said.out, (kind, file, said)
            if argv[0] in ("attack", "export") and file == "jobs/all/job.json": assert code == 2 and "job.json" in said.err


def test_copies_and_older_descriptions_do_not_stop_a_report(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(r, "page", lambda found: "")
    out = shutil.copytree(whole, tmp_path/"out")
    shutil.copytree(out/"a/late/seed0", out/"a/late/seed0.bak")
    (out/"a/late/seed0.bak/evaluation.parquet").write_bytes(b"junk")
    assert main(["report", str(out/"a")]) == 0
    capsys.readouterr()
    job = json.loads((out/"a/jobs/all/job.json").read_text()); job["job"]["from_an_older_version"] = 1
    (out/"a/jobs/all/job.json").write_text(json.dumps(job))
    assert main(["report", str(out)]) == 0


# places

def test_export_looks_before_it_loads(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mechunlearn.finetuning.load_edit", lambda f: None)
    monkeypatch.setattr("mechunlearn.models.load", lambda *a, **k: 1/0)
    words = lambda *more: ["export", str(whole/"a"), "--localization", "late", *more]
    (tmp_path/"file").write_text("x"); (tmp_path/"full").mkdir(); (tmp_path/"full/x").write_text("x")
    refused(words("--out", str(tmp_path/"file")), capsys, "cannot write")
    refused(words("--out", str(tmp_path/"full")), capsys, "not empty")
    refused(words("--out", str(tmp_path/"file/below")), capsys, "cannot write")
    refused(words("--out", str(tmp_path/"new"), "--seed", "7"), capsys, "unknown seed of late '7'")


def test_recorded_tables_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"recorded").mkdir() # somebody's own
    assert len(r.recorded("localizations"))
    with pytest.raises(store.Refusal, match="--record") as e: r.recorded("localizations", "elsewhere")
    assert "make record" not in str(e.value)
    with pytest.raises(store.Refusal, match="did you mean 'metrics'"): r.recorded("metrik")
