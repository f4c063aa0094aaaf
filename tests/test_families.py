"Families of a user's own, what is refused, and a real Gemma 3"
import json, re
from pathlib import Path
from types import SimpleNamespace
import pytest, test_patching, test_tracing, torch, transformers as tf
from conftest import BUILD, SIZES
from mechunlearn.cli import main
from mechunlearn.facts import Fact
from mechunlearn.checkpoints import edit_of
from mechunlearn.grids import PIPELINE, Settings, make_job, parse, skeleton
from mechunlearn.families import FAMILIES, check_structure, read_family
from mechunlearn.models import Component, components, load, merge_slices, n_params, slices, wrap
from mechunlearn.options import sweep_words
from mechunlearn.patching import direct_effect, through
from mechunlearn.runs import run_job
from mechunlearn.store import Refusal, read_meta
from mechunlearn.tracing import causal_tracing, swap_cases
from test_tracing import make_facts

STABLE = dict(like="llama", mlp_norm="input_layernorm", parallel="use_parallel_residual")
STARCODER = dict(like="llama", gate_proj=None, up_proj="mlp.c_fc", down_proj="mlp.c_proj")
GPTJ = dict(like="gpt2", **{f"{x}_proj": f"attn.{x}_proj" for x in "qkv"}, o_proj="attn.out_proj", attn_add="attn.out_proj", up_proj="mlp.fc_in", down_proj="mlp.fc_out",
    mlp_norm="ln_1", parallel=True)
PHI = dict(like="llama", gate_proj=None, up_proj="mlp.fc1", down_proj="mlp.fc2", o_proj="self_attn.dense", attn_add="self_attn.dense", mlp_norm="input_layernorm", parallel=True,
    final_norm="model.final_layernorm")
GLM = dict(like="llama", gate_proj="mlp.gate_up_proj", up_proj="mlp.gate_up_proj")
COHERE = dict(like="llama", mlp_norm="input_layernorm", parallel=True, logit_factor="logit_scale")
GRANITE = dict(like="llama", add_factor="residual_multiplier", logit_factor="1/logits_scaling")
PERSIMMON = dict(like="gpt_neox", embed="model.embed_tokens", layers="model.layers", final_norm="model.final_layernorm", attn="self_attn", interleaved=True, parallel=False,
    **{f"{x}_proj": "self_attn.query_key_value" for x in "qkv"}, o_proj="self_attn.dense", attn_add="self_attn.dense")
UNLISTED = dict( # class, what its configuration says besides, its entry, whether attention and MLP work in parallel
    stablelm=("StableLm", dict(num_key_value_heads=2, use_parallel_residual=True, use_qkv_bias=True), STABLE, True),
    stablelm_serial=("StableLm", dict(num_key_value_heads=2, use_parallel_residual=False), dict(like="llama"), False),
    starcoder2=("Starcoder2", dict(num_key_value_heads=2, sliding_window=3), STARCODER, False),
    phi=("Phi", dict(num_key_value_heads=2), PHI, True),
    glm=("Glm", dict(num_key_value_heads=2, partial_rotary_factor=.5), GLM, False),
    persimmon=("Persimmon", dict(), PERSIMMON, False),
    cohere=("Cohere", dict(num_key_value_heads=2, logit_scale=.3), COHERE, True),
    granite=("Granite", dict(num_key_value_heads=2, residual_multiplier=.3, logits_scaling=2., embedding_multiplier=3., attention_multiplier=.2), GRANITE, False),
    exaone4=("Exaone4", dict(num_key_value_heads=2), dict(like="olmo2"), False))


@pytest.fixture
def unlisted(make_tokenizer):
    "Function: a tiny random model of a family that is not listed, and a tokenizer"
    def make(kind, **more):
        (name, config, *_), tok = UNLISTED.get(kind, (kind, {})), make_tokenizer()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            hf = getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(vocab_size=len(tok), **SIZES | config | more))
            for p in hf.parameters(): p.data += .1 * torch.randn_like(p)
        return hf, tok
    return make


