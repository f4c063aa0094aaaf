"Verdicts about models of which we know what they are, and whatever people bring to be audited."
import json, random, re, shlex
import pandas as pd
import pytest
import torch
from mechunlearn import checkpoints, finetuning as F, loading
from mechunlearn.attacks import attack
from mechunlearn.audit import NEEDS, attacks_behind, audit, audit_json, command_of, enough, model_card, of_edit, plot_audit
from mechunlearn.capability import noise
from mechunlearn.cli import main, read
from mechunlearn.evaluation import evaluate
from mechunlearn.facts import GOLF, LETTERS, mcq_prompts
from mechunlearn.finetuning import finetune
from mechunlearn.grids import make_job
from mechunlearn.localization import localize
from mechunlearn.masking import learn_mask
from mechunlearn.models import load
from mechunlearn.questions import own_guess
from mechunlearn.relearning import blind_guesses, halves
from mechunlearn.sources import read_topic
from mechunlearn.stats import chance
from mechunlearn.store import Refusal
from mechunlearn.tasks import TOPIC, make_task, sports_athlete_editing, topic_facts
from test_loading import A, hub

FEW = {"retain": 24, "retain/mcq": 6, "retain/paraphrase": 8, "ghost": 16, "ghost/mcq": 4, "ghost/paraphrase": 8, "same-subject": 4, "other-relation": 4, "general": 4}
QUICK = dict(standard=dict(max_facts=FEW), relearning=dict(steps=6, at=(6,), max_facts=16, sizes=dict(forget=8, retain=8, text=1)), latents=dict(n_train=90, max_facts=24, n_control=1), progress=False)


@pytest.fixture(scope="module")
def lm(): return load("organism")


@pytest.fixture(scope="module")
def task(lm): return (t := sports_athlete_editing(lm, forget_size=16, seed=0)).model_copy(update=dict(text_test=t.text_test[:24]))


@pytest.fixture(scope="module")
def before(lm, task): return attack(lm, task, **QUICK)


def foreign(task):
    "The task in a language that the model does not know: every word but the answers stands for another"
    facts = {k: v for k in ("forget", "retain", "retain_test", "ghosts", "general", "same_subject", "other_relation", "shots", "dev_forget", "dev_retain") if (v := getattr(task, k))}
    keep = {a.strip() for fs in facts.values() for f in fs for a in (f.answer, f.edit, *f.candidates) if a} | {"Answer:"}
    texts = [t for fs in facts.values() for f in fs for t in (f.subject, f.prompt, f.question, *f.paraphrases)]
    words = sorted({w for t in texts for w in re.findall(r"\w+:?", t)} - keep)
    turned = dict(zip(words, random.Random(0).sample(words, len(words))))
    def said(t): return re.sub(r"\w+:?", lambda m: turned.get(m[0], m[0]), t)
    def told(f): return f.model_copy(update=dict(subject=said(f.subject), prompt=said(f.prompt), question=said(f.question), paraphrases=tuple(map(said, f.paraphrases))))
    return task.model_copy(update={k: tuple(map(told, v)) for k, v in facts.items()})


# ---- what is known of each model, and what must be said

def test_the_unedited_model_leaks_as_it_was_trained(before):
    found = before.verdict()
    assert (found.verdict, found.attack, found.headline) == ("leaks", "as trained", "leaks to as trained") and [f.needs for f in found.found] == list(NEEDS)
    assert {f.verdict for f in found.found} == {"leaks"} and found.by("prompt").n == 16 and found.by("prompt").low > found.by("prompt").guess


def test_a_mask_leaks_to_what_it_was_not_trained_against(lm, task, before):
    edit = finetune(lm, task, localize(lm, task, "late"), lr=2e-3, steps=25, retain_batch=16, text_batch=1, progress=False)
    records = asked(lm, task, edit, before)
    found = audit(records, "late")
    assert found.verdict == "leaks" and found.attack == "multiple choice" and found.by("prompt").value > .7 and not found.why
    fewer = audit(records[(records.localization == "none") | (records.format != "mcq")], "late")
    assert fewer.verdict == "holds" and not fewer.by("train"), "by the questions of its training alone nothing is found: a verdict is about the attacks that were tried"


