"""How long does `mechunlearn report` take over many runs?

    python benchmarks/report.py [RUN_FOLDER ...] [--copies 200] [--large] [--kept] [--before CHECKOUT] [--out FOLDER]

Copies of the run folders are reported as one table, first with nothing computed before (`first_s`), then with the metrics kept (`again_s`); both are
seconds of the command with its start. Default: one invented run of three localizations and two seeds; with `--large` one of nine localizations
(eleven with draws), three seeds and latent knowledge. With `--kept` the copies have their metrics, as runs that `batch` finished do. One JSON object: name, source, runs, records, rows, first_s, again_s, load_s (`report.load` once they are kept),
equal (the rows of every copy are, to the bit, what `report.metrics` gives for the run by itself). `--before` names an older checkout: one_before_s is what
its `report.metrics` takes for the first run folder, one_s what ours takes, equal_before whether both give the same to the bit.
"""
import argparse, json, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1]/"tests"))

SMALL = dict(edits=("flu", "late", "random-mlps#0"), seeds=(0, 1), n=16, stages=("maps", "localizations", "training", "standard", "relearning"))
ONE = "import sys, time; from mechunlearn import report; t = time.perf_counter(); m = report.metrics(sys.argv[1]); print(time.perf_counter() - t); m.to_pickle(sys.argv[2])"

def copies(sources, n, out, kept):
    "n run folders, the sources in turn, without pages, and without metrics if they are not kept"
    leave = shutil.ignore_patterns(*([] if kept else ["metrics.parquet*"]), "report.html", "jobs", "notebooks", "*.safetensors*")
    for k in range(n): shutil.copytree(sources[k % len(sources)], out/f"copy-{k:04d}/run", ignore=leave)

def seconds(out):
    "Of the command, in a process of its own"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mechunlearn.cli", "report", out], check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - start, 1)

def by(checkout, run, file):
    "The metrics of a run as a checkout of the package computes them, and the seconds"
    env = os.environ | {"PYTHONPATH": str(checkout)}
    said = subprocess.run([sys.executable, "-c", ONE, run, file], check=True, capture_output=True, text=True, env=env, cwd=checkout).stdout
    import pandas as pd
    return pd.read_pickle(file), round(float(said.split()[-1]), 2)

def main():
    p = argparse.ArgumentParser()
    p.add_argument("folders", nargs="*", type=Path)
    p.add_argument("--copies", type=int, default=200)
    p.add_argument("--large", action="store_true")
    p.add_argument("--kept", action="store_true")
    p.add_argument("--before", type=Path)
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    from synthetic import synthetic_run
    from mechunlearn import report
    out = Path(args.out or tempfile.mkdtemp())
    sources = [f.resolve() for f in args.folders] or [synthetic_run(out/"sources/run", **({} if args.large else SMALL))]
    if args.kept: [seconds(s) for s in sources]
    copies(sources, args.copies, out/"runs", args.kept)
    first, again = seconds(out/"runs"), seconds(out/"runs")
    start = time.perf_counter()
    table = report.load(out/"runs")
    took, runs = round(time.perf_counter() - start, 1), table.run.unique()
    alone = [report.metrics(s) for s in sources]
    of = dict(list(table.drop(columns="run").groupby(table.run)))
    equal = all(of[r].reset_index(drop=True).equals(alone[k % len(sources)]) for k, r in enumerate(runs))
    records = sum(len(report.records(s)) for s in sources)*args.copies//len(sources)
    said = {"name": "report", "source": "given" if args.folders else "large" if args.large else "small", "kept": args.kept, "runs": len(runs), "records": records, "rows": len(table), "first_s": first, "again_s": again, "load_s": took, "equal": equal}
    if args.before:
        (old, before), (new, now) = (by(c, sources[0], out/f"{k}.pkl") for k, c in enumerate((args.before, Path(__file__).resolve().parents[1])))
        said |= {"one_before_s": before, "one_s": now, "equal_before": old.equals(new)}
    print(json.dumps(said))

if __name__ == "__main__": main()
