"Our maps against TransformerLens' (pip install mechunlearn[peers])"
import copy
import pytest, torch
from mechunlearn.models import components
from mechunlearn.tracing import causal_tracing, swap_cases
from test_tracing import make_facts

pytest.importorskip("transformer_lens", reason="TransformerLens is not installed: pip install mechunlearn[peers]")


@pytest.fixture
def bridge(tiny, tmp_path):
    "The same tiny Llama, for both"
    from transformer_lens.model_bridge import TransformerBridge
    lm = tiny("llama")
    lm.hf.config.save_pretrained(tmp_path) # configuration and tokenizer are all it reads from a folder: nothing is fetched
    lm.tok.save_pretrained(tmp_path)
    peer = TransformerBridge.boot_transformers(str(tmp_path), hf_model=copy.deepcopy(lm.hf)).eval()
    return lm, peer


def test_causal_tracing_equals_its_patching_loops(bridge):
    from transformer_lens import patching
    lm, peer = bridge
    facts = make_facts()
    ours, cases = causal_tracing(lm, facts, progress=False), swap_cases(lm, facts)
    for i, case in enumerate(cases):
        clean, corrupt = (torch.tensor([ids]) for ids in lm.ids([case.fact.prompt, case.corrupt]))
        with torch.no_grad(): _, cache = peer.run_with_cache(clean)
        read = lambda logits: logits[0, -1, case.answers[0]] - logits[0, -1, case.answers[1]]
        with torch.no_grad():
            mlps = patching.generic_activation_patch(peer, corrupt, cache, read, lambda x, index, kept: kept, "mlp_out", ("layer",))
            heads = patching.get_act_patch_attn_head_out_all_pos(peer, corrupt, cache, read)
        got = ours.raw["patched"][0, :, 0, i, 0] - ours.raw["patched"][0, :, 0, i, 1]
        torch.testing.assert_close(got, torch.cat([mlps, heads.flatten()]), rtol=0, atol=1e-5)
        assert len(got) == len(components(lm))
