import itertools
import numpy as np, pytest, torch
from plain import blocks, every_family, last_norm, parts
from mechunlearn import tracing
from mechunlearn.facts import Fact, Task
from mechunlearn.models import Component, components
from mechunlearn.store import Refusal, Run, load_table
from mechunlearn.tracing import (Patch, Scores, attribution_grid, attribution_patching, causal_tracing, draw_noise, noise_cases, normalise, patched, rank_stability, read, record,
    run_patches, run_tracing, same_frame, swap_cases, swap_subject, token_labels, trace_grid)

SPORTS = (" football", " baseball", " basketball")
SUBJECTS = ["dog", "sport", "player", "league", "doger", "sporter", "the dog", "a player"]
TEMPLATES = ["Fact: {} plays the sport of", "The sport played by {} is", "{} is a professional", "Fact: of\nFact: {} plays the sport of"]


def make_facts(n=8):
    "Subjects of one and two tokens, prompts of different lengths"
    return [Fact(id=f"sport/{i}", relation="sport", subject=s, answer=SPORTS[i % 3], candidates=SPORTS, prompt=TEMPLATES[i % 4].format(s))
            for i, s in enumerate(SUBJECTS[:n])]


# ---- an independent implementation: plain hooks, one fact and one component a forward

def hidden(args, kwargs): return args[0] if args else kwargs["hidden_states"]

def forward(lm, ids, noise=None, span=None, keep=None, write=None):
    "Last logits; `keep` collects {name: (module, 'in'|'out')}, `write` lists (module, 'in'|'out', columns, position, value)"
    handles, kept = [], {}
    if noise is not None:
        def add(_, args, kwargs):
            x = hidden(args, kwargs).clone()
            x[0, x.shape[1] + span[0]:x.shape[1] + span[1]] += noise
            return (x, *args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}
        handles.append(blocks(lm.hf)[0].register_forward_pre_hook(add, with_kwargs=True))
    for name, (module, side) in (keep or {}).items():
        def see(_, args, kwargs, out, name=name, side=side): kept[name] = (hidden(args, kwargs) if side == "in" else out).clone()
        handles.append(module.register_forward_hook(see, with_kwargs=True))
    for module, side, cols, at, value in write or ():
        def put_in(_, args, at=at, cols=cols, value=value): x = args[0].clone(); x[:, at, cols] = value[:, at, cols]; return (x,)
        def put_out(_, args, out, at=at, cols=cols, value=value): out = out.clone(); out[:, at, cols] = value[:, at, cols]; return out
        handles.append(module.register_forward_pre_hook(put_in) if side == "in" else module.register_forward_hook(put_out))
    with torch.no_grad(): logits = lm.hf(torch.tensor([ids])).logits[0, -1]
    for h in handles: h.remove()
    return logits, kept

def site(lm, kind, layer, head=None):
    block = parts(lm.hf, layer)
    if kind == "head": return block.out, "in", slice(head * lm.head_dim, (head + 1) * lm.head_dim)
    return dict(resid=block.block, mlp=block.mlp, attn=block.attn_adds)[kind], "out", slice(None)

def brute(lm, case, places, noise=None):
    "Logits at the answers [places, k] for (kind, layer, head, position), and the clean and corrupted ones"
    clean_ids, bad_ids = lm.ids([case.fact.prompt, case.corrupt])
    keep = {p: site(lm, *p[:3])[:2] for p in places}
    clean, kept = forward(lm, clean_ids, keep=keep)
    corrupt, _ = forward(lm, bad_ids, noise, case.span)
    out = []
    for p in places:
        module, side, cols = site(lm, *p[:3])
        at = slice(None) if p[3] is None else p[3]
        out.append(forward(lm, bad_ids, noise, case.span, write=[(module, side, cols, at, kept[p])])[0][list(case.answers)])
    return clean[list(case.answers)], corrupt[list(case.answers)], torch.stack(out)

def places(lm): return [(c.kind, c.layer, c.head, None) for c in components(lm)]


