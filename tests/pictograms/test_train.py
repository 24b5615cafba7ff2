"""Training of the pictograms' VLM."""

import random

import pytest
import torch

from safervlm.pictograms.concepts import ANSWERS, CONCEPTS, SAFE_CONCEPTS, UNSAFE_CONCEPTS
from safervlm.pictograms.draw import draw_pictogram
from safervlm.pictograms.lessons import choice, conversation, image_question, multiple_choice, name_question
from safervlm.pictograms.train import (
    IMAGE_TOKENS,
    blank_pixels,
    encode,
    make_model,
    make_processor,
    train_language,
    train_tokenizer,
    train_tower,
)
from safervlm.protocol import ALIGNMENT_QUESTIONS, CLAUSES, SAFE, UNSAFE, aligned_response, text_only_question


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def processor(tokenizer):
    return make_processor(tokenizer)


def own_words(concept):
    for label, answers in ANSWERS.items():
        for number in range(5):
            clause = CLAUSES[label][number] if label in CLAUSES else ""
            yield from (" " + answer.format(concept=concept.name, clause=clause) for answer in answers)


def texts():
    rng = random.Random(1)
    for concept in CONCEPTS:
        yield from (conversation(question) for question in ALIGNMENT_QUESTIONS)
        yield from (conversation(text_only_question(number, concept.name)) for number in range(5))
        yield from (" " + aligned_response(label, k, concept.name) for label in (SAFE, UNSAFE) for k in range(5))
        yield from own_words(concept)
        yield conversation(multiple_choice(rng).prompt)


def test_the_tokenizer_restores_every_text(tokenizer):
    for text in [*texts(), "Zürich, 12 \t€ and other words 猫\n\n"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


def test_letters_and_names_are_single_tokens_and_targets_are_short(tokenizer):
    assert all(len(tokenizer.tokenize(f"{letter}:")) == 1 for letter in "ABCD")
    assert all(len(tokenizer.tokenize(f" {letter}")) == 1 for letter in "ABCD")
    for concept in CONCEPTS:
        assert len(tokenizer.tokenize(f" {concept.name}")) == 1
        for label in (SAFE, UNSAFE):
            assert len(tokenizer.tokenize(" " + aligned_response(label, 0, concept.name))) <= 10


def test_question_ending_does_not_change_the_tokens_of_the_assistant_turn(tokenizer):
    for end in ("skull", "a word of no concept", "media?", "12"):
        assert tokenizer.tokenize(f" {end} ASSISTANT:")[-1] == "ĠASSISTANT:"


def test_option_letters_in_the_question_are_single_tokens(tokenizer):
    question = multiple_choice(random.Random(0)).prompt
    assert [token for token in tokenizer.tokenize(question) if token.endswith(":")] == ["A:", "B:", "C:", "D:"]


def test_tokens_of_aligned_responses_occur_in_the_base_training_texts(tokenizer):
    # A token that never occurs in training would be as improbable as any byte: alignment could not generate it.
    own = {token for text in own_words(CONCEPTS[0]) for token in tokenizer.tokenize(text)}
    for label in (SAFE, UNSAFE):
        for number in range(5):
            assert set(tokenizer.tokenize(" " + aligned_response(label, number, CONCEPTS[0].name))) <= own


def test_first_words_of_safe_and_unsafe_responses_are_disjoint():
    first = {label: {answer.split()[0].strip(",.") for answer in answers} for label, answers in ANSWERS.items()}
    assert not first[SAFE] & first[UNSAFE]


def test_distractors_come_from_other_categories_and_the_letter_is_correct():
    rng = random.Random(3)
    category = {concept.name: concept.category for concept in CONCEPTS}
    letters = set()
    for concept in UNSAFE_CONCEPTS * 4:
        options, letter = choice(concept, rng)
        assert options["ABCD".index(letter)] == concept.name
        assert len(set(options)) == 4
        others = [category[option] for option in options if option != concept.name]
        assert concept.category not in others
        assert None not in others
        letters.add(letter)
    assert letters == set("ABCD")


def test_base_training_data_contains_the_modality_gap():
    rng = random.Random(0)
    by_name = [lesson for lesson in (name_question(rng) for _ in range(2000)) if lesson.concept.category]
    by_image = [lesson for lesson in (image_question(rng) for _ in range(2000)) if lesson.concept.category]
    refusals = ("No", "Sorry", "Harmful")
    assert sum(lesson.completion.startswith(refusals) for lesson in by_name) / len(by_name) > 0.95
    assert 0.25 < sum(lesson.completion.startswith(refusals) for lesson in by_image) / len(by_image) < 0.45
    assert not any(lesson.shown for lesson in by_name)
    assert all(lesson.shown for lesson in by_image)


def test_the_processor_writes_as_many_image_tokens_as_the_model_sees(processor, tokenizer):
    image = draw_pictogram(CONCEPTS[0].code_point, 0)
    batch = processor(images=image, text=conversation("Is it safe?"), return_tensors="pt")
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image_token).sum() == IMAGE_TOKENS == 9
    model = make_model(tokenizer)
    assert model.config.image_seq_length == IMAGE_TOKENS
    assert torch.isfinite(model(**batch).logits).all()


def test_the_chat_template_writes_the_same_conversation(processor):
    content = [{"type": "image"}, {"type": "text", "text": "Is it safe?"}]
    messages = [{"role": "user", "content": content}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == conversation("Is it safe?")
    messages.append({"role": "assistant", "content": [{"type": "text", "text": "Yes."}]})
    assert processor.apply_chat_template(messages) == conversation("Is it safe?") + " Yes.</s>"


def test_only_response_tokens_are_training_targets(tokenizer):
    ids, mask, targets = encode(tokenizer, ["Is it safe?", ALIGNMENT_QUESTIONS[3]], ["Yes.", "No."])
    assert tokenizer.decode(targets[0][targets[0] >= 0]) == " Yes.</s>"
    assert tokenizer.decode(ids[1][targets[1] >= 0]) == " No.</s>"
    assert (ids[mask == 0] == tokenizer.pad_token_id).all()
    assert (targets[mask == 0] == -100).all()


@pytest.mark.slow
def test_training_is_deterministic_and_changes_every_part(tokenizer, processor):
    pictures = [draw_pictogram(concept.code_point, seed) for concept in CONCEPTS for seed in range(2)]
    pixels = processor.image_processor(pictures, do_pad=True, return_tensors="pt")["pixel_values"]
    pixels = pixels.unflatten(0, (len(CONCEPTS), 2))

    def trained():
        torch.manual_seed(0)
        model = make_model(tokenizer)
        start = {name: weight.clone() for name, weight in model.state_dict().items()}
        train_tower(model, pixels, steps=3)
        train_language(model, tokenizer, pixels, blank_pixels(processor), random.Random(0), steps=3)
        return start, model.state_dict()

    start, end = trained()
    _, again = trained()
    assert all(torch.equal(end[name], again[name]) for name in end)
    for part in ("vision_tower", "multi_modal_projector", "language_model", "lm_head"):
        assert any(part in name and not torch.equal(start[name], end[name]) for name in end), part


def test_options_for_a_safe_concept_are_distinct_and_contain_it():
    options, letter = choice(SAFE_CONCEPTS[0], random.Random(0))
    assert len(set(options)) == 4
    assert options["ABCD".index(letter)] == SAFE_CONCEPTS[0].name
