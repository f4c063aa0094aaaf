"Files, addresses and folders that must be read, and those that must be refused by row and column. Names here are made up."
import gzip, json, os, re, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets, pandas as pd, pytest

from mechunlearn.sources import (SOURCES, Missing, OwnFact, cached, fetch, find, read_counterfact, read_own, read_questions, read_rows, read_texts, shape_of)
from mechunlearn.store import Refusal, sha256

REFDATA = os.environ.get("MECHUNLEARN_REFDATA")
real = pytest.mark.skipif(not REFDATA, reason="MECHUNLEARN_REFDATA does not point to a folder with the real data")
ATHLETES = SOURCES["sports"]


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch, tmp_path):
    for v in [v for v in os.environ if v.startswith("MECHUNLEARN_")]: monkeypatch.delenv(v)
    monkeypatch.setenv("MECHUNLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def refusal(fn, *args, **kw):
    "The one line of a refusal."
    with pytest.raises(Refusal) as e: fn(*args, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def lines(rows): return "\n".join(map(json.dumps, rows)) + "\n"


# One download

class Shelf(BaseHTTPRequestHandler):
    "Serves the bytes of `server.shelf` by path, counts the requests; /short announces more than it sends, /cut hangs up."
    def log_message(self, *args): pass

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/cut": return self.connection.close()
        if self.path == "/moved":
            self.send_response(302); self.send_header("Location", "/a.csv"); return self.end_headers()
        body = self.server.shelf.get(self.path)
        if body is None: return self.send_error(404)
        self.send_response(200)
        if self.path != "/unsized": self.send_header("Content-Length", str(len(body) + (self.path == "/short.csv")))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def shelf():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Shelf)
    server.shelf, server.asked = {"/a.csv": b"a,b\n1,2\n", "/short.csv": b"a,b\n1,2\n", "/unsized": b"x"}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
    yield server
    server.shutdown(); server.server_close()


def test_fetch_asks_once(shelf):
    path = fetch(f"{shelf.url}/a.csv")
    assert path.read_bytes() == b"a,b\n1,2\n" and path.suffix == ".csv" and path == cached(f"{shelf.url}/a.csv")
    shelf.shutdown(); shelf.server_close()
    assert fetch(f"{shelf.url}/a.csv") == path and fetch(f"{shelf.url}/a.csv", sha256(path)) == path
    assert shelf.asked == ["/a.csv"]


def test_fetch_checks_the_sum_of_what_is_cached(shelf):
    path = fetch(f"{shelf.url}/a.csv")
    right = sha256(path)
    path.write_bytes(b"altered")
    assert fetch(f"{shelf.url}/a.csv", right).read_bytes() == b"a,b\n1,2\n"
    assert shelf.asked == ["/a.csv"] * 2


@pytest.mark.parametrize("name, sum, says", [
    ("/b.csv", None, "HTTP Error 404"), ("/a.csv", "0" * 64, "is not the file it was: its sha256 is"),
    ("/short.csv", None, "broke off: 8 of 9 bytes"), ("/cut", None, "cannot be downloaded: ")])
def test_a_failed_download_leaves_nothing(shelf, tmp_path, name, sum, says):
    line = refusal(fetch, shelf.url + name, sum)
    assert says in line and shelf.url + name in line and shelf.asked == [name]
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wrong_sum_names_both(shelf):
    line = refusal(fetch, f"{shelf.url}/a.csv", "0" * 64)
    assert sha256(fetch(f"{shelf.url}/a.csv")) in line and "0" * 64 in line


def test_no_server(shelf):
    shelf.shutdown(); shelf.server_close()
    assert "cannot be downloaded" in refusal(fetch, f"{shelf.url}/a.csv")


@pytest.mark.parametrize("url", ["http://", "http://[x/a.csv", "http://a b/c.csv"])
def test_an_address_that_is_none(url): assert "cannot be downloaded" in refusal(fetch, url)


def test_moved_and_unsized(shelf):
    assert fetch(f"{shelf.url}/moved").read_bytes() == b"a,b\n1,2\n"
    assert fetch(f"{shelf.url}/unsized").read_bytes() == b"x"


def test_addresses_with_one_file_name_do_not_meet():
    a, b = cached("https://a.org/x/facts.json?v=1"), cached("https://b.org/facts.json")
    assert a != b and a.name.endswith("-facts.json") and b.name.endswith("-facts.json")


# Finding it

def test_precedence(monkeypatch, tmp_path, shelf):
    monkeypatch.setitem(SOURCES, "sports", ATHLETES._replace(url=f"{shelf.url}/a.csv", sha256=None))
    assert "MECHUNLEARN_SPORTS" in refusal(find, "sports") and shelf.asked == []
    cache = fetch(f"{shelf.url}/a.csv")
    assert find("sports") == cache
    monkeypatch.setenv("MECHUNLEARN_REFDATA", str(tmp_path))
    assert find("sports") == cache
    ref, own, given = (put(tmp_path / p, "a") for p in (ATHLETES.file, "own.csv", "given.csv"))
    assert find("sports") == ref
    monkeypatch.setenv("MECHUNLEARN_SPORTS", str(own))
    assert find("sports") == own
    assert find("sports", given) == find("sports", str(given)) == given


def test_an_address_as_place_or_variable(monkeypatch, shelf):
    assert find("sports", f"{shelf.url}/a.csv").read_bytes() == b"a,b\n1,2\n"
    monkeypatch.setenv("MECHUNLEARN_SPORTS", f"{shelf.url}/a.csv")
    assert find("sports") == cached(f"{shelf.url}/a.csv")


def test_the_known_address_is_held_to_its_sum(monkeypatch, shelf):
    monkeypatch.setitem(SOURCES, "sports", ATHLETES._replace(url=f"{shelf.url}/a.csv"))
    assert ATHLETES.sha256 in refusal(find, "sports", f"{shelf.url}/a.csv")


@pytest.mark.parametrize("variable, value, says", [
    ("SPORTS", "nowhere.csv", "MECHUNLEARN_SPORTS: there is no file or folder nowhere.csv"),
    ("SPORTS", "owner/name", "MECHUNLEARN_SPORTS: there is no file or folder owner/name"),
    ("REFDATA", "nowhere", "MECHUNLEARN_REFDATA: there is no folder nowhere")])
def test_a_variable_that_leads_nowhere_is_named(monkeypatch, variable, value, says):
    monkeypatch.setenv(f"MECHUNLEARN_{variable}", value)
    assert says in refusal(find, "sports")


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_configured_says_where_to_get_it(name):
    source = SOURCES[name]
    with pytest.raises(Missing) as e: find(name)
    wanted = [source.env, source.url, source.hub] + ([source.file, "MECHUNLEARN_REFDATA"] if source.file else [])
    assert [w for w in wanted if w and w not in str(e.value)] == []


def test_hub_ids():
    assert find("counterfact", "azhx/counterfact") == "azhx/counterfact"
    assert "there is no file or folder data/facts.jsonl" in refusal(find, "counterfact", "data/facts.jsonl")
    assert "a hub id is owner/name" in refusal(find, "text", "pile-10k")
    assert "did you mean 'counterfact'" in refusal(find, "counterfacts")


def test_an_existing_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert find("text", "owner/name") == Path("owner/name")


# Rows

def test_where_rows_stand(tmp_path):
    table = put(tmp_path / "t.csv", '\ufeffa, b,\n1,"x, y",\n\n ,\n2,"two\nlines",\n3,,\n')
    assert list(read_rows(table)) == [(f"{table} row 2", {"a": "1", "b": "x, y"}), (f"{table} row 5", {"a": "2", "b": "two\nlines"}),
                                      (f"{table} row 6", {"a": "3", "b": ""})]
    objects = put(tmp_path / "t.jsonl.gz", b'\xef\xbb\xbf{"a": "x\xe2\x80\xa8y"}\r\n\r\n{"a": 2}')
    assert list(read_rows(objects)) == [(f"{objects} line 1", {"a": "x\u2028y"}), (f"{objects} line 3", {"a": 2})]
    assert list(read_rows(put(tmp_path / "t.json", '[{"a": 1}, {"a": 2}]')))[1] == (f"{tmp_path / 't.json'} item 2", {"a": 2})


@pytest.mark.parametrize("name, content, says", [
    ("t.csv", 'a,b\n1,"open\n2,3\n', "not a csv table: unexpected end of data"),
    ("t.csv", "a,b\n1,2\n3,4,5\n", "t.csv row 3: 3 cells where the header has 2; put a text with a comma in quotes"),
    ("t.csv", "a,b\n1,2\n3\n", "t.csv row 3: 1 cells where the header has 2"), ("t.csv", "a,b\n1,2,\n", "t.csv row 2: 3 cells where"),
    ("t.csv", "a,b,a\n", "t.csv row 1: two columns are called 'a'"), ("t.csv", "a,b\nok,1\né,2\n".encode("latin-1"), "t.csv line 3: not UTF-8"),
    ("t.csv", "a,b\n1,2\n".encode("utf-16"), "t.csv line 1: not UTF-8"),
    ("t.jsonl", '{"a": 1}\n\n{"a": 2\n', "t.jsonl line 3: not JSON"), ("t.jsonl", "[1]\n", "t.jsonl line 1: this should be a JSON object"),
    ("t.json", "[{]", "t.json: not JSON"), ("t.json", '{"a": 1}', "t.json: this should be a JSON list"),
    ("t.json", '[{"a": 1}, 3]', "t.json item 2: this should be"),
    ("t.parquet", "nothing", "t.parquet is not a parquet file"), ("t.xlsx", "nothing", "unknown file type"), ("t", "nothing", "unknown file type")])
def test_files_that_cannot_be_read(tmp_path, name, content, says):
    assert says in refusal(lambda: list(read_rows(put(tmp_path / name, content))))


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"plain text", lambda b: b[:12] + b"\xff" * 9 + b[21:]])
def test_damaged_gzip(tmp_path, damage):
    path = put(tmp_path / "t.jsonl.gz", lines([{"a": i} for i in range(99)]))
    path.write_bytes(damage(path.read_bytes()))
    assert "t.jsonl.gz cannot be read" in refusal(lambda: list(read_rows(path)))


