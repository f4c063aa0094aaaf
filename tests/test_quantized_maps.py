"Maps of models quantized by bitsandbytes, beside the same weights written out."
import numpy as np, pytest, torch
from conftest import BUILD, SIZES
from mechunlearn.localization import build
from mechunlearn.models import Component, components, load, wrap
from mechunlearn.patching import direct_effect, through
from mechunlearn.tracing import attribution_patching, causal_tracing
from test_tracing import make_facts

bnb = pytest.importorskip("bitsandbytes")
BITS = ["8bit", "4bit"]


def written_out(hf, bits):
    "The weights that a quantized model computes with"
    for m in [m for n, m in hf.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"]:
        if bits == "8bit":
            q, scale, _ = bnb.functional.int8_vectorwise_quant(m.weight.data.half())
            m.weight.data = q.float() * scale[:, None] / 127
        else: m.weight.data = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(m.weight.data, quant_type="nf4"))
    return hf


@pytest.fixture(scope="module", params=BITS)
def both(request, make_tokenizer, tmp_path_factory):
    "A tiny quantized Llama, and its reference"
    folder, tok = tmp_path_factory.mktemp(request.param), make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = BUILD["llama"](vocab_size=len(tok), **SIZES | dict(hidden_size=64, intermediate_size=128, head_dim=16))
        for p in hf.parameters(): p.data += .1 * torch.randn_like(p)
    hf.save_pretrained(folder); tok.save_pretrained(folder)
    try: lm = load(str(folder), quantize=request.param)
    except Exception as e: pytest.skip(f"bitsandbytes cannot quantize here: {e}")
    assert type(lm.hf.model.layers[0].self_attn.o_proj) is not torch.nn.Linear
    return lm, wrap(written_out(hf, request.param), tok, "written out")


def close(a, b):
    "Equal but for what quantized products add"
    a, b = (np.asarray(x, float) for x in (a, b))
    assert np.isfinite(a).all() and np.corrcoef(a, b)[0, 1] > .97 and np.abs(a - b).max() < .15 * np.abs(b).max(), (np.corrcoef(a, b)[0, 1], np.abs(a - b).max(), np.abs(b).max())


@pytest.mark.parametrize("make", [
    lambda lm: direct_effect(lm, make_facts(), progress=False).raw["patched"][..., 0].flatten(),
    lambda lm: causal_tracing(lm, make_facts(), progress=False).raw["patched"][0, ..., 0].flatten(),
    lambda lm: through(lm, make_facts(), [Component("head", 2, 1), Component("mlp", 2)], progress=False).raw["patched"][..., 0].flatten(),
    lambda lm: torch.cat([attribution_patching(lm, make_facts(), progress=False).raw[k].flatten() for k in ("mlp", "head")])], ids=["direct", "tracing", "paths", "attribution"])
def test_maps_equal_those_of_the_weights_written_out(both, make): close(*map(make, both))


def test_contributions_add_up(both):
    lm, _ = both
    facts = make_facts()
    raw = direct_effect(lm, facts, progress=False).raw
    assert torch.isfinite(raw["patched"]).all() and (raw["patched"] - raw["clean"][:, None]).abs().max() > .01


def test_localizations_count_quantized_weights(both):
    lm, plain = both
    for name in ("mlp.1", "head.2.3"): assert build(lm, "x", [Component.parse(name)]).sizes == build(plain, "x", [Component.parse(name)]).sizes
    assert build(lm, "x", components(lm)).n_params == build(plain, "x", components(plain)).n_params


def test_attribution_leaves_no_hooks(both):
    lm, _ = both
    before = [len(m._forward_hooks) for m in lm.hf.modules()]
    attribution_patching(lm, make_facts(), "noise", n_noise=2, progress=False)
    assert before == [len(m._forward_hooks) for m in lm.hf.modules()]


def test_two_maps_in_a_row_are_the_same(both):
    lm, _ = both
    first, again = (attribution_patching(lm, make_facts(), progress=False).raw["mlp"] for _ in range(2))
    torch.testing.assert_close(first, again)
