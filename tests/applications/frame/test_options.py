"""Values that no option can have, for every option of a kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from applications.few_shot.__main__ import main
from applications.frame.errors import UserError
from applications.frame.options import check_folder, check_values, check_words, settings_told
from applications.frame.tune.storage import without_password


@dataclass(frozen=True)
class Options:
    seed: int = 0
    threads: int | None = 1
    lr: float = 0.1
    data: str = "digits"
    out: Path | None = None
    sizes: tuple[int, ...] = (1, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 10**20),
        ("threads", 100_000),
        ("lr", float("inf")),
        ("lr", float("nan")),
        ("lr", -0.1),
        ("data", "x" * 300),
        ("data", "a\0b"),
        ("out", Path("a") / ("ü" * 130)),
        ("sizes", (1, -2)),
    ],
)
def test_the_option_is_named(name, value):
    check_values(Options())
    with pytest.raises(UserError, match=rf"^--{name} is "):
        check_values(Options(**{name: value}))


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--out", ""], "--out"),
        (["--seed", "3", "--data="], "--data"),
        (["run", ""], "A word of the command"),
        ([""], "A word of the command"),
    ],
)
def test_a_word_that_is_empty(words, name):
    """As a path it would be the folder where the command runs."""
    check_words(["--seed", "3", "--data=digits", "run"])
    with pytest.raises(UserError, match=f"^{name} is empty: a value is needed"):
        check_words(words)


@pytest.mark.parametrize("command", [[], ["evaluate"], ["tune"], ["benchmark"]])
def test_every_command_refuses_it(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--out", ""]) == 2
    assert "error: --out is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_or_below_one(tmp_path):
    (tmp_path / "file").touch()
    check_folder(tmp_path / "new" / "folder", "out")
    check_folder(None, "out")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"--out is .* is a file: a folder is needed"):
            check_folder(path, "out")


def test_too_little_memory_names_what_was_asked_for():
    with pytest.raises(UserError, match=r"cannot be run .* Look at --lr 7"), settings_told(Options(lr=7)):
        torch.empty(10**18)
    with pytest.raises(KeyError), settings_told(Options()):  # a mistake of the program stays one
        {}["missing"]


@pytest.mark.parametrize(
    ("address", "secrets"),
    [
        ("postgresql+psycopg2://me:s3cret@host:5432/studies", ["s3cret"]),
        ("postgresql+psycopg2://me:p%40ss%2Fword@host/studies", ["p%40ss%2Fword", "p@ss/word"]),
        ("postgresql+psycopg2://me:a@b@host/studies", ["a@b"]),
        ("postgresql+psycopg2://host/studies?user=me&password=s3cret", ["s3cret"]),
        ("mysql://me:x@host/studies", [":x@"]),
    ],
)
def test_a_password_is_in_no_text(address, secrets):
    texts = [address, f"--storage {address} cannot be opened", f"tune --storage={address} --trials 3"]
    texts += [f"authentication failed for {secret}" for secret in secrets if len(secret) > 3]
    for text in texts:
        shown = without_password(text, address)
        assert not any(secret in shown for secret in secrets)
        assert "***" in shown
    assert "/studies" in without_password(address, address)
    assert without_password("sqlite:///a.db", "sqlite:///a.db") == "sqlite:///a.db"
