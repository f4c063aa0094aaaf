"""A real SLURM of one node (tests/slurm_node.sh), and what happens to a grid on it

The first tests use stages that cost nothing; the last one, marked slow, edits the organism. Without SLURM's Debian packages, or
without submitit, all that need them skip.
"""
import json, os, random, shutil, signal, subprocess, sys, tempfile, textwrap, time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import nbformat, psutil, pytest, yaml

from mechunlearn import cluster, engines, grids, progress, runs
from mechunlearn.cli import main, read
from mechunlearn.cluster import Slurm
from mechunlearn.grids import Job, Stage
from mechunlearn.options import slurm_of
from mechunlearn.store import Refusal

NODE = Path(__file__).with_name("slurm_node.sh")
TINY = {"max_facts": {"retain": 8, "retain/mcq": 4, "same-subject": 8, "other-relation": 8, "ghost": 8, "ghost/mcq": 4, "general": 4},
        "steps": 3, "relearning": {"steps": 2, "max_facts": 8}, "latents": {"n_train": 60, "max_facts": 8}}


def script(*words): return subprocess.run([str(NODE), *words], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def node():
    "A SLURM that answers: the one that is there, or one of our own; skips where there can be none"
    pytest.importorskip("submitit", reason="no submitit: pip install mechunlearn[slurm]")
    if shutil.which("sinfo") and not subprocess.run(["sinfo", "-h"], capture_output=True, timeout=60).returncode: yield; return
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if missing := [t for t in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(t, path=path)]:
        pytest.skip(f"no {missing[0]}: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge")
    with pytest.MonkeyPatch.context() as env, tempfile.TemporaryDirectory(prefix="mechunlearn-slurm-", ignore_cleanup_errors=True) as folder: # pytest's own are closed to others: munge refuses them
        Path(folder).chmod(0o755)
        env.setenv("MECHUNLEARN_SLURM", folder)
        started = script("start")
        if started.returncode: script("stop"); pytest.skip(f"no SLURM: {started.stderr.strip()}")
        env.setenv("SLURM_CONF", script("env").stdout.strip().partition("=")[2])
        yield
        script("stop")


def scontrol(*words): return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=True, timeout=60).stdout


# ---- stages that cost nothing

def notebook(path, code):
    "A stage whose work is `code`"
    given = "\n".join(f"{k} = {v!r}" for k, v in Job(model="m", run_dir="x").parameters.items())
    made = [nbformat.v4.new_code_cell(s, metadata={"tags": t}) for s, t in ((given, ["parameters"]), (textwrap.dedent(code), []))]
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), path)


@pytest.fixture
def cheap(tmp_path, monkeypatch):
    "A map, an edit of two seconds, and an attack; each edit that is made is counted. Gives a job of twelve parts"
    notebook(tmp_path / "map.ipynb", "from mechunlearn.store import make\nmake(f'{run_dir}/map.json', {}, lambda: seeds[0])")
    notebook(tmp_path / "edit.ipynb", f"""
        import os, time
        from mechunlearn.store import make, read_json
        def edit(l, s):
            with open({str(tmp_path / "tried")!r}, "a") as f: f.write(f"{{l}}-{{s}} {{os.getpid()}}\\n")
            time.sleep(2)
            with open({str(tmp_path / "made")!r}, "a") as f: f.write(f"{{l}}-{{s}}\\n")
            return [l, s, read_json(f"{{run_dir}}/map.json")]
        for l in localizations:
            for s in seeds: make(f"{{run_dir}}/{{l}}/seed{{s}}/edit.json", dict(l=l, s=s), lambda: edit(l, s))""")
    notebook(tmp_path / "attack.ipynb", """
        from mechunlearn.store import make
        for l in ["none", *localizations]:
            for s in seeds: make(f"{run_dir}/{l}/seed{s}/attack.json", dict(l=l, s=s), lambda: f"{l} {s}")""")
    maps, edit, attack = (Stage(n, str(tmp_path / f"{n}.ipynb"), pattern) for n, pattern in
                          (("map", ("map.json",)), ("edit", ("*/seed{seed}/edit.json",)), ("attack", ("*/seed{seed}/attack.json",))))
    monkeypatch.setattr(runs, "MAPS", (maps,)); monkeypatch.setattr(runs, "ATTACKS", (attack,))
    monkeypatch.setattr(Job, "stages", property(lambda self: (maps, edit, attack)))
    return Job(model="m", localizations=["flu", "late", "all-mlps"], seeds=[0, 1, 2], run_dir=str(tmp_path / "out/m/t"))


