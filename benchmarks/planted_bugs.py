"""Plant a bug in a copy of the package and see which test notices.

    python benchmarks/planted_bugs.py                            all of them, 6 to 9 minutes on one core
    python benchmarks/planted_bugs.py --only hash,mask           some kinds; the others keep what was found before

Each bug is one a careless refactor could make: a few characters of one module. The copy is imported instead of the
package, the named tests are run, and at least one must fail: caught, else SURVIVED. The same tests pass without a bug.
A text that no longer stands in its module exactly once stops the script: then the bug needs a new place."""
import argparse, json, os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

class Bug(NamedTuple):
    "A small wrong change"
    kind: str   # what it spoils
    says: str   # what is wrong then
    module: str # of the package
    old: str    # stands there exactly once
    new: str    # instead
    tests: str  # node ids below tests/, separated by spaces

BUGS = [
    Bug("score", "a mean of ratios instead of a ratio of means", "tracing",
        "share = gain / (gap.mean() if ok else np.nan)", "share = gain / (gap if ok else np.nan)", "test_planted_bugs.py::test_a_score_is_a_ratio_of_means"),
    Bug("score", "letters' priors are added instead of taken out", "evaluation",
        "(logp - letter_priors(", "(logp + letter_priors(", "test_hardened.py::test_a_letter_bias_decides_until_it_is_calibrated_away"),
    Bug("budget", "one unit more than fits is taken", "localization",
        "size(taken + rest[:1]) <= budget", "size(taken) <= budget", "test_localization.py::test_budget_is_met_to_less_than_a_neuron"),
    Bug("budget", "the last third begins a layer late", "localization",
        "3 * c.layer >= 2 * lm.n_layers", "3 * c.layer > 2 * lm.n_layers", "test_localization.py::test_late_is_the_last_third"),
    Bug("split", "edited facts are among the retained ones", "facts",
        "split_retain(without(free, forget), seed, train)", "split_retain(free, seed, train)", "test_facts.py::test_splits_share_no_subject"),
    Bug("split", "facts for choosing learning rates may be test facts", "facts",
        '"retain_test", "dev_forget", "dev_retain")\n', '"retain_test", "dev_forget")\n', "test_planted_bugs.py::test_no_two_splits_may_share_a_subject"),
    Bug("split", "the facts that are taught are asked as if they were held back", "relearning",
        "task.forget[half::2], task.forget[1 - half::2]", "task.forget[half::2], task.forget", "test_relearning.py::test_every_forget_fact_is_asked_once_as_held_and_once_as_taught"),
    Bug("loss", "unlearning has the other sign", "losses",
        "logits.logsumexp(1) - others.logsumexp(1)", "others.logsumexp(1) - logits.logsumexp(1)", "test_tasks.py::test_not_said"),
    Bug("loss", "weight decay is on", "finetuning",
        "AdamW(values.values(), lr=lr, weight_decay=0.)", "AdamW(values.values(), lr=lr)", "test_planted_bugs.py::test_nothing_shrinks_weights_in_training"),
    Bug("loss", "the attacker's weight decay is on", "relearning",
        "AdamW(params, lr=lora.lr, weight_decay=0.)", "AdamW(params, lr=lora.lr)", "test_planted_bugs.py::test_nothing_shrinks_weights_in_training"),
    Bug("option order", "one letter is the truth twice as often as another", "facts",
        "SQUARE = ((0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0))", "SQUARE = ((0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (2, 3, 0, 1))", "test_facts.py::test_mcq_is_balanced"),
    Bug("option order", "an example may be the very fact that is asked", "facts",
        "and (itself or s.subject != fact.subject) and has_options(s)", "and has_options(s)", "test_planted_bugs.py::test_a_fact_is_never_its_own_example"),
    Bug("seed", "batches are the same for every seed", "finetuning",
        "rng = np.random.default_rng(seed)\n    for _ in range(steps)", "rng = np.random.default_rng(0)\n    for _ in range(steps)", "test_finetuning.py::test_seeds_decide_and_repeat"),
    Bug("seed", "edit answers are the same for every seed", "facts",
        'seeded("edit", seed, f.id)', 'seeded("edit", f.id)', "test_planted_bugs.py::test_edit_answers_are_drawn_by_seed"),
    Bug("seed", "noise follows the place in the batch, not the fact", "tracing",
        "enumerate(zip(cases, ids)):\n        start, stop", "enumerate(zip(cases, range(len(cases)))):\n        start, stop", "test_tracing.py::test_batches_chunks_and_suffix_do_not_matter"),
    Bug("hash", "edits of different learning rates are taken for one another", "jobs",
        "training=options) | parts", 'training={k: v for k, v in options.items() if k != "lr"}) | parts', "test_finetuning.py::test_causes_tell_edits_apart"),
    Bug("hash", "what was made from something else counts as done", "store",
        'return "done" if meta["hash"] == cause_hash(causes) else "stale"', 'return "done"', "test_store.py::test_stale_is_made_again_and_done_is_not"),
    Bug("mask", "a head's output weights are cut by rows", "models",
        'writes = lm.path(key, layer), key in ("o_proj", "down_proj")', 'writes = lm.path(key, layer), key == "down_proj"', "test_planted_bugs.py::test_a_head_writes_through_its_own_columns"),
    Bug("mask", "padding is asked what comes next", "questions",
        'batch["attention_mask"][:, :-1]', 'batch["attention_mask"][:, 1:]', "test_evaluation.py::test_text_loss_is_that_of_each_text_alone"),
    Bug("interval", "Wilson's interval is one of 97.5 %", "stats",
        "alpha=1 - level, method", "alpha=(1 - level)/2, method", "test_stats.py::test_wilson_is_scipys"),
    Bug("interval", "seeds that disagree do not widen the interval", "stats",
        "_widest([one, *(t_interval(m, level) for m in _repeated(cells, means).values())], value)", "_widest([one], value)", "test_stats.py::test_over_seeds_covers_another_seed"),
    Bug("interval", "seeds that agree by luck leave no interval", "stats",
        "_widest([one, *(t_interval(m, level)", "_widest([*(t_interval(m, level)", "test_stats.py::test_over_seeds_is_never_narrower_than_one_seed"),
    Bug("verdict", "two edits differ although another training may not show it", "stats",
        "p=max([p_facts, *map(t_test, repeated.values())])", "p=p_facts", "test_stats.py::test_seeds_that_disagree_are_no_difference"),
    Bug("verdict", "an attack that reads nothing of any fact counts", "stats",
        "(low > np.nan_to_num(guess) + POWER)", "(low > -1)", "test_planted.py::test_an_attack_without_power_is_no_number"),
    Bug("control", "the control's answers are not shuffled", "probing",
        "rng.permutation(y), C)", "y, C)", "test_probing.py::test_curve_finds_what_was_planted"),
    Bug("control", "the latent control's answers are not shuffled", "latent",
        "y = np.random.default_rng(seed).permutation(y)", "y = np.array(y)", "test_latent.py::test_shuffled_answers_are_not_learned"),
    Bug("position", "the token behind the subject is read", "probing",
        "[[stop - 1, -1]", "[[min(stop, -1), -1]", "test_probing.py::test_features_are_hf_hidden_states"),
    Bug("verdict", "a difference counts as the paper's whichever direction is good", "claims",
        '(row.difference > 0) == (good == "low")', "row.difference > 0", "test_report.py::test_verdicts"),
    Bug("verdict", "exposed already when the estimate is above guessing", "scorecard",
        'if row.excess_low > 0: return "exposed"', 'if row.excess > 0: return "exposed"', "test_report.py::test_what_the_worst_case_says"),
    Bug("verdict", "p-values of many comparisons are left as they are", "stats",
        'multipletests(p[ok], method="holm")[1]', "p[ok]", "test_stats.py::test_holm_by_hand_and_by_statsmodels"),
]


