"""List the authors' results in data/published.csv

    MECHUNLEARN_REFDATA=FOLDER python tests/make_published.py          writes their lines, after those that were typed
    MECHUNLEARN_REFDATA=FOLDER python tests/make_published.py --check  says what differs, and changes nothing

The authors' files hold nearly forty thousand numbers. Listed is what each run ended with: of a run the last evaluation; of relearning the
last step of every metric, and the earlier steps of the one it is about; of soft prompts the mean over restarts; of probes the highest and
the last layer of each run, and means over both set sizes at ten layers; of sweeps the four parts of the score; of masks the largest (and
of the sport that is unlearned three smaller ones). A line holds all localizations for which the rest is the same: their names, or "all nine"
of the paper in the order of PLACES, and as many values. No fact and no prompt is listed.
"""
import argparse
import csv
import io
import json
import os
import sys
from pathlib import Path

import pandas as pd

FILE = Path(__file__).resolve().parents[1] / "mechunlearn/data/published.csv"
HEAD = "source,model,task,forget_size,localization,setting,quantity,sign,value,unit,n,defect,cite".split(",")
PLACES = ("flu", "causal-tracing", "causal-tracing-mlps", "attribution-patching", "attribution-patching-mlps", "random", "random-mlps", "all-mlps", "nonlocalized", "attention", "none")
TASKS = {t.replace("-", "_"): t for t in ("sports-athlete-editing", "full-sports-editing", "counterfact-editing", "sequential-counterfact-editing")}
WHERE = dict(zip(TASKS.values(), (("2, 28", "3, 32", "6, 36", "45"), ("2, 29", "3, 33", "37", ""), ("4, 30", "5, 34", "38", "47"), ("4, 31", "5, 35", "39", "48")))) # figures: training's prompt, others, relearning, soft prompts
ASKED = {"Normal_forget": "Normal forget accuracy", "Normal_maintain": "Normal maintain accuracy", "Normal_Injected_forget": "edit accuracy", "Normal_Injected_maintain": "edit accuracy of retained facts"}
ASKED |= {f"MC_{k}": f"MCQ {v}" for k, v in {"forget": "forget accuracy", "maintain": "maintain accuracy", "Injected_forget": "edit accuracy", "Injected_maintain": "edit accuracy of retained facts"}.items()}
ASKED |= {f"Paraphrase_{k}": f"paraphrase {v}" for k, v in {"forget": "forget accuracy", "maintain": "maintain accuracy", "Injected_forget": "edit accuracy", "Injected_maintain": "edit accuracy of retained facts"}.items()}
ASKED |= {f"Neighborhood_{k}": f"neighborhood {v}" for k, v in {"forget": "accuracy", "maintain": "accuracy of retained facts", "Injected_forget": "edit accuracy", "Injected_maintain": "edit accuracy of retained facts"}.items()}
ASKED |= {"tinyMMLU": "tinyMMLU"}
TRAINED = {"forget_acc_trainfmt": "forget accuracy", "maintain_acc_trainfmt": "maintain accuracy", "edit_acc_trainfmt": "edit accuracy, training's prompt", "forget_ce": "forget loss", "maintain_ce": "maintain loss",
           "pile_ce": "text loss", "pile_acc": "text accuracy", "lr": "learning rate", "inject_coef": "inject coefficient", "trainable_params": "parameters trained"}
MASKED = {"Normal/forget": "forget accuracy", "Normal/maintain": "maintain accuracy", "MC/forget": "MCQ forget accuracy", "MC/maintain": "MCQ maintain accuracy", "Paraphrase/forget": "paraphrase forget accuracy",
          "Paraphrase/maintain": "paraphrase maintain accuracy", "Neighborhood/forget": "neighborhood accuracy", "Neighborhood/maintain": "neighborhood accuracy of retained facts", "MMLU": "tinyMMLU"}
MASKED |= {f"{k}/{s}": f"{v}, {s}" for k, v in {"Normal": "accuracy", "MC": "MCQ accuracy"}.items() for s in ("football", "baseball", "basketball")}
AT = {"gemma-7b": (4, 6, 8, 10, 14, 18, 20, 22, 26, 27), "gemma-2-9b": (4, 6, 8, 10, 14, 18, 22, 26, 32, 41), "llama-3-8b": (3, 4, 6, 8, 10, 12, 14, 18, 24, 31)} # layers
QUESTIONS = {("gemma-7b", 16): 15, ("gemma-7b", 64): 61, ("gemma-2-9b", 16): 16, ("gemma-2-9b", 64): 64} # CounterFact facts with options
SCALED = {"flu_hardcoded_0_10": "flu", "attention_only": "attention", "all_mlps_down_proj": "all-mlps"}
MADE = ("results_", "results/", "experiments/scaling_counterfact/results_gemma7b") # how the cite of a line that is made here begins


