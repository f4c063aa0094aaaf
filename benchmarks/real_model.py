"""What a real model costs: the whole standard pipeline on Gemma 3 270M, stage by stage, beside what its products alone must take.

    python benchmarks/real_model.py [--model gemma-3-270m] [--facts athletes] [--forget-size 16] [--localizations A,B,...]
        [--threads 2] [--device cpu] [--lr 1e-4] [--out FOLDER] [--save NAME]

The notebooks of the pipeline run one after another, each in a process of its own, with the parameters that `mechunlearn run` would give them. One JSON object
a line, for each stage and for all: seconds (without the start of Python and its imports), peak_mb (of the process), tflop (products of linear layers, forwards and backwards, counted
as they happen), floor_s (tflop over the rate that this machine multiplies matrices of the model's own sizes at, in its dtype), over_floor.
The first line is the machine: its rate, the model's dtype. `equal` repeats what is read once for several prompts (`models.parts`) without
it: the largest difference of a log-probability in float32, and the seconds of both, for the whole questionnaire of an edit and for a step of fine-tuning; and ten steps of an
edit of the last third with what lies below computed once (`remember`): the largest difference of a loss; and a step of the attacker's adapters on the model in bfloat16, multiplied in
bfloat16 and in float32: how far the gradients of either lie from those in float32 alone (a share of their length), and the seconds of both.
With `--device cuda` the stages follow each other in one process, and peak_mb is the most memory allocated on the card. `--save NAME` also writes results/NAME.jsonl.
"""
import argparse, json, os, subprocess, sys, tempfile, threading, time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch
import matplotlib; matplotlib.use("agg")
import psutil, torch
from IPython.core.interactiveshell import InteractiveShell
from mechunlearn import finetuning as F, relearning as R
from mechunlearn.evaluation import questionnaire
from mechunlearn.grids import make_job
from mechunlearn.localization import build
from mechunlearn.models import Component, load, next_token
from mechunlearn.runs import stage_notebook
from mechunlearn.tasks import make_task

SIX = "flu,causal-tracing-mlps,random-mlps,late,all-mlps,nonlocalized"


class Products:
    "Counts the products of linear layers: a forward, and on the way back one for the input and one for the weight, where they have a gradient"
    def __init__(self): self.flop, self.handle = 0, torch.nn.modules.module.register_module_forward_hook(self.see)
    def see(self, module, args, out):
        if not isinstance(module, torch.nn.Linear) or not args: return
        once = 2 * args[0].numel() * module.weight.shape[0]
        self.flop += once * (1 + (out.requires_grad and args[0].requires_grad) + (out.requires_grad and module.weight.requires_grad))


class Peak:
    "The most memory this process, or the card, had in a `with` block"
    def __init__(self, cuda=False): self.cuda = cuda
    def __enter__(self):
        self.go, self.high = True, 0
        if self.cuda: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        self.thread = threading.Thread(target=self.watch, daemon=True); self.thread.start()
        return self
    def watch(self):
        while self.go: self.high = max(self.high, psutil.Process().memory_info().rss); time.sleep(.02)
    def __exit__(self, *_):
        self.go = False; self.thread.join()
        if self.cuda: self.high = torch.cuda.max_memory_allocated()


def finish():
    if torch.cuda.is_initialized(): torch.cuda.synchronize()


def seconds(fn, n=1):
    finish(); start = time.perf_counter()
    for _ in range(n): fn()
    finish()
    return (time.perf_counter() - start) / n


def rate(lm):
    "TFLOP a second in products as large as those of 64 prompts of 16 tokens"
    x, w = (torch.randn(n, lm.d_model, device=lm.device).to(lm.hf.dtype) for n in (1024, lm.d_mlp))
    fn = lambda: torch.nn.functional.linear(x, w)
    seconds(fn, 5)
    return 2 * x.numel() * len(w) / min(seconds(fn, 20) for _ in range(5)) / 1e12


def run_stage(shell, stage, job):
    "The cells of a stage's notebook; an error ends the benchmark"
    for c in stage_notebook(stage).cells:
        if c.cell_type != "code": continue
        parameters = "parameters" in c.metadata.get("tags", [])
        source = "\n".join(f"{k} = {v!r}" for k, v in job.parameters.items()) if parameters else c.source
        shell.run_cell(source, silent=True).raise_error()


