"""A report on the terminal: headline, warnings, results, a table and remarks, in fewer than 40 lines at 100 columns.

What does not fit is on the page. Warnings come before the table, as they concern the headline; the table is shown in
the most detailed version for which there is room, and then as many remarks as fit.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from safervlm.io.tables import TextTable, height, height_of_line, say, show_table, wrapped
from safervlm.reports.tables import listed

LINES = 39
# Maximum number of lines of a sentence of the headline, and of a warning or a remark; longer ones are cut.
SENTENCE, REMARK = 5, 3
HEADLINE, RESULTS = 18, 6  # lines of the headline up to which it is not cut, and of all further results


def say_report(
    headline: Sequence[str],
    tables: Iterable[Sequence[TextTable]],
    warnings: Sequence[str],
    results: Sequence[str],
    remarks: Sequence[str],
    closing: str,
) -> None:
    """Prints a report.

    Args:
        headline: Its sentences.
        tables: Versions of the table, or of several tables, the most detailed first; at least one.
        warnings: What may make the headline wrong, the most important first.
        results: Further results that the table does not contain.
        remarks: Further remarks on the numbers, the most important first.
        closing: The last line, which names the page. It is not wrapped, so that a path can be copied.
    """
    versions = list(tables)
    heights = [sum(map(height, version)) for version in versions]
    whole, cut = ([line for text in headline for line in wrapped(text, most)] for most in (None, SENTENCE))
    top = whole if len(whole) <= HEADLINE else cut
    room = LINES - len(top) - height_of_line(closing)
    if warnings or results or remarks:
        room -= 1  # for the number of those that are not shown
    warned = _shown([f"warning: {line}" for line in warnings], room - heights[-1])
    room -= sum(map(len, warned))
    found = _fitting(results, min(RESULTS, room - heights[-1]), REMARK)
    room -= sum(map(len, found))
    chosen = next((place for place, taken in enumerate(heights) if taken <= room), len(versions) - 1)
    remarked = _fitting(remarks, room - heights[chosen], REMARK)

    for line in (*top, *(line for lines in (*warned, *found) for line in lines)):
        say(line)
    for table in versions[chosen]:
        show_table(table)
    for line in (line for lines in remarked for line in lines):
        say(line)
    more = len(warnings) + len(results) + len(remarks) - len(warned) - len(found) - len(remarked)
    if more:
        say(f"{more} more {'remark is' if more == 1 else 'remarks are'} on the page")
    say(closing)


def closing_line(what: str, page: Path, beside: Sequence[Path]) -> str:
    """Returns the last line of a report, which names all its files.

    Args:
        what: What the page is.
        page: The page.
        beside: The other files, whose names begin like that of the page.
    """
    return f"{what}: {page} (with {listed([file.name.removeprefix(page.stem) for file in beside])} beside it)"


def _shown(warnings: Sequence[str], room: int) -> list[list[str]]:
    """Returns the lines of each warning, which are cut as much as needed to show all of them."""
    versions = (_fitting(warnings, room, most) for most in range(REMARK, 0, -1))
    every = [version for version in versions if len(version) == len(warnings)]
    return every[0] if every else _fitting(warnings, room, 1)


def _fitting(texts: Sequence[str], room: int, most: int) -> list[list[str]]:
    """Returns the lines of each text for which there is room, in their order, at most ``most`` lines of each."""
    shown = []
    for text in texts:
        lines = wrapped(text, most)
        if len(lines) <= room:
            shown.append(lines)
            room -= len(lines)
    return shown
