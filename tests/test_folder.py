from concurrent.futures import ThreadPoolExecutor

from bn_lightning import folder


def test_numbers_go_up_and_no_two_runs_share_a_folder(tmp_path):
    assert folder.new_folder(tmp_path / "runs" / "a").name == "0"
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: folder.new_folder(tmp_path / "runs" / "a"), range(24)))
    assert sorted(int(path.name) for path in folders) == list(range(1, 25))
    (tmp_path / "runs" / "a" / "notes").mkdir()  # something of the user's
    assert folder.new_folder(tmp_path / "runs" / "a").name == "25"
