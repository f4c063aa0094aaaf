"Models on disk, in the hub's cache and in memory: which revision was read, and what is refused in one line."
import json, os, pickle, random, shutil, struct, subprocess, sys
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from mechunlearn import loading, models as M
from mechunlearn.models import folder_revision, load, next_token, weights_hash, wrap
from mechunlearn.store import Refusal

PROMPTS = ["Fact: the dog plays the sport of", "the dog"]


def put(lm, where, **how):
    "Save a model as an ordinary folder."
    lm.hf.save_pretrained(where, **how)
    lm.tok.save_pretrained(where)
    return Path(where)


@pytest.fixture
def folder(tiny, tmp_path): return put(tiny("qwen3"), tmp_path / "mine")


def refused(folder, **how):
    "The one line with which a folder is refused."
    with pytest.raises(Refusal) as e: load(str(folder), device="cpu", **how)
    assert str(e.value).strip() and "\n" not in str(e.value) and len(str(e.value)) < 700
    return str(e.value)


def change(folder, name, **values):
    "Alter a JSON file."
    about = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(about | values))


def reweigh(folder, fn, name="model.safetensors"):
    "Alter the tensors of a folder."
    tensors = load_file(folder / name)
    out = fn(tensors)
    save_file(out if isinstance(out, dict) else tensors, folder / name, metadata={"format": "pt"})


# ---- revisions

def hub(cache, name, commits, refs):
    "A hub cache as the library keeps it: files by content, a folder of links for each commit, refs to commits."
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    for commit, folder in commits.items():
        (repo / "snapshots" / commit).mkdir(parents=True)
        for file in folder.iterdir():
            blob = repo / "blobs" / loading.sha256(file)
            shutil.copy(file, blob)
            (repo / "snapshots" / commit / file.name).symlink_to(os.path.relpath(blob, repo / "snapshots" / commit))
    for ref, commit in refs.items(): (repo / "refs" / ref).write_text(commit)
    return repo


A, B = "a" * 40, "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tiny, tmp_path, monkeypatch):
    "A hub model with two commits in an offline cache, and the two models."
    two = [tiny("qwen3", seed=s) for s in (0, 1)]
    repo = hub(tmp_path / "cache", "someone/model", {c: put(lm, tmp_path / c) for c, lm in zip((A, B), two)}, {"main": B, "v1": A})
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"): monkeypatch.setattr(name, str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return two, repo


def same(a, b): return torch.equal(next_token(a, PROMPTS, [[5]] * 2)[0], next_token(b, PROMPTS, [[5]] * 2)[0])


def test_a_hub_model_s_revision_is_the_commit_that_was_read(cached):
    (first, second), _ = cached
    for revision, commit, lm in ((None, B, second), ("main", B, second), ("v1", A, first), (A, A, first), (B, B, second)):
        got = load("someone/model", device="cpu", revision=revision)
        assert got.revision == commit and got.name == "someone/model" and same(got, lm)
    assert load("someone/model", device="cpu", dtype="bfloat16", revision="v1").revision == f"{A}+bfloat16"
    with pytest.raises(Refusal, match="cannot load 'someone/model'"): load("someone/model", revision="v2")


def test_every_file_is_read_from_one_commit(cached, monkeypatch):
    (first, second), repo = cached
    (repo / "refs" / "main").write_text(A)
    read = loading.AutoConfig.from_pretrained
    def moves_on(*args, **kwargs):
        (repo / "refs" / "main").write_text(B)
        return read(*args, **kwargs)
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", moves_on)
    got = load("someone/model", device="cpu")
    assert got.revision == A and same(got, first) and not same(got, second)


def test_a_hub_model_of_unknown_revision_is_refused(cached, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "cached_file", lambda *a, **k: str(tmp_path / A / "config.json"))
    with pytest.raises(Refusal, match=f"cannot tell which revision of 'someone/model' is in .*{A}"): load("someone/model")


def test_a_snapshot_without_its_weights_is_refused(cached):
    _, repo = cached
    (repo / "snapshots" / A / "model.safetensors").unlink()
    with pytest.raises(Refusal, match="cannot load 'someone/model'") as e: load("someone/model", revision="v1", device="cpu")
    assert "\n" not in str(e.value) and load("someone/model", device="cpu").revision == B


def test_hub_caches_are_found_where_the_environment_says(tmp_path, tiny):
    hub(tmp_path / "elsewhere", "someone/model", {A: put(tiny("qwen3"), tmp_path / "x")}, {"main": A})
    code = "from mechunlearn.models import load; print(load('someone/model', device='cpu').revision)"
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "elsewhere"), "HF_HUB_OFFLINE": "1"}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip() == A


FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "tokenizer.model", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_decides_is_in_the_revision(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    before = folder_revision(tmp_path)
    (tmp_path / name).write_text("1")
    one = folder_revision(tmp_path)
    (tmp_path / name).write_text("2")
    assert len({before, one, folder_revision(tmp_path)}) == 3


@pytest.mark.parametrize("name", ["README.md", "LICENSE", ".gitattributes", "training.csv", "trainer_state.json", "training_args.bin", "optimizer.pt", "world.json"])
def test_other_files_are_not(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    before = folder_revision(tmp_path)
    (tmp_path / name).write_text("1")
    assert folder_revision(tmp_path) == before


def test_a_changed_bos_changes_the_revision(folder):
    before = load(str(folder), device="cpu")
    change(folder, "tokenizer_config.json", bos_token="<unk>")
    assert load(str(folder), device="cpu").revision != before.revision


@pytest.mark.parametrize("name, revision", [("organism", "f188706831bfd52a"), ("organism-late", "c43e56bdca98ff19"), ("organism-never-knew", "0a39cf96017f4ce9")])
def test_the_packaged_models_keep_their_revision(name, revision):
    assert M.locate(name)[2] == M.locate(str(M.DATA / name))[2] == revision


def test_models_in_memory_are_told_apart_by_their_weights(tiny):
    a, b, again = tiny("qwen3"), tiny("qwen3", seed=1), tiny("qwen3")
    assert a.hf is not again.hf and weights_hash(a.hf) == weights_hash(again.hf) != weights_hash(b.hf) and len(weights_hash(a.hf)) == 16
    assert wrap(a.hf, a.tok).revision == ""
    with torch.no_grad(): again.hf.model.layers[2].mlp.up_proj.weight[3, 5] += 1e-3
    assert weights_hash(again.hf) != weights_hash(a.hf)
    assert weights_hash(a.hf.bfloat16()) != weights_hash(tiny("qwen3").hf)
    wider = tiny("qwen3", rms_norm_eps=1e-3)
    assert weights_hash(wider.hf) != weights_hash(tiny("qwen3").hf)


# ---- weights that are not the model's

@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(folder, dtype, bad):
    def spoil(w):
        w["model.layers.2.self_attn.q_proj.weight"][1, 2] = w["model.layers.1.mlp.down_proj.weight"][-1, -1] = bad
    reweigh(folder, spoil)
    assert "model.layers.1.mlp.down_proj.weight holds NaN or infinite numbers" in refused(folder, dtype=dtype)
    assert loading.not_finite(load_unchecked(folder)) == "model.layers.1.mlp.down_proj.weight"


def load_unchecked(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder)


def test_numbers_too_large_for_half_precision_are_refused(folder):
    reweigh(folder, lambda w: w["model.norm.weight"].fill_(1e6))
    assert "model.norm.weight holds NaN or infinite numbers as float16 (files may hold larger numbers: try dtype float32)" in refused(folder, dtype="float16")
    assert load(str(folder), device="cpu").hf.model.norm.weight.max() == 1e6


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantized_weights_that_are_no_numbers_are_refused(tiny, tmp_path, bits):
    where = put(tiny("qwen3", hidden_size=64, intermediate_size=64, head_dim=16), tmp_path / "m")
    assert load(str(where), device="cpu", quantize=bits)
    reweigh(where, lambda w: w["model.layers.1.mlp.down_proj.weight"].fill_(float("nan")))
    assert "model.layers.1.mlp.down_proj.weight" in refused(where, quantize=bits)
    reweigh(where, lambda w: w["model.layers.1.mlp.down_proj.weight"].fill_(0))
    reweigh(where, lambda w: w["model.norm.weight"].fill_(float("inf")))
    assert "model.norm.weight" in refused(where, quantize=bits)


def test_a_missing_matrix_is_named(folder):
    reweigh(folder, lambda w: {k: v for k, v in w.items() if k != "model.layers.1.mlp.up_proj.weight"})
    assert refused(folder).endswith("its weight files lack model.layers.1.mlp.up_proj.weight")


def test_more_layers_than_weights_are_refused(folder):
    change(folder, "config.json", num_hidden_layers=6, layer_types=["full_attention"] * 6)
    assert "its weight files lack model.layers.3." in refused(folder) and "more tensors" in refused(folder)


def test_more_weights_than_layers_are_refused(folder):
    change(folder, "config.json", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    assert "its weight files have besides model.layers.2." in refused(folder)


def test_other_shapes_are_refused(folder):
    reweigh(folder, lambda w: w | {"model.layers.0.mlp.gate_proj.weight": torch.zeros(7, 5)})
    assert refused(folder).endswith("its weight files have in another shape model.layers.0.mlp.gate_proj.weight")


def test_weights_of_another_model_are_refused(folder):
    reweigh(folder, lambda w: {f"base_model.model.{k}": v for k, v in w.items()})
    assert "its weight files lack " in refused(folder)


def test_a_missing_shard_is_named(tiny, tmp_path):
    where = put(tiny("qwen3"), tmp_path / "m", max_shard_size="30kB")
    shards = sorted(where.glob("model-*.safetensors"))
    assert len(shards) > 2 and load(str(where), device="cpu")
    shards[1].unlink()
    assert shards[1].name in refused(where)


def test_tied_unembeddings_and_old_buffers_are_fine(tiny, tmp_path):
    for family in ("gemma", "gemma2", "llama"):
        lm = tiny(family)
        where = put(lm, tmp_path / family)
        assert ("lm_head.weight" in load_file(where / "model.safetensors")) == (family == "llama")
        reweigh(where, lambda w: w | {f"model.layers.{l}.self_attn.rotary_emb.inv_freq": torch.ones(4) for l in range(3)})
        assert same(load(str(where), device="cpu"), lm)
    reweigh(where, lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"})
    assert "lack lm_head.weight" in refused(where)


def test_pickled_weights_load_and_cannot_run_code(folder, tiny, tmp_path):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert same(load(str(folder), device="cpu"), tiny("qwen3"))
    class Hostile:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "ran"),)
    torch.save({"model.norm.weight": Hostile()}, folder / "pytorch_model.bin")
    refused(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))
    refused(folder)
    assert not (tmp_path / "ran").exists()


# ---- adapters

def adapter(lm, where, base, **how):
    "A random LoRA of a model, saved as people do; returns the model with it."
    from copy import deepcopy
    from peft import LoraConfig, get_peft_model
    how = dict(r=4, target_modules=["up_proj", "q_proj"], task_type="CAUSAL_LM") | how
    model = get_peft_model(deepcopy(lm.hf), LoraConfig(**how))
    torch.manual_seed(0)
    for n, p in model.named_parameters():
        if "lora_B" in n: p.data = .3 * torch.randn_like(p)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(where)
    return wrap(model.merge_and_unload(), lm.tok, "merged"), Path(where)


@pytest.fixture
def lora(tiny, folder, tmp_path): return adapter(tiny("qwen3"), tmp_path / "lora", str(folder))


def test_an_adapter_is_merged_into_its_base(lora, folder, tiny):
    merged, where = lora
    got = load(str(where), device="cpu")
    assert torch.allclose(*(next_token(m, PROMPTS, [[5]] * 2)[0] for m in (got, merged)), atol=1e-5) and not same(got, tiny("qwen3"))
    assert got.name == "lora" and len(got.revision) == 16 and got.revision not in (folder_revision(where), folder_revision(folder))
    assert set(got.hf.state_dict()) == set(tiny("qwen3").hf.state_dict()) and not any(p.requires_grad for p in got.hf.parameters())
    assert len(got.hf.lm_head._forward_pre_hooks) == 1
    assert load(str(where), device="cpu", dtype="bfloat16").revision.endswith("+bfloat16")


def test_an_adapter_s_revision_is_its_own_and_its_base_s(lora, folder, tiny, tmp_path):
    _, where = lora
    before = load(str(where), device="cpu").revision
    other = put(tiny("qwen3", seed=1), tmp_path / "other")
    assert load(str(where), device="cpu", base=str(other)).revision != before == load(str(where), device="cpu", base=str(folder)).revision
    reweigh(where, lambda w: {k: v * 2 for k, v in w.items()}, "adapter_model.safetensors")
    assert load(str(where), device="cpu").revision != before


def test_an_adapter_without_a_base_that_can_be_found_is_refused(lora, folder):
    _, where = lora
    for named, words in (("no/where", "its base cannot be loaded.*no/where.*base="), ("", "names no base: give base="), (None, "names no base"),
        (str(folder / "gone"), "its base cannot be loaded.*gone"), (str(where), "an adapter itself")):
        change(where, "adapter_config.json", base_model_name_or_path=named)
        with pytest.MonkeyPatch.context() as m:
            m.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            assert M.re.search(words, refused(where)), words
    assert load(str(where), device="cpu", base=str(folder))


def test_an_adapter_that_does_not_fit_is_refused(lora, tiny, tmp_path, folder):
    _, where = lora
    shutil.copytree(where, tmp_path / "poor")
    reweigh(tmp_path / "poor", lambda w: dict(list(w.items())[1:]), "adapter_model.safetensors")
    assert "lack" in refused(tmp_path / "poor")
    shutil.copytree(where, tmp_path / "nan")
    reweigh(tmp_path / "nan", lambda w: {k: v * float("nan") for k, v in w.items()}, "adapter_model.safetensors")
    assert "NaN" in refused(tmp_path / "nan")
    shallow = put(tiny("llama", hidden_size=16), tmp_path / "other")
    refused(where, base=str(shallow))
    assert "quantized" in refused(where, quantize="8bit")
    shutil.copy(folder / "model.safetensors", where)
    assert "an adapter and a whole model" in refused(where)


def test_prompt_tuning_cannot_be_merged(tiny, folder, tmp_path):
    from copy import deepcopy
    from peft import PromptTuningConfig, get_peft_model
    model = get_peft_model(deepcopy(tiny("qwen3").hf), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "soft")
    assert "cannot be merged" in refused(tmp_path / "soft")


# ---- damaged, hostile and odd folders

SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")


def cut_to(name, n):
    def do(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:int(len(data) * n)] if isinstance(n, float) else data[:n])
    return do

