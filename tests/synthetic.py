"""A run folder of invented numbers, to test reports against. Nothing in it was measured; names of people and words are made up."""
import json
from pathlib import Path
import numpy as np
import pandas as pd
from mechunlearn.store import save_json, save_table

LAYERS, SPORTS = 12, (" football", " baseball", " basketball")
# localization -> truth in MCQ, truth after relearning, same-subject kept, edit completed, MLPs, heads, parameters
EDITS = {"flu": (.02, .10, .70, 1., (1, 2, 3), 0, 3), "flu-path": (.15, .55, .93, 1., (4, 5, 6), 0, 3), "causal-tracing": (.05, .12, .62, 1., (0, 11), 8, 3),
         "causal-tracing-mlps": (.04, .09, .66, 1., (0, 1, 11), 0, 3), "attribution-patching": (.54, .88, .97, .96, (10, 11), 8, 3),
         "random-mlps#0": (.05, .30, .80, 1., (2, 7, 10), 0, 3), "random-mlps#1": (.40, .70, .95, 1., (5, 8, 9), 0, 3),
         "random-mlps#2": (.10, .20, .40, 1., (0, 6, 9), 0, 3), "late": (.95, .98, .99, .85, (8, 9, 10, 11), 16, 6),
         "all-mlps": (.06, .20, .80, 1., tuple(range(12)), 0, 12), "nonlocalized": (.08, .15, .75, 1., tuple(range(12)), 48, 18)}

def record(rng, n, group, fmt, p_truth, p_edit=None, variants=1, evaluation="standard", prefix="sport", **more):
    "n facts x variants, right with p_truth; each fact is drawn once and its variants mostly agree"
    rows = []
    for i in range(n):
        truth, edit = SPORTS[i % 3], SPORTS[(i + 1) % 3]
        kind = rng.choice(["truth", "edit", "other"], p=[p_truth, e := min(p_edit or 0., 1 - p_truth), max(0., 1 - p_truth - e)])
        for v in range(variants):
            k = kind if rng.random() < .95 else rng.choice(["truth", "edit"]) if 0 < p_truth < 1 else kind
            prob = lambda word: float(np.clip((.95 if k == word else .03) + rng.normal(0, .02), 0, 1))
            letters = fmt == "mcq"
            rows.append(dict(evaluation=evaluation, fact=f"{prefix}/{i:04d}", subject=f"Invented Person {i:03d}", relation="sport", group=group, format=fmt,
                             variant=v, truth=f" {'ABCD'[v]}" if letters else truth, edit=None if p_edit is None else f" {'BCDA'[v]}" if letters else edit,
                             prob_truth=prob("truth"), prob_edit=None if p_edit is None else prob("edit"), top1_truth=k == "truth",
                             top1_edit=None if p_edit is None else k == "edit", compliance=float(rng.uniform(.9, 1)) if letters else None, **more))
    return rows

def table(rows):
    out = pd.DataFrame(rows)
    for c in ("compliance", "loss", "layer", "setting", "step"): out[c] = out[c] if c in out else None
    return out.astype({"top1_truth": "boolean", "top1_edit": "boolean", "layer": "Int64", "step": "Int64", "setting": "str",
                       "prob_edit": float, "compliance": float, "loss": float})

def standard(rng, mcq, kept, done, n):
    rows = record(rng, n, "forget", "completion", 1 - done, done) + record(rng, n, "forget", "paraphrase", 1 - done, done*.95, 3)
    rows += record(rng, n, "forget", "mcq", mcq, max(0, .97 - mcq), 4) + record(rng, 24, "retain", "mcq", .95, None, 4, prefix="kept")
    rows += record(rng, 48, "retain", "completion", .95, prefix="kept") + record(rng, n, "same-subject", "completion", kept, prefix="city")
    rows += record(rng, 48, "other-relation", "completion", .98, prefix="tool") + record(rng, 24, "general", "mcq", .97, None, 4, prefix="kind")
    rows += record(rng, 32, "ghost", "completion", .33, prefix="ghost")
    return table(rows + [dict(evaluation="standard", fact=f"text/{i:04d}", group="text", format="text", loss=float(rng.normal(2.05, .2))) for i in range(24)])

