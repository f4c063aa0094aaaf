import copy, hashlib, json, random
import pytest, torch
from plain import blocks, embeddings, every_family, every_shape, head_weights, last_norm, name_of, neuron_weights, parts, projections
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM, PreTrainedTokenizerFast
from mechunlearn import loading, models as M
from mechunlearn.families import check_structure
from mechunlearn.models import (Component, Slice, batches, components, load, merge_slices, n_params, neurons, next_token, resid_at, slices,
    wrap)
from mechunlearn.store import Refusal

PROMPTS = ["Fact: the sport", "the dog", "Question: What sport does the dog play ? Answer:", "of", "Fact: the dog plays the sport of"]


def hooked(lm, batch, module, what):
    "What a module read or wrote in a plain forward."
    seen = []
    def hook(_, args, kwargs, out):
        x = (args[0] if args else kwargs["hidden_states"]) if what == "input" else out
        seen.append(x[0] if isinstance(x, tuple) else x)
    handle = lm.hf.get_submodule(module).register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad(): lm.hf(**batch)
    handle.remove()
    return seen[0]


# ---- accessors

@every_family
def test_accessors_are_the_modules_of_a_plain_forward(lm):
    batch, l = lm.encode(PROMPTS), 1
    with torch.no_grad(), lm.nn.trace(batch):
        embed = lm.embed.output.save()
        before = lm.layer(l).input.save()
        if lm.names["attn_norm"]: attn_norm = lm.attn_norm(l).output.save()
        z = lm.o_proj(l).input.save()
        if not lm.post_norms: attn_add = lm.attn_add(l).output.save()
        attn = lm.attn(l).output[0].save()
        if lm.post_norms: attn_add = lm.attn_add(l).output.save()
        if lm.names["mlp_norm"]: mlp_norm = lm.mlp_norm(l).output.save()
        mlp_reads = lm.mlp(l).input.save()
        mlp = lm.mlp(l).output.save()
        mlp_add = lm.mlp_add(l).output.save()
        after = lm.layer(l).output.save()
        final = lm.final_norm.output.save()
        head = lm.lm_head.output.save()
        logits = lm.nn.output.logits.save()
    p, n = parts(lm.hf, l), lambda module: name_of(lm.hf, module)
    expected = [(embed, embeddings(lm.hf), "output"), (before, blocks(lm.hf)[0], "output"), (before, p.block, "input"), (z, p.out, "input"), (attn, p.attn, "output"),
        (attn_add, p.attn_adds, "output"), (mlp_reads, p.mlp, "input"), (mlp, p.mlp, "output"), (mlp_add, p.mlp_adds, "output"), (after, p.block, "output"),
        (after, blocks(lm.hf)[2], "input"), (final, last_norm(lm.hf), "output"), (head, lm.hf.lm_head, "output")]
    if lm.family == "olmo2":
        for norm in (lm.attn_norm, lm.mlp_norm):
            with pytest.raises(Refusal, match="has no (attn|mlp)_norm"): norm(l)
    else: expected += [(attn_norm, p.attn_reads, "output"), (mlp_norm, p.mlp_reads, "output"), (mlp_norm, p.mlp, "input")]
    for got, module, what in expected: assert torch.equal(got, hooked(lm, batch, n(module), what)), (n(module), what)
    with torch.no_grad(): plain = lm.hf(**batch).logits
    assert torch.equal(logits, plain)
    assert torch.equal(head, logits) == (lm.family != "gemma2")      # Gemma-2 caps them afterwards


@every_family
def test_contributions_sum_to_the_residual_stream(lm):
    added = []
    with torch.no_grad(), lm.nn.trace(lm.encode(PROMPTS)):
        start = lm.layer(0).input.save()
        for l in range(lm.n_layers):
            added.append(lm.attn_add(l).output)
            added.append(lm.mlp_add(l).output)
            end = lm.layer(l).output.save()
    assert torch.allclose(start + sum(added), end, atol=1e-4)
    assert not torch.allclose(start, end, atol=1e-1)


@every_family
def test_writing_one_head_equals_a_hook(lm):
    batch, l, h = lm.encode(PROMPTS), 1, 2
    cols = slice(h * lm.head_dim, (h + 1) * lm.head_dim)
    assert lm.z(l, h) == cols
    with torch.no_grad(), lm.nn.trace(batch):
        lm.o_proj(l).input[:, -1, lm.z(l, h)] = 0
        traced = lm.nn.output.logits.save()
    def ablate(_, args):
        x = args[0].clone()
        x[:, -1, cols] = 0
        return (x,)
    handle = parts(lm.hf, 1).out.register_forward_pre_hook(ablate)
    with torch.no_grad(): hook = lm.hf(**batch).logits
    handle.remove()
    with torch.no_grad(): clean = lm.hf(**batch).logits
    assert torch.allclose(traced, hook, atol=1e-6) and not torch.allclose(traced, clean, atol=1e-4)