def text(name, content): return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
def setting(name, **values): return lambda folder: change(folder, name, **values)
def header(about): # of a safetensors file
    raw = about if isinstance(about, bytes) else json.dumps(about).encode()
    return text("model.safetensors", struct.pack("<Q", len(raw)) + raw + bytes(64))
def remove(*names): return lambda folder: [(folder / n).unlink() for n in names]
def special(name, make):
    def do(folder):
        (folder / name).unlink()
        make(folder / name)
    return do
def instead(name, content):
    def do(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)
    return do

HUGE = {"dtype": "F32", "shape": [10**12, 10**12], "data_offsets": [0, 64]}
CORRUPTIONS = {f"weights cut to {n}": cut_to("model.safetensors", n) for n in (0, 1, 7, 8, 9, 100, 1000, .3, .99)} | {
    f"{name} cut to {n}": cut_to(name, n) for name in ("config.json", "tokenizer.json") for n in (0, 1, 20, .5, .95)} | {
    f"{key} is {value!r}": setting("config.json", **{key: value}) for key in SIZES for value in (-1, 0, "many", None, [3], 1.5, 10**9, 10**30, True)
        if not (key in ("head_dim", "num_key_value_heads") and value is None)} | {
    f"config.json is {content[:12]!r}": text("config.json", content) for content in ("[]", "null", "3", '"llama"', "{}", "\x00\x01", b"\xff\xfe{}", "{" * 5000, '{"a":' * 3000, "NaN")} | {
    "model_type": setting("config.json", model_type="nosuch"), "model_type 3": setting("config.json", model_type=3), "rope": setting("config.json", rope_parameters="x"),
    "rope type": setting("config.json", rope_parameters={"rope_type": "nosuch"}), "layer types": setting("config.json", layer_types=["x"]), "activation": setting("config.json", hidden_act="nosuch"),
    "code": setting("config.json", auto_map={"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}, model_type="mine"), "groups": setting("config.json", num_key_value_heads=3),
    "quantized how": setting("config.json", quantization_config={"quant_method": "nosuch"}), "vocabulary": setting("config.json", vocab_size=7),
    "heads": setting("config.json", num_attention_heads=5), "width": setting("config.json", hidden_size=31), "layers": setting("config.json", num_hidden_layers=999, layer_types=["full_attention"] * 999),
    "header length": text("model.safetensors", b"\xff" * 64), "header no json": header(b"nothing"), "header list": header([]), "header huge": header({"lm_head.weight": HUGE}),
    "header empty": header({}), "header offsets": header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 10**15]}}), "header dtype": header({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}),
    "weights are text": text("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"), "weights gone": remove("model.safetensors"),
    "config gone": remove("config.json"), "tokenizer gone": remove("tokenizer.json"), "no tokenizer": remove("tokenizer.json", "tokenizer_config.json"),
    "weights are a folder": special("model.safetensors", Path.mkdir), "weights loop": special("model.safetensors", lambda p: p.symlink_to(p.name)), "weights are a pipe": special("model.safetensors", os.mkfifo),
    "config loops": special("config.json", lambda p: p.symlink_to(p.name)), "config is a folder": special("config.json", Path.mkdir), "config is a pipe": special("config.json", os.mkfifo),
    "weights dangle": special("model.safetensors", lambda p: p.symlink_to("nowhere")), "config dangles": special("config.json", lambda p: p.symlink_to("nowhere")), "weights endless": special("model.safetensors", lambda p: p.symlink_to("/dev/zero")),
    "pickle garbage": instead("pytorch_model.bin", b"garbage"), "pickle empty": instead("pytorch_model.bin", b""), "pickle zip": instead("pytorch_model.bin", b"PK\x03\x04" + bytes(50)), "pickle list": instead("pytorch_model.bin", pickle.dumps([1])),
    "index garbage": instead("model.safetensors.index.json", b"{"), "index list": instead("model.safetensors.index.json", b"[]"), "index empty": instead("model.safetensors.index.json", b"{}"),
    "index outside": instead("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "../../x.safetensors"}}).encode()),
    "tokenizer list": text("tokenizer.json", "[]"), "tokenizer empty": text("tokenizer.json", "{}"), "tokenizer config": text("tokenizer_config.json", "["), "tokenizer config list": text("tokenizer_config.json", "[]"),
    "tokenizer class": setting("tokenizer_config.json", tokenizer_class="../x"), "adapter list": lambda f: (remove("model.safetensors", "config.json")(f), text("adapter_config.json", "[]")(f)),
    "adapter garbage": lambda f: (remove("model.safetensors", "config.json")(f), text("adapter_config.json", "{")(f)),
    "adapter kind": lambda f: (remove("model.safetensors", "config.json")(f), text("adapter_config.json", '{"peft_type": "NOSUCH", "base_model_name_or_path": "organism"}')(f))}
