"Direct effects against an independent implementation: hooks that freeze everything but one component"
import pytest, torch
from conftest import BUILD
from plain import every_family, last_norm, parts, post_norms
from mechunlearn.models import Component, components
from mechunlearn.patching import answer_logits, contributions, direct_effect, extraction_set, lookup_mlps, sent, share_by_fact, through
from mechunlearn.store import Refusal
from mechunlearn.tracing import record, swap_cases
from test_tracing import make_facts


def run(lm, ids, hooks):
    "Last logits of a forward with hooks(block, l) in place, `block` as of `plain.parts`"
    handles = [h for l in range(lm.n_layers) for h in hooks(parts(lm.hf, l), l)]
    with torch.no_grad(): out = lm.hf(torch.tensor([ids])).logits[0, -1]
    for h in handles: h.remove()
    return out

def first(args, kwargs): return args[0] if args else kwargs["hidden_states"]

def instead(x, args, kwargs): return (x, *args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}

def see(kept):
    "Hooks that keep z, MLP outputs and the stream that attention and MLP read, before a norm if there is one"
    def hooks(block, l):
        def z(_, args): kept["head", l] = args[0].clone()
        def mlp(_, args, out): kept["mlp", l] = out.clone()
        def before(name):
            def read(_, args, kwargs): kept[name, l] = first(args, kwargs).clone()
            return read
        return [block.out.register_forward_pre_hook(z), block.mlp.register_forward_hook(mlp),
                block.attn_reads.register_forward_pre_hook(before("attn_in"), with_kwargs=True), block.mlp_reads.register_forward_pre_hook(before("mlp_in"), with_kwargs=True)]
    return hooks

def freeze(lm, clean, free=()):
    "Hooks that hold every z and MLP output at `clean`, but those of the components in `free`"
    def hooks(block, l):
        def z(_, args):
            x = clean["head", l].clone()
            for c in free:
                cols = slice(c.head * lm.head_dim, (c.head + 1) * lm.head_dim) if c.kind == "head" and c.layer == l else slice(0)
                x[..., cols] = args[0][..., cols]
            return (x,)
        def mlp(_, args, out): return out if Component("mlp", l) in free else clean["mlp", l]
        return [block.out.register_forward_pre_hook(z), block.mlp.register_forward_hook(mlp)]
    return hooks

def replaced(lm, clean, other, sender):
    "The clean values with one component's of the other run"
    out = {k: v.clone() for k, v in clean.items()}
    cols = slice(None) if sender.kind == "mlp" else slice(sender.head * lm.head_dim, (sender.head + 1) * lm.head_dim)
    out[sender.kind, sender.layer][..., cols] = other[sender.kind, sender.layer][..., cols]
    return out

def runs(lm, case):
    "Tokens of the clean prompt; what is kept of the clean and of the other run"
    (ids, other_ids), clean, other = lm.ids([case.fact.prompt, case.corrupt]), {}, {}
    run(lm, ids, see(clean)); run(lm, other_ids, see(other))
    return ids, clean, other

def two(a, b): return lambda block, l: a(block, l) + b(block, l)

def frozen(lm, ids, clean, other, sender, kept=None):
    "Last logits of a clean forward in which every z and MLP output is the clean one, but the sender's is of the other run"
    return run(lm, ids, two(freeze(lm, replaced(lm, clean, other, sender)), see({} if kept is None else kept)))

def passed(lm, ids, clean, other, sender, receivers, within):
    "Last logits when only the receivers hear the sender: one forward to see what reaches them, one in which they answer"
    reached = {}
    frozen(lm, ids, clean, other, sender, reached)
    def hear(block, l):
        def before(name):
            def put(_, args, kwargs): return instead((first(args, kwargs) if within else clean[name, l]) + reached[name, l] - clean[name, l], args, kwargs)
            return put
        return [block.attn_reads.register_forward_pre_hook(before("attn_in"), with_kwargs=True), block.mlp_reads.register_forward_pre_hook(before("mlp_in"), with_kwargs=True)]
    return run(lm, ids, two(hear, freeze(lm, clean, receivers)))

