"""How much faster are our maps than one forward per component, and are they the same?

    python benchmarks/localization.py [--facts 32] [--repeat 3] [--threads 2] [--device cpu] [--only causal-tracing,direct-path,...] [--shapes]
        [--processes 1] [--save NAME]

One JSON object a line: name, against, ours_s, theirs_s, ratio (theirs / ours; medians of alternating runs), floor, over_floor,
max_abs_diff (patched logits), equal (1e-4 of the largest logit), peak_mb of both. For causal tracing also `ceiling`, the ratio that
prefix sharing and suffix-only allow if a token costs the same in every layer, and `of_ceiling`. `--shapes` (GPU): random weights in the
shapes of Llama-3-8B and Gemma-2-9B, bf16, 64 prompts. `--processes N`: as many fresh processes one after another, of which the one with the middle
ratio is kept for each line, with `lowest` and `highest`: on two threads the same loop varies by a third from process to process. `--save NAME` also writes results/NAME.jsonl and, as a table, results/NAME.md.
"""
import argparse, copy, json, os, platform, statistics, subprocess, sys, tempfile, threading, time
from pathlib import Path
import pandas as pd, psutil, torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from mechunlearn.facts import world_facts
from mechunlearn.models import Component, components, load, wrap
from mechunlearn.patching import direct_effect, through
from mechunlearn.tracing import attribution_patching, causal_tracing, swap_cases

FLOORS = {"causal-tracing": 3, "direct-path/organism": 15, "direct-path/llama-12x512": 40, "mlp-to-extraction": 3, "attribution": 1 / 1.3}


# ---- models and prompts

def llama(tok, device, layers=12, width=512, **size):
    torch.manual_seed(0)
    config = dict(hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8, vocab_size=len(tok),
                  bos_token_id=tok.bos_token_id, pad_token_id=tok.pad_token_id, eos_token_id=None, max_position_embeddings=512)
    return wrap(LlamaForCausalLM(LlamaConfig(**config | size)).to(device), tok, f"llama-{layers}x{width}")

def shapes(tok):
    common = dict(bos_token_id=tok.bos_token_id, pad_token_id=tok.pad_token_id, eos_token_id=None)
    made = {"llama-3-8b": (LlamaForCausalLM, LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=128256, **common)),
            "gemma-2-9b": (Gemma2ForCausalLM, Gemma2Config(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
                num_key_value_heads=8, head_dim=256, vocab_size=256000, sliding_window=4096, **common))}
    for name, (cls, config) in made.items():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"): hf = cls(config)
        torch.set_default_dtype(torch.float32)
        yield wrap(hf, tok, name)
        del hf
        torch.cuda.empty_cache()

def sports(n):
    known = [f for f in world_facts() if f.relation == "sport" and f.taught]
    return known[:n], known


# ---- what people use: one forward per component, everything by hooks

def column(lm, c): return slice(None) if c.kind == "mlp" else slice(c.head * lm.head_dim, (c.head + 1) * lm.head_dim)

def forward(lm, batch, hooks=lambda l, block: [], **how):
    handles = [h for l, block in enumerate(lm.hf.model.layers) for h in hooks(l, block)]
    try: return lm.hf(**batch, logits_to_keep=1, use_cache=False, **how).logits[:, -1]
    finally:
        for h in handles: h.remove()

def pre_mlp(block): return getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)

def see(kept):
    def hooks(l, block):
        def z(_, args): kept["head", l] = args[0].clone()
        def mlp(_, args, out): kept["mlp", l] = out.clone()
        def norm(name):
            def look(_, args): kept[name, l] = args[0].clone()
            return look
        return [block.self_attn.o_proj.register_forward_pre_hook(z), block.mlp.register_forward_hook(mlp),
                block.input_layernorm.register_forward_pre_hook(norm("attn_in")), pre_mlp(block).register_forward_pre_hook(norm("mlp_in"))]
    return hooks

def put(lm, c, value):
    "Write one component"
    def hooks(l, block):
        if l != c.layer: return []
        def z(_, args): x = args[0].clone(); x[..., column(lm, c)] = value[..., column(lm, c)]; return (x,)
        return [block.mlp.register_forward_hook(lambda _, a, out: value)] if c.kind == "mlp" else [block.self_attn.o_proj.register_forward_pre_hook(z)]
    return hooks