def unit_of(quantity):
    for word, unit in {"loss": "nats", "learning rate": "learning rate", "coefficient": "weight", "parameters": "parameters", "layer of": "layer", "MMLU": "accuracy", "text": "accuracy", "probe": "accuracy"}.items():
        if word in quantity: return unit
    return "probability"


def defects(task, localizations, quantity, unit):
    "What is known of a number"
    sports, mcq, again = "sports" in task, "MCQ" in quantity, "relearned" in quantity
    measured = unit in ("probability", "accuracy", "nats")
    keys = {"probabilities": unit == "probability", "one-run": measured, "unseeded": any(l.startswith("random") for l in localizations), "letter-d": mcq and sports,
            "edit-first": "MCQ edit" in quantity and not sports, "mcq-format": mcq and "edit" not in quantity, "sport-halves": measured and task == TASKS["full_sports_editing"] and "text" not in quantity,
            "two-prompts": sports and not again and unit == "probability" and (mcq or "Normal" in quantity or quantity.startswith("edit accuracy")) and not quantity.startswith("soft"),
            "relearn-edit": again and not sports and unit != "accuracy", "chance": again and sports and quantity.startswith("relearned"), "not-soft": quantity.startswith("soft prompt"),
            "probes": "probe" in quantity, "tiny-mmlu": "tinyMMLU" in quantity, "mask-threshold": quantity.startswith("masked"), "same-rows": unit in ("learning rate", "weight"), "bf16": unit == "learning rate",
            "budget": unit == "parameters", "whole-layers": unit == "parameters", "embeddings": unit == "parameters" and "nonlocalized" in localizations}
    return [k for k, v in keys.items() if v]


def number(x, unit):
    return f"{x:.0f}" if unit in ("parameters", "layer") else f"{x:g}" if unit in ("learning rate", "weight") else f"{x:.3f}"


def place(name): return name.replace("attrib_", "attribution_").replace("_", "-")


class Lines(list):
    "Lines of the table"
    def add(self, model, task, size, setting, quantity, values, cite, n="", also=(), unit=None):
        "`values`: localization -> number"
        values = {k: v for k in PLACES if (v := values.get(k)) is not None and not pd.isna(v)}
        if not values: return
        unit = unit or unit_of(quantity)
        known = [*defects(task, values, quantity, unit), *also]
        self.append(["authors' run", model, task, str(size), "all nine" if tuple(values) == PLACES[:9] else " ".join(values), setting, quantity, "=", " ".join(number(v, unit) for v in values.values()), unit, str(n), " ".join(dict.fromkeys(known)), cite])


def asked_of(model, task, split, quantity):
    "How many facts, where it is known"
    if "MMLU" in quantity: return 100
    if unit_of(quantity) != "probability": return ""
    if "maintain" in quantity or "retained" in quantity or "neighborhood" in quantity and not ("relearned" in quantity and split.isdigit()): return 160 # five batches of 32
    if not split.isdigit(): return ""
    size, again = int(split), "relearned" in quantity
    asked = size // 2 if again else size # after relearning, the half that was not taught
    if "neighborhood" in quantity: return min(160, 10*asked)
    if "MCQ" in quantity and "counterfact" in task:
        there = QUESTIONS.get((model, size), "")
        return asked if there == size else "" if again else there # which facts of a half have a question is not known unless all have
    return min(160, 2*asked) if "paraphrase" in quantity else asked


def cells(table):
    "Runs of one model, task and set of facts: task, model, split, size, setting, rows by localization"
    table = table[table.task.isin(TASKS)].assign(localization=table.localization.map(place), forget_split=table.forget_split.astype(str))
    for (task, model, split), rows in table.groupby(["task", "model", "forget_split"]):
        size, setting = (split, "") if split.isdigit() else ("", split)
        yield TASKS[task], model, split, size, setting, rows


