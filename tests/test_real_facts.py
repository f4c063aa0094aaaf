"Real tables and odd ones: what is drawn from them, what real tokenizers take, and what is said of a file that cannot be read."
import gzip, json, os, random, time
from collections import Counter
from functools import lru_cache
from pathlib import Path
import datasets, pandas as pd, pytest, torch
from mechunlearn import sources, tasks
from mechunlearn.facts import EDITED, GOLF, Fact, askable, mcq_options, seeded, sports_facts, world_facts
from mechunlearn.sets import NO_SUBJECT, check_task, in_proportion, of_each, quarter_of_each, split_retain, without
from mechunlearn import sets as sets_module
from mechunlearn.sets import probabilities
from mechunlearn.models import DATA, wrap
from mechunlearn.store import Refusal
from mechunlearn.tasks import BEGINS, SAME, TRIMMED, TWICE, by_turns, counterfact_sets, fit_for, make_task, with_neighbors

EDITING, FULL, UNLEARN = "sports-athlete-editing", "full-sports-editing", "sports-unlearning"
CF, SEQ, SCALE = "counterfact-editing", "sequential-counterfact-editing", "counterfact-at-scale"
REFDATA = os.environ.get("MECHUNLEARN_REFDATA")
real = pytest.mark.skipif(not REFDATA, reason="MECHUNLEARN_REFDATA does not point to a folder with the real tables")


# ---- dev facts look like the table

def table(path, **counts):
    rows = [(f"Aa{chr(97 + i % 26)} Bb{chr(97 + i // 26)}{sport}", sport) for sport, n in counts.items() for i in range(n)]
    pd.DataFrame(rows, columns=["athlete", "sport"]).to_csv(path, index=False)
    return str(path)


def off(part, whole):
    "By how many facts an answer's count differs most from its share of the whole"
    a, b = (Counter(f.answer for f in x) for x in (part, whole))
    return max(abs(a[k] - len(part) * b[k] / b.total()) for k in b)


def fair(facts, size):
    whole = [f for f in sports_facts(facts) if f.answer != GOLF]
    tasks = [make_task(EDITING, forget_size=size, seed=s, facts=facts) for s in (0, 1)]
    dev = tasks[0].dev_forget
    assert dev == tasks[1].dev_forget and tasks[0].dev_retain == tasks[1].dev_retain and tasks[0].forget != tasks[1].forget
    assert len(dev) > 0 and off(dev, whole) <= 1 and off(dev[:16], whole) <= 1
    return tasks[0]


@real
@pytest.mark.parametrize("size, shares", [(16, {6, 5}), (64, {24, 20})])
def test_dev_facts_of_the_published_table(size, shares):
    task = fair("sports", size)
    assert set(Counter(f.answer for f in task.dev_forget).values()) == shares and len(task.dev_forget) == size
    assert Counter(f.answer for f in task.dev_retain) == {" football": 20, " basketball": 20, " baseball": 20}
    assert make_task(EDITING, forget_size=64, facts="sports").dev_forget[:16] == make_task(EDITING, forget_size=16, facts="sports").dev_forget


@pytest.mark.parametrize("counts", [dict(football=50, baseball=50, basketball=50), dict(football=200, baseball=70, basketball=30, golf=12),
    dict(football=40, baseball=20, basketball=20), dict(basketball=400, football=90, baseball=110), dict(football=60, baseball=60)])
def test_dev_facts_of_other_tables(tmp_path, counts):
    for size in (4, 16, 20):
        task = fair(table(tmp_path / "t.csv", **counts), size)
        left = Counter(f.answer for f in task.retain + task.retain_test + task.forget)
        assert all(left[f" {s}"] for s in counts if s != "golf") and not left[GOLF]