def hold(lm, clean, free=()):
    "Freeze every head and MLP but those in `free`"
    def hooks(l, block):
        def z(_, args):
            x = clean["head", l].clone()
            for c in free:
                if c.kind == "head" and c.layer == l: x[..., column(lm, c)] = args[0][..., column(lm, c)]
            return (x,)
        def mlp(_, args, out): return out if Component("mlp", l) in free else clean["mlp", l]
        return [block.self_attn.o_proj.register_forward_pre_hook(z), block.mlp.register_forward_hook(mlp)]
    return hooks

def both(a, b): return lambda l, block: a(l, block) + b(l, block)

def changed(lm, clean, other, c):
    out = dict(clean)
    out[c.kind, c.layer] = clean[c.kind, c.layer].clone()
    out[c.kind, c.layer][..., column(lm, c)] = other[c.kind, c.layer][..., column(lm, c)]
    return out

@torch.no_grad()
def tracing_loop(lm, clean_batch, other_batch, answers):
    kept, out = {}, []
    forward(lm, clean_batch, see(kept))
    for c in components(lm): out.append(forward(lm, other_batch, put(lm, c, kept[c.kind, c.layer])).gather(1, answers))
    return torch.stack(out)

@torch.no_grad()
def direct_loop(lm, clean_batch, other_batch, answers):
    clean, other, out = {}, {}, []
    forward(lm, clean_batch, see(clean)); forward(lm, other_batch, see(other))
    for c in components(lm): out.append(forward(lm, clean_batch, hold(lm, changed(lm, clean, other, c))).gather(1, answers))
    return torch.stack(out)

@torch.no_grad()
def path_loop(lm, clean_batch, other_batch, answers, receivers):
    clean, other, out = {}, {}, []
    forward(lm, clean_batch, see(clean)); forward(lm, other_batch, see(other))
    for c in components(lm, ("mlp",)):
        reached = {}
        forward(lm, clean_batch, both(hold(lm, changed(lm, clean, other, c)), see(reached)))
        def hear(l, block):
            def norm(name):
                def add(_, args): return (args[0] + reached[name, l] - clean[name, l],)
                return add
            return [block.input_layernorm.register_forward_pre_hook(norm("attn_in")), pre_mlp(block).register_forward_pre_hook(norm("mlp_in"))]
        out.append(forward(lm, clean_batch, both(hear, hold(lm, clean, receivers))).gather(1, answers))
    return torch.stack(out)

def two_forwards_one_backward(lm, clean_batch, other_batch, answers, clean_hooks=lambda l, b: [], hooks=lambda l, b: []):
    with torch.no_grad(): forward(lm, clean_batch, clean_hooks)
    x = lm.hf.get_input_embeddings()(other_batch["input_ids"]).detach().requires_grad_()
    with torch.enable_grad():
        logits = forward(lm, {k: v for k, v in other_batch.items() if k != "input_ids"}, hooks, inputs_embeds=x).gather(1, answers)
        (logits[:, 0] - logits[:, 1]).sum().backward()

def plain_attribution(lm, clean_batch, other_batch, answers):
    "First-order gains by plain autograd; only compared, not timed"
    clean, other = {}, {}
    def watch(l, block):
        def z(_, args): other["head", l] = args[0]; args[0].retain_grad()
        def mlp(_, args, out): other["mlp", l] = out; out.retain_grad()
        return [block.self_attn.o_proj.register_forward_pre_hook(z), block.mlp.register_forward_hook(mlp)]
    two_forwards_one_backward(lm, clean_batch, other_batch, answers, see(clean), watch)
    gain = {k: (clean[k] - x.detach()) * x.grad for k, x in other.items()}
    return torch.stack([gain[c.kind, c.layer][..., column(lm, c)].sum((1, 2)) for c in components(lm)])

def our_attribution(lm, facts, how):
    raw = attribution_patching(lm, facts, **how).raw
    return torch.stack([raw[c.kind][0, ..., c.layer].sum(1) if c.kind == "mlp" else raw["head"][0, ..., c.layer, c.head].sum(1) for c in components(lm)])

def transformer_lens(lm, clean_batch, other_batch, answers):
    "Its patching loop over heads and MLPs"
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge
    with tempfile.TemporaryDirectory() as folder:
        lm.hf.config.save_pretrained(folder)
        lm.tok.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=copy.deepcopy(lm.hf))
    bridge.eval()
    patching.tqdm = lambda x, *a, **k: x # no bars
    def loop(*_):
        out = []
        with torch.no_grad():
            _, cache = bridge.run_with_cache(clean_batch["input_ids"])
            metric = lambda logits: out.append(logits[:, -1].gather(1, answers)) or logits.new_zeros(())
            patching.generic_activation_patch(bridge, other_batch["input_ids"], cache, metric, lambda x, i, clean: clean, "mlp_out", ("layer",))
            patching.get_act_patch_attn_head_out_all_pos(bridge, other_batch["input_ids"], cache, metric)
        return torch.stack(out)
    return loop