def test_layers_out_of_range_are_errors_and_negative_ones_count_from_the_end(lm):
    assert lm.path("mlp", -1) == "model.layers.2.mlp"
    with pytest.raises(IndexError): lm.mlp(lm.n_layers)
    with pytest.raises(IndexError): lm.z(0, lm.n_heads)


def test_everything_is_frozen_and_in_evaluation_mode(lm):
    assert not lm.hf.training and not any(p.requires_grad for p in lm.hf.parameters())


# ---- text

def test_encode_pads_on_the_left_with_one_bos(lm):
    batch = lm.encode(PROMPTS)
    for text, row, mask, pos in zip(PROMPTS, *batch.values()):
        n = int(mask.sum())
        assert row[-n:].tolist() == lm.tok(text).input_ids and row[-n] == lm.tok.bos_token_id
        assert mask.tolist() == [0] * (len(mask) - n) + [1] * n and pos[-n:].tolist() == list(range(n))
        assert lm.tok.bos_token_id not in row[-n + 1:] and set(row[:-n].tolist()) <= {lm.tok.pad_token_id}


def test_bos_is_the_tokenizer_s_own_affair(tiny):
    lm, bare = tiny("qwen3"), tiny("qwen3")
    words = lm.tok.convert_tokens_to_ids(["the", "dog"])
    bare.tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert lm.ids(["the dog"]) == [[1, *words]] and bare.tok.bos_token_id == 1 and bare.ids(["the dog"]) == [words]
    assert lm.ids(["<bos>the dog"]) == [[1, *words]] == bare.ids(["<bos>the dog"])
    forced, spared = wrap(bare.hf, bare.tok, bos=True), wrap(lm.hf, lm.tok, bos=False)
    assert forced.ids(["the dog", "<bos>the dog"]) == [[1, *words]] * 2 and spared.ids(["the dog"]) == [words]
    bare.tok.bos_token = None
    with pytest.raises(Refusal, match="no beginning-of-sequence token"): wrap(bare.hf, bare.tok, bos=True)


def test_a_prompt_does_not_end_with_the_tokenizer_s_eos(tiny):
    lm = tiny("qwen3")
    words = lm.tok.convert_tokens_to_ids(["the", "dog"])
    lm.tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <unk>", special_tokens=[("<bos>", 1), ("<unk>", 2)])
    assert lm.tok("the dog").input_ids == [1, *words, 2] and lm.ids(["the dog", ""]) == [[1, *words], [1]]
    assert lm.subject_positions(["the dog"], ["dog"]) == [(-1, 0)]


def test_an_overridden_bos_is_part_of_the_revision(tiny):
    lm = tiny("qwen3")
    revision = lambda **how: wrap(lm.hf, lm.tok, "x", **how).revision
    assert revision(revision="r", bos=True) == revision(revision="r") == "r" and revision(revision="r", bos=False) == "r+no-bos"
    lm.tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert revision(revision="r", bos=True) == "r+bos" and revision(revision="r", bos=False) == "r" and revision(bos=True) == ""


def test_an_empty_prompt_is_refused_where_nothing_opens_it(tiny):
    lm = tiny("qwen3")
    assert lm.encode([""])["input_ids"].tolist() == [[1]] and lm.ids([]) == []
    lm.bos = False
    with pytest.raises(Refusal, match="empty prompt"): lm.encode(["the dog", ""])


def byte_level(texts):
    "A tokenizer as Llama 3's: the leading space is part of the token."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=["<bos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<bos>")


def metaspace(texts):
    "A tokenizer as Gemma's: spaces are replaced by a visible character, nothing is split beforehand but at spaces."
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.normalizer, tok.pre_tokenizer = normalizers.Replace(" ", "▁"), pre_tokenizers.Split("▁", "merged_with_next")
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, special_tokens=["<bos>", "<unk>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<bos>", unk_token="<unk>")


TEXTS = ["Fact: Ann Lee plays the sport of football", "Fact: Bo Zürn plays the sport of baseball", "Answer: A", "Answer: B"] * 20


@pytest.fixture(params=[byte_level, metaspace])
def spaced(request, tiny):
    "A model whose tokenizer keeps the leading space in the token."
    lm = tiny("llama")
    lm.tok = request.param(TEXTS)
    return lm


