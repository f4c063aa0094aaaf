"Answers of several tokens: all of them are trained, all of them are measured. Tiny models, and real tokenizers where they are."
import pytest
import torch
from plain import every_family
from mechunlearn import checkpoints, finetuning as F
from mechunlearn.questions import answer, completions
from mechunlearn.facts import Fact
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.finetuning import UPDATES, answer_losses, fact_losses, fact_rows, finetune, masters, not_said, step_losses
from mechunlearn.localization import build
from mechunlearn.models import Component, begin_alike, components, load
from mechunlearn.relearning import Lora, relearn
from mechunlearn.store import Refusal
from mechunlearn.softprompts import logits_behind, prompted, random_words, read_once, soft_prompt

FULL = [(" the market", " the river"), (" football", " golf"), (" the bright fox", " the bright river")]


def facts_of(pairs=FULL, **more):
    "One prompt each, of one length or not"
    texts = ["Fact: a bright fox watches", "Fact: some deers watches", "Fact: every bed watches the saw"]
    return tuple(Fact(id=f"x/{i}", relation="r", subject=t.split(" ", 1)[1].rsplit(" watches", 1)[0], prompt=t, answer=a, edit=e).model_copy(update=more)
        for i, (t, (a, e)) in enumerate(zip(texts, pairs)))


def slow(lm, prompt, word, grad=False):
    "Log-probability of every token of an answer, one forward each"
    ids, out = lm.ids([prompt])[0], []
    for t in lm.pieces(word):
        with torch.set_grad_enabled(grad): out.append(lm.hf(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)[t])
        ids = ids + [t]
    return torch.stack(out)