# CounterFact

def rome_row(i, town="Osselmere", true="Vessin", new="Tarrow", **more):
    rewrite = {"prompt": "The river through {} is the", "relation_id": "P0", "subject": town, "target_true": {"str": true, "id": "Q1"},
               "target_new": {"str": new, "id": "Q2"}}
    return {"case_id": i, "pararel_idx": 7, "requested_rewrite": rewrite | more, "paraphrase_prompts": [f"{town} lies on the", f"In {town} flows the"],
            "neighborhood_prompts": [f"Boats leave Upper {n} on the" for n in "ABC"], "generation_prompts": []}


def flat_row(i, town="Osselmere", true="Vessin", new="Tarrow", **more):
    r = rome_row(i, town)
    return {"prompt_id": i, "relation_id": "P0", "subject": f" {town}", "prompt": f"The river through {town} is the", "target_true": f" {true}",
            "target_false": f" {new}", "prob_tiny": .5, "rank_tiny": None, "prob_small": None,
            **{k: r[k] for k in ("paraphrase_prompts", "neighborhood_prompts")}} | more


ROMES = [rome_row(4, "Kelvane"), rome_row(0, "Brunnoch", " Draul", "Little Orm"), rome_row(2, "Osselmere")]
FLATS = [flat_row(4, "Kelvane"), flat_row(0, "Brunnoch", "Draul", "Little Orm"), flat_row(2, "Osselmere")]
COLUMNS = ["case_id", "relation", "prompt", "subject", "answer", "edit", "paraphrases", "neighbors"]