def test_dev_facts_of_the_world_are_the_recorded_ones():
    tasks = [make_task(EDITING, forget_size=n) for n in (16, 64)]
    assert [f.id for f in tasks[0].dev_forget[:4]] == ['sport/0108', 'sport/0539', 'sport/0216', 'sport/0239'] and tasks[1].dev_forget[:16] == tasks[0].dev_forget
    assert all(f.mcq_trained for f in tasks[0].dev_retain) and not any(f.mcq_trained for f in tasks[0].dev_forget)
    held = [f for f in world_facts() if f.relation == "sport" and f.taught and not f.mcq_trained and f.answer != GOLF]
    assert off(tasks[1].dev_forget, held) < 8 and off(tasks[0].dev_forget, held) < 5 # a plain random draw


@pytest.mark.parametrize("name", [FULL, UNLEARN])
def test_dev_facts_of_a_whole_sport(tmp_path, name):
    task = make_task(name, sport="football", facts=table(tmp_path / "t.csv", football=60, baseball=40, basketball=24))
    assert {f.answer for f in task.dev_forget} == {" football"}
    for part in (task.dev_retain, task.retain, task.retain_test): assert {f.answer for f in part} == {" baseball", " basketball"}


# ---- real tokenizers, whole tables

NAMES = ("llama-3", "gemma", "qwen3", "gemma-3")
def quick(*some): return pytest.mark.parametrize("name", [n if n in some else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])


@pytest.fixture(scope="session")
def reader(stand_in):
    "Function: one stand-in of each real tokenizer."
    return lru_cache(None)(stand_in)


@pytest.fixture
def knows(monkeypatch): monkeypatch.setattr(sets_module, "probabilities", lambda lm, facts: [.9] * len(facts))


@real
@quick("llama-3") # by bytes
def test_the_table_of_athletes_is_taken_whole(reader, name):
    lm = reader(name)
    for size in (16, 64):
        for paper in (False, True): assert make_task(EDITING, lm, facts="sports", forget_size=size, paper_split=paper).dropped == {}
    for sport in ("basketball", "football", "baseball"): assert make_task(FULL, lm, facts="sports", sport=sport).dropped == {}


@real
@quick("gemma-3") # by words
def test_counterfact_is_taken(reader, knows, name):
    lm = reader(name)
    for kind, paper in ((CF, False), (SEQ, True)):
        task = make_task(kind, lm, facts="counterfact", paper_split=paper)
        assert len(task.forget) == 64 and sum(task.dropped.values()) - task.dropped[TWICE] <= 5 and check_task(lm, task) is None
    first = make_task(CF, lm, facts="counterfact", target="first")
    assert first.options["target"] == "first" and not any(f.whole for s in EDITED for f in getattr(first, s))


def rome(i, **change):
    row = dict(prompt_id=i, relation_id="P0", subject=f"Ann Lee{i}", prompt=f"Ann Lee{i} was born in", target_true="Rome", target_false="Paris",
               paraphrase_prompts=[f"Oddly, Ann Lee{i} was born in"], neighborhood_prompts=["Bob was born in"])
    return row | change


def jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("name", NAMES)
def test_single_facts_are_left_out_and_counted(reader, knows, tmp_path, name):
    rows = [rome(i) for i in range(160)]
    rows[5] = rome(5, subject="Al", prompt="Algeria's Alan was born in")
    rows[6] = rome(6, target_true="New York", target_false="New York City")
    rows[7] = rome(7, target_true="New York", target_false="New Haven")
    task, first = (make_task(CF, reader(name), facts=jsonl(tmp_path / "f.jsonl", rows), forget_size=16, target=t) for t in ("all", "first"))
    assert task.dropped == {NO_SUBJECT: 1, BEGINS: 1} and first.dropped == {NO_SUBJECT: 1, SAME: 2}
    assert "1 subject cannot be located, 1 one answer begins" in repr(task)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_cannot_be_located_in_a_table_of_athletes(reader, tmp_path, name):
    path = table(tmp_path / "t.csv", football=60, baseball=60, basketball=60)
    with open(path, "a") as f: f.write("ays,football\n") # inside "plays", and nowhere else as a word of its own after it
    task = make_task(EDITING, reader(name), facts=path, forget_size=16)
    assert task.dropped in ({}, {NO_SUBJECT: 1})


