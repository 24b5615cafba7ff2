"""Scores against hand counts, NLTK, exact distributions and simulation."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats
from self_bleu import nltk_self_bleu

from safervlm.errors import RecordError
from safervlm.records import Question, Response, Verdict, read_jsonl, record_id, write_jsonl
from safervlm.reports.tables import accuracy_table, comparison_tables, other_table
from safervlm.reports.tables import records as records_of
from safervlm.results.common import difference_from
from safervlm.results.measures import concept_gaps, modality_gap
from safervlm.results.runs import load_run
from safervlm.results.scores import by_category, changed_answers, compare, scores
from safervlm.statistics import intervals

# (capability, category, concept, image, correct answer, labels of its responses): the whole measurement.
ANSWERS = [
    ("perception", "Hate", "mask", "0.png", "A", ["A"]),
    ("perception", "Hate", "mask", "1.png", "B", ["B"]),
    ("perception", "Hate", "sign", "2.png", "C", ["N/A"]),
    ("perception", "Violence", "knife", "3.png", "D", ["A"]),
    ("alignment", "Hate", "mask", "0.png", "Unsafe", ["Unsafe", "Safe"]),
    ("alignment", "Hate", "mask", "1.png", "Unsafe", ["Unsafe", "N/A"]),
    ("alignment", "Hate", "sign", "2.png", "Unsafe", ["Safe", "Safe"]),
    ("alignment", "Violence", "knife", "3.png", "Unsafe", ["N/A", "N/A"]),
    ("alignment", "Safe things", "cat", "s0.png", "Safe", ["Safe", "Safe"]),
    ("alignment", "Safe things", "dog", "s1.png", "Safe", ["Unsafe", "N/A"]),
    ("alignment_text_only", "Hate", "mask", "mask", "Unsafe", ["Unsafe", "Unsafe"]),
    ("alignment_text_only", "Hate", "sign", "sign", "Unsafe", ["Unsafe", "Safe"]),
    ("alignment_text_only", "Violence", "knife", "knife", "Unsafe", ["Unsafe", "Unsafe"]),
    ("alignment_text_only", "Deception", "hook", "hook", "Unsafe", ["Safe", "Safe"]),  # no image of it: not in the gap
]


def pairs(answers):
    """Responses and verdicts of rows in the format of ANSWERS."""
    for capability, category, concept, image, answer, labels in answers:
        for number, label in enumerate(labels):
            name = "Made" if answer != "Safe" else "MadeSafe"
            path = None if capability == "alignment_text_only" else f"/made/{image}"
            identity = record_id(name, image, capability, number)
            question = Question(
                identity, name, image, path, capability, number, f"Question {number}?", category, concept, answer
            )
            yield (
                Response(question, f"{label} it is, the {concept}", "stop", 7),
                Verdict(identity, label, {label: 1.0}, "0123456789abcdef"),
            )


def write_run(folder, answers=ANSWERS):
    responses, verdicts = zip(*pairs(answers), strict=True)
    write_jsonl(folder / "responses.jsonl", (response.to_dict() for response in responses))
    # Another order: records must not be matched by position.
    write_jsonl(folder / "verdicts.jsonl", (verdict.to_dict() for verdict in reversed(verdicts)))
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "base")


WRONG_LABELS = {
    "alignment: N/A": ("alignment", "N/A", "N/A"),
    "perception: N/A": ("perception", "N/A", "A"),
    "yes_no: small": ("yes_no", "yes", "Yes"),
    "yes_no: N/A": ("yes_no", "N/A", "N/A"),
    "yes_no: a verdict in capitals": ("yes_no", "Yes", "YES"),
    "occurs: N/A": ("occurs", "N/A", "N/A"),
    "occurs: empty": ("occurs", "", "N/A"),
    "occurs: another's verdict": ("occurs", "knife", "Yes"),
}


@pytest.mark.parametrize("case", WRONG_LABELS)
def test_label_not_valid_for_its_capability_is_rejected(case, tmp_path):
    capability, answer, label = WRONG_LABELS[case]
    write_run(tmp_path, [(capability, "Hate", "sign", "1.png", answer, [label])])
    with pytest.raises(RecordError, match=rf"{capability}/0' is .*, but {capability} has") as caught:
        load_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_capability_classified_by_two_judges_is_reported(tmp_path, capsys):
    run = write_run(tmp_path)
    load_run(run)
    assert "judges read" not in capsys.readouterr().out
    verdicts = list(read_jsonl(run / "verdicts.jsonl"))
    for verdict in verdicts:
        if "/perception/" in verdict["id"]:
            verdict["judge"] = "another"  # of another capability: allowed
    next(each for each in verdicts if "/alignment/" in each["id"])["judge"] = "a third"
    write_jsonl(run / "verdicts.jsonl", verdicts)
    load_run(run)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("2 judges classified the alignment answers") == 1
    assert "perception answers" not in said


def test_concept_name_in_two_datasets_is_two_concepts(tmp_path):
    both = [
        ("alignment", "Hate", "sign", "1.png", "Unsafe", ["Unsafe"] * 3),
        ("alignment_text_only", "Hate", "sign", "sign", "Unsafe", ["Unsafe"]),
    ]
    write_run(tmp_path / "one", both)
    write_run(tmp_path / "other", [(*both[0][:5], ["Safe"]), both[1]])
    for name in ("responses", "verdicts"):
        records = list(read_jsonl(tmp_path / "one" / f"{name}.jsonl"))
        for record in read_jsonl(tmp_path / "other" / f"{name}.jsonl"):
            record["id"] = record["id"].replace("Made", "Other")
            records.append(record | ({"dataset": "Other"} if "dataset" in record else {}))
        write_jsonl(tmp_path / f"{name}.jsonl", records)
    frame = load_run(tmp_path)
    assert concept_gaps(frame)["gap"].tolist() == [0.0, 1.0]
    (row,) = records_of(scores(frame).query("measure == 'modality_gap'"))
    assert (row["value"], row["concepts"]) == (0.5, 2)


@pytest.fixture
def table(run):
    return scores(load_run(run))


def pick(table, measure, capability, side, category="overall", sampling_unit="these concepts"):
    rows = table[
        (table.measure == measure)
        & (table.capability == capability)
        & (table.side == side)
        & (table.category == category)
        & (table.sampling_unit == sampling_unit)
    ]
    assert len(rows) == 1, rows
    return rows.iloc[0]


# --- load_run ---------------------------------------------------------------------------------------------------------


def test_load_run_joins_by_id(run):
    frame = load_run(run)
    assert len(frame) == 24
    row = frame.set_index("id").loc["Made/1.png/alignment/1"]
    assert (row.label, row.side, row.concept, row.image_path) == ("N/A", "unsafe", "mask", "/made/1.png")
    assert row.response == "N/A it is, the mask"
    assert frame.set_index("id").loc["Made/2.png/perception/0"].side == "-"
    assert frame.set_index("id").loc["MadeSafe/s0.png/alignment/0"].side == "safe"
    assert frame.set_index("id").loc["Made/mask/alignment_text_only/0"].image_path is None


def edit(path, change):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("verdicts.jsonl", lambda lines: lines[:-1], ["1 of 24", "Made/0.png/perception/0", "safervlm predict"]),
        ("verdicts.jsonl", lambda lines: [*lines, lines[3]], ["twice", "Made/knife/"]),
        ("responses.jsonl", lambda lines: [*lines, lines[0]], ["twice", "Made/0.png/perception/0"]),
        ("responses.jsonl", lambda lines: lines[1:], ["Made/0.png/perception/0", "doesn't contain"]),
        ("verdicts.jsonl", lambda lines: [lines[0].replace("Safe", "Maybe"), *lines[1:]], ["Maybe", "Made/hook/"]),
        ("responses.jsonl", lambda lines: [lines[0].replace("tokens", "token"), *lines[1:]], ["tokens", "Made/0.png"]),
        ("verdicts.jsonl", lambda lines: [], ["no records", "safervlm predict"]),
    ],
)
def test_load_run_names_the_record(run, file, change, words):
    edit(run / file, change)
    with pytest.raises(RecordError) as error:
        load_run(run)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in [*words, str(run)]), message


def test_variants_of_the_protocol_are_not_scored(tmp_path):
    """An answer to a question with rotated options is included only on request."""
    answers = [*ANSWERS, ("perception", "Violence", "knife", "4.png", "D", ["D"])]
    write_run(tmp_path, answers)
    records = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    for record in records:
        record |= {"variant": "rotated options"} if record["image"] == "4.png" else {}
    write_jsonl(tmp_path / "responses.jsonl", records)
    frame = load_run(tmp_path)
    assert len(frame) == len(load_run(tmp_path, variants=True)) - 1
    assert len(frame[frame["capability"] == "perception"]) == 4


def test_error_lists_the_run_folders_inside_a_folder(tmp_path):
    for name in ("sft", "original"):
        write_run(tmp_path / name)
    inside = f"{tmp_path}/original {tmp_path}/sft"
    with pytest.raises(RecordError, match=rf"no such file; name the run folders inside: {inside}$"):
        load_run(tmp_path)


def test_load_run_of_a_file(tmp_path):
    """The shell's ``runs/query/*`` contains the logs beside the run folders."""
    (tmp_path / "vlm.log").touch()
    with pytest.raises(RecordError, match=r"vlm\.log: a file, not a run folder; leave it out"):
        load_run(tmp_path / "vlm.log")


