"""Has a judge model rate the responses to LLaVABench as soon as they are complete."""

import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.attempt_log import AttemptFile
from safervlm.data.responses import read_responses
from safervlm.errors import ArgumentError, UserError
from safervlm.failures import in_halves, reason_of
from safervlm.io.progress import track
from safervlm.io.signals import safe_points
from safervlm.io.tables import say
from safervlm.judging.rating import (
    MAX_NEW_TOKENS,
    SEED,
    SYSTEM,
    TEMPERATURE,
    TOP_P,
    Rating,
    rating_key,
    rating_prompt,
    read_ratings,
)
from safervlm.ranges import in_range
from safervlm.records import Example, Question, Response, read_records, read_torn_jsonl, to_line, write_jsonl
from safervlm.run import write_stage
from safervlm.run_folder import RunFolder
from safervlm.vlm.base import Answer, Unanswered
from safervlm.vlm.sampling import Sampling
from safervlm.vlm.server.client import Server
from safervlm.vlm.thinking import thinking_unfinished

UNREADABLE = "the first line of the judge's response isn't two numbers from 1 to 10"
SAMPLING = Sampling(TEMPERATURE, TOP_P, MAX_NEW_TOKENS)


@dataclass(frozen=True, slots=True)
class RequestedRating:
    """A rating to request.

    Attributes:
        id: The id of the question that the response belongs to.
        swapped: Whether the judge sees the response before the reference.
        question: The question to the judge; the two orders of a response have different ids.
        key: See :func:`safervlm.judging.rating.rating_key`.
    """

    id: str
    swapped: bool
    question: Question
    key: str