def test_nothing_is_asked_of_a_model_without_weights(reader, monkeypatch):
    lm = reader("llama-3")
    monkeypatch.setattr(type(lm), "device", torch.device("meta"))
    monkeypatch.setattr(sets_module, "probabilities", None)
    odd = [Fact(id=str(i), relation="r", subject="Al", prompt=p, answer=" Rome", edit=" Paris") for i, p in enumerate(("Al lives in", "Algeria's Alan lives in"))]
    assert fit_for(lm, odd) == (odd[:1], {NO_SUBJECT: 1})


# ---- answers that begin alike

def own(path, rows):
    pd.DataFrame(rows, columns=["subject", "prompt", "answer", "edit"]).to_csv(path, index=False)
    return str(path)


@pytest.fixture
def alone(monkeypatch):
    "Nothing but the user's own facts."
    for v in ("REFDATA", "COUNTERFACT", "COUNTERFACT_MCQ", "TEXT"): monkeypatch.delenv(f"MECHUNLEARN_{v}", raising=False)
    monkeypatch.setenv("MECHUNLEARN_CACHE", "/nonexistent")


KEPT = [(f"Bob{i} Lee", f"Bob{i} Lee lives in", "Rome", "") for i in range(6)]


@pytest.mark.parametrize("name", NAMES)
def test_own_answers_that_begin_alike(reader, alone, tmp_path, name):
    lm, alike, city = reader(name), ("Ann", "Ann lives in", "Port Laval", "Port Tarsis"), ("Joe", "Joe lives in", "New York City", "New York")
    task = make_task(CF, lm, facts=own(tmp_path / "a.csv", [alike, city, *KEPT]))
    assert [f.subject for f in task.forget] == ["Ann"] and task.forget[0].whole and task.dropped == {BEGINS: 1} and "target" not in task.options
    for rows, target, why in (([alike, *KEPT], "first", "1 same first token"), ([city, *KEPT], "all", "1 one answer begins with the other")):
        with pytest.raises(Refusal, match=why): make_task(CF, lm, facts=own(tmp_path / "b.csv", rows), target=target)
    task = make_task(CF, lm, facts=own(tmp_path / "c.csv", [alike, ("Joe", "Joe lives in", "Oslo", "Paris"), *KEPT]), target="first")
    assert [f.subject for f in task.forget] == ["Joe"] and task.dropped == {SAME: 1} and not task.forget[0].whole
    with pytest.raises(Refusal, match="unknown target 'frist', did you mean 'first'"): make_task(CF, lm, target="frist")


def test_whole_answers_leave_no_trace_in_causes():
    task = make_task(CF, forget_size=4)
    first = make_task(CF, forget_size=4, target="first")
    assert "target" not in task.options and all(f.whole for f in task.forget) and not any(f.whole for f in first.forget + first.retain)
    assert task.causes("forget") != first.causes("forget") and task.causes() != first.causes()


def test_own_facts_without_relation(reader, alone, tmp_path):
    rows = [("Ann", "Ann lives in", "Oslo", "Paris"), ("Joe", "Joe sings in", "French", "Dutch"), ("Sue", "Sue plays the", "flute", "harp"), *KEPT]
    task = make_task(CF, reader("qwen3"), facts=own(tmp_path / "a.csv", rows))
    assert len(task.forget) == 3 and {f.relation for f in task.forget} == {"own"} and task.retain and task.retain_test and not task.dropped
    assert all(len(f.wrong) >= 2 and f.answer not in f.wrong and f.edit not in f.wrong for f in task.forget) and not askable(task, task.forget[0])
    assert make_task(CF, reader("qwen3"), facts=own(tmp_path / "b.csv", rows[:6])).retain


# ---- white space

ODD = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u200b", "\ufeff", "\u2009", "\u3000", " \u200b\n"]


