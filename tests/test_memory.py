"What an edit costs in memory: 8-bit optimizers, blocks computed twice, a quantized rest, several devices; with and without, the result is the same."
import copy, json
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from conftest import BUILD, SIZES
from plain import blocks
from test_finetuning import SMALL, mixed, task_for
from test_quantized_maps import written_out as dequantize
from mechunlearn import checkpoints, costs, finetuning as F, memory as M, models, steps
from mechunlearn.finetuning import UPDATES, can_train, draws, finetune, fingerprint, masters, step_losses, training_rows
from mechunlearn.grids import Settings, estimate, make_job, parse
from mechunlearn.jobs import Job, run_finetuning
from mechunlearn.localization import build
from mechunlearn.memory import Live, checkpointed, optimizer_class, quantized, rest_quantized, step_memory, weight_bytes, written_out
from mechunlearn.models import Component, load, skeleton, wrap
from mechunlearn.store import Refusal, Run
from mechunlearn.tasks import make_task

bitsandbytes = pytest.mark.skipif(M.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
WIDE = dict(hidden_size=64, intermediate_size=128, head_dim=16) # matrices of 8,192 weights: bitsandbytes keeps states of fewer than 4,096 in float32


TELLING = ["gpt2", "neox", "phi3", "gemma3"] # transposed matrices, both parts at once, fused matrices, norms behind and sliding windows
few_families = pytest.mark.parametrize("lm", [pytest.param(f, marks=() if f in TELLING else pytest.mark.slow) for f in BUILD], indirect=True)

def batch_of(lm, n=4): return next(draws(training_rows(lm, task_for(lm)), dict(forget=n, retain=n, text=n), 1, 0))

def gradients(lm, slices, on=False, **how):
    values = masters(lm, slices)
    with checkpointed(lm, on): step_losses(lm, values, batch_of(lm), UPDATES["edit"], **how)
    return values

def moved(edit, lm): return torch.cat([(edit.values[F.slice_key(s)] - F.place(lm, s).float()).flatten() for s in edit.localization.slices])

def same_edit(a, b): return all(torch.equal(a.values[k], b.values[k]) for k in a.values) and a.curve.equals(b.curve)


# ---- optimizers

def test_what_is_not_named_is_no_cause(tiny):
    lm = tiny()
    where, task = mixed(lm), task_for(lm)
    bare, named = (finetune(lm, task, where, **SMALL, **more) for more in ({}, dict(optimizer="adamw", checkpoint=False)))
    assert same_edit(bare, named) and "optimizer" not in bare.config and named.config["optimizer"] == "adamw"
    causes = lambda **more: Job(lm, task, where, None, dict(lr=1e-2, **more)).causes()
    assert causes() == causes(checkpoint=True) and "optimizer" not in causes()["training"] and causes(optimizer="adamw-8bit") != causes()


@bitsandbytes
def test_eight_bits_make_nearly_the_same_edit(tiny):
    lm = tiny("llama", **WIDE)
    where, task = build(lm, "mlps", [Component("mlp", 0), Component("mlp", 1)]), task_for(lm)
    how = SMALL | dict(steps=10, lr=1e-3)
    a, b = (moved(finetune(lm, task, where, optimizer=o, **how), lm) for o in (None, "adamw-8bit"))
    assert 0 < float((a - b).norm() / a.norm()) < .1 and torch.cosine_similarity(a, b, dim=0) > .99


@bitsandbytes
def test_small_matrices_keep_their_states_in_float32(tiny):
    lm = tiny("llama")
    where, task = build(lm, "mlp", [Component("mlp", 1)]), task_for(lm)
    a, b = (moved(finetune(lm, task, where, optimizer=o, **SMALL), lm) for o in (None, "adamw-8bit"))
    assert torch.allclose(a, b, atol=1e-3 * float(a.abs().max()))


@bitsandbytes
def test_states_lie_in_bytes_and_only_for_what_is_trained(tiny, monkeypatch):
    lm, made = tiny("llama", **WIDE), []
    kind = optimizer_class("adamw-8bit", "cpu")
    class Spied(kind):
        def __init__(self, *args, **kw): super().__init__(*args, **kw); made.append(self)
    monkeypatch.setattr(F, "optimizer_class", lambda *_: Spied)
    where = build(lm, "mlp", [Component("mlp", 1)])
    finetune(lm, task_for(lm), where, optimizer="adamw-8bit", **SMALL)
    (opt,) = made
    assert sum(p.numel() for g in opt.param_groups for p in g["params"]) == where.n_params and {g["weight_decay"] for g in opt.param_groups} == {0.}
    n = sum(x.numel() * x.element_size() for s in opt.state.values() for k, x in s.items() if torch.is_tensor(x) and not k.startswith("qmap"))
    assert n == pytest.approx(where.n_params * M.OPTIMIZERS["adamw-8bit"], rel=.01)


def test_an_optimizer_that_is_not_here_is_one_line(tiny, monkeypatch):
    lm = tiny()
    go = lambda name: finetune(lm, task_for(lm), mixed(lm), **SMALL, optimizer=name)
    with pytest.raises(Refusal, match="optimizer 'sgd'"): go("sgd")
    if M.find_spec("bitsandbytes"):
        with pytest.raises(Refusal, match="only a CPU: adamw-8bit makes the same steps"): go("paged-adamw-8bit")
        assert "only a CPU" in can_train(dict(optimizer="paged-adamw-8bit", device="cpu")) and can_train(dict(optimizer="paged-adamw-8bit", device="cuda")) is None
        assert "mps" in can_train(dict(optimizer="adamw-8bit", device="mps"))
    monkeypatch.setattr(M, "find_spec", lambda name: None)
    with pytest.raises(Refusal, match="needs the package bitsandbytes"): go("adamw-8bit")
    assert "needs the package" in can_train(dict(optimizer="adamw-8bit")) and can_train({}) is None and can_train(dict(optimizer="adamw")) is None
    with pytest.raises(Refusal, match="optimizer"): parse(Settings, dict(optimizer="adam"), "settings")


@pytest.mark.parametrize("lacking, settings, helps", [
    ("", {}, r"lower micro_batch (now 128), or set checkpoint and optimizer adamw-8bit; what then still takes most are the weights: load the model with quantize 4bit"),
    ("", dict(checkpoint=True), r"lower micro_batch (now 128), or set optimizer adamw-8bit; what then still takes most are the weights: load the model with quantize 4bit"),
    ("bitsandbytes", {}, r"lower micro_batch (now 128), or set checkpoint; what then still takes most are the weights: load the model with dtype bfloat16"),
    ("bitsandbytes", dict(checkpoint=True, micro_batch=1), r"what takes most are the weights: load the model with dtype bfloat16")])
def test_out_of_memory_names_what_helps_here(tiny, monkeypatch, lacking, settings, helps):
    lm, find = tiny(), M.find_spec
    def full(*a, **k): raise torch.OutOfMemoryError("full")
    monkeypatch.setattr(F, "step_losses", full)
    monkeypatch.setattr(M, "find_spec", lambda name: None if name == lacking else find(name) or object())
    with pytest.raises(Refusal) as e: finetune(lm, task_for(lm), mixed(lm), **SMALL | settings)
    assert str(e.value) == f"out of memory on cpu while training mixed: {helps}"


def test_a_sequence_has_no_rest_to_quantize(tiny):
    lm = tiny()
    lm.hf.to("meta") # of a CPU a quantized rest takes more, see `rest_packed`
    for update, also in (("edit", "set rest 4bit, or "), ("sequential", "")):
        assert F._smaller(lm, task_for(lm).model_copy(update=dict(update=update)), True, None, None)[1] == also + "load the model with quantize 4bit"


@bitsandbytes
def test_out_of_memory_with_all_of_it_in_use(tiny, monkeypatch):
    lm = tiny(**WIDE)
    def full(*a, **k): raise torch.OutOfMemoryError("full")
    monkeypatch.setattr(F, "step_losses", full)
    with pytest.raises(Refusal, match="while training x: a smaller localization, or a device with more memory$"):
        finetune(lm, task_for(lm), build(lm, "x", [Component("mlp", 1)]), **SMALL, checkpoint=True, optimizer="adamw-8bit", rest="4bit", micro_batch=1)


# ---- blocks computed twice

@few_families
@pytest.mark.parametrize("part", [None, (2, 5)], ids=["whole", "part"])
def test_computed_twice_the_gradients_are_the_same(lm, part, monkeypatch):
    where = build(lm, "x", [Component("mlp", 1), Component("head", 0, 1)], part=part and part)
    before = [b.__dict__.get("forward") for b in blocks(lm.hf)]
    def same():
        plain, twice = gradients(lm, where.slices), gradients(lm, where.slices, True)
        for s in plain: assert torch.equal(plain[s].grad, twice[s].grad), s
        return plain
    with_beginnings = same() # which a block that is computed again finds as they were
    monkeypatch.setattr(models, "may_share", lambda lm: False)
    for s, v in same().items(): assert torch.allclose(v.grad, with_beginnings[s].grad, rtol=1e-4, atol=1e-5 * float(v.grad.abs().max())), s
    assert [b.__dict__.get("forward") for b in blocks(lm.hf)] == before and not lm.hf.training and not any(m.training for m in lm.hf.modules())


def test_dropout_stays_off_and_blocks_are_called_twice(tiny):
    lm = tiny("gpt2")
    for m in lm.hf.modules():
        if isinstance(m, torch.nn.Dropout): m.p = .5
    calls, where = [], build(lm, "x", [Component("mlp", 1)])
    handles = [b.mlp.register_forward_pre_hook(lambda m, a, l=l: calls.append(l)) for l, b in enumerate(blocks(lm.hf))]
    plain = gradients(lm, where.slices, micro_batch=256)
    twice = gradients(lm, where.slices, True, micro_batch=256)
    for h in handles: h.remove()
    for s in plain: assert torch.allclose(plain[s].grad, twice[s].grad, rtol=1e-4, atol=1e-6)
    assert calls.count(0) < calls.count(2) # nothing is trained below block 1: it is not computed again


def test_a_fact_with_weights_of_its_own_is_heard_by_them_only(lm_with_parts):
    lm, slices, own = lm_with_parts
    plain, twice = (gradients(lm, slices, on, own=own) for on in (False, True))
    assert any((v.grad != 0).any() for v in plain.values())
    for s in slices: assert torch.equal(plain[s].grad, twice[s].grad), s

@pytest.fixture
def lm_with_parts(tiny):
    lm = tiny()
    slices = build(lm, "x", [Component("mlp", 1), Component("mlp", 2)]).slices
    return lm, slices, lambda row: slices[:2] if row.term == "forget" else slices[2:]


def test_less_is_remembered_and_the_edit_is_the_same(tiny):
    lm = tiny("llama", num_hidden_layers=6)
    where, rows = build(lm, "x", [Component("mlp", 1)]), batch_of(lm, 8)
    plain, twice = (step_memory(lm, where.slices, rows, checkpoint=on)["activations"] for on in (False, True))
    assert twice < .8 * plain
    a, b = (finetune(lm, task_for(lm), where, **SMALL, checkpoint=on) for on in (None, True))
    assert torch.allclose(moved(a, lm), moved(b, lm), atol=2e-2 * SMALL["lr"]) and a.config == b.config


def test_what_blocks_add_to_a_beginning_is_not_remembered(monkeypatch):
    organism = load("organism", device="cpu")
    task, where = make_task("sports-athlete-editing", organism, forget_size=16, seed=0), build(organism, "x", [Component("mlp", 1)])
    rows = next(draws(training_rows(organism, task), dict(forget=16, retain=16), 1, 0))
    twice = lambda: step_memory(organism, where.slices, rows, checkpoint=True)["activations"]
    sharing = twice()
    monkeypatch.setattr(models, "may_share", lambda lm: False)
    assert sharing <= twice()


# ---- nothing outside the localization

@few_families
def test_the_way_back_ends_at_the_lowest_trained_layer(lm):
    seen, values = {}, masters(lm, build(lm, "x", [Component("mlp", 1)]).slices)
    handles = [b.register_forward_hook(lambda m, a, o, l=l: seen.setdefault(l, []).append((o[0] if isinstance(o, tuple) else o).requires_grad)) for l, b in enumerate(blocks(lm.hf))]
    back = [b.register_full_backward_hook(lambda m, i, o, l=l: seen.update({("back", l): True})) for l, b in enumerate(blocks(lm.hf))]
    with Live() as live: step_losses(lm, values, batch_of(lm), UPDATES["edit"])
    for h in handles + back: h.remove()
    assert not any(seen[0]) and all(seen[1]) and all(seen[2]) and ("back", 0) not in seen and ("back", 2) in seen
    assert all(p.grad is None and not p.requires_grad for p in lm.hf.parameters()) and all(v.grad.shape == v.shape for v in values.values())
    assert live.now <= 4 * sum(v.numel() for v in values.values()) + 4096 # what is left are the masters' gradients


# ---- a quantized rest

@pytest.fixture(scope="module", params=["8bit", "4bit"])
def both(request, make_tokenizer, tmp_path_factory):
    "A tiny Llama quantized, and the numbers that its bits stand for"
    folder, tok = tmp_path_factory.mktemp(request.param), make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = BUILD["llama"](vocab_size=len(tok), **SIZES | WIDE)
        for p in hf.parameters(): p.data += .1 * torch.randn_like(p)
    hf.save_pretrained(folder); tok.save_pretrained(folder)
    whole = copy.deepcopy(hf)
    try: lm = load(str(folder), device="cpu", quantize=request.param)
    except Exception as e: pytest.skip(f"bitsandbytes cannot quantize here: {e}")
    return lm, wrap(dequantize(hf, request.param), tok, lm.name, lm.revision), wrap(whole, tok, "whole", "r"), request.param


def test_a_quantized_model_is_edited_like_its_numbers(both):
    lm, ref, _, bits = both
    task, where = task_for(ref), build(ref, "mlps", [Component("mlp", 0), Component("mlp", 2)])
    assert build(lm, "mlps", [Component("mlp", 0), Component("mlp", 2)]).slices == where.slices
    prompts = lm.encode([f.prompt for f in task.forget])
    with torch.no_grad(): said = lm.hf(**prompts).logits # some CPUs pack 4-bit matrices anew here
    before, held = fingerprint(lm), {m: m.__dict__.get("forward") for m in lm.hf.modules()}
    with written_out(lm, [s.param for s in where.slices]):
        for s in where.slices: assert torch.allclose(F.place(lm, s), F.place(ref, s), rtol=5e-3), s # scales are bfloat16 there
        assert sum(map(quantized, lm.hf.modules())) == 7 * 3 - 6
    how = SMALL | dict(lr=1e-3, steps=5)
    a, b = finetune(lm, task, where, **how), finetune(ref, task, where, **how)
    assert a.curve.forget.values == pytest.approx(b.curve.forget.values, rel=.05) and torch.cosine_similarity(moved(a, ref), moved(b, ref), dim=0) > (.8 if bits == "8bit" else .99)
    with torch.no_grad():
        with a.applied(lm): edited = lm.hf(**prompts).logits
        with a.applied(ref): assert torch.allclose(edited, ref.hf(**prompts).logits, atol=.1 * float(edited.abs().max()))
        assert torch.equal(lm.hf(**prompts).logits, said) and not torch.equal(edited, said)
        with a.applied(lm):
            with lm.nn.trace(prompts):
                read = lm.nn.get(where.slices[0].param.removesuffix(".weight")).output.save()
    assert fingerprint(lm) == before and torch.isfinite(read).all() and {m: m.__dict__.get("forward") for m in lm.hf.modules()} == held
    with torch.no_grad():
        with lm.nn.trace(prompts):
            same = lm.nn.output.logits.save()
    assert torch.equal(same, said)


def test_computed_twice_on_quantized_blocks(both):
    lm, _, _, _ = both
    where, task = build(lm, "mlp", [Component("mlp", 1)]), task_for(lm)
    a, b = (finetune(lm, task, where, **SMALL | dict(lr=1e-3), checkpoint=on) for on in (None, True))
    assert np.allclose(a.curve.forget, b.curve.forget, rtol=1e-2)


def test_a_rest_is_quantized_around_a_localization(both):
    _, _, whole, bits = both
    where = build(whole, "mlp", [Component("mlp", 1)])
    old = {s: F.place(whole, s).clone() for s in where.slices}
    lm = rest_quantized(wrap(copy.deepcopy(whole.hf), whole.tok, "whole", "r"), where.slices, bits)
    for s in where.slices: assert torch.equal(F.place(lm, s), old[s])
    assert sum(map(quantized, lm.hf.modules())) == 7 * 3 - 3 and lm.revision.startswith(f"r+{bits}-but-")
    batch = whole.encode(["Fact: the sport", "Fact: golf"])
    with torch.no_grad(): assert torch.cosine_similarity(lm.hf(**batch).logits.flatten(), whole.hf(**batch).logits.flatten(), dim=0) > .97
    values, ref = masters(lm, where.slices), masters(whole, where.slices)
    with written_out(lm, []): step_losses(lm, values, batch_of(lm), UPDATES["edit"])
    step_losses(whole, ref, batch_of(whole), UPDATES["edit"])
    for s in values: assert torch.cosine_similarity(values[s].grad.flatten(), ref[s].grad.flatten(), dim=0) > .9, s # a gradient that flows through the quantized blocks above


def test_an_edit_around_a_quantized_rest_leaves_the_model_whole(both, monkeypatch):
    _, _, whole, bits = both
    where, task = build(whole, "mlp", [Component("mlp", 1)]), task_for(whole)
    how, before = SMALL | dict(lr=1e-3), F.fingerprint(whole)
    modules, hooks = dict(whole.hf.named_modules()), {n: len(m._forward_hooks) for n, m in whole.hf.named_modules()}
    edit, plain = finetune(whole, task, where, rest=bits, **how), finetune(whole, task, where, **how)
    assert dict(whole.hf.named_modules()) == modules and F.fingerprint(whole) == before and {n: len(m._forward_hooks) for n, m in modules.items()} == hooks
    around = rest_quantized(wrap(copy.deepcopy(whole.hf), whole.tok, "whole", "r"), where.slices, bits)
    other = finetune(around, task, where, **how)
    assert edit.config["rest"] == bits and "rest" not in plain.config and all(torch.equal(v, other.values[k]) for k, v in edit.values.items())
    moved = lambda e: torch.cat([(v - plain_of(whole, k)).flatten() for k, v in e.values.items()])
    assert torch.cosine_similarity(moved(edit), moved(plain), dim=0) > .5 and not torch.equal(moved(edit), moved(plain))
    with monkeypatch.context() as m, pytest.raises(RuntimeError, match="no more"): # whatever happens on the way, the model is whole
        def fails(*a, **k):
            assert any(map(quantized, whole.hf.modules()))
            raise RuntimeError("no more")
        m.setattr(F, "step_losses", fails)
        finetune(whole, task, where, rest=bits, **how)
    assert dict(whole.hf.named_modules()) == modules and F.fingerprint(whole) == before
    with pytest.raises(Refusal, match="quantized already"): finetune(around, task, where, rest=bits, **how)


def plain_of(lm, key): return F.place(lm, F.parse_slice(key)).float()


def test_a_quantized_rest_is_a_setting(tmp_path):
    from mechunlearn.grids import check_job, estimate, make_job
    from mechunlearn.jobs import TRAINING
    job = lambda **s: make_job("organism", "sports-athlete-editing", {"forget_size": 16}, ["hand@mlp.1"], [0], s, str(tmp_path))
    assert job(rest="4bit").settings["rest"] == "4bit" and "rest" in TRAINING
    for device, less in (("cuda", True), ("cpu", False)): # where the whole model waits in the same memory
        whole, small = (estimate(job(dtype="float32", device=device, **s)).memory_gb[0] for s in ({}, {"rest": "4bit"}))
        assert (small < whole) == less
    for wrong, why in (({"rest": "2bit"}, "rest"), ({"rest": "4bit", "quantize": "8bit"}, "rest"), ({"rest": "4bit", "device_map": "auto"}, "rest")):
        with pytest.raises(Refusal, match=why): check_job(job(**wrong))
    with pytest.raises(Refusal, match="rest=4bit is for fine-tuning"): check_job(make_job("organism", "sports-athlete-editing", {"forget_size": 16}, ["memit@flu"], [0], {"rest": "4bit"}, str(tmp_path)))


@bitsandbytes
@pytest.mark.parametrize("family", ["gpt2", "neox", "phi3", "gemma3"])
def test_a_rest_of_other_families(tiny, family):
    size = WIDE | dict(head_dim=32) # bitsandbytes has no product for fewer than 32 outputs on some CPUs
    plain, lm = tiny(family, **size), tiny(family, **size)
    where = build(lm, "mlp", [Component("mlp", 1)])
    lm = rest_quantized(lm, where.slices)
    batch = plain.encode(["Fact: the sport", "Fact: golf"])
    with torch.no_grad(): assert torch.cosine_similarity(lm.hf(**batch).logits.flatten(), plain.hf(**batch).logits.flatten(), dim=0) > .9
    a, b = (finetune(m, task_for(plain), where, **SMALL | dict(lr=1e-3)) for m in (lm, plain))
    assert a.curve.forget.iloc[-1] < a.curve.forget.iloc[0] and all(torch.equal(F.place(lm, s), F.place(plain, s)) for s in where.slices)


def test_differences_of_a_quantized_model_are_written(both, tmp_path):
    lm, _, _, _ = both
    edit = finetune(lm, task_for(lm), build(lm, "mlp", [Component("mlp", 1)]), **SMALL)
    checkpoints.export(lm, edit, tmp_path / "delta", delta=True)
    with pytest.raises(Refusal, match="is quantized.*delta"): checkpoints.export(lm, edit, tmp_path / "whole")
    with pytest.raises(Refusal, match="is quantized"): masters(lm, edit.localization.slices)


@bitsandbytes
@pytest.mark.parametrize("family, bits", [pytest.param(f, b, marks=() if (f, b) in [("gpt2", "8bit"), ("neox", "4bit"), ("phi3", "4bit"), ("gemma2", "8bit")] else pytest.mark.slow)
    for f in ("gpt2", "neox", "phi3", "gemma2", "mistral") for b in ("8bit", "4bit")])
def test_quantized_models_of_other_families(tiny, family, bits, tmp_path):
    plain = tiny(family, **WIDE | dict(head_dim=32))
    plain.hf.save_pretrained(tmp_path); plain.tok.save_pretrained(tmp_path)
    lm, comps = load(str(tmp_path), device="cpu", quantize=bits), [Component("mlp", 1), Component("head", 2, 1)]
    batch = lm.encode(["Fact: the sport", "Fact: golf"])
    with torch.no_grad(): said = lm.hf(**batch).logits
    where = build(lm, "x", comps)
    with written_out(lm, [s.param for s in where.slices]), torch.no_grad():
        assert torch.allclose(lm.hf(**batch).logits, said, atol=.1 * float(said.abs().max()))
    for checkpoint in (None, True):
        edit = finetune(lm, task_for(lm), where, **SMALL | dict(lr=1e-3, steps=6), checkpoint=checkpoint)
        assert edit.curve.forget.iloc[-1] < edit.curve.forget.iloc[0]
    with torch.no_grad(): assert torch.equal(lm.hf(**batch).logits, said)


@bitsandbytes
def test_a_run_hands_the_options_on(tiny, tmp_path):
    lm, folder = tiny("llama", **WIDE), Run(tmp_path, "tiny", "r", "sports-athlete-editing", {})
    curves = run_finetuning(lm, lambda seed: task_for(lm, seed), folder, ["late"], lr=1e-3, steps=2, optimizer="adamw-8bit", checkpoint=True, batch=4, retain_batch=4, text_batch=2, progress=False)
    assert len(curves) == 2 and json.loads((tmp_path / "late/seed0/edit.json").read_text())["config"]["optimizer"] == "adamw-8bit"


def test_bfloat16_computed_twice(tiny):
    lm = tiny("gemma2")
    lm.hf.bfloat16()
    slices = build(lm, "x", [Component("mlp", 0), Component("head", 1, 1)]).slices
    plain, twice = (gradients(lm, slices, on) for on in (False, True))
    for s in slices: assert torch.cosine_similarity(plain[s].grad.flatten(), twice[s].grad.flatten(), dim=0) > .99


def test_sizes_of_quantized_weights(both):
    lm, _, whole, bits = both
    held = sum(p.numel() * p.element_size() for p in lm.hf.parameters())
    assert weight_bytes(whole, quantize=bits) == pytest.approx(held, rel=.12) and weight_bytes(whole) == 4 * whole.hf.num_parameters()


# ---- several devices

def spread(lm, places, folder):
    "The model in the hands of accelerate"
    from accelerate import dispatch_model
    body = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatch_model(lm.hf, body | {f"model.layers.{l}": p for l, p in enumerate(places)}, main_device="cpu", offload_dir=folder, force_hooks=True)
    assert all(hasattr(b, "_hf_hook") for b in lm.hf.model.layers)
    return lm


@pytest.mark.parametrize("checkpoint", [None, True])
@pytest.mark.parametrize("places", [("cpu", "cpu", "cpu"), ("disk", "cpu", "disk")], ids=["several", "offloaded"])
def test_a_spread_model_is_edited_the_same(tiny, tmp_path, places, checkpoint):
    lm, plain = spread(tiny("llama"), places, tmp_path), tiny("llama")
    where, task = build(plain, "mlp", [Component("mlp", 1)]), task_for(plain)
    a, b = (finetune(m, task, where, **SMALL, checkpoint=checkpoint) for m in (lm, plain))
    assert same_edit(a, b)
    batch = plain.encode(["Fact: the sport"])
    with torch.no_grad(), a.applied(lm), b.applied(plain): assert torch.equal(lm.hf(**batch).logits, plain.hf(**batch).logits)


def test_what_is_offloaded_cannot_be_trained(tiny, tmp_path):
    lm = spread(tiny("llama"), ("cpu", "disk", "cpu"), tmp_path)
    with pytest.raises(Refusal, match="offloaded to CPU or disk"): finetune(lm, task_for(tiny("llama")), build(tiny("llama"), "mlp", [Component("mlp", 1)]), **SMALL)


# ---- bytes of a step

def test_a_dry_run_knows_the_options():
    def asked(**settings): return estimate(make_job("organism", "sports-athlete-editing", {}, ["late"], [0], dict(device="cpu", **settings))).iloc[0]
    plain, eight, four, twice, small = asked(), asked(optimizer="adamw-8bit"), asked(quantize="4bit", optimizer="adamw-8bit"), asked(checkpoint=True), asked(micro_batch=16)
    total = load("organism", device="cpu").hf.num_parameters()
    remembered = plain.memory_gb - (4 * total + 16 * plain.trained) / 1e9
    assert remembered > 0 and plain.memory_gb - eight.memory_gb == pytest.approx((8 - M.OPTIMIZERS["adamw-8bit"]) * plain.trained / 1e9)
    assert four.memory_gb < eight.memory_gb and max(twice.memory_gb, small.memory_gb) < plain.memory_gb
    assert asked(batch=8, retain_batch=8, text_batch=1).memory_gb < plain.memory_gb


MEASURED = {"step/adamw": {}, "step/adamw-8bit": dict(optimizer="adamw-8bit"), "step/adamw-8bit/checkpoint": dict(optimizer="adamw-8bit", checkpoint=True),
            "step/adamw-8bit/packed+remembered": dict(optimizer="adamw-8bit", packed=True, remember=True),
            "step/adamw-8bit/nf4 rest": dict(optimizer="adamw-8bit", quantize="4bit"), "step/adamw-8bit/nf4 rest/checkpoint": dict(optimizer="adamw-8bit", checkpoint=True, quantize="4bit")}


def test_a_dry_run_says_what_was_measured(monkeypatch):
    "Gemma-2-9B's shape on an H100 (benchmarks/large_model.py), within 15 %; its texts were the organism's, shorter than real ones"
    measured = pd.read_json(Path(__file__).parents[1] / "benchmarks/results/large_model-h100.jsonl", lines=True).set_index("name")
    taken = measured[measured.index.str.startswith("step/")]
    assert set(MEASURED) == set(taken.index)
    monkeypatch.setattr(costs, "LONG", float("inf"))
    for name, settings in MEASURED.items():
        said = estimate(make_job("google/gemma-2-9b", "sports-athlete-editing", {}, ["hand@mlp.2-6"], [0], dict(dtype="bfloat16", **settings))).iloc[0]
        assert said.trained == taken.trained[name] and said.memory_gb == pytest.approx(taken.peak_gb[name], rel=.15), name


@pytest.mark.parametrize("family, held", [pytest.param(f, h, id=f"{name}-{f}", marks=() if f in kept else pytest.mark.slow)
    for name, h, kept in (("whole", 2**24, ("llama", "gemma2", "gpt2")), ("chunked", 100, ("gpt2",))) for f in ("llama", "gemma2", "gpt2", "qwen3")])
def test_a_step_on_the_meta_device_takes_what_a_real_one_takes(tiny, family, held, monkeypatch):
    monkeypatch.setattr(steps, "HELD", held)
    lm = tiny(family)
    lm.hf.set_attn_implementation("eager") # a CPU's own attention keeps no scores, that of a skeleton does
    where, rows, hf = build(lm, "x", [Component("mlp", 1)]), batch_of(lm), skeleton(lm.hf.config)
    hf.hf_device_map = {"": "meta"}
    empty = wrap(hf, lm.tok)
    for how in ({}, dict(checkpoint=True), dict(packed=True, remember=True, micro_batch=8)):
        real, dry = (step_memory(m, where.slices, rows, **how) for m in (lm, empty))
        assert dry["activations"] == pytest.approx(real["activations"], rel=.1) and {k: v for k, v in dry.items() if k != "activations"} == {k: v for k, v in real.items() if k != "activations"}


@pytest.mark.parametrize("how", [dict(packed=True), dict(remember=True), dict(packed=True, remember=True)], ids="+".join)
def test_options_of_a_step_are_counted_as_it_takes_them(tiny, how):
    lm = tiny("llama", num_hidden_layers=6)
    where, rows = build(lm, "x", [Component("mlp", 4)]), batch_of(lm, 8)
    values = masters(lm, where.slices)
    frozen = steps.Frozen(lm, where.slices, [i for r in rows for i in F.reads(r)]) if how.get("remember") else None
    with Live() as live: step_losses(lm, values, rows, UPDATES["edit"], micro_batch=64, packed=how.get("packed", False), frozen=frozen)
    counted = step_memory(lm, where.slices, rows, micro_batch=64, **how)
    assert counted["activations"] + counted["gradients"] == pytest.approx(live.most + (frozen.mb * 2**20 if frozen else 0), rel=.02)


@pytest.mark.slow
@pytest.mark.parametrize("column, on", [("default_peak_mb", False), ("peak_mb", True)], ids=["default", "packed+remembered"])
def test_a_step_takes_what_was_measured_of_a_real_model(column, on):
    "Gemma 3 270M on a CPU (benchmarks/finetuning.py), within 15 %: what came on top of its weights, and of the gradients that are returned there"
    try: lm = load("gemma-3-270m", device="cpu", dtype="float32")
    except Refusal as e: pytest.skip(str(e))
    task = F.training_rows(lm, make_task("sports-athlete-editing", lm, forget_size=64, facts="athletes"))
    rows, where = next(draws(task, dict(forget=64, retain=48, text=8), 1, 0)), build(lm, "early", [Component("mlp", l) for l in range(1, 5)])
    empty = skeleton(lm.hf.config)
    empty.hf_device_map = {"": "meta"}
    said = step_memory(wrap(empty, lm.tok), where.slices, rows, packed=on, remember=on)
    measured = pd.read_json(Path(__file__).parents[1] / "benchmarks/results/finetuning-cpu.jsonl", lines=True)[["name", "against", column]].dropna()
    taken = measured.set_index(["name", "against"])[column]["localized-step/gemma-3-270m", "plain loop"]
    assert (sum(said.values()) - said["weights"] + said["gradients"]) / 2**20 == pytest.approx(taken, rel=.15)
