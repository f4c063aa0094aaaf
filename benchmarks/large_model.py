"""What a model of nine billion weights costs on one card: Gemma-2-9B's shape with random weights, one stage of each kind.

    python benchmarks/large_model.py [--device cuda] [--small] [--facts 16] [--save NAME]

One JSON object a line. The first is the machine: its name, and the rate at which it multiplies matrices of the model's sizes in its dtype. Then a line a stage: seconds, peak_gb (most memory
allocated on the card), tokens and tokens_per_s (read by the model, padding included), tflop (products of linear layers, forwards and backwards, counted as they happen), floor_s (tflop over the rate) and over_floor.
`step/...` is a step of localized fine-tuning of the MLPs of five early layers on 64 facts, 48 retained ones and 8 texts: AdamW or bitsandbytes' 8-bit states, with blocks computed twice or not, and with everything else in nf4;
`estimate_gb` is what the dry run says, `asked_gb` what it must stay below. The words are the organism's: the prompts are as long as real ones, what they say does not matter to the clock.
"""
import argparse, gc, json, time
from pathlib import Path
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM
from mechunlearn import finetuning as F
from mechunlearn.evaluation import evaluate
from mechunlearn.latent import run_latent
from mechunlearn.localization import build
from mechunlearn.memory import rest_quantized, step_memory
from mechunlearn.models import Component, load, wrap
from mechunlearn.patching import run_direct
from mechunlearn.probing import run_probing
from mechunlearn.relearning import relearn
from mechunlearn.softprompts import soft_prompt
from mechunlearn.tasks import make_task
from mechunlearn.tracing import run_attribution_patching, run_tracing

SHAPE = dict(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8, head_dim=256, vocab_size=256_000, sliding_window=4096)
SMALL = SHAPE | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=4000)
LINES = []


def say(**line):
    LINES.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items() if v is not None}); print(json.dumps(LINES[-1]), flush=True)


class Products:
    "Counts the products of linear layers, quantized ones too, and the tokens that enter the blocks"
    def __init__(self, lm):
        self.flop = self.tokens = 0
        self.first = lm.hf.get_submodule(lm.names["layers"])[0]
        self.handle = torch.nn.modules.module.register_module_forward_hook(self.see)
    def see(self, module, args, out):
        if module is self.first: self.tokens += out[0].shape[:-1].numel() if isinstance(out, tuple) else out.shape[:-1].numel()
        if not isinstance(module, torch.nn.Linear) or not args: return
        back = (out.requires_grad and args[0].requires_grad) + (out.requires_grad and module.weight.requires_grad)
        self.flop += 2 * args[0].numel() * module.out_features * (1 + back)


def model(shape, device):
    tok = load("organism", device="cpu").tok
    torch.manual_seed(0); torch.set_default_dtype(torch.bfloat16)
    with torch.device(device): hf = Gemma2ForCausalLM(Gemma2Config(**shape, bos_token_id=tok.bos_token_id, pad_token_id=tok.pad_token_id, eos_token_id=None))
    torch.set_default_dtype(torch.float32)
    if device == "meta": hf.hf_device_map = {"": "meta"}
    return wrap(hf, tok, "gemma-2-9b-random", "seed0")


def rate(lm):
    "TFLOP a second in products of an MLP's size with 2,048 tokens"
    x, w = (torch.randn(n, lm.d_model, device=lm.device, dtype=lm.hf.dtype) for n in (2048, lm.d_mlp))
    best = float("inf")
    for _ in range(5):
        finish(lm); t = time.perf_counter()
        for _ in range(20): torch.nn.functional.linear(x, w)
        finish(lm); best = min(best, (time.perf_counter() - t) / 20)
    return 2 * x.numel() * len(w) / best / 1e12


def finish(lm): torch.cuda.synchronize() if lm.device.type == "cuda" else None