@every_family
def test_swap_equals_brute_force(lm):
    s = causal_tracing(lm, make_facts(), batch_size=5, progress=False)
    cases = swap_cases(lm, make_facts())
    clean, corrupt, good = (torch.stack(x) for x in zip(*[brute(lm, c, places(lm)) for c in cases]))
    torch.testing.assert_close(s.raw["clean"][0], clean, rtol=0, atol=1e-5)
    torch.testing.assert_close(s.raw["corrupt"][0, 0], corrupt, rtol=0, atol=1e-5)
    torch.testing.assert_close(s.raw["patched"][0, :, 0], good.transpose(0, 1), rtol=0, atol=1e-5)


def test_scores_equal_brute_force_where_denominators_are_large(lm):
    last_norm(lm.hf).weight.data += 30 # larger logits
    s, cases = causal_tracing(lm, make_facts(), batch_size=5, progress=False), swap_cases(lm, make_facts())
    clean, corrupt, good = (torch.stack(x) for x in zip(*[brute(lm, c, places(lm)) for c in cases]))
    ld = lambda x: (x[..., 0] - x[..., 1]).double().numpy()
    gap, gain = ld(clean) - ld(corrupt), ld(good).T - ld(corrupt)
    ok = gap > .05
    assert ok.any() and abs(gap.mean()) > .05 and (s.table.n_per_fact == ok.sum()).all()
    np.testing.assert_allclose(s.table.score_per_fact, (gain[:, ok] / gap[ok]).mean(1), atol=1e-3)
    if gap.mean() < 0: assert s.table.score.isna().all()
    np.testing.assert_allclose(normalise(s.raw, "swap", -99).score, gain.mean(1) / gap.mean(), atol=1e-3)


@every_family
def test_noise_equals_brute_force(lm):
    facts, seed, n = make_facts(5), 3, 2
    s = causal_tracing(lm, facts, "noise", noise=2., n_noise=n, seed=seed, batch_size=4, progress=False)
    cases = noise_cases(lm, facts)
    embedded = [forward(lm, lm.ids([c.fact.prompt])[0], keep={"x": (blocks(lm.hf)[0], "in")})[1]["x"][0] for c in cases]
    sd = torch.cat([x[len(x) + c.span[0]:len(x) + c.span[1]].flatten() for x, c in zip(embedded, cases)]).std().item()
    assert s.config["sd"] == pytest.approx(2 * sd, rel=1e-5)
    for (i, c), k in itertools.product(enumerate(cases), range(n)):
        noise = s.config["sd"] * draw_noise(c.span[1] - c.span[0], lm.d_model, seed, k, i)
        clean, corrupt, good = brute(lm, c, places(lm), noise)
        torch.testing.assert_close(s.raw["clean"][0, i], clean, rtol=0, atol=1e-5)
        torch.testing.assert_close(s.raw["corrupt"][0, k, i], corrupt, rtol=0, atol=1e-5)
        torch.testing.assert_close(s.raw["patched"][0, :, k, i], good, rtol=0, atol=1e-5)


def test_noise_scores_are_restored_probability(tiny):
    lm = tiny("llama")
    last_norm(lm.hf).weight.data *= 10 # more certain predictions
    top = [lm.tok.decode([i]) for i in record(lm, lm.encode(["Fact: dog plays the sport of"])).logits[0].topk(1).indices]
    f = Fact(id="a", relation="r", subject="dog", answer=" " + top[0], candidates=(" " + top[0],), prompt="Fact: dog plays the sport of")
    s = causal_tracing(lm, [f], "noise", n_noise=3, progress=False)
    p = s.raw["clean"][1, :, 0].exp(), s.raw["corrupt"][1, :, :, 0].exp(), s.raw["patched"][1, ..., 0].exp()
    gap = (p[0] - p[1]).mean().item()
    assert gap > .05
    np.testing.assert_allclose(s.table.score, (p[2] - p[1]).mean((1, 2)).numpy() / gap, atol=1e-5)
    np.testing.assert_allclose(s.table.patched, p[2].mean((1, 2)).numpy(), atol=1e-6)