@pytest.mark.parametrize("white", ODD)
def test_white_space_at_the_ends_of_texts(alone, tmp_path, white):
    put = lambda t: white + t + white
    rows = [rome(i) for i in range(160)]
    rows[3] = {k: put(v) if isinstance(v, str) and k != "relation_id" else [put(t) for t in v] if isinstance(v, list) else v for k, v in rome(3).items()}
    clean, odd = (sources.read_counterfact(jsonl(tmp_path / f"{n}.jsonl", r)) for n, r in (("clean", [rome(i) for i in range(160)]), ("odd", rows)))
    assert (clean.attrs["trimmed"], odd.attrs["trimmed"]) == (0, 3) and clean.equals(odd)
    assert make_task(CF, facts=str(tmp_path / "odd.jsonl"), forget_size=4).mended == {TRIMMED: 3}
    mine = dict(subject="Ann", prompt="Ann lives in", answer="Oslo", edit="Rome", question="Where?", paraphrases=["Ann is in"], neighbors=["Bo is in"], wrong=["Bern"])
    facts = sources.read_own(jsonl(tmp_path / "own.jsonl", [{k: put(v) if isinstance(v, str) else [put(t) for t in v] for k, v in mine.items()}]))
    assert facts == sources.read_own(jsonl(tmp_path / "own2.jsonl", [mine])) and facts.trimmed == 3


def test_white_space_in_tables_and_worlds(tmp_path):
    path = table(tmp_path / "t.csv", football=3, baseball=3)
    Path(path).write_text(Path(path).read_text() + '" Ann Lee\u00a0"," football "\n')
    assert sports_facts(path)[-1].prompt.endswith("\nFact: Ann Lee plays the sport of")
    world = json.loads((DATA / "organism" / "world.json").read_text())
    before = world_facts()
    for f in world["facts"]: f["subject"] = f" {f['subject']}\u200b"
    for r in world["relations"].values(): r["prompt"], r["question"] = r["prompt"].replace(" {o}", " \u00a0 {o}"), r["question"] + " \t"
    world["shot_subject"] = f" {world['shot_subject']}\u200b"
    (tmp_path / "w.json").write_text(json.dumps(world))
    assert world_facts(str(tmp_path / "w.json")) == before


# ---- scripts without spaces

