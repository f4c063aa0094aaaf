"A step that computes less: the same gradient as the plain form, in every family."
from itertools import product
import pytest, torch
from plain import blocks, every_family, parts
from test_finetuning import mixed, task_for
from test_text_loss import Largest
from mechunlearn import finetuning as F, steps as S
from mechunlearn.finetuning import UPDATES, Row, draws, finetune, grouped, masters, step_losses, training_rows
from mechunlearn.localization import build, localize
from mechunlearn.losses import choose_update
from mechunlearn.models import Component
from mechunlearn.questions import hidden_states
from mechunlearn.steps import Frozen, chains, come_back, lowest, own_lengths, pack, said_in_chunks
from mechunlearn.tasks import make_task

SIZES = dict(forget=4, retain=4, text=4)


def later(lm): return build(lm, "later", [Component("mlp", 2), Component("head", 1, 2)])

def gradients(lm, where, batch, update=UPDATES["edit"], **how):
    values = masters(lm, where.slices)
    terms = step_losses(lm, values, batch, update, **how)
    return terms, [v.grad for v in values.values()]

def assert_same(a, b, tol=1e-5):
    (terms, grads), (others, theirs) = a, b
    assert terms == pytest.approx(others, rel=max(tol, 1e-5), nan_ok=True)
    for g, h in zip(grads, theirs): assert torch.allclose(g, h, atol=tol * max(1., float(h.abs().max())))

def with_own_answers(lm, task):
    "Some answers of several tokens"
    return task.model_copy(update=dict(forget=[f.model_copy(update=dict(edit=w)) for f, w in zip(task.forget, (" golf", " golfers", " golfer", " golf"))]))


# ---- packing

def cost(groups, lengths, start): return sum(start + len(g) * max(lengths[i] for i in g) for g in groups)

def partitions(items):
    "All ways to put items into groups"
    if not items: yield []; return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for k in range(len(rest)): yield [*rest[:k], [items[0], *rest[k]], *rest[k + 1:]]


@pytest.mark.parametrize("seed", range(6))
def test_no_way_of_grouping_costs_less(seed):
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (6,), generator=rng).tolist()
    for budget, start in product((30, 80, 1000), (0, 5, 50)):
        found = pack(lengths, budget, start)
        fits = lambda groups: all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= budget for g in groups)
        assert sorted(i for g in found for i in g) == [*range(6)] and fits(found)
        assert cost(found, lengths, start) == min(cost(g, lengths, start) for g in partitions([*range(6)]) if fits(g))


def test_packing_of_nothing_and_of_equals(): assert pack([], 10) == [] and pack([7] * 5, 35) == [[0, 1, 2, 3, 4]] and pack([90, 90], 10) == [[0], [1]]


@every_family
def test_packed_steps_have_the_same_gradient(lm):
    task, where = task_for(lm), mixed(lm)
    batch = next(draws(training_rows(lm, task), SIZES, 1, 0))
    seen = []
    lm.hf.base_model.register_forward_hook(lambda m, args, out: seen.append(out.last_hidden_state.shape[:2].numel()))
    plain, n = gradients(lm, where, batch), len(seen)
    assert_same(gradients(lm, where, batch, packed=True, micro_batch=8), plain)
    assert max(seen[n:]) <= 8 * 32
    assert_same(gradients(lm, where, batch, packed=True), plain)


def test_what_is_shared_does_not_count(lm):
    ids = [[1, 2, 3, 4, k] for k in range(5, 9)] + [[9, 8]]
    assert own_lengths(lm, ids) == ([1, 1, 1, 1, 2], 4)


