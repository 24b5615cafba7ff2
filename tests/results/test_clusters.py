import pandas as pd
import pytest

from safervlm.results.clusters import CONCEPT, IMAGE, IMAGE_OF_CONCEPT, QUESTION, cluster_numbers, concepts_of, units_of

# Names repeat between datasets, categories and capabilities: only the whole key tells them apart.
ROWS = pd.DataFrame(
    [
        ("u", "weapons", "knife", "1.png", "alignment", 0, "a"),
        ("u", "weapons", "knife", "1.png", "alignment", 1, "b"),
        ("u", "weapons", "knife", "2.png", "alignment", 0, "c"),
        ("u", "tools", "knife", "1.png", "alignment", 0, "d"),
        ("s", "tools", "knife", "1.png", "alignment", 0, "e"),
        ("s", "tools", "hammer", "1.png", "alignment", 0, "f"),
        ("u", "weapons", "knife", "", "alignment_text_only", 0, "g"),
        ("u", "weapons", "knife", "", "alignment_text_only", 1, "h"),
        ("u", "weapons", "knife", "", "context_text_only", 0, "i"),
    ],
    columns=[*QUESTION, "id"],
)


@pytest.mark.parametrize(
    "keys", [CONCEPT, IMAGE, IMAGE_OF_CONCEPT, QUESTION], ids=["concept", "image", "both", "question"]
)
def test_a_cluster_is_identified_by_its_whole_key(keys: list[str]) -> None:
    named = [tuple(row[key] for key in keys) for _, row in ROWS.iterrows()]
    order = {name: number for number, name in enumerate(sorted(set(named)))}
    assert cluster_numbers(ROWS, keys).tolist() == [order[name] for name in named]


def test_equal_image_names_in_two_datasets_are_two_images() -> None:
    numbers = dict(zip(ROWS["id"], cluster_numbers(ROWS, IMAGE), strict=True))
    assert numbers["a"] == numbers["b"] == numbers["d"]
    assert numbers["d"] != numbers["e"]


def test_each_concept_has_its_dataset_and_category() -> None:
    concepts, datasets, categories = concepts_of(ROWS)
    # In order: hammer and knife of s, the tool and the weapon of u.
    assert concepts.tolist() == [3, 3, 3, 2, 1, 0, 3, 3, 3]
    assert datasets.tolist() == [0, 0, 1, 1]
    assert categories.tolist() == [0, 0, 0, 1]


def test_question_without_an_image_is_its_own_sampling_unit() -> None:
    groups = ROWS.groupby(units_of(ROWS))["id"].agg("".join)
    assert sorted(groups) == ["ab", "c", "d", "e", "f", "g", "h", "i"]
