"Text loss a few positions at a time: the plain loss and gradient, without the plain form's logits."
import pytest, torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from mechunlearn import questions as Q
from mechunlearn.questions import hidden_states, text_loss, token_loss
from mechunlearn.finetuning import Row, masters, matrices, text_losses
from mechunlearn.localization import build
from mechunlearn.models import Component
from mechunlearn.relearning import Lora, adapters

TEXTS = ["the bright fox watches a river .", "a .", "some tall deers like the market and then the saw sees every bed ."]


def plain(lm, batch, weights={}):
    logits = functional_call(lm.hf, weights, (), dict(batch, use_cache=False)).logits
    targets, mask = batch["input_ids"][:, 1:], batch["attention_mask"][:, :-1]
    return cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none") * mask


class Largest(TorchDispatchMode):
    "Numbers in the largest tensor that is made in this block"
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor): self.n = max(self.n, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.fixture
def few(monkeypatch, lm):
    "Three positions of three texts at a time"
    monkeypatch.setattr(Q, "CHUNK", 3 * 3 * lm.hf.config.vocab_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_those_of_the_plain_form(lm, few, dtype):
    lm.hf.to(dtype)
    batch, where = lm.encode(TEXTS), build(lm, "mixed", [Component("mlp", 1), Component("head", 0, 1)])
    def both(loss):
        values = masters(lm, where.slices)
        out = loss(lm, batch, matrices(lm, values))
        out.sum().backward()
        return out.detach(), [v.grad for v in values.values()]
    (got, grads), (want, theirs) = both(lambda *a: token_loss(*a)[0]), both(plain)
    tol = 1e-5 if dtype == torch.float32 else 3e-2
    assert torch.allclose(got, want, atol=tol)
    for a, b in zip(grads, theirs): assert torch.allclose(a, b, atol=tol * max(1., float(b.abs().max())))


def test_one_part_is_the_plain_form_to_the_bit(lm):
    batch = lm.encode(TEXTS)
    with torch.no_grad(): assert torch.equal(token_loss(lm, batch)[0], plain(lm, batch))


def test_embeddings_and_unembedding_may_be_replaced(lm, few):
    "Tied or not"
    batch, name = lm.encode(TEXTS), "model.embed_tokens.weight"
    names = [name] + [n for n, _ in lm.hf.named_parameters() if n == "lm_head.weight"]
    def both(loss):
        weights = {n: (1.1 * lm.weight(n)).requires_grad_() for n in names}
        loss(lm, batch, weights).sum().backward()
        return [w.grad for w in weights.values()]
    assert len(names) == (1 if lm.hf.config.tie_word_embeddings else 2)
    for a, b in zip(both(lambda *a: token_loss(*a)[0]), both(plain)): assert b.abs().max() > 0 and torch.allclose(a, b, atol=1e-4)


def test_with_adapters(lm, few):
    batch, grads = lm.encode(TEXTS), []
    for loss in (lambda *a: token_loss(*a)[0], plain):
        with adapters(lm, Lora(4, 8, 1e-3, 0.)) as params:
            lm.hf.train()
            with torch.no_grad():
                for p in params: p.add_(.05)
            loss(lm, batch).sum().backward()
            grads.append([p.grad for p in params])
    for a, b in zip(*grads): assert torch.allclose(a, b, atol=1e-5)


def test_no_tensor_grows_with_the_texts(lm, few):
    words, mlp = lm.hf.config.vocab_size, build(lm, "mlp", [Component("mlp", 1)])
    rows = [Row("text", ids) for ids in lm.ids([" ".join(TEXTS)] * 3)]
    assert len(rows[0].ids) > 20
    with Largest() as seen: text_losses(lm, masters(lm, mlp.slices), rows).sum().backward()
    assert seen.n <= lm.hf.get_input_embeddings().weight.numel() # a view of the unembedding; logits are less
    with Largest() as whole: plain(lm, lm.pad([r.ids for r in rows]))
    assert whole.n >= 20 * 3 * words


def test_text_loss_in_parts_is_that_of_each_text_alone(lm, few):
    got = text_loss(lm, TEXTS, batch_size=3)
    for text, r in zip(TEXTS, got.itertuples()):
        ids = torch.tensor(lm.ids([text]))
        with torch.no_grad(): own = float(lm.hf(ids, labels=ids).loss)
        assert r.loss == pytest.approx(own, rel=1e-4) and r.n_tokens == ids.shape[1] - 1


def test_hidden_states_and_unembedding_make_the_logits(lm):
    batch = lm.encode(TEXTS)
    with torch.no_grad(): assert torch.equal(lm.unembed(hidden_states(lm, batch)), lm.hf(**batch, use_cache=False).logits)


@pytest.mark.parametrize("name", ["gemma", pytest.param("gemma-3", marks=pytest.mark.slow)])
def test_a_quarter_of_a_million_words(stand_in, name):
    lm = stand_in(name)
    batch = lm.encode(["The cat sat on the mat, and then it slept through the whole of a long and quiet afternoon by the window."] * 8)
    with torch.no_grad(), Largest() as seen: loss = token_loss(lm, batch)[0]
    assert seen.n <= max(Q.CHUNK, lm.hf.get_input_embeddings().weight.numel())
    with torch.no_grad(): assert torch.allclose(loss[:1], plain(lm, {k: v[:1] for k, v in batch.items()}), atol=1e-5)
