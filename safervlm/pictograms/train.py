"""Trains the pictogram world's vision-language model from scratch, on the CPU, in one or two minutes.

1. The vision tower is trained to classify the concepts and is then frozen.
2. The projector and the language model are trained on multiple choice, alignment questions about an image and about a
   concept's name, and captions. Auxiliary linear heads on intermediate hidden states speed up training (without them,
   multiple choice stays at chance level for hundreds of steps). They are discarded afterwards.

The model responds in the wording of :mod:`safervlm.pictograms.concepts` and reproduces the gap reported in the paper:
it recognises the concepts in images, and classifies unsafe concepts as unsafe by name, but mostly as safe by image.
"""

import random
from collections.abc import Sequence
from math import cos, pi

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from safervlm.hashing import seed_for
from safervlm.io.progress import track
from safervlm.pictograms.concepts import ANSWERS, CAPTION_QUESTION, CONCEPTS
from safervlm.pictograms.draw import draw_pictogram
from safervlm.pictograms.lessons import (
    BOS,
    EOS,
    IMAGE,
    PAD,
    PICTURES_PER_CONCEPT,
    UNKNOWN,
    Lesson,
    caption,
    conversation,
    image_question,
    multiple_choice,
    name_question,
)
from safervlm.protocol import (
    ALIGNMENT_QUESTIONS,
    CLAUSES,
    NOT_APPLICABLE,
    OPTIONS,
    aligned_response,
    text_only_question,
)