def lines(file): return file.read_text().split("\n")[:-1] if file.exists() else []

def until(true, seconds=60, why=""):
    end = time.time() + seconds
    while not (got := true()):
        assert time.time() < end, why or "it did not happen"
        time.sleep(.1)
    return got

def state(job, part):
    q = cluster.jobs_of(job.run_dir).get(part)
    return q and q.state

def settle(job, seconds=240): until(lambda: not any(q.there for q in cluster.jobs_of(job.run_dir).values()), seconds)

def run(job, **kw):
    said = []
    done = engines.run_slurm([job], Slurm(time=20), quiet=True, every=.5, say=said.append, **kw)[0]
    return done, said[0].partition(": ")[2]


def files(job):
    "What the stages of a job have left"
    root = Path(job.run_dir)
    return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*.json"))
            if (f.parent.name.startswith("seed") or f.name == "map.json") and not f.name.endswith(".meta.json")} # when it was made stands beside each

def local(job, tmp_path):
    "The same job, done by the local engine"
    here = job.model_copy(update={"run_dir": str(tmp_path / "local/m/t")})
    assert runs.run_batch([here], quiet=True)[0]["state"] == "done"
    return here


def test_a_grid_goes_on_after_everything_that_can_happen_to_it(node, cheap, tmp_path):
    done, said = run(cheap)
    assert done["state"] == "submitted" and said.startswith("0 parts are done, 0 in the queue, 12 submitted as ")
    numbers = {part: told["number"] for part, told in cluster.recorded(cheap.run_dir).items()}
    assert len(numbers) == 12 and numbers["flu-seed0"].split("_")[0] == numbers["late-seed0"].split("_")[0] and "_" not in numbers["maps"]
    assert "SLURM: " in progress.status(tmp_path / "out").now[0] and "waiting (Dependency)" in progress.status(tmp_path / "out").now[0]
    with pytest.raises(Refusal, match="in SLURM's queue"): runs.run_batch([cheap])
    assert run(cheap)[1] == "0 parts are done, 12 in the queue, 0 submitted" # asked twice, submitted once

    until(lambda: state(cheap, "flu-seed0") == "RUNNING")
    subprocess.run(["scancel", numbers["late-seed0"]], check=True) # one is cancelled while it waits, and all that waits for it
    until(lambda: lines(tmp_path / "tried"))
    os.kill(int(lines(tmp_path / "tried")[-1].split()[1]), signal.SIGKILL) # the kernel of another is killed
    host = subprocess.run(["sinfo", "-h", "-N", "-o", "%n"], capture_output=True, text=True).stdout.split()[0]
    scontrol("update", f"NodeName={host}", "State=DRAIN", "Reason=test")
    until(lambda: state(cheap, "flu-seed0") not in ("RUNNING", "COMPLETING"))
    time.sleep(3); before = len(lines(tmp_path / "tried"))
    time.sleep(3); assert len(lines(tmp_path / "tried")) == before # nothing starts on a drained node
    scontrol("update", f"NodeName={host}", "State=RESUME")
    settle(cheap)
    table = progress.status(tmp_path / "out")
    assert all(part in table.failed[0] for part in ("flu-seed0", "late-seed0", "flu-seed2", "all")) and "all-mlps" not in table.failed[0] and table.now[0] == ""
    assert "the kernel died" in json.loads((Path(cheap.run_dir) / "jobs/flu-seed0/outcome.json").read_text())["why"]
    assert cluster.recorded(cheap.run_dir)["maps"]["number"] == numbers["maps"] and engines.log_of(cheap.run_dir, numbers["all-mlps-seed1"]).exists()

    made = Counter(lines(tmp_path / "made")); assert made == {f"all-mlps-{s}": 1 for s in range(3)}
    done, said = run(cheap, wait=True)
    assert said.startswith("5 parts are done, 0 in the queue, 7 submitted") and done["state"] == "done"
    assert Counter(lines(tmp_path / "made")) == {f"{l}-{s}": 1 for l in cheap.localizations for s in range(3)} # only what was missing
    assert progress.status(tmp_path / "out").failed[0] == "" and run(cheap)[1] == "12 parts are done, 0 in the queue, 0 submitted"

    assert files(cheap) == files(local(cheap, tmp_path)) and len(files(cheap)) == 22