def finals(lines, folder):
    for task, model, split, size, setting, rows in cells(pd.read_csv(folder / "results/final_metrics.csv")):
        rows = rows.set_index("localization")
        root = "results_rebuttal" + ("_counterfact" if "counterfact" in task else "")
        for column, quantity in (TRAINED | ASKED).items():
            if column == "trainable_params": continue
            figures = WHERE[task][not (column in TRAINED or column.startswith("Normal"))]
            cite = root + (f", Figures {figures}" if unit_of(quantity) == "probability" else "")
            lines.add(model, task, size, setting, quantity, rows[column].to_dict(), cite, asked_of(model, task, split, quantity))
        parts = rows.trainable_params.astype(str).str.split("|", expand=True).astype(float)
        for k in parts: lines.add(model, task, size, f"part {k + 1}" if len(parts.columns) > 1 else setting, "parameters trained", parts[k].to_dict(), root)


def relearned(lines, folder):
    for task, model, split, size, setting, rows in cells(pd.read_csv(folder / "results/relearning.csv")):
        cite = "results_rebuttal" + ("_counterfact" if "counterfact" in task else "") + f", Figures {WHERE[task][2]}".replace("Figures 3", "Figure 3")
        for step in (0, 10, 20):
            at = rows[rows.step == step].set_index("localization")
            for column, quantity in ASKED.items():
                if column not in at or step < 20 and column != "Normal_forget": continue
                name = "relearned accuracy" if column == "Normal_forget" else f"{quantity}, relearned"
                if step < 20: name += f" at step {step}"
                lines.add(model, task, size, setting, name, at[column].to_dict(), cite, asked_of(model, task, split, quantity if "maintain" in quantity or "MMLU" in quantity else name))


def soft(lines, folder):
    for task, model, split, size, setting, rows in cells(pd.read_csv(folder / "results/softprompt.csv")):
        figure = WHERE[task][3]
        cite = "results_rebuttal" + ("_counterfact" if "counterfact" in task else "") + (f", Figures {figure}, 46" if figure == "45" and model == "gemma-2-9b" else f", Figure {figure}" if figure else "")
        for column, quantity in {"forget_acc": "forget", "edit_acc": "edit", "maintain_acc": "maintain"}.items():
            n = 32 if column == "maintain_acc" or not split.isdigit() else int(split)//2
            restarts = rows.groupby("localization")[column]
            assert (restarts.size() == 4).all()
            lines.add(model, task, size, f"{setting}, mean of 4 restarts".removeprefix(", "), f"soft prompt {quantity} accuracy", restarts.mean().to_dict(), cite, n)


def probes(lines, folder):
    table, own = pd.read_csv(folder / "results/probing_by_layer.csv"), {"gemma-7b": 42, "gemma-2-9b": 43, "llama-3-8b": 44}
    answers = {"forget_truth_acc": "probe forget accuracy", "forget_edit_acc": "probe edit accuracy"}
    for task, model, split, size, setting, rows in cells(table):
        cite, wide = f"results_rebuttal, Figures 40, 41, {own[model]}", rows.pivot(index="layer", columns="localization")
        for column, quantity in (answers | {"maintain_test_acc": "probe maintain accuracy"}).items():
            n = "" if "maintain" in quantity else int(split)
            lines.add(model, task, size, "", f"last {quantity}", wide[column].iloc[-1].to_dict(), cite, n)
            if column == "forget_truth_acc":
                lines.add(model, task, size, "", f"peak {quantity}", wide[column].max().to_dict(), cite, n)
                lines.add(model, task, size, "", f"layer of the peak {quantity}", wide[column].idxmax().to_dict(), cite, n)
    for task, model, split, size, setting, rows in cells(table.assign(forget_split="both")):
        for column, quantity in answers.items():
            mean = rows.groupby(["layer", "localization"])[column].mean().unstack()
            for layer in AT[model]: lines.add(model, task, "", f"after layer {layer}, mean of 2 runs", quantity, mean.loc[layer].to_dict(), f"results_rebuttal, Figures 40, 41, {own[model]}")


def sweeps(lines, folder):
    table = pd.read_csv(folder / "results/hyperparameter_sweeps.csv")
    parts = {"trainfmt_pile_accuracy": "text accuracy", "trainfmt_forget_sport_accuracy": "forget accuracy", "trainfmt_maintain_sport_accuracy": "maintain accuracy", "Normal_Injected_forget": "edit accuracy"}
    for (setting, model, sweep, at), rows in table.assign(at=table.lr.where(table.sweep == "lr", table.inject_coef)).groupby(["setting", "model", "sweep", "at"]):
        task, size, sport = ("sports-athlete-editing", "64", "") if setting.startswith("64") else ("full-sports-editing", "", "basketball, ")
        said = sport + (f"lr={at:g}, inject=1" if sweep == "lr" else f"inject={at:g}")
        for column, quantity in parts.items():
            lines.add(model, task, size, said, quantity, rows.assign(localization=rows.localization.map(place)).set_index("localization")[column].to_dict(), "results_sweeps",
                      asked_of(model, task, size, quantity), also=["same-rows"])


