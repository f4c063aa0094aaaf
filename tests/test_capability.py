"Texts, benchmarks and the verdict: what is asked, that the harness and we agree, and what it takes to be called destroyed."
import json, random, sys
from importlib.util import find_spec

import datasets, numpy as np, pandas as pd, pytest, torch, yaml
from mechunlearn.capability import (RULES, accuracies, paired_changes, benchmarks, capability, destroyed, noise, one_order, plot_capability, run_capability,
    texts_for, write_benchmark)
from mechunlearn.evaluation import evaluate
from mechunlearn.jobs import labelled
from mechunlearn.questions import RECORD, answer, as_records, multiple_choice
from mechunlearn.facts import LETTERS, Fact
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.finetuning import finetune, fingerprint
from mechunlearn.models import load
from mechunlearn.stats import mcnemar, wilson, summarise
from mechunlearn.store import Refusal, Run

harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install mechunlearn[capability]")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    import huggingface_hub
    for v in ("MECHUNLEARN_TEXT", "MECHUNLEARN_REFDATA"): monkeypatch.delenv(v, raising=False)
    monkeypatch.setenv("MECHUNLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def task():
    t = sports_athlete_editing(None, forget_size=4)
    return t.model_copy(update=dict(text_train=t.text_train[:20], text_test=t.text_test[:5], general=t.general[:3]))


@pytest.fixture(scope="module")
def organism(): return load("organism")


def refusal(fn, *args, **kw):
    with pytest.raises(Refusal) as e: fn(*args, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)


# ---- benchmarks

def put_benchmark(folder, rows, name="words", **config):
    "Questions with choices of one to three words, as a task of the harness."
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = dict(task=name, dataset_path="json", dataset_kwargs=dict(data_files=dict(test=f"{name}.jsonl")), test_split="test",
        output_type="multiple_choice", doc_to_text="prompt", doc_to_choice="choices", doc_to_target="answer") | config
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def words(tmp_path, task):
    "Twelve questions; the choices are texts of different length."
    draw, texts = random.Random(0), [t.split() for t in task.text_train]
    rows = [dict(prompt=f.prompt, choices=[" ".join(draw.choice(texts)[:n]) for n in (1, 1, 1, 2, 3)], answer=i % 3)
        for i, f in enumerate(task.retain[:12])]
    return put_benchmark(tmp_path, rows), rows


@torch.no_grad()
def summed(lm, prompt, choice):
    "Log-probability of a choice, token by token, without padding."
    [start], [whole] = lm.ids([prompt]), lm.ids([f"{prompt} {choice}"])
    logp = lm.hf(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    return sum(float(logp[i - 1, whole[i]]) for i in range(len(start), len(whole)))


@harness
def test_accuracy_is_the_argmax_of_summed_log_probabilities(lm, words):
    folder, rows = words
    records = benchmarks(lm, ["words"], tasks_folder=folder, batch_size=3)
    by_hand = np.array([[summed(lm, r["prompt"], c) for c in r["choices"]] for r in rows])
    truth = [r["answer"] for r in rows]
    right = by_hand.argmax(1) == truth
    assert 0 < right.sum() < len(rows)     # or the comparison says nothing
    assert (records.top1_truth == right).all()
    assert np.log(records.full_truth.to_numpy()) == pytest.approx(by_hand[range(len(rows)), truth], abs=1e-3)
    share = np.exp(by_hand) / np.exp(by_hand).sum(1, keepdims=True)
    assert records.prob_truth.to_numpy() == pytest.approx(share[range(len(rows)), truth], rel=1e-2)
    found = accuracies(records).iloc[0]
    assert (found.benchmark, found.metric, found.value, found.n) == ("words", "acc", right.mean(), 12)
    assert (found.ci_low, found.ci_high) == pytest.approx(wilson(right.sum(), 12))


@harness
def test_the_harness_and_our_own_questions_agree_on_the_organism(organism, tmp_path):
    task = sports_athlete_editing(organism, forget_size=4)
    write_benchmark(task, task.general[:6] + task.ghosts[:6], tmp_path, "kinds")
    theirs, ours = benchmarks(organism, ["kinds"], tasks_folder=tmp_path), answer(organism, one_order(task, task.general[:6] + task.ghosts[:6]))
    assert len(theirs) == 12 and theirs.top1_truth[:6].all() and not theirs.top1_truth[6:].all()
    assert (theirs.top1_truth == ours.top1_truth).all() and list(theirs.truth) == list(ours.truth)
    assert theirs.full_truth.to_numpy() == pytest.approx(ours.full_truth.to_numpy(), abs=1e-5)


@harness
def test_the_model_in_memory_is_asked_and_left_as_it_was(lm, words):
    random.seed(3); torch.manual_seed(3); np.random.seed(3)
    lm.tok.pad_token = None
    state, tokens, before = random.getstate(), repr(lm.tok), fingerprint(lm)
    draws = torch.get_rng_state(), np.random.get_state()[1].copy()
    plain = benchmarks(lm, ["words"], tasks_folder=words[0])
    with noise(lm, 0).applied(lm): other = benchmarks(lm, ["words"], tasks_folder=words[0])
    assert not np.allclose(plain.full_truth, other.full_truth, rtol=1e-2)
    assert fingerprint(lm) == before and repr(lm.tok) == tokens and not lm.hf.training
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), draws[0]) and (np.random.get_state()[1] == draws[1]).all()
    assert benchmarks(lm, ["words"], tasks_folder=words[0]).full_truth.equals(plain.full_truth)


