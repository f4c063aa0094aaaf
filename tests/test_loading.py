"Models on disk, in the hub's cache and in memory: which revision was read, and what is refused in one line."
import hashlib, json, os, pickle, random, shutil, struct, subprocess, sys
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from tokenizers import models as tokenizer_models, Tokenizer
from transformers import PreTrainedTokenizerFast
from mechunlearn import models as M
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
            blob = repo / "blobs" / M.sha256(file)
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
    read = M.AutoConfig.from_pretrained
    def moves_on(*args, **kwargs):
        (repo / "refs" / "main").write_text(B)
        return read(*args, **kwargs)
    monkeypatch.setattr(M.AutoConfig, "from_pretrained", moves_on)
    got = load("someone/model", device="cpu")
    assert got.revision == A and same(got, first) and not same(got, second)


def test_a_hub_model_of_unknown_revision_is_refused(cached, monkeypatch, tmp_path):
    monkeypatch.setattr(M, "cached_file", lambda *a, **k: str(tmp_path / A / "config.json"))
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


@pytest.mark.parametrize("name, revision", [("organism", "f188706831bfd52a"), ("organism-late", "c43e56bdca98ff19")])
def test_the_packaged_models_keep_their_revision(name, revision):
    assert M.locate(name)[2] == M.locate(str(M.DATA / name))[2] == revision


def test_models_in_memory_are_told_apart_by_their_weights(tiny):
    a, b, again = tiny("qwen3"), tiny("qwen3", seed=1), tiny("qwen3")
    assert a.hf is not again.hf and weights_hash(a.hf) == weights_hash(again.hf) != weights_hash(b.hf) and len(weights_hash(a.hf)) == 16
    assert wrap(a.hf, a.tok).revision == ""
    with torch.no_grad(): again.hf.model.layers[2].mlp.up_proj.weight[3, 5] += 1e-3
    assert weights_hash(again.hf) != weights_hash(a.hf)
    assert weights_hash(a.hf.bfloat16()) != weights_hash(tiny("qwen3").hf)
    wider = tiny("qwen3", sliding_window=3)
    assert weights_hash(wider.hf) != weights_hash(tiny("qwen3").hf)


# ---- weights that are not the model's

@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(folder, dtype, bad):
    def spoil(w):
        w["model.layers.2.self_attn.q_proj.weight"][1, 2] = w["model.layers.1.mlp.down_proj.weight"][-1, -1] = bad
    reweigh(folder, spoil)
    assert "model.layers.1.mlp.down_proj.weight holds NaN or infinite numbers" in refused(folder, dtype=dtype)
    assert M.not_finite(load_unchecked(folder)) == "model.layers.1.mlp.down_proj.weight"


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
