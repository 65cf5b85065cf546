"""Arrays that are made once and kept: another file in their place, a damaged one, and no place for one."""

from __future__ import annotations

import numpy as np
import pytest

from applications.frame.data.files import cached

LAYOUT = {"images": ("uint8", (None, 2))}
ARRAYS = {"images": np.arange(6, dtype=np.uint8).reshape(3, 2)}


def test_they_are_made_once(tmp_path):
    path = tmp_path / "features" / "a.npz"
    assert (cached(path, LAYOUT, lambda: ARRAYS)["images"] == ARRAYS["images"]).all()
    assert (cached(path, LAYOUT, lambda: pytest.fail("made although kept"))["images"] == ARRAYS["images"]).all()


@pytest.mark.parametrize("damage", ["empty", "cut", "another's", "a pickle", "a folder"])
def test_what_is_no_such_file_is_made_again(damage, tmp_path):
    path = tmp_path / "a.npz"
    cached(path, LAYOUT, lambda: ARRAYS)
    whole = path.read_bytes()
    if damage == "another's":
        np.savez(path, images=np.zeros((3, 2)))
    elif damage == "a pickle":
        np.savez(path, images=np.array([print], dtype=object), allow_pickle=True)
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(b"" if damage == "empty" else whole[: len(whole) // 2])
    if damage == "a folder":
        with pytest.warns(UserWarning, match="can't be cached"):
            assert (cached(path, LAYOUT, lambda: ARRAYS)["images"] == ARRAYS["images"]).all()
    else:
        assert (cached(path, LAYOUT, lambda: ARRAYS)["images"] == ARRAYS["images"]).all()
        assert (cached(path, LAYOUT, lambda: pytest.fail("not kept again"))["images"] == ARRAYS["images"]).all()


def test_without_a_place_for_the_file_they_are_made_each_time(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.warns(UserWarning, match="can't be cached"):
        assert (cached(tmp_path / "file" / "a.npz", LAYOUT, lambda: ARRAYS)["images"] == ARRAYS["images"]).all()