FINE = {"tokenizer class", "quantized how"} # words that the files themselves outweigh


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_a_corrupted_folder_is_refused_in_one_line(what, folder, capfd):
    CORRUPTIONS[what](folder)
    if what in FINE: load(str(folder), device="cpu")
    else: refused(folder)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_random_bytes_never_give_a_traceback(folder, tiny):
    "Flipped bytes either leave a model or give one line."
    rng, kept = random.Random(0), {p.name: p.read_bytes() for p in folder.iterdir()}
    for k in range(60):
        name = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json")[k % 5]
        data = bytearray(kept[name])
        for _ in range(3): data[rng.randrange(min(len(data), 4000))] = rng.randrange(256)
        (folder / name).write_bytes(data)
        try: load(str(folder), device="cpu")
        except Refusal as e: assert "\n" not in str(e) and len(str(e)) < 700
        (folder / name).write_bytes(kept[name])
    assert same(load(str(folder), device="cpu"), tiny("qwen3"))


@pytest.mark.parametrize("name", ["~nouser/x", "~nouser", "a\x00b", "x" * 5000, "y/" * 3000, "", " ", "..", "../..", "a/b/c", "-", "owner/na me", "owner/name@v1", "\n", "loop", "loop/model", "file", "file/x", "..\\x", "owner/--x..y"])
def test_names_that_can_be_nothing_are_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x")
    with pytest.raises(Refusal) as e: load(name)
    assert "\n" not in str(e.value)


