"""Add runs to nbs/recorded without making everything again

    python tests/add_recorded.py RUN_FOLDER...                of `mechunlearn batch`
    python tests/add_recorded.py --replace [--keep EVALUATION]... RUN_FOLDER...      the same, in place of all that is there of its model, task and
                                                              number of facts, but for some evaluations; a page must say that those are of other runs
    python tests/add_recorded.py --sweep [--replace] sweep.parquet...     of `mechunlearn sweep`
    python tests/add_recorded.py --over [--field] RUN_FOLDER...      the same, in place of those rows alone that the runs have anew: a place, evaluation and setting; a place and attack
    python tests/add_recorded.py --editors [--replace] RUN_FOLDER...      of a grid of editors, into the tables of their own; or --losses, or --field, of the field's attacks
    python tests/add_recorded.py --elsewhere [--replace] RUN_FOLDER...    the same facts on another machine, in another arithmetic or with text: scorecard, facts one by one and places, beside the others and not mixed with them
    python tests/add_recorded.py --facts RUN_FOLDER...        what each edit says of each fact under every attack (field_facts), beside what other runs have of the same facts; of one edit and evaluation the last
    python tests/add_recorded.py --never-knew [--replace] RUN_FOLDER...   what was asked of each fact to compare edits with a model that never knew

Of each run the maps, localizations and evaluations are added that the tables lack for its model, task and number of facts; what is there stays,
unless it is replaced: runs of other draws are not mixed. Nor are scorecards of other attacks, since a worst case is of what was tried;
and facts are kept one by one where there is an edit at FLU to compare with.
Refused if the tables were recorded with other sources: then `make record`, or tests/recheck_recorded.py, comes first. `make record`
forgets what was added here, unless configs/ has it too.
"""
import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from mechunlearn import jobs, never_knew, recorded_tables as R, scorecard, stats
from mechunlearn.store import load_table

RECORDED = Path(__file__).resolve().parents[1] / "nbs" / "recorded"
KEYS = {"metrics": ["localization", "evaluation"], "records_small": ["localization", "evaluation"], "scorecard": ["localization"], "localizations": ["localization"],
        "training": ["localization"], "probing": [], "removal": [], "traced": ["method"], "trace_grid": [], "paths": []}
APART = {grid: {"metrics": grid, "scorecard": f"{grid}_scorecard"} for grid in ("editors", "losses", "field")} # where rows of such a grid go
APART["elsewhere"] = {"scorecard": "elsewhere", "records_small": "elsewhere_facts", "localizations": "elsewhere_places"}
ASKED = ["fact", "group", "format", "setting", "top1_truth", "loss", *never_knew.STATISTICS]  # that `never_knew.compared` reads
EACH = [*stats.PLACE, "fact", "subject", "relation", "truth", "edit", "guess", "variants", "top1_truth", "top1_edit"] # that scorecards need
MORE = ["in_flu"] # columns that older rows lack
SWEPT = ["localization", "draw", "seed", "lr", "inject"]


def known(new, old, keys):
    "Which rows of `new` have a model, task, number of facts and `keys` that are somewhere in `old`"
    keys = [*R.WHICH, *keys]
    words = lambda t: t[keys].astype(object).where(t[keys].notna(), None).apply(tuple, axis=1)
    return words(new).isin(set(words(old)))


def lacking(old, new, keys): return new[~known(new, old, keys)]