def test_a_job_that_is_requeued_goes_on(node, cheap, tmp_path):
    job = cheap.model_copy(update={"localizations": ["flu"], "seeds": [0]}) # one part, one job
    slow = tmp_path / "edit.ipynb"; slow.write_text(slow.read_text().replace("time.sleep(2)", "time.sleep(12)")) # longer than it takes to be killed
    run(job)
    number = cluster.recorded(job.run_dir)["all"]["number"]

    def again():
        "Without the two minutes that SLURM waits before it starts a job again"
        until(lambda: state(job, "all") == "PENDING")
        time.sleep(2); scontrol("update", f"JobId={number}", "StartTime=now")
    until(lambda: lines(tmp_path / "tried"))
    scontrol("requeue", number) # as after a failure of the node, or for somebody more important
    again()
    until(lambda: len(lines(tmp_path / "tried")) == 2)
    subprocess.run(["scancel", "--signal=TERM", number], check=True) # SLURM says that it will kill; nobody minds
    subprocess.run(["scancel", "--signal=USR2", number], check=True) # the time is over: submitit requeues
    again()
    settle(job)
    assert len(lines(tmp_path / "tried")) == 3 and lines(tmp_path / "made") == ["flu-0"] and progress.status(tmp_path / "out").failed[0] == ""
    log = "".join(f.read_text() for f in (Path(job.run_dir) / "slurm").glob(f"{number}_0_log.*"))
    assert "Requeued job" in log and "Bypassing signal SIGTERM" in log and run(job)[1] == "1 parts are done, 0 in the queue, 0 submitted"


def test_the_command_that_submits_is_killed_at_any_moment(node, cheap, tmp_path):
    job = cheap.model_copy(update={"seeds": [0]})
    told = tmp_path / "job.json"; told.write_text(json.dumps([job.model_dump(), str(tmp_path)]))
    code = textwrap.dedent(f"""
        import json, sys
        from mechunlearn import engines, grids, runs
        said, work = json.load(open({str(told)!r}))
        maps, edit, attack = (grids.Stage(n, f"{{work}}/{{n}}.ipynb", (p,)) for n, p in
                              (("map", "map.json"), ("edit", "*/seed{{seed}}/edit.json"), ("attack", "*/seed{{seed}}/attack.json")))
        runs.MAPS, runs.ATTACKS, grids.Job.stages = (maps,), (attack,), property(lambda self: (maps, edit, attack))
        print("ready", flush=True)
        engines.run_slurm([grids.Job(**said)], engines.Slurm(time=20))""")
    for pause in (.1, .3, .5, .8):
        process = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        process.stdout.readline(); time.sleep(pause); process.kill(); process.wait()
    done, _ = run(job, wait=True)
    settle(job) # jobs that nobody knew of wait for the others, and find everything done
    assert Counter(lines(tmp_path / "made")) == {f"{l}-0": 1 for l in job.localizations}
    assert run(job)[1] == "6 parts are done, 0 in the queue, 0 submitted" and progress.status(tmp_path / "out").failed[0] == ""


@pytest.mark.slow
def test_ten_kills_at_random_moments(node, cheap, tmp_path):
    random.seed(0)
    mine = lambda: [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ()) and p.pid != os.getpid()]
    for _ in range(10):
        run(cheap)
        time.sleep(random.uniform(.5, 6))
        with suppress(IndexError, psutil.NoSuchProcess): random.choice(mine()).kill() # srun, submitit, a part or a kernel
    until(lambda: run(cheap, wait=True)[0]["state"] == "done", 400)
    assert files(cheap) == files(local(cheap, tmp_path)) and progress.status(tmp_path / "out").failed[0] == ""