@pytest.mark.parametrize("head, forwards", [(2, 2), (500, 1)])
def test_a_long_beginning_is_not_read_for_each_of_many_packs(lm, head, forwards):
    rows = [Row("retain", [7] * head + [k] * n, 1) for n in (2, 40) for k in range(5, 15)]
    assert len(grouped(lm, 128, packed=True)[0](rows)) == forwards


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@every_family
def test_texts_one_behind_the_other_do_not_see_each_other(lm, implementation):
    try: lm.hf.set_attn_implementation(implementation)
    except ValueError: pytest.skip(f"no {implementation} for this family")
    rows = [F.Row("text", ids) for ids in [[5], [7, 8, 9, 10, 11, 12], [5, 6, 7], [9], [8, 8, 8, 8, 8, 9, 7]]]
    with torch.no_grad(): ours, plain = F.text_losses(lm, {}, rows, chained=True), torch.cat([F.text_losses(lm, {}, [r]) for r in rows])
    assert torch.allclose(ours, plain, atol=1e-4) and ours[0] == 0 and chains([2, 2, 9, 1, 5], 5) == [[0, 1], [2], [3], [4]]


# ---- logits a few positions at a time

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_family
def test_chunks_give_loss_and_gradient_and_hold_no_more(lm, dtype, monkeypatch):
    lm.hf.to(dtype)
    task, where = with_own_answers(lm, task_for(lm)), mixed(lm)
    rows = training_rows(lm, task)
    batch = next(draws(rows, SIZES, 1, 0))
    with Largest() as whole: plain = gradients(lm, where, batch)
    monkeypatch.setattr(S, "HELD", 5 * lm.hf.config.vocab_size)
    with Largest() as largest: ours = gradients(lm, where, batch)
    assert_same(ours, plain, 1e-5 if dtype == torch.float32 else 3e-2)
    assert largest.n < whole.n / 3 # of attention, or the embeddings: no logits are as large


@pytest.mark.parametrize("loss", ["log-1-p", "npo", "simnpo", "dpo", "gradient-ascent"])
def test_losses_of_the_field_in_chunks(lm, loss, monkeypatch):
    task, where = with_own_answers(lm, task_for(lm)), mixed(lm)
    update, _ = choose_update(lm, task, loss, preferred="edit" if loss == "dpo" else None)
    rows = training_rows(lm, task, update)
    if update.reference: rows["forget"] = F.with_reference(lm, rows["forget"])
    batch = next(draws(rows, SIZES, 1, 0))
    plain = gradients(lm, where, batch, update)
    monkeypatch.setattr(S, "HELD", 5 * lm.hf.config.vocab_size)
    assert_same(gradients(lm, where, batch, update, packed=True), plain)


def test_a_trained_unembedding_gets_its_gradient(lm, monkeypatch):
    monkeypatch.setattr(S, "HELD", 5 * lm.hf.config.vocab_size)
    name = next(n for n, p in lm.hf.named_parameters() if p is lm.hf.get_output_embeddings().weight)
    batch, targets = lm.encode(["the bright fox watches a river ."]), torch.arange(9)
    def both(chunks):
        W = lm.weight(name).detach().clone().requires_grad_()
        hidden = hidden_states(lm, batch, {name: W})[0, :9]
        loss = said_in_chunks(lm, hidden, targets[:len(hidden)], {name: W}) if chunks else torch.nn.functional.cross_entropy(lm.unembed(hidden, {name: W}), targets[:len(hidden)], reduction="none")
        (loss * torch.arange(1, len(loss) + 1)).sum().backward()
        return loss.detach(), W.grad
    (a, g), (b, h) = both(True), both(False)
    assert torch.allclose(a, b, atol=1e-5) and torch.allclose(g, h, atol=1e-5 * float(h.abs().max()))


# ---- what lies below

@every_family
def test_frozen_layers_once_have_the_same_gradient(lm):
    task, where = with_own_answers(lm, task_for(lm)), later(lm)
    rows = training_rows(lm, task)
    batch = next(draws(rows, SIZES, 1, 0))
    some = [i for r in rows["forget"] + rows["text"] for i in F.reads(r)] # retain rows are not kept
    frozen, calls = Frozen(lm, where.slices, some), []
    handle = parts(lm.hf, 0).mlp.register_forward_hook(lambda *a: calls.append(1))
    plain, n = gradients(lm, where, batch), len(calls)
    mine = gradients(lm, where, batch, frozen=frozen)
    handle.remove()
    assert frozen.layer == lowest(lm, where.slices) == 1 and 0 < len(calls) - n < n
    assert_same(mine, plain)
    assert_same(gradients(lm, where, batch, frozen=frozen, packed=True, micro_batch=3), plain)
    assert_same(gradients(lm, where, batch, frozen=Frozen(lm, where.slices, [i for r in batch for i in F.reads(r)])), plain)