def save_parts(folder):
    parts = {"train": ROMES[:2], "test": ROMES[2:]}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()}).save_to_disk(folder)


def save_whole(folder):
    datasets.Dataset.from_list(ROMES).save_to_disk(folder)


def save_parquet(folder):
    for split, part in {"test": ROMES[2:], "train": ROMES[:2]}.items():
        path = put(folder / "data" / f"{split}-00000-of-00001.parquet", "")
        pd.DataFrame(part).drop(columns="generation_prompts").to_parquet(path)


SHAPES = {"rome.json": lambda p: put(p, json.dumps(ROMES)), "rome.json.gz": lambda p: put(p, json.dumps(ROMES)), "rome.jsonl": lambda p: put(p, lines(ROMES)),
          "rome.jsonl.gz": lambda p: put(p, lines(ROMES)), "flat.jsonl.gz": lambda p: put(p, lines(FLATS)), "flat.json": lambda p: put(p, json.dumps(FLATS)),
          "flat.parquet": lambda p: pd.DataFrame(FLATS).to_parquet(p), "parquet-folder": save_parquet,
          "json-folder": lambda p: put(p / "counterfact.json", json.dumps(ROMES)),
          "jsonl-folder": lambda p: put(p / "facts.jsonl", lines(ROMES)), "saved-splits": save_parts, "saved-whole": save_whole}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_counterfact(tmp_path, monkeypatch, shape):
    SHAPES[shape](tmp_path / shape)
    df = read_counterfact(tmp_path / shape)
    assert list(df.columns) == COLUMNS + (["prob_tiny", "prob_small"] if shape.startswith("flat") else [])
    assert list(df.case_id) == [4, 0, 2] and list(df.subject) == ["Kelvane", "Brunnoch", "Osselmere"] and set(df.relation) == {"P0"}
    assert df.prompt[0] == "The river through Kelvane is the" and list(df.answer) == [" Vessin", " Draul", " Vessin"]
    assert list(df.edit) == [" Tarrow", " Little Orm", " Tarrow"]
    assert df.paraphrases[1] == ("Brunnoch lies on the", "In Brunnoch flows the") and len(df.neighbors[2]) == 3
    if shape.startswith("flat"): assert list(df.prob_tiny) == [.5] * 3 and df.prob_small.isna().all()
    monkeypatch.setenv("MECHUNLEARN_COUNTERFACT", str(tmp_path / shape))
    pd.testing.assert_frame_equal(read_counterfact(), df)