# ---- measuring

class Peak:
    "Highest memory of this process (GPU: of the allocator) above where it began, in MB"
    def __enter__(self):
        self.cuda = torch.cuda.is_available()
        if self.cuda: torch.cuda.reset_peak_memory_stats(); self.base = torch.cuda.memory_allocated(); return self
        self.go, self.base = True, psutil.Process().memory_info().rss
        self.high, self.thread = self.base, threading.Thread(target=self.watch)
        self.thread.start()
        return self
    def watch(self):
        while self.go: self.high = max(self.high, psutil.Process().memory_info().rss); time.sleep(.002)
    def __exit__(self, *_):
        if self.cuda: torch.cuda.synchronize(); self.high = torch.cuda.max_memory_allocated()
        else: self.go = False; self.thread.join()
        self.mb = round((self.high - self.base) / 2**20, 1)

def timed(fn):
    if torch.cuda.is_available(): torch.cuda.synchronize()
    start = time.perf_counter()
    out = fn()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter() - start, out

LINES = []

def say(**line):
    LINES.append(line)
    print(json.dumps(line), flush=True)

def compare(name, against, ours, theirs, repeat, floor, same=None, **more):
    "Alternate; the first round warms up and is checked for equality (against `same`, where `theirs` computes less)"
    with Peak() as p: a = ours()
    with Peak() as q: b = theirs()
    if same: b = same()
    diff = (a - b.cpu()).abs().max().item()
    times = [(timed(ours)[0], timed(theirs)[0]) for _ in range(repeat)]
    mine, other = (statistics.median(t) for t in zip(*times))
    ratio = other / mine
    if "ceiling" in more: more["of_ceiling"] = round(ratio / more["ceiling"], 2)
    equal = diff <= 1e-4 * max(1., b.abs().max().item())
    say(name=name, against=against, ours_s=round(mine, 4), theirs_s=round(other, 4), ratio=round(ratio, 2), floor=round(floor, 2),
        over_floor=ratio >= floor, max_abs_diff=diff, equal=equal, peak_mb=p.mb, their_peak_mb=q.mb, repeat=repeat, **more)

def save(name):
    "results/NAME.jsonl and the same as a table"
    folder, first, *lines = Path(__file__).parent / "results", *LINES
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(l) + "\n" for l in LINES))
    t = pd.DataFrame(lines)
    shown = pd.DataFrame({"what": t.name, "against": t.against, "facts": t.facts, "tokens": t.tokens, "ours, s": t.ours_s, "theirs, s": t.theirs_s,
        "ratio": t.ratio, "asked": t.floor, "of ceiling": t.get("of_ceiling", pd.Series(float("nan"), t.index)), "largest difference": t.max_abs_diff.map("{:.0e}".format),
        "peak MB, ours": t.peak_mb, "theirs": t.their_peak_mb})
    if "lowest" in t: shown.insert(7, "in all processes", [f"{a} to {b}" for a, b in zip(t.lowest, t.highest)])
    rows = [list(shown), ["---"] * shown.shape[1], *shown.astype(object).where(shown.notna(), "").values.tolist()]
    table = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
    about = ", ".join(f"{k} {v}" for k, v in first.items())
    (folder / f"{name}.md").write_text(f"`python benchmarks/localization.py`: {about}; medians of alternating runs.\n\n{table}\n")

