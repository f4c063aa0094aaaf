"""What does a step of localized fine-tuning cost, and is it the same step?

    python benchmarks/finetuning.py [--models llama-12x512,llama-4x2048,FOLDER] [--forget 64] [--retain 48] [--texts 8] [--repeat 3] [--threads 1] [--plain-batch 0]
        [--only step,memory,savings,masks,words] [--words 262144] [--device cpu] [--save NAME]

One JSON object a line: name, against, ours_s, theirs_s, ratio (theirs / ours; medians of alternating runs), floor (the ratio asked for) and over_floor, max_abs_diff
(of the first step's gradients, in parts of the largest) and equal (1e-4). A step is a forward and a backward of all rows, the clipping and AdamW.

`localized-step`: early MLPs (a quarter of the layers, from the second on), packed, with the frozen layers computed once; against
  - `plain loop`, as people write it: the whole model in Hugging Face, all its weights with gradients, all logits, gradients outside of the localization thrown away,
    with `peak_mb` and `their_peak_mb`: the highest memory of a process of its own above that of the loaded model, after two steps;
  - `our all-weights step`: every matrix of every head and MLP is trained;
  - `its products alone`: what the products of its linear layers would take at the rate at which this machine multiplies matrices of the model's size: the products that this very step makes,
    with the little padding that packing leaves.
    What is left (norms, gates, attention, the optimizer) grows with the width, products with its square: so a model LAYERSxWIDTH of any size can be asked for.
`default-step`: the same without options. `packed-step`, `remembered-step/early`, `remembered-step/late`: each option against the default, with the
`kept_mb` that it costs. `mask-step`: four steps in which a mask is learned, against four of fine-tuning the same weights. `text-gradient`: texts over a large vocabulary, against logits made twice, and against all logits at once.
"""
import argparse, copy, json, os, re, statistics, subprocess, sys
from pathlib import Path
import torch
from localization import LINES, Peak, llama, processor, say, timed
from real_model import Products, rate
from text_loss import all_at_once, model, texts
from mechunlearn import finetuning as F, masking as M
from mechunlearn.localization import build
from mechunlearn.models import Component, components, load
from mechunlearn.questions import token_loss
from mechunlearn.steps import Frozen
from mechunlearn.tasks import make_task

LR, FLOORS = 1e-5, {"plain loop": 2, "our all-weights step": 1 / .75, "its products alone": 1 / 1.3, "fine-tuning": 1 / 1.3}


# ---- the model, what is trained, and on what

def load_model(name, device):
    if not (size := re.fullmatch(r"llama-(\d+)x(\d+)", name)): return load(name, device=device, dtype="float32")
    return llama(load("organism", device="cpu").tok, device, *map(int, size.groups()))

