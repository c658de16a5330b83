import os

import pytest

from sere_dist.files import written_whole


def test_what_was_there_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with written_whole(path) as file:
        file.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file.txt"]


def test_what_was_there_stays_when_writing_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as file:
        file.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_a_folder(tmp_path):
    path = tmp_path / "folder"
    with written_whole(str(path)) as folder:
        folder.mkdir()
        (folder / "file.txt").write_text("one")
    with pytest.raises(OSError, match="folder"), written_whole(path) as folder:
        folder.mkdir()
        (folder / "file.txt").write_text("two")
    assert (path / "file.txt").read_text() == "one" and os.listdir(tmp_path) == ["folder"]


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    with pytest.raises(IsADirectoryError), written_whole(tmp_path / "made") as file:
        (tmp_path / "made").mkdir()
        file.write_text("new")
    assert (tmp_path / "made").is_dir()


def test_nothing_is_computed_for_a_place_that_can_not_be_written(tmp_path):
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "missing" / "file.txt"):
        pytest.fail("the block ran")


def test_others_may_read_what_they_may_read_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    with written_whole(tmp_path / "whole") as file:
        file.touch()
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_still_points_to_the_file(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file.txt")
    with written_whole(tmp_path / "link") as file:
        file.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "file.txt").read_text() == "new"