def test_an_answer_is_the_token_that_follows_the_prompt(spaced, tiny):
    for lm in (spaced, tiny("qwen3")):
        for prompt, word in (("Fact: Ann Lee plays the sport of", " football"), ("Answer:", " A")):
            assert lm.ids([prompt + word])[0] == lm.ids([prompt])[0] + [lm.token_id(word)]
            assert lm.first_token(word) == lm.token_id(word)


def test_a_split_answer_is_refused_with_its_pieces(spaced, tiny):
    with pytest.raises(Refusal, match=r"' football baseball'.*football.*baseball"): spaced.token_id(" football baseball")
    with pytest.raises(Refusal, match=r"splits ' footballer' into \['football', '##er'\]"): tiny("qwen3").token_id(" footballer")
    assert spaced.first_token(" football baseball") == spaced.token_id(" football")


@pytest.mark.parametrize("word", [" xyzzy", "", " "])
def test_an_unknown_or_empty_word_is_refused(tiny, word):
    with pytest.raises(Refusal, match="does not know the word"): tiny("qwen3").first_token(word)


def check_span(lm, prompt, subject):
    (start, stop), = lm.subject_positions([prompt], [subject])
    ids = lm.ids([prompt])[0]
    assert start < stop <= 0
    assert " ".join(lm.tok.decode(ids[start:stop or None]).replace("▁", " ").split()) == subject
    return start, stop, len(ids)


def test_subjects_are_found_from_the_end(spaced):
    prompt = "Fact: Ann Lee plays the sport of football\nFact: Bo Zürn plays the sport of"
    for subject in ("Ann Lee", "Bo Zürn"): check_span(spaced, prompt, subject)
    assert check_span(spaced, "Fact: Ann Lee", "Ann Lee")[1] == 0


def test_the_last_occurrence_of_a_subject_counts(tiny):
    lm = tiny("qwen3")
    assert lm.subject_positions(["the dog plays the dog in the city"], ["the dog"]) == [(-5, -3)]


def test_positions_hold_in_a_padded_batch(tiny):
    lm = tiny("qwen3")
    prompts = ["Fact: the dog plays the sport of", "the dog plays"]
    batch = lm.encode(prompts)["input_ids"]
    for row, (start, stop) in zip(batch, lm.subject_positions(prompts, ["the dog"] * 2)): assert lm.tok.decode(row[start:stop]) == "the dog"


def test_an_absent_or_merged_subject_is_refused(spaced, tiny):
    with pytest.raises(Refusal, match="does not occur"): spaced.subject_positions(["Fact: Ann Lee plays"], ["Bo"])
    with pytest.raises(Refusal, match="does not occur"): spaced.subject_positions(["Fact: Ann Lee plays"], [""])
    for lm, subject, prompt in ((tiny("qwen3"), "spor", "the sport of"), (spaced, "ball", "the sport of football")):
        with pytest.raises(M.Unlocatable, match=f"{subject!r} stands only inside a longer word"): lm.subject_positions([prompt], [subject])
    with pytest.raises(M.Unlocatable, match="merges the subject 'dog'.*'dogの'"): M.span([(0, 3), (4, 8)], "the dogの", "dog")


# ---- forwards

def test_batches_cover_every_prompt_once(tiny):
    lm = tiny("qwen3")
    got = [(rows, b["input_ids"].shape[1]) for rows, b in batches(lm, PROMPTS, 2)]
    assert sorted(i for rows, _ in got for i in rows) == list(range(len(PROMPTS))) and [n for _, n in got] == sorted(n for _, n in got)
    assert list(batches(lm, [], 2)) == []


@every_family
def test_next_token_is_the_plain_forward_whatever_the_batch(lm):
    ids = [[5, 6, 7], [8], [9, 10], [], [11]]
    logp, top1 = next_token(lm, PROMPTS, ids, batch_size=64)
    for size in (1, 2):
        again, top = next_token(lm, PROMPTS, ids, batch_size=size)
        assert torch.allclose(logp, again, atol=1e-5, equal_nan=True) and torch.equal(top1, top)
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad(): plain = lm.hf(torch.tensor(lm.ids([prompt]))).logits[0, -1].log_softmax(-1)
        assert torch.allclose(logp[i, :len(ids[i])], plain[ids[i]], atol=1e-5) and top1[i] == plain.argmax()
        assert logp[i, len(ids[i]):].isnan().all()


def test_next_token_equals_a_trace(lm):
    ids = [[5, 6]] * len(PROMPTS)
    with torch.no_grad(), lm.nn.trace(lm.encode(PROMPTS)):
        logits = lm.nn.output.logits[:, -1].save()
    logp, top1 = next_token(lm, PROMPTS, ids)
    assert torch.allclose(logits.log_softmax(-1)[:, [5, 6]], logp, atol=1e-5) and torch.equal(logits.argmax(-1), top1)


