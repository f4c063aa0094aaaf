"""Kill a run at random moments, resume it, and see whether anything is lost or differs.

    python benchmarks/kills.py --rounds 200 --seed 0 --out /tmp/kills

One life is a run from an empty folder to its end through every stage and every attack, killed many times on its way
and resumed each time by the same command: `mechunlearn batch` with its worker and its kernels, nothing imitated.
A round is one kill. Its stage is drawn first, then how it is killed, then a moment in the time that the stage takes:

- tree: the command, its worker and the kernel at once, as when the power goes
- cli: the command alone; the next one starts while the orphans may still be at work
- worker, kernel: one of the two; the command ends by itself and says so (a kernel that dies while it starts is replaced, and the run goes on)
- write: the tree, at the instant at which a file of the run folder is begun, filled, or put in its place

After every kill each finished artefact is remembered (its time and its bytes): it may never be made again. No file may
contradict its sidecar, no JSON may be torn. At the end of a life every result must have the bytes of a run that was
never killed. A round takes 10 to 40 seconds on one core, most of it the start of a kernel.
With `--minutes 9` it stops after nine minutes and the same command goes on from there, until results/kills.json is written."""
import argparse, ctypes, json, os, random, select, shutil, signal, struct, subprocess, sys, time
from collections import Counter
from contextlib import suppress
from pathlib import Path
import psutil
from mechunlearn.runs import PIPELINE, grid, read_json, write_json
from mechunlearn.store import provenance, sha256, sidecar

GRID = """
models: [organism]
tasks: [{name: sports-athlete-editing, forget_size: 4}]
localizations: [late]
attacks: all
settings:
  steps: 1
  max_facts: {forget: 1, retain: 1, ghost: 1, same-subject: 1, other-relation: 1, general: 1}
  relearning: {steps: 1, max_facts: 1, low_resource: false}
  latents: {n_train: 8, n_control: 1, max_facts: 1}
  soft: {ks: [1], prompts: 1, steps: 1, batch: 1, retain_batch: 1, max_facts: 1}
  hardened: {shots: [0], n_all_orders: 0, max_facts: 1}
  generation: {max_facts: 1, more: 0}
"""
STAGES = [s.name for s in PIPELINE[:10]]
KINDS = {"tree": 7, "cli": 2, "worker": 2, "kernel": 2, "write": 7} # how often, in twentieths
PER_LIFE = 40  # kills
PATIENCE = 180 # seconds a run may take to reach the next stage, or to end


# ---- what is in a run folder

def finished(
    run:Path, # run folder
) -> tuple[dict, list]: # path -> (time, bytes) of what is whole; what contradicts its sidecar
    "Every artefact that has its sidecar"
    whole, damaged = {}, []
    for side in sorted(run.rglob("*.meta.json")):
        file = Path(str(side).removesuffix(".meta.json"))
        try: said, stat = json.loads(side.read_text())["sha256"], file.stat()
        except (OSError, ValueError): damaged.append(str(file.relative_to(run))); continue
        if said == sha256(file): whole[str(file.relative_to(run))] = stat.st_mtime_ns, said
        else: damaged.append(str(file.relative_to(run)))
    return whole, damaged

def torn(
    run:Path, # run folder
) -> list[str]: # JSON files that cannot be read
    "Small files that a kill has left half written"
    bad = []
    for file in run.rglob("*.json"):
        try: json.loads(file.read_text())
        except ValueError: bad.append(str(file.relative_to(run)))
        except OSError: pass # an orphan has just replaced it
    return bad

def contents(
    run:Path, # a run folder at its end
) -> dict: # path -> checksum
    "The results: tables, localizations and edits, without sidecars, notebooks and logs"
    results = [f for f in sorted(run.rglob("*")) if f.suffix in (".parquet", ".json", ".safetensors") and not f.name.endswith(".meta.json")]
    return {str(f.relative_to(run)): sha256(f) for f in results if f.relative_to(run).parts[0] != "jobs"}

def leftovers(
    run:Path, # a run folder at its end
) -> list[str]:
    "Temporary files that nobody will finish"
    return [str(f.relative_to(run)) for f in run.rglob("*") if f.suffix == ".tmp" or ".running." in f.name or ".failed." in f.name]


# ---- the running command

def start(
    grid_file:Path, # what to run
    out:Path, # where
) -> subprocess.Popen:
    "The command that is typed again after every kill"
    for old in out.rglob("steps.jsonl"): old.unlink()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"OMP_NUM_THREADS": "1"} # modules are compiled once
    with open(out/"log.txt", "a") as log:
        return subprocess.Popen([sys.executable, "-m", "mechunlearn.cli", "batch", str(grid_file), "--out", str(out), "--quiet"],
                                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=out, env=env, start_new_session=True)

