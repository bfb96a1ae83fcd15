"""Places at which a long text may be cut so that its pieces have the tokens of the whole.

- Without a pre-tokenizer: between two characters that stand next to each other in no token. No
  merge, and no piece of a unigram model, reaches over such a place.
- With GPT-2's pre-tokenizer or one like it: before a blank between two letters. What the
  pre-tokenizer makes of the text around the place is compared with what it makes of its halves.
- One token for every character: anywhere.

Other tokenizers (with a normalizer, or added tokens that hold a blank) cut nowhere.
"""

import json
import re
from itertools import pairwise

from data_prep.bpe import PLAIN
from data_prep.readers import Document
from data_prep.tokenizer import LoadedTokenizer
from s2t2_dist.errors import DataError

# Characters. A document longer than the first is cut into pieces of about so many; a piece longer
# than the second would take over 2 GB in `tokenizers`.
PIECE_CHARACTERS, LONGEST_PIECE = 1 << 20, 1 << 24
# Characters on both sides of a place that the pre-tokenizer is asked about.
AROUND = 200
BETWEEN_LETTERS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
# Pre-tokenizers that look at a few characters only.
LOCAL = ("ByteLevel", "Split", "Digits", "Punctuation", "Sequence")


class Cuts:
    """Where the texts of one tokenizer may be cut.

    Args:
        characters: every character is one token.
    """

    def __init__(self, tokenizer: LoadedTokenizer, characters: bool):
        self._backend, self._anywhere = tokenizer.backend, characters
        rules = json.loads(tokenizer.backend.to_str())
        model, words = rules["model"], rules["pre_tokenizer"]
        added = [token for token in rules["added_tokens"] if not token["special"]]
        kept = (rules["normalizer"] or {"type": "NFC"})["type"] == "NFC"
        plain = model["type"] == "Unigram" or all(
            model.get(name) in values for name, values in PLAIN.items()
        )
        self._joined: set[tuple[str, str]] | None = None
        if not (rules["normalizer"] or words or added) and plain:
            tokens = tokenizer.backend.get_vocab(with_added_tokens=False)
            self._joined = {pair for token in tokens for pair in pairwise(token)}
        self._by_words = (
            kept
            and words is not None
            and {words["type"], *(each["type"] for each in words.get("pretokenizers", []))}
            <= set(LOCAL)
            and not any(re.search(r"\s", token["content"]) for token in added)
        )

    def next_cut(self, text: str, first: int, end: int) -> int | None:
        """The first place in [first, end) at which the text may be cut."""
        if self._anywhere:
            return first
        if self._joined is not None:
            places = (i for i in range(first, end) if (text[i - 1], text[i]) not in self._joined)
            return next(places, None)
        if not self._by_words:
            return None
        matches = BETWEEN_LETTERS.finditer(text, first, end)
        return next((m.start() for m in matches if self._parts_words(text, m.start())), None)

    def _parts_words(self, text: str, place: int) -> bool:
        before, after = text[max(place - AROUND, 0) : place], text[place : place + AROUND]
        halves = [word for half in (before, after) for word in self._words(half)]
        return self._words(before + after) == halves

    def _words(self, text: str) -> list[str]:
        return [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]


def cut(document: Document, cuts: Cuts, longest: int | None = LONGEST_PIECE) -> list[Document]:
    """A document as pieces of at least PIECE_CHARACTERS that have the same tokens.

    Args:
        longest: characters of a piece; None if any length will do.

    Raises:
        DataError: there is no place to cut it.
    """
    name, text = document
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARACTERS:
        end = len(text) if longest is None else min(len(text), start + longest)
        place = cuts.next_cut(text, start + PIECE_CHARACTERS, end)
        if place is None and end < len(text):
            raise DataError(
                f"document {name}: {len(text):,} characters, and no place in {longest:,} of them "
                "at which this tokenizer can be cut; split the document"
            )
        if place is None:
            break
        pieces.append(Document(name, text[start:place]))
        start = place
    return [*pieces, Document(name, text[start:])]
