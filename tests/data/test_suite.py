"""Suites of several datasets: the failure of one dataset does not affect the others."""

import pytest

from safervlm.data.module import Parts, SaferData
from safervlm.data.suite import Suite
from safervlm.errors import RecordError
from safervlm.records import Example, Question


class Set(SaferData):
    def __init__(self, name, count=2, missing="", limit=None):
        super().__init__()
        self.name, self.count, self.missing, self.limit = name, count, missing, limit

    def prepare_data(self):
        if self.missing == "fetch":
            raise RecordError(f"{self.name}: the Hub denies access")

    def load(self):
        if self.missing:
            raise RecordError(f"{self.name}: a record can't be used")
        names = [f"{self.name}/{n}" for n in range(self.limit or self.count)]
        return Parts(
            predict=[Example(Question(n, self.name, n, None, "alignment", 0, "?", "", "", "Safe")) for n in names]
        )


def ids(suite):
    return [example.question.id for example in suite.parts.predict]


def test_suite_concatenates_its_datasets_in_order():
    suite = Suite({"a": Set("A"), "b": Set("B", 1)})
    assert ids(suite) == ["A/0", "A/1", "B/0"]
    assert list(suite.describe()["sets"]) == ["a", "b"]
    assert ids(Suite({"a": Set("A"), "b": Set("B", 1)}, only=["b"])) == ["B/0"]
    assert ids(Suite({"a": Set("A", 9), "b": Set("B", 9)}, limit=1)) == ["A/0", "B/0"]
    with pytest.raises(ValueError, match=r"data\.only: no dataset 'c'; there are a, b"):
        Suite({"a": Set("A"), "b": Set("B")}, only=["c"])


@pytest.mark.parametrize("missing", ["fetch", "load"])
def test_an_unavailable_dataset_is_skipped_and_reported_once(missing, capsys):
    suite = Suite({"a": Set("A", missing=missing), "b": Set("B")})
    suite.prepare_data()
    assert ids(suite) == ["B/0", "B/1"]
    assert list(suite.left_out) == ["a"]
    assert list(suite.describe()["sets"]) == ["b"]
    assert capsys.readouterr().out.count("a is skipped: A:") == 1
    alone = Suite({"a": Set("A", missing=missing)})
    alone.prepare_data()
    with pytest.raises(RecordError, match=r"data\.sets: none of a is available"):
        ids(alone)


def test_error_of_a_dataset_names_its_argument_within_the_suite(capsys):
    class Elsewhere(Set):
        def load(self):
            raise RecordError("data.name: there is no ./data.name in data.tsv; give another data.name")

    suite = Suite({"a": Elsewhere("A"), "b": Set("B")}, own={"mine": Elsewhere("Mine")})
    ids(suite)
    said = "there is no ./data.name in data.tsv; give another"
    assert suite.left_out == {
        "a": f"data.sets.a.name: {said} data.sets.a.name",
        "mine": f"data.own.mine.name: {said} data.own.mine.name",
    }
    assert "a is skipped: data.sets.a.name" in capsys.readouterr().out


def test_two_datasets_with_one_name_are_rejected():
    with pytest.raises(RecordError, match=r"data\.sets: a and b both contain alignment questions of 'A'"):
        ids(Suite({"a": Set("A"), "b": Set("A")}))


def test_custom_datasets_extend_the_datasets_of_a_recipe():
    assert ids(Suite({"a": Set("A", 1)}, own={"mine": Set("Mine", 1)})) == ["A/0", "Mine/0"]
    assert ids(Suite({"a": Set("A", 1)}, own={"mine": Set("Mine", 1)}, only=["mine"])) == ["Mine/0"]
    with pytest.raises(ValueError, match=r"data\.own: 'a' is one of data\.sets already"):
        Suite({"a": Set("A", 1)}, own={"a": Set("Mine", 1)})


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one_is_rejected(limit):
    with pytest.raises(ValueError, match=rf"data\.limit: at least 1, or null, got {limit}"):
        Suite({"a": Set("A")}, limit=limit)