def step(
    run:Path, # run folder
) -> tuple[str, str, float]: # stage, state, when it began; empty before the first
    "What the worker has said last"
    try: last = json.loads((run/"jobs"/"all"/"steps.jsonl").read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError): return "", "", 0.
    return last["stage"], last["state"], last["start"]

def tree(
    process:subprocess.Popen, # the command
) -> dict: # "cli", "worker", "kernel" -> processes, those that are there
    "The processes of a run"
    found = {"cli": [], "worker": [], "kernel": []}
    with suppress(psutil.NoSuchProcess):
        me = psutil.Process(process.pid)
        found["cli"].append(me)
        for p in me.children(recursive=True):
            with suppress(psutil.NoSuchProcess): found["worker" if "_job" in p.cmdline() else "kernel"].append(p)
    return found

def end(
    processes, # of psutil
):
    "SIGKILL, the writer first"
    for p in list(processes)[::-1]:
        with suppress(psutil.NoSuchProcess): p.send_signal(signal.SIGKILL)

def end_tree(
    process:subprocess.Popen, # the command
):
    "SIGKILL for all; stopped first, so that nothing is born meanwhile"
    with suppress(psutil.NoSuchProcess):
        for p in [x for name in ("cli", "worker") for x in tree(process)[name]]: p.suspend()
    end(p for name in ("cli", "worker", "kernel") for p in tree(process)[name])
    process.wait()


# ---- the instant of a write

BEGUN, FILLED, PLACED = 0x100, 0x2, 0x80 # inotify: IN_CREATE, IN_MODIFY, IN_MOVED_TO

class Watch:
    "File events of a run folder, told by the kernel as they happen"
    def __init__(self,
        folders, # to watch; made if absent
    ):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self.libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for f in folders:
            f.mkdir(parents=True, exist_ok=True)
            if self.libc.inotify_add_watch(self.fd, str(f).encode(), BEGUN | FILLED | PLACED) < 0: raise OSError(ctypes.get_errno(), f"cannot watch {f}")

    def close(self): os.close(self.fd)

    def events(self,
        timeout:float, # seconds to wait for the first
    ) -> list[tuple[int, str]]: # kind of event, file name
        "What has happened since the last call"
        if not select.select([self.fd], [], [], timeout)[0]: return []
        data, at, out = os.read(self.fd, 1 << 16), 0, []
        while at < len(data):
            _, mask, _, n = struct.unpack_from("iIII", data, at)
            out.append((mask, data[at + 16:at + 16 + n].rstrip(b"\0").decode())); at += 16 + n
        return [(mask & (BEGUN | FILLED | PLACED), name) for mask, name in out if name.endswith(".tmp") or mask & PLACED]


# ---- rounds

def plan(
    rounds:int, # kills
    seed:int, # of everything drawn
    durations:dict, # seconds by stage
    writes:dict, # files written by stage
) -> list[dict]: # in the order of their stages, life by life
    "Which stage, how, and when"
    rng, drawn = random.Random(seed), []
    for k in range(rounds):
        stage, kind = STAGES[k % len(STAGES)], rng.choices(list(KINDS), KINDS.values())[0]
        moment = rng.uniform(rng.choice([0, .7]), 1) * durations[stage]
        drawn.append(dict(stage=stage, kind=kind, moment=moment, write=rng.randint(1, writes[stage]), event=rng.choice([BEGUN, FILLED, PLACED])))
    rng.shuffle(drawn)
    lives = [drawn[i:i + PER_LIFE] for i in range(0, rounds, PER_LIFE)]
    early = lambda d: (STAGES.index(d["stage"]), d["write"] if d["kind"] == "write" else 0, d["moment"]) # what may let its stage end comes last
    return [sorted(life, key=early) for life in lives]

def reach(
    process:subprocess.Popen, # the command
    run:Path, # run folder
    stage:str, # to wait for, or a later one
) -> str: # "", or why it was not reached
    "Wait until a stage is being worked on"
    until = time.time() + PATIENCE
    while time.time() < until:
        now, state, _ = step(run)
        if now and (STAGES.index(now), state == "running") >= (STAGES.index(stage), True): return ""
        if process.poll() is not None: return "ended" if process.returncode == 0 else "failed"
        time.sleep(.02)
    return "stuck"

def write_moment(
    process:subprocess.Popen, # the command
    run:Path, # run folder
    watch:Watch, # of its folders
    drawn:dict, # which write of which stage, and what of it
):
    "Kill at a write; if the stage writes less than that, at the next one after it"
    seen, pids, until = 0, [], time.time() + PATIENCE
    while process.poll() is None and time.time() < until:
        happened = watch.events(.2)
        for event, name in happened:
            seen += event == BEGUN
            if event == drawn["event"] and (seen >= drawn["write"] or step(run)[0] != drawn["stage"]): end(pids); process.wait(); return
        if not happened: pids = [p for name in ("cli", "worker", "kernel") for p in tree(process)[name]]
    end_tree(process)