def planted(
    bug:Bug|None, # none: the package as it is
    where:Path, # an empty folder
) -> Path: # it, with a copy of the package
    "Copy the package, with the bug in it"
    shutil.copytree(ROOT/"mechunlearn", where/"mechunlearn", ignore=shutil.ignore_patterns("__pycache__"))
    for other in ("nbs", "configs", "settings.ini"): (where/other).symlink_to(ROOT/other)
    if bug is None: return where
    file = where/"mechunlearn"/f"{bug.module}.py"
    text = file.read_text()
    if (n := text.count(bug.old)) != 1: sys.exit(f"{bug.module}: {bug.old!r} stands there {n} times: give the bug '{bug.says}' a new place")
    file.write_text(text.replace(bug.old, bug.new))
    return where

def pytest(
    where:Path, # from `planted`
    tests:str, # node ids
) -> tuple[int, list[str]]: # exit code; tests that failed
    "Run tests against a copy of the package"
    ids = [str(ROOT/"tests"/t) for t in tests.split()]
    env = os.environ | {"PYTHONPATH": str(where), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    p = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--rootdir", str(ROOT/"tests"), *ids],
                       cwd=where, env=env, capture_output=True, text=True)
    if p.returncode > 1: print(p.stdout[-2000:], p.stderr[-1000:])
    return p.returncode, re.findall(r"^FAILED \S*?(test_\w+\.py::\S+)", p.stdout, re.M)

def hunt(
    bug:Bug|None, # none: no bug, all must pass
    tests:str, # node ids
) -> dict: # caught, by, seconds
    "Plant and test"
    begin = time.time()
    with tempfile.TemporaryDirectory() as folder: code, failed = pytest(planted(bug, Path(folder)), tests)
    if code > 1: sys.exit(f"pytest ended with {code}: the tests of {bug and bug.says!r} could not be run")
    return dict(caught=code == 1, by=failed, seconds=round(time.time() - begin, 1))

def keep(
    found:list[dict], # of this call
    file:Path, # JSON
):
    "Put what was found beside what was found before, in the order of BUGS"
    before = json.loads(file.read_text())["each"] if file.exists() else []
    known = {(f["module"], f["old"], f["tests"]): f for f in [*before, *found]}
    each = [known[k] for b in BUGS if (k := (b.module, b.old, b.tests)) in known]
    file.write_text(json.dumps(dict(bugs=len(BUGS), tried=len(each), caught=sum(f["caught"] for f in each), each=each), indent=1) + "\n")

def main():
    "Plant every bug in turn; exit code 1 if one survives"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", help="kinds, separated by commas")
    p.add_argument("--result", type=Path, default=Path(__file__).parent/"results"/"planted_bugs.json")
    args = p.parse_args()
    bugs, found = [b for b in BUGS if not args.only or b.kind in args.only.split(",")], []
    for bug in bugs:
        with tempfile.TemporaryDirectory() as folder: planted(bug, Path(folder)) # all places before any test
    clean = hunt(None, " ".join(dict.fromkeys(t for b in bugs for t in b.tests.split())))
    if clean["caught"]: sys.exit(f"without a bug these fail already: {', '.join(clean['by'])}")
    for bug in bugs:
        found.append(bug._asdict() | hunt(bug, bug.tests))
        print(f"{'caught  ' if found[-1]['caught'] else 'SURVIVED'}  {bug.kind}: {bug.says}", flush=True)
    keep(found, args.result)
    sys.exit(not all(f["caught"] for f in found))


if __name__ == "__main__": main()