def measure(lm, name, fn, tflops, n=1, warm=None, **more):
    "A line about `fn`, which does `n` of what is named"
    cuda = lm.device.type == "cuda"
    if warm: warm()
    if cuda: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    counted = Products(lm)
    try:
        finish(lm); t = time.perf_counter(); fn(); finish(lm)
        s, failed = (time.perf_counter() - t) / n, None
    except Exception as e: s, failed = float("nan"), f"{type(e).__name__}: {e}"[:200]
    counted.handle.remove()
    tflop, tokens = counted.flop / n / 1e12, counted.tokens / n
    say(name=name, seconds=s, peak_gb=torch.cuda.max_memory_allocated() / 1e9 if cuda else None, tokens=int(tokens), tokens_per_s=tokens / s, tflop=tflop, floor_s=tflop / tflops, over_floor=s * tflops / tflop if tflop else None, failed=failed, **more)


def stages(lm, task, tflops):
    draw = lambda seed: task
    measure(lm, "probing", lambda: run_probing(lm, draw, None, ["flu"], [0]), tflops)
    measure(lm, "attribution-patching", lambda: run_attribution_patching(lm, draw, None, ["attribution-patching"], [0]), tflops)
    measure(lm, "direct-effects", lambda: run_direct(lm, draw, None, [0]), tflops)
    measure(lm, "evaluation", lambda: evaluate(lm, task), tflops)
    measure(lm, "relearning", lambda: relearn(lm, task, None, steps=4, at=(4,), sides=(0,)), tflops, steps=4)
    measure(lm, "latent", lambda: run_latent(lm, draw, None, [], [0]), tflops)
    measure(lm, "soft-prompt", lambda: soft_prompt(lm, task, task.forget, steps=10), tflops, steps=10)
    measure(lm, "causal-tracing", lambda: run_tracing(lm, draw, None, ["causal-tracing-mlps"], [0]), tflops)


def steps(held, task, where, tflops, n=4):
    "`held` gives the model away: once the rest is quantized nothing may hold the old matrices"
    lm = held.pop()
    rows = next(F.draws(F.training_rows(lm, task), dict(forget=64, retain=48, text=8), 1, 0))
    def one(name, lm, asked, quantize=None, **how):
        train = lambda k: F.finetune(lm, task, where, lr=1e-5, steps=k, progress=False, **how)
        gb = sum(step_memory(SKELETON, where.slices, rows, how.get("optimizer"), how.get("checkpoint", False), quantize=quantize).values()) / 1e9
        measure(lm, f"step/{name}", lambda: train(n), tflops, n, lambda: train(1), trained=where.n_params, estimate_gb=gb, asked_gb=asked)
    one("adamw", lm, None)
    one("adamw-8bit", lm, 40., optimizer="adamw-8bit")
    one("adamw-8bit/checkpoint", lm, 40., optimizer="adamw-8bit", checkpoint=True)
    one("adamw-8bit/packed+remembered", lm, 40., optimizer="adamw-8bit", packed=True, remember=True)
    small = rest_quantized(lm, where.slices)
    del lm
    gc.collect()
    torch.cuda.empty_cache() if small.device.type == "cuda" else None
    one("adamw-8bit/nf4 rest", small, 24., "4bit", optimizer="adamw-8bit")
    one("adamw-8bit/nf4 rest/checkpoint", small, 24., "4bit", optimizer="adamw-8bit", checkpoint=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda"); p.add_argument("--small", action="store_true", help="a tiny shape, to try the script"); p.add_argument("--facts", type=int, default=16)
    p.add_argument("--only", default="stages,steps"); p.add_argument("--save", metavar="NAME", dest="name")
    a = p.parse_args()
    shape = SMALL if a.small else SHAPE
    lm, SKELETON = model(shape, a.device), model(shape, "meta")
    task, tflops = make_task("sports-athlete-editing", load("organism", device="cpu"), forget_size=a.facts), rate(lm)
    where = build(lm, "hand@first", [Component("mlp", l) for l in range(2, min(7, lm.n_layers))])
    say(name="machine", device=torch.cuda.get_device_name() if a.device == "cuda" else a.device, torch=torch.__version__, model=lm.name, parameters=lm.hf.num_parameters(), dtype="bfloat16", facts=a.facts, tflop_per_s=tflops)
    if "stages" in a.only: stages(lm, task, tflops)
    held = [lm]
    del lm
    if "steps" in a.only: steps(held, make_task("sports-athlete-editing", load("organism", device="cpu"), forget_size=64), where, tflops)
    if a.name: (Path(__file__).parent/"results"/f"{a.name}.jsonl").write_text("".join(json.dumps(l) + "\n" for l in LINES))