def entering(lm, ids, clean, other, sender, layer):
    "Last logits when the stream entering a layer is that of a frozen run with the sender changed, and all after it reacts"
    reached = {}
    frozen(lm, ids, clean, other, sender, reached)
    def put(block, l):
        def before(_, args, kwargs): return instead(reached["attn_in", l], args, kwargs)
        return [block.block.register_forward_pre_hook(before, with_kwargs=True)] if l == layer else []
    return run(lm, ids, put)


@every_family
def test_direct_effect_equals_brute_force(lm):
    facts = make_facts()
    s, cases = direct_effect(lm, facts, batch_size=3, min_gap=-99, progress=False), swap_cases(lm, facts)
    for i, case in enumerate(cases):
        both = runs(lm, case)
        for j, c in enumerate(components(lm)):
            torch.testing.assert_close(s.raw["patched"][i, j], frozen(lm, *both, c)[list(case.answers)], rtol=0, atol=1e-5)


def test_direct_effects_do_not_depend_on_batches(lm):
    a, b = (direct_effect(lm, make_facts(), batch_size=n, min_gap=-99, progress=False) for n in (1, 8))
    for k in ("clean", "other", "patched"): torch.testing.assert_close(a.raw[k], b.raw[k], rtol=0, atol=1e-5)
    assert (a.table.component == [str(c) for c in components(lm)]).all()


@every_family
def test_everything_together_is_the_other_run(lm):
    cases = [c for c in swap_cases(lm, make_facts()) if len(lm.ids([c.fact.prompt])[0]) == len(lm.ids([make_facts()[0].prompt])[0])]
    answers = torch.tensor([c.answers for c in cases])
    clean, other = (record(lm, lm.encode(p)) for p in ([c.fact.prompt for c in cases], [c.corrupt for c in cases]))
    moved = clean.resid[-1][:, -1:] + (other.resid[-1] - clean.resid[-1])[:, -1:]
    torch.testing.assert_close(answer_logits(lm, moved, answers)[:, 0], other.logits.gather(1, answers), rtol=0, atol=1e-5)
    if not post_norms(lm.hf):  # there the norm of a sum is not the sum of norms
        total = contributions(lm, clean, other).sum((1, 2)) + (other.resid[0] - clean.resid[0])[:, -1]
        torch.testing.assert_close(total, (other.resid[-1] - clean.resid[-1])[:, -1], rtol=0, atol=1e-5)


def test_facts_without_a_partner_are_refused(lm):
    with pytest.raises(Refusal, match="no two of these facts"): direct_effect(lm, make_facts(1), progress=False)


RECEIVERS = [Component("head", 1, 1), Component("mlp", 1), Component("head", 2, 0), Component("head", 2, 3), Component("mlp", 2)]

@pytest.mark.parametrize("lm, within", [pytest.param(f, w, marks=[pytest.mark.slow]*(w == bool(i % 2))) for i, f in enumerate(BUILD) for w in (True, False)], indirect=["lm"])
def test_through_receivers_equals_brute_force(lm, within):
    facts, senders = make_facts(), components(lm)
    s, cases = through(lm, facts, RECEIVERS, senders, within=within, batch_size=3, min_gap=-99, progress=False), swap_cases(lm, facts)
    for i, case in enumerate(cases):
        both = runs(lm, case)
        for j, c in enumerate(senders):
            torch.testing.assert_close(s.raw["patched"][i, j], passed(lm, *both, c, RECEIVERS, within)[list(case.answers)], rtol=0, atol=1e-5)


@every_family
def test_through_the_residual_equals_brute_force(lm):
    facts = make_facts()
    s, cases = through(lm, facts, RECEIVERS[2:], receiver="residual", batch_size=3, min_gap=-99, progress=False), swap_cases(lm, facts)
    for i, case in enumerate(cases):
        both = runs(lm, case)
        for j, c in enumerate(components(lm, ("mlp",))):
            wanted = entering(lm, *both, c, 2) if c.layer < 2 else run(lm, both[0], lambda block, l: [])
            torch.testing.assert_close(s.raw["patched"][i, j], wanted[list(case.answers)], rtol=0, atol=1e-5)