def add(name, new, keys, folder, replace=False, keep=(), over=False):
    file = folder / f"{name}.parquet"
    old = pd.read_parquet(file) if file.exists() else new.iloc[:0]
    if over:
        keys = [*keys, *(c for c in ("setting", "attack") if c in new)]
        if name.endswith("scorecard"): new = new[~new.attack.str.startswith(scorecard.WORST)] # which is of what was tried together
        old = old[~known(old, new, keys)]
    if replace and len(new): old = old[~known(old, new, []) | (old.evaluation.isin(keep) if "evaluation" in old else False)]
    if not over and name.endswith("scorecard") and set(old[known(old, new, [])].attack) not in (set(), set(new.attack)): new = new[:0]
    if name == "records_small" and not pd.concat([old[known(old, new, [])], new]).localization.str.startswith("flu").any(): new = new[:0]
    more = lacking(old, new, keys)
    if len(more):
        more = more.reindex(columns=[*old.columns, *more.columns.difference(old.columns).intersection(MORE)])
        kinds = {c: t for c, t in old.dtypes.drop(R.WHICH).items() if t.kind not in "iub" or more[c].notna().all()} # whole numbers have no gaps
        pd.concat([old, more.astype(kinds)], ignore_index=True).to_parquet(file, index=False, compression="zstd")
    return len(more)


def asked(run):
    "What every model of a run said of each fact, and in which words"
    files = sorted(run.glob("*/seed*/never_knew.parquet"))
    if not files: sys.exit(f"{run} has no never_knew.parquet of any edit: run it with attacks: field")
    return pd.concat([jobs.labelled(load_table(f)[ASKED], f.parts[-3], int(f.parts[-2][4:])) for f in files], ignore_index=True)


def facts_of(run, folder):
    "The facts of a run, put beside those of other runs: trainings that were not made together are counted together"
    new, file = scorecard.find(run).facts[EACH].assign(**dict(zip(R.WHICH, R._which(run)))), folder / "field_facts.parquet"
    old = pd.read_parquet(file) if file.exists() else new.iloc[:0]
    old = old[~known(old, new, ["localization", "draw", "seed", "evaluation"])]
    pd.concat([old, new], ignore_index=True).to_parquet(file, index=False, compression="zstd")
    return len(new)


def hashed(name, folder):
    "A table that is new remembers what it was made with"
    file = folder / "sources.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    if name not in known: file.write_text(json.dumps(known | {name: R.source_hashes(name)}, indent=1, sort_keys=True) + "\n")


def main(words=None, folder=RECORDED):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--sweep", action="store_true")
    for grid in APART: parser.add_argument(f"--{grid}", dest="apart", action="store_const", const=grid)
    parser.add_argument("--never-knew", action="store_true")
    parser.add_argument("--facts", action="store_true")
    parser.add_argument("--replace", action="store_true")
    parser.add_argument("--keep", action="append", default=[])
    parser.add_argument("--over", action="store_true")
    args = parser.parse_args(words)
    if args.sweep: return print("sweep:", sum(add("sweep", pd.read_parquet(f), SWEPT, folder, args.replace) for f in args.runs), "rows added")
    if args.never_knew:
        if "never_knew" in R.check_recorded(folder) and (folder / "never_knew.parquet").exists(): sys.exit("recorded with other sources: never_knew")
        for run in args.runs: print(f"{run}: {add('never_knew', asked(run).assign(**dict(zip(R.WHICH, R._which(run)))), ['localization', 'seed'], folder, args.replace)} rows added")
        return hashed("never_knew", folder)
    if args.facts:
        if "field_facts" in R.check_recorded(folder) and (folder / "field_facts.parquet").exists(): sys.exit("recorded with other sources: field_facts")
        for run in args.runs: print(f"{run}: field_facts: {facts_of(run, folder)} rows added")
        return hashed("field_facts", folder)
    into = APART.get(args.apart) or {name: name for name in KEYS}
    if stale := set(R.check_recorded(folder)) & set(into.values()): sys.exit(f"recorded with other sources: {', '.join(sorted(stale))}")
    for run in args.runs:
        tables, which = R.tables_of(scorecard.find(run)), dict(zip(R.WHICH, R._which(run)))
        for name, file in into.items():
            new = tables[name]
            if len(new): print(f"{run}: {file}: {add(file, new.assign(**which), KEYS[name], folder, args.replace, args.keep, args.over)} rows added")
    for file in into.values() if args.apart else (): hashed(file, folder)


if __name__ == "__main__": main()