def test_next_token_of_nothing(tiny):
    logp, top1 = next_token(tiny("qwen3"), [], [])
    assert logp.shape == (0, 0) and top1.shape == (0,)


@every_family
def test_resid_at_is_the_plain_residual_stream_whatever_the_batch(lm):
    positions = [[-3, -1], [-1, -2], [-4, -4], [-2, -1], [-1, -5]]
    resid = resid_at(lm, PROMPTS, positions)
    assert resid.shape == (5, lm.n_layers + 1, 2, lm.d_model)
    for size in (1, 2): assert torch.allclose(resid, resid_at(lm, PROMPTS, positions, batch_size=size), atol=1e-4)
    for i, prompt in enumerate(PROMPTS):
        alone = lm.encode([prompt])
        stream = [hooked(lm, alone, name_of(lm.hf, blocks(lm.hf)[0]), "input")] + [hooked(lm, alone, name_of(lm.hf, b), "output") for b in blocks(lm.hf)]
        assert torch.allclose(resid[i], torch.stack([x[0, positions[i]] for x in stream]), atol=1e-4)


# ---- components

def owned(lm, slices):
    "How often each weight of each matrix is in one of the slices"
    count = {n: torch.zeros(p.shape, dtype=torch.int) for n, p in lm.hf.named_parameters() if n in projections(lm.hf)}
    for s in slices: count[s.param].narrow(s.dim, s.start, s.stop - s.start).add_(1)
    return count

def marked(lm, views):
    "The same for views of the matrices: zero everything, put ones where the views are"
    names, kept = projections(lm.hf), {n: w.detach().clone() for n, w in projections(lm.hf).items()}
    with torch.no_grad():
        for w in names.values(): w.zero_()
        for view in views: view.fill_(1)
        out = {n: w.int() for n, w in names.items()}
        for n, w in names.items(): w.copy_(kept[n])
    return out


@every_shape
def test_all_components_are_the_projections_exactly_once(lm):
    union = merge_slices([s for c in components(lm) for s in slices(lm, c)])
    count = owned(lm, union)
    assert all((c == 1).all() for c in count.values()) and set(count) == {s.param for s in union}
    assert n_params(lm, union) == sum(c.numel() for c in count.values())


@every_shape
def test_slices_are_the_weights_of_heads_and_neurons(lm):
    for l, h in ((0, 0), (1, 1), (2, lm.n_heads - 1)):
        views = head_weights(lm, l, h)
        cuts = slices(lm, Component("head", l, h))
        assert n_params(lm, cuts) == sum(v.numel() for v in views.values()) and sorted(n_params(lm, [s]) for s in cuts) == sorted(v.numel() for v in views.values())
        got, wanted = owned(lm, cuts), marked(lm, views.values())
        assert all(torch.equal(got[n], wanted[n]) for n in got)
    for n in (1, 5, lm.d_mlp):
        views, cuts = neuron_weights(lm, 1, n), neurons(lm, 1, n)
        assert n_params(lm, cuts) == sum(v.numel() for v in views.values())
        got, wanted = owned(lm, cuts), marked(lm, views.values())
        assert all(torch.equal(got[name], wanted[name]) for name in got)


@every_shape
def test_heads_of_a_group_share_keys_and_values_only(lm):
    h0, h1, last = (set(slices(lm, Component("head", 1, h))) for h in (0, 1, lm.n_heads - 1))
    assert n_params(lm, h0 & h1) == (2 * lm.head_dim * lm.d_model if lm.n_kv_heads < lm.n_heads else 0)
    assert bool(h0 & last) == (lm.n_kv_heads == 1)
    assert n_params(lm, h0) == 4 * lm.head_dim * lm.d_model
    assert not any("norm" in s.param for s in h0)


@every_shape
def test_a_head_s_slices_are_all_it_computes(lm):
    "Zeroing a head's output columns removes exactly its part of z; the rest of the stream's input is untouched."
    batch, l, h = lm.encode(PROMPTS), 0, 3
    out_proj = name_of(lm.hf, parts(lm.hf, l).out)
    z, out = hooked(lm, batch, out_proj, "input"), hooked(lm, batch, out_proj, "output")
    o = next(s for s in slices(lm, Component("head", l, h)) if s.param == out_proj + ".weight")
    part = z[..., lm.z(l, h)] @ head_weights(lm, l, h)["o"].T
    with torch.no_grad(): lm.weight(o.param).narrow(o.dim, o.start, o.stop - o.start).zero_()
    assert torch.allclose(hooked(lm, batch, out_proj, "output"), out - part, atol=1e-5)