@harness
def test_questions_have_names_so_that_models_can_be_paired(tiny, words):
    lm, (folder, rows) = tiny(), words
    put_benchmark(folder, rows[:2], "more")
    records = benchmarks(lm, ["words", "more"], limit=3, tasks_folder=folder)
    assert list(records.group) == ["words"] * 3 + ["more"] * 2 and list(records) == list(RECORD)
    assert records.fact.is_unique and list(records.fact[:3]) == ["words/00000", "words/00001", "words/00002"]
    assert list(records.truth[:3]) == [" " + r["choices"][r["answer"]] for r in rows[:3]]
    assert set(records.evaluation) == {"capability"} and set(records.format) == {"benchmark"}


@harness
def test_data_is_looked_up_in_the_folder(tiny, words, monkeypatch):
    lm, (folder, rows) = tiny(), words
    monkeypatch.chdir(folder.parent)
    assert len(benchmarks(lm, ["words"], tasks_folder=folder.name)) == len(rows)


@harness
def test_probabilities_are_not_rounded_to_the_models_precision(tiny, words):
    lm, (folder, rows) = tiny(), words
    lm.hf.to(torch.bfloat16)
    by_hand = [summed(lm, r["prompt"], r["choices"][r["answer"]]) for r in rows]
    assert np.log(benchmarks(lm, ["words"], batch_size=1, tasks_folder=folder).full_truth.to_numpy()) == pytest.approx(by_hand, abs=1e-3)


@harness
def test_tasks_that_shuffle_do_it_alike_each_time(tiny, words):
    lm, (folder, rows) = tiny(), words
    (folder / "mix.py").write_text("import random\ndef choices(doc): return random.sample(doc['choices'], 5)\n")
    put_benchmark(folder, rows, "mixed", doc_to_choice=0)
    config = (folder / "mixed.yaml").read_text().replace("doc_to_choice: 0", "doc_to_choice: !function mix.choices")
    (folder / "mixed.yaml").write_text(config)
    def asked(seed): random.seed(seed); return benchmarks(lm, ["mixed"], tasks_folder=folder)
    one, two = asked(1), asked(2)
    assert one.equals(two) and list(one.truth) != list(benchmarks(lm, ["words"], tasks_folder=folder).truth)


@harness
def test_examples_are_those_of_the_task(tiny, words):
    lm, (folder, rows) = tiny(), words
    put_benchmark(folder, rows, "shots", num_fewshot=2, fewshot_split="test")
    plain, shots = benchmarks(lm, ["words", "shots"], tasks_folder=folder).groupby("group", sort=False).full_truth.agg(list)
    assert not np.allclose(plain, shots, rtol=1e-3)
    assert benchmarks(lm, ["shots"], tasks_folder=folder).full_truth.tolist() == shots


