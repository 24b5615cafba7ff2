"""Checks of every text and image before the first training step, so that training does not end at one in the middle."""

from collections import defaultdict
from collections.abc import Callable, Sequence

from safervlm.data.loaders import Collator
from safervlm.errors import RecordError
from safervlm.failures import reason_of
from safervlm.io.images import ImageSettings, decode
from safervlm.records import Example

# Two texts of equal length may differ in length by a few tokens within a prompt, as tokenizers merge neighbours.
MERGED = 16


def require_trainable(examples: Sequence[Example], collator: Collator, settings: ImageSettings) -> None:
    """Checks each different text of some examples, each image, and texts and images together.

    Args:
        examples: Examples to train or validate on.
        collator: The model's.
        settings: How the model's images are decoded.

    Raises:
        RecordError: The model can't take an example; the message has the number of such texts or images and names one.
    """
    lengths = require_usable_texts(examples, collator)
    sizes = require_readable_images(examples, settings)
    require_fitting_examples(examples, collator, lengths, sizes)


def require_usable_texts(examples: Sequence[Example], collator: Collator) -> list[int]:
    """Checks each different text of some examples once.

    Args:
        examples: Examples to train or validate on.
        collator: The model's collator. If it has no method ``check_texts``, nothing is checked.

    Returns:
        For each example, the number of tokens of its texts, without those of its image; 0 if it is not known.

    Raises:
        RecordError: The model can't process a text; the message states the number of such texts and names one.
    """
    check: Callable[[Example], int] | None = getattr(collator, "check_texts", None)
    if check is None:
        return [0] * len(examples)
    texts = [(each.question.prompt, each.completions) for each in examples]
    different = dict(zip(texts, examples, strict=True))
    lengths, reasons = {}, []
    for text, each in different.items():
        try:
            lengths[text] = check(each)
        except BaseException as error:
            reasons.append(reason_of(error))
    _none_may_fail("texts", reasons, len(different))
    return [lengths[text] for text in texts]


def require_readable_images(examples: Sequence[Example], settings: ImageSettings) -> dict[str, tuple[int, int]]:
    """Decodes each different image of some examples once.

    Args:
        examples: Examples to train or validate on.
        settings: How the model's images are decoded.

    Returns:
        Width and height of each image as it is shown, by its path.

    Raises:
        RecordError: Images can't be decoded; the message states their number and names one.
    """
    about = {each.question.image_path: each.question.id for each in examples if each.question.image_path is not None}
    sizes, reasons = {}, []
    for path, name in about.items():
        try:
            sizes[path] = decode(path, name, settings).image.size
        except BaseException as error:
            reasons.append(reason_of(error))
    _none_may_fail("images", reasons, len(about))
    return sizes


def require_fitting_examples(
    examples: Sequence[Example], collator: Collator, lengths: Sequence[int], sizes: dict[str, tuple[int, int]]
) -> None:
    """Encodes the longest example of each size of images, as the size decides how many tokens an image has.

    Args:
        examples: Examples to train or validate on.
        collator: The model's. Without a method ``check_whole`` its texts have been checked together with their images.
        lengths: Results of :func:`require_usable_texts`.
        sizes: Results of :func:`require_readable_images`.

    Raises:
        RecordError: The model can't take an example, because it is too long together with its image, or because the
            processor rejects an image of this size; the message has the number of such examples and names one.
    """
    check: Callable[[Example], int] | None = getattr(collator, "check_whole", None)
    if check is None:
        return
    of_size: dict[object, dict[object, tuple[int, Example]]] = defaultdict(dict)
    for example, length in zip(examples, lengths, strict=True):
        asked = example.question
        size = None if asked.image_path is None else sizes[asked.image_path]
        of_size[size].setdefault((asked.prompt, example.completions), (length, example))
    reasons = []
    for same in of_size.values():
        for _, example in sorted(same.values(), key=lambda pair: -pair[0]):
            try:
                room = check(example)
            except BaseException as error:
                reasons.append(reason_of(error))
                continue
            if room >= MERGED:  # shorter ones fit, too
                break
    _none_may_fail("texts with images", reasons, sum(map(len, of_size.values())))


def _none_may_fail(kind: str, reasons: Sequence[str], total: int) -> None:
    if reasons:
        raise RecordError(f"data: {len(reasons)} of {total} {kind} can't be trained on; {reasons[0]}, then start again")
