"""The page about the grid file: every key is explained, every example can be read."""
import pytest
import yaml
from mechunlearn.grids import Grid, Settings, parse
from mechunlearn.schema import MEANINGS, comments, keys, nested, shown


@pytest.mark.parametrize("model,needed", [(Grid, {"models": ["organism"], "localizations": ["flu"]}), (Settings, {})])
def test_every_key_is_explained_and_its_example_is_read(model, needed):
    table = keys(model)
    assert set(model.model_fields) <= set(table.key) and table.key.is_unique
    for r in table.itertuples():
        assert r.meaning or MEANINGS.get(r.key.rpartition(".")[2]), f"{r.key}: write a comment beside the field"
        parse(model, needed | yaml.safe_load(r.example), r.key)
        assert yaml.safe_load(r.example) == nested(r.key, r.value)


def test_types_and_defaults_are_those_of_the_structure():
    table = keys(Grid).set_index("key")
    assert table.type["draws"] == "whole number" and table.default["draws"] == "1" and table.default["models"] == "needed"
    assert keys(Settings).set_index("key").type["relearning.lora.rank"] == "whole number"
    assert comments(Settings)["inject"] == "weight of the loss on the edit answers"
    assert "relearning.lora.rank" in shown(keys(Settings))