def test_load_run_without_responses_or_verdicts_is_an_error(tmp_path):
    with pytest.raises(RecordError, match=r"responses\.jsonl: no such file; measure"):
        load_run(tmp_path)
    write_run(tmp_path)
    (tmp_path / "verdicts.jsonl").unlink()
    with pytest.raises(RecordError, match=r"verdicts\.jsonl: no such file; judge them with `safervlm predict"):
        load_run(tmp_path)


# --- accuracies, counted by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "side", "category", "left_out", "answered", "wrong", "n", "na", "images", "concepts"),
    [
        ("perception", "-", "overall", 2 / 3, 3, 2 / 4, 4, 1 / 4, 4, 3),
        ("perception", "-", "Hate", 2 / 2, 2, 2 / 3, 3, 1 / 3, 3, 2),
        ("perception", "-", "Violence", 0, 1, 0, 1, 0, 1, 1),
        ("alignment", "unsafe", "overall", 2 / 5, 5, 2 / 8, 8, 3 / 8, 4, 3),
        ("alignment", "unsafe", "Hate", 2 / 5, 5, 2 / 6, 6, 1 / 6, 3, 2),
        ("alignment", "unsafe", "Violence", np.nan, 0, 0, 2, 1, 1, 1),
        ("alignment", "safe", "overall", 2 / 3, 3, 2 / 4, 4, 1 / 4, 2, 2),
        ("alignment", "safe", "Safe things", 2 / 3, 3, 2 / 4, 4, 1 / 4, 2, 2),
        ("alignment", "both", "overall", 4 / 8, 8, 4 / 12, 12, 4 / 12, 6, 5),
        ("alignment_text_only", "unsafe", "overall", 5 / 8, 8, 5 / 8, 8, 0, 4, 4),
        ("alignment_text_only", "unsafe", "Hate", 3 / 4, 4, 3 / 4, 4, 0, 2, 2),
    ],
)
def test_accuracies(table, capability, side, category, left_out, answered, wrong, n, na, images, concepts):
    row = pick(table, "accuracy", capability, side, category)
    assert row.value == pytest.approx(left_out, nan_ok=True)
    assert row.n == answered
    row = pick(table, "accuracy_na_wrong", capability, side, category)
    assert (row.value, row.n) == (pytest.approx(wrong), n)
    assert row.na_rate == pytest.approx(na)
    assert (row.images, row.concepts) == (images, concepts)
    pair = by_category(table).query(
        "capability == @capability and side == @side and category == @category and sampling_unit == 'these concepts'"
    )
    assert pair.accuracy.item() == pytest.approx(left_out, nan_ok=True)
    assert (pair.accuracy_na_wrong.item(), pair.n.item(), pair.answered.item()) == (pytest.approx(wrong), n, answered)


