"""A real SLURM of one node (tests/slurm_node.sh), and what happens to a grid on it

The first tests use stages that cost nothing; the last one, marked slow, edits the organism. Without SLURM's Debian packages, or
without submitit, all that need them skip.
"""
import importlib, json, os, shutil, signal, subprocess, sys, textwrap, time
from collections import Counter
from pathlib import Path

import nbformat, psutil, pytest, yaml

from mechunlearn import cluster, engines, grids, progress, runs
from mechunlearn.cli import main, read
from mechunlearn.cluster import Queued, Slurm
from mechunlearn.grids import Job, Stage
from mechunlearn.options import slurm_of
from mechunlearn.runs import parts
from mechunlearn.store import Refusal

NODE = Path(__file__).with_name("slurm_node.sh")
TINY = {"max_facts": {"retain": 8, "retain/mcq": 4, "same-subject": 8, "other-relation": 8, "ghost": 8, "ghost/mcq": 4, "general": 4},
        "steps": 3, "relearning": {"steps": 2, "max_facts": 8}, "latents": {"n_train": 60, "max_facts": 8}}


def script(*words): return subprocess.run([str(NODE), *words], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def node(tmp_path_factory):
    "A SLURM that answers: the one that is there, or one of our own; skips where there can be none"
    pytest.importorskip("submitit", reason="no submitit: pip install mechunlearn[slurm]")
    if shutil.which("sinfo") and not subprocess.run(["sinfo", "-h"], capture_output=True, timeout=60).returncode: yield; return
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if missing := [t for t in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(t, path=path)]:
        pytest.skip(f"no {missing[0]}: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge")
    with pytest.MonkeyPatch.context() as env:
        env.setenv("MECHUNLEARN_SLURM", str(tmp_path_factory.mktemp("slurm")))
        started = script("start")
        if started.returncode: pytest.skip(f"no SLURM: {started.stderr.strip()}")
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

    here = cheap.model_copy(update={"run_dir": str(tmp_path / "local/m/t")}) # the same by the local engine
    assert runs.run_batch([here], quiet=True)[0]["state"] == "done"
    files = lambda root: {str(f.relative_to(root)): f.read_bytes() for f in sorted(Path(root).rglob("*.json")) if f.parent.name.startswith("seed") or f.name == "map.json"}
    assert files(cheap.run_dir) == files(here.run_dir) and len(files(here.run_dir)) == 22