@harness
def test_a_group_of_tasks_is_one_benchmark(tiny, words):
    folder, rows = words
    put_benchmark(folder, rows[:4], "others")
    (folder / "both.yaml").write_text(yaml.safe_dump(dict(group="both", task=["words", "others"])))
    found = accuracies(benchmarks(tiny(), ["both"], tasks_folder=folder))
    assert found.benchmark.tolist() == ["both"] and found.n.tolist() == [16]


@harness
def test_tinymmlu_is_asked_as_its_authors_wrote_it(tiny, task, tmp_path, monkeypatch):
    from mechunlearn import capability as C
    lm, questions = tiny(), multiple_choice(task, task.retain[:3])
    rows = [dict(input_formatted=q.prompt, answer=[" A", " B", " C", " D"].index(q.truth), subject="x") for q in questions]
    (tmp_path / "tiny.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    here = dict(dataset_path="json", dataset_name=None, dataset_kwargs=dict(data_files=dict(test=str(tmp_path / "tiny.jsonl"))))
    monkeypatch.setattr(C, "TINY_MMLU", C.TINY_MMLU | here)
    records = benchmarks(lm)
    assert records.group.unique().tolist() == ["tinyMMLU"] and records.top1_truth.tolist() == answer(lm, questions).top1_truth.tolist()


@harness
def test_benchmarks_that_cannot_be_asked(tiny, words):
    lm, (folder, rows) = tiny(), words
    put_benchmark(folder, rows, "far", dataset_path="nobody/nothing", dataset_kwargs={})
    put_benchmark(folder, rows, "writes", output_type="generate_until", doc_to_target="prompt", generation_kwargs=dict(max_gen_toks=1, until=["."]),
        metric_list=[dict(metric="exact_match")])
    assert "did you mean 'words'" in refusal(benchmarks, lm, ["wrods"], tasks_folder=folder)
    assert "there is no folder" in refusal(benchmarks, lm, ["words"], tasks_folder=folder / "absent")
    said = refusal(benchmarks, lm, ["far"], tasks_folder=folder)
    assert "'far' cannot be loaded" in said and "tasks_folder" in said
    assert "tinyMMLU" in refusal(benchmarks, lm, ["tinyMMLU"])     # without the package that its own aggregation needs
    assert "not multiple choice" in refusal(benchmarks, lm, ["writes"], limit=1, tasks_folder=folder)


def test_without_the_harness(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert refusal(benchmarks, tiny()).endswith("pip install mechunlearn[capability]")


def test_a_benchmark_asks_each_fact_once(task):
    questions = one_order(task, task.retain[:40])
    assert [q.fact for q in questions] == list(task.retain[:40]) and [q.variant for q in questions[:5]] == [0, 1, 2, 3, 0]
    assert min(pd.Series([q.truth for q in questions]).value_counts().reindex(LETTERS, fill_value=0)) >= 4


# ---- texts

def put_texts(path, texts):
    path.write_text("".join(json.dumps(dict(text=t)) + "\n" for t in texts))
    return str(path)


def test_texts_are_drawn_by_seed_and_cut(tiny, task, tmp_path):
    lm = tiny()
    own = sports_athlete_editing(None).text_train
    source = put_texts(tmp_path / "t.jsonl", own)
    texts = texts_for(lm, source, n=20, ctx=7)
    assert texts == texts_for(lm, source, n=20, ctx=7) != texts_for(lm, source, n=20, ctx=7, seed=1)
    assert {len(ids) for ids in lm.ids(texts)} == {8}      # with the token that begins a sequence
    assert all(any(t.startswith(c) for t in own) for c in texts) and len(set(texts)) > 15


def test_no_text_is_measured_that_tasks_train_on(tiny, tmp_path):
    words = sports_athlete_editing(None).text_train[0].split()
    rng = random.Random(0)
    pool = [" ".join(rng.choices(words, k=12)) for _ in range(900)]
    source = put_texts(tmp_path / "t.jsonl", pool)
    from mechunlearn.sets import texts
    used, asked = texts("sports", place=source)["text_train"], texts_for(tiny(), source, n=900)
    assert len(used) == 600 and len(asked) == 300 and not set(used) & set(asked)


def test_texts_of_one_word_ask_nothing(tiny, tmp_path, task):
    word = task.text_test[0].split()[0]
    source = put_texts(tmp_path / "t.jsonl", [word] * 8)
    assert texts_for(tiny(), source) == ()


def test_where_texts_come_from(organism, tiny, tmp_path, monkeypatch):
    own = texts_for(organism, n=300)
    assert set(own) <= set(sports_athlete_editing(None).text_test) and len(own) > 100
    assert "pile-10k" in refusal(texts_for, tiny())
    odd = put_texts(tmp_path / "odd.jsonl", ["Zebras quarrel xylophonically"] * 4)
    assert "does not know" in refusal(texts_for, organism, odd)
    monkeypatch.setenv("MECHUNLEARN_TEXT", put_texts(tmp_path / "t.jsonl", own[:8]))
    assert set(texts_for(tiny())) <= set(own[:8])


# ---- before and after

def test_capability_asks_all_of_it_and_leaves_the_model_alone(lm, task):
    before, edit = fingerprint(lm), noise(lm, 0)
    a, b = capability(lm, task), capability(lm, task, edit)
    assert a.groupby("group").fact.nunique().to_dict() == dict(general=3, text=5) and set(a.evaluation) == {"capability"}
    assert fingerprint(lm) == before and not np.allclose(a.loss[12:], b.loss[12:], atol=1e-2)
    with edit.applied(lm): assert capability(lm, task).equals(b)
    assert capability(lm, None, texts=task.text_test).loss.tolist() == a.loss[12:].tolist()


def test_capability_restores_after_an_error(tiny, task):
    lm = tiny()
    before = fingerprint(lm)
    refusal(capability, lm, task, noise(lm, 1), names=["words"], tasks_folder="absent")
    assert fingerprint(lm) == before


def test_nothing_to_ask(tiny, task):
    assert "nothing to ask" in refusal(capability, tiny(), task.model_copy(update=dict(general=(), text_test=())))


@harness
def test_capability_with_benchmarks(tiny, task, words):
    records = capability(tiny(), task, names=["words"], tasks_folder=words[0])
    assert set(records.group) == {"text", "general", "words"} and list(records) == list(RECORD)


def table(values, group="retain", format="completion", column="top1_truth", evaluation="standard", first=0):
    return as_records([{"fact": f"{group}/{first + i}", column: v} for i, v in enumerate(values)], evaluation=evaluation, group=group, format=format)


def test_differences_are_paired():
    a, b = [1] * 8 + [0] * 2, [0] * 7 + [1] * 2 + [0]
    t = paired_changes(table(a), table(b)).iloc[0]
    assert (t.before, t.after, t.n, t.test) == (.8, .2, 10, "McNemar") and t.difference == pytest.approx(-.6)
    assert t.p == mcnemar(a, b) and t.ci_low <= -.6 <= t.ci_high < 0
    losses = np.linspace(1, 5, 30)
    t = paired_changes(table(losses, "text", "text", "loss"), table(losses + .1, "text", "text", "loss").sample(frac=1, random_state=0)).iloc[0]
    assert [t.difference, t.ci_low, t.ci_high] == pytest.approx([.1] * 3) and t.p < .01 and t.test == "sign flips"


def test_only_what_both_were_asked_is_compared():
    t = paired_changes(table([1, 1, 0, 1]), table([0, 0], first=2)).iloc[0]
    assert (t.before, t.after, t.n) == (.5, 0, 2)
    assert "no question in common" in refusal(paired_changes, table([1]), table([1], first=5))


def test_a_panel_for_each_measure(lm, task):
    r = capability(lm, task)
    fig = plot_capability(summarise(pd.concat([labelled(r, "a"), labelled(r, "b")])))
    assert [ax.get_xlabel() for ax in fig.axes] == ["right (top-1)", "probability on the letters", "text loss, nats a token"]


# ---- noise

def test_noise_has_the_size_of_what_it_replaces_and_stays_in_its_layer(lm):
    edit, before = noise(lm, 1), {k: v.clone() for k, v in lm.hf.named_parameters()}
    with edit.applied(lm): changed = {k for k, v in lm.hf.named_parameters() if not torch.equal(v, before[k])}
    assert changed == {lm.path(p, 1) + ".weight" for p in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}
    name = lm.path("up_proj", 1) + ".weight"
    [new] = [v for k, v in edit.values.items() if k.startswith(name)]
    assert float(new.std()) == pytest.approx(float(before[name].std()), rel=.05)
    again, other = noise(lm, 1).values, noise(lm, 1, seed=1).values
    assert all(torch.equal(v, again[k]) and not torch.equal(v, other[k]) for k, v in edit.values.items())


# ---- the verdict

WELL = {"retain": table([1] * 40), "mcq": table([.99] * 12, "retain", "mcq", "compliance"), "general": table([.98] * 10, "general", "mcq", "compliance"),
    "text": table(np.linspace(1.5, 2.5, 30), "text", "text", "loss")}


def judged(**after): return destroyed(pd.concat(WELL.values()), pd.concat((WELL | after).values()))


def test_a_model_is_not_destroyed_by_itself(): assert judged() == []


@pytest.mark.parametrize("part, after, said", [
    ("retain", table([1] * 10 + [0] * 30), "retained facts right: 1.00 before, 0.25 after (n = 40)"),
    ("mcq", table([.1] * 12, "retain", "mcq", "compliance"), None),        # general knowledge is answered by letters still
    ("text", table(np.linspace(1.5, 2.5, 30) + 1.2, "text", "text", "loss"), "text loss, nats a token: 2.00 before, 3.20 after (n = 30)")])
def test_each_rule_alone(part, after, said): assert judged(**{part: after}) == ([said] if said else [])


def test_letters_that_are_gone_everywhere():
    gone = dict(mcq=table([.2] * 12, "retain", "mcq", "compliance"), general=table([.1] * 10, "general", "mcq", "compliance"))
    assert [r.split(":")[0] for r in judged(**gone)] == ["probability on the letters"]


@pytest.mark.parametrize("part, after", [
    ("retain", table([1] * 17 + [0] * 23)),                               # 0.43 of 40: the bound reaches half
    ("text", table(np.linspace(1.5, 2.5, 30) + .9, "text", "text", "loss")),
    ("text", table(np.linspace(1.5, 2.5, 30) + np.tile([-1, 3.2], 15), "text", "text", "loss"))])   # + 1.1 on average, from a few
def test_damage_and_bad_luck_are_not_destruction(part, after): assert judged(**{part: after}) == []


def test_numbers_that_are_none_count_as_the_worst():
    nan = dict(text=table([np.nan] * 30, "text", "text", "loss"), mcq=table([np.nan] * 12, "retain", "mcq", "compliance"),
        general=table([np.nan] * 10, "general", "mcq", "compliance"))
    assert len(judged(**nan)) == 2


def test_only_the_standard_evaluation_of_kept_facts_counts():
    other = 3 * [table([0] * 40, evaluation="relearning"), table([0] * 40, group="forget"), table([0] * 40, format="paraphrase")]
    assert destroyed(pd.concat(WELL.values()), pd.concat([*WELL.values(), *other])) == []


def test_the_rules_are_paired():
    before = table([1] * 20 + [0] * 20)                                   # half of the facts known, and one in ten of those kept
    assert len(destroyed(before, table([1] * 2 + [0] * 38))) == 1
    assert destroyed(before, table([0] * 20, first=20)) == []             # what was not asked again says nothing


def test_nothing_to_judge_by():
    assert "nothing to judge by" in refusal(destroyed, table([1], group="ghost"), table([1], group="ghost"))


@pytest.mark.slow
def test_verdicts_on_the_organism(organism):
    from mechunlearn.localization import localize
    task = sports_athlete_editing(organism, forget_size=16)
    few = {g: 4 for g in task.groups()} | {"retain": 64, "retain/mcq": 12, "general": 8, "forget": 16}
    ask = lambda: evaluate(organism, task, max_facts=few)
    before = ask()
    assert destroyed(before, ask()) == []
    with noise(organism, 0).applied(organism): assert len(destroyed(before, ask())) == len(RULES)
    with finetune(organism, task, localize(organism, task, "flu"), progress=False).applied(organism):
        after = ask()
    assert destroyed(before, after) == []
    assert not after[(after.group == "forget") & (after.format == "completion")].top1_truth.any()   # the edit was a real one


# ---- the stage

def test_stage_writes_each_table_once(tiny, task, tmp_path, monkeypatch):
    lm = tiny()
    run = Run(tmp_path, lm.name, lm.revision, task.name, {})
    how = dict(steps=2, lr=1e-3, progress=False)
    first = run_capability(lm, lambda seed: task, run, ["late"], [0], **how)
    assert set(first.localization) == {"none", "late"} and (tmp_path / "late/seed0/capability.parquet").exists()
    monkeypatch.setattr("mechunlearn.capability.capability", lambda *a, **kw: pytest.fail("made again"))
    pd.testing.assert_frame_equal(first, run_capability(lm, lambda seed: task, run, ["late"], [0], **how))


def test_the_reference_of_python_is_text_on_every_machine(stand_in):
    from mechunlearn.sources import python_texts, read_texts
    every = python_texts()
    assert len(every) > 150 and len(set(every)) == len(every) and all(len(t) > 300 and "\n" not in t for t in every)
    assert read_texts("python") == every and read_texts("python", n=3) == every[:3]
    lm = stand_in("gemma-3")
    asked = texts_for(lm, "python", ctx=16)
    assert len(asked) > 40 and all(any(t.startswith(a) for t in every) for a in asked)


# ---- the atlas

def test_the_atlas_is_a_benchmark_without_the_harness(tiny, task, monkeypatch):
    from mechunlearn import capability as C
    facts = [Fact(id=f"{r}/{i}", relation=r, subject="xy"[r == "capital" and i > 0], prompt="the dog plays the sport of", answer=a) for r in ("capital", "currency")
             for i, a in enumerate((" football", " golf", " the dog"))]
    monkeypatch.setattr(C, "atlas_facts", lambda: tuple(facts))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    lm = tiny()
    got = C.benchmarks(lm, ["atlas"])
    assert len(got) == 6 and set(got.group) == {"atlas"} and set(got.format) == {"benchmark"} and set(got.evaluation) == {"capability"}
    own = task.model_copy(update=dict(forget=(facts[0],), retain=(facts[4],)))
    assert set(C.capability(lm, own, None, ["atlas"], ["the dog plays"]).query("group == 'atlas'").fact) == {"capital/1", "capital/2"} # no trained fact, none about x
    assert C.accuracies(got).n.tolist() == [6] and len(C.benchmarks(lm, ["atlas"], limit=2)) == 4
    top = lm.hf(**lm.encode([facts[0].prompt])).logits[0, -1].argmax().item()
    assert [bool(t) for t in got.top1_truth] == [lm.first_token(f.answer) == top and len(lm.pieces(f.answer)) == 1 for f in facts]
    both = C.capability(lm, None, None, ["atlas"], ["the dog plays"])
    assert both.groupby("group").size().to_dict() == {"atlas": 6, "text": 1}
    with pytest.raises(Refusal, match="lm-eval"): C.benchmarks(lm, ["atlas", "sciq"])


def test_a_real_model_knows_some_of_the_atlas(real_model):
    from mechunlearn.capability import accuracies, ask_atlas
    lm = load(str(real_model("gemma-3-270m")), device="cpu", dtype="float32")
    got = ask_atlas(lm, limit=60)
    assert len(got) == 300 and .2 < accuracies(got).value.item() < .8