@pytest.mark.parametrize("kind", UNLISTED)
def test_a_family_of_ones_own_works_like_the_others(unlisted, kind, tmp_path):
    hf, tok = unlisted(kind)
    *_, entry, parallel = UNLISTED[kind]
    (tmp_path / "my.json").write_text(json.dumps(entry))
    lm = wrap(hf, tok, kind, "seed0", family=tmp_path / "my.json")
    assert lm.parallel == parallel and re.fullmatch(r"seed0\+family-[0-9a-f]{8}", lm.revision) and lm.revision == wrap(hf, tok, kind, "seed0", family=entry).revision
    linear = [m for n, m in hf.named_modules() if isinstance(m, torch.nn.Linear) and re.search(r"\.\d+\.", n)]
    assert n_params(lm, merge_slices([s for c in components(lm) for s in slices(lm, c)])) == sum(m.weight.numel() for m in linear)
    batch, added = lm.encode(["Fact: dog plays the sport of"]), []
    with torch.no_grad(), lm.nn.trace(batch):
        start = lm.layer(0).input.save()
        for l in range(lm.n_layers): added += [lm.attn_add(l).output, lm.mlp_add(l).output]
        end = lm.layer(l).output.save()
    torch.testing.assert_close(start + lm.add_factor * sum(added), end, rtol=0, atol=1e-4)


def parts_of(lm):
    "As `plain.parts`; what attention and MLP read is hooked behind their norm, which may be one for both"
    def parts(hf, l):
        m = {k: hf.get_submodule(f"{lm.own['layers']}.{l}.{lm.own[k]}") for k in ("attn", "o_proj", "mlp", "attn_add", "mlp_add")}
        block = hf.get_submodule(f"{lm.own['layers']}.{l}")
        return SimpleNamespace(block=block, attn=m["attn"], out=m["o_proj"], mlp=m["mlp"], attn_reads=m["attn"], mlp_reads=m["mlp"], attn_adds=m["attn_add"], mlp_adds=m["mlp_add"])
    return parts


RECEIVERS = [Component("head", 1, 1), Component("mlp", 1), Component("head", 2, 0), Component("mlp", 2)]

@pytest.mark.parametrize("kind", ["stablelm", "phi", "starcoder2", "persimmon", "cohere", "granite"])
def test_maps_of_ones_own_family_equal_brute_force(unlisted, kind, monkeypatch):
    hf, tok = unlisted(kind)
    lm = wrap(hf, tok, kind, "seed0", family=UNLISTED[kind][2])
    for module in (test_patching, test_tracing): monkeypatch.setattr(module, "parts", parts_of(lm))
    monkeypatch.setattr(test_tracing, "blocks", lambda hf: hf.get_submodule(lm.own["layers"]))
    facts, cases, comps = make_facts(4), swap_cases(lm, make_facts(4)), components(lm)
    traced, how = causal_tracing(lm, facts, batch_size=5, progress=False), dict(min_gap=-99, progress=False)
    direct, path = direct_effect(lm, facts, **how), through(lm, facts, RECEIVERS, comps, within=False, **how)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    for i, case in enumerate(cases):
        both, a = test_patching.runs(lm, case), list(case.answers)
        close(traced.raw["patched"][0, :, 0, i], test_tracing.brute(lm, case, [(c.kind, c.layer, c.head, None) for c in comps])[2])
        for j, c in enumerate(comps):
            close(direct.raw["patched"][i, j], test_patching.frozen(lm, *both, c)[a])
            close(path.raw["patched"][i, j], test_patching.passed(lm, *both, c, RECEIVERS, False)[a])


# ---- what is refused