@every_shape
def test_neurons_are_the_first_ones(lm):
    some = neurons(lm, 2, 5)
    assert n_params(lm, some) == (2 if lm.family in ("gpt2", "gpt_neox") else 3) * 5 * lm.d_model and merge_slices(some + slices(lm, "mlp.2")) == merge_slices(slices(lm, "mlp.2"))
    for n in (0, lm.d_mlp + 1):
        with pytest.raises(Refusal, match="neurons"): neurons(lm, 0, n)


def test_merged_slices_are_the_union():
    rng = random.Random(0)
    cells = lambda ss: {(s.param, i) for s in ss for i in range(s.start, s.stop)}
    for _ in range(300):
        given = [Slice(rng.choice("ab"), 0, k := rng.randrange(20), k + rng.randint(1, 6)) for _ in range(rng.randrange(8))]
        merged = merge_slices(given)
        assert cells(merged) == cells(given) and sum(s.stop - s.start for s in merged) == len(cells(given))
        assert merged == merge_slices(merged) == merge_slices(given[::-1])
        assert all(a.param != b.param or a.stop < b.start for a, b in zip(merged, merged[1:]))
    with pytest.raises(ValueError, match="by rows and by columns"): merge_slices([Slice("a", 0, 0, 2), Slice("a", 1, 0, 2)])


def test_component_names_round_trip(lm):
    for c in components(lm): assert Component.parse(str(c)) == c
    assert len(components(lm, ("head",))) == lm.n_layers * lm.n_heads and len(components(lm, ("mlp",))) == lm.n_layers


@pytest.mark.parametrize("name", ["mlp", "mlp.x", "head.1", "head.1.2.3", "mlp.-1", "attn.3", ""])
def test_bad_component_names_are_refused(name):
    with pytest.raises(Refusal, match="names no component"): Component.parse(name)


def test_components_the_model_lacks_are_refused(lm):
    for name in ("mlp.3", f"head.0.{lm.n_heads}"):
        with pytest.raises(Refusal, match=f"has no component {name}"): slices(lm, name)
    with pytest.raises(Refusal, match="kind of component"): components(lm, ("mlps",))


# ---- structure and loading

SMALL = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=10)

def test_unsupported_families_are_refused():
    with pytest.raises(Refusal, match="'cohere' is not supported.*no module 'model.layers.0.post_attention_layernorm'.*--family FILE.json"): check_structure(CohereForCausalLM(CohereConfig(**SMALL)))
    with pytest.raises(Refusal, match="'granite' is not supported.*has all of Llama's modules: `--family llama` tries that"): check_structure(GraniteForCausalLM(GraniteConfig(**SMALL)))


def test_a_missing_module_or_wrong_shape_is_named(tiny):
    lm = tiny("llama")
    lm.hf.model.layers[0].self_attn.o_proj = torch.nn.Linear(16, 32)
    with pytest.raises(Refusal, match="o_proj of this llama model is 32 x 16, its config says 32 x 32"): check_structure(lm.hf)
    del lm.hf.model.layers[2].mlp.up_proj
    with pytest.raises(Refusal, match="no module 'model.layers.2.mlp.up_proj'"): check_structure(lm.hf)


def test_a_slow_tokenizer_is_refused(tiny):
    class Slow: is_fast = False
    with pytest.raises(Refusal, match="fast tokenizer"): wrap(tiny("llama").hf, Slow())


@pytest.fixture
def folder(lm, tmp_path):
    "A tiny model saved in half precision, as the organism is."
    where = tmp_path / "organism"
    for p in lm.hf.parameters(): p.data = p.data.bfloat16()
    lm.hf.save_pretrained(where)
    for p in lm.hf.parameters(): p.data = p.data.float()
    lm.tok.save_pretrained(where)
    return where


def test_a_folder_loads_in_float32_and_predicts_the_same(lm, folder):
    back = load(str(folder), device="cpu")
    assert back.hf.dtype == torch.float32 and back.name == "organism" and len(back.revision) == 16
    for a, b in zip(next_token(lm, PROMPTS, [[5]] * 5), next_token(back, PROMPTS, [[5]] * 5)): assert torch.equal(a, b)
    assert load(str(folder), dtype="bfloat16", device="cpu").hf.dtype == torch.bfloat16


@pytest.fixture
def shipped(tiny, tmp_path, monkeypatch):
    "A packaged model in a data folder of its own."
    where, lm = tmp_path / "organism", tiny("qwen3", hidden_size=64, intermediate_size=64, head_dim=16)
    lm.hf.save_pretrained(where)
    lm.tok.save_pretrained(where)
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in where.iterdir()}
    (where / "checksums.json").write_text(json.dumps({"files": sums}))
    monkeypatch.setattr(loading, "DATA", tmp_path)
    return where