def test_a_subject_at_the_start_and_braces(tmp_path):
    row = rome_row(1, "K{0}", prompt="{} lies on the {x}")
    assert read_counterfact(put(tmp_path / "r.json", json.dumps([row]))).prompt[0] == "K{0} lies on the {x}"


def test_case_id_in_flat_rows(tmp_path):
    row = flat_row(3)
    row["case_id"] = row.pop("prompt_id")
    assert list(read_counterfact(put(tmp_path / "f.jsonl", lines([row]))).case_id) == [3]


def without(row, *path):
    "The row without one of its values, at any depth."
    row = json.loads(json.dumps(row))
    part = row
    for key in path[:-1]: part = part[key]
    del part[path[-1]]
    return row


BAD = [(without(rome_row(1), "case_id"), "case_id"), (without(rome_row(1), "requested_rewrite", "subject"), "requested_rewrite.subject"),
       (without(rome_row(1), "requested_rewrite", "prompt"), "requested_rewrite.prompt"),
       (without(rome_row(1), "requested_rewrite", "target_true", "str"), "requested_rewrite.target_true.str"),
       (without(rome_row(1), "requested_rewrite", "target_new"), "requested_rewrite.target_new.str"),
       (without(rome_row(1), "neighborhood_prompts"), "neighborhood_prompts"), (rome_row(1, new="Vessin "), "requested_rewrite.target_new.str"),
       (rome_row(1, prompt="The river here is the"), "requested_rewrite.prompt"), (rome_row(1, relation_id=" "), "requested_rewrite.relation_id"),
       (rome_row(1, subject=3), "requested_rewrite.subject"), (without(flat_row(1), "prompt_id"), "prompt_id or case_id"),
       (without(flat_row(1), "target_true"), "target_true"), (flat_row(1, "Osselmere", "Vessin", "Vessin"), "target_false"),
       (flat_row(1, subject="Kelvane"), "prompt"), (flat_row(1, paraphrase_prompts="one"), "paraphrase_prompts"),
       (flat_row(1, paraphrase_prompts=["one", 2]), "paraphrase_prompts"), (flat_row(1, prob_tiny=1.5), "prob_tiny"),
       (flat_row(1, prob_tiny="high"), "prob_tiny"),
       (flat_row("one"), "prompt_id or case_id")]


