"""How long does `mechunlearn report` take over many runs?

    python benchmarks/report.py [RUN_FOLDER ...] [--copies 200] [--out FOLDER]

Copies of the run folders (default: invented ones of three localizations and two seeds) are reported as one table, first with nothing
computed before (`first_s`), then with the metrics kept (`again_s`). One JSON object: name, runs, rows, first_s, again_s, load_s, equal
(the table of each kind of run is, to the bit, that of `report.metrics`). Times hold for the command with its start.
"""
import argparse, json, shutil, subprocess, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1]/"tests"))

def copies(sources, n, out):
    "n run folders, the sources in turn, without metrics and pages"
    leave = shutil.ignore_patterns("metrics.parquet*", "report.html", "jobs", "notebooks", "*.safetensors*")
    for k in range(n): shutil.copytree(sources[k % len(sources)], out/f"copy-{k:04d}/run", ignore=leave)

def seconds(out):
    "Of the command, in a process of its own"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mechunlearn.cli", "report", out], check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - start, 1)

def main():
    p = argparse.ArgumentParser()
    p.add_argument("folders", nargs="*", type=Path)
    p.add_argument("--copies", type=int, default=200)
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    from synthetic import synthetic_run
    from mechunlearn import report
    out = Path(args.out or tempfile.mkdtemp())
    stages = ("maps", "localizations", "training", "standard", "relearning")
    sources = args.folders or [synthetic_run(out/"sources/run", ("flu", "late", "random-mlps#0"), seeds=(0, 1), n=16, stages=stages)]
    copies(sources, args.copies, out/"runs")
    first, again = seconds(out/"runs"), seconds(out/"runs")
    start = time.perf_counter()
    table = report.load(out/"runs")
    took, runs = round(time.perf_counter() - start, 1), table.run.unique()
    equal = all(table[table.run == r].drop(columns="run").reset_index(drop=True).equals(report.metrics(s)) for s, r in zip(sources, runs))
    print(json.dumps({"name": "report", "runs": len(runs), "rows": len(table), "first_s": first, "again_s": again, "load_s": took, "equal": equal}))

if __name__ == "__main__": main()