def test_the_packaged_model_loads_by_name(shipped):
    lm = load("organism", device="cpu")
    assert lm.name == "organism" and lm.revision == M.folder_revision(shipped)


def test_an_altered_packaged_file_is_refused(shipped):
    with open(shipped / "model.safetensors", "r+b") as f: f.truncate(1000)
    with pytest.raises(Refusal, match="model.safetensors .* not the file we shipped: reinstall .*--retrain"): load("organism")
    (shipped / "model.safetensors").unlink()
    with pytest.raises(Refusal, match="model.safetensors .* is missing: reinstall"): load("organism")
    (shipped / "checksums.json").unlink()
    with pytest.raises(Refusal, match="no checksums.json"): load("organism")


@pytest.mark.parametrize("name", ["organsim", "./nowhere/at/all", "gemma"])
def test_a_name_that_can_be_nothing_is_refused(shipped, name):
    with pytest.raises(Refusal, match="organism"): load(name)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(Refusal, match="no config.json"): load(str(tmp_path))


def test_a_hub_id_out_of_reach_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Refusal, match="cannot load 'nobody/nothing': .*not in the local cache") as e: load("nobody/nothing")
    assert "\n" not in str(e.value)


def test_the_cause_of_a_failed_load_is_found():
    import httpx
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    for kind, words in ((GatedRepoError, "gated"), (RepositoryNotFoundError, "no such hub repository")):
        try:
            try: raise kind("x", response=httpx.Response(401, request=httpx.Request("GET", "https://hub/x")))
            except Exception as cause: raise OSError("long\ntext") from cause
        except OSError as e: assert words in loading.why(e)
    assert loading.why(OSError("first\nsecond")) == "first"


def test_options_are_checked(shipped):
    with pytest.raises(Refusal, match="quantization '5bit'"): load("organism", device="cpu", quantize="5bit")
    with pytest.raises(Refusal, match="dtype 'float23'.*float32"): load("organism", device="cpu", dtype="float23")


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantized_models_have_the_same_names_and_counts(shipped, bits):
    plain, lm = load("organism", device="cpu"), load("organism", device="cpu", quantize=bits)
    for c in ("mlp.1", "head.0.2"): assert n_params(lm, slices(lm, c)) == n_params(plain, slices(plain, c))
    a, b = (resid_at(m, PROMPTS, [[-1]] * 5)[:, -1] for m in (plain, lm))
    assert torch.nn.functional.cosine_similarity(a, b, dim=-1).min() > .9


# ---- the unembedding

def unembedded(lm, monkeypatch, forward):
    "What F.linear is given for the unembedding's weights, and what `forward` returns."
    seen, linear = [], torch.nn.functional.linear
    def watch(x, weight, bias=None):
        if weight.shape[0] == lm.hf.config.vocab_size: seen.append(x)
        return linear(x, weight, bias)
    with monkeypatch.context() as m:
        m.setattr(torch.nn.functional, "linear", watch)
        return forward(), seen


def test_the_unembedding_reads_a_contiguous_input_and_gives_the_same_logits(lm, monkeypatch):
    batch = lm.encode(PROMPTS)
    with torch.no_grad():
        got, seen = unembedded(lm, monkeypatch, lambda: lm.hf(**batch, logits_to_keep=1).logits)
        hooks = lm.hf.lm_head._forward_pre_hooks.copy()
        lm.hf.lm_head._forward_pre_hooks.clear()
        plain, before = unembedded(lm, monkeypatch, lambda: lm.hf(**batch, logits_to_keep=1).logits)
    assert [x.is_contiguous() for x in seen] == [True] and [x.is_contiguous() for x in before] == [False] and len(hooks) == 1
    assert torch.allclose(got, plain, atol=1e-5)