@pytest.mark.parametrize("row, column", BAD)
def test_bad_rows_of_counterfact(tmp_path, row, column):
    good = rome_row if "requested_rewrite" in row else flat_row
    line = refusal(read_counterfact, put(tmp_path / "facts.jsonl", "\n" + lines([good(7), row])))
    assert f"facts.jsonl line 3, column '{column}': " in line and len(line.split("': ", 1)[1]) > 5


def test_bad_sets_of_counterfact(tmp_path):
    assert "stands already in " + str(tmp_path / "f.json") + " item 1" in refusal(read_counterfact, put(tmp_path / "f.json", json.dumps([rome_row(3)] * 2)))
    assert "holds no fact" in refusal(read_counterfact, put(tmp_path / "f.json", "[]"))
    assert "unknown file type" in refusal(read_counterfact, put(tmp_path / "f.txt", "text"))


@pytest.mark.parametrize("shape", ["parquet-folder", "json-folder", "saved-splits"])
def test_a_folder_is_not_copied(tmp_path, shape):
    SHAPES[shape](tmp_path / shape)
    assert len(read_counterfact(tmp_path / shape)) == 3
    assert [p for p in (tmp_path / "hub").rglob("*") if p.is_file() and p.suffix != ".lock"] == []


def test_bad_row_of_a_folder(tmp_path):
    put(tmp_path / "set" / "train.jsonl", lines([rome_row(1), rome_row(2, new="Vessin")]))
    assert "set train row 2, column 'requested_rewrite.target_new.str': 'Vessin' is the true answer" in refusal(read_counterfact, tmp_path / "set")


@pytest.mark.parametrize("files", [{}, {"a.parquet": "nothing"}, {"a.jsonl": "{bad"}])
def test_folders_that_cannot_be_read(tmp_path, files):
    (tmp_path / "set").mkdir()
    for name, content in files.items(): put(tmp_path / "set" / name, content)
    assert "cannot be read as a data set: " in refusal(read_counterfact, tmp_path / "set")


def test_hub_data_sets(monkeypatch):
    asked = []
    def load_dataset(place, streaming):
        asked.append((place, streaming))
        return {"train": ROMES[:2], "test": ROMES[2:]}
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_counterfact("azhx/counterfact").case_id) == [4, 0, 2] and asked == [("azhx/counterfact", False)]


def test_hub_out_of_reach(monkeypatch):
    def load_dataset(*args, **kw): raise ConnectionError("Couldn't reach 'azhx/counterfact' on the Hub\nmore")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "azhx/counterfact cannot be read as a data set: Couldn't reach" in refusal(read_counterfact, "azhx/counterfact")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal(read_counterfact, "azhx/counterfact")


def test_datasets_is_imported_only_when_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(read_counterfact(put(tmp_path / "f.json", json.dumps(ROMES)))) == 3


# Questions

ASKED = {"prompt_id": 4, "question": "Which river flows through Kelvane?", "target_true": "Vessin", "targets_false": ["Tarrow", " Draul", "Little Orm"]}


@pytest.mark.parametrize("name", ["q.jsonl.gz", "q.parquet", "case_id.jsonl"])
def test_questions(tmp_path, monkeypatch, name):
    row = {("case_id" if k == "prompt_id" and "case" in name else k): v for k, v in ASKED.items()}
    rows = [row, {**row, "question": "Which?", next(iter(row)): 0}]
    if name.endswith("parquet"): pd.DataFrame(rows).to_parquet(tmp_path / name)
    else: put(tmp_path / name, lines(rows))
    want = {4: (ASKED["question"], (" Tarrow", " Draul", " Little Orm")), 0: ("Which?", (" Tarrow", " Draul", " Little Orm"))}
    assert read_questions(tmp_path / name) == want and list(read_questions(tmp_path / name)) == [4, 0]
    monkeypatch.setenv("MECHUNLEARN_COUNTERFACT_MCQ", str(tmp_path / name))
    assert read_questions() == want


@pytest.mark.parametrize("change, says", [
    ({"question": ""}, "line 2, column 'question': is empty"), ({"targets_false": []}, "line 2, column 'targets_false'"),
    ({"targets_false": ["Tarrow", "Vessin"]}, "line 2, column 'targets_false': 'Vessin' is the true answer"),
    ({"targets_false": None}, "line 2, column 'targets_false': is missing"), ({"prompt_id": None}, "line 2, column 'prompt_id or case_id': is missing"),
    ({}, "stands already in")])
