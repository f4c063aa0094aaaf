"Where each family keeps its parts, written down a second time for plain hooks: nothing here comes from `models.FAMILIES`"
from types import SimpleNamespace as Block
import pytest, torch
from conftest import BUILD

every_family = pytest.mark.parametrize("lm", list(BUILD), indirect=True)
every_shape = pytest.mark.parametrize("lm", [f + odd for f in BUILD for odd in ("", " odd")], indirect=True) # heads that do not fill the stream, fewer neurons than it is wide


def body(hf): return getattr(hf, hf.base_model_prefix)

def blocks(hf):
    "The list of blocks"
    kind, inner = hf.config.model_type, body(hf)
    return inner.h if kind == "gpt2" else inner.layers

def embeddings(hf): return {"gpt2": lambda m: m.transformer.wte, "gpt_neox": lambda m: m.gpt_neox.embed_in}.get(hf.config.model_type, lambda m: m.model.embed_tokens)(hf)

def last_norm(hf):
    return {"gpt2": lambda m: m.transformer.ln_f, "gpt_neox": lambda m: m.gpt_neox.final_layer_norm}.get(hf.config.model_type, lambda m: m.model.norm)(hf)

def parts(hf, l):
    "Modules of a block: attn, out (attention's output projection), mlp, down, attn_reads and mlp_reads (what first sees the stream), attn_adds and mlp_adds"
    b, kind = blocks(hf)[l], hf.config.model_type
    if kind == "gpt2":
        return Block(block=b, attn=b.attn, out=b.attn.c_proj, mlp=b.mlp, down=b.mlp.c_proj, attn_reads=b.ln_1, mlp_reads=b.ln_2, attn_adds=b.attn.c_proj, mlp_adds=b.mlp)
    if kind == "gpt_neox":
        return Block(block=b, attn=b.attention, out=b.attention.dense, mlp=b.mlp, down=b.mlp.dense_4h_to_h, attn_reads=b.input_layernorm, mlp_reads=b.post_attention_layernorm,
            attn_adds=b.attention.dense, mlp_adds=b.mlp)
    p = Block(block=b, attn=b.self_attn, out=b.self_attn.o_proj, mlp=b.mlp, down=b.mlp.down_proj)
    p.attn_reads = b.self_attn if kind == "olmo2" else b.input_layernorm
    p.mlp_reads = b.mlp if kind == "olmo2" else b.pre_feedforward_layernorm if kind in ("gemma2", "gemma3_text") else b.post_attention_layernorm
    after = kind in ("gemma2", "gemma3_text", "olmo2")
    p.attn_adds, p.mlp_adds = (b.post_attention_layernorm, b.post_feedforward_layernorm) if after else (b.self_attn.o_proj, b.mlp)
    return p

def name_of(hf, module): return next(n for n, m in hf.named_modules() if m is module)

def post_norms(hf): return hf.config.model_type in ("gemma2", "gemma3_text", "olmo2")


def head_weights(lm, l, h):
    "Views of everything that is head `h`: its queries, keys, values and what it writes, each as [outputs, inputs] of its own"
    hf, b, d, kind = lm.hf, parts(lm.hf, l), lm.head_dim, lm.hf.config.model_type
    H, K = hf.config.num_attention_heads, getattr(hf.config, "num_key_value_heads", None) or hf.config.num_attention_heads
    g = h // (H // K)
    own, kv = slice(h * d, (h + 1) * d), slice(g * d, (g + 1) * d)
    if kind == "gpt2":
        q, k, v = b.attn.c_attn.weight.T.chunk(3)
        return dict(q=q[own], k=k[own], v=v[own], o=b.attn.c_proj.weight.T[:, own])
    if kind == "gpt_neox":
        q, k, v = b.attn.query_key_value.weight.view(H, 3, d, -1)[h]
        return dict(q=q, k=k, v=v, o=b.attn.dense.weight[:, own])
    if kind == "phi3":
        q, k, v = b.attn.qkv_proj.weight.split([H * d, K * d, K * d])
        return dict(q=q[own], k=k[kv], v=v[kv], o=b.attn.o_proj.weight[:, own])
    return dict(q=b.attn.q_proj.weight[own], k=b.attn.k_proj.weight[kv], v=b.attn.v_proj.weight[kv], o=b.attn.o_proj.weight[:, own])

def neuron_weights(lm, l, n):
    "Views of an MLP's first `n` neurons"
    m, kind = parts(lm.hf, l).mlp, lm.hf.config.model_type
    if kind == "gpt2": return dict(up=m.c_fc.weight.T[:n], down=m.c_proj.weight.T[:, :n])
    if kind == "gpt_neox": return dict(up=m.dense_h_to_4h.weight[:n], down=m.dense_4h_to_h.weight[:, :n])
    if kind == "phi3":
        gate, up = m.gate_up_proj.weight.chunk(2)
        return dict(gate=gate[:n], up=up[:n], down=m.down_proj.weight[:, :n])
    return dict(gate=m.gate_proj.weight[:n], up=m.up_proj.weight[:n], down=m.down_proj.weight[:, :n])

def projections(hf):
    "Every projection matrix of every block, by parameter name"
    block_names = [name_of(hf, b) + "." for b in blocks(hf)]
    kinds = (torch.nn.Linear, *[type(m) for m in hf.modules() if type(m).__name__ == "Conv1D"][:1])
    return {n + ".weight": m.weight for n, m in hf.named_modules() if isinstance(m, kinds) and any(n.startswith(b) for b in block_names)}