def strike(
    process:subprocess.Popen, # the command
    run:Path, # run folder
    watch:Watch, # of its folders
    drawn:dict, # kind, moment, ...
) -> str: # the kind that it was in the end
    "Kill as drawn, at the moment drawn"
    if drawn["kind"] == "write": write_moment(process, run, watch, drawn); return "write"
    time.sleep(max(0, step(run)[2] + drawn["moment"] - time.time()))
    kind, there = drawn["kind"], tree(process)
    if kind == "tree" or not there.get(kind): end_tree(process); return "tree"
    end(there[kind])
    try: process.wait(60) # told that its worker is gone, it ends
    except subprocess.TimeoutExpired: end_tree(process); return "kernel replaced" if kind == "kernel" else "stuck"
    return kind

def one_round(
    process:subprocess.Popen, # the command, which has reached the stage
    run:Path, # run folder
    watch:Watch, # of its folders
    drawn:dict, # the kill
) -> dict: # stage, state, kind, seconds into the stage, inside (a write was cut), torn, damaged
    "One kill, and what it has left"
    gone = [p for ps in tree(process).values() for p in ps]
    kind = strike(process, run, watch, drawn)
    stage, state, began = step(run)
    at, half = round(time.time() - began, 2), [f for f in run.rglob("*.tmp") if "jobs" not in f.parts]
    bare = [f for s in PIPELINE for pattern in s.artefacts for f in run.glob(pattern.format(seed=0))
            if not f.name.endswith(".meta.json") and not sidecar(f).exists()]
    if kind != "cli": psutil.wait_procs(gone, 10)
    return dict(stage=stage, state=state, kind=kind, seconds=at, inside=bool(half or bare), torn=torn(run), code=process.returncode)

def remade(
    before:dict, # of `finished`, earlier
    after:dict, # later
) -> list[str]: # finished artefacts that were touched since
    "What was lost"
    unfinished = () if "notebooks/20_finetuning.ipynb" in before else ("edit.json", "training.parquet") # an edit is whole with its tensors, which go last
    spared = ("edit.safetensors", "metrics.parquet", *unfinished)
    return [f for f, was in before.items() if tuple(after.get(f, ())) != tuple(was) and f.split("/")[-1] not in spared]

def new_life() -> dict: # what is known of a life so far
    "Nothing yet"
    return dict(tried=0, rounds=[], lost=[], damaged=[], failed=[], whole={}, took=0., ended=False)

def look(
    life:dict, # changed
    run:Path, # run folder
):
    "Compare what is finished with what was"
    now, bad = finished(run)
    life["lost"] += remade(life["whole"], now)
    life["damaged"] += bad
    life["whole"] = now

def next_kill(
    life:dict, # changed
    grid_file:Path, # what to run
    out:Path, # of this life
    run:Path, # run folder
    watch:Watch, # of its folders
    drawn:dict, # the kill
):
    "Start or resume, kill, and look"
    process = start(grid_file, out)
    if why := reach(process, run, drawn["stage"]):
        if why != "ended": life["failed"].append(f"{drawn['stage']}: {why}")
        if why == "stuck": end_tree(process)
    else:
        watch.events(0)
        life["rounds"].append(r := one_round(process, run, watch, drawn))
        print(f"{out.name} {len(life['rounds']):3d}  {r['kind']:6s} in {r['stage']} after {r['seconds']:.1f} s{', inside a write' if r['inside'] else ''}", flush=True)
    look(life, run)
    if life["lost"]: print(f"LOST {life['lost']}", flush=True)

def last_run(
    life:dict, # changed
    grid_file:Path, # what to run
    out:Path, # of this life
    run:Path, # run folder
    right:dict, # `contents` of a run that was not killed
):
    "To the end, and compare"
    process = start(grid_file, out)
    try: code = process.wait(2 * PATIENCE)
    except subprocess.TimeoutExpired: end_tree(process); code = "stuck"
    look(life, run)
    if code != 0: life["failed"].append(f"the last run ended with {code}")
    now = contents(run)
    life |= dict(differ=sorted(f for f in now.keys() | right.keys() if now.get(f) != right.get(f)), compared=len(right), leftovers=leftovers(run), ended=True)

