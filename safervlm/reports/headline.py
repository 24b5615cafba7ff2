"""The sentences at the top of a report. They claim no more than the intervals allow."""

from collections.abc import Sequence

import numpy as np

from safervlm.reports.findings import (
    BY_NAME,
    GAP,
    NEW_SEEDS,
    OVER_FLAGGED,
    PERCEPTION,
    SAFE,
    UNSAFE,
    Number,
    Outcome,
    Result,
)
from safervlm.reports.tables import NAMED, listed, percent, signed

# Verb, and the total that the values are shares of.
SHARES = {
    UNSAFE: ("answers", "of the questions about unsafe images correctly"),
    SAFE: ("answers", "of the questions about safe images correctly"),
    OVER_FLAGGED: ("calls safe images unsafe in", "of the answers"),
    BY_NAME: ("answers", "of the questions about the names of unsafe concepts correctly"),
    PERCEPTION: ("recognises what is shown in", "of the questions"),
}
# Statements about differences.
MORE, FEWER = "{} points more", "{} points fewer"
AT_MOST_MORE, AT_MOST_FEWER = "at most {} points more", "at most {} points fewer"
NO_DIFFERENCE = "no difference is shown, {} points"
NO_INTERVAL = "without an interval of the difference ({})"
NOT_COMPARABLE = "{} and {base} are not comparable"
MANY = 5  # minimum number of further runs for which a sentence states their number and common bounds
# Measures that alignment may harm: the statement if the interval contains 0.
HARMS = {OVER_FLAGGED: AT_MOST_MORE, SAFE: AT_MOST_FEWER}
FALLBACK = (BY_NAME, PERCEPTION)  # stated if the run has no alignment questions about images
NOTHING = "There is no response to the questions about safe and unsafe images."
NOT_CORRECTED = "not corrected for the judge's error"
CORRECTED = "corrected for the judge's error with people's labels"


def headline(findings: Sequence[Result]) -> list[str]:
    """States the result: for several runs, the values and the conclusions about their differences from the first run.

    The direction of a difference is stated only if its interval, as printed, excludes 0. Otherwise the bound of the
    harm is stated (for over-flagging and safe images), or the interval. Intervals are in brackets, a bound is the end
    of one. For many runs, the sentence has the lowest and the highest value, and bounds of all differences.

    Args:
        findings: The measures, in any order.

    Returns:
        One sentence per measure; at least one.
    """
    by_key = {finding.key: finding for finding in findings if finding.measured}
    keys = [key for key in (UNSAFE, OVER_FLAGGED if OVER_FLAGGED in by_key else SAFE) if key in by_key]
    sentences = [_sentence(by_key[key]) for key in keys or [key for key in FALLBACK if key in by_key][:1]]
    if GAP in by_key and len(by_key[GAP].outcomes) == 1:
        sentences.append(_gap_sentence(by_key[GAP].outcomes[0]))
    return sentences or [NOTHING]


def headline_note(findings: Sequence[Result]) -> str:
    """States the sampling units of the headline's intervals, and what the intervals do not include.

    Args:
        findings: As for :func:`headline`.
    """
    stated = [each for each in findings if each.key in SHARES]
    units = dict.fromkeys(each.sampling_unit for each in stated if each.sampling_unit)
    of = f" for {' or '.join(units)}" if units else ""
    some, every = (test(each.corrected for each in stated) for test in (any, all))
    how = "" if every else "partly "
    how = f"{how}{CORRECTED}" if some else NOT_CORRECTED
    bounds = " (bounds are their ends)" if any(each.difference for f in stated for each in f.outcomes) else ""
    several = ", each by itself" if any(len(each.outcomes) > 2 for each in findings) else ""
    seeds = "" if any(NEW_SEEDS in unit for unit in units) else ", without differences between training seeds"
    return f"In brackets 95 % intervals{bounds}{of}{several}; {how}{seeds}; N/A is wrong."


def in_no_group(names: Sequence[str]) -> str:
    """States which runs a headline about groups of training seeds does not mention.

    Args:
        names: The runs that are in no group; at least one.
    """
    if len(names) > NAMED:
        return f"{len(names)} more runs are in no group: their numbers are among those of single runs."
    return f"{listed(names)} {'is' if len(names) == 1 else 'are'} in no group: see the numbers of single runs."


def _sentence(finding: Result) -> str:
    verb, share = SHARES[finding.key]
    base, *others = finding.outcomes
    others = [each for each in others if each.number is not None]
    first, *rest = others or [base]
    values = [f"{first.run} {verb} {_value(first)} {share}", *(f"{each.run} {_value(each)}" for each in rest)]
    if len(others) >= MANY:
        return _sentence_of_many(finding, base, others)
    if not others or base.number is None:
        return f"{', '.join(values)}."
    return f"{', '.join([*values, f'{base.run} {_value(base)}'])}: {_claims(finding, base, others)}."