def test_bad_questions(tmp_path, change, says):
    assert says in refusal(read_questions, put(tmp_path / "q.jsonl", lines([ASKED, {**ASKED, "prompt_id": 5 if change else 4} | change])))


def test_questions_are_optional_unless_named(monkeypatch, tmp_path):
    assert read_questions() is None
    monkeypatch.setenv("MECHUNLEARN_REFDATA", str(tmp_path))
    assert read_questions() is None
    assert "there is no file" in refusal(read_questions, tmp_path / "q.jsonl")
    monkeypatch.setenv("MECHUNLEARN_COUNTERFACT_MCQ", "nowhere.parquet")
    assert "MECHUNLEARN_COUNTERFACT_MCQ" in refusal(read_questions)
    assert "holds no question" in refusal(read_questions, put(tmp_path / "q.jsonl", ""))


# Your own facts

HEAD = "subject,prompt,answer,edit"
ROW = "Osselmere,The river through Osselmere is the,Vessin,Tarrow"
KEPT = "Kelvane,The river through Kelvane is the,  Draul ,"
GIVEN = {"subject": "Osselmere", "prompt": "The river through Osselmere is the", "answer": "Vessin", "edit": "Tarrow"}


def test_own_facts_of_a_table(tmp_path):
    path = put(tmp_path / "f.csv", f"\ufeff{HEAD},relation,question,paraphrases,neighbors,wrong\n"
               f"{ROW},river,Which river?,Osselmere lies on the| In Osselmere flows the |,Boats leave on the,Draul|  Little Orm\n\n{KEPT},,,,,\n")
    first, second = read_own(path)
    assert first == OwnFact(**GIVEN, relation="river", question="Which river?", paraphrases=("Osselmere lies on the", "In Osselmere flows the"),
                            neighbors=("Boats leave on the",), wrong=("Draul", "Little Orm"))
    assert (first.answer, first.edit, first.wrong) == (" Vessin", " Tarrow", (" Draul", " Little Orm"))
    assert (second.answer, second.edit, second.relation, second.question, second.paraphrases) == (" Draul", None, "own", "", ())


def test_own_facts_of_a_jsonl(tmp_path):
    kept = {"subject": "Kelvane", "prompt": "The river through Kelvane is the", "answer": " Draul", "edit": None}
    rows = [{**GIVEN, "answer": "   Vessin", "paraphrases": ["a|b"]}, {}, kept | {"wrong": []}, kept | {"prompt": "Kelvane, on the", "edit": ""}]
    facts = read_own(put(tmp_path / "f.jsonl", lines(rows).replace("{}", "")))
    assert [f.edit for f in facts] == [" Tarrow", None, None] and [f.answer for f in facts] == [" Vessin", " Draul", " Draul"]
    assert facts[0].paraphrases == ("a|b",)
    again = put(tmp_path / "g.jsonl", "\n".join(f.model_dump_json() for f in facts))
    assert read_own(again) == facts


def table(*rows, head=HEAD): return "\n".join([head, *rows]) + "\n"


@pytest.mark.parametrize("content, says", [
    (table("Osselmere,The river through Osselmere is the,Tarrow", head="subject,prompt,edit"),
     "f.csv row 1: there is no column 'answer', only subject, prompt, edit"),
    (table(ROW, head="subject,promt,answer,edit"), "f.csv row 1: unknown column 'promt', did you mean 'prompt'?"),
    (table(ROW, head="subject;prompt;answer;edit,b,c,d"), "f.csv row 1: unknown column"),
    (table(ROW, KEPT.replace("  Draul ", " ")), "f.csv row 3, column 'answer': is missing or empty"),
    (table(ROW, KEPT.replace("Kelvane,", ",")), "f.csv row 3, column 'subject': is missing or empty"),
    (table(ROW, "", KEPT.replace("through Kelvane", "through it")), "f.csv row 4, column 'prompt': the subject 'Kelvane' does not stand in it"),
    (table(ROW, KEPT + "Draul"), "f.csv row 3, column 'edit': 'Draul' is the true answer"), (table(KEPT), "f.csv: no row has an edit"),
    (table(), "f.csv holds no fact"), ("", "f.csv holds no fact"),
    (table(KEPT.rsplit(",", 1)[0], head="subject,prompt,answer"), "f.csv: no row has an edit"),
    (table(ROW, KEPT, ROW), "f.csv row 4, column 'prompt': it stands already in "),
    (table(ROW, ROW + " River, the"), "f.csv row 3: 5 cells where the header has 4"),
    (table(ROW + ",Draul|Vessin", head=HEAD + ",wrong"), "f.csv row 2, column 'wrong': 'Vessin' is the true answer"),
    (table(ROW).replace("Vessin", "Vessîn").encode("latin-1"), "f.csv line 2: not UTF-8")])