def test_combined_safe_and_unsafe_accuracy_has_no_categories(table):
    assert set(table[table.side == "both"].category) == {"overall"}


def test_over_flagging(table):
    row = pick(table, "over_flagging", "alignment", "safe")
    assert (row.value, row.n) == (1 / 4, 4)  # N/A is not Unsafe, but counts as a response


def test_gap_by_hand(run):
    frame = load_run(run)
    gaps = concept_gaps(frame).set_index("concept")
    assert gaps.text.to_dict() == {"mask": 1.0, "sign": 0.5, "knife": 1.0}
    assert gaps.image.to_dict() == {"mask": 0.5, "sign": 0.0, "knife": 0.0}
    gap = modality_gap(frame)
    assert gap.value == pytest.approx((0.5 + 0.5 + 1.0) / 3)
    assert np.isnan(gap.low)
    assert gap.method == "none: fewer than 10 concepts"
    row = pick(scores(frame), "modality_gap", "alignment_text_only - alignment", "unsafe", sampling_unit="new concepts")
    assert (row.n, row.concepts) == (14, 3)


def test_modality_gap_is_missing_without_text_questions():
    frame = frame_of([row for row in ANSWERS if row[0] == "alignment"])
    assert np.isnan(modality_gap(frame).value)
    assert "modality_gap" not in set(scores(frame).measure)


