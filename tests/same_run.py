"""Do two runs say the same, to the bit?

    python tests/same_run.py OLD NEW

OLD and NEW are run folders (or folders of several), made by two versions of the code from the same command. Every record, map and
metric is compared exactly; seconds and times are not. Prints what differs, and ends with 1 if anything does.
"""
import sys
from pathlib import Path

import pandas as pd

from mechunlearn.metrics import metrics

CLOCK = ("seconds", "took", "time")  # columns that no two runs share


def differences(name: str, old: pd.DataFrame, new: pd.DataFrame) -> list[str]:
    "In words, what is not the same in two tables"
    old, new = (t.drop(columns=[c for c in t if c in CLOCK]) for t in (old, new))
    if list(old.columns) != list(new.columns):
        return [f"{name}: columns {sorted(set(old.columns) ^ set(new.columns)) or 'in another order'}"]
    if len(old) != len(new):
        return [f"{name}: {len(old)} rows, then {len(new)}"]
    same = {c: (old[c].reset_index(drop=True) == new[c].reset_index(drop=True)).fillna(False) | (old[c].isna().values & new[c].isna().values) for c in old}
    return [f"{name}: {c} differs in {int((~s).sum())} of {len(s)} rows" for c, s in same.items() if not s.all()]


def runs_of(root: Path) -> dict[str, Path]:
    return {str(f.parent.relative_to(root)): f.parent for f in sorted(root.rglob("run.json"))}


def compare(old: Path, new: Path) -> tuple[int, list[str]]:
    "Tables compared, and what differs"
    one, other = runs_of(old), runs_of(new)
    n, why = 0, [f"{r}: only in one of them" for r in sorted(one.keys() ^ other.keys())]
    for r in sorted(one.keys() & other.keys()):
        files = [{str(f.relative_to(d)): f for f in d.rglob("*.parquet") if f.name != "metrics.parquet"} for d in (one[r], other[r])]
        why += [f"{r}/{f}: only in one of them" for f in sorted(files[0].keys() ^ files[1].keys())]
        tables = {f: [pd.read_parquet(side[f]) for side in files] for f in sorted(files[0].keys() & files[1].keys())}
        tables["metrics"] = [metrics(d) for d in (one[r], other[r])]
        n += len(tables)
        why += [line for f, both in tables.items() for line in differences(f"{r}/{f}", *both)]
    return n, why


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    n, why = compare(*map(Path, sys.argv[1:]))
    print("\n".join(why) or f"{n} tables, all the same")
    sys.exit(bool(why or not n))
