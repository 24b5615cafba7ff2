"""Equivalent Unicode spellings are normalised to one name; nothing else of a name changes."""

import pytest

from safervlm.errors import ArgumentError
from safervlm.io import names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" Angry Mob\n", "Angry Mob"),
        ("Angry\u00a0Mob", "Angry Mob"),
        ("\u200bAngry\u2009Mob\ufeff", "Angry Mob"),
        ("Ang\u00adry Mob", "Angry Mob"),
        ("cafe\u0301", "café"),
        ("\u1100\u1161", "가"),
        ("\u200fname\u200e", "name"),
        ("ﬁn", "ﬁn"),  # NFC does not merge ligatures, superscripts and wide letters
        ("a\x07b<i>", "a\x07b<i>"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),  # a joiner within a word is visible
        ("\ud83d x", "\ud83d x"),
        ("Kn\u200dife", "Knife"),  # but none within a word of ASCII
        ("An\u200egry\u200c Mob\ufe0f", "Angry Mob"),
        ("\u2763\ufe0f x", "\u2763\ufe0f x"),  # an emoji, in colours
        ("Kn\u2062ife\u3164", "Knife"),
        ("caf\u0065\u034f\u0301\u180e", "café"),
        ("\u200b \u00a0", ""),
    ],
)
def test_normal_name_is_canonical_and_idempotent(text: str, name: str) -> None:
    assert names.normal_name(text) == name
    assert names.normal_name(name) == name


@pytest.mark.parametrize("value", [True, False, None, [], {}, "", " "])
def test_non_text_label_is_rejected_with_a_remedy(value: object) -> None:
    with pytest.raises(ArgumentError, match=r"^data\.unsafe: .*(quotes|empty)"):
        names.label_names("data.unsafe", ["1", value])


def test_numeric_labels_are_converted_to_text() -> None:
    assert names.label_names("data.unsafe", [1, "Un\u00adsafe ", 1.5]) == ("1", "Unsafe", "1.5")


@pytest.mark.parametrize("name", ["", " ", "a/b", ".", "..", "\u200b"])
def test_dataset_name_that_makes_ids_ambiguous_is_rejected(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"^data\.name: a name without a slash"):
        names.set_name("data.name", name)


@pytest.mark.parametrize("path", ["", " ", "a\0b"])
def test_empty_or_invalid_path_is_rejected(path: str) -> None:
    with pytest.raises(ArgumentError, match=r"^data\.folder: "):
        names.path_text("data.folder", path)