def relearning(rng, top, n, steps=(0, 5, 10, 15, 20)):
    rows = []
    for s in steps:
        p = top*s/steps[-1]
        for half in (0, 1): rows += [r for r in record(rng, n, "forget", "completion", p, 1 - p, evaluation="relearning", step=s, setting=f"half{half}")
                                     if int(r["fact"][-4:]) % 2 != half]
        rows += record(rng, n//2, "trained", "completion", s/steps[-1], evaluation="relearning", step=s, setting="half0")
        rows += record(rng, 32, "ghost", "completion", .33, evaluation="relearning", step=s, setting="half0", prefix="ghost")
    return table(rows)

def latent(rng, mcq, n):
    rows = []
    for l in range(-1, LAYERS):
        up = 1/(1 + np.exp(2 - l)); truth = .33 + up*(mcq - .33); edit = (1 - truth)*(.5 + .5*up*(1 - mcq))
        for s in ("subject", "last"): rows += record(rng, n, "forget", None, truth, edit, evaluation="latent", layer=l, setting=s)
        rows += record(rng, n, "forget", None, .33, .33, evaluation="latent", layer=l, setting="subject/shuffled")
        rows += record(rng, 48, "retain", None, .33 + up*.62, evaluation="latent", layer=l, setting="subject", prefix="kept")
    return table(rows)

def training(rng, done, steps=50):
    s = np.arange(steps)
    return pd.DataFrame({"step": s, "lr": 1e-3, "loss": 1., "forget": 6*np.exp(-s/8) + (1 - done)*3 + .005, "retain": .05 + .3*np.exp(-s/10),
                         "text": 2.05 + .05*rng.random(steps), "grad_norm": 1.})

def maps(path, rng, layers=LAYERS):
    rows = []
    for l in range(-1, layers):
        for pos, half in (("subject", 1.5), ("last", 6.)):
            for control in (False, True):
                a = .33 if control else .33 + .67/(1 + np.exp(1.6*(half - l)))
                rows.append(dict(layer=l, position=pos, control=control, accuracy=a, n_test=135, ci_low=max(a - .06, 0), ci_high=min(a + .05, 1)))
    save_table(path/"scores/probing.parquet", pd.DataFrame(rows), {"invented": True})
    parts = [("mlp", l, None) for l in range(layers)] + [("head", l, h) for l in range(layers) for h in range(4)]
    rows = [dict(component=".".join(str(x) for x in p if x is not None), kind=p[0], layer=p[1], head=p[2], score=x, ci_low=x - .05, ci_high=x + .05, n=24)
            for p in parts for x in [float(rng.normal(.05, .03) + .5*(p[1] in (0, layers - 1)))]]
    for method in ("causal-tracing-swap", "direct-effect", "to-extraction"):
        save_table(path/f"scores/{method}.parquet", pd.DataFrame(rows).astype({"head": "Int64"}), {"invented": True})
    windows = [(l, l, .6*(l == 0) + .1) for l in range(layers)] + [(l, layers - 1, max(0, 1 - l/5)) for l in range(layers)]
    save_table(path/"scores/removal.parquet", pd.DataFrame([dict(first=a, last=b, share=x, ci_low=x - .05, ci_high=x + .05, n=24) for a, b, x in windows]), {"invented": True})
    tokens = {-7: "subject 1/3", -6: "subject 2/3", -5: "subject 3/3", -4: "plays", -3: "the", -2: "sport", -1: "of"}
    for kind, size in (("resid", 1.), ("attn", .4), ("mlp", .35)):
        rows = []
        for l in range(layers):
            for p, t in tokens.items():
                x = size*(np.exp(-(l - 3)**2/8)*(p == -5) + (l > 6)*min(1, (l - 6)/4)*(p == -1)) + rng.normal(0, .01)
                rows.append(dict(layer=l, position=p, token=t, kind=kind, score=x, ci_low=x - .05, ci_high=x + .05, n=24))
        save_table(path/f"scores/trace-grid-{kind}.parquet", pd.DataFrame(rows), {"invented": True})

def synthetic_run(path, edits=tuple(EDITS), seeds=(0, 1, 2), n=32, stages=("maps", "localizations", "training", "standard", "relearning", "latent"), model="invented-model"):
    "Write a run folder of invented numbers; same arguments, same bytes"
    path, rng = Path(path), np.random.default_rng(0)
    path.mkdir(parents=True, exist_ok=True)
    (path/"run.json").write_text(json.dumps({"model": model, "revision": "0"*16, "task": "sports-athlete-editing", "options": {"forget_size": n}}))
    if "maps" in stages: maps(path, rng)
    for name in edits:
        mcq, back, kept, done, mlps, heads, size = EDITS[name]
        parts = [f"mlp.{l}" for l in mlps] + [f"head.{9 - h % 4}.{h // 4}" for h in range(heads)]
        where = {"name": name, "components": parts, "neurons": None, "slices": [], "sizes": [184_320]*size, "budget": 3*184_320, "draw": None, "config": {}}
        if "localizations" in stages: save_json(path/f"localizations/{name}.json", where, {"invented": name})
    for seed in seeds:
        for name in ("none", *edits):
            mcq, back, kept, done, *_ = EDITS.get(name, (1., 1., 1., 0.))
            at, made = path/name/f"seed{seed}", lambda kind: {"invented": name, "seed": seed, "kind": kind}
            wobble = lambda p: float(np.clip(p + rng.normal(0, .03), 0, 1)) if 0 < p < 1 else p
            if "standard" in stages: save_table(at/"evaluation.parquet", standard(rng, wobble(mcq), wobble(kept), wobble(done), n), made("evaluation"))
            if "latent" in stages: save_table(at/"latent.parquet", latent(rng, wobble(mcq), n), made("latent"))
            if name == "none": continue
            if "training" in stages:
                save_table(at/"training.parquet", training(rng, done), made("training"))
                save_json(at/"edit.json", {"localization": {}, "config": {"lr": 4e-3, "inject": 1., "steps": 50}}, made("training"))
            if "relearning" in stages: save_table(at/"relearning.parquet", relearning(rng, wobble(back), n), made("relearning"))
    return path
