"""Has another model rate the responses of LLaVABench as soon as they are complete."""

import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.progress import track

from callbacks.attempt_log import AttemptFile
from safervlm.data.responses import read_responses
from safervlm.errors import ArgumentError, UserError, first_line
from safervlm.io.signals import safe_points
from safervlm.io.tables import say
from safervlm.judging.rating import (
    MAX_NEW_TOKENS,
    RATINGS,
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
from safervlm.vlm.base import Generation, Unanswered
from safervlm.vlm.sampling import Sampling
from safervlm.vlm.server.client import Server

ATTEMPTS = "ratings-attempts.jsonl"
UNREADABLE = "the first line of the judge's answer isn't two numbers from 1 to 10"
SAMPLING = Sampling(TEMPERATURE, TOP_P, MAX_NEW_TOKENS)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A rating to ask for.

    Attributes:
        id: of the question that was answered.
        swapped: whether the response stands first.
        question: what the judge is asked; the two orders of a response have ids of their own.
        key: see :func:`safervlm.judging.rating.rating_key`.
    """

    id: str
    swapped: bool
    question: Question
    key: str


class RateResponses(Callback):
    """After ``predict``, has a judge rate the responses with capability "rated": ``ratings.jsonl`` in the run folder.

    A line a response and order (see :class:`safervlm.judging.rating.Rating`), written as they come and put in the
    responses' order at the end; a process that dies loses the batch at work and no more. What this judge has rated
    already is not asked again; what others have rated, or this one in another way, is kept before it, for when it is
    wanted again. A rating that doesn't come is listed as missing, with its reason, and asked for by the next run of the
    same command; whatever went wrong with it, it ends neither the run nor the other callbacks. What the requests took
    is in ``ratings-attempts.jsonl``. It stands behind the RecordWriter, which writes ``responses.jsonl``; a run without
    such responses has no use for the judge, and it isn't asked.

    Args:
        judge: The model that rates, for example configs/llavabench_judge.yaml. With its dry_run it is not asked: the
            line says how much there is to ask.
        both_orders: Asks a second time with the response first and the reference second: the mean of the two is free
            of a judge's liking for either place. The published rating has the reference first, once.
        attempts: How often the judge is asked for a rating, each time with another seed, until one can be read. The
            next run begins with the same seeds: give it more for a server that repeats itself.
        batch_size: How many ratings are asked for, and then written, together.
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
        """Rates, on one process."""
        if not trainer.is_global_zero:
            return
        run = Path(trainer.default_root_dir)
        responses = [
            response for response in read_responses(run, may_be_empty=True) if response.question.capability == "rated"
        ]
        if not responses:
            return
        wanted = self.wanted(responses)
        there = read_torn_jsonl(run / RATINGS) if (run / RATINGS).is_file() else []
        ratings = {rating.key: rating for rating in (read_records(run / RATINGS, Rating, torn=True) if there else [])}
        left = [each for each in wanted if each.key not in ratings or ratings[each.key].reason]
        if self.judge.dry_run:
            estimate = self.judge.estimate([each.question for each in left], MAX_NEW_TOKENS)
            say(f"{len(left)} of {len(wanted)} ratings are to be asked for: {estimate}")
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
            say(f"{len(kept)} ratings by other judges or settings, or of other responses, are kept in {run / RATINGS}")
        if self.judge.system != SYSTEM:
            say(f"judge.system: {self.judge.system!r} is not the published prompt, and the ratings compare with none")
        if left:
            write_jsonl(run / RATINGS, there)  # whole lines, to go on behind
            with safe_points():
                self.rate(trainer, left, ratings)
        # The last line of a response, judge and order counts (safervlm.results.suite).
        write_jsonl(run / RATINGS, (rating.to_dict() for rating in [*kept, *(ratings[each.key] for each in wanted)]))
        missing = [ratings[each.key] for each in wanted if ratings[each.key].reason]
        write_stage(run, "ratings", finished=not missing)
        if missing:
            say(
                f"{len(missing)} of {len(wanted)} ratings are missing, for example of {missing[0].id}: "
                f"{missing[0].reason}; {run / RATINGS} has them all"
            )

    def wanted(self, responses: Sequence[Response]) -> list[Wanted]:
        """The ratings of responses, in their order."""
        described = self.judge.describe()
        wanted = []
        for response in responses:
            for swapped in (False, True) if self.both_orders else (False,):
                prompt = rating_prompt(response, swapped)
                asked = f"{response.id}/swapped" if swapped else response.id
                question = replace(response.question, id=asked, prompt=prompt, image_path=None)
                wanted.append(Wanted(response.id, swapped, question, rating_key(described, asked, prompt)))
        return wanted

    def rate(self, trainer: Trainer, left: Sequence[Wanted], ratings: dict[str, Rating]) -> None:
        """Asks the judge, and writes what comes behind what is there.

        Args:
            trainer: knows the run folder, and whether the process is asked to end.
            left: what to ask for.
            ratings: by key; what comes is put in.

        Raises:
            SIGTERMException: the process is asked to end.
        """
        run = Path(trainer.default_root_dir)
        models: dict[str, str] = {}  # the last to answer each question

        def told(attempt: dict[str, Any]) -> None:
            log.write(attempt)
            models[attempt["id"]] = attempt.get("model", "")

        with closing(AttemptFile(run / ATTEMPTS)) as log, (run / RATINGS).open("a", encoding="utf-8") as file:
            self.judge.on_attempt = told
            for seed in range(SEED, SEED + self.attempts):
                unread: list[Wanted] = []
                batches = [left[start : start + self.batch_size] for start in range(0, len(left), self.batch_size)]
                for batch in track(batches, "Rating" if seed == SEED else "Rating again", disable=not batches):
                    answers = self.ask([each.question for each in batch], seed)
                    came = [self.read(each, answer, models) for each, answer in zip(batch, answers, strict=True)]
                    file.write("".join(to_line(rating.to_dict()) for rating in came))
                    file.flush()
                    ratings |= {rating.key: rating for rating in came}
                    unread += [each for each in batch if ratings[each.key].reason == UNREADABLE]
                    if trainer.received_sigterm:  # Lightning asks for it while it trains, not here
                        raise SIGTERMException
                left = unread

    def ask(self, questions: Sequence[Question], seed: int) -> list[Generation | str]:
        """The judge's answers, or why there is none; where it can't be asked at all, that is so of each."""
        try:
            batch = self.judge.collator([Example(question) for question in questions])
            return [*self.judge.generate(batch, SAMPLING, seed)]
        except Unanswered as error:
            return error.answers
        except UserError as error:
            return [str(error)] * len(questions)
        except Exception as error:
            return [f"{type(error).__name__}: {first_line(error)}"] * len(questions)

    def read(self, wanted: Wanted, answer: Generation | str, models: Mapping[str, str]) -> Rating:
        """What the judge's answer says.

        Args:
            wanted: the rating that was asked for.
            answer: the judge's, or why there is none.
            models: what answered, by the id of the judge's question.
        """
        text, both = "", None
        if isinstance(answer, str):
            # The server speaks of the argument by which a measurement knows it.
            reason = re.sub(r"(?<![\w/.'-])vlm(?=\.[a-z_]+\b|: )", "judge", answer)
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