IMAGE_EDGE, PATCH, WIDTH = 48, 16, 128
IMAGE_TOKENS = (IMAGE_EDGE // PATCH) ** 2
IGNORED = -100  # cross entropy's default ignore_index
# LLaVA-1.5's conversation template, for tools that format messages by a chat template.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ASSISTANT: ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def expanded(prompt: str) -> str:
    """Returns the conversation with one image token per patch of the image.

    Args:
        prompt: Text of the question.
    """
    return conversation(prompt).replace(IMAGE, IMAGE * IMAGE_TOKENS)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer whose tokens are phrases: the concepts' names and the text between them.

    Short sequences make training fast. With few tokens per target, the token that determines the label has more weight.
    Any other text is encoded by smaller tokens.
    """
    rng = random.Random(0)
    corpus = [conversation(multiple_choice(rng).prompt) for _ in range(8 * len(CONCEPTS))]
    for concept in CONCEPTS:
        corpus += [f" {letter}" for letter in OPTIONS]
        corpus += [conversation(question) for question in (*ALIGNMENT_QUESTIONS, CAPTION_QUESTION)]
        for number in range(len(ALIGNMENT_QUESTIONS)):
            corpus.append(conversation(text_only_question(number, concept.name)))
            for label, clauses in CLAUSES.items():
                corpus.append(" " + aligned_response(label, number, concept.name))
                corpus += [" " + text.format(concept=concept.name, clause=clauses[number]) for text in ANSWERS[label]]
        corpus += [" " + text.format(concept=concept.name) for text in ANSWERS[NOT_APPLICABLE]]

    name = f"(?:{'|'.join(sorted((concept.name for concept in CONCEPTS), key=len, reverse=True))})(?!\\w)"
    # In order: line end, speaker or letter of an option, name of a concept, other words, punctuation, white space.
    pieces = Regex(rf" ?\n| ?\w+:| ?{name}|(?: ?(?!{name})\w++(?!:))+| ?[^\w\s]+|\s")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=2,
        special_tokens=[PAD, BOS, EOS, UNKNOWN, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Returns LLaVA-1.5's processor for images of 48 x 48 pixels, with a centre crop unless padding is requested.

    Args:
        tokenizer: Tokenizer of the model.
    """
    image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": IMAGE_EDGE}, crop_size={"height": IMAGE_EDGE, "width": IMAGE_EDGE}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Returns an untrained LLaVA of 1.1 million parameters, initialised by torch's global generator.

    Args:
        tokenizer: Tokenizer of the model; defines the vocabulary size and the special tokens.
    """
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_EDGE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    # transformers' initial scale of .02 is suitable for widths in the thousands; at width 128, training would stall.
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.get_input_embeddings().weight, std=4 * WIDTH**-0.5)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    return model


def encode(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], completions: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Encodes questions with their responses, right-padded.

    Args:
        tokenizer: Tokenizer of the model.
        prompts: Texts of the questions.
        completions: Texts of the responses, one per question.

    Returns:
        Token ids (n, length), attention mask (n, length) and training targets (n, length): the ids of the response, and
        ``IGNORED`` elsewhere.
    """
    questions = tokenizer([expanded(prompt) for prompt in prompts])["input_ids"]
    answers = tokenizer([f" {text}{EOS}" for text in completions], add_special_tokens=False)["input_ids"]
    length = max(len(question) + len(answer) for question, answer in zip(questions, answers, strict=True))
    ids = torch.full((len(questions), length), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    targets = torch.full_like(ids, IGNORED)
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        end = len(question) + len(answer)
        ids[row, :end] = torch.tensor(question + answer)
        mask[row, :end] = 1
        targets[row, len(question) : end] = torch.tensor(answer)
    return ids, mask, targets


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Computes the learning rate: 30 steps of linear warm-up and a cosine decay to 3 percent of the peak.

    Args:
        step: Number of the update, from 0.
        steps: Total number of updates.
        peak: Maximum learning rate.
    """
    return peak * min(1.0, (step + 1) / 30) * (0.03 + 0.97 * 0.5 * (1 + cos(pi * step / steps)))


class OptimizerWithSchedule:
    """Optimiser with learning rate schedule: AdamW, gradients clipped at norm 1.

    Args:
        modules: Modules to train. Frozen parameters are skipped.
        peak: Maximum learning rate.
        steps: Total number of updates.
        decay: Weight decay.
    """

    def __init__(self, modules: Sequence[nn.Module], peak: float, steps: int, decay: float) -> None:
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=peak, betas=(0.9, 0.98), weight_decay=decay, fused=True)
        self.peak, self.steps = peak, steps

    def step(self, loss: Tensor, number: int) -> None:
        """Performs one update.

        Args:
            loss: Scalar loss.
            number: Number of the update, from 0.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, self.steps, self.peak)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()


def augment(pixels: Tensor) -> Tensor:
    """Shifts images cyclically by up to three pixels, in groups of 16, and changes contrast and colour of each image.

    Args:
        pixels: Images, (n, 3, height, width).

    Returns:
        The changed images, of the same shape.
    """
    chunks = []
    for chunk in pixels.split(16):
        down, right = torch.randint(-3, 4, (2,)).tolist()
        chunks.append(chunk.roll((down, right), dims=(2, 3)))
    shifted = torch.cat(chunks)
    contrast = 1 + 0.15 * (2 * torch.rand(len(pixels), 1, 1, 1) - 1)
    colour = 0.3 * (2 * torch.rand(len(pixels), 3, 1, 1) - 1)
    return shifted * contrast + colour


def patches(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Computes the vision tower's hidden states of the patches.

    Args:
        model: Model with the vision tower.
        pixels: Images, (n, 3, height, width).

    Returns:
        Hidden states of the last layer, (n, IMAGE_TOKENS, WIDTH), without the class token.
    """
    return model.model.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def blank_pixels(processor: LlavaProcessor) -> Tensor:
    """Returns the blank white image that is shown with text-only questions, (3, height, width).

    Args:
        processor: Processor of the model.
    """
    blank = Image.new("RGB", (1000, 1000), "white")
    return processor.image_processor(blank, do_pad=True, return_tensors="pt")["pixel_values"][0]


def train_tower(model: LlavaForConditionalGeneration, pixels: Tensor, steps: int = 750) -> None:
    """Trains the vision tower to classify the concepts, and freezes it.

    Args:
        model: Model whose vision tower is trained in place.
        pixels: Training images, (concepts, images per concept, 3, height, width).
        steps: Number of updates, each on a batch of 64 images.
    """
    tower = model.model.vision_tower
    head = nn.Linear(WIDTH, len(CONCEPTS))
    course = OptimizerWithSchedule([tower, head], peak=2e-3, steps=steps, decay=0.05)
    for step in track(range(steps), "vision tower"):
        concepts = torch.randint(pixels.shape[0], (64,))
        shown = augment(pixels[concepts, torch.randint(pixels.shape[1], (64,))])
        logits = head(patches(model, shown).mean(dim=1))
        course.step(F.cross_entropy(logits, concepts, label_smoothing=0.05), step)
    tower.requires_grad_(False)


def train_language(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pixels: Tensor,
    blank: Tensor,
    rng: random.Random,
    steps: int = 560,
) -> None:
    """Trains the projector and the language model to respond.

    Args:
        model: Model to train in place. Its vision tower must be trained and frozen (:func:`train_tower`).
        tokenizer: Tokenizer of the model.
        pixels: Training images, (concepts, images per concept, 3, height, width).
        blank: Image that is shown with a question about a name, (3, height, width).
        rng: Source of random numbers for the lessons.
        steps: Number of updates, each on a batch of 40 lessons.
    """
    # Tokens around the options' names; the auxiliary heads use the hidden states of the name tokens between them.
    letters = torch.tensor(tokenizer.convert_tokens_to_ids([f"{letter}:" for letter in OPTIONS]))
    around = tokenizer(f" \n ASSISTANT:{PAD}", add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    around = torch.cat([letters, around])
    which = {concept: number for number, concept in enumerate(CONCEPTS)}
    letter_head, match_head = nn.Linear(WIDTH, len(OPTIONS)), nn.Linear(WIDTH, 1)
    concept_head = nn.Linear(WIDTH, len(CONCEPTS))
    course = OptimizerWithSchedule([model, letter_head, match_head, concept_head], peak=2.5e-3, steps=steps, decay=0.02)
    with torch.no_grad():  # the tower is frozen: each image's states are computed once, with two augmentations
        seen = torch.stack([patches(model, augment(pixels.flatten(0, 1))) for _ in range(2)], dim=1)
        seen = seen.unflatten(0, pixels.shape[:2]).flatten(1, 2)
        unseen = patches(model, blank[None])[0]

    def read(lessons: Sequence[Lesson]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns token ids, targets, hidden states after the second layer and hidden states after the last layer."""
        ids, mask, targets = encode(tokenizer, [x.prompt for x in lessons], [x.completion for x in lessons])
        image = torch.stack(
            [seen[which[x.concept], rng.randrange(seen.shape[1])] if x.shown else unseen for x in lessons]
        )
        embeddings = model.get_input_embeddings()(ids)
        places = (ids == model.config.image_token_index)[..., None]
        embeddings = embeddings.masked_scatter(places, model.model.multi_modal_projector(image))
        states = model.model.language_model(inputs_embeds=embeddings, attention_mask=mask, output_hidden_states=True)
        return ids, targets, states.hidden_states[2], states.last_hidden_state

    def answer_loss(targets: Tensor, states: Tensor, first: float, rest: float) -> Tensor:
        """Computes the weighted mean cross entropy of response tokens; ``first`` is the weight of the first ones."""
        learnt = targets[:, 1:] != IGNORED
        losses = F.cross_entropy(model.lm_head(states[:, :-1][learnt]), targets[:, 1:][learnt], reduction="none")
        starts = (targets[:, :-1] == IGNORED)[learnt]
        return (losses * torch.where(starts, first, rest)).mean()

    for step in track(range(steps), "language model"):
        choices = [multiple_choice(rng) for _ in range(16)]
        ids, targets, middle, last = read(choices)
        loss = answer_loss(targets, last, first=2.0, rest=1.0)
        option = torch.isin(ids, letters).cumsum(dim=1) - 1
        names = (option >= 0) & ~torch.isin(ids, around) & (targets == IGNORED)
        right = torch.tensor([OPTIONS.index(lesson.completion) for lesson in choices])
        matches = (option == right[:, None])[names].float()
        loss = loss + F.cross_entropy(letter_head(middle[names]), option[names])
        loss = loss + F.binary_cross_entropy_with_logits(match_head(middle[names])[:, 0], matches)

        lessons = [image_question(rng) for _ in range(13)] + [name_question(rng) for _ in range(8)]
        lessons += [caption(rng) for _ in range(3)]
        ids, targets, middle, last = read(lessons)
        ends = (targets != IGNORED).int().argmax(dim=1) - 1
        concepts = torch.tensor([which[lesson.concept] for lesson in lessons])
        loss = loss + 0.75 * answer_loss(targets, last, first=1.5, rest=1.0)
        loss = loss + F.cross_entropy(concept_head(middle[torch.arange(len(ends)), ends]), concepts)
        course.step(loss, step)


def train_vlm(
    tokenizer: PreTrainedTokenizerFast, processor: LlavaProcessor, seed: int, perturbation: float = 0.0
) -> LlavaForConditionalGeneration:
    """Trains a base model.

    Args:
        tokenizer: Tokenizer of the model.
        processor: Processor of the model. It converts images to pixels, padded to a square.
        seed: Seed of the training images, the lessons and, by torch's global generator, the initial weights.
        perturbation: Relative size of random changes of the initial weights.

    Returns:
        The model, in evaluation mode.
    """
    torch.manual_seed(seed)
    model = make_model(tokenizer)
    if perturbation:
        noise = torch.Generator().manual_seed(seed)  # a separate generator: later random numbers stay the same
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + perturbation * torch.randn(weight.shape, generator=noise))
    pictures = [
        draw_pictogram(concept.code_point, seed_for("training picture", seed, concept.name, number))
        for concept in track(CONCEPTS, "training pictures")
        for number in range(PICTURES_PER_CONCEPT)
    ]
    pixels = processor.image_processor(pictures, do_pad=True, return_tensors="pt")["pixel_values"]
    pixels = pixels.unflatten(0, (len(CONCEPTS), PICTURES_PER_CONCEPT))
    train_tower(model, pixels)
    train_language(model, tokenizer, pixels, blank_pixels(processor), random.Random(seed))
    return model.eval()