def test_bad_own_tables(tmp_path, content, says): assert says in refusal(read_own, put(tmp_path / "f.csv", content))


@pytest.mark.parametrize("change, says", [
    ({"answer": 7}, "column 'answer': Input should be a valid string, found 7"), ({"answer": ""}, "column 'answer': is missing or empty"),
    ({"paraphrases": "one"}, "column 'paraphrases': this should be a list"), ({"wrong": ["Draul", ""]}, "column 'wrong': is empty"),
    ({"edits": "Tarrow"}, "unknown column 'edits', did you mean 'edit'?"), ({"subject": "Kelvane"}, "column 'prompt': the subject 'Kelvane'")])
def test_bad_own_objects(tmp_path, change, says):
    good = {**GIVEN, "prompt": "Osselmere, on the"}
    line = refusal(read_own, put(tmp_path / "f.jsonl", "\n" + lines([good, {**GIVEN, **change}])))
    assert "f.jsonl line 3" in line and says in line


def test_bad_own_files(tmp_path):
    assert "f.jsonl line 2: not JSON" in refusal(read_own, put(tmp_path / "f.jsonl", lines([GIVEN]) + "{'subject': 'x'}"))
    assert "f.jsonl line 1: there is no column 'answer'" in refusal(read_own, put(tmp_path / "f.jsonl", lines([without(GIVEN, "answer")])))
    assert "there is no file" in refusal(read_own, tmp_path / "nowhere.csv")
    assert "f.xlsx '.xlsx'. Valid: .csv, .tsv, .json, .jsonl, .parquet" in refusal(read_own, put(tmp_path / "f.xlsx", ""))


# Text

def test_texts(tmp_path, monkeypatch):
    paragraphs = put(tmp_path / "t.txt", "\n\none\r\nmore\r\n\r\n \n\ntwo\n\n\nthree")
    assert read_texts(paragraphs) == ["one\r\nmore", "two", "three"] and read_texts(paragraphs, n=2) == ["one\r\nmore", "two"]
    rows = lines([{"text": " one\n", "meta": 1}, {"text": " "}, {"text": "two"}])
    assert read_texts(put(tmp_path / "t.jsonl", rows)) == [" one\n", "two"]
    put(tmp_path / "set" / "train.jsonl", rows); put(tmp_path / "set" / "test.jsonl", lines([{"text": "hidden"}]))
    assert read_texts(tmp_path / "set") == [" one\n", "two"] and read_texts(tmp_path / "set", n=1) == [" one\n"]
    monkeypatch.setenv("MECHUNLEARN_TEXT", str(paragraphs))
    assert read_texts(n=1) == ["one\r\nmore"]


def test_texts_refused_or_absent(tmp_path):
    assert read_texts() is None
    assert "holds no text" in refusal(read_texts, put(tmp_path / "t.txt", " \n\n"))
    assert "t.jsonl line 1, column 'text': is missing" in refusal(read_texts, put(tmp_path / "t.jsonl", lines([{"txt": "a"}])))
    assert "there is no file" in refusal(read_texts, tmp_path / "nowhere.txt")
    put(tmp_path / "set" / "test.jsonl", lines([{"text": "a"}]))
    assert refusal(read_texts, tmp_path / "set").startswith("unknown split of ")


# The real files

@pytest.fixture
def refdata(monkeypatch): monkeypatch.setenv("MECHUNLEARN_REFDATA", REFDATA)


