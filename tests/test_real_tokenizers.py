"Subjects, words and the beginning of a sequence with the tokenizers of Llama 3, Gemma and Qwen3, on whole tables where they are present."
import csv, gzip, json, os, unicodedata
from pathlib import Path
import pytest, torch
from transformers import AutoTokenizer
from mechunlearn import models as M
from mechunlearn.models import Unlocatable, occurrence, wordlike
from mechunlearn.store import Refusal

NAMES = ("llama-3", "gemma", "qwen3", "gemma-3")
REFDATA = os.environ.get("MECHUNLEARN_REFDATA")
tables = pytest.mark.skipif(not REFDATA, reason="MECHUNLEARN_REFDATA does not point to a folder with the real tables")


class Words(M.LM):
    "An LM of which only the tokenizer is there."
    def __init__(self, tok, bos=None):
        self.tok, self.bos, self.chat, self.name = tok, bos, None, "words"
        self.hf = torch.nn.Module()
        self.hf.get_input_embeddings = lambda: torch.nn.Embedding(len(tok), 1, device="meta")


@pytest.fixture(scope="session", params=NAMES)
def words(request, real_tokenizer): return Words(real_tokenizer(request.param))


def table(name):
    "(prompt, subject) of every fact."
    file = Path(REFDATA) / name
    if name.endswith(".jsonl.gz"): return [(r["prompt"], r["subject"].strip()) for r in map(json.loads, gzip.open(file, "rt"))]
    rows = csv.DictReader(gzip.open(file, "rt") if name.endswith(".gz") else open(file))
    return [(r["prompt"], (r.get("subject") or r.get("athlete")).strip()) for r in rows]


# ---- subjects

@tables
@pytest.mark.parametrize("name", [pytest.param("counterfact/counterfact_filtered.jsonl.gz", marks=pytest.mark.slow), "counterfact/counterfact_probs.csv.gz", "sports/sports.csv"])
def test_every_subject_of_the_tables_is_located(words, name):
    prompts, subjects = zip(*table(name))
    assert words.locatable(prompts, subjects) == [None] * len(prompts)
    fused = 0
    for o, p, s, (start, stop) in zip(words.offsets(prompts), prompts, subjects, words.subject_positions(prompts, subjects)):
        a, b = o[start][0], o[stop - 1][1]
        extra = p[a:b].replace(s, "", 1)
        assert s in p[a:b] and not any(map(wordlike, extra)) and p[a:].rfind(s) == p[a:b].rfind(s)
        fused += bool(extra.strip())
    assert (fused > 0) == ("counterfact" in name)


@pytest.mark.parametrize("prompt, subject", [("The owner of tronc, Inc., is", "tronc, Inc."), ("Desi Arnaz, Jr.'s mother tongue is", "Desi Arnaz, Jr."),
    ('They call it "Rome", which lies in', "Rome"), ("(Rome) lies in", "Rome"), ("Al's father, who", "Al"), ("Al\n\nwas", "Al"), ("Who is 'N Sync?", "'N Sync"),
    ("A Paris-born man", "Paris"), ("Zoë Müller’s native", "Zoë Müller"), ("In Yahoo!'s office", "Yahoo!"), ("José.", unicodedata.normalize("NFC", "José"))])
def test_punctuation_in_a_subject_s_token_is_accepted(words, prompt, subject):
    (start, stop), = words.subject_positions([prompt], [subject])
    ids = words.ids([prompt])[0]
    assert subject in words.tok.decode(ids[start:stop or None])


LONGER = [("The capital of Algeria is", "Al"), ("Romeo lives in", "Rome"), ("The Beatlesque songs", "The Beatle"), ("Apollo 11 landed on", "Apollo 1"),
    ("Windows95 is made by", "Windows"), ("Łódź-Wschód, Łódźka", "dź"), ("naïve", "na"), (unicodedata.normalize("NFD", "José plays"), "Jose"), ("Москва́ — столица", "Моск"),
    ("Αθήναι", "Αθήνα"), ("my_Rome_x", "Rome"), ("McDonald", "Donald"), ("हिन्दी", "हिन्द"), ("القاهرة", "قاهرة"), ("Rome2Rio", "Rome")]