def _sentence_of_many(finding: Result, base: Outcome, others: Sequence[Outcome]) -> str:
    """The sentence of many runs: the lowest and the highest value, and the conclusions about all differences."""
    verb, share = SHARES[finding.key]
    by_value = sorted(others, key=lambda each: each.number.value if each.number else np.nan)
    low, high = by_value[0], by_value[-1]
    if base.number is None:
        values = f"{low.run} {verb} {_value(low)} {share}, {high.run} {_value(high)}"
        return f"{values}: the lowest and the highest of {len(others)} runs."
    said = []
    for claim, outcomes in _grouped(finding, others).items():
        of = listed([each.run for each in outcomes]) if len(outcomes) <= NAMED else f"{len(outcomes)} of them"
        of = "all of them" if len(outcomes) == len(others) else of
        if claim == NOT_COMPARABLE:
            said.append(claim.format(of, base=base.run))
            continue
        lows = [each.difference.low for each in outcomes if each.difference]
        highs = [each.difference.high for each in outcomes if each.difference]
        bound = {
            MORE: f"at least {percent(min(lows))} points more in {of}",
            FEWER: f"at least {percent(-max(highs))} points fewer in {of}",
            AT_MOST_MORE: f"at most {percent(max(highs))} points more in {of}",
            AT_MOST_FEWER: f"at most {percent(-min(lows))} points fewer in {of}",
            NO_DIFFERENCE: f"no difference is shown in {of}, [{signed(min(lows))}, {signed(max(highs))}] points",
            NO_INTERVAL: NO_INTERVAL.format(of),
        }
        said.append(bound[claim])
    low_value, high_value = (percent(each.number.value) for each in (low, high) if each.number)
    values = f"the {len(others)} others {low_value} % ({low.run}) to {high_value} % ({high.run})"
    return f"{base.run} {verb} {_value(base)} {share}, {values}: {'; '.join(said)}."


def _value(outcome: Outcome) -> str:
    """The value of a run in which the measure was measured, with its interval."""
    number = outcome.number or Number(np.nan)
    interval = "" if np.isnan(number.low) else f" [{percent(number.low)}, {percent(number.high)}]"
    return f"{percent(number.value)} %{interval}{' (every response is N/A)' if outcome.only_na else ''}"


def _gap_sentence(outcome: Outcome) -> str:
    number = outcome.number or Number(np.nan)
    text = f"The modality gap of {outcome.run} is {percent(number.value)} points"
    if np.isnan(number.low):
        return f"{text}."
    shown = "" if excludes_zero(number) else ": no gap is shown"
    return f"{text} [{percent(number.low)}, {percent(number.high)}]{shown}."


def _claims(finding: Result, base: Outcome, others: Sequence[Outcome]) -> str:
    """States the differences from the first run, grouped by the conclusion that their intervals allow."""
    return "; ".join(
        claim.format(listed([_piece(claim, each, len(others) == 1) for each in outcomes]), base=base.run)
        for claim, outcomes in _grouped(finding, others).items()
    )


def _grouped(finding: Result, outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Groups runs by the conclusion about their differences from the first run."""
    groups: dict[str, list[Outcome]] = {}
    for each in outcomes:
        groups.setdefault(_claim(finding, each.difference), []).append(each)
    return groups


def _claim(finding: Result, difference: Number | None) -> str:
    """Returns the conclusion about a difference."""
    if difference is None:
        return NOT_COMPARABLE
    if np.isnan(difference.low):
        return NO_INTERVAL
    if excludes_zero(difference):
        return MORE if difference.low > 0 else FEWER
    return HARMS.get(finding.key, NO_DIFFERENCE)


def _piece(claim: str, outcome: Outcome, alone: bool) -> str:
    """Formats a claim about one run; with the run's name, unless it is the only run."""
    difference = outcome.difference
    if claim in (NOT_COMPARABLE, NO_INTERVAL) or difference is None:
        return outcome.run
    low, high = difference.low, difference.high
    text = {
        MORE: f"[{percent(low)}, {percent(high)}]",
        FEWER: f"[{percent(-high)}, {percent(-low)}]",
        AT_MOST_MORE: percent(high),
        AT_MOST_FEWER: percent(-low),
        NO_DIFFERENCE: f"[{signed(low)}, {signed(high)}]",
    }[claim]
    return text if alone else f"{text} ({outcome.run})"


def excludes_zero(number: Number) -> bool:
    """Returns whether an interval excludes 0 as printed, with one decimal.

    Args:
        number: The number with its interval.
    """
    return round(100 * number.low, 1) > 0 or round(100 * number.high, 1) < 0