@every_family
def test_the_model_is_as_it_was(lm):
    ids, before = lm.pad(lm.ids(["Fact: the sport of golf"])), [dict(b.__dict__) for b in blocks(lm.hf)]
    logits, frozen = lm.hf(**ids).logits, Frozen(lm, later(lm).slices, lm.ids(["Fact: the sport of golf"]))
    with frozen.read(lm.ids(["Fact: the sport of golf"])): assert torch.allclose(lm.hf(**ids).logits, logits, atol=1e-5)
    with pytest.raises(KeyboardInterrupt), frozen.read(lm.ids(["Fact: the sport of golf"])): raise KeyboardInterrupt
    assert [b.__dict__.get("forward") for b in blocks(lm.hf)] == [b.get("forward") for b in before] and torch.equal(lm.hf(**ids).logits, logits)


def test_memory_is_what_it_says(lm):
    ids = lm.ids(["Fact: golf", "Fact: the sport of golf"])
    frozen = Frozen(lm, later(lm).slices, ids + ids)
    assert frozen.mb * 2**20 == sum(map(len, ids)) * lm.d_model * 4 and "2 prompts before layer 1" in repr(frozen)
    assert len(Frozen(lm, mixed(lm).slices, ids).kept) == 0 # trained from the first layer on: nothing is kept


def test_each_fact_in_weights_of_its_own(lm):
    task, where = task_for(lm), later(lm)
    batch = next(draws(training_rows(lm, task), dict(forget=4, retain=4, text=2), 1, 0))
    own = lambda r: where.slices[:2] if r.term == "forget" else where.slices
    frozen = Frozen(lm, where.slices, [r.ids for r in batch])
    assert_same(gradients(lm, where, batch, own=own, packed=True, frozen=frozen), gradients(lm, where, batch, own=own))


def test_rows_that_come_back():
    rows = dict(forget=[*range(16)], retain=[*range(100, 200)], text=[*range(500)])
    assert come_back(rows, dict(forget=64, retain=48, text=8), 50) == rows["forget"] + rows["retain"]
    assert come_back(rows, dict(forget=64, retain=48, text=8), 1) == [] and come_back(dict(text=[]), dict(text=8), 9) == []


# ---- training

@pytest.mark.parametrize("name", ["sports-athlete-editing", pytest.param("sequential-counterfact-editing", marks=pytest.mark.slow)])
def test_edits_are_the_same(lm, name):
    task = task_for(lm) if name.startswith("sports") else make_task(name, lm, forget_size=8)
    where = localize(lm, task, "all-mlps") if task.update == "sequential" else later(lm)
    if task.update == "sequential": where = above(lm, where)
    how = dict(lr=1e-2, steps=4, batch=4, retain_batch=4, text_batch=2, progress=False, seed=1)
    if task.update == "sequential": how["between"] = lambda *a: F.pd.DataFrame()
    a, b = finetune(lm, task, where, **how), finetune(lm, task, where, packed=True, remember=True, **how)
    start, apart, moved = masters(lm, where.slices), 0., 0.
    for s, old in start.items():
        x, y = a.values[F.slice_key(s)], b.values[F.slice_key(s)]
        apart, moved = apart + float((x - y).square().sum()), moved + float((x - old).square().sum())
    assert apart**.5 < 1e-2 * moved**.5 # AdamW moves a weight by the sign of a gradient that is all rounding
    assert torch.allclose(torch.tensor(a.curve.loss), torch.tensor(b.curve.loss), atol=1e-3)

def above(lm, where):
    "The same parts without the first layer"
    higher = lambda x: x.model_copy(update=dict(slices=tuple(s for s in x.slices if lowest(lm, [s]) > 0)))
    return higher(where).model_copy(update=dict(parts=tuple(map(higher, where.parts))))