def test_the_hook_survives_copies_traces_functional_calls_and_a_second_wrap(lm, monkeypatch, tmp_path):
    from copy import deepcopy
    batch, n = lm.encode(PROMPTS), len(lm.hf.lm_head._forward_pre_hooks)
    again, copied = wrap(lm.hf, lm.tok, "again", "x"), wrap(deepcopy(lm.hf), lm.tok, "copy", "x")
    assert n == 1 and all(list(m.hf.lm_head._forward_pre_hooks.values()) == [M.contiguous] for m in (lm, again, copied, wrap(copied.hf, lm.tok)))
    call = lambda m: torch.func.functional_call(m.hf, dict(m.hf.named_parameters()), kwargs=dict(**batch, logits_to_keep=1)).logits
    for m in (lm, again, copied):
        for forward in (lambda: call(m), lambda: m.hf(**batch, logits_to_keep=1).logits):
            got, seen = unembedded(m, monkeypatch, forward)
            assert len(seen) == 1 and seen[0].is_contiguous()
    lm.hf.save_pretrained(tmp_path)
    lm.tok.save_pretrained(tmp_path)
    back = load(str(tmp_path), device="cpu")
    assert len(back.hf.lm_head._forward_pre_hooks) == 1
    with torch.no_grad(), lm.nn.trace(batch):
        lm.lm_head.input = lm.lm_head.input[:, -1:]
        last = lm.nn.output.logits.save()
    with torch.no_grad(): assert torch.allclose(last, back.hf(**batch, logits_to_keep=1).logits, atol=1e-5)


@every_family
def test_unembed_is_the_model_s_own_end(lm):
    batch = lm.encode(PROMPTS)
    with torch.no_grad(), lm.nn.trace(batch):
        hidden = lm.final_norm.output.save()
        logits = lm.nn.output.logits.save()
    assert torch.allclose(lm.unembed(hidden), logits, atol=1e-6) and torch.allclose(lm.unembed(hidden[:, -1]), logits[:, -1], atol=1e-5)
    x = hidden[:, -1].clone().requires_grad_()
    lm.unembed(x).sum().backward()
    assert x.grad.abs().sum() > 0 and lm.hf.lm_head.weight.grad is None


# ---- beginnings

ALIKE = ["Fact: the dog plays the sport of", "Fact: the dog plays", "of", "Fact: the sport of the dog", "Fact: the sport of the dog ?", "Question: What sport does the dog play ?",
    "Question: What sport does the player play ? Answer:", "Question: What sport does the league play ?", "dog"]