def test_what_the_cluster_is_told(node, cheap):
    slurm = Slurm(partition="debug", time="0:20:00", gres="gpu:1", constraint="small", account="nlp", mem="100M", more={"comment": "mine"}, setup=["export MINE=1"])
    made = engines.submit(engines.plan(cheap.model_copy(update={"seeds": [0]}), {}), slurm, at_once=2)
    array = made["flu-seed0"] if "flu-seed0" in made else made["flu"]
    script_ = next((Path(cheap.run_dir) / "slurm").rglob(f"{array.split('_')[0]}_submission.sh")).read_text()
    subprocess.run(["scancel", *made.values()])
    for line in cluster.sbatch_lines(slurm).splitlines(): assert line in script_.replace("'", "")
    for line in ("--array=0-2%2", "--open-mode=append", "--dependency=afterok:", "%A_%a_0_log.out", f"--job-name={cluster.job_name(cheap.run_dir)}", "-P -u -m submitit"): assert line in script_
    with pytest.raises(Refusal, match="nowhere|[Pp]artition"): engines.submit(engines.plan(cheap, {}), Slurm(partition="nowhere"))


@pytest.mark.slow
def test_the_organism_on_slurm_says_the_same_to_the_bit(node, tmp_path):
    grid = {"models": ["organism"], "tasks": [{"name": "sports-athlete-editing", "forget_size": 16}], "localizations": ["flu", "late", "all-mlps"],
            "seeds": [0, 1, 2], "settings": TINY}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    go = lambda out, *more: main(["batch", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / out), "--quiet", "--json", *more])
    assert go("slurm", "--engine", "slurm", "--time", "30", "--sbatch", "comment=tiny") == 0
    [job] = grids.grid(tmp_path / "grid.yaml", str(tmp_path / "slurm"))
    assert len(numbers := {p: t["number"] for p, t in cluster.recorded(job.run_dir).items()}) == 12
    until(lambda: state(job, "flu-seed0") == "RUNNING", 600)
    subprocess.run(["scancel", numbers["late-seed0"]], check=True)
    working = lambda: [p for p in psutil.process_iter(["cmdline"]) if "_job" in (p.info["cmdline"] or ()) and "/flu-seed0/" in " ".join(p.info["cmdline"])]
    until(working)[0].kill()
    host = subprocess.run(["sinfo", "-h", "-N", "-o", "%n"], capture_output=True, text=True).stdout.split()[0]
    scontrol("update", f"NodeName={host}", "State=DRAIN", "Reason=test"); time.sleep(5)
    scontrol("update", f"NodeName={host}", "State=RESUME")
    settle(job, 1800)
    assert go("slurm", "--engine", "slurm", "--time", "30", "--wait") == 0 and go("here") == 0
    from same_run import compare
    tables, differences = compare(tmp_path / "slurm", tmp_path / "here")
    assert tables > 30 and not differences
    texts = [(tmp_path / out / "organism/sports-athlete-editing-16/metrics.parquet").read_bytes() for out in ("slurm", "here")]
    assert texts[0] == texts[1]


# ---- without SLURM

def test_what_cannot_be_said_to_slurm_is_refused():
    asked = lambda words: slurm_of(read(["batch", "grid.yaml", *words.split()]))
    assert asked("") is None and asked("--engine slurm").time == 60
    full = asked("--engine slurm --partition gpu --gres gpu:a100:1 --time 1-12 --account a --qos q --constraint a100&nvlink --mem 80G --cpus 8 --sbatch exclude=n1,n2")
    assert (full.time, full.constraint, full.more) == (2160, "a100&nvlink", {"exclude": "n1,n2"})
    for words, why in {"--partition gpu": "--partition is said to SLURM", "--wait": "--wait", "--engine slurm --time 0": "minutes", "--engine slurm --cpus 0": "cpus", "--engine pbs": "engine",
                       "--engine slurm --sbatch output=x": "set by the engine", "--engine slurm --sbatch x": "KEY=VALUE", "--engine slurm --gres ": "gres"}.items():
        with pytest.raises(Refusal, match=why): asked(words) if not words.endswith(" ") else slurm_of(read(["batch", "g", "--engine", "slurm", "--gres", "two words"]))
    with pytest.raises(Refusal, match="run"): read(["run", "--engine", "slurm"])


