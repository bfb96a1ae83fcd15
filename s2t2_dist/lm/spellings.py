"""The tokens of a vocabulary, by what they spell. Shapes: U vocabulary."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

import numpy as np

# What may come next beside the 256 bytes: the document ends here; another token that spells
# nothing comes next, such as padding.
END, OTHER = 256, 257


class Spellings:
    """Which tokens spell what.

    Args:
        token_texts: the bytes of text of each token id; empty for special tokens.
        end_id: the token that ends a document.
    """

    def __init__(self, token_texts: Sequence[bytes], end_id: int):
        self.texts, self.end_id = token_texts, end_id
        spelling = [i for i, text in enumerate(token_texts) if text]
        self.silent = [i for i, text in enumerate(token_texts) if not text and i != end_id]
        self.order = np.array(sorted(spelling, key=lambda i: token_texts[i]))
        self._sorted = [token_texts[i] for i in self.order]
        self.longest = max(map(len, self._sorted))
        # The byte of every token, in order, at every place; 256 where it has ended.
        self.bytes_UB = np.full((len(spelling), self.longest + 1), 256)
        for row, text in zip(self.bytes_UB, self._sorted, strict=True):
            row[: len(text)] = list(text)

    def beginning_with(self, text: bytes) -> slice:
        """The tokens, as a stretch of `order`, whose text begins with this one."""
        first = bisect_left(self._sorted, text)
        return slice(first, bisect_right(self._sorted, text, first, key=lambda t: t[: len(text)]))

    def next_tokens(self, text: bytes, start: int) -> Iterator[tuple[int, int]]:
        """Every token that spells the text from a byte on, and the byte at which it ends."""
        for end in range(start + 1, min(start + self.longest, len(text)) + 1):
            found = self.beginning_with(text[start:end])
            if found.start == found.stop:
                return
            for place in range(found.start, found.stop):
                if len(self._sorted[place]) > end - start:
                    break
                yield int(self.order[place]), end
