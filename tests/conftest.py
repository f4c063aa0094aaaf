"Tiny random models of every family, with a tokenizer that knows the words of the packaged world."
import json, os, re
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "") # tests are about what is computed, on any machine; name a card to try them there
import pytest, real, torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel,
    GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Olmo2Config, Olmo2ForCausalLM, Phi3Config, Phi3ForCausalLM,
    PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)
from mechunlearn.models import DATA, wrap

WORD = r"<\w+>|\n|\w+:?|[^\w\s]"
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=8, max_position_embeddings=256,
    bos_token_id=1, pad_token_id=0, eos_token_id=None, tie_word_embeddings=False)
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
BUILD = dict(
    llama=lambda **kw: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **kw)),
    gemma=lambda **kw: GemmaForCausalLM(GemmaConfig(num_key_value_heads=1, **kw | dict(tie_word_embeddings=True))),
    gemma2=lambda **kw: Gemma2ForCausalLM(Gemma2Config(num_key_value_heads=2, sliding_window=3, query_pre_attn_scalar=8, final_logit_softcapping=5.,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], **kw | dict(tie_word_embeddings=True))),
    qwen3=lambda **kw: Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=kw["num_attention_heads"], use_sliding_window=True, sliding_window=2, layer_types=SLIDING, **kw)),
    gemma3=lambda **kw: Gemma3ForCausalLM(Gemma3TextConfig(num_key_value_heads=1, sliding_window=3, query_pre_attn_scalar=8, layer_types=SLIDING,
        rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=1e6), sliding_attention=dict(rope_type="default", rope_theta=50.)),
        **kw | dict(tie_word_embeddings=True))),
    mistral=lambda **kw: MistralForCausalLM(MistralConfig(num_key_value_heads=2, sliding_window=3, **kw)),
    qwen2=lambda **kw: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **kw)),
    olmo2=lambda **kw: Olmo2ForCausalLM(Olmo2Config(num_key_value_heads=2, **kw)),
    phi3=lambda **kw: Phi3ForCausalLM(Phi3Config(num_key_value_heads=2, sliding_window=4,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=.5), **kw)),
    gpt2=lambda **kw: GPT2LMHeadModel(GPT2Config(n_embd=kw["hidden_size"], n_inner=kw["intermediate_size"], n_layer=kw["num_hidden_layers"],
        n_head=kw["num_attention_heads"], n_positions=kw["max_position_embeddings"], vocab_size=kw["vocab_size"], **ids(kw))),
    neox=lambda **kw: GPTNeoXForCausalLM(GPTNeoXConfig(use_parallel_residual=True, **neox(kw))),
    neox_serial=lambda **kw: GPTNeoXForCausalLM(GPTNeoXConfig(use_parallel_residual=False, **neox(kw))))
ODD = dict(hidden_size=36, intermediate_size=20, num_attention_heads=6, head_dim=4) # another shape: heads that do not fill the stream, fewer neurons than it is wide
FEW = ["llama", "gemma", "gemma2", "qwen3"] # for what does not depend on how a family is built


def ids(kw): return {k: kw[k] for k in ("bos_token_id", "pad_token_id", "eos_token_id", "tie_word_embeddings")}

def neox(kw):
    "GPT-NeoX has no head_dim of its own; a quarter of each head is rotated"
    return {k: v for k, v in kw.items() if k != "head_dim"} | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=.25))


def world_words():
    "Every word of the packaged world, without its weights."
    world = json.loads((DATA / "organism" / "world.json").read_text())
    texts = [t for r in world["relations"].values() for t in [r["prompt"], *r["paraphrases"], r["unseen"] or "", r["question"], *r["objects"]]]
    texts += [f["subject"] for f in world["facts"]] + [t for part in world["text"].values() for t in part]
    texts += [world["shot_subject"], "A B C D A: B: C: D: Question: Answer: Fact: \n"]
    return sorted({w for t in texts for w in re.findall(WORD, t.replace("{s}", "").replace("{o}", ""))})


@pytest.fixture(scope="session")
def make_tokenizer():
    "Function: a fresh word-level tokenizer with a beginning-of-sequence token and a few word pieces."
    words = ["<pad>", "<bos>", "<unk>", "##er", "##ers", *world_words()]

    def make():
        tok = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        tok.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
        tok.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
        return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<bos>", unk_token="<unk>", pad_token="<pad>")
    return make


@pytest.fixture(scope="session")
def tiny(make_tokenizer):
    "Function: a fresh tiny random LM of a family, float32, the same for the same seed; no bias is zero."
    def make(family="qwen3", seed=0, **config):
        tok = make_tokenizer()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            hf = BUILD[family](vocab_size=len(tok), **SIZES | config)
            for p in hf.parameters(): p.data += .1 * torch.randn_like(p)
        return wrap(hf, tok, f"tiny-{family}", f"seed{seed}")
    return make


REAL = {"llama-3": "llama", "gemma": "gemma", "qwen3": "qwen3", "gemma-3": "gemma2"} # tokenizer -> family of the stand-in


@pytest.fixture(scope="session")
def real_tokenizer():
    "Function: a fresh real tokenizer (llama-3, gemma, qwen3, gemma-3); skips where they are absent."
    def make(name):
        if not (real.folder() / name / "tokenizer.json").exists(): pytest.skip(f"no {name} tokenizer in {real.folder().name}: `make real`")
        return AutoTokenizer.from_pretrained(real.folder() / name)
    return make


@pytest.fixture(scope="session")
def stand_in(real_tokenizer):
    "Function: a tiny random LM with a real tokenizer and its full vocabulary."
    def make(name, seed=0, **config):
        tok = real_tokenizer(name)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            hf = BUILD[REAL[name]](vocab_size=len(tok), **SIZES | dict(bos_token_id=tok.bos_token_id, pad_token_id=tok.pad_token_id) | config)
        return wrap(hf, tok, f"stand-in-{name}", f"seed{seed}")
    return make


@pytest.fixture(scope="session")
def real_model():
    "Function: folder of a pre-trained model (gemma-3-270m, smollm2-135m); skips where it is absent."
    def find(name):
        if not (real.folder() / name / "model.safetensors").exists(): pytest.skip(f"no pre-trained {name} in {real.folder().name}")
        return real.folder() / name
    return find


@pytest.fixture(params=FEW)
def lm(request, tiny):
    "A tiny random LM: one test for each of a few families; for each of all families with the mark `plain.every_family`."
    family, odd, _ = request.param.partition(" odd")
    return tiny(family, **(ODD if odd else {}))


LONGEST = [f"test_{n}" for n in "report planted cli_hazards runs tracing memory audit editors real_facts hazards published relearning".split()]


def pytest_collection_modifyitems(items):
    "Long files come first: two workers that take a file each then end together"
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "gpu: needs a GPU")
