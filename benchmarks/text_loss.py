"""Loss on text over a large vocabulary, and the unembedding of the last position: time, memory, and is it the same?

    python benchmarks/text_loss.py [--texts 4,8] [--tokens 128] [--words 262144] [--repeat 1] [--threads 2] [--device cpu] [--save NAME]

One JSON object a line: name, against, ours_s, theirs_s, ratio (theirs / ours; medians of alternating runs; --repeat 0: the first runs), max_abs_diff, equal,
peak_mb of both (above what the process held before). `text-loss` is a forward, `text-loss-gradient` a forward and a backward through one MLP: unembedding a few
positions at a time against all logits at once; a line for each number of texts shows what grows with it. `last-position` is the forward
of 32 short prompts with `logits_to_keep=1` and frozen weights: the last hidden state made contiguous, and strided as transformers leaves it.
The model is random, with Gemma's number of words.
"""
import argparse, json, os
from contextlib import contextmanager
from pathlib import Path
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from localization import LINES, Peak, processor, say, timed
from mechunlearn.questions import token_loss
from mechunlearn.finetuning import masters, matrices
from mechunlearn.localization import build
from mechunlearn.models import Component, load, wrap


def model(tok, words, device, dtype):
    torch.manual_seed(0)
    hf = LlamaForCausalLM(LlamaConfig(hidden_size=640, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=1, head_dim=160,
        vocab_size=words, bos_token_id=tok.bos_token_id, pad_token_id=tok.pad_token_id, eos_token_id=None))
    return wrap(hf.to(device, dtype), tok, f"random-{words}-words")

def texts(lm, n, tokens):
    ids = torch.randint(5, lm.hf.config.vocab_size, (n, tokens), generator=torch.Generator().manual_seed(0))
    return lm.pad(ids.tolist())

def all_at_once(lm, batch, weights={}):
    logits = functional_call(lm.hf, weights, (), dict(batch, use_cache=False)).logits
    return cross_entropy(logits[:, :-1].float().transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")

def gradient(lm, loss, batch):
    values = masters(lm, build(lm, "mlp", [Component("mlp", 1)]).slices)
    loss(lm, batch, matrices(lm, values)).mean().backward()
    return torch.cat([v.grad.flatten().cpu() for v in values.values()])

@contextmanager
def strided(lm):
    "As transformers leaves it"
    hooks = lm.hf.get_output_embeddings()._forward_pre_hooks
    kept = dict(hooks)
    hooks.clear()
    try: yield
    finally: hooks.update(kept)

@torch.no_grad()
def last(lm, batch): return lm.hf(**batch, logits_to_keep=1, use_cache=False).logits[:, -1].float().cpu()

def strided_last(lm, batch):
    with strided(lm): return last(lm, batch)

@torch.no_grad()
def no_grad(fn, *args): return fn(*args).cpu()

def compare(name, against, ours, theirs, repeat, tolerance=1e-4, **more):
    "Alternate; the first round warms up, is checked for equality and measured for memory"
    with Peak() as p: first, a = timed(ours)
    with Peak() as q: other_first, b = timed(theirs)
    diff, size = (a - b).abs().max().item(), b.abs().max().item()
    times = [(timed(ours)[0], timed(theirs)[0]) for _ in range(repeat)] or [(first, other_first)]
    mine, other = (sorted(t)[len(t) // 2] for t in zip(*times))
    say(name=name, against=against, ours_s=round(mine, 4), theirs_s=round(other, 4), ratio=round(other / mine, 2), max_abs_diff=diff, largest=size,
        equal=diff <= tolerance * size, peak_mb=p.mb, their_peak_mb=q.mb, repeat=repeat, **more)

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--texts", default="4,8")
    p.add_argument("--tokens", type=int, default=128)
    p.add_argument("--words", type=int, default=262_144)
    p.add_argument("--repeat", type=int, default=1)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--device", default="cpu")
    p.add_argument("--save", metavar="NAME", dest="name")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    say(device=torch.cuda.get_device_name() if a.device == "cuda" else processor(), threads=a.threads, torch=torch.__version__)
    tok, ours = load("organism", device="cpu").tok, lambda *x: token_loss(*x)[0]
    lm = model(tok, a.words, a.device, torch.float32)
    for n in map(int, a.texts.split(",")):
        batch, about = texts(lm, n, a.tokens), dict(model=lm.name, texts=n, tokens=a.tokens)
        compare("text-loss", "all logits at once", lambda: no_grad(ours, lm, batch), lambda: no_grad(all_at_once, lm, batch), a.repeat, **about)
        compare("text-loss-gradient", "all logits at once", lambda: gradient(lm, ours, batch), lambda: gradient(lm, all_at_once, batch), a.repeat, 1e-4, **about)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        lm.hf.to(dtype)
        batch = texts(lm, 32, 12)
        compare("last-position", "strided", lambda: last(lm, batch), lambda: strided_last(lm, batch), a.repeat, tolerance,
            model=lm.name, prompts=32, tokens=12, dtype=str(dtype).removeprefix("torch."))
    if a.name:
        folder = Path(__file__).parent / "results"
        folder.mkdir(exist_ok=True)
        (folder / f"{a.name}.jsonl").write_text("".join(json.dumps(l) + "\n" for l in LINES))