def masks(lines, folder):
    table = pd.read_csv(folder / "results/weight_masking.csv")
    which = {"athlete": ("sports-athlete-editing", "", "", "21, 22"), "basketball": ("sports-unlearning", "", "basketball, ", "19, 20"), "counterfact-edit": ("counterfact-editing", "16", "", "23-27"),
             "counterfact-unlearn": ("counterfact-unlearning", "16", "", "")}
    for (model, name, metric), rows in table.assign(localization=table.localization.map(place)).groupby(["model", "setting", "metric"]):
        task, size, sport, figures = which[name]
        wide = rows.pivot(index="n_weights_masked", columns="localization", values="value")
        cite, quantity = "results/google_*-results-*.json" + (f", Figures {figures}" if figures else ""), f"masked {MASKED[metric]}"
        n = 100 if metric == "MMLU" else size if size and "forget" in quantity and "paraphrase" not in quantity else ""
        also = ["older-set"] if "counterfact" in task else []
        lines.add(model, task, size, f"{sport}unedited, mean of {wide.loc[0].count()} evaluations", quantity, {"none": wide.loc[0].mean()}, cite, n, also)
        for k in (wide.index.max(), *((500000, 900000, 1200000) if name == "basketball" else ())):
            lines.add(model, task, size, f"{sport}{k/1e6:g} million zeros", quantity, wide.loc[k].to_dict(), cite, n, also)


def scaled(lines, folder):
    table, file = pd.read_csv(folder / "scaling/scaling_results_gemma7b.csv"), "experiments/scaling_counterfact/results_gemma7b.json"
    columns = {"final_forget_acc": "forget accuracy", "final_edit_acc": "edit accuracy", "final_mcq_truth_acc": "MCQ forget accuracy", "final_mcq_edit_acc": "MCQ edit accuracy"}
    probed = pd.read_csv(folder / "scaling/scaling_probe_by_layer_gemma7b.csv")
    probed = probed[probed.layer.between(20, 27)].groupby(["mode", "n_facts"]).probe_test_acc.mean()
    for r in table.itertuples():
        name, size = SCALED[r.mode], r.n_facts
        also = ["gradients", *{"flu": ["scale-layers"], "attention": ["attention-alone"]}.get(name, []), *(["scale-1000"] if size == 1000 else [])]
        for column, quantity in columns.items():
            mcq = "MCQ" in quantity
            lines.add("gemma-7b", "counterfact-at-scale", size, "", quantity, {name: getattr(r, column)}, file + (", Figures 7, 9" if mcq else ""), {30: 9, 100: 33, 300: 99, 1000: 357}[size] if mcq else "", also, "accuracy")
        lines.add("gemma-7b", "counterfact-at-scale", size, "mean of layers 20 to 27", "probe accuracy of the letter", {name: probed[(r.mode, size)]}, file + ", Figure 8", "", also)


def made(folder):
    "The lines of the authors' results"
    lines = Lines()
    for part in (finals, relearned, soft, probes, sweeps, masks, scaled): part(lines, Path(folder))
    return lines


def text(lines):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    if not (folder := os.environ.get("MECHUNLEARN_REFDATA")): sys.exit("MECHUNLEARN_REFDATA names the folder of the authors' results")
    with open(FILE, newline="") as f: head, *old = csv.reader(f)
    assert head == HEAD
    typed, new = [r for r in old if not (r[0] == "authors' run" and r[-1].startswith(MADE))], made(folder)
    if check:
        now, want = {tuple(r) for r in old if r not in typed}, {tuple(r) for r in new}
        for r in sorted(want - now): print("missing:", text([r]), end="")
        for r in sorted(now - want): print("not of the files:", text([r]), end="")
        sys.exit(now != want)
    FILE.write_text(text([head, *typed, *new]))
    print(json.dumps({"typed": len(typed), "lines": len(new), "numbers": sum(r[8].count(" ") + 1 for r in new), "kB": round(FILE.stat().st_size/1000)}))


if __name__ == "__main__": main()