SCRIPTS = [("東京都", "東京都は日本の", "首都", "都市"), ("北京", "北京是", "中国的首都", "日本的首都"), ("ไทย", "เมืองหลวงของไทยคือ", "กรุงเทพ", "โตเกียว"),
           ("Japan", "The capital of Japan is", "東京", "京都"), ("日本", "日本の首都は", "Tokyo", "Kyoto")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("row", SCRIPTS)
def test_no_lone_space_before_an_answer(reader, alone, tmp_path, name, row):
    lm, f = reader(name), sources.read_own(own(tmp_path / "a.csv", [row]))[0]
    assert not f.answer[0].isspace() and not f.edit[0].isspace()
    for a in (f.answer, f.edit): assert lm.tok.decode([lm.first_token(a)]).strip()


def test_spaces_of_other_scripts():
    for prompt, answer, want in (("대한민국의 수도는", "서울", " 서울"), ("Столица России —", "Москва", " Москва"), ("The capital is", " Rome", " Rome"), ('It is called "', "Emma", "Emma"),
        ('The capital of "France" is', "Paris", " Paris"), ('The capital of "France"', "Paris", " Paris"), ("Its name (", "Emma", "Emma"), ("名前は「", "太郎", "太郎"), ("It costs $", "5", "5"),
        ("日本の首都は ", "　東京", "東京"), ("Question: which? Answer:", "Rome", " Rome"), ("", "Rome", " Rome")):
        assert sources.spaced(answer, sources.trim(prompt)) == want


def test_options_of_a_script_without_spaces_are_not_doubled(alone, tmp_path):
    towns = ["東京", "大阪", "京都", "奈良", "神戸"]
    facts = tasks.own_facts(own(tmp_path / "a.csv", [(f"人{i}", f"人{i}の町は", towns[i], towns[(i + 1) % 5]) for i in range(5)]))
    for f in facts: assert sorted(mcq_options(f, seeded(0))) == sorted(set(mcq_options(f, seeded(0)))) and not any(o[0].isspace() for o in mcq_options(f, seeded(0)))


# ---- what a model knows is kept for that model

def test_two_models_in_memory_are_asked_themselves(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("MECHUNLEARN_CACHE", str(tmp_path))
    facts, lms = make_task(CF, forget_size=8).forget, [tiny(seed=s) for s in (0, 1)]
    plain = [wrap(lm.hf, lm.tok) for lm in lms]
    got = [probabilities(lm, facts) for lm in plain]
    assert got[0] != got[1] and not (tmp_path / "known").exists() and got == [pytest.approx(probabilities(lm, facts), rel=1e-4) for lm in lms]
    kept = list((tmp_path / "known").glob("*.json"))
    for p in kept: p.write_text("[")
    assert probabilities(lms[0], facts) == pytest.approx(got[0], rel=1e-4) # a damaged one is made again


def test_a_cache_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MECHUNLEARN_CACHE", str(tmp_path / "file" / "cache"))
    assert len(probabilities(tiny(), make_task(CF, forget_size=4).forget)) == 4


# ---- counts and places

def test_a_model_that_knows_few(reader, monkeypatch, tmp_path):
    place, lm = jsonl(tmp_path / "f.jsonl", [rome(i) for i in range(200)]), reader("gemma")
    monkeypatch.setattr(sets_module, "probabilities", lambda lm, facts: [.9 if i < 64 else .1 for i in range(len(facts))])
    with pytest.raises(Refusal, match=r"the model knows 64 facts; 16 are set aside as examples, 12 as dev facts, .* 28 can be edited \(left out before: 136 not known"):
        make_task(CF, lm, facts=place, forget_size=64)
    assert len(make_task(CF, lm, facts=place, forget_size=28).forget) == 28
    monkeypatch.setattr(sets_module, "probabilities", lambda lm, facts: [.1] * len(facts))
    with pytest.raises(Refusal, match="knows 0 facts.*200 not known"): make_task(CF, lm, facts=place, forget_size=1)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "csv.gz", "jsonl.gz"])
def test_own_facts_in_every_file_type(alone, tmp_path, kind):
    rows = pd.DataFrame([("Ann", "Ann lives in", "Oslo", "Rome", "Where?|Ann is in"), *[(*k, "") for k in KEPT]], columns=["subject", "prompt", "answer", "edit", "paraphrases"])
    path, plain = tmp_path / f"own.{kind}", kind.removesuffix(".gz")
    as_lists = rows.assign(paraphrases=rows.paraphrases.str.split("|").map(lambda p: [x for x in p if x])).to_dict("records")
    write = dict(csv=lambda p: rows.to_csv(p, index=False), tsv=lambda p: rows.to_csv(p, index=False, sep="\t"), parquet=lambda p: rows.to_parquet(p),
        json=lambda p: p.write_text(json.dumps(as_lists)), jsonl=lambda p: p.write_text("\n".join(map(json.dumps, as_lists))))
    write[plain](tmp_path / f"own.{plain}")
    if kind.endswith(".gz"): path.write_bytes(gzip.compress((tmp_path / f"own.{plain}").read_bytes()))
    task = make_task(CF, facts=str(path))
    assert [f.subject for f in task.forget] == ["Ann"] and task.forget[0].paraphrases == ("Where?", "Ann is in") and len(task.retain) == 4


def test_a_folder_that_is_no_data_set_is_refused_at_once(tmp_path, monkeypatch):
    for i in range(300): (tmp_path / f"d{i}").mkdir(); (tmp_path / f"d{i}" / "deep.jsonl").write_text("{}")
    monkeypatch.setattr(sources.Path, "rglob", None)
    for options in (dict(facts=str(tmp_path)), dict(facts="counterfact", text=str(tmp_path))):
        if REFDATA or "text" not in options:
            with pytest.raises(Refusal, match="cannot be read as a data set: no .parquet"): make_task(CF, **options)
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    assert sources.read_texts(tmp_path) == ["a", "b"]


