"The comparison of two runs sees what it should, on the recorded tables"
import pandas as pd
import pytest
from mechunlearn.recorded_tables import recorded
from same_run import differences


@pytest.fixture(scope="module")
def table(): return recorded("metrics", forget_size=64)


def test_a_table_is_like_itself(table): assert differences("metrics", table, table.copy()) == []


def test_the_smallest_change_is_seen(table):
    new = table.copy()
    new.loc[new.index[3], "value"] += 1e-15 if new.value.iloc[3] < .5 else 2e-16
    assert differences("metrics", table, new) == [f"metrics: value differs in 1 of {len(new)} rows"]


def test_missing_is_not_zero(table):
    new = table.copy()
    new.loc[new.index[:2], "ci_low"] = pd.NA
    assert "ci_low differs in 2" in differences("metrics", table, new)[0]


def test_rows_and_columns_count(table):
    assert "rows" in differences("metrics", table, table.iloc[1:])[0]
    assert "columns" in differences("metrics", table, table.drop(columns="n"))[0]
