"""Add runs to nbs/recorded without making everything again

    python tests/add_recorded.py RUN_FOLDER...                of `mechunlearn batch`
    python tests/add_recorded.py --sweep sweep.parquet...     of `mechunlearn sweep`

Of each run the maps, localizations and evaluations are added that the tables lack for its model, task and number of facts; what is there stays.
Refused if the tables were recorded with other sources: then `make record`, or tests/recheck_recorded.py, comes first. `make record`
forgets what was added here, unless configs/ has it too.
"""
import argparse
import sys
from pathlib import Path

import pandas as pd

from mechunlearn import recorded_tables as R, scorecard

RECORDED = Path(__file__).resolve().parents[1] / "nbs" / "recorded"
KEYS = {"metrics": ["localization", "evaluation"], "records_small": ["localization", "evaluation"], "scorecard": ["localization"], "localizations": ["localization"],
        "training": ["localization"], "probing": [], "removal": []}
SWEPT = ["localization", "draw", "seed", "lr", "inject"]


def lacking(old, new, keys):
    "Rows of `new` whose model, task, number of facts and `keys` are nowhere in `old`"
    keys = [*R.WHICH, *keys]
    words = lambda t: t[keys].astype(object).where(t[keys].notna(), None).apply(tuple, axis=1)
    return new[~words(new).isin(set(words(old)))]


def add(name, new, keys, folder):
    file = folder / f"{name}.parquet"
    old = pd.read_parquet(file)
    more = lacking(old, new, keys)
    if len(more):
        more = more.reindex(columns=old.columns)
        kinds = {c: t for c, t in old.dtypes.drop(R.WHICH).items() if t.kind not in "iub" or more[c].notna().all()} # whole numbers have no gaps
        pd.concat([old, more.astype(kinds)], ignore_index=True).to_parquet(file, index=False, compression="zstd")
    return len(more)


def main(words=None, folder=RECORDED):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args(words)
    if args.sweep: return print(f"sweep: {sum(add('sweep', pd.read_parquet(f), SWEPT, folder) for f in args.runs)} rows added")
    if stale := set(R.check_recorded(folder)) & set(KEYS): sys.exit(f"recorded with other sources: {', '.join(sorted(stale))}")
    for run in args.runs:
        tables, which = R.tables_of(scorecard.find(run)), dict(zip(R.WHICH, R._which(run)))
        for name, keys in KEYS.items():
            new = tables[name]
            if len(new): print(f"{run}: {name}: {add(name, new.assign(**which), keys, folder)} rows added")


if __name__ == "__main__": main()