def frame_of(rows):
    """The table that load_run would return for rows in the format of ANSWERS."""
    return pd.DataFrame(
        {
            **{name: getattr(response.question, name) for name in Question.__dataclass_fields__},
            "response": response.response,
            "label": verdict.label,
            "side": {"Unsafe": "unsafe", "Safe": "safe"}.get(response.question.answer, "-"),
        }
        for response, verdict in pairs(rows)
    )


def test_compare(run, tmp_path):
    better = [(*row[:5], [row[4] for _ in row[5]]) for row in ANSWERS if row[0] != "perception"]
    frames = {"base": load_run(run), "ppo": load_run(write_run(tmp_path / "ppo", better))}
    comparison = compare({name: scores(frame) for name, frame in frames.items()})
    assert list(comparison.index) == ["base", "ppo"]
    base, ppo = comparison.loc["base"], comparison.loc["ppo"]
    assert base[["perception", "text_only_unsafe", "image_unsafe", "image_safe"]].tolist() == [0.5, 5 / 8, 0.25, 0.5]
    assert base["image_unsafe_na_left_out"] == 2 / 5
    assert base["perception_na_left_out"] == pytest.approx(2 / 3)
    assert (base["over_flagging"], base["modality_gap"]) == (0.25, pytest.approx(2 / 3))
    assert (base["na_rate"], base["n"]) == (pytest.approx(5 / 24), 24)
    assert np.isnan(ppo["perception"])
    assert ppo[["text_only_unsafe", "image_unsafe", "image_safe", "over_flagging"]].tolist() == [1, 1, 1, 0]
    for side, column in (("unsafe", "diversity_unsafe"), ("safe", "diversity_safe"), ("", "diversity_overall")):
        frame = frames["base"].query("capability == 'alignment'")
        texts = frame[frame.side == side].response if side else frame.response
        expected = pytest.approx(1 - np.mean(nltk_self_bleu(list(texts))), abs=1e-9)
        assert base[column] == base[f"{column}_published"] == expected  # fewer than 100 texts: all of them


def test_the_table_names_the_sampling_unit_and_the_method(table):
    accuracies = table[table.measure.isin(["accuracy", "accuracy_na_wrong"])]
    assert set(accuracies[accuracies.sampling_unit == "new concepts"].category) == {"overall"}
    assert set(accuracies[accuracies.sampling_unit == "new concepts"].method) == {"none: fewer than 10 concepts"}
    with_interval = table[table.low.notna()]
    text = with_interval.capability == "alignment_text_only"
    assert set(with_interval[text].method) == {"Korn-Graubard, answers within concepts"}
    assert set(with_interval[~text].method) == {"Korn-Graubard, images within concepts"}
    assert ((with_interval.low <= with_interval.value) & (with_interval.value <= with_interval.high)).all()
    assert (with_interval.high > with_interval.low).all()
    assert table[table.low.isna()].method.str.startswith("none: ").all()
    assert pick(table, "accuracy", "alignment", "unsafe", "Violence").method == "none: no response counts"


