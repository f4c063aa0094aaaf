"""Weight masks by number of zeros, and which mechanisms they touch (Table 3 and Figures 19 to 27 of the paper).

    python benchmarks/masks.py organism --seeds 0,1,2 --work FOLDER
    python benchmarks/masks.py organism --task sports-unlearning --forget-size 0 --seeds 0,1,2 --work FOLDER
    python benchmarks/masks.py gemma-3-270m --facts athletes --at 500,2000,10000 --rates 100,300,1000,3000 --sizes 200,500,1000,2000,5000,10000,50000 --work FOLDER

For each place the rate is chosen on dev facts, by the score in training's format of a mask cut at the best of --at. One mask a place and seed is learned and cut
at every size; shares are taken at the number of zeros that is best for the first place. Three tables in nbs/recorded, whose rows of this model and task are replaced:
`masks` (what is answered), `mask_shares` (weights of each mechanism that became zero, by seed) and `mask_rates` (the sweep). What is in --work is not made again.
"""
import argparse
from pathlib import Path

import pandas as pd

from mechunlearn.localization import Evidence, localize, mechanisms
from mechunlearn.masking import ask_sizes, learn_mask, mask_rows, masked_shares
from mechunlearn.models import load
from mechunlearn.rates import dev_task, score, training_metrics
from mechunlearn.store import make
from mechunlearn.tasks import make_task

RECORDED = Path(__file__).parents[1] / "nbs/recorded"


def learned(lm, task, place, lr, a):
    return learn_mask(lm, task, localize(lm, task, place), lr=lr, steps=a.steps, progress=False)


def trial(lm, dev, base, place, lr, a):
    "Rows of the sweep, one a number of zeros"
    mask, rows = learned(lm, dev, place, lr, a), []
    for k in a.at:
        with mask.edit(lm, k).applied(lm): metrics = training_metrics(lm, dev)
        rows.append(dict(localization=place, lr=lr, k=k, **metrics, score=score(metrics, base)))
    return pd.DataFrame(rows)


def cut(lm, task, place, lr, k, parts, a):
    "Records at every size, and at one the share of each mechanism"
    mask = learned(lm, task, place, lr, a)
    print(task.seed, mask, flush=True)
    records = ask_sizes(lm, task, [mask], [k for k in a.sizes if k <= mask.localization.n_params], most=a.most)
    shares = masked_shares(lm, [mask.edit(lm, k)], parts).assign(seed=task.seed, k=k)
    return pd.concat([records, shares.assign(evaluation="shares")], ignore_index=True)


def measured(a):
    lm, given = load(a.model, "cpu"), {"facts": a.facts} if a.facts else {}
    made = lambda seed: make_task(a.task, lm, seed=seed, **given, **({"forget_size": a.forget_size} if a.forget_size else {}))
    kept = lambda name, fn, task, **why: make(a.work and a.work / f"{a.model}-{a.task}-{name}.parquet", dict(revision=lm.revision, task=task.causes(), steps=a.steps, **why), fn)
    dev = dev_task(made(a.seeds[0]))
    base = training_metrics(lm, dev)
    table = pd.concat([kept(f"{place}-at-{lr:g}", lambda: trial(lm, dev, base, place, lr, a), dev, lr=lr, at=a.at) for place in a.places for lr in a.rates], ignore_index=True)
    print(table.to_string(), flush=True)
    best = table.loc[table.groupby("localization").score.idxmax()].set_index("localization")
    lr, k, found = best.lr.to_dict(), int(best.k[a.places[0]]), []
    for seed in a.seeds:
        task = made(seed)
        parts = mechanisms(Evidence(lm, task, progress=False))
        for place in a.places:
            found.append(kept(f"{place}-{seed}", lambda: cut(lm, task, place, lr[place], k, parts, a), task, lr=lr[place], k=k, sizes=a.sizes, most=a.most))
    found = pd.concat(found, ignore_index=True)
    shares, records = ((found[(found.evaluation == "shares") == of].dropna(axis=1, how="all")) for of in (True, False))
    records = records.drop_duplicates([c for c in records if c != "seconds"])
    return {"masks": mask_rows(records).assign(seeds=len(a.seeds)), "mask_shares": shares.drop(columns="evaluation"), "mask_rates": table}


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda kind: lambda text: [kind(x) for x in text.split(",")]
    ask.add_argument("model"); ask.add_argument("--task", default="sports-athlete-editing"); ask.add_argument("--facts")
    ask.add_argument("--forget-size", type=int, default=16, help="0 for a task that has none")
    ask.add_argument("--seeds", type=numbers(int), default=[0])
    ask.add_argument("--places", type=numbers(str), default=["flu", "late", "all-mlps", "causal-tracing", "nonlocalized"])
    ask.add_argument("--rates", type=numbers(float), default=[300., 1000., 3000., 10000.])
    ask.add_argument("--at", type=numbers(int), default=[2000, 8000])
    ask.add_argument("--sizes", type=numbers(int), default=[500, 1000, 2000, 4000, 8000, 16000, 32000, 64000])
    ask.add_argument("--most", type=int, default=32); ask.add_argument("--steps", type=int, default=25)
    ask.add_argument("--work", type=Path); ask.add_argument("--out", type=Path, default=RECORDED)
    args = ask.parse_args()
    for name, new in measured(args).items():
        new = new.assign(model=args.model, task=args.task, forget_size=float(args.forget_size or "nan"))
        file = args.out / f"{name}.parquet"
        kept = pd.read_parquet(file).query("model != @args.model or task != @args.task") if file.exists() else new.iloc[:0]
        pd.concat([kept, new], ignore_index=True).to_parquet(file, index=False, compression="zstd")