@pytest.mark.parametrize("prompt, subject", LONGER)
def test_a_subject_inside_a_longer_word_is_refused(words, prompt, subject):
    with pytest.raises(Unlocatable, match="only inside a longer word"): words.subject_positions([prompt], [subject])


@pytest.mark.parametrize("text, subject, at", [("Al was born in Algeria", "Al", 0), ("Romeo left Rome for Romeo", "Rome", 11), ("Al and Al", "Al", 7),
    ("東京タワーは東京", "東京", 6), ("東京は", "東京", 0), ("กรุงเทพมหานคร", "กรุงเทพ", 0), ("서울은", "서울", 0), ("AIは", "AI", 0), ("ビートルズの", "ビートルズ", 0),
    ("aaa aa", "aa", 4), ("北京大学", "北京", 0), ("ソニー", "ソニ", 0)])
def test_the_last_occurrence_as_a_whole_word(text, subject, at): assert occurrence(text, subject) == at


@pytest.mark.parametrize("one, other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_another_unicode_form_is_named_as_the_cause(words, one, other):
    prompt, subject = unicodedata.normalize(one, "José Müller plays the sport of"), unicodedata.normalize(other, "José Müller")
    with pytest.raises(Unlocatable, match="another Unicode form.*NFC, NFD.*write both in one"): words.subject_positions([prompt], [subject])
    assert words.locatable([prompt], [unicodedata.normalize(one, subject)]) == [None]


def test_locatable_says_why_for_each(words):
    why = words.locatable(["Al is", "Algeria is", "Bo is", "Al is"], ["Al", "Al", "Al", " "])
    assert why[0] is None and "longer word" in why[1] and "does not occur" in why[2] and "does not occur" in why[3]
    assert words.locatable([], []) == [] and words.subject_positions([], []) == []


def test_scripts_without_spaces_are_located_or_refused_in_words(words):
    prompts = [f"{s}{rest}" for s in ("東京", "กรุงเทพ", "北京", "서울") for rest in ("は日本の首都です", "เป็นเมือง", "是", "은 수도")]
    subjects = [s for s in ("東京", "กรุงเทพ", "北京", "서울") for _ in range(4)]
    why = words.locatable(prompts, subjects)
    assert all(w is None or "merges the subject" in w for w in why) and sum(w is None for w in why) > 10


# ---- the beginning of a sequence

TEXTS = ["Fact: Tiger Woods plays the sport of", "東京は", "", "\n\nHi", " Hi", "a\u0301", "x" * 300]


@pytest.fixture(scope="session", params=[*NAMES, "smollm2-135m", "organism"])
def any_words(request, real_tokenizer):
    return Words(AutoTokenizer.from_pretrained(M.DATA / "organism") if request.param == "organism" else real_tokenizer(request.param))


def test_ids_are_those_of_the_tokenizer(any_words):
    tok = any_words.tok
    assert any_words.ids(TEXTS) == [tok(t).input_ids for t in TEXTS]
    if tok.bos_token: assert any_words.ids([tok.bos_token + t for t in TEXTS]) == [tok(tok.bos_token + t, add_special_tokens=False).input_ids for t in TEXTS]


def test_bos_can_be_forced_and_spared(any_words):
    tok, text = any_words.tok, "Fact: Tiger Woods"
    bare = tok(text, add_special_tokens=False).input_ids
    assert Words(tok, bos=False).ids([text]) == [bare]
    if tok.bos_token is None:
        with pytest.raises(Refusal, match="no beginning-of-sequence token"): Words(tok, bos=True).ids([text])
    else: assert Words(tok, bos=True).ids([text, tok.bos_token + text]) == [[tok.bos_token_id, *bare]] * 2


def test_smollm2_gets_no_chat_turn(real_tokenizer):
    assert Words(real_tokenizer("smollm2-135m")).ids(["Hi there"]) == [[26843, 665]]


def test_lm_eval_feeds_the_same_ids(any_words, tiny):
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed: pip install mechunlearn[capability]")
    model = harness.HFLM(pretrained=tiny("qwen3").hf, tokenizer=any_words.tok, batch_size=1)
    texts = TEXTS + [f"{any_words.tok.bos_token}{t}" for t in TEXTS if any_words.tok.bos_token]
    assert any_words.ids(texts) == [model.tok_encode(t) for t in texts]