class RateResponses(Callback):
    """After ``predict``, has a judge rate the responses with capability "rated": ``ratings.jsonl`` in the run folder.

    The file has one line per response and order (see :class:`safervlm.judging.rating.Rating`). Lines are appended after
    each batch and sorted in the order of the responses at the end, so a process that dies loses at most one batch.
    Ratings that this judge has given already are not requested again. Ratings by other judges, or by this one with
    other settings, are kept at the file's beginning. A missing rating is listed with its reason and requested again
    by the next run of the same command; it ends neither the run nor the other callbacks. The requests are logged in
    ``ratings-attempts.jsonl``. The callback must come after the RecordWriter, which writes ``responses.jsonl``. In a
    run without such responses the judge is not asked. A response that ended inside its reasoning is not rated.

    Args:
        judge: The model that rates, for example configs/llavabench_judge.yaml. With its dry_run nothing is requested;
            one line reports the number of ratings to request.
        both_orders: Whether to request a second rating with the response first and the reference second. The mean of
            the two removes a judge's preference for a position. The published rating is a single one, reference first.
        attempts: The maximum number of requests per rating, each with another seed, until the judge's output can be
            parsed. The next run starts with the same seeds; increase it for a server that repeats its output.
        batch_size: The number of ratings that are requested, and then written, together.
    """

    def __init__(self, judge: Server, both_orders: bool = False, attempts: int = 3, batch_size: int = 16) -> None:
        in_range("RateResponses", least=1, attempts=attempts, batch_size=batch_size)
        if judge.blank:
            raise ArgumentError(
                "RateResponses.judge.blank: true shows the judge a blank image with each text; give false, as "
                "configs/llavabench_judge.yaml does"
            )
        self.judge, self.both_orders, self.attempts, self.batch_size = judge, both_orders, attempts, batch_size

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Requests the ratings, on the first process.

        Raises:
            RecordError: ``responses.jsonl`` or ``ratings.jsonl`` is damaged.
            SIGTERMException: The process was asked to end.
        """
        if not trainer.is_global_zero:
            return
        run = Path(trainer.default_root_dir)
        files = RunFolder(run)
        responses = [
            response
            for response in read_responses(run, may_be_empty=True)
            if response.question.capability == "rated" and not thinking_unfinished(response)
        ]
        if not responses:
            return
        wanted = self.wanted(responses)
        there = read_torn_jsonl(files.ratings) if files.ratings.is_file() else []
        ratings = {rating.key: rating for rating in (read_records(files.ratings, Rating, torn=True) if there else [])}
        left = [each for each in wanted if each.key not in ratings or ratings[each.key].reason]
        if self.judge.dry_run:
            estimate = self.judge.estimate([each.question for each in left], MAX_NEW_TOKENS)
            say(f"{len(left)} of {len(wanted)} ratings would be requested: {estimate}")
            return

        settings = {
            "judge": self.judge.describe(),
            "sampling": asdict(SAMPLING),
            "both_orders": self.both_orders,
            "attempts": self.attempts,
        }
        write_stage(run, "ratings", settings=settings, finished=False)
        asked = {each.key for each in wanted}
        kept = [rating for key, rating in ratings.items() if key not in asked and not rating.reason]
        if kept:
            say(f"{len(kept)} ratings by other judges or settings, or of other responses, are kept in {files.ratings}")
        if self.judge.system != SYSTEM:
            say(f"judge.system: {self.judge.system!r} is not the published prompt, so the ratings are not comparable")
        if left:
            write_jsonl(files.ratings, there)  # removes an incomplete last line; new lines are appended
            with safe_points():
                self.rate(trainer, left, ratings)
        # Of several lines with the same response, judge and order, the last one is scored
        # (safervlm.results.suite.load_ratings).
        write_jsonl(files.ratings, (rating.to_dict() for rating in [*kept, *(ratings[each.key] for each in wanted)]))
        missing = [ratings[each.key] for each in wanted if ratings[each.key].reason]
        write_stage(run, "ratings", finished=not missing)
        if missing:
            say(
                f"{len(missing)} of {len(wanted)} ratings are missing, for example of {missing[0].id}: "
                f"{missing[0].reason}; {files.ratings} lists them"
            )

    def wanted(self, responses: Sequence[Response]) -> list[RequestedRating]:
        """Returns the required ratings, in the order of the responses.

        Args:
            responses: The responses to rate.

        Returns:
            One item per response, or two with ``both_orders``.
        """
        described = self.judge.describe()
        wanted = []
        for response in responses:
            for swapped in (False, True) if self.both_orders else (False,):
                prompt = rating_prompt(response, swapped)
                asked = f"{response.id}/swapped" if swapped else response.id
                question = replace(response.question, id=asked, prompt=prompt, image_path=None)
                wanted.append(RequestedRating(response.id, swapped, question, rating_key(described, asked, prompt)))
        return wanted

    def rate(self, trainer: Trainer, left: Sequence[RequestedRating], ratings: dict[str, Rating]) -> None:
        """Requests ratings and appends them to the file after each batch.

        Args:
            trainer: The trainer, for the run folder and requests to end.
            left: The ratings to request.
            ratings: Ratings by key; new ones are added.

        Raises:
            SIGTERMException: The process was asked to end.
        """
        run = Path(trainer.default_root_dir)
        files = RunFolder(run)
        models: dict[str, str] = {}  # the model of the last attempt, by the id of the judge's question

        def note_model(attempt: dict[str, Any]) -> None:
            log.write(attempt)
            models[attempt["id"]] = attempt.get("model", "")

        with (
            closing(AttemptFile(files.rating_attempts)) as log,
            files.ratings.open("a", encoding="utf-8", newline="\n") as file,
        ):
            self.judge.on_attempt = note_model
            for seed in range(SEED, SEED + self.attempts):
                unread: list[RequestedRating] = []
                batches = [left[start : start + self.batch_size] for start in range(0, len(left), self.batch_size)]
                for batch in track(batches, "Rating" if seed == SEED else "Rating again"):
                    answers = self.ask([each.question for each in batch], seed)
                    came = [self.read(each, answer, models) for each, answer in zip(batch, answers, strict=True)]
                    file.write("".join(to_line(rating.to_dict()) for rating in came))
                    file.flush()
                    ratings |= {rating.key: rating for rating in came}
                    unread += [each for each in batch if ratings[each.key].reason == UNREADABLE]
                    if trainer.received_sigterm:  # Lightning checks this in training only
                        raise SIGTERMException
                left = unread

    def ask(self, questions: Sequence[Question], seed: int) -> list[Answer]:
        """Queries the judge; an error becomes the reason of a missing output and is not raised.

        Args:
            questions: The questions to the judge.
            seed: The seed of the requests.

        Returns:
            For each question the judge's output, or the reason why there is none.
        """

        def collate(some: Sequence[Question]) -> tuple[Sequence[Question], Any]:
            return some, self.judge.collator([Example(question) for question in some])

        answers: dict[str, Answer] = {}
        try:
            batches, failed = in_halves(questions, collate)
            answers |= {question.id: Unanswered(reason) for question, reason in failed}
            for some, batch in batches:
                answers |= zip((question.id for question in some), self.generate(batch, seed), strict=True)
        except UserError as error:  # concerns the judge, not a single question
            reason = Unanswered(str(error))
            return [answers.get(question.id, reason) for question in questions]
        return [answers[question.id] for question in questions]

    def generate(self, batch: Any, seed: int) -> Sequence[Answer]:
        """Sends the requests of a batch.

        Args:
            batch: A batch of the judge's collator.
            seed: The seed of the requests.

        Returns:
            For each question the judge's output, or the reason why there is none.

        Raises:
            UserError: The judge's arguments are wrong, or it can't be queried at all.
        """
        try:
            return self.judge.generate(batch, SAMPLING, seed)
        except BaseException as error:
            return [Unanswered(reason_of(error))] * len(batch)

    def read(self, wanted: RequestedRating, answer: Answer, models: Mapping[str, str]) -> Rating:
        """Parses the output of the judge.

        Args:
            wanted: The rating that was requested.
            answer: The judge's output, or the reason why there is none.
            models: The models that replied, by the id of the judge's question.

        Returns:
            The rating; without numbers and with a reason if the output cannot be parsed.
        """
        text, both = "", None
        if isinstance(answer, Unanswered):
            # The server's messages name the arguments of a measurement (vlm); here they are arguments of the judge.
            reason = re.sub(r"(?<![\w/.'-])vlm(?=\.[a-z_]+\b|: )", "judge", answer.reason)
            if reason.startswith("sampling."):
                reason = f"judge.model: it doesn't take the published sampling, name another judge ({reason})"
        elif answer.finish_reason in ("refusal", "content_filter"):
            text, reason = answer.text, f"the judge declines ({answer.finish_reason})"
        else:
            text = answer.text
            both = read_ratings(text)
            reason = UNREADABLE if both is None else ""
        first, second = both or (None, None)
        return Rating(
            id=wanted.id,
            swapped=wanted.swapped,
            reference=second if wanted.swapped else first,
            response=first if wanted.swapped else second,
            reason=reason,
            judge=self.judge.name,
            model=models.get(wanted.question.id, ""),
            text=text,
            key=wanted.key,
        )
