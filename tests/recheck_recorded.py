"""Are the recorded tables still what the code gives, where recording them all again would take hours?

    python tests/recheck_recorded.py [--out FOLDER] [--write]

Runs a small part of `make record` anew (64 athletes of the organism, seed 0: all maps, and the edits of two localizations with
their attacks), compares every number with nbs/recorded, and lists what differs by more than .005, of the probes .01 (another machine
rounds another way, and one prediction is .0095). With --write, and only if nothing
does, the hashes of the sources in nbs/recorded/sources.json are brought up to date.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from mechunlearn import recorded_tables, runs, scorecard

RECORDED = Path(__file__).resolve().parents[1] / "nbs" / "recorded"
WHO = dict(model="organism", task="sports-athlete-editing", forget_size=64)
LOCALIZATIONS = ("flu", "late")
TOLERANCE = {"probing": .01}  # else .005
KEYS = {"probing": ["layer", "position", "control"], "removal": ["first", "last"], "traced": ["method", "component"], "trace_grid": ["kind", "layer", "position"],
        "paths": ["method", "component"], "localizations": ["localization", "layer"],
        "records_small": ["localization", "seed", "evaluation", "format", "group", "layer", "setting", "step", "fact"]}


def fresh(out: str) -> dict[str, pd.DataFrame]:
    job = runs.make_job(WHO["model"], WHO["task"], {"forget_size": WHO["forget_size"]}, LOCALIZATIONS, [0], {}, out)
    done = runs.run_batch([job])[0]
    if done["state"] != "done":
        sys.exit(f"{done['run_dir']}: {done['why']}")
    return recorded_tables.tables_of(scorecard.find(job.run_dir))


def recorded(name: str) -> pd.DataFrame:
    t = pd.read_parquet(RECORDED / f"{name}.parquet")
    t = t[(t.model == WHO["model"]) & (t.task == WHO["task"]) & (t.forget_size == WHO["forget_size"])]
    return t.drop(columns=list(WHO))


def differences(name: str, new: pd.DataFrame) -> tuple[int, float, list[str]]:
    "Rows compared, the largest difference of a number, and what differs"
    keys, old, most = KEYS[name], recorded(name), TOLERANCE.get(name, .005)
    if "localization" in keys:
        own = [*LOCALIZATIONS, "none"]
        old, new = (t[t.localization.isin(own)] for t in (old, new))
    if "seed" in keys:
        old, new = (t[t.seed == 0] for t in (old, new))
    both = new.astype({k: str for k in keys}).merge(old.astype({k: str for k in keys}), on=keys, suffixes=("", " then"), how="outer", indicator=True)
    why, worst = [f"{name}: {n} rows {side.replace('left_only', 'only now').replace('right_only', 'only then')}"
                  for side, n in both._merge.value_counts().items() if side != "both" and n], 0.
    both = both[both._merge == "both"]
    for c in [c for c in new.columns if f"{c} then" in both]:
        a, b = both[c], both[f"{c} then"]
        if pd.api.types.is_numeric_dtype(a) or pd.api.types.is_bool_dtype(a):
            gap = np.abs(a.astype(float) - b.astype(float))
            gap = gap.where(~(a.isna() & b.isna()), 0.).fillna(np.inf)
            worst = max(worst, float(gap.max()))
            if (gap > most).any():
                why.append(f"{name}: {c} differs in {(gap > most).sum()} of {len(gap)} rows, by at most {gap.max():.3g}")
        elif (other := a.fillna("").astype(str) != b.fillna("").astype(str)).any():
            why.append(f"{name}: {c} differs in {other.sum()} of {len(a)} rows")
    return len(both), worst, why


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="runs/recheck")
    p.add_argument("--write", action="store_true")
    args = p.parse_args()
    tables, wrong = fresh(args.out), []
    for name in KEYS:
        n, worst, why = differences(name, tables[name])
        print(f"{name}: {n} rows, largest difference {worst:.2g}")
        wrong += why if n else [f"{name}: nothing to compare"]
    print("\n".join(wrong) or "nothing differs")
    if wrong:
        sys.exit(1)
    if args.write:
        known = {name: recorded_tables.source_hashes(name) for name in (*recorded_tables.RECORDED, *recorded_tables.APART)}
        (RECORDED / "sources.json").write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
