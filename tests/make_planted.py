"""Models of which we know what is wrong with them, through one attack of each kind: nbs/recorded/planted.parquet

    python tests/make_planted.py [--out FOLDER] [MODEL...]

The organism as it is, an edit of its lookup, one that never knew the facts, one with noise for its first layer, and five edits that leak
in one way each: behind a mask in the last layer, behind true facts of others, in four bits, to a probe, to relearning. All of the same 64
athletes, whose new answer is one that nobody has. About ten minutes on one thread.
"""
import argparse
import json
from pathlib import Path

import pandas as pd
from test_elicitation import leaky_task
from test_planted import last_layer, to_a_probe, to_relearning

from mechunlearn import recorded_tables as R
from mechunlearn.audit import audit
from mechunlearn.capability import noise
from mechunlearn.elicitation import elicit
from mechunlearn.evaluation import evaluate
from mechunlearn.finetuning import finetune
from mechunlearn.inside import read_inside
from mechunlearn.latent import latent
from mechunlearn.localization import build
from mechunlearn.models import Component, components, load
from mechunlearn.relearning import relearn
from mechunlearn.scorecard import scorecard
from mechunlearn.tampering import tamper, within_rounding
from mechunlearn.tasks import sports_athlete_editing

RECORDED = Path(__file__).resolve().parents[1] / "nbs" / "recorded"
WHO = dict(model="organism", task="sports-athlete-editing", forget_size=64)
QUIET = dict(progress=False)


def honest(lm, task):
    return finetune(lm, task, build(lm, "lookup", [Component("mlp", l) for l in range(5)]), lr=2e-3, steps=30, **QUIET)


def in_context(lm, task):
    "Gives way behind true facts of others"
    return finetune(lm, leaky_task(task), build(lm, "everything", components(lm)), lr=1e-3, inject=1.0, steps=60, batch=160, **QUIET)


def in_four_bits(lm, task):
    "Every weight stays within what four bits cannot tell from the original"
    where = build(lm, "everything", components(lm))
    edit = within_rounding(lm, finetune(lm, task, where, lr=2e-3, steps=30, **QUIET))
    for _ in range(4):
        with edit.applied(lm):
            more = finetune(lm, task, where, lr=2e-3, steps=15, **QUIET)
        edit = within_rounding(lm, more)
    return edit


MADE = {
    "none": lambda lm, task: None,
    "edit of the lookup": honest,
    "mask in the last layer": last_layer,
    "leaks in context": in_context,
    "leaks in four bits": in_four_bits,
    "leaks to a probe": lambda lm, task: to_a_probe(lm, task, honest(lm, task)),
    "leaks to relearning": lambda lm, task: to_relearning(lm, task, honest(lm, task)),
    "noise": lambda lm, task: noise(lm, 0),
    "never knew": lambda lm, task: None,
}


def records(name: str) -> pd.DataFrame:
    "What one attack of each kind finds of a model"
    lm = load("organism")
    task = sports_athlete_editing(lm, forget_size=64, inject="golf", seed=0)
    edit = MADE[name](lm, task)
    if name == "never knew":
        lm = load("organism-never-knew")
    groups = {g: ("completion", "mcq") for g in ("forget", "retain", "ghost")}
    ask = lambda: evaluate(lm, task, groups, {"retain": 32, "ghost": 32})  # and no text: what is written into later layers shows there, and what leaks to relearning would be called destroyed
    if edit:
        with edit.applied(lm):
            parts = [ask()]
    else:
        parts = [ask()]
    parts += [
        elicit(lm, task, edit, ["in context"], (4,), max_facts=32),
        read_inside(lm, task, edit, n_train=200, n_strangers=0),
        latent(lm, task, edit, max_facts=32),
        tamper(lm, task, edit, ways=("quantized",), weights=dict(quantized=("nf4",)), max_facts=32),
        relearn(lm, task, edit, steps=10, at=(10,), max_facts=64),
    ]
    return pd.concat(parts, ignore_index=True).assign(localization=name, draw=0, seed=0)


def judged(found: pd.DataFrame) -> pd.DataFrame:
    "The scorecard, and what an audit says of each model"
    said = {n: audit(found, n) for n in found.localization.unique()}
    card = scorecard(found).query("seed == -1").drop(columns=["difference", "p_holm"])
    return card.assign(verdict=card.localization.map({n: a.verdict for n, a in said.items()}), headline=card.localization.map({n: a.headline for n, a in said.items()}), **WHO)


def main(words=None):
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("names", nargs="*", metavar="MODEL", choices=[*MADE, []], help="only these, printed and not written")
    ask.add_argument("--out", type=Path, default=RECORDED)
    told = ask.parse_args(words)
    found = pd.concat([records(n) for n in told.names or MADE], ignore_index=True)
    card = judged(found)
    print(card.pivot(index="localization", columns="attack", values="value").round(2).assign(said=card.drop_duplicates("localization").set_index("localization").headline).to_string())
    if told.names:
        return
    card.to_parquet(told.out / "planted.parquet", index=False, compression="zstd")
    file = told.out / "sources.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"planted": R.source_hashes("planted")}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