def one_life(
    grid_file:Path, # what to run
    out:Path, # its folder
    kills:list[dict], # of `plan`
    right:dict, # `contents` of a run that was not killed
    until:float, # time to stop at
) -> dict: # tried, rounds, lost, damaged, failed, ended, and at the end differ, compared, leftovers
    "From nothing to the end, with kills; what was done before counts"
    out.mkdir(parents=True, exist_ok=True)
    file, run = Path(f"{out}.json"), Path(grid(grid_file, str(out))[0].run_dir)
    life = read_json(file) or new_life()
    watch = Watch(sorted({(run/f).parent for f in [*right, "notebooks/x"]}))
    while not life["ended"] and time.time() < until:
        begin = time.time()
        if life["tried"] < len(kills): next_kill(life, grid_file, out, run, watch, kills[life["tried"]]); life["tried"] += 1
        else: last_run(life, grid_file, out, run, right)
        life["took"] += time.time() - begin
        write_json(file, life)
    watch.close()
    return life

def reference(
    grid_file:Path, # what to run
    out:Path, # an empty folder
) -> tuple[dict, dict, dict]: # `contents`; seconds by stage; files written by stage
    "A run that is not killed"
    out.mkdir(parents=True)
    run = Path(grid(grid_file, str(out))[0].run_dir)
    watch = Watch([run/d for d in ("", "scores", "localizations", "notebooks", "late/seed0", "none/seed0")])
    process, writes = start(grid_file, out), Counter(dict.fromkeys(STAGES, 0))
    while process.poll() is None:
        for event, name in watch.events(.2):
            if event == BEGUN and (stage := step(run)[0]): writes[stage] += 1
    watch.close()
    if process.returncode: sys.exit(f"the run without kills ended with {process.returncode}: {(out/'log.txt').read_text()[-500:]}")
    steps = [json.loads(l) for l in (run/"jobs/all/steps.jsonl").read_text().splitlines()]
    return contents(run), {s["stage"]: s["seconds"] for s in steps if s["state"] == "done"}, {s: max(1, n) for s, n in writes.items()}

def summary(
    lives:list[dict], # of `one_life`
    args, # parsed options
    durations:dict, # seconds by stage of the run without kills
) -> dict: # what is kept
    "Counts over all lives"
    rounds = [r for life in lives for r in life["rounds"]]
    files, differ = sum(l["compared"] for l in lives), [f"life {k}: {f}" for k, l in enumerate(lives) for f in l["differ"]]
    return {"rounds": len(rounds), "seed": args.seed, "lives": len(lives),
            "hits": dict(Counter(r["stage"] or "before the first stage" for r in rounds)), "between stages": sum(r["state"] != "running" for r in rounds),
            "kinds": dict(Counter(r["kind"] for r in rounds)), "inside a write": sum(r["inside"] for r in rounds),
            "lost": [f for l in lives for f in l["lost"]], "damaged": [f for l in lives for f in l["damaged"]],
            "torn": dict(Counter(f for r in rounds for f in r["torn"])), "failed": [f for l in lives for f in l["failed"]],
            "leftovers": [f for l in lives for f in l["leftovers"]], "byte_identical": f"{files - len(differ)} of {files}", "differ": differ,
            "seconds": round(sum(l["took"] for l in lives)), "stage seconds": {k: round(v, 1) for k, v in durations.items()},
            "machine": {k: v for k, v in provenance().items() if k != "time"} | {"cores": len(os.sched_getaffinity(0))},
            "each": [[r["stage"], r["kind"], r["seconds"], r["inside"]] for r in rounds]}

def main():
    "Kill and resume; exit code 1 if anything was lost or differs"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("runs/kills"), help="folder for the runs; what is there already goes on")
    p.add_argument("--minutes", type=float, default=float("inf"), help="stop after these; the same command goes on from there")
    p.add_argument("--result", type=Path, default=Path(__file__).parent/"results"/"kills.json")
    args = p.parse_args()
    out, lives, until = args.out.resolve(), [], time.time() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True); grid_file = out/"grid.yaml"; grid_file.write_text(GRID)
    if not (out/"whole.json").exists(): shutil.rmtree(out/"whole", ignore_errors=True); write_json(out/"whole.json", reference(grid_file, out/"whole"))
    right, durations, writes = read_json(out/"whole.json")
    print(f"without kills: {sum(durations.values()):.0f} s, {len(right)} results, writes by stage {writes}", flush=True)
    for k, kills in enumerate(plan(args.rounds, args.seed, durations, writes)):
        lives.append(one_life(grid_file, out/f"life{k}", kills, right, until))
        if not lives[-1]["ended"]: print("stopped: the same command goes on from here"); sys.exit(3)
    found = summary(lives, args, durations)
    args.result.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "each"}, indent=1))
    sys.exit(any(found[k] for k in ("lost", "damaged", "failed", "differ")))


if __name__ == "__main__": main()
