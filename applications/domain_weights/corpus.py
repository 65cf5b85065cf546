"""The texts: domains to train on, and the text that counts, in one part to choose by and one to judge by."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from applications.frame.errors import UserError

TEXTS = Path(__file__).parent / "texts"
"""Those that ship: see its README."""
SHUFFLED = "shuffled"
"""The domain that is made of another: the letters of each of its words in a random order."""


@dataclass(frozen=True)
class Corpus:
    """Texts as numbers of characters, int64 ``[n]`` each.

    Attributes:
        domains: what there is to train on, by name.
        validation, test: two parts of the target, which no domain has.
        alphabet: the characters of all texts, in the order of their numbers.
    """

    domains: dict[str, Tensor]
    validation: Tensor
    test: Tensor
    alphabet: str

    def batch(self, size: int, context: int, random: torch.Generator) -> Tensor:
        """Windows of every domain, ``[K, size, context + 1]``."""
        return torch.stack([windows(text, size, context, random) for text in self.domains.values()])

    def joined(self, name: str) -> Corpus:
        """With the validation text as one more domain, the last."""
        return replace(self, domains={**self.domains, name: self.validation})


def windows(text: Tensor, size: int, context: int, random: torch.Generator) -> Tensor:
    """Random ones of ``context + 1`` characters, ``[size, context + 1]``."""
    starts = torch.randint(len(text) - context, (size, 1), generator=random)
    return text[starts + torch.arange(context + 1)]


def pieces(text: Tensor, context: int) -> Tensor:
    """The whole text in windows that overlap by one character, so that each but the first is predicted once."""
    count = (len(text) - 1) // context
    return text[torch.arange(count).unsqueeze(1) * context + torch.arange(context + 1)]


def read(folder: Path, target: str, decoy: str | None, validation: float, context: int, seed: int) -> Corpus:
    """The text ``target`` of a folder, and all others of it as domains.

    Args:
        decoy: the domain of which `SHUFFLED` is made; None: it is left out.
        validation: the part of the target that weights are chosen by, from its begin; the rest is the test.

    Raises:
        UserError: the folder has no such texts, or a text is no text, or too short.
    """
    texts = {path.stem: _text(path) for path in sorted(folder.glob("*.txt"))}
    if target not in texts or len(texts) < 3:
        raise UserError(
            f"{folder} has the texts {', '.join(texts) or 'none'}: {target}.txt is needed, and two others at least to "
            "weigh against each other. --texts is a folder of .txt files, --target the name of one."
        )
    if decoy is not None:
        if decoy not in texts or decoy == target or SHUFFLED in texts:
            raise UserError(f"--decoy is {decoy}: the name of a domain in {folder} is needed, or None.")
        texts[SHUFFLED] = shuffled(texts[decoy], seed)
    alphabet = "".join(sorted(set("".join(texts.values()))))
    coded = {name: _coded(text, alphabet) for name, text in texts.items()}
    held_out = coded.pop(target)
    cut = round(validation * len(held_out))
    parts = {"validation": held_out[:cut], "test": held_out[cut:]}
    for name, text in {**coded, **parts}.items():
        if len(text) < 2 * (context + 1):
            raise UserError(f"{name} has {len(text)} characters, too few for windows of {context}: lower --context.")
    return Corpus(coded, **parts, alphabet=alphabet)


def shuffled(text: str, seed: int) -> str:
    """The letters of each word in a random order: layout and letters of a language, and none of its words."""
    random = np.random.default_rng(seed)
    return re.sub(r"[^\W\d_]+", lambda word: "".join(random.permutation(list(word[0]))), text)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text in UTF-8: {error}.") from error


def _coded(text: str, alphabet: str) -> Tensor:
    numbers = {character: number for number, character in enumerate(alphabet)}
    return torch.tensor([numbers[character] for character in text])