@every_family
def test_prompts_outgrow_the_window(lm):
    windows = [w for w in [getattr(lm.hf.config, "sliding_window", None)] if w]
    assert all(len(ids) > windows[0] for ids in lm.ids([f.prompt for f in make_facts()])) if windows else lm.family not in ("gemma2", "qwen3", "gemma3_text", "mistral", "phi3")


def test_through_does_not_depend_on_batches(lm):
    a, b = (through(lm, make_facts(), RECEIVERS, batch_size=n, min_gap=-99, progress=False) for n in (1, 8))
    for k in ("clean", "other", "patched"): torch.testing.assert_close(a.raw[k], b.raw[k], rtol=0, atol=1e-5)


@every_family
def test_nothing_passes_where_nobody_listens(lm):
    s = through(lm, make_facts(), [Component("head", 1, 0)], components(lm), min_gap=-99, progress=False)
    deaf = [c.layer >= 1 for c in components(lm)]
    torch.testing.assert_close(s.raw["patched"][:, deaf], s.raw["clean"][:, None].expand(-1, sum(deaf), -1), rtol=0, atol=1e-5)
    assert s.table.score[[not d for d in deaf]].abs().min() > 0


@every_family
def test_what_is_sent_is_the_contribution(lm):
    case = swap_cases(lm, make_facts())[:1]
    clean, other = (record(lm, lm.encode(p)) for p in ([c.fact.prompt for c in case], [c.corrupt for c in case]))
    at_last = contributions(lm, clean, other)
    for c in components(lm):
        torch.testing.assert_close(sent(lm, clean, other, c)[:, -1], at_last[:, c.layer, lm.n_heads if c.kind == "mlp" else c.head], rtol=0, atol=1e-5)


def test_extraction_set_follows_its_rule(lm):
    s = direct_effect(lm, make_facts(), min_gap=-99, progress=False)
    s.table["score"], s.table["ci_low"], s.table["ci_high"] = 0., -1., 1.
    with pytest.raises(Refusal, match="no component writes the answer"): extraction_set(s)
    s.table.loc[2:4, ["score", "ci_low", "ci_high"]] = [[.5, .4, .6], [-.03, -.04, -.02], [.01, .005, .015]]
    assert [str(c) for c in extraction_set(s)] == list(s.table.component[2:4])
    assert [str(c) for c in extraction_set(s, min_share=.001)] == list(s.table.component[2:5])
    assert [c.kind for c in extraction_set(s, top=2)] == ["mlp", "mlp", "head", "head"]


def test_an_unknown_receiver_is_refused(lm):
    with pytest.raises(Refusal, match="receiver"): through(lm, make_facts(), RECEIVERS, receiver="heads", progress=False)


def test_lookup_rules():
    share = [0., .01, .03, .3, .0, -.5, .02, 0., 0., 0.]
    assert lookup_mlps(share) == [2, 3] and lookup_mlps(share, "2sd") == []
    share[5] = 0.
    assert lookup_mlps(share, "2sd") == [3]
    assert lookup_mlps([x + .4 for x in share], "2sd") == [3] and len(lookup_mlps([x + .4 for x in share])) == 10 # an offset fools the fixed rule alone
    assert lookup_mlps([0.] * 5) == lookup_mlps([0.] * 5, "2sd") == []
    with pytest.raises(Refusal, match="rule"): lookup_mlps(share, "3sd")


def test_shares_by_fact_average_to_the_score(lm):
    last_norm(lm.hf).weight.data += 30 # larger logits
    s = through(lm, make_facts(), RECEIVERS, min_gap=.05, progress=False)
    each, gap = share_by_fact(s), (s.raw["clean"] - s.raw["other"]) @ torch.tensor([1., -1.])
    assert list(each.index) == s.raw["facts"] and each.notna().all(axis=1).tolist() == (gap > .05).tolist()
    if (gap > .05).any(): torch.testing.assert_close(torch.tensor(each.mean().to_numpy()), torch.tensor(s.table.score_per_fact.to_numpy()), rtol=0, atol=1e-9)