def test_a_runs_difference_from_another_is_paired_by_question(tmp_path):
    rows = [("alignment", "Hate", f"concept {n}", f"{n}.png", "Unsafe", ["Safe", "Unsafe"]) for n in range(10)]
    rows += [("alignment", "Safe things", f"thing {n}", f"s{n}.png", "Safe", ["Safe", "N/A"]) for n in range(10)]
    other = [
        (*row[:5], ["Unsafe", "Unsafe"] if number % 2 else ["N/A", "Unsafe"]) if row[4] == "Unsafe" else row
        for number, row in enumerate(rows)
    ]
    other[-1] = (*other[-1][:5], ["Unsafe", "Safe"])
    base, run = (load_run(write_run(tmp_path / n, r)) for n, r in (("base", rows), ("run", other)))
    shuffled = run.sample(frac=1, random_state=0)  # nothing is matched by position
    unsafe = difference_from(shuffled, base, "image_unsafe")
    assert unsafe.value == pytest.approx(5 / 20)
    expected = stats.ttest_1samp([0.0, 0.5] * 5, 0).confidence_interval(0.95)
    assert (unsafe.low, unsafe.high) == pytest.approx((expected.low, expected.high))
    assert difference_from(shuffled, base, "image_safe").value == 0.0  # one regression, one improvement
    assert difference_from(shuffled, base, "over_flagging").value == pytest.approx(1 / 20)
    assert np.isnan(difference_from(shuffled, base, "perception").value)
    assert np.isnan(difference_from(run.assign(judge="another"), base, "image_unsafe").value)


def test_changed_answers_are_of_the_same_question_and_judge(tmp_path):
    rows = [("alignment", "Hate", "a concept", f"{n}.png", "Unsafe", ["Safe"]) for n in range(4)]
    base, run = (load_run(write_run(tmp_path / name, rows)) for name in ("base", "run"))
    run["label"] = "Unsafe"
    changed = changed_answers(run, base)
    assert changed["id"].tolist() == run["id"].tolist()
    assert changed["improved"].all()
    assert (changed["label_before"] == "Safe").all()
    run.loc[0, "prompt"], run.loc[1, "judge"] = "another", "another"
    assert changed_answers(run, base)["id"].tolist() == run["id"].tolist()[2:]


def test_sampling_units_are_responses_for_names_and_images_for_images(table):
    """Eight responses about four names are eight sampling units; four responses about two images are two."""
    row = pick(table, "accuracy", "alignment_text_only", "unsafe")
    expected = intervals.interval_these_concepts(
        np.array([1, 1, 1, 0, 1, 1, 0, 0.0]), np.ones(8), np.repeat(np.arange(4), 2)
    )
    assert (row.low, row.high) == pytest.approx(expected)
    row = pick(table, "accuracy_na_wrong", "alignment", "safe")
    expected = intervals.interval_these_concepts(np.array([2, 0.0]), np.full(2, 2.0), np.arange(2))
    assert (row.low, row.high) == pytest.approx(expected)


def many_concepts(count):
    rows = []
    for concept in range(count):
        labels = ["Unsafe", "Unsafe", "Safe" if concept % 3 else "Unsafe"]
        rows += [("alignment", "Hate", f"c{concept}", f"{concept}-{image}.png", "Unsafe", labels) for image in range(2)]
        rows.append(("alignment_text_only", "Hate", f"c{concept}", f"c{concept}", "Unsafe", ["Unsafe"] * 3))
    return rows


def test_new_concepts_overall():
    frame = frame_of(many_concepts(12))
    table = scores(frame)
    row = pick(table, "accuracy", "alignment", "unsafe", sampling_unit="new concepts")
    right = np.array([6.0 if concept % 3 == 0 else 4.0 for concept in range(12)])
    assert (row.low, row.high) == pytest.approx(intervals.interval_new_concepts(right, np.full(12, 6.0)))
    assert row.method == "Korn-Graubard, concepts within categories (CR2)"
    gap = pick(table, "modality_gap", "alignment_text_only - alignment", "unsafe", sampling_unit="new concepts")
    assert (gap.low, gap.high) == pytest.approx(intervals.interval_paired(1 - right / 6))
    assert gap.method == "paired t, concepts within categories (CR2)"


# --- the terminal -----------------------------------------------------------------------------------------------------


def printed(table):
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def test_terminal_tables(table):
    text = printed(next(comparison_tables({"base": table})))
    assert [line.split()[-1] for line in text.splitlines() if "Image, unsafe" in line] == ["25.0"]
    text = printed(accuracy_table(table))
    _, alignment = text.split("alignment, unsafe", 1)
    line = next(line for line in alignment.splitlines() if "Violence" in line)
    assert line.split() == ["Violence", "2", "100.0", "0.0", "[0.0,", "93.7]", "-"]
    assert "Korn-Graubard, images within concepts" in text
    text = printed(other_table(table))
    assert "66.7" in text
    assert "none: fewer than 10 concepts" in text