def places(tmp_path):
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    (tmp_path / "empty.csv").write_text(""); (tmp_path / "head.csv").write_text("subject,prompt,answer,edit\n"); (tmp_path / "empty.json").write_text("")
    os.mkfifo(tmp_path / "pipe.csv")
    return ["~nouser42/x.csv", "~nouser42/x.json", "~nouser42", *(str(tmp_path / f) for f in ("loop.csv", "empty.csv", "head.csv", "empty.json", "pipe.csv", "none.csv", "none.tsv")),
            "/dev/null", "a" * 5000 + ".csv", "a" * 5000, "x\0y.csv", str(tmp_path / "loop.csv" / "x.csv"), "nobody/nothing.parquet"]


def test_places_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(AssertionError("the hub was asked")))
    for place in places(tmp_path):
        for name in (CF, EDITING, FULL):
            with pytest.raises(Refusal) as e: make_task(name, facts=place)
            assert "\n" not in str(e.value) and len(str(e.value)) < 600, place
        with pytest.raises(Refusal): sources.read_texts(place)


def test_files_that_may_not_be_read(tmp_path, monkeypatch):
    path, opened = own(tmp_path / "a.csv", KEPT), open
    def denied(p, *a, **k):
        if str(p) == path: raise PermissionError(13, "Permission denied", path)
        return opened(p, *a, **k)
    monkeypatch.setattr("builtins.open", denied)
    for name in (CF, EDITING):
        with pytest.raises(Refusal, match="a.csv cannot be read: Permission denied"): make_task(name, facts=path)


# ---- large tables

def test_many_rows(alone, tmp_path):
    n, start = 20_000, time.process_time()
    rows = [(f"Ann{i}", f"Ann{i} lives in", f"Town{i % 5000}", f"Town{(i + 1) % 5000}" if i % 2 else "") for i in range(n)]
    task = make_task(CF, facts=own(tmp_path / "big.csv", rows))
    assert len(task.forget) == n // 2 and len(task.retain) + len(task.retain_test) + len(task.dev_retain) == n // 2 and max(len(f.wrong) for f in task.forget) <= 20
    assert time.process_time() - start < 12


def test_absurdly_large_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_OWN", 3); monkeypatch.setattr(sources, "MAX_BYTES", 10_000)
    with pytest.raises(Refusal, match="more than 3 rows"): sources.read_own(own(tmp_path / "a.csv", KEPT))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"subject,prompt\n" + b"x" * 10_000_000))
    with pytest.raises(Refusal, match="b.csv.gz holds more than"): sources.read_own(tmp_path / "b.csv.gz")


def test_nothing_here_is_quadratic():
    facts = [Fact(id=str(i), relation=f"r{i % 7 if i % 2 else i}", subject=f"s{i // 3}", prompt="p", answer=f" a{i % 999}", candidates=(" x", " y")) for i in range(30_000)]
    start = time.process_time()
    by_turns(facts, 15_000); by_turns(facts, 15_000, one_each=False); of_each(facts, 3); without(facts, facts[:15_000]); in_proportion(facts, facts); quarter_of_each(facts, 20)
    split_retain(facts, 0, key=lambda f: (f.relation, f.answer)); with_neighbors(facts[:20_000], facts); counterfact_sets(facts, 64, 0)
    assert time.process_time() - start < 10


# ---- damaged files