@pytest.mark.parametrize("entry, said", [
    (dict(FAMILIES["llama"], gate_prjo="x"), "unknown key 'gate_prjo', did you mean 'gate_proj'?"),
    (dict(like="llama", wings=2), "unknown key 'wings'; known are embed"),
    ({k: v for k, v in FAMILIES["llama"].items() if k not in ("q_proj", "mlp")}, "lacks q_proj, mlp: name these modules"),
    (dict(like="lama"), "did you mean 'llama'"),
    (dict(like="llama", down_proj=None), "down_proj is the path of a module, not null"),
    (dict(like="llama", attn_norm=3), "attn_norm is the path of a module or null, not 3"),
    (dict(like="llama", parallel="yes please"), "says that parallel is 'yes please' of the configuration"),
    (dict(like="llama", parallel=1), "parallel is true, false or the name of a field of the configuration, not 1"),
    (dict(like="llama", interleaved="yes"), "interleaved is true or false, not \"yes\""),
    (dict(like="llama", n_kv_heads=0), "n_kv_heads is a number or the name of a field, not 0"),
    (dict(like="llama", d_mlp="width"), "says that d_mlp is 'width' of the configuration, which has no such field"),
    (dict(like="llama", add_factor="1/attention_dropout"), "add_factor is '1/attention_dropout' of the configuration, where attention_dropout is 0.0: a number is needed other than 0"),
    (dict(like="llama", logit_factor="hidden_act"), "where hidden_act is 'silu': a number is needed"), (dict(like="llama", logit_factor="1/pad_token_id"), "a number is needed"),
    (dict(like="llama", logit_factor=float("inf")), "logit_factor is a number or the name of a field (1/FIELD divides), not Infinity"),
    (dict(like="llama", up_proj="mlp.w1"), "has no module 'model.layers.0.mlp.w1', which its family names"),
    (dict(like="llama", up_proj="mlp.gate_proj"), "mlp.gate_proj of this llama model is 48 x 32, its config says 96 x 32"),
    (dict(like="llama", o_proj="input_layernorm"), "input_layernorm of this llama model is no linear layer"),
    (dict(like="llama", n_kv_heads=4), "k_proj of this llama model is 16 x 32, its config says 32 x 32"),
    (dict(like="llama", attn_norm="post_attention_layernorm"), "in block 0, attention does not read the stream through attn_norm"),
    (dict(like="llama", parallel=True), "in block 0, the MLP does not read the stream through mlp_norm"),
    (dict(like="llama", mlp_add="input_layernorm"), "mlp_add neither is nor reads what is computed before it"),
    (["llama"], "holds no keys and values")])
def test_a_wrong_entry_is_refused_in_one_line(tiny, entry, said, tmp_path):
    lm, file = tiny("llama"), tmp_path / "my.json"
    file.write_text(json.dumps(entry))
    with pytest.raises(Refusal) as e: wrap(lm.hf, lm.tok, "mine", family=file)
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("text, said", [("{", "cannot be read as JSON"), (None, "there is no file"), (b"\xff\xfe\x00", "cannot be read as JSON"), ("[" * 100000, "cannot be read as JSON")])
def test_a_file_that_is_none_is_refused(tmp_path, text, said):
    file = tmp_path / "my.json"
    if text is not None: file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Refusal, match=said): read_family(file)
    with pytest.raises(Refusal, match="there is no file"): read_family(tmp_path)


@pytest.mark.parametrize("kind, entry, said", [
    ("granite", dict(like="llama"), "see also: parallel, add_factor"), ("GPTJ", GPTJ, "its blocks do not return the stream alone"), ("cohere", COHERE | dict(logit_factor=1), "see also: logit_factor"),
    ("persimmon", PERSIMMON | dict(interleaved=False), "the values of key-value head 0"), ("stablelm", STABLE | dict(parallel=False), "see also: parallel"),
    ("stablelm", dict(like="llama"), "no module 'model.layers.0.post_attention_layernorm'"), ("glm", dict(like="llama"), "no module 'model.layers.0.mlp.gate_proj'")])
