"""How often each layer is in FLU, by number of facts to forget, threshold, rule and model.

    python benchmarks/flu_sets.py organism organism-late --out nbs/recorded/flu_sets.parquet
    python benchmarks/flu_sets.py gemma-3-270m --facts athletes --out nbs/recorded/flu_sets.parquet
    python benchmarks/flu_sets.py gemma-3-270m smollm2-135m --task counterfact-editing --facts atlas --out nbs/recorded/flu_sets.parquet

Each size is drawn with four seeds, and the test facts of each are resampled 50 times. Rows of the models that are named, and of this task, are replaced.
"""
import argparse
from itertools import product
from pathlib import Path

import pandas as pd

from mechunlearn.models import load
from mechunlearn.probing import FLU_RULES, flu_frequency, probe_hits
from mechunlearn.store import Refusal, Unavailable
from mechunlearn.tasks import make_task

SIZES, SEEDS, RISES = (8, 16, 32, 64, 128), range(4), (.025, .05, .1)


def drawn(lm, task, size, seed, **own):
    "Share of resamples with each layer, at every threshold and rule; nothing where the model knows too few facts"
    try: hits = probe_hits(lm, make_task(task, lm, forget_size=size, seed=seed, **own), progress=False)
    except (Refusal, Unavailable) as e: return print(f"{lm.name}, {size} facts, seed {seed}: {e}", flush=True)
    print(f"{lm.name}, {size} facts, seed {seed}: {sum(map(len, hits))} test facts", flush=True)
    rows = [flu_frequency(hits, 50, rise=rise, rule=rule).rename("share").reset_index().assign(rise=rise, rule=rule) for rise, rule in product(RISES, FLU_RULES)]
    return pd.concat(rows).assign(model=lm.name, task=task, forget_size=float(size), seed=seed, n_test=sum(map(len, hits)))


def sensitivity(name, task, **own):
    "Means over seeds"
    lm = load(name, "cpu")
    found = pd.concat([rows for size, seed in product(SIZES, SEEDS) if (rows := drawn(lm, task, size, seed, **own)) is not None])
    by = ["model", "task", "forget_size", "rise", "rule", "layer"]
    return found.groupby(by, as_index=False).agg(share=("share", "mean"), lowest=("share", "min"), highest=("share", "max"), seeds=("seed", "nunique"), n_test=("n_test", "min"))


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("models", nargs="+"); ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--task", default="sports-athlete-editing"); ask.add_argument("--facts")
    args = ask.parse_args()
    own = {"facts": args.facts} if args.facts else {}
    for name in args.models:
        new = sensitivity(name, args.task, **own)
        kept = pd.read_parquet(args.out).query("model != @name or task != @args.task") if args.out.exists() else new.iloc[:0]
        pd.concat([kept, new], ignore_index=True).to_parquet(args.out, index=False, compression="zstd")