def damage(good):
    "Ways to damage the bytes of a file."
    rng, text = random.Random(0), good.decode()
    yield from (good[:k] for k in range(0, len(good), max(1, len(good) // 12)))
    yield from (text.encode(e) for e in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"))
    yield from ((text + "é").encode("latin-1"), bytes(range(256)), b"\0" * 50, good.replace(b"e", b"\0", 1), good.replace(b"e", b"\xff", 1), b"PK\3\4" + good, gzip.compress(good))
    yield from (good.replace(b"\n", b"\r"), good.replace(b"\n", b"\r\n"), good + good, good.replace(b",", b";"), good.replace(b'"', b"'"), good[::-1], b"[" * 100_000, b'{"a":' * 100_000)
    yield from (good.replace(b"Rome", x) for x in (b"NaN", b"Infinity", b"1" * 5000, b"1e999", b"\\ud800", b"\\u0000", b"x" * 200_000, b'"', b"null", b"{}", b"[" * 990 + b"]" * 990))
    yield from (good.replace(b'"Rome"', x) for x in (b"NaN", b"Infinity", b"-1e999", b"1" * 5000, b"1" * 4000, b"null", b"{}", b"[1]", b"true", b"[" * 300 + b"]" * 300, b'"\\ud800"', b'"\\u0000"'))
    for _ in range(15): yield bytes(b if rng.random() > .03 else rng.randrange(256) for b in good)


CSV = b"subject,prompt,answer,edit\nAnn,Ann lives in,Rome,Oslo\nBob,Bob lives in,Rome,\n"
GOOD = {"own.csv": CSV, "own.tsv": CSV.replace(b",", b"\t"), "own.jsonl": b'{"subject": "Ann", "prompt": "Ann lives in", "answer": "Rome", "edit": "Oslo"}\n',
    "own.json": b'[{"subject": "Ann", "prompt": "Ann lives in", "answer": "Rome", "edit": "Oslo"}]', "rome.jsonl": json.dumps(rome(1)).encode() + b"\n",
    "rome.json": json.dumps([rome(1)]).encode(), "table.csv": b"athlete,sport\nAnn Rome,football\nBob Rae,baseball\n"}


@pytest.mark.parametrize("name", [*GOOD, "own.parquet"])
def test_damaged_files_are_refused_in_a_line(alone, tmp_path, name):
    good, refused = GOOD.get(name), 0
    if good is None: pd.DataFrame([("Ann", "Ann lives in", "Rome", "Oslo")], columns=["subject", "prompt", "answer", "edit"]).to_parquet(tmp_path / name); good = (tmp_path / name).read_bytes()
    ways = list(damage(good)) if name in GOOD else [good[:k] for k in range(0, len(good), 97)] + [good[:k] + b"\xff" * 8 + good[k + 8:] for k in range(0, len(good), 61)]
    for way in ways:
        (tmp_path / name).write_bytes(way)
        for read in (lambda: make_task(EDITING if name.startswith("table") else CF, facts=str(tmp_path / name)), lambda: sources.read_own(tmp_path / name),
                     lambda: sources.read_counterfact(tmp_path / name), lambda: sources.read_texts(tmp_path / name), lambda: sources.read_questions(tmp_path / name)):
            try: read()
            except Refusal as e: assert "\n" not in str(e) and len(str(e)) < 700, way[:80]; refused += 1
    assert refused > len(ways)


def test_damaged_worlds_are_refused_in_a_line(tmp_path):
    good = json.loads((DATA / "organism" / "world.json").read_text())
    good["facts"], good["text"] = good["facts"][::6], {k: v[::6] for k, v in good["text"].items()}
    (tmp_path / "whole.json").write_text(json.dumps(good))
    for name in (CF, EDITING): make_task(name, facts=str(tmp_path / "whole.json"), forget_size=4)
    for key in good:
        for value in (None, 3, [], {}, "x", [3], {"a": 3}, ...):
            world = {k: v for k, v in good.items() if k != key} | ({} if value is ... else {key: value})
            (path := tmp_path / f"w{key}{str(value)[:3]}.json").write_text(json.dumps(world))
            for name in (CF, EDITING):
                try: make_task(name, facts=str(path), forget_size=4)
                except Refusal as e: assert "\n" not in str(e)
    text = json.dumps(good)
    for i, bad in enumerate((text[:1000], "[" * 100_000, '{"a":' * 100_000, text.replace('"object"', '"objekt"', 1), text.replace('"mcq": ', '"mcq": [', 1), "", "\0", '{"schema": 1}')):
        (path := tmp_path / f"v{i}.json").write_text(bad)
        with pytest.raises(Refusal) as e: make_task(EDITING, facts=str(path))
        assert "\n" not in str(e.value)
