"""`harness leaderboard validate`: which files a path names."""

from tests.harness.commands import fails, harness
from tests.leaderboards.made import write_run


def test_a_run_folder_its_record_and_its_parent_name_the_same_run(tmp_path, capsys):
    run = write_run(tmp_path / "runs")
    for path in (run, run / "record.json", run / "cases.csv", tmp_path / "runs"):
        harness("leaderboard", "validate", path, "--runs", tmp_path / "runs")
        assert "1 run, valid" in capsys.readouterr().out


def test_a_site_is_its_runs_and_its_table(tmp_path, capsys):
    write_run(tmp_path / "runs")
    harness("leaderboard", "publish", "--runs", tmp_path / "runs", "--out", tmp_path / "site")
    capsys.readouterr()
    harness("leaderboard", "validate", tmp_path / "site", "--runs", tmp_path / "runs")
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2].split(",")[0] for line in out] == ["1 run", "valid"]


def test_what_is_not_there_or_of_another_kind_is_answered_in_words(tmp_path, capsys):
    assert "does not exist" in fails(capsys, "leaderboard", "validate", tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("no results")
    assert "is neither a record.json nor a .csv" in fails(capsys, "leaderboard", "validate", tmp_path / "notes.txt")


def test_own_runs_of_the_same_ids_do_not_matter(tmp_path, capsys):
    """Ids follow from the configuration, so a reader who repeated the runs has the same ones, with other times."""
    write_run(tmp_path / "runs", run_id="same")
    write_run(tmp_path / "own", run_id="same", finished="2026-02-01T00:00:00Z")
    harness("leaderboard", "publish", "--runs", tmp_path / "runs", "--out", tmp_path / "site")
    capsys.readouterr()
    harness("leaderboard", "validate", tmp_path / "site", "--runs", tmp_path / "own")
    assert "3 rows recomputed from 1 run" in capsys.readouterr().out