def places(lm):
    L, mlps = lm.n_layers, lambda layers: [Component("mlp", l) for l in layers]
    return {"early": build(lm, "early", mlps(range(1, 1 + max(1, L // 4)))), "late": build(lm, "late", mlps(range(L - L // 3, L))),
            "all": build(lm, "nonlocalized", components(lm))}

def batch_of(lm, a):
    task = make_task("sports-athlete-editing", lm, forget_size=a.forget, **({} if lm.name.startswith("llama-") else {"facts": "athletes"}))
    return next(F.draws(F.training_rows(lm, task), dict(forget=a.forget, retain=a.retain, text=a.texts), 1, 0))


# ---- steps: a function each, which returns the gradients

def trained(values, opt, grads):
    torch.nn.utils.clip_grad_norm_(values, 1.)
    opt.step()
    opt.zero_grad()
    return grads

def our_step(lm, where, batch, packed=False, remember=False):
    values = F.masters(lm, where.slices)
    opt = torch.optim.AdamW(values.values(), lr=LR, weight_decay=0.)
    frozen = Frozen(lm, where.slices, [r.ids for r in batch if r.term != "text"]) if remember else None
    def step():
        F.step_losses(lm, values, batch, F.UPDATES["edit"], packed=packed, frozen=frozen)
        return trained(values.values(), opt, torch.cat([v.grad.flatten().cpu() for v in values.values()]))
    step.frozen = frozen
    return step

def plain_step(hf, where, batch, pad, size=0):
    "Nothing of the library: `size` rows at a time (0: all), a batch of facts and one of texts"
    hf.requires_grad_()
    params = {s.param: hf.get_parameter(s.param) for s in where.slices}
    opt = torch.optim.AdamW(params.values(), lr=LR, weight_decay=0.)
    facts, text = ([r for r in batch if (r.term == "text") == t] for t in (False, True))
    n, words = {t: sum(r.term == t for r in facts) for t in ("forget", "retain")}, sum(len(r.ids) - 1 for r in text)
    def parts(rows, k): return (rows[i:i + k] for i in range(0, len(rows), k or 1)) if k else [rows]
    def step():
        for part in parts(facts, size):
            logp = hf(**pad([r.ids for r in part])).logits[:, -1].float().log_softmax(-1)
            sum(-logp[i, r.target] / n[r.term] for i, r in enumerate(part)).backward()
        for part in parts(text, size and max(1, size // 8)) if text else ():
            x = pad([r.ids for r in part])
            logits, targets = hf(**x).logits[:, :-1].float(), x["input_ids"][:, 1:].masked_fill(x["attention_mask"][:, :-1] == 0, -100)
            (torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / words).backward()
        for name, p in hf.named_parameters():
            if name not in params: p.grad = None
        own = torch.cat([params[s.param].grad.narrow(s.dim, s.start, s.stop - s.start).flatten().cpu() for s in where.slices])
        for name, p in params.items(): _only(p, [s for s in where.slices if s.param == name])
        return trained(params.values(), opt, own)
    return step

def _only(p, slices):
    "Masked gradients"
    keep = torch.zeros_like(p)
    for s in slices: keep.narrow(s.dim, s.start, s.stop - s.start).fill_(1)
    p.grad *= keep


# ---- measuring

def compare(name, against, ours, theirs, repeat, same=None, tolerance=1e-4, **more):
    "Alternate; the first round warms up and is checked for equality"
    (first, a), (other_first, b) = timed(ours), timed(theirs)
    diff = {} if same is False else dict(max_abs_diff=((a - b).abs().max() / b.abs().max()).item())
    times = [(timed(ours)[0], timed(theirs)[0]) for _ in range(repeat)] or [(first, other_first)]
    tell(name, against, *(statistics.median(t) for t in zip(*times)), repeat=repeat, **diff, **({"equal": diff["max_abs_diff"] <= tolerance} if diff else {}), **more)

def tell(name, against, mine, other, **more):
    asked = FLOORS.get(against) if name.startswith(("localized-step", "mask-step")) else None
    floor = dict(floor=round(asked, 2), over_floor=other / mine >= asked) if asked else {}
    say(name=name, against=against, ours_s=round(mine, 4), theirs_s=round(other, 4), ratio=round(other / mine, 2), **floor, **more)

def products(step):
    "TFLOP of the linear layers in one step as it is made: what several prompts begin with once, what is remembered not at all"
    counted = Products()
    try: step()
    finally: counted.handle.remove()
    return counted.flop / 1e12

def alone(a, which, name):
    "Peak memory of one of the steps in a process of its own"
    args = [f"--{k.replace('_', '-')}={v}" for k, v in vars(a).items() if k not in ("name", "alone", "models")]
    out = subprocess.run([sys.executable, __file__, *args, "--models", name, "--alone", which], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])["peak_mb"]

def measure_alone(a):
    lm = load_model(a.models, a.device)
    batch, where = batch_of(lm, a), places(lm)["early"]
    with Peak() as p:
        step = plain_step(lm.hf, where, batch, lm.pad, a.plain_batch) if a.alone == "plain" else our_step(lm, where, batch, a.alone == "options", a.alone == "options")
        for _ in range(2): step()
    print(json.dumps(dict(peak_mb=p.mb)))

def run(name, a, only):
    lm = load_model(name, a.device)
    batch, where = batch_of(lm, a), places(lm)
    tokens = dict(model=lm.name, prompts=a.forget + a.retain, texts=sum(r.term == "text" for r in batch), tokens=sum(len(r.ids) for r in batch))
    best, default, = (our_step(lm, where["early"], batch, k, k) for k in (True, False))
    if "step" in only:
        memory = {}
        if "memory" in only:
            p, d, q = (alone(a, which, name) for which in ("options", "default", "plain"))
            memory = dict(peak_mb=p, default_peak_mb=d, their_peak_mb=q, memory_ratio=round(p / q, 2), memory_floor=.5, under_memory_floor=p <= .5 * q)
        plain = plain_step(copy.deepcopy(lm.hf), where["early"], batch, lm.pad, a.plain_batch)
        compare(f"localized-step/{lm.name}", "plain loop", best, plain, a.repeat, **memory, kept_mb=round(best.frozen.mb, 1), plain_batch=a.plain_batch, **tokens)
        plain = plain_step(copy.deepcopy(lm.hf), where["early"], batch, lm.pad, a.plain_batch) # from the same weights
        compare(f"default-step/{lm.name}", "plain loop", default, plain, a.repeat, **tokens)
        del plain
        compare(f"localized-step/{lm.name}", "our all-weights step", best, our_step(lm, where["all"], batch, True), a.repeat, same=False, **tokens)
        tflop, tflops = products(best), rate(lm)
        tell(f"localized-step/{lm.name}", "its products alone", statistics.median(timed(best)[0] for _ in range(max(1, a.repeat))), tflop / tflops,
             tflop=round(tflop, 4), tflop_per_s=round(tflops, 4), **tokens)
    if "savings" in only:
        make = lambda place, **how: our_step(lm, where[place], batch, **how)
        compare(f"packed-step/{lm.name}", "default", make("early", packed=True), make("early"), a.repeat, **tokens)
        for place in ("early", "late"):
            ours = make(place, remember=True)
            compare(f"remembered-step/{place}/{lm.name}", "default", ours, make(place), a.repeat, kept_mb=round(ours.frozen.mb, 1), from_layer=ours.frozen.layer, **tokens)

    if "masks" in only:
        learn, train = steps_of_both(lm, where["early"], batch, 4)
        compare(f"mask-step/{lm.name}", "fine-tuning", learn, train, a.repeat, same=False, **tokens)

def steps_of_both(lm, where, batch, n):
    "n steps as `learn_mask` and as `finetune` make them; a mask multiplies each weight by a gate that is drawn anew"
    values, shared = F.masters(lm, where.slices), dict(update=F.UPDATES["edit"], inject=1., micro_batch=128, clip=1., progress=False, own=None)
    learner = M.gated(F.masters(lm, where.slices), M.GATES["hard-concrete"], 1., 2e-5, 0)
    return (lambda: M._loop(lm, learner, [batch] * n, n, lr=1., **shared)), (lambda: F._train(lm, values, [batch] * n, n, LR, **shared))

def words(a):
    lm = model(load("organism", device="cpu").tok, a.words, a.device, torch.float32)
    batch, where = texts(lm, max(2, a.texts // 2), 64), build(lm, "mlp", [Component("mlp", 1)])
    rows = [F.Row("text", ids) for ids in batch["input_ids"].tolist()]
    def gradient(loss):
        values = F.masters(lm, where.slices)
        loss(values).sum().backward()
        return torch.cat([v.grad.flatten().cpu() for v in values.values()])
    ours = lambda: gradient(lambda values: F.text_losses(lm, values, rows))
    ways = {"logits made twice": lambda v: token_loss(lm, batch, F.matrices(lm, v))[0], "all logits at once": lambda v: all_at_once(lm, batch, F.matrices(lm, v))}
    for against, way in ways.items():
        theirs = lambda: gradient(way)
        with Peak() as p: ours()
        with Peak() as q: theirs()
        compare(f"text-gradient/{lm.name}", against, ours, theirs, a.repeat, peak_mb=p.mb, their_peak_mb=q.mb, texts=len(rows), tokens=64)

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--models", default="llama-12x512")
    for name, n in dict(forget=64, retain=48, texts=8, repeat=3, threads=1, plain_batch=0, words=262_144).items(): p.add_argument(f"--{name.replace('_', '-')}", type=int, default=n)
    p.add_argument("--only", default="step,memory,savings,masks,words")
    p.add_argument("--device", default="cpu")
    p.add_argument("--alone", help=argparse.SUPPRESS)
    p.add_argument("--save", metavar="NAME", dest="name")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.alone: sys.exit(measure_alone(a))
    say(device=torch.cuda.get_device_name() if a.device == "cuda" else processor(), threads=a.threads, torch=torch.__version__, cores=os.cpu_count())
    for name in filter(None, a.models.split(",")): run(name, a, a.only.split(","))
    if "words" in a.only.split(","): words(a)
    if a.name: (Path(__file__).parent / "results" / f"{a.name}.jsonl").write_text("".join(json.dumps(l) + "\n" for l in LINES))