def processor():
    "Its name, where the system tells"
    info = Path("/proc/cpuinfo")
    names = [l.split(":")[1].strip() for l in info.read_text().splitlines() if l.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()

def ceiling(lm, cases):
    "Tokens x layers of one forward per component, over those from the subject and the component on (and one prefix, one clean, one corrupted run)"
    tokens, L = len(lm.ids([cases[0].fact.prompt])[0]), lm.n_layers
    end = -min(c.span[0] for c in cases)
    theirs = (len(components(lm)) + 2) * tokens * L
    ours = (tokens - end) * L + 2 * end * L + sum(end * (L - c.layer) for c in components(lm))
    return round(theirs / ours, 2)

def run(lm, facts, pool, only, repeat, peers=False):
    cases = swap_cases(lm, facts, pool, 0)
    length = max(set(n := [len(i) for i in lm.ids([c.fact.prompt for c in cases])]), key=n.count)
    cases = [c for c, k in zip(cases, n) if k == length] # one length: no padding for anybody
    facts, n = [c.fact for c in cases], len(cases)
    cases = swap_cases(lm, facts, pool, 0)
    clean_batch, other_batch = lm.encode([c.fact.prompt for c in cases]), lm.encode([c.corrupt for c in cases])
    answers = torch.tensor([c.answers for c in cases], device=lm.device)
    how = dict(pool=pool, batch_size=2 * n, progress=False, min_gap=-1e9)
    receivers = [Component("head", l, h) for l in range(lm.n_layers // 2, lm.n_layers) for h in (1, 2)] + [Component("mlp", lm.n_layers - 1)]
    args, info = (lm, clean_batch, other_batch, answers), dict(model=lm.name, facts=n, tokens=length)
    floor = lambda name: FLOORS.get(f"{name}/{lm.name}", FLOORS.get(name))
    if "causal-tracing" in only:
        ours = lambda: causal_tracing(lm, facts, **how).raw["patched"][0, :, 0]
        compare(f"causal-tracing/{lm.name}", "one hook a forward", ours, lambda: tracing_loop(*args), repeat, floor("causal-tracing"), ceiling=ceiling(lm, cases), **info)
        if peers: compare(f"causal-tracing/{lm.name}", "TransformerLens", ours, lambda loop=transformer_lens(*args): loop(), repeat, floor("causal-tracing"), **info)
    if "direct-path" in only:
        compare(f"direct-path/{lm.name}", "one frozen forward a component", lambda: direct_effect(lm, facts, **how).raw["patched"].transpose(0, 1),
                lambda: direct_loop(*args), repeat, floor("direct-path"), **info)
    if "mlp-to-extraction" in only:
        compare(f"mlp-to-extraction/{lm.name}", "two frozen forwards an MLP", lambda: through(lm, facts, receivers, **how).raw["patched"].transpose(0, 1),
                lambda: path_loop(*args, receivers), repeat, floor("mlp-to-extraction"), **info)
    if "attribution" in only:
        compare(f"attribution/{lm.name}", "two forwards and one backward", lambda: our_attribution(lm, facts, how),
                lambda: two_forwards_one_backward(*args), repeat, floor("attribution"), same=lambda: plain_attribution(*args), **info)

def processes(n, args):
    "Of n processes the one with the middle ratio, for each comparison"
    made = []
    for i in range(n):
        out = subprocess.run([sys.executable, __file__, *args], check=True, stdout=subprocess.PIPE, text=True).stdout
        made += [line | {"process": i} for line in map(json.loads, out.splitlines())]
    say(**{k: v for k, v in made[0].items() if k != "process"}, processes=n)
    lines = pd.DataFrame([line for line in made if "ratio" in line])
    for _, group in lines.groupby(["name", "against"], sort=False):
        group = group.sort_values("ratio")
        middle = json.loads(group.iloc[(len(group) - 1) // 2].dropna().drop("process").to_json())
        say(**middle | dict(lowest=float(group.ratio.min()), highest=float(group.ratio.max()), equal=bool(group.equal.all())))

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--facts", type=int, default=32)
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--device", default="cpu")
    p.add_argument("--only", default="causal-tracing,direct-path,mlp-to-extraction,attribution")
    p.add_argument("--models", default="organism,llama-12x512")
    p.add_argument("--shapes", action="store_true", help="random weights in the shapes of 8-9 B models (GPU)")
    p.add_argument("--processes", type=int, default=1)
    p.add_argument("--save", metavar="NAME", dest="name")
    a = p.parse_args()
    if a.processes > 1:
        without = [f"--{k}={v}" for k, v in vars(a).items() if k not in ("processes", "name", "shapes")] + ["--shapes"] * a.shapes
        processes(a.processes, without)
        if a.name: save(a.name)
        sys.exit()
    torch.set_num_threads(a.threads)
    organism, only = load("organism", device=a.device), a.only.split(",")
    say(device=torch.cuda.get_device_name() if a.device == "cuda" else processor(), threads=a.threads, torch=torch.__version__)
    facts, pool = sports(a.facts)
    if a.shapes:
        for lm in shapes(organism.tok): run(lm, *sports(64), only, a.repeat)
    elif "organism" in a.models: run(organism, facts, pool, only, a.repeat)
    if "llama" in a.models and not a.shapes:
        try: import transformer_lens as peers
        except ImportError: peers = None
        run(llama(organism.tok, a.device), facts, pool, only, a.repeat, peers is not None)
    if a.name: save(a.name)