def test_what_names_and_shapes_do_not_tell_is_tried(unlisted, kind, entry, said):
    hf, tok = unlisted(kind, **dict(rotary_dim=4, n_inner=48) if kind == "GPTJ" else {})
    with pytest.raises(Refusal, match=said): wrap(hf, tok, "mine", family=entry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_families_pass_their_trial_in_every_dtype(tiny, unlisted, dtype):
    for kind in BUILD:
        lm = tiny(kind)
        wrap(lm.hf.to(dtype), lm.tok, "again", family=FAMILIES[lm.family])
        assert lm.own is None and "family" not in lm.revision
    for kind in UNLISTED:
        hf, tok = unlisted(kind)
        wrap(hf.to(dtype), tok, "mine", family=UNLISTED[kind][2])


@pytest.mark.parametrize("family", ["gpt2", "neox", "phi3"])
def test_quantized_models_are_counted_as_whole_ones(tiny, family, tmp_path):
    plain = tiny(family, hidden_size=64, intermediate_size=64, head_dim=16)
    plain.hf.save_pretrained(tmp_path); plain.tok.save_pretrained(tmp_path)
    for bits in ("8bit", "4bit"):
        lm = load(str(tmp_path), device="cpu", quantize=bits, family=FAMILIES[plain.family])
        for c in ("mlp.1", "head.0.2"): assert n_params(lm, slices(lm, c)) == n_params(plain, slices(plain, c))


def test_a_model_of_several_senses_is_refused():
    with torch.device("meta"): hf = tf.AutoModelForCausalLM.from_config(tf.Gemma3Config())
    with pytest.raises(Refusal, match="'gemma3' is not supported.*gemma3_text"): check_structure(hf)


# ---- from a file, through every door

@pytest.fixture
def starcoder(unlisted, tmp_path):
    "A folder with a model of an unlisted family, and a file that describes it"
    hf, tok = unlisted("starcoder2")
    hf.save_pretrained(tmp_path / "mine"); tok.save_pretrained(tmp_path / "mine")
    (tmp_path / "my.json").write_text(json.dumps(STARCODER))
    return tmp_path / "mine", tmp_path / "my.json"


def test_a_folder_is_loaded_with_its_family(starcoder, tmp_path):
    folder, file = starcoder
    with pytest.raises(Refusal, match="'starcoder2' is not supported.*--family FILE.json"): load(str(folder), device="cpu")
    lm = load(str(folder), device="cpu", family=file)
    assert "+family-" in lm.revision and lm.own == read_family(file)
    with torch.no_grad(): lm.hf.get_parameter("model.layers.1.mlp.c_proj.weight").add_(.5)
    lm.hf.save_pretrained(tmp_path / "edited"); lm.tok.save_pretrained(tmp_path / "edited")
    assert list(edit_of(load(str(folder), device="cpu", family=file), tmp_path / "edited").values) == ["model.layers.1.mlp.c_proj.weight|0|0|32"]


def test_a_job_keeps_what_the_file_says(starcoder, tmp_path):
    folder, file = starcoder
    job = make_job(str(folder), "sports-athlete-editing", {"facts": "world", "forget_size": 4}, ["late"], [0], {"family": str(file)}, out=str(tmp_path / "runs"))
    lm = skeleton(job)
    assert job.settings["family"] == read_family(file) and lm.family == "starcoder2" and lm.own == read_family(file)
    words = sweep_words(job, ["late"])
    given = next(w for w in words if w.startswith("family="))
    assert parse(Settings, {"family": json.loads(given.removeprefix("family="))}, "settings").family == read_family(file)
    assert make_job("x", job.task, {}, ["late"], [0], {"family": "llama"}).settings["family"] == "llama"


def test_the_command_line_refuses_before_work_and_runs_with_it(starcoder, tmp_path, capsys):
    folder, file = starcoder
    told = ["--model", str(folder), "--facts", "world", "--forget-size", "4"]
    assert main(["check", *told, "--family", str(file)]) == 0 and "starcoder2, 3 layers of 4 heads" in capsys.readouterr().out
    for bad, said in (("nothing.json", "there is no file"), ("", "--family is empty"), ("llama", "no module 'model.layers.0.mlp.gate_proj'")):
        assert main(["localize", *told, "--family", bad, "--out", str(tmp_path / "runs")]) == 2 and said in capsys.readouterr().err
    job = make_job(str(folder), "sports-athlete-editing", {"facts": "world", "forget_size": 4}, ["late"], [0], {"family": str(file)}, out=str(tmp_path / "runs"))
    file.unlink() # a worker needs it no more
    run_job(job, PIPELINE[:1])
    assert "+family-" in read_meta(Path(job.run_dir) / "scores" / "probing.parquet")["causes"]["revision"]


# ---- a real one

ATHLETES = [("Michael Jordan", " basketball"), ("Tom Brady", " football"), ("Babe Ruth", " baseball"), ("Mickey Mantle", " baseball"), ("Joe Montana", " football"), ("Larry Bird", " basketball")]

def test_gemma_3_is_read_and_patched_as_by_hand(real_model):
    lm = load(str(real_model("gemma-3-270m")), device="cpu", dtype="float32")
    assert (lm.family, lm.n_layers, lm.n_heads, lm.n_kv_heads, lm.head_dim, lm.d_model, lm.d_mlp, lm.post_norms) == ("gemma3_text", 18, 4, 1, 256, 640, 2048, True)
    facts = [Fact(id=n, relation="sport", subject=n, answer=a, candidates=(a,), prompt=f"Fact: Tiger Woods plays the sport of golf\nFact: {n} plays the sport of") for n, a in ATHLETES]
    cases = swap_cases(lm, facts)[:2]
    facts = [c.fact for c in cases]
    comps = [Component("mlp", 2), Component("head", 5, 3), Component("mlp", 12), Component("mlp", 17), Component("head", 12, 0)]
    how = dict(pool=[c.other for c in cases], progress=False)
    traced, receivers = causal_tracing(lm, facts, components=comps, **how), [Component("mlp", 12), Component("head", 12, 0), Component("head", 13, 1)]
    paths, direct = through(lm, facts, receivers, comps[:2], min_gap=-99, **how), direct_effect(lm, facts, min_gap=-99, **how)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    for i, case in enumerate(swap_cases(lm, facts, how["pool"])):
        both, a = test_patching.runs(lm, case), list(case.answers)
        close(traced.raw["patched"][0, :, 0, i], test_tracing.brute(lm, case, [(c.kind, c.layer, c.head, None) for c in comps])[2])
        for j, c in enumerate(comps[:2]): close(paths.raw["patched"][i, j], test_patching.passed(lm, *both, c, receivers, True)[a])
        for c in comps: close(direct.raw["patched"][i, components(lm).index(c)], test_patching.frozen(lm, *both, c)[a])


# ---- what others do with them

@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("family", ["gpt2", "neox", "phi3", "olmo2"])
def test_an_attacker_trains_every_matrix_and_leaves_no_trace(tiny, family, rank):
    from mechunlearn.finetuning import fingerprint
    from mechunlearn.relearning import Lora, attacker, linear_weights, teach
    from plain import projections
    from test_finetuning import task_for
    lm = tiny(family)
    task, before, lora = task_for(lm), fingerprint(lm), Lora(rank, 4., 1e-3, .05)
    n = len(projections(lm.hf))
    assert {s.param for s in linear_weights(lm)} == set(projections(lm.hf))
    with attacker(lm, lora) as (params, values):
        for _ in teach(lm, task, task.forget, params, lora, 2, values=values): pass
        assert len(params) == (2 if rank else 1) * n
    assert fingerprint(lm) == before