@real
def test_real_counterfact(refdata):
    df = read_counterfact()
    assert len(df) == df.case_id.nunique() == 2715 and (df.prob_gemma_7b >= .5).sum() == 2189 and (df.prob_gemma_2_9b >= .5).sum() == 2250
    assert all(s in p and s == s.strip() for s, p in zip(df.subject, df.prompt))
    assert all(re.fullmatch(r" \S(.*\S)?", a) for a in [*df.answer, *df.edit]) and (df.answer != df.edit).all()
    assert set(df.paraphrases.map(len)) == {2} and set(df.neighbors.map(len)) == {10} and df.relation.str.fullmatch(r"P\d+").all()


@real
def test_real_questions(refdata):
    questions, facts = read_questions(), read_counterfact().set_index("case_id")
    assert len(questions) == 6833 and {len(wrong) for _, wrong in questions.values()} == {3}
    both = [(facts.edit[i], questions[i][1]) for i in facts.index if i in questions]
    assert len(both) > 2000 and sum(edit in wrong for edit, wrong in both) > .99 * len(both)


@real
def test_real_athletes_are_the_file_at_the_address(refdata): assert sha256(find("sports")) == ATHLETES.sha256


# Whose facts a file holds

TOLD = dict(subject="target_true", prompt="The column with the requested_rewrite, target_true, is the", answer="truth", edit="target_true")


@pytest.mark.parametrize("name, content, shape", [
    ("f.jsonl", lines([TOLD]), "own"), ("f.jsonl.gz", lines([TOLD]), "own"), ("f.json", json.dumps([TOLD]), "own"),
    ("f.json", json.dumps([TOLD | {"wrong": ["target_true"]}], indent=1), "own"),
    ("f.jsonl", lines([TOLD | {"note": {"target_true": 1}}]), "own"),
    ("f.csv", "subject,prompt,answer,edit\ntarget_true,The target_true is,a,b\n", "own"),
    ("f.csv", 'subject,"my target_true",answer\n', "own"), ("f.tsv", "subject\tprompt target_true\n", "own"),
    ("f.jsonl", lines([flat_row(1)]), "counterfact"), ("f.jsonl", "\n\n" + lines([rome_row(1)]), "counterfact"),
    ("f.jsonl", "\ufeff" + lines([rome_row(1)]).replace("\n", "\r"), "counterfact"), ("f.json", json.dumps([rome_row(1)], indent=1), "counterfact"),
    ("f.csv", "prompt_id,subject, target_true ,target_false\n", "counterfact"), ("f.tsv", '"prompt_id"\t"target_true"\r\n', "counterfact"),
    ("f.json", json.dumps({"facts": [TOLD]}), "world"),
    *((f"f{kind}", damaged, "own") for kind in (".jsonl", ".json", ".csv") for damaged in ("", "\n", "[", '["target_true"', "[" * 99999)),
    ("f.jsonl", '{"target_true', "own")])
def test_shape_goes_by_columns_not_by_texts(tmp_path, name, content, shape):
    assert shape_of(put(tmp_path / name, content)) == shape


def test_shape_of_parquet(tmp_path):
    for row, shape in ((TOLD, "own"), (flat_row(1), "counterfact"), (TOLD | {"not target_true": 1}, "own")):
        pd.DataFrame([row]).to_parquet(tmp_path / "f.parquet")
        assert shape_of(tmp_path / "f.parquet") == shape


def test_own_facts_about_counterfact_are_read_as_own(tmp_path):
    from mechunlearn.tasks import kind_of
    path = put(tmp_path / "mine.jsonl", lines([TOLD]))
    assert kind_of(str(path)) == "own" and read_own(path)[0].edit == " target_true"


def test_a_file_is_read_once_for_each_state_of_it(tmp_path, monkeypatch):
    from mechunlearn import sources
    read, real = [], sources.read_rows
    monkeypatch.setattr(sources, "read_rows", lambda *a: read.append(a) or real(*a))
    good = rome_row
    file = put(tmp_path / "f.json", json.dumps([good(7)]))
    first = read_counterfact(file)
    first.loc[0, "subject"] = "changed by whoever asked"
    assert read_counterfact(file).subject[0] == "Osselmere" and len(read) == 1
    put(file, json.dumps([good(7), good(8)]))
    assert len(read_counterfact(file)) == 2 and len(read) == 2
