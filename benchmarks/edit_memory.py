"""What holds the memory of an edit of a real model down: all weights of Gemma 3 270M, each choice in a process of its own.

    python benchmarks/edit_memory.py [--model gemma-3-270m] [--facts athletes] [--forget-size 16] [--place nonlocalized] [--steps 5] [--threads 2] [--save NAME]

One JSON object a line: the machine; then a line a choice, with `peak_mb` (of the process, Python and libraries included), `seconds` of the training, `over`
(seconds over those of the first line, which has the defaults) and `max_abs_diff`, how far its losses lie from the defaults'. `--save NAME` also writes results/NAME.jsonl.
"""
import argparse, json, resource, subprocess, sys, time
from pathlib import Path
import torch
from mechunlearn.finetuning import finetune
from mechunlearn.localization import localize
from mechunlearn.models import load
from mechunlearn.tasks import make_task

CHOICES = {"as it is": {}, "checkpoint": dict(checkpoint=True), "adamw-8bit": dict(optimizer="adamw-8bit"), "checkpoint, adamw-8bit": dict(checkpoint=True, optimizer="adamw-8bit")}


def alone(a):
    "One choice, in this process"
    torch.set_num_threads(a.threads)
    lm = load(a.model, device="cpu")
    task = make_task("sports-athlete-editing", lm, facts=a.facts, forget_size=a.forget_size, seed=0)
    where, begin = localize(lm, task, a.place), time.perf_counter()
    edit = finetune(lm, task, where, lr=1e-5, steps=a.steps, progress=False, **CHOICES[a.alone])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(dict(dtype=str(lm.hf.dtype).removeprefix("torch."), weights=where.n_params, seconds=round(time.perf_counter() - begin, 1), peak_mb=peak, losses=edit.curve.loss.tolist())))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="gemma-3-270m"); p.add_argument("--facts", default="athletes"); p.add_argument("--place", default="nonlocalized"); p.add_argument("--save", dest="name", metavar="NAME") # nnsight gives every object a `save`
    for name, n in (("forget-size", 16), ("steps", 5), ("threads", 2)): p.add_argument(f"--{name}", type=int, default=n)
    p.add_argument("--alone", choices=CHOICES, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.alone: return alone(a)
    found = {}
    for choice in CHOICES:
        said = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--alone", choice], check=True, stdout=subprocess.PIPE, text=True).stdout
        found[choice] = json.loads(said.splitlines()[-1])
    first = found["as it is"]
    lines = [dict(name="machine", device="cpu", threads=a.threads, torch=torch.__version__, model=a.model, dtype=first["dtype"], place=a.place, weights=first["weights"], facts=a.forget_size, steps=a.steps)]
    for choice, f in found.items():
        far = max(abs(x - y) for x, y in zip(f["losses"], first["losses"]))
        lines.append(dict(name=choice, seconds=f["seconds"], over=round(f["seconds"] / first["seconds"], 2), peak_mb=f["peak_mb"], max_abs_diff=round(far, 7)))
    for l in lines: print(json.dumps(l))
    if a.name: (Path(__file__).parent/"results"/f"{a.name}.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))


if __name__ == "__main__": main()