@every_family
@pytest.mark.parametrize("kind", ["mlp", "attn", "resid"])
def test_grid_equals_brute_force(lm, kind):
    cases = swap_cases(lm, make_facts())
    raw_places = [(kind, l, None, p) for l in range(lm.n_layers) for p in (-1, -2, -4)]
    raw = run_patches(lm, cases, [Patch(*p) for p in raw_places], batch_size=7, progress=False)
    for i, c in enumerate(cases):
        torch.testing.assert_close(raw["patched"][0, :, 0, i], brute(lm, c, raw_places)[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind,width", [("mlp", 2), ("attn", 3), ("resid", 2), ("mlp", 9)])
def test_windows_equal_brute_force(lm, kind, width):
    facts, n = make_facts(4), lm.n_layers
    cases, patches = noise_cases(lm, facts), [Patch(kind, l, None, p, width) for l in range(n) for p in (-1, -3)]
    raw = run_patches(lm, cases, patches, sd=.7, batch_size=5, progress=False)
    for i, c in enumerate(cases):
        ids, noise = lm.ids([c.fact.prompt])[0], .7 * draw_noise(c.span[1] - c.span[0], lm.d_model, 0, 0, i)
        _, kept = forward(lm, ids, keep={l: site(lm, kind, l)[:2] for l in range(n)})
        for j, p in enumerate(patches):
            window = range(max(0, p.layer - width // 2), min(n, p.layer - (-width // 2))) # as in ROME's code
            writes = [(*site(lm, kind, l)[:2], slice(None), p.position, kept[l]) for l in window]
            wanted = forward(lm, ids, noise, c.span, write=writes)[0][list(c.answers)]
            torch.testing.assert_close(raw["patched"][0, j, 0, i], wanted, rtol=0, atol=1e-5)


@every_family
def test_ablation_equals_brute_force(lm):
    facts = [Fact(id=str(i), relation="sport", subject=s, answer=SPORTS[i % 3], candidates=SPORTS, prompt=f"Fact: of\nFact: {s} plays the sport of")
             for i, s in enumerate(["dog", "sport", "player", "league"])]
    cases = tracing._aligned(lm, swap_cases(lm, facts))
    assert len(cases) >= 3
    patches = [Patch("mlp", l, position=p) for l in range(lm.n_layers) for p in (None, -1, -2)]
    raw = tracing.ablate(lm, cases, patches, batch_size=2, progress=False)
    kept = [forward(lm, lm.ids([c.fact.prompt])[0], keep={l: site(lm, "mlp", l)[:2] for l in range(lm.n_layers)})[1] for c in cases]
    mean = {l: torch.cat([k[l] for k in kept]).mean(0, keepdim=True) for l in range(lm.n_layers)}
    for i, c in enumerate(cases):
        for j, p in enumerate(patches):
            at = slice(c.span[0], None) if p.position is None else p.position # before the subject there is nothing to remove
            wanted = forward(lm, lm.ids([c.fact.prompt])[0], write=[(*site(lm, "mlp", p.layer)[:2], slice(None), at, mean[p.layer])])[0][list(c.answers)]
            torch.testing.assert_close(raw["patched"][j, i], wanted, rtol=0, atol=1e-5)


def test_a_window_of_one_is_one_layer(): assert [list(Patch("mlp", l).layers(3)) for l in range(3)] == [[0], [1], [2]]


# ---- nothing depends on how the work is cut

@pytest.mark.parametrize("corruption", ["swap", "noise"])
def test_batches_chunks_and_suffix_do_not_matter(lm, corruption):
    run = lambda **kw: causal_tracing(lm, make_facts(), corruption, n_noise=2, progress=False, **kw).raw
    reference = run(batch_size=1)
    for kw in (dict(batch_size=3), dict(batch_size=64), dict(batch_size=5, suffix_only=False)):
        other = run(**kw)
        for k in ("clean", "corrupt", "patched"): torch.testing.assert_close(other[k], reference[k], rtol=0, atol=1e-5)


def test_padding_does_not_matter(lm):
    short, long = make_facts()[2:4]
    lengths = [len(i) for i in lm.ids([short.prompt, long.prompt])]
    assert lengths[0] < lengths[1]
    patches = [Patch(*c) for c in components(lm)]
    alone, beside = (run_patches(lm, noise_cases(lm, fs), patches, sd=.5, n_samples=2, progress=False) for fs in ([short], [short, long]))
    for k in ("clean", "corrupt", "patched"): torch.testing.assert_close(beside[k][..., :1, :], alone[k], rtol=0, atol=1e-5)


def test_components_can_be_chosen(lm):
    some = [Component("head", 2, 1), Component("mlp", 0), Component("mlp", 2), Component("head", 0, 3)]
    every = causal_tracing(lm, make_facts(), progress=False)
    few = causal_tracing(lm, make_facts(), components=some, progress=False)
    assert list(few.table.component) == [str(c) for c in some]
    where = [list(every.table.component).index(str(c)) for c in some]
    torch.testing.assert_close(few.raw["patched"], every.raw["patched"][:, where], rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_patches,n_facts,size", [(1, 1, 1), (3, 4, 5), (5, 2, 32), (2, 7, 3), (4, 4, 4)])
def test_chunks_cover_every_row_once(n_patches, n_facts, size):
    seen = []
    for parts in tracing._chunks(n_patches, n_facts, size):
        rows = [r for _, rows, _ in parts for r in range(rows.start, rows.stop)]
        assert rows == list(range(len(rows))) and len(rows) <= size
        for p, rows, facts in parts:
            assert rows.stop - rows.start == facts.stop - facts.start
            seen += [(p, f) for f in range(facts.start, facts.stop)]
    assert sorted(seen) == sorted(itertools.product(range(n_patches), range(n_facts)))


# ---- limits

@every_family
def test_restoring_everything_and_nothing(lm):
    cases = swap_cases(lm, make_facts(2) + make_facts()[6:])
    group = [c for c in cases if len(lm.ids([c.fact.prompt])[0]) == len(lm.ids([cases[0].fact.prompt])[0])]
    answers = torch.tensor([c.answers for c in group])
    clean, bad = lm.encode([c.fact.prompt for c in group]), lm.encode([c.corrupt for c in group])
    a, b = record(lm, clean), record(lm, bad)
    places = [Patch("resid", l) for l in range(lm.n_layers)]
    everything = patched(lm, bad, a, b, places, answers)
    nothing = patched(lm, bad, b, b, places + [Patch(*c) for c in components(lm)], answers)
    torch.testing.assert_close(everything[0], read(a.logits, answers)[0].expand_as(everything[0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(nothing[0], read(b.logits, answers)[0].expand_as(nothing[0]), rtol=0, atol=1e-5)


def test_zero_noise_has_no_gap_and_no_score(tiny):
    s = causal_tracing(tiny(), make_facts(4), "noise", noise=0., n_noise=2, progress=False)
    assert s.table.score.isna().all() and s.table.score_per_fact.isna().all() and (s.table.n_per_fact == 0).all()
    np.testing.assert_allclose(s.table.clean, s.table.patched, atol=1e-6)


# ---- pairs

def test_pairs_line_up(lm):
    facts = make_facts()
    for c in swap_cases(lm, facts):
        assert c.other.answer != c.fact.answer and c.other.subject != c.fact.subject and c.corrupt == swap_subject(c.fact, c.other.subject)
        a, b = lm.ids([c.fact.prompt, c.corrupt])
        inside = range(len(a) + c.span[0], len(a) + c.span[1])
        assert len(a) == len(b) and [x for i, x in enumerate(a) if i not in inside] == [x for i, x in enumerate(b) if i not in inside]
        assert c.answers == (lm.first_token(c.fact.answer), lm.first_token(c.other.answer))


def test_pairs_are_seeded(tiny):
    lm, facts = tiny(), make_facts()
    names = lambda seed: [c.other.subject for c in swap_cases(lm, facts, seed=seed)]
    assert names(0) == names(0) and len({tuple(names(s)) for s in range(6)}) > 1


def test_last_occurrence_is_swapped():
    f = make_facts()[0].model_copy(update={"prompt": "dog or dog plays"})
    assert swap_subject(f, "player") == "dog or player plays"


def test_no_partner_is_refused_or_dropped(tiny):
    lm, facts = tiny(), make_facts()
    same = [f.model_copy(update={"answer": " football"}) for f in facts]
    with pytest.raises(Refusal, match="different answers"): causal_tracing(lm, same, progress=False)
    lonely = facts[0].model_copy(update={"id": "x", "relation": "other"})
    s = causal_tracing(lm, [*facts, lonely], progress=False)
    assert s.config["n_dropped"] == 1 and "x" not in s.raw["facts"] and (s.table.n == len(facts)).all()


def test_partners_have_as_many_tokens_and_no_answer_of_the_prompt(tiny):
    lm = tiny()
    one, two = make_facts()[0], make_facts()[4].model_copy(update={"answer": " baseball"})
    assert len(lm.ids(["doger"])[0]) == 3
    with pytest.raises(Refusal): swap_cases(lm, [one, two])
    a, b = make_facts()[:2]
    assert swap_cases(lm, [a], pool=[b])
    with pytest.raises(Refusal): swap_cases(lm, [a.model_copy(update={"prompt": "Fact: sport of baseball\n" + a.prompt})], pool=[b])


def test_same_frame(tiny):
    lm = tiny()
    span, = lm.subject_positions(["the dog plays"], ["dog"])
    assert same_frame(lm, "the dog plays", "the player plays", span)
    assert not same_frame(lm, "the dog plays", "the player of", span)
    assert not same_frame(lm, "the dog plays", "the doger plays", span)


def test_unknown_words_are_refused(tiny):
    lm = tiny()
    with pytest.raises(Refusal, match="corruption"): causal_tracing(lm, make_facts(), "swop", progress=False)
    with pytest.raises(Refusal, match="kind"): trace_grid(lm, make_facts(), "residual", progress=False)


# ---- noise

def test_noise_draws():
    a = draw_noise(3, 64, seed=0, sample=1, fact=2)
    torch.testing.assert_close(a, draw_noise(3, 64, 0, 1, 2))
    others = [draw_noise(3, 64, *x) for x in [(1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 2, 1)]]
    assert all(not torch.allclose(a, b) for b in others)
    many = torch.cat([draw_noise(4, 256, 0, s, 0) for s in range(20)])
    assert abs(many.mean()) < .03 and abs(many.std() - 1) < .03


def test_noise_stays_inside_the_subject(lm):
    c, = noise_cases(lm, make_facts()[:1])
    batch = lm.encode([c.fact.prompt])
    x = tracing._place_noise(lm, batch, [c], [0], 2., 0, 0)[0]
    inside = range(len(x) + c.span[0], len(x) + c.span[1])
    assert [bool(row.any()) for row in x] == [i in inside for i in range(len(x))]


def test_rank_stability_needs_draws(tiny):
    lm = tiny("llama")
    with pytest.raises(Refusal, match="n_noise"): rank_stability(causal_tracing(lm, make_facts(), progress=False))
    s = causal_tracing(lm, make_facts(), "noise", n_noise=3, min_gap=-9, progress=False)
    r = rank_stability(s).to_numpy()
    assert r.shape == (3, 3) and np.allclose(np.diag(r), 1) and (np.abs(r) <= 1 + 1e-9).all()


# ---- scores

def raw_of(clean, corrupt, good):
    "Readings whose logit difference is given: [facts], [samples, facts], [patches, samples, facts]"
    pack = lambda x: torch.stack([torch.stack([torch.as_tensor(x), torch.zeros_like(torch.as_tensor(x))], -1)] * 2)
    return {"clean": pack(clean), "corrupt": pack(corrupt), "patched": pack(good)}

def test_normalisation_by_hand():
    t = normalise(raw_of([4., 2.], [[0., -2.]], [[[2., 2.]], [[0., -2.]]]), "swap")
    np.testing.assert_allclose(t.score, [(2 + 4) / 8, 0])
    np.testing.assert_allclose(t.score_per_fact, [(2 / 4 + 4 / 4) / 2, 0])
    assert (t.ci_low <= t.score).all() and (t.score <= t.ci_high).all()

def test_small_denominators_are_left_out():
    t = normalise(raw_of([4., .04], [[0., 0.]], [[[2., 40.]]]), "swap")
    assert t.n_per_fact[0] == 1 and t.score_per_fact[0] == .5 and t.n[0] == 2
    assert normalise(raw_of([.04, .04], [[0., 0.]], [[[1., 1.]]]), "swap").score.isna().all()
    assert normalise(raw_of([-4., -4.], [[0., 0.]], [[[1., 1.]]]), "swap").score.isna().all()

def test_grid_table(tiny):
    lm = tiny()
    g = trace_grid(lm, make_facts(), "resid", min_gap=-99, progress=False)
    cases = tracing._aligned(lm, swap_cases(lm, make_facts()))
    assert sorted(g.layer.unique()) == list(range(lm.n_layers)) and g.position.min() == cases[0].span[0] and g.position.max() == -1
    assert len(g) == lm.n_layers * -cases[0].span[0]
    end = g[g.layer == lm.n_layers - 1].set_index("position").score
    assert end[-1] == pytest.approx(1, abs=1e-4) and end.drop(-1).abs().max() < 1e-4
    labels, n = token_labels(lm, cases), cases[0].span[1] - cases[0].span[0]
    assert [labels[p] for p in sorted(labels)][:n] == [f"subject {i + 1}/{n}" for i in range(n)]

def test_top():
    import pandas as pd
    s = Scores("m", {}, pd.DataFrame({"component": list("abc"), "score": [.1, -.9, .5]}))
    assert list(s.top(2).component) == ["b", "c"]

def test_model_is_left_alone(lm):
    before = {k: v.clone() for k, v in lm.hf.state_dict().items()}
    batch = lm.encode([f.prompt for f in make_facts()])
    with torch.no_grad(): a = lm.hf(**batch).logits
    causal_tracing(lm, make_facts(), progress=False)
    with torch.no_grad(): b = lm.hf(**batch).logits
    assert torch.equal(a, b) and all(torch.equal(v, before[k]) for k, v in lm.hf.state_dict().items())


# ---- stage

def test_stage_is_made_once(tiny, tmp_path, monkeypatch):
    lm, facts = tiny(), make_facts()
    words = "of by is".split()
    far = [f.model_copy(update={"id": f"far/{s}", "subject": s, "prompt": f"{s} plays"}) for f, s in zip(facts, words)]
    task = Task(name="sports-athlete-editing", source="world", forget=tuple(facts), retain=tuple(far), retain_test=())
    run = Run(tmp_path, lm.name, lm.revision, task.name, {})
    first = run_tracing(lm, lambda seed: task, run, n_noise=9, corruption="swap", draws=3)
    assert load_table(tmp_path / "scores" / "causal-tracing-swap.parquet").equals(first)
    monkeypatch.setattr(tracing, "causal_tracing", None)
    assert run_tracing(lm, lambda seed: task, run).equals(first)
    with pytest.raises(TypeError): run_tracing(lm, lambda seed: task, run, recompute=True)
    with pytest.raises(TypeError): run_tracing(lm, lambda seed: task, run, corruption="noise")


# ---- attribution patching

def plain_gains(lm, case, corruption, noise=None):
    "Gains by token of every MLP [T, L] and head [T, L, H], one fact, plain hooks and autograd"
    clean_ids, bad_ids = lm.ids([case.fact.prompt, case.corrupt])
    handles, seen = [], {}
    spots = {(kind, l): site(lm, kind, l, 0)[:2] for l in range(lm.n_layers) for kind in ("mlp", "head")}
    kept = forward(lm, clean_ids, keep=spots)[1]
    def start(_, args, kwargs):
        x = hidden(args, kwargs).detach().clone()
        if noise is not None: x[0, x.shape[1] + case.span[0]:x.shape[1] + case.span[1]] += noise
        x.requires_grad_()
        return (x, *args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}
    handles.append(blocks(lm.hf)[0].register_forward_pre_hook(start, with_kwargs=True))
    for name, (module, side) in spots.items():
        def see(_, args, out, name=name, side=side): seen[name] = args[0] if side == "in" else out
        handles.append(module.register_forward_hook(see))
    with torch.enable_grad():
        logits = lm.hf(torch.tensor([bad_ids])).logits[0, -1].float()
        a = list(case.answers)
        metric = logits[a[0]] - logits[a[1]] if corruption == "swap" else logits.softmax(0)[a[0]]
        grads = dict(zip(seen, torch.autograd.grad(metric, list(seen.values()))))
    for h in handles: h.remove()
    gain = {n: ((kept[n] - seen[n]) * g)[0].detach() for n, g in grads.items()}
    heads = [gain["head", l].unflatten(-1, (lm.n_heads, lm.head_dim)).sum(-1) for l in range(lm.n_layers)]
    return torch.stack([gain["mlp", l].sum(-1) for l in range(lm.n_layers)], 1), torch.stack(heads, 1)


@every_family
@pytest.mark.parametrize("corruption", ["swap", "noise"])
def test_attribution_equals_plain_autograd(lm, corruption):
    facts, seed = make_facts(), 3
    s = attribution_patching(lm, facts, corruption, noise=2., n_noise=2, seed=seed, batch_size=5, progress=False)
    cases = swap_cases(lm, facts, seed=seed) if corruption == "swap" else noise_cases(lm, facts)
    for i, c in enumerate(cases):
        for k in range(1 if corruption == "swap" else 2):
            noise = None if corruption == "swap" else s.config["sd"] * draw_noise(c.span[1] - c.span[0], lm.d_model, seed, k, i)
            mlp, head = plain_gains(lm, c, corruption, noise)
            torch.testing.assert_close(s.raw["mlp"][k, i, -len(mlp):], mlp, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(s.raw["head"][k, i, -len(mlp):], head, rtol=1e-4, atol=1e-6)
            assert not s.raw["mlp"][k, i, :-len(mlp)].any()


def test_attribution_does_not_depend_on_batches(lm):
    a, b = (attribution_patching(lm, make_facts(), batch_size=n, progress=False).raw for n in (2, 8))
    for k in ("clean", "corrupt", "mlp", "head"): torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-6)
    lm.tok.padding_side = "right"
    c = attribution_patching(lm, make_facts(), batch_size=8, progress=False).raw
    torch.testing.assert_close(c["mlp"], b["mlp"], rtol=1e-4, atol=1e-6)


def test_attribution_is_exact_for_small_steps(lm):
    how = dict(corruption="noise", noise=.03, n_noise=2, min_gap=-1., progress=False)
    exact, linear = causal_tracing(lm, make_facts(), **how).table, attribution_patching(lm, make_facts(), **how).table
    gain, estimate = exact.patched - exact.corrupt, linear.patched - linear.corrupt
    assert np.abs(gain - estimate).max() < .1 * np.abs(gain).max()


def test_attribution_by_token_adds_up(tiny):
    lm, facts = tiny("gemma2"), make_facts()
    grid = attribution_grid(lm, facts, "mlp", min_gap=-99, progress=False)
    cases = tracing._aligned(lm, swap_cases(lm, facts))
    assert set(grid.token) and len(grid) == lm.n_layers * -cases[0].span[0]
    by_layer = grid.assign(gain=grid.patched - grid.corrupt).groupby("layer").gain.sum()
    raw = tracing.run_attribution(lm, cases, "swap", progress=False)
    np.testing.assert_allclose(by_layer, raw["mlp"].sum(2).mean((0, 1)), atol=1e-5)
    with pytest.raises(Refusal, match="unknown kind"): attribution_grid(lm, facts, "resid")
    with pytest.raises(Refusal, match="unknown corruption"): attribution_patching(lm, facts, "zap")


# ---- the common beginning

def test_equal_beginnings_are_read_once(tiny):
    lm, shot = tiny("llama"), "Fact: sport of baseball\nFact: {} plays the sport of"
    prompts = [shot.format(s) for s in ("dog", "player", "league", "sport")]
    batch, rows = lm.encode(prompts), []
    watch = lm.hf.get_input_embeddings().register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    rest, past = tracing.shared_prefix(lm, batch, -5)
    assert rows == [1] and {len(layer.keys) for layer in past.layers} == {4}
    padded = lm.encode([*prompts, "dog plays the sport of"])
    _, more = tracing.shared_prefix(lm, padded, -5)
    assert rows == [1, 2]
    watch.remove()
    torch.testing.assert_close(record(lm, rest, past=past).logits, record(lm, batch).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(record(lm, tracing._rest(padded, padded["input_ids"].shape[1] - 5), past=more).logits, record(lm, padded).logits, rtol=0, atol=1e-5)


def test_rows_of_keys_are_joined_as_by_selection(tiny):
    lm, rows = tiny("qwen3"), torch.tensor([2, 0, 0, 1])
    rest, past = tracing.shared_prefix(lm, lm.encode(["dog plays the sport of", "player plays the sport of", "league plays the sport of"]), -3)
    new = torch.randn(4, *past.layers[0].keys.shape[1:2], 3, past.layers[0].keys.shape[3])
    for layer in past.layers:
        keys, values = tracing._Rows(layer, rows).update(new, -new)
        assert torch.equal(keys, torch.cat([layer.keys[rows], new], 2)) and torch.equal(values, torch.cat([layer.values[rows], -new], 2))
