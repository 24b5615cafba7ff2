"""Names of the files of a run folder; they are defined only here."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The files of a run folder (``--run``). Which of them exist depends on the commands that ran in it.

    Args:
        path: The folder.
    """

    path: str | Path

    def _file(self, *names: str) -> Path:
        return Path(self.path, *names)

    @property
    def manifest(self) -> Path:
        """Settings and provenance of each stage."""
        return self._file("manifest.json")

    @property
    def fit_config(self) -> Path:
        """Configuration of ``fit``, which can be given to ``--config`` again."""
        return self._file("fit.yaml")

    @property
    def predict_config(self) -> Path:
        """Configuration of ``predict``, which can be given to ``--config`` again."""
        return self._file("predict.yaml")

    @property
    def responses(self) -> Path:
        """Responses of the VLM."""
        return self._file("responses.jsonl")

    @property
    def failed(self) -> Path:
        """Questions without a response, with the reason."""
        return self._file("responses-failed.jsonl")

    @property
    def odds(self) -> Path:
        """Log-odds of the answers' first words."""
        return self._file("odds.jsonl")

    @property
    def odds_failed(self) -> Path:
        """Questions without log-odds, with the reason."""
        return self._file("odds-failed.jsonl")

    @property
    def shards(self) -> Path:
        """Folder of the records of a command that is not finished, a file per process."""
        return self._file("shards")

    def attempts(self, rank: int) -> Path:
        """Returns the log of a process's requests to servers.

        Args:
            rank: Rank of the process.
        """
        return self._file(f"attempts-{rank}.jsonl")

    @property
    def rating_attempts(self) -> Path:
        """Log of the requests for ratings."""
        return self._file("ratings-attempts.jsonl")

    @property
    def verdicts(self) -> Path:
        """The judges' classifications of the responses."""
        return self._file("verdicts.jsonl")

    @property
    def unjudged(self) -> Path:
        """Responses that no judge could classify, with the reason."""
        return self._file("verdicts-failed.jsonl")

    @property
    def unfinished_verdicts(self) -> Path:
        """The batches of verdicts that are complete, while responses are being judged."""
        return self._file("verdicts-unfinished.jsonl")

    @property
    def labels_plan(self) -> Path:
        """The sample of responses that people label."""
        return self._file("labels-plan.json")

    @property
    def labels(self) -> Path:
        """Labels of people, one per line."""
        return self._file("labels.jsonl")

    @property
    def label_sheet(self) -> Path:
        """Table to be filled with labels; the workbook beside it has the ending ``.xlsx``."""
        return self._file("labels.csv")

    @property
    def labels_summary(self) -> Path:
        """Agreement of the people with each other and with the judge."""
        return self._file("labels-summary.csv")

    def labelled_texts(self, judge: str) -> Path:
        """Responses with the labels of people, as data to fit a judge on (``--data.answers``).

        Args:
            judge: ``alignment`` or ``perception``.
        """
        return self._file(f"labels-{judge}.jsonl")

    @property
    def ratings(self) -> Path:
        """A rating model's scores of the responses."""
        return self._file("ratings.jsonl")

    @property
    def scores(self) -> Path:
        """Table of scores with intervals."""
        return self._file("scores.csv")

    @property
    def workbook(self) -> Path:
        """Scores as an Excel workbook."""
        return self._file("scores.xlsx")

    @property
    def flips(self) -> Path:
        """Responses and verdicts that differed when ``safervlm verify`` repeated them."""
        return self._file("verify.jsonl")

    @property
    def repeated_responses(self) -> Path:
        """The batches of repeated responses that are complete, while ``safervlm verify`` runs."""
        return self._file("verify-responses-unfinished.jsonl")

    @property
    def repeated_verdicts(self) -> Path:
        """The batches of verdicts on repeated responses that are complete, while ``safervlm verify`` runs."""
        return self._file("verify-verdicts-unfinished.jsonl")

    @property
    def evaluation(self) -> Path:
        """Run folder of the evaluation of the same model."""
        return self._file("evaluation")

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints of a training."""
        return self._file("checkpoints")

    @property
    def last_checkpoint(self) -> Path:
        """Checkpoint from which a training resumes."""
        return self.checkpoints / "last.ckpt"

    @property
    def adapter(self) -> Path:
        """PEFT folder of the trained adapter."""
        return self._file("adapter")

    @property
    def judge(self) -> Path:
        """Folder of the judge that ``fit`` exported."""
        return self._file("judge")

    @property
    def confusion(self) -> Path:
        """Confusion matrix of a fitted judge on held-out responses."""
        return self._file("confusion.csv")

    @property
    def metrics(self) -> Path:
        """Metrics of a training, a row per step."""
        return self._file("metrics.csv")

    @property
    def rollouts(self) -> Path:
        """Sampled responses of PPO and GRPO."""
        return self._file("rollouts.jsonl")

    @property
    def first_implementation(self) -> Path:
        """Folder of the responses in the format of the first implementation."""
        return self._file("first_implementation")

    @property
    def traceback(self) -> Path:
        """Traceback of an unexpected error."""
        return self._file("traceback.txt")
