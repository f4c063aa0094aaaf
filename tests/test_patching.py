"Direct effects against an independent implementation: hooks that freeze everything but one component"
import pytest, torch
from mechunlearn.models import components
from mechunlearn.patching import answer_logits, contributions, direct_effect
from mechunlearn.store import Refusal
from mechunlearn.tracing import record, swap_cases
from test_tracing import make_facts


def frozen(lm, clean_ids, other_ids, sender):
    "Last logits of a clean forward in which every z and MLP output is the clean one, but the sender's is of the other run"
    blocks = lm.hf.model.layers
    def run(ids, hooks):
        handles = [h for block, l in zip(blocks, range(len(blocks))) for h in hooks(block, l)]
        with torch.no_grad(): out = lm.hf(torch.tensor([ids])).logits[0, -1]
        for h in handles: h.remove()
        return out
    def keep(store):
        def hooks(block, l):
            def z(_, args): store["head", l] = args[0].clone()
            def mlp(_, args, out): store["mlp", l] = out.clone()
            return [block.self_attn.o_proj.register_forward_pre_hook(z), block.mlp.register_forward_hook(mlp)]
        return hooks
    clean, other = {}, {}
    run(clean_ids, keep(clean)); run(other_ids, keep(other))
    def freeze(block, l):
        def z(_, args):
            x = clean["head", l].clone()
            if sender.kind == "head" and sender.layer == l:
                cols = slice(sender.head * lm.head_dim, (sender.head + 1) * lm.head_dim)
                x[..., cols] = other["head", l][..., cols]
            return (x,)
        def mlp(_, args, out): return (other if sender.kind == "mlp" and sender.layer == l else clean)["mlp", l]
        return [block.self_attn.o_proj.register_forward_pre_hook(z), block.mlp.register_forward_hook(mlp)]
    return run(clean_ids, freeze)


def test_direct_effect_equals_brute_force(lm):
    facts = make_facts()
    s, cases = direct_effect(lm, facts, batch_size=3, min_gap=-99, progress=False), swap_cases(lm, facts)
    for i, case in enumerate(cases):
        ids = lm.ids([case.fact.prompt, case.corrupt])
        for j, c in enumerate(components(lm)):
            torch.testing.assert_close(s.raw["patched"][i, j], frozen(lm, *ids, c)[list(case.answers)], rtol=0, atol=1e-5)


def test_direct_effects_do_not_depend_on_batches(lm):
    a, b = (direct_effect(lm, make_facts(), batch_size=n, min_gap=-99, progress=False) for n in (1, 8))
    for k in a.raw: torch.testing.assert_close(a.raw[k], b.raw[k], rtol=0, atol=1e-5)
    assert (a.table.component == [str(c) for c in components(lm)]).all()


def test_everything_together_is_the_other_run(lm):
    cases = [c for c in swap_cases(lm, make_facts()) if len(lm.ids([c.fact.prompt])[0]) == len(lm.ids([make_facts()[0].prompt])[0])]
    answers = torch.tensor([c.answers for c in cases])
    clean, other = (record(lm, lm.encode(p)) for p in ([c.fact.prompt for c in cases], [c.corrupt for c in cases]))
    moved = clean.resid[-1][:, -1:] + (other.resid[-1] - clean.resid[-1])[:, -1:]
    torch.testing.assert_close(answer_logits(lm, moved, answers)[:, 0], other.logits.gather(1, answers), rtol=0, atol=1e-5)
    if lm.family != "gemma2":  # there the norm of a sum is not the sum of norms
        total = contributions(lm, clean, other).sum((1, 2)) + (other.resid[0] - clean.resid[0])[:, -1]
        torch.testing.assert_close(total, (other.resid[-1] - clean.resid[-1])[:, -1], rtol=0, atol=1e-5)


def test_facts_without_a_partner_are_refused(lm):
    with pytest.raises(Refusal, match="no two of these facts"): direct_effect(lm, make_facts(1), progress=False)