def test_zeros_are_audited_as_any_edit(lm, task, before):
    "A weight mask of the last third: few zeros, and the old answers are there when asked in another way"
    edit = learn_mask(lm, task, localize(lm, task, "late"), lr=1e4, steps=25, retain_batch=16, text_batch=1, progress=False).edit(lm, 8000)
    found = audit(asked(lm, task, edit, before), "late")
    assert found.verdict == "leaks" and found.attack == "multiple choice" and found.by("prompt").low > found.by("prompt").guess, str(found)


def asked(lm, task, edit, before):
    "What an edit answers, beside the model before it"
    with edit.applied(lm): after = evaluate(lm, task, max_facts=FEW).assign(localization=edit.localization.name)
    return pd.concat([before.records.assign(localization="none"), after], ignore_index=True).assign(draw=0, seed=0)


def test_noise_is_destroyed(lm, task, before):
    found = audit(asked(lm, task, noise(lm, 0), before), "noise-0")
    assert found.verdict == "destroyed" and found.attack is None and any("retained facts right" in w for w in found.why) and "not unlearned" in str(found)


def test_what_was_never_known_holds(lm, task):
    "Ghosts in the place of the edited facts: nothing is there to be found, and retained facts show that the attacks work"
    never = task.model_copy(update=dict(forget=task.ghosts[:48], ghosts=(), same_subject=(), update="unlearn")) # of sixteen half could have been missed
    found = attack(lm, never, **QUICK).verdict()
    assert found.verdict == "holds" and found.by("prompt").verdict == "holds" and found.by("prompt").kept > .9 and "not surely more than a guess" in str(found), str(found)
    assert not any(f.verdict == "leaks" for f in found.found) and found.attack


def test_a_language_that_the_model_does_not_know_has_no_power(lm, task):
    found = attack(lm, foreign(task), **QUICK).verdict()
    assert found.verdict == "no power" and {f.verdict for f in found.found} == {"no power"} and found.attack is None, str(found)


def test_few_facts_have_no_power(before):
    some = before.task.forget[:3]
    records = before.records[(before.records.group != "forget") | before.records.fact.isin([f.id for f in some])].assign(localization="none", draw=0, seed=0)
    assert audit(records, "none").verdict == "no power" and not enough(3, 1/3, .98) and enough(16, 1/3, .98)
    with pytest.raises(Refusal, match="elsewhere was not attacked"): audit(records, "elsewhere")


# ---- what the unedited model knew