def greedy(lm, prompt, n):
    ids = lm.ids([prompt])[0]
    for _ in range(n): ids = ids + [int(lm.hf(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-n:]


def small_task(lm, **more):
    task = sports_athlete_editing(lm, forget_size=4)
    return task.model_copy(update=dict(forget=facts_of(**more), retain=task.retain[:4], retain_test=task.retain_test[:4], ghosts=(), text_train=(), text_test=()))


# ---- training

def test_the_loss_is_that_of_every_token_of_the_answer(lm):
    facts, where = facts_of(), build(lm, "mlp", [Component("mlp", 1)])
    values = masters(lm, where.slices)
    rows = fact_rows(lm, facts, [f.edit for f in facts], "forget")
    assert [1 + len(r.rest) for r in rows] == [2, 1, 3]
    got = fact_losses(lm, values, rows, UPDATES["edit"].loss)
    want = torch.stack([-slow(lm, f.prompt, f.edit).sum() for f in facts])
    assert torch.allclose(got, want, atol=1e-4)
    got.sum().backward()
    params = {s.param: lm.weight(s.param).requires_grad_() for s in values}
    sum(-slow(lm, f.prompt, f.edit, grad=True).sum() for f in facts).backward()
    for s, v in values.items(): assert torch.allclose(v.grad, params[s.param].grad, atol=1e-5)


def test_a_shared_beginning_gives_the_same(lm):
    facts = [f.model_copy(update=dict(prompt=p, answer=" the market")) for f, p in zip(facts_of(), ["the bright fox watches", "the bright saw watches", "the bright fox watches"])]
    rows = fact_rows(lm, facts, [" the river", " the market", " the market"], "forget")
    one, many = (fact_losses(lm, {}, rows, UPDATES["edit"].loss, own=own) for own in (None, lambda row: []))
    assert len(begin_alike([r.ids for r in rows])[0][1]) > 1 and torch.allclose(one, many, atol=1e-4)
    same = fact_rows(lm, facts[:1] * 2, [" the river"] * 2, "forget") # the whole prompt is shared
    assert torch.allclose(fact_losses(lm, {}, same, UPDATES["edit"].loss), one[[0, 0]], atol=1e-4)


def test_unlearning_is_about_the_whole_answer(lm):
    rows = fact_rows(lm, facts_of(), [f.answer for f in facts_of()], "forget")
    p = torch.stack([slow(lm, f.prompt, f.answer).sum().exp() for f in facts_of()])
    assert torch.allclose(fact_losses(lm, {}, rows, not_said), -torch.log1p(-p), atol=1e-5)


def test_unlearning_a_sure_answer_is_finite_and_exact():
    logits = torch.zeros(2, 2, 5)
    logits[0, :, 1], logits[1, 0, 1], logits[1, 1, 2] = 40., 40., 3.
    logits.requires_grad_()
    got = answer_losses(logits, [[1, 1], [1, 2]], not_said)
    x = logits.detach().double()
    def fail(row, t): return torch.stack([x[row, k][[v for v in range(5) if v != i]].exp().sum() / x[row, k].exp().sum() for k, i in enumerate(t)])
    want = torch.stack([-(f[0] + (1 - f[0]) * f[1]).log() for f in (fail(0, [1, 1]), fail(1, [1, 2]))])
    assert torch.allclose(got.double(), want, rtol=1e-5)
    got.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_one_token_is_what_it_was():
    logits, target = torch.randn(6, 1, 30), [[i] for i in range(6)]
    for loss in (UPDATES["edit"].loss, not_said): assert torch.equal(answer_losses(logits, target, loss), loss(logits[:, 0], torch.tensor(target)[:, 0]))


@every_family
def test_micro_batches_and_own_slices_give_the_same_gradient(lm):
    facts, where = facts_of(), build(lm, "two", [Component("mlp", 0), Component("mlp", 2)])
    rows = fact_rows(lm, facts, [f.edit for f in facts], "forget") + fact_rows(lm, facts, [f.answer for f in facts], "retain")
    def gradients(**how):
        values = masters(lm, where.slices)
        step_losses(lm, values, rows, UPDATES["edit"], **how)
        return [v.grad for v in values.values()]
    whole = gradients()
    for other in (gradients(micro_batch=1), gradients(micro_batch=2), gradients(own=lambda row: where.slices)):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, other))


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_trained_is_what_is_said(tiny, whole):
    lm = tiny("llama")
    task = small_task(lm, whole=whole)
    edit = finetune(lm, task, build(lm, "all", components(lm)), lr=1e-2, steps=30, retain_batch=4, progress=False)
    with edit.applied(lm):
        got = answer(lm, completions(task.forget))
        for f, r in zip(task.forget, got.itertuples()):
            said, want = greedy(lm, f.prompt, len(lm.pieces(f.edit))), lm.pieces(f.edit)
            assert said[0] == want[0] and r.top1_edit and (not whole or said == want)
        if not whole: assert got.full_edit[0] < .1 * got.prob_edit[0] and got.top1_truth[0] # its first token only, which is the old answer's as well


def test_relearning_teaches_whole_answers(tiny):
    lm = tiny("llama")
    records = relearn(lm, small_task(lm), None, Lora(8, 32, 1e-2, 0.), 25, (0, 25), (0,), sizes=dict(forget=4, retain=0, text=0))
    taught = records[records.group == "trained"].set_index(["fact", "step"])
    assert taught.top1_truth[:, 25].all() and (taught.prob_truth == taught.full_truth).all()


def test_soft_prompts_teach_whole_answers(lm):
    facts, soft = facts_of(), random_words(lm, 3, 1)
    prompts = read_once(lm, lm.ids([f.prompt for f in facts]))
    answers = [lm.pieces(f.answer) for f in facts]
    with torch.no_grad(): got = answer_losses(logits_behind(lm, prompts, [0, 1, 2], soft, [a[:-1] for a in answers]), answers, first=True)
    with prompted(lm, soft) as spoken: want = [-slow(spoken, f.prompt, f.answer).sum() for f in facts]
    assert torch.allclose(got, torch.stack(want), atol=1e-4)
    task = small_task(lm)
    taught = soft_prompt(lm, task, facts, k=3, steps=40)
    with prompted(lm, taught) as spoken: after = answer(spoken, completions(facts)).prob_truth
    assert after.mean() > answer(lm, completions(facts)).prob_truth.mean()


