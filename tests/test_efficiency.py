"Robustness against size: what is counted, and what is read from a run"
import pandas as pd
import pytest
from mechunlearn.efficiency import KEPT, beside_masks, edit_size, efficiency, line_of, plot_efficiency, say_efficiency
from mechunlearn.editors import lora
from mechunlearn.finetuning import parse_slice
from mechunlearn.localization import by_hand_in_part, build
from mechunlearn.sets import sports_athlete_editing
from mechunlearn.recorded_tables import recorded
from mechunlearn.store import Refusal


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_counted_as_they_are_trained(tiny, family):
    lm = tiny(family)
    t = sports_athlete_editing(lm, forget_size=4, seed=0)
    t = t.model_copy(update=dict(forget=tuple(f.model_copy(update=dict(prompt=f"Fact: {f.subject} plays")) for f in t.forget), retain=t.retain[:4], text_train=t.text_train[:4]))
    where = build(lm, "hand@mlp.1-2", by_hand_in_part(lm, "mlp.1-2")[0])
    edit = lora(lm, t, where, rank=3, steps=1, batch=2, retain_batch=2, text_batch=1, progress=False)
    shapes = {parse_slice(k).param: lm.weight(parse_slice(k).param).shape for k in edit.values}
    weights = [n for n in shapes if n.endswith("weight")]
    assert edit_size(edit.localization, edit.config, "lora") == 3 * sum(sum(shapes[n]) for n in weights)


def test_sizes_of_the_others(tiny):
    lm = tiny("llama")
    part = build(lm, "x", [], (1, 5))
    assert edit_size(part, {}) == part.n_params == 5 * part.step and edit_size(part, {"k": 3}, "mask") == 3 and edit_size(part, {}, "memit") == part.n_params


def test_lines():
    assert {line_of(n) for n in ("flu", "flu-path", "hand@mlp.1:4", "all-mlps", "nonlocalized")} == {"fine-tuning"}
    assert line_of("mask-7@random-mlps#2") == "mask@random-mlps" and line_of("random-mlps#2") == "fine-tuning@random-mlps" and line_of("memit@flu") == "memit@flu"


def test_a_run_without_edits_is_refused(tmp_path):
    with pytest.raises(Refusal): efficiency(tmp_path)


def test_what_is_recorded():
    t = recorded("efficiency")
    assert set(KEPT) <= set(t) and set(t.seed) == {-1, 0, 1, 2} and (t[t.localization == "none"]["size"] == 0).all()
    known = t[t.value.notna()]
    assert known.value.between(0, 1).all() and (known.ci_low <= known.value + 1e-9).all() and (known.value <= known.ci_high + 1e-9).all()
    assert len(t[(t.asked == "edit") & (t.measure == "top1") & (t.seed == -1)]) == 20


def test_figure_and_sentence_hold_what_is_in_the_table():
    t = recorded("efficiency")
    text, one = say_efficiency(t), t[(t.localization == "hand@mlp.1:4") & (t.asked == "same subject") & (t.measure == "top1") & (t.seed == -1)].iloc[0]
    assert f"{one.value:.2f} [{one.ci_low:.2f}, {one.ci_high:.2f}] of the other facts left" in text and "3 seeds" in text
    never = say_efficiency(t[t.localization.isin(["none", "mask-500@flu", "mask-2000@flu"])])
    assert "mask@flu: never, at most 0.48" in never and "with 2,000" in never
    fig = plot_efficiency(t)
    assert sum(a.get_visible() for a in fig.axes) == 6
    assert sum(a.get_visible() for a in plot_efficiency(t[t.asked.isin(["edit", "maintain"])]).axes) == 2


def test_published_masks_beside_ours():
    wide = beside_masks(recorded("efficiency"))
    assert wide.loc[("Gemma-2-9B, 6 million zeros", "flu"), "masked maintain accuracy"] == "0.77"
    assert pd.notna(wide.loc[("ours", "mask-8000@flu")]).all()
