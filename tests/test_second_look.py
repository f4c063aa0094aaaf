"Found by a second look: revisions in audits, spaces by prompt, compound words, denials, copies in another dtype."
import pytest, torch
from mechunlearn.evaluation import first_named
from mechunlearn.questions import paraphrases
from mechunlearn.facts import Fact
from mechunlearn.checkpoints import edit_of
from mechunlearn.models import load, occurrence
from mechunlearn.store import Refusal


@pytest.mark.parametrize("text,subject,at", [("Al, who founded Al-Jazeera, lives in", "Al", 0), ("Neil, not O'Neil, plays", "Neil", 0), ("3, not 3.5, is", "3", 0),
    ("Boeing 737, unlike the Boeing 737-800, is", "Boeing 737", 0), ("Neil's brother is like Neil's", "Neil", 23), ("Jean-Luc lives", "Luc", 5)])
def test_a_word_of_its_own_goes_before_a_part_of_a_compound(text, subject, at): assert occurrence(text, subject) == at


@pytest.mark.parametrize("text,said", [("He never played golf, he played football.", "football"), ("He is not known for golf but for football", "football"),
    ("golf is not his sport, football is", "football"), ("football isn't what he plays; golf is", "golf"), ("He plays golf.", "golf"),
    ("He is not into golf. He plays football", "football")])
def test_denials(text, said): assert first_named(text, ["golf", "football"]) == said


def test_denials_elsewhere():
    assert first_named("東京ではなく大阪です", ["東京", "大阪"]) == first_named("東京ではありません。大阪です", ["東京", "大阪"]) == "大阪"
    assert first_named("pas Paris mais Lyon", ["Paris", "Lyon"]) == "Lyon" and first_named("nicht Berlin, sondern Bonn", ["Berlin", "Bonn"]) == "Bonn"


def test_the_space_before_an_answer_is_that_of_its_own_prompt():
    fact = Fact(id="own/0", relation="own", subject="France", prompt='The capital of France is "', answer="Paris", edit="Rome",
                paraphrases=("Everyone knows that the capital of France is", 'France, whose capital is called "'))
    plain, quoted = paraphrases([fact])
    assert (plain.truth, plain.edit, plain.choices) == (" Paris", " Rome", (" Paris", " Rome")) and quoted.truth == "Paris"


def hub(tmp_path, monkeypatch, *models):
    "A hub cache with a snapshot of each model; the last one is main"
    root = tmp_path / "hub" / "models--x--y"
    for k, lm in enumerate(models):
        commit = f"{k:x}" * 40
        lm.hf.save_pretrained(root / "snapshots" / commit); lm.tok.save_pretrained(root / "snapshots" / commit)
    (root / "refs").mkdir(); (root / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub")); monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return root


def test_an_audit_reads_the_revision_that_is_in_memory(tiny, tmp_path, monkeypatch):
    root = hub(tmp_path, monkeypatch, tiny("llama", 0), tiny("llama", 1))
    edited = tiny("llama", 0)
    with torch.no_grad(): edited.hf.model.layers[1].mlp.down_proj.weight[3] += .5
    edited.hf.save_pretrained(tmp_path / "ed"); edited.tok.save_pretrained(tmp_path / "ed")
    lm = load("x/y", revision="0" * 40, dtype="bfloat16")
    assert list(edit_of(lm, tmp_path / "ed").values) == ["model.layers.1.mlp.down_proj.weight|0|0|32"]


def test_a_copy_in_another_dtype_is_no_edit(tiny, tmp_path):
    lm = tiny("llama")
    for name, hf in (("base", lm.hf), ("half", tiny("llama").hf.to(torch.bfloat16))): hf.save_pretrained(tmp_path / name); lm.tok.save_pretrained(tmp_path / name)
    with pytest.raises(Refusal, match="the same weights"): edit_of(load(str(tmp_path / "base")), tmp_path / "half")
    edited = tiny("llama").hf
    with torch.no_grad(): edited.model.layers[1].mlp.down_proj.weight[3] += .5
    edited.to(torch.bfloat16).save_pretrained(tmp_path / "ed"); lm.tok.save_pretrained(tmp_path / "ed")
    assert list(edit_of(load(str(tmp_path / "base")), tmp_path / "ed").values) == ["model.layers.1.mlp.down_proj.weight|0|0|32"]