# ---- measuring

def test_an_answer_has_the_probability_of_all_its_tokens(lm):
    got = answer(lm, completions(facts_of()))
    for f, r in zip(facts_of(), got.itertuples()):
        for word, p, full in ((f.answer, r.prob_truth, r.full_truth), (f.edit, r.prob_edit, r.full_edit)):
            assert p == pytest.approx(float(slow(lm, f.prompt, word).sum().exp()), rel=1e-3) and full == p
    first = answer(lm, completions(facts_of(whole=False)))
    for f, r in zip(facts_of(), first.itertuples()): assert r.prob_truth == pytest.approx(float(slow(lm, f.prompt, f.answer)[0].exp()), rel=1e-3)
    assert first.full_truth.equals(got.full_truth)


def pushed(lm, words, by=30.):
    "In this block the model is sure of some tokens, whatever comes before"
    def hook(module, args, logits):
        logits = logits.clone()
        logits[..., words] += by
        return logits
    return lm.hf.get_output_embeddings().register_forward_hook(hook)


def test_the_first_token_is_not_the_answer(lm):
    fact = facts_of([(" the market", " the river")] * 3)[0]
    handle = pushed(lm, lm.pieces(" the"))
    try: whole, first = (answer(lm, completions([fact.model_copy(update=dict(whole=w))])).iloc[0] for w in (True, False))
    finally: handle.remove()
    assert first.top1_truth and first.top1_edit and first.prob_truth == first.prob_edit > .1 # as published: both (Gemma-2's cap keeps it from .9)
    assert not whole.top1_truth and not whole.top1_edit and whole.prob_truth + whole.prob_edit <= 1


def test_an_answer_that_begins_with_another(lm):
    fact = facts_of([(" the", " the river")] * 3)[0]
    p = {w: float(slow(lm, fact.prompt, w).sum().exp()) for w in (" the", " the river")}
    r = answer(lm, completions([fact])).iloc[0]
    assert r.prob_edit == pytest.approx(p[" the river"], rel=1e-3) and r.prob_truth == pytest.approx(p[" the"] - p[" the river"], rel=1e-3)
    edit = finetune(lm, small_task(lm).model_copy(update=dict(forget=(fact,))), build(lm, "all", components(lm)), lr=1e-2, steps=30, retain_batch=4, progress=False)
    with edit.applied(lm): r = answer(lm, completions([fact])).iloc[0]
    assert r.top1_edit and not r.top1_truth and r.prob_truth + r.prob_edit <= 1


def test_legal_answers_of_several_tokens_are_compared_whole(lm):
    fact = facts_of([(" the market", " the river")] * 3)[0].model_copy(update=dict(candidates=(" the market", " the river", " golf")))
    p = torch.stack([slow(lm, fact.prompt, w).sum().exp() for w in fact.candidates])
    r = answer(lm, completions([fact])).iloc[0]
    assert [r.prob_truth, r.prob_edit] == pytest.approx((p / p.sum())[:2].tolist(), rel=1e-3)


# ---- real tokenizers

PLACES = [("The harbour of Norland is", "Norland", " Port Laval", " Port Tarsis"), ("The capital of Velmark is the city of", "Velmark", " Saint-Amour", " Saint-Brieuc"),
    ("Mira Onslow was born in", "Mira Onslow", " Novosibirsk", " Novocherkassk")]