def equal(args):
    "What is computed once for several prompts or several steps, with and without"
    lm = load(args.model, device=args.device, dtype="float32")
    task = make_task("sports-athlete-editing", lm, forget_size=args.forget_size, **({"facts": args.facts} if args.facts else {}))
    asked = questionnaire(task)
    prompts, ids = [q.prompt for q in asked], [[lm.first_token(c) for c in q.choices] for q in asked]
    ask = lambda share: next_token(lm, prompts, ids, share=share)[0]
    (a, b), took = [ask(s) for s in (True, False)], [seconds(lambda: ask(s)) for s in (True, False)]
    where = build(lm, "hand@first", [Component("mlp", l) for l in range(lm.n_layers // 4)])
    batch = next(F.draws(F.training_rows(lm, task), dict(forget=64, retain=48), 1, 0))
    def step(share):
        values = F.masters(lm, where.slices)
        logits = F.end_logits(lm, F.matrices(lm, values), [r.ids for r in batch], share=share)
        logits.logsumexp(-1).mean().backward()
        return torch.cat([v.grad.flatten() for v in values.values()])
    g, h = step(True), step(False)
    yield dict(name="equal/questionnaire", prompts=len(prompts), max_abs_diff=(a - b)[~a.isnan()].abs().max().item(), ours_s=took[0], theirs_s=took[1])
    yield dict(name="equal/step", prompts=len(batch), max_abs_diff=((g - h).abs().max() / h.abs().max()).item(), ours_s=seconds(lambda: step(True), 2), theirs_s=seconds(lambda: step(False), 2))
    where, edits = build(lm, "hand@last", [Component("mlp", l) for l in range(2*lm.n_layers // 3, lm.n_layers)]), []
    train = lambda remember: edits.append(F.finetune(lm, task, where, lr=1e-5, steps=10, remember=remember, progress=False))
    took = [seconds(lambda: train(r)) for r in (True, False)]
    yield dict(name="equal/remember", steps=10, max_abs_diff=(edits[0].curve.loss - edits[1].curve.loss).abs().max(), ours_s=took[0], theirs_s=took[1])
    yield adapters_line(args)


def adapters_line(args):
    "A step of the attacker's adapters on the model in bfloat16"
    def gradient(dtype, ours=True):
        lm = load(args.model, device=args.device, dtype=dtype)
        task = make_task("sports-athlete-editing", lm, forget_size=args.forget_size, **({"facts": args.facts} if args.facts else {}))
        rows = R.training_rows(lm, task) | dict(forget=F.fact_rows(lm, task.forget, [f.answer for f in task.forget], "forget"))
        with patch.object(R, "_as_multiplied", R._as_multiplied if ours else lambda lm: nullcontext()), R.adapters(lm, R.lora_for(lm)) as params:
            drawn = torch.Generator().manual_seed(0)
            for p in params[1::2]: p.data.copy_(torch.randn(p.shape, generator=drawn)*1e-3)
            step = lambda: R.step_losses(lm, {}, next(iter(R.draws(rows, R.SIZES, 1, 0))), R.UPDATES["edit"])
            step(); g = torch.cat([p.grad.flatten() for p in params]).cpu()
            return g, seconds(step, 3)
    (exact, _), (ours, took), (theirs, other) = gradient("float32"), gradient("bfloat16"), gradient("bfloat16", False)
    off = lambda g: ((g - exact).norm() / exact.norm()).item()
    return dict(name="equal/adapters", from_float32=off(ours), theirs_from_float32=off(theirs), ours_s=took, theirs_s=other)


def job_of(args):
    "What `mechunlearn run` would do"
    facts = {"facts": args.facts} if args.facts else {}
    settings = {"device": args.device, "draws": 1} | ({"lr": args.lr} if args.lr else {})
    return make_job(args.model, "sports-athlete-editing", {"forget_size": args.forget_size} | facts, args.localizations.split(","), [0], settings, args.out)


def one_stage(args):
    "In a process of its own: seconds, products, memory"
    job = job_of(args)
    Path(job.run_dir).mkdir(parents=True, exist_ok=True)
    stage, counted, shell = next(s for s in job.stages if s.name == args.stage), Products(), InteractiveShell.instance()
    with Peak(args.device == "cuda") as peak: s = seconds(lambda: run_stage(shell, stage, job))
    counted.handle.remove()
    print("\n" + json.dumps(line := dict(seconds=s, tflop=counted.flop / 1e12, peak_mb=round(peak.high / 2**20))))
    return line


def alone(args):
    "A stage in another process"
    told = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--out", args.out, "--stage", args.stage], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(told.splitlines()[-1])


def main():
    p = argparse.ArgumentParser()
    for name, default in dict(model="gemma-3-270m", facts="athletes", localizations=SIX, out=None).items(): p.add_argument(f"--{name}", default=default)
    p.add_argument("--save", metavar="NAME", dest="name") # nnsight gives every object a method `save`
    p.add_argument("--forget-size", type=int, default=16); p.add_argument("--threads", type=int, default=2); p.add_argument("--lr", type=float)
    p.add_argument("--device", default="cpu"); p.add_argument("--skip-equal", action="store_true"); p.add_argument("--stage", help=argparse.SUPPRESS)
    args, lines = p.parse_args(), []
    torch.set_num_threads(args.threads)
    if args.stage: one_stage(args); return
    def say(**line):
        line = {k: round(v, 4 if v < 1 else 2) if isinstance(v, float) and v > 1e-3 else v for k, v in line.items()}
        lines.append(line); print(json.dumps(line), flush=True)
    lm = load(args.model, device=args.device)
    tflops = rate(lm)
    say(name="machine", device=torch.cuda.get_device_name() if args.device == "cuda" else "cpu", cores=os.cpu_count(), threads=args.threads, torch=torch.__version__, model=lm.name, dtype=str(lm.hf.dtype).removeprefix("torch."), tflop_per_s=tflops)
    del lm
    args.out, total = args.out or tempfile.mkdtemp(), dict(seconds=0., tflop=0., peak_mb=0)
    for stage in job_of(args).stages:
        args.stage = stage.name
        line = one_stage(args) if args.device == "cuda" else alone(args)
        say(name=stage.name, **line, floor_s=line["tflop"] / tflops, over_floor=line["seconds"] * tflops / line["tflop"] if line["tflop"] else None)
        total = {k: max(v, line[k]) if k == "peak_mb" else v + line[k] for k, v in total.items()}
    say(name="all", localizations=args.localizations, **total, minutes=total["seconds"] / 60, floor_s=total["tflop"] / tflops, over_floor=total["seconds"] * tflops / total["tflop"])
    if not args.skip_equal:
        for line in equal(args): say(**line)
    if args.name: (Path(__file__).parent/"results"/f"{args.name}.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))


if __name__ == "__main__": main()