def test_where_there_is_no_slurm_it_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "grid.yaml").write_text("models: [organism]\nlocalizations: [flu]\n")
    monkeypatch.setenv("PATH", str(tmp_path)); monkeypatch.setattr(cluster, "find_spec", lambda name: True)
    go = lambda *more: main(["batch", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out"), "--engine", "slurm", *more])
    assert go() == 2 and "there is no sbatch on this machine" in capsys.readouterr().err
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    assert go() == 2 and capsys.readouterr().err == "mechunlearn: --engine slurm needs the package submitit: pip install mechunlearn[slurm]\n"
    assert go("--partition", "gpu", "--dry-run") == 0 and "#SBATCH --partition=gpu" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_queue_that_does_not_answer_is_no_end(tmp_path, monkeypatch):
    root = tmp_path / "m/t"
    runs.write_json(root / "jobs/flu/slurm.json", {"number": "41", "name": cluster.job_name(root)})
    runs.write_json(root / "jobs/flu/job.json", {"job": Job(model="m", run_dir=str(root)).model_dump()})
    gone = tmp_path / "squeue"; gone.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n"); gone.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    row = progress.status(tmp_path).iloc[0]
    assert (row.failed, row.now) == ("", "SLURM does not answer: slurm_load_jobs error: Unable to contact slurm controller")
    gone.write_text("#!/bin/sh\nexit 0\n")
    row = progress.status(tmp_path).iloc[0]
    assert (row.failed, row.now) == ("flu", "")
    runs.write_json(root / "jobs/flu/slurm.json", {"number": "41; rm -rf /", "name": "x"})
    assert cluster.recorded(root) == {}


def test_a_device_of_another_machine_is_not_looked_for_here(monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    job = grids.make_job("organism", "sports-athlete-editing", {"forget_size": 16}, ["flu"], [0], {"device": "cuda"})
    with pytest.raises(Refusal, match="no cuda device"): grids.check_job(job)
    grids.check_job(job, here=False)


# ---- two GPUs that are none

def test_one_worker_a_gpu(cheap, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    notebook(tmp_path / "edit.ipynb", """
        import os, time
        from mechunlearn.store import make
        time.sleep(1)
        for l in localizations:
            for s in seeds: make(f"{run_dir}/{l}/seed{s}/edit.json", dict(l=l, s=s), lambda: os.environ["CUDA_VISIBLE_DEVICES"])""")
    job, stages = cheap.model_copy(update={"seeds": [0], "localizations": ["flu", "late"], "settings": {}}), cheap.stages[1:2]
    assert runs.workers_for([job]) == 2
    assert runs.run_batch([job], runs.workers_for([job]), quiet=True, stages=stages)[0]["state"] == "done"
    seen = [json.loads((Path(job.run_dir) / l / "seed0/edit.json").read_text()) for l in job.localizations]
    assert set(seen) == {"0", "1"}
    spread = job.model_copy(update={"settings": {"device_map": "auto"}, "run_dir": str(tmp_path / "out/m/spread")})
    assert runs.workers_for([spread]) == 1
    assert runs.run_batch([spread], 1, quiet=True, stages=stages)[0]["state"] == "done"
    assert {json.loads((Path(spread.run_dir) / l / "seed0/edit.json").read_text()) for l in job.localizations} == {"0,1"}


@pytest.mark.parametrize("devices, settings, workers, expected", [
    ("0,1", {}, 2, ["0", "1"]), ("0,1", {}, 3, ["0", "1", "0"]), ("0,1", {}, 1, [None]), ("", {}, 2, [None, None]), ("GPU-a,GPU-b", {}, 2, ["GPU-a", "GPU-b"]),
    ("0,1,2,3", {"device_map": "auto"}, 2, ["0,2", "1,3"]), ("0,1", {"device_map": "auto"}, 3, ["0", "1", "0"]), ("0,1", {"device": "cuda:1"}, 2, [None, None])])
def test_the_gpus_of_each_worker(devices, settings, workers, expected, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert [runs.gpus_of(Job(model="m", run_dir="x", settings=settings), k, workers) for k in range(workers)] == expected


def test_a_model_is_spread_from_the_command_line(capsys):
    from mechunlearn.options import settings_of
    for command in ("run", "localize", "edit", "attack", "sweep"): assert settings_of(read([command, "--device-map", "auto"])) == {"device_map": "auto"}
    with pytest.raises(Refusal, match="say one of them"): settings_of(read(["run", "--device", "cuda", "--device-map", "auto"]))
    with pytest.raises(Refusal, match="device_map"): settings_of(read(["run", "--device-map", "disk"]))