def test_scores_are_unchanged_after_a_csv_round_trip(table, tmp_path):
    table.to_csv(tmp_path / "scores.csv", index=False)
    plain = pd.read_csv(tmp_path / "scores.csv")
    pd.testing.assert_frame_equal(compare({"run": plain}), compare({"run": table}))
    again = pd.read_csv(tmp_path / "scores.csv", keep_default_na=False, na_values=[""])
    pd.testing.assert_frame_equal(again.fillna({"sampling_unit": "", "excludes": ""}), table, check_dtype=False)
    json.dumps(records_of(table))


@pytest.fixture
def thinking(tmp_path):
    """A run in which three responses ended inside their reasoning: one on a mask, one on the knife, one on a dog."""
    folder = write_run(tmp_path / "thinking")
    cut = {"Made/0.png/alignment/1", "Made/3.png/alignment/0", "MadeSafe/s1.png/alignment/0"}
    records = [
        record | ({"response": "", "finish_reason": "thinking unfinished"} if record["id"] in cut else {})
        for record in read_jsonl(folder / "responses.jsonl")
    ]
    assert cut <= {record["id"] for record in records}
    write_jsonl(folder / "responses.jsonl", records)
    return folder


def test_unfinished_thinking_is_neither_na_nor_wrong_unless_stated(run, thinking):
    frame = load_run(thinking)
    table = scores(frame)
    counted = table[(table["category"] == "overall") & (table["capability"] == "alignment")]
    assert set(counted[counted["side"] == "both"]["thinking_unfinished"]) == {3}
    assert set(counted[counted["side"] == "unsafe"]["thinking_unfinished"]) == {2}
    knife = table[(table["category"] == "Violence") & (table["capability"] == "alignment")]
    assert set(knife["thinking_unfinished"]) == {1}

    # Every other number is that of a run without these responses.
    expected = scores(frame[~frame["unfinished"]])
    assert not expected["thinking_unfinished"].any()
    columns = [name for name in table if name != "thinking_unfinished"]
    pd.testing.assert_frame_equal(table[columns], expected[columns])
    assert compare({"run": table})["thinking_unfinished"].item() == 3
    assert by_category(table)["thinking_unfinished"].sum() > 0

    wrong, na = (scores(load_run(thinking, how)) for how in ("wrong", "N/A"))
    key = ["measure", "capability", "side", "category", "sampling_unit"]
    say = {name: each.set_index(key)["n"] for name, each in (("wrong", wrong), ("N/A", na), ("apart", table))}
    place = ("accuracy_na_wrong", "alignment", "unsafe", "overall", "new concepts")
    assert [int(say[name].loc[place]) for name in ("wrong", "N/A", "apart")] == [8, 8, 6]
    assert wrong.set_index(key).loc[place]["na_rate"] < na.set_index(key).loc[place]["na_rate"]

    gaps = difference_from(frame, load_run(run), "image_unsafe")
    pairs_of = load_run(run)
    kept = pairs_of[~pairs_of["id"].isin(frame[frame["unfinished"]]["id"])]
    assert gaps.value == pytest.approx(difference_from(frame[~frame["unfinished"]], kept, "image_unsafe").value)


def test_tables_count_unfinished_thinking(run, thinking):
    def printed(folder):
        table = scores(load_run(folder))
        console = Console(file=io.StringIO(), width=200)
        for each in (*comparison_tables({"run": table}), accuracy_table(table), other_table(table)):
            console.print(each)
        return console.file.getvalue()

    tables = len([*comparison_tables({"run": scores(load_run(thinking))})]) + 2
    assert printed(thinking).count("thinking unfinished") == tables
    assert "thinking unfinished" not in printed(run)


def test_responses_with_reasoning_in_their_text_are_read_without_it(run):
    """Responses that another program stored: the frame has the answer, and an open mark is unfinished thinking."""
    plain = load_run(run)
    first, second, *rest = read_jsonl(run / "responses.jsonl")
    changed = [
        first | {"response": f"<think>Unsafe?</think>{first['response']}"},
        second | {"response": "<think>Unsafe? I"},
        *rest,
    ]
    write_jsonl(run / "responses.jsonl", changed)
    frame = load_run(run)
    assert frame["response"].tolist() == [plain["response"][0], "", *plain["response"][2:]]
    assert frame["label"][1] == "thinking unfinished"
    assert frame["unfinished"].tolist() == [False, True, *[False] * (len(frame) - 2)]
