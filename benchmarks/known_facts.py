"""How many facts that come with the package a model knows, by each rule, prompt and format.

    python benchmarks/known_facts.py MODEL     one JSON object a line: athletes by prompt and the atlas by relation and prompt,
                                               then the known ones in other formats
"""
import json
import sys

from mechunlearn.facts import SPORTS_PROMPTS, GOLF, sports_facts
from mechunlearn.sets import known_of
from mechunlearn.known import known_by_format
from mechunlearn.models import load
from mechunlearn.tasks import ATLAS, ATLAS_PROMPTS, atlas_facts


def say(**row): print(json.dumps(row), flush=True)


def counts(lm, facts):
    "Facts, and how many are known by either rule"
    return dict(facts=len(facts)) | {by: len(known_of(lm, facts, by)[0]) for by in ("prob", "top1")}


if __name__ == "__main__":
    lm = load(sys.argv[1], "cpu")
    say(name="model", model=lm.name)
    for prompt in SPORTS_PROMPTS:
        facts = [f for f in sports_facts("athletes", prompt=prompt) if f.answer != GOLF]
        say(name=f"athletes/{prompt}", **counts(lm, facts))
        for sport in sorted({f.answer for f in facts}): say(name=f"athletes/{prompt}/{sport.strip()}", **counts(lm, [f for f in facts if f.answer == sport]))
    for prompt in ATLAS_PROMPTS:
        for relation in ATLAS: say(name=f"atlas/{relation}/{prompt}", **counts(lm, [f for f in atlas_facts(prompt) if f.relation == relation]))
    for source, facts in (("athletes", sports_facts("athletes", prompt="others")), ("atlas", atlas_facts())):
        for row in known_by_format(lm, source, facts).reset_index().to_dict("records"): say(name=f"{source}/formats", **row)
