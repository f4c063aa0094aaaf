"What an attack is said to cost is what it costs: prompts that go through the model are counted, and compared with what the docstring says."
from contextlib import contextmanager
import pytest
from mechunlearn.adversarial import found_suffix, latent_push, middle_layers, perturb
from mechunlearn.elicitation import elicit
from mechunlearn.evaluation import SHOTS, asked_in_attacks, evaluate, harden, questionnaire, speak
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.finetuning import finetune
from mechunlearn.inside import read_inside, unedited
from mechunlearn.latent import edited_relations, latent
from mechunlearn.localization import build
from mechunlearn.models import Component
from mechunlearn.never_knew import against_never_knew, compared_questions
from mechunlearn.relearning import LOW, asked, grid_for, halves, low_resource, relearn, relearn_grid
from mechunlearn.softprompts import soft_prompt, soften
from mechunlearn.tampering import relearn_splits, tamper, trained_on


@contextmanager
def counted(lm):
    "How many prompts go through the whole model in this block: rows of all its blocks, over their number"
    seen = [0]
    blocks = [lm.hf.get_submodule(f"{lm.names['layers']}.{l}") for l in range(lm.n_layers)]
    def count(module, args, kwargs): seen[0] += (args[0] if args else kwargs["hidden_states"]).shape[0] / lm.n_layers
    hooks = [b.register_forward_pre_hook(count, with_kwargs=True) for b in blocks]
    try: yield seen
    finally:
        for h in hooks: h.remove()


@pytest.fixture(scope="module")
def task(): return sports_athlete_editing(None, forget_size=16)


@pytest.fixture(scope="module")
def lm(tiny): return tiny()


@pytest.fixture(scope="module")
def edit(lm, task): return finetune(lm, task, build(lm, "hand@mlp.0", [Component("mlp", 0)]), lr=1e-3, steps=1, progress=False)


def groups(task, each): return len(task.forget) + min(len(task.retain_test), each) + min(len(task.ghosts), each)


def said(fn, *words):
    "The docstring says so"
    for w in words: assert w in fn.__doc__, (fn.__name__, w)


def standard(lm, task):
    said(evaluate, "one forward a prompt")
    return len(questionnaire(task)) + len(task.text_test)

def relearning(lm, task, steps):
    said(relearn, "2 x `steps` forwards and backwards of 48 prompts and 2 texts", "each question is asked 2 x 4 times")
    return 2 * steps * 50 + sum(4 * len(asked(task, *halves(task, k), 48)) for k in (0, 1))

def taught(task, times, mcq=False): return sum(times * len(asked(task, *halves(task, k), 48, mcq)) for k in (0, 1))

def grid_of(lm, task, grid):
    said(relearn_grid, "2 x its steps forwards and backwards of 48 prompts and 2 texts", "asked twice")
    return sum(2 * n * 50 for _, n in grid) + len(grid) * taught(task, 1)

def low(lm, task):
    said(low_resource, "40 forwards and backwards of 48 prompts and 2 texts", "3 x 2 times, in completion and multiple choice")
    return sum(len(sides) * n for _, sides, n in LOW.values()) * 50 + 3 * taught(task, 1, True)

def splits(lm, task, splits, steps):
    said(relearn_splits, "2 x `splits` x `steps` forwards and backwards of 48 prompts and 2 texts", "asked 2 x `splits` times")
    return 2 * splits * steps * 50 + splits * taught(task, 1)

def probes(lm, task):
    said(latent, "One forward a fact")
    return len(edited_relations(task, 300)) + groups(task, 96)

def elicited(lm, task):
    said(elicit, "About 80 forwards a fact on the organism")
    return 80 * groups(task, 48)

def inside(lm, task):
    said(read_inside, "A forward", "(2 + 2 x layers) forwards to put states in", "and `unedited`, if it is not given")
    said(unedited, "One forward a fact", "(2 + layers) forwards for each stranger of a fact")
    return 300 + 2*groups(task, 32) + (2 + 2*lm.n_layers + 2*(2 + lm.n_layers)) * (len(task.forget) + 32) # two strangers

def tampering(lm, task, steps):
    said(tamper, "One forward a fact and way (30, and those of the curves)", "three trainings of `steps` steps")
    said(trained_on, "`steps` forwards and backwards of 32 prompts, or of 8 texts")
    curves = 7 + 2 # shares, and one layer that is put back, alone and from there on
    return (30 + curves) * groups(task, 48) + steps * (32 + 32 + 8)

def optimized(lm, task, steps, exchanges):
    said(perturb, "2 x (`layers` x `radii` of `latent_push` and `tokens` of `found_suffix`)")
    said(latent_push, "`restarts` x `steps` forwards and backwards of `batch` + `retain_batch` prompts")
    said(found_suffix, "`steps` x (a forward and backward, and `candidates` + 1 forwards, of `n` tokens behind 24 prompts)")
    shown = 8 + 8 # of sixteen facts eight are taught
    return 2 * (len(middle_layers(lm)) * 2 * steps * shown + exchanges * (1 + 16 + 1) * shown)

def softened(lm, task, steps, prompts):
    said(soften, "2 x `ks` x `prompts` of `soft_prompt`")
    said(soft_prompt, "A forward a prompt, then `steps` forwards and backwards of `k` tokens behind 48 prompts")
    return 2 * prompts * (8 + 128 + steps * (8 + 16)) # eight facts are taught

def hardened(lm, task):
    said(harden, "with the defaults 500 for each group and number of examples")
    return 500 * len(asked_in_attacks(task, 64)) * len(SHOTS)

def spoken(lm, task):
    said(speak, "One forward a token and prompt: with the defaults some 5000 on the organism")
    return 5000

def never(lm, task):
    said(against_never_knew, "Two forwards of a short prompt for each wording of a fact and each model")
    return 2 * 2 * len(compared_questions(task, task.forget, 64))


FEWER = {relearn: dict(steps=8), tamper: dict(steps=6), perturb: dict(steps=6, exchanges=6), soften: dict(steps=30, prompts=1),
         relearn_splits: dict(splits=2, steps=4)} # of the steps that are stated

@pytest.mark.parametrize("attack, stated", [(relearn, relearning), (latent, probes), (elicit, elicited), (read_inside, inside), (tamper, tampering), (perturb, optimized),
                                            (soften, softened), (against_never_knew, never), (low_resource, low), (relearn_splits, splits)], ids=lambda f: f.__name__)
def test_an_attack_costs_what_its_docstring_says(lm, task, edit, attack, stated):
    fewer = FEWER.get(attack, {})
    with counted(lm) as seen: attack(lm, task, edit, **fewer)
    assert .5 <= seen[0] / stated(lm, task, **fewer) <= 2, (seen[0], stated(lm, task, **fewer))


@pytest.mark.parametrize("ask, stated", [(evaluate, standard), (harden, hardened), (speak, spoken)], ids=lambda f: f.__name__)
def test_questions_cost_what_their_docstring_says(lm, task, ask, stated):
    with counted(lm) as seen: ask(lm, task)
    assert .5 <= seen[0] / stated(lm, task) <= 2, (seen[0], stated(lm, task))


def test_a_grid_of_attackers_costs_what_its_docstring_says(lm, task, edit):
    grid = grid_for(lm, ranks=(0, 8), lrs=(1e-3,), steps=(2, 6))
    with counted(lm) as seen: relearn_grid(lm, task, edit, grid)
    assert .5 <= seen[0] / grid_of(lm, task, grid) <= 2, (seen[0], grid_of(lm, task, grid))