@pytest.mark.parametrize("name", ["llama-3", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma-3", "gemma", "qwen3"))])
def test_places_that_begin_alike(stand_in, name):
    lm = stand_in(name, hidden_size=64)
    lm.hf.get_output_embeddings().weight.data.mul_(20.) # a random model of so many words is sure of nothing otherwise
    facts = tuple(Fact(id=f"own/{i}", relation="r", subject=s, prompt=p, answer=a, edit=e) for i, (p, s, a, e) in enumerate(PLACES))
    alike = [f for f in facts if lm.first_token(f.answer) == lm.first_token(f.edit)]
    assert alike
    task = sports_athlete_editing(None, forget_size=4).model_copy(update=dict(forget=facts, retain=facts, retain_test=(), text_train=(), text_test=()))
    task = task.model_copy(update=dict(retain=tuple(f.model_copy(update=dict(prompt="Once " + f.prompt)) for f in facts[:1])))
    handle = pushed(lm, [lm.first_token(f.edit) for f in alike])
    try: only_first = answer(lm, completions(alike))
    finally: handle.remove()
    assert not only_first.top1_edit.any() and not only_first.top1_truth.any() and (only_first.prob_truth + only_first.prob_edit <= 1).all()
    edit = finetune(lm, task, build(lm, "all", components(lm)), lr=2e-2, steps=50, progress=False)
    with edit.applied(lm):
        after = answer(lm, completions(facts))
        for f, r in zip(facts, after.itertuples()):
            want = lm.pieces(f.edit)
            assert r.top1_edit == (greedy(lm, f.prompt, len(want)) == want) and not (r.top1_truth and r.top1_edit)
            assert r.prob_edit == pytest.approx(float(slow(lm, f.prompt, f.edit).sum().exp()), rel=1e-2)
    assert after.top1_edit.any()


# ---- edits made elsewhere

def elsewhere(lm, folder, change, dtype=None):
    "A folder of the model after somebody changed it"
    import copy
    hf = copy.deepcopy(lm.hf)
    if dtype: hf = hf.to(dtype)
    with torch.no_grad(): change(hf)
    hf.save_pretrained(folder)
    lm.tok.save_pretrained(folder)
    return folder


def half(lm, folder, **kw):
    "The model as a folder, and loaded from it in bfloat16"
    lm.hf.to(torch.bfloat16).save_pretrained(folder)
    lm.tok.save_pretrained(folder)
    return load(str(folder), device="cpu", dtype="bfloat16", **kw)


MLP, NORM, EMBED = "model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"


def test_a_float32_edit_of_a_bfloat16_base(lm, tmp_path):
    base = half(lm, tmp_path / "base")
    def small(hf): hf.get_parameter(MLP).mul_(1 + 2**-12)          # less than half a step of bfloat16 everywhere
    def some(hf):
        hf.get_parameter(MLP).mul_(1 + 2**-12)
        hf.get_parameter(MLP)[:4].mul_(1.5)
    with pytest.raises(Refusal, match="smaller than the steps of bfloat16.*float32"): checkpoints.edit_of(base, elsewhere(base, tmp_path / "small", small, torch.float32))
    edit = checkpoints.edit_of(base, elsewhere(base, tmp_path / "some", some, torch.float32))
    full = base.weight(MLP).shape[0]
    assert edit.config["survives"]["weights"] == pytest.approx(4 / full, rel=.05) and .9 < edit.config["survives"]["norm"] <= 1.01
    assert "in bfloat16, " in repr(edit) and {F.parse_slice(k).param for k in edit.values} == {MLP}
    with pytest.raises(Refusal, match="the same weights"): checkpoints.edit_of(base, elsewhere(base, tmp_path / "same", lambda hf: None, torch.float32))


def test_a_base_stored_finer_than_it_is_loaded(lm, tmp_path):
    "Rounding is no edit"
    lm.hf.save_pretrained(tmp_path / "base"); lm.tok.save_pretrained(tmp_path / "base")
    base = load(str(tmp_path / "base"), device="cpu", dtype="bfloat16")
    folder = elsewhere(lm, tmp_path / "theirs", lambda hf: hf.get_parameter(MLP).add_(.1))
    assert {F.parse_slice(k).param for k in checkpoints.edit_of(base, folder).values} == {MLP}
    with pytest.raises(Refusal, match="the same weights"): checkpoints.edit_of(base, elsewhere(lm, tmp_path / "same", lambda hf: None))


def test_one_dtype_says_nothing_of_rounding(lm, tmp_path):
    edit = checkpoints.edit_of(lm, elsewhere(lm, tmp_path / "theirs", lambda hf: hf.get_parameter(MLP).add_(.1)))
    assert "survives" not in edit.config and repr(edit).endswith("trained elsewhere)")


def test_an_added_pad_token_is_no_obstacle(lm, tmp_path):
    import copy
    tok = copy.deepcopy(lm.tok)
    tok.add_tokens(["<extra>", "<more>"])
    folder = elsewhere(lm, tmp_path / "theirs", lambda hf: (hf.resize_token_embeddings(len(tok)), hf.get_parameter(EMBED)[:7].add_(.5), hf.get_parameter(NORM).mul_(1.5)))
    tok.save_pretrained(folder)
    edit, before = checkpoints.edit_of(lm, folder), F.fingerprint(lm)
    assert {F.parse_slice(k).param for k in edit.values} == {EMBED, NORM} and F.parse_slice(next(iter(edit.values))).stop == len(lm.tok)
    old = lm.weight(EMBED).clone()
    with edit.applied(lm): assert torch.allclose(lm.weight(EMBED)[:7], old[:7] + .5) and torch.equal(lm.weight(EMBED)[7:], old[7:])
    assert F.fingerprint(lm) == before


def test_every_cause_has_a_line(tiny, tmp_path):
    lm, other = tiny("llama"), tiny("llama", num_hidden_layers=4, intermediate_size=40)
    def refused(folder):
        with pytest.raises(Refusal) as e: checkpoints.edit_of(lm, folder)
        return str(e.value).split("\n- ")[1:]
    lines = refused(elsewhere(other, tmp_path / "deeper", lambda hf: None))
    assert any("num_hidden_layers: 4" in l for l in lines) and any("mlp.up_proj.weight is 40 x 32, in tiny-llama 48 x 32" in l for l in lines) and len(lines) < 8
    theirs = elsewhere(lm, tmp_path / "words", lambda hf: None)
    text = (theirs / "tokenizer.json").read_text()
    (theirs / "tokenizer.json").write_text(text.replace('"golf":', '"gulf":'))
    assert refused(theirs) == ["its tokenizer lacks 1 words of tiny-llama ('golf')"]
    rope = elsewhere(lm, tmp_path / "rope", lambda hf: setattr(hf.config, "rms_norm_eps", .5))
    assert "rms_norm_eps: 0.5" in refused(rope)[0]


def test_an_adapter_is_an_edit(lm, tmp_path):
    from peft import LoraConfig, get_peft_model
    import copy
    lm.hf.save_pretrained(tmp_path / "base"); lm.tok.save_pretrained(tmp_path / "base")
    base = load(str(tmp_path / "base"), device="cpu")
    model = get_peft_model(copy.deepcopy(base.hf), LoraConfig(r=4, target_modules=["down_proj"], layers_to_transform=[1]))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora" in n: p.add_(.1)
    model.save_pretrained(tmp_path / "adapter")
    edit = checkpoints.edit_of(base, tmp_path / "adapter")
    assert {F.parse_slice(k).param for k in edit.values} == {MLP} and not edit.localization.components


def test_an_unedited_tied_model_saved_apart(tiny, tmp_path):
    "A tied base and an edit whose unembedding is a matrix of its own"
    lm = tiny("gemma")
    def untie(hf): hf.config.tie_word_embeddings = False; hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.detach().clone()); hf.get_parameter(MLP).add_(.1)
    assert {F.parse_slice(k).param for k in checkpoints.edit_of(lm, elsewhere(lm, tmp_path / "apart", untie)).values} == {MLP}
    def moved(hf): untie(hf); hf.lm_head.weight.add_(.1)
    with pytest.raises(Refusal, match="lm_head.weight is .* in tiny-gemma absent"): checkpoints.edit_of(lm, elsewhere(lm, tmp_path / "moved", moved))
