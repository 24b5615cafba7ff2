"""The confusion matrix of a judge, as a file."""

from safervlm.judging.confusion import write_confusion


def test_rows_are_true_labels(tmp_path):
    write_confusion(tmp_path / "confusion.csv", ("Safe", "Unsafe", "N/A"), [[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    written = (tmp_path / "confusion.csv").read_text().split()
    assert written == ["label,Safe,Unsafe,N/A", "Safe,1,2,3", "Unsafe,4,5,6", "N/A,7,8,9"]