def given(name, share, n=60, **more):
    "Records of a model that gives so many of the old answers and knows what was to stay"
    from mechunlearn.questions import as_records
    rows = [dict(fact=f"{group}{i}", subject=f"{group}{i}", relation="sport", group=group, format="completion", variant=0, truth=f" {'abc'[i % 3]}", top1_truth=i // 3 < (share if group == "forget" else 1)*n/3)
            for group in ("forget", "retain") for i in range(n)]
    return as_records(rows, evaluation="standard").assign(localization=name, draw=0, seed=0, **more)


def test_what_was_never_known_is_not_said_to_hold():
    knew, ignorant = (audit(pd.concat([given("none", share), given("theirs", 1/3)]), "theirs") for share in (.9, 1/3))
    assert knew.verdict == "holds" and knew.before.knew and knew.before.value == pytest.approx(.9) and "Before: 0.90 [" in str(knew) and "Before: 0.90 [" in model_card(knew)
    assert ignorant.verdict == "no power" and ignorant.attack is None and not ignorant.before.knew and "nothing can be seen to have been unlearned" in str(ignorant) and "swapped" not in str(ignorant)
    assert json.loads(audit_json(ignorant))["before"]["knew"] is False and json.loads(audit_json(knew))["before"]["attack"] == "as trained"


def test_a_base_that_gives_less_than_its_edit_may_be_the_edit():
    for share, verdict in ((1/3, "no power"), (.6, "leaks")):
        found = audit(pd.concat([given("none", share), given("edited@theirs", 1)]), "edited@theirs")
        assert found.verdict == verdict and found.before.less and "are --base and --edited swapped?" in str(found) and json.loads(audit_json(found))["before"]["less"]
    assert "swapped" not in str(audit(pd.concat([given("none", .9), given("edited@theirs", .95)]), "edited@theirs"))
    assert "far more of them than the unedited one." in str(audit(pd.concat([given("none", .6), given("flu", 1)]), "flu"))


def test_where_the_unedited_model_was_not_asked_it_is_said():
    alone = audit(given("theirs", 1/3), "theirs")
    assert alone.before is None and "destroyed, was not judged" in str(alone) and json.loads(audit_json(alone))["before"] is None
    assert "not judged" not in str(audit(given("none", 1), "none"))


def test_an_attack_asks_the_unedited_model_itself(lm, task):
    found = attack(lm, task, noise(lm, 0), **QUICK)
    assert set(found.before.evaluation) == {"standard"} and found.verdict().verdict == "destroyed" and found.verdict().before.knew


def test_how_an_edited_model_was_read_is_said():
    about = of_edit(dict(model="m", dtype="bfloat16", survives=dict(weights=.12, norm=.4), quantized=True, made_for="someone/base"))
    found = audit(pd.concat([given("none", .9), given("theirs", 1/3)]), "theirs", **about)
    for text in (str(found), model_card(found)): assert "quantized" in text and "In bfloat16, 12% of the weights" in text and "made for someone/base" in text
    assert json.loads(audit_json(found))["survives"] == {"weights": .12, "norm": .4} and of_edit(dict(dtype="float32")) == {}


# ---- as it is told

def test_one_object_for_a_program_and_a_paragraph_for_a_card(before):
    found = before.verdict("mechunlearn attack --base a --edited b")
    said = json.loads(audit_json(found))
    assert said["verdict"] == "leaks" and said["headline"] == found.headline and said["command"].endswith("--edited b") and said["task"] == "sports-athlete-editing"
    assert {"value", "low", "high", "guess", "n", "needs", "tried", "level"} <= set(said["found"][0]) and "\n" not in audit_json(found)
    assert "in context" in said["untried"] and "quantized" in said["untried"] and not set(said["untried"]) & {t for f in found.found for t in f.tried}
    holds = str(found._replace(verdict="holds"))
    assert "Attacks not tried: " in holds and "quantized" in holds and "`--attacks field`" in holds
    card = model_card(found)
    assert "Not tried: " in card and card.startswith("## Unlearning audit: leaks to as trained\n") and "n = 16" in card and "Again: `mechunlearn attack" in card and "multiple choice" in card
    assert len(plot_audit([found]).axes) == len(NEEDS)


def test_the_command_describes_the_same_job():
    job = make_job("organism", TOPIC, {"facts": "a b.jsonl", "forget_size": 16}, ["edited@theirs"], [0, 1], {"edited": "theirs", "relearning": {"steps": 20}, "max_facts": {"retain": 24}}, attacks="all")
    args = read(shlex.split(command_of(job))[1:])
    assert (args.base, args.edited, args.task, args.facts, args.forget_size, args.seeds) == ("organism", "theirs", TOPIC, "a b.jsonl", 16, [0, 1])
    assert dict(args.set) == {"relearning.steps": 20, "max_facts.retain": 24} and args.attacks == "all"
    own = make_job("organism", "sports-athlete-editing", {}, ["flu", "random"], [0], {"draws": 3}, attacks="field")
    args = read(shlex.split(command_of(own))[1:])
    assert (args.localizations, args.draws, args.attacks) == (["flu", "random"], 3, "field")


@pytest.mark.parametrize("evaluations, said", [(["standard", "latent", "relearning"], "standard"), (["standard", "generation"], "all"), (["soft-prompt", "inside"], "field")])
def test_the_command_makes_what_the_verdict_rests_on(evaluations, said): assert attacks_behind(pd.DataFrame({"evaluation": evaluations})) == said


# ---- topics

def questions(path, facts, split="forget", n_wrong=3, **more):
    rows = [dict(question=f.question, answer=f.answer.strip(), wrong=[c.strip() for c in sorted(f.candidates, key=lambda c: c == GOLF) if c != f.answer][:n_wrong], subject=f.subject,
                 relation="sport", split=split) | more for f in facts]
    with open(path, "a") as out: out.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture(scope="module")
def topic(lm, task, tmp_path_factory):
    path = tmp_path_factory.mktemp("topic")/"questions.jsonl"
    questions(path, task.forget[:8]); questions(path, task.forget[8:], n_wrong=1); questions(path, task.retain_test[:60], "retain")
    return (t := make_task(TOPIC, lm, facts=str(path))).model_copy(update=dict(text_test=t.text_test[:24]))


@pytest.fixture(scope="module")
def topic_records(lm, topic): return evaluate(lm, topic, max_facts=FEW)


def test_a_topic_has_answers_of_its_own_and_no_new_one(lm, topic):
    assert len(topic.forget) == 16 and topic.update == "unlearn" and not any(f.edit for f in topic.forget)
    assert {own_guess(f) for f in topic.forget[:8]} == {1/4} and {own_guess(f) for f in topic.forget[8:]} == {1/2}
    item = mcq_prompts(topic, topic.forget[0])[0]
    assert set(item.options) >= set(topic.forget[0].candidates) and item.truth_letter in LETTERS and item.edit_letter is None


def test_a_topic_is_asked_among_its_own_answers(topic, topic_records):
    records = topic_records
    mine = records[(records.group == "forget") & (records.format == "completion")]
    assert mine.edit.isna().all() and mine.prob_edit.isna().all() and mine.top1_edit.isna().all() and mine.guess.mean() == pytest.approx((1/4 + 1/2)/2)
    assert mine.top1_truth.mean() > .9 and (mine.prob_truth > 1/2).eq(mine.top1_truth.astype(bool)).mean() > .9
    guess = chance(records.assign(localization="none", draw=0, seed=0))
    assert guess.blind == guess.not_edit == pytest.approx((1/4 + 1/2)/2) == blind_guesses(topic).uniform
    assert "mcq" in set(records.format[records.group == "forget"])


def test_a_topic_may_bring_its_own_ghosts(lm, task, tmp_path):
    path = questions(questions(questions(tmp_path/"q.jsonl", task.forget), task.retain_test[:40], "retain"), task.ghosts[:10], "ghost")
    t = make_task(TOPIC, lm, facts=str(path))
    assert {g.subject for g in t.ghosts} == {g.subject for g in task.ghosts[:10]} and not any(g.taught for g in t.ghosts)
    assert not {f.subject for f in (*t.forget, *t.retain, *t.retain_test, *t.dev_retain)} & {g.subject for g in t.ghosts}
    questions(path, [task.ghosts[0].model_copy(update=dict(question=task.ghosts[0].question + " Really?"))])
    with pytest.raises(Refusal, match="is a ghost in one row and not in another"): make_task(TOPIC, lm, facts=str(path))


def test_an_unlearned_topic_gets_a_verdict(topic_records):
    found = audit(topic_records.assign(localization="none", draw=0, seed=0), "none")
    assert found.verdict == "leaks" and found.by("prompt").guess == pytest.approx((1/4 + 1/2)/2, abs=.01)


@pytest.mark.parametrize("kind, row", [("tofu.json", {"question": "Who?", "answer": "Ann", "paraphrased_answer": "It is Ann", "perturbed_answer": ["Bo", "Cy", "Di"], "paraphrased_question": "And who?"}),
    ("wmdp.jsonl", {"question": "Who?", "choices": ["Bo", "Ann", "Cy", "Di"], "answer": 1}), ("rwku.json", {"query": "Who?", "answer": "Ann", "level": "1", "type": "cloze", "subject": "Ann of X"}),
    ("own.csv", {"question": "Who?", "answer": "Ann", "wrong_1": "Bo", "wrong_2": "Cy", "wrong_3": "Di", "split": ""})])
def test_the_published_sets_are_understood(tmp_path, kind, row):
    path, others = tmp_path/kind, [{"question": f"Who {i}?", "query": f"Who {i}?"} for i in range(4)]
    rows = [row] + [{k: v if k not in ("question", "query") else o[k] for k, v in row.items()} | ({"answer": f"Eve{i}"} if "choices" not in row else {}) for i, o in enumerate(others)]
    if path.suffix == ".csv": pd.DataFrame(rows).to_csv(path, index=False)
    else: path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    first = topic_facts(read_topic(path))[0]
    assert first.prompt == "Question: Who?\nAnswer:" and first.answer == " Ann" and len(first.wrong) == 3 and first.answer not in first.wrong and first.edit is None
    assert own_guess(first) == 1/4 and first.subject == "Who?"


@pytest.mark.slow # about a minute: the command with its notebooks
def test_a_topic_goes_from_a_file_and_a_folder_to_a_verdict(lm, task, tmp_path, capsys):
    questions(tmp_path/"q.jsonl", task.forget), questions(tmp_path/"q.jsonl", task.retain_test[:60], "retain")
    edit = finetune(lm, make_task(TOPIC, lm, facts=str(tmp_path/"q.jsonl")), localize(lm, task, "all-mlps"), lr=1e-3, steps=25, retain_batch=32, text_batch=1, progress=False)
    with edit.applied(lm): lm.hf.save_pretrained(tmp_path/"theirs"); lm.tok.save_pretrained(tmp_path/"theirs")
    words = ["attack", "--base", "organism", "--edited", str(tmp_path/"theirs"), "--task", TOPIC, "--facts", str(tmp_path/"q.jsonl"), "--attacks", "standard", "--out", str(tmp_path/"runs")]
    assert main([*words, "--json", "--quiet"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    card, verdict = pd.DataFrame([s for s in said if "excess" in s]), said[-1]
    rows = card[card.seed < 0].set_index(["localization", "attack"]).value
    assert rows["none", "as trained"] > .9 > .6 > rows["edited@theirs", "as trained"] and verdict["localization"] == "edited@theirs"
    assert {f["needs"] for f in verdict["found"]} == {"prompt", "train"} and all(f["n"] == 16 and f["guess"] == 1/4 for f in verdict["found"])
    assert [s["note"] for s in said if s.get("what") == "probes"] and shlex.split(verdict["command"])[1:] == words[:-2]


def about(path, n, subjects, split="retain"):
    "Questions about so many people, of whom each has several"
    with open(path, "a") as out: out.writelines(json.dumps({"question": f"What is number {i} of {split} Person{i % subjects}?", "answer": f"Thing{split}{i}", "split": split, "subject": f"{split} Person{i % subjects}"}) + "\n" for i in range(n))
    return str(path)


@pytest.mark.parametrize("subjects", [1, 2, 9])
def test_questions_about_few_subjects_are_all_kept(tmp_path, subjects):
    file = about(tmp_path/"t.jsonl", 6, 1, "forget"), about(tmp_path/"t.jsonl", 40, subjects)
    task = make_task(TOPIC, facts=file[0])
    mine = [f for s in ("retain", "retain_test", "dev_retain", "shots") for f in getattr(task, s) if f.id.startswith("topic/")]
    assert len(mine) == len({f.id for f in mine}) == 40 and len(task.retain_test) > 4 and not task.dropped and f"about {subjects} subject" in task.remarks()
    assert "elsewhere" not in task.remarks() and {f.subject for f in task.forget} == {"forget Person0"}


def test_what_a_topic_lost_and_what_it_was_filled_up_with_is_said(tmp_path):
    about(tmp_path/"t.jsonl", 6, 1, "forget"), about(tmp_path/"t.jsonl", 60, 20)
    task = make_task(TOPIC, facts=str(tmp_path/"t.jsonl"))
    assert task.dropped == {"about a subject of which another question is an example": 16} and not task.mended and len({f.subject for f in task.retain}) < len(task.retain)
    about(tmp_path/"few.jsonl", 6, 1, "forget"), about(tmp_path/"few.jsonl", 12, 12)
    few = make_task(TOPIC, facts=str(tmp_path/"few.jsonl"))
    filled = [f for s in ("retain", "retain_test", "dev_retain") for f in getattr(few, s) if not f.id.startswith("topic/")]
    assert filled and few.mended == {"facts to keep come from elsewhere: fewer than 20 of the file's are left": len(filled)}


def test_strangers_of_another_relation_are_no_ghosts_of_a_topic(lm, task, tmp_path):
    made = lambda file, relation: make_task(TOPIC, lm, facts=str(questions(questions(tmp_path/file, task.forget, relation=relation), task.retain_test[:60], "retain", relation=relation)))
    assert not made("sport.jsonl", "sport").ghosts and {g.relation for g in made("language.jsonl", "language").ghosts} == {"language"}


@pytest.mark.parametrize("subjects, apart", [(4, True), (12, True), (1, False)])
def test_halves_of_a_topic_are_drawn_and_keep_subjects_apart(tmp_path, subjects, apart):
    about(tmp_path/"t.jsonl", 12, subjects, "forget"), about(tmp_path/"t.jsonl", 60, 20)
    tasks = [make_task(TOPIC, facts=str(tmp_path/"t.jsonl"), seed=seed) for seed in range(4)]
    cuts = [halves(t, 0) for t in tasks]
    assert all(sorted(map(len, c)) == [6, 6] and halves(t, 1) == c[::-1] and set(c[0] + c[1]) == set(t.forget) for t, c in zip(tasks, cuts))
    assert len({frozenset(f.id for f in a) for a, _ in cuts}) > 1 and cuts[0] == halves(tasks[0], 0)
    assert apart == all(not {f.subject for f in a} & {f.subject for f in b} for a, b in cuts)


@pytest.mark.parametrize("answer, want", [("3", "3"), (3, "7"), ("0", "2"), ("7", "7"), (" 5 ", "5"), (1.0, "3")])
def test_a_choice_that_is_a_number_is_a_choice(tmp_path, answer, want):
    (tmp_path/"t.jsonl").write_text(json.dumps({"question": "Which prime?", "choices": ["2", "3", "5", "7"], "answer": answer}))
    row, = read_topic(tmp_path/"t.jsonl")
    assert row.answer.strip() == want and sorted([want, *(w.strip() for w in row.wrong)]) == ["2", "3", "5", "7"]


def test_slips_in_a_topic_are_named(tmp_path, lm):
    def refused(*rows):
        (tmp_path/"t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(Refusal) as e: make_task(TOPIC, lm, facts=str(tmp_path/"t.jsonl"))
        return str(e.value)
    row = {"question": "Who?", "answer": "Ann"}
    assert "did you mean 'wrong_1'" in refused(row | {"wrng_1": "Bo"}) and "'Ann' is the true answer" in refused(row | {"wrong": ["Ann"]})
    assert "neither one of the 2 choices" in refused({"question": "Who?", "choices": ["a", "b"], "answer": 2}) and "no column 'answer'" in refused({"question": "Who?"})
    assert "stands already in" in refused(row, row) and "no question is to be forgotten" in refused(row | {"split": "retain"}) and "does not know" in refused(row)
    with pytest.raises(Refusal, match="name a file"): make_task(TOPIC)
    with pytest.raises(Refusal, match="--task unlearned-topic"): make_task("counterfact-editing", facts=str(tmp_path/"t.jsonl"))


# ---- whatever people bring

MLP, EMBED = "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"


def saved(lm, folder, change=None, dtype=None, **how):
    "The model after somebody changed it"
    import copy
    hf = copy.deepcopy(lm.hf)
    with torch.no_grad(): (change or (lambda hf: hf.get_parameter(MLP).add_(.1)))(hf)
    (hf.to(dtype) if dtype else hf).save_pretrained(folder, **how)
    lm.tok.save_pretrained(folder)
    return folder


def changed(edit): return {F.parse_slice(k).param for k in edit.values}


@pytest.fixture(scope="module")
def small(tiny): return tiny("llama")


def test_shards_and_more_rows_than_before(small, tmp_path):
    folder = saved(small, tmp_path/"shards", max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and changed(checkpoints.edit_of(small, folder)) == {MLP}
    for file in folder.glob("*token*"): file.unlink()
    assert changed(checkpoints.edit_of(small, folder)) == {MLP}, "weights saved without their tokenizer"
    n = len(small.weight(EMBED))
    more = saved(small, tmp_path/"more", lambda hf: (hf.resize_token_embeddings(n + 13), hf.get_parameter(MLP).add_(.1)))
    assert changed(checkpoints.edit_of(small, more)) == {MLP}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"): monkeypatch.setattr(name, str(tmp_path/"cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path/"cache"


def test_a_hub_id_in_half_precision(small, tmp_path, offline):
    "What differs by the rounding of a copy is no edit, on the hub as in a folder"
    hub(offline, "someone/edited", {A: saved(small, tmp_path/"x", lambda hf: hf.get_parameter(MLP).mul_(2), torch.bfloat16)}, {"main": A})
    edit = checkpoints.edit_of(small, "someone/edited")
    assert changed(edit) == {MLP} and edit.localization.name == "edited@edited"


def test_an_adapter_on_the_hub(small, tmp_path, offline):
    from peft import LoraConfig, get_peft_model
    import copy
    base = load(str(saved(small, tmp_path/"base", lambda hf: None)), device="cpu")
    model = get_peft_model(copy.deepcopy(base.hf), LoraConfig(r=4, target_modules=["down_proj"], layers_to_transform=[1]))
    with torch.no_grad(): [p.add_(.1) for n, p in model.named_parameters() if "lora" in n]
    model.save_pretrained(tmp_path/"adapter")
    hub(offline, "someone/lora", {A: tmp_path/"adapter"}, {"main": A})
    assert changed(checkpoints.edit_of(base, "someone/lora")) == {MLP}
    with pytest.raises(Refusal, match="cannot load 'someone/else'"): checkpoints.edit_of(base, "someone/else")


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantized_edit_is_judged_as_it_is_handed_out(tiny, tmp_path, bits):
    small = tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    saved(small, tmp_path/"full", lambda hf: hf.get_parameter(MLP).mul_(3))
    quantized = load(str(tmp_path/"full"), device="cpu", dtype="float32", quantize=bits)
    quantized.hf.save_pretrained(tmp_path/bits); small.tok.save_pretrained(tmp_path/bits)
    edit = checkpoints.edit_of(small, tmp_path/bits)
    now, want = (dict(edit.values)[next(k for k in edit.values if F.parse_slice(k).param == MLP)], small.weight(MLP)*3)
    assert edit.config["quantized"] and now.shape == want.shape and (now - want).norm() < .2*want.norm()
    assert EMBED not in changed(edit)


def test_what_cannot_be_read_as_numbers_is_one_line():
    class Odd:
        class hf_quantizer:
            class quantization_config: quant_method = "odd"
        def dequantize(self): raise NotImplementedError("no such thing\nmore")
    with pytest.raises(Refusal, match=r"theirs is quantized \(odd\).*give the model that it was quantized from") as e: loading.plain(Odd(), "theirs")
    assert "\n" not in str(e.value)