def test_token_ids_beyond_the_embeddings_are_refused(tiny):
    lm = tiny("qwen3")
    lm.tok.add_tokens(["xyzzy"])
    with pytest.raises(Refusal, match="token .* embeddings"): lm.encode(["xyzzy"])


def test_no_line_about_a_package_that_nothing_needs():
    code = ("import mechunlearn.models, logging, bitsandbytes, bitsandbytes.backends.cpu.ops; log = logging.getLogger('bitsandbytes.backends.cpu.ops'); "
            "log.warning('Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure you already `pip install kernels`', 'x'); log.warning('another %s', 'line')")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.returncode == 0 and "kernels" not in said.stdout + said.stderr and "another line" in said.stderr


def test_a_processor_without_bfloat16_gets_float32(monkeypatch):
    assert loading.usual_dtype(4e6) == torch.float32 and loading.usual_dtype(9e9) == loading.usual_dtype(2.7e8, cpu=False) == torch.bfloat16
    for native in (True, False):
        monkeypatch.setattr(loading, "multiplies_bfloat16", lambda: native)
        assert loading.usual_dtype(2.7e8) == (torch.bfloat16 if native else torch.float32) and loading.usual_dtype(9e9) == torch.bfloat16


@pytest.mark.parametrize("amx, vectors, fp16, faster", [(True, True, True, True), (False, True, False, True), (False, True, True, False), (False, False, False, False)])
def test_vectors_of_bfloat16_without_matrices_are_slower_than_float32(monkeypatch, amx, vectors, fp16, faster):
    for name, has in {"_is_amx_tile_supported": amx, "_is_avx512_bf16_supported": vectors}.items(): monkeypatch.setattr(torch.cpu, name, lambda has=has: has, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_fp16": fp16}, raising=False)
    assert loading.multiplies_bfloat16() is faster