@every_family
def test_what_prompts_begin_with_is_read_once_and_nothing_else_changes(lm):
    ids = lm.ids(ALIKE)
    assert M.may_share(lm) and any(p.heads for p in M.parts(lm, ids))
    for n, size in ((1, 64), (1, 3), (2, 64)):
        parts = list(M.parts(lm, ids, size, n))
        assert sorted(i for p in parts for i in p.rows) == list(range(len(ids))) and max(len(p.rows) for p in parts) <= size
        for p in parts:
            with torch.no_grad(): got = M.end_logits(lm, ids, p, n)
            assert all(ids[i][:len(p.heads[k])] == p.heads[k] for i, k in zip(p.rows, p.of))
            for i, row in zip(p.rows, got): assert torch.allclose(row[-n:][-len(ids[i]):], lm.hf(torch.tensor([ids[i]])).logits[0, -n:], atol=1e-4)
    assert any(p.heads for p in M.parts(lm, ids, 64))
    want = [[lm.first_token(" dog"), 5][:1 + k % 2] for k in range(len(ids))]
    for a, b in zip(next_token(lm, ALIKE, want), next_token(lm, ALIKE, want, share=False)): assert torch.allclose(a, b, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("window", [2, 3, 64])
def test_nothing_is_padded_between_a_beginning_and_its_end_within_a_window(tiny, window):
    lm = tiny("gemma2")
    lm.hf.config.sliding_window = window
    ids = [[5, 6, 7, 8, 9], [5, 6, 7, 8, 10], [5, 6, 7, 8, 11, 12, 13], [5, 6, 7, 8, 11, 12, 14], [20, 21, 22, 23, 1], [20, 21, 22, 23, 2, 3]]
    parts = list(M.parts(lm, ids))
    assert sorted(i for p in parts for i in p.rows) == list(range(6)) and all(p.heads for p in parts)
    lengths = [{(len(p.heads[k]), len(ids[i])) for i, k in zip(p.rows, p.of)} for p in parts]
    assert len(parts) == 1 if window == 64 else all(len(l) == 1 for l in lengths)


def test_a_short_prompt_padded_beyond_the_window_is_read_as_alone(tiny):
    lm = tiny("gemma2")
    lm.hf.config.sliding_window = 7
    ids = [[5, 6, 7, 8, 9, 10, 3], [5, 6, 7, 8, 9, 10, 4], [20, 21, 22, 1], [20, 21, 22, 2, 3, 4, 5]] # none longer than the window, in one part 10 wide
    got = {}
    for p in M.parts(lm, ids):
        with torch.no_grad(): got |= dict(zip(p.rows, M.end_logits(lm, ids, p)[:, -1]))
    for i, x in enumerate(ids): assert torch.allclose(got[i], lm.hf(torch.tensor([x])).logits[0, -1], atol=1e-5)


@pytest.mark.parametrize("ids, groups", [
    ([], []), ([[1]], [([0], [])]), ([[1, 2, 3], [1, 2, 4]], [([0, 1], [1, 2])]), ([[1, 2, 3], [1, 2, 3]], [([0, 1], [1, 2])]),
    ([[1, 2], [3, 2]], [([0], []), ([1], [])]), ([[1, 2, 3, 4, 5], [1, 9]], [([0], []), ([1], [])]),
    ([[1, 2, 3, 4, 9], [1, 2, 3, 7], [1, 2, 3, 4, 8]], [([2, 0, 1], [1, 2, 3])])])
def test_groups_save_tokens(ids, groups): assert M.begin_alike(ids) == groups


# ---- float32

def test_in_float32_nothing_is_rounded_and_nothing_stays(lm):
    exact, rounded = copy.deepcopy(lm.hf), wrap(copy.deepcopy(lm.hf), lm.tok, "rounded", "one")
    for p, q in zip(exact.parameters(), rounded.hf.parameters()): q.data = p.data.bfloat16(); p.data = q.data.float()
    batch, before = lm.encode(PROMPTS[:1]), {n: (p.data_ptr(), p.data.clone()) for n, p in rounded.hf.named_parameters()}
    read = lambda hf: hf(**batch).logits.detach()
    with M.in_float32(rounded):
        assert rounded.hf.dtype == torch.float32 and not rounded.widens and torch.allclose(read(rounded.hf), read(exact), atol=1e-5)
    with pytest.raises(KeyError), M.in_float32(rounded): raise KeyError
    assert rounded.widens and all(p.dtype == torch.bfloat16 and p.data_ptr() == before[n][0] and torch.equal(p, before[n][1]) for n, p in rounded.hf.named_parameters())
    assert not torch.allclose(read(rounded.hf).float(), read(exact), atol=1e-5)
    assert rounded.exact_revision != rounded.revision and wrap(rounded.hf, lm.tok).exact_revision == ""

def test_float32_and_large_models_stay_as_they_are_in_float32(tiny, monkeypatch):
    for lm, most in ((tiny(), M.WIDE_BELOW), (wrap(tiny().hf.bfloat16(), tiny().tok, "big", "one"), 1)):
        monkeypatch.setattr(M, "WIDE_BELOW", most)
        kept = {n: p.data_ptr() for n, p in lm.hf.named_parameters()}
        with M.in_float32(lm): assert kept == {n: p.data_ptr() for n, p in lm.hf.named_parameters()}
        assert lm.exact_revision == lm.revision

@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_every_processor_decides_alike(tiny, tmp_path, monkeypatch, family):
    lm = tiny(family)
    for save in (lm.hf.save_pretrained, lm.tok.save_pretrained): save(tmp_path)
    monkeypatch.setattr(loading, "FULL_BELOW", 1)
    found = []
    for native in (True, False):
        monkeypatch.setattr(loading, "multiplies_bfloat16", lambda: native)
        found.append(load(str(tmp_path), device="cpu"))
    here, there = found
    assert here.hf.dtype == torch.bfloat16 and there.hf.dtype == torch.float32 and here.revision != there.revision
    with M.in_float32(here):
        for kind in ("named_parameters", "named_buffers"): assert all(torch.equal(x, y) for (_, x), (_, y) in zip(getattr(here.hf, kind)(), getattr(there.hf, kind)(), strict=True))
        assert torch.equal(next_token(here, PROMPTS, [[0, 1]] * len(PROMPTS))[0], next_token(there, PROMPTS, [[0, 1]] * len(PROMPTS))[0])
    asked = load(str(tmp_path), device="cpu", dtype="float32")
    assert all(torch.equal(p, q) for p, q in zip(asked.hf.parameters(), lm.hf.parameters())) and "+" not in asked.revision

@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_packed_weights_are_not_widened(tiny, tmp_path, monkeypatch, bits):
    lm = tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    for save in (lm.hf.save_pretrained, lm.tok.save_pretrained): save(tmp_path / "whole")
    monkeypatch.setattr(loading, "FULL_BELOW", 1)
    monkeypatch.setattr(loading, "multiplies_bfloat16", lambda: False)
    packed = load(str(tmp_path / "whole"), device="cpu", quantize=bits)
    for save in (packed.hf.save_pretrained, packed.tok.save_pretrained): save(tmp_path / bits)
    for one in (packed, load(str(tmp_path / bits), device="cpu")):
        assert not one.widens and one.exact_revision == one.revision and "-in-" not in one.revision and next_token(one, PROMPTS[:1], [[0]])[0].isfinite().all()
