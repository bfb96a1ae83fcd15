"""bpe.cpp behind the one question that matters: is it this tokenizer, token for token?

`tokenizers` spends four fifths of its time on strings and offsets that sharding never looks at.
Its BPE is repeated here for tokenizers that are nothing but merges over single bytes, as this
project's protein tokenizers are; all others, and all where there is no compiler, stay with it.
"""

import ctypes
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from s2t2_dist.compiled import load_compiled

SOURCE = Path(__file__).with_name("bpe.cpp")
# Settings of a BPE model that change its tokens, as they are when they change nothing.
PLAIN = {
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False, None),
    "ignore_merges": (False, None),
}


class PlainBPE:
    """The merges of a tokenizer, ready to encode; see `plain_bpe`."""

    def __init__(self, library: ctypes.CDLL, model: dict):
        ids: dict[str, int] = model["vocab"]
        merges = [(ids[left], ids[right], ids[left + right]) for left, right in model["merges"]]
        merges_M3 = np.array(merges, np.uint32).reshape(-1, 3)
        id_of_byte = np.array([ids.get(chr(b), -1) for b in range(128)] + [-1] * 128, np.int32)
        library.bpe_rules.restype = ctypes.c_void_p
        rules = library.bpe_rules(
            _pointer(merges_M3), ctypes.c_int64(len(merges)), _pointer(id_of_byte)
        )
        self._rules = ctypes.c_void_p(rules)  # lives as long as the process
        self._functions = {2: library.bpe_encode_uint16, 4: library.bpe_encode_uint32}
        for function in self._functions.values():
            function.restype = ctypes.c_int64

    def encode(
        self, texts: Sequence[bytes], end_token_id: int, dtype: np.dtype
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Encode texts (D of them), the end token behind each.

        Args:
            dtype: uint16 or uint32.

        Returns:
            Their tokens end to end, and how many each has, (D,) int64; None if one of them holds
            a byte that has no token.
        """
        sizes_D = np.fromiter(map(len, texts), np.int64, len(texts))
        tokens = np.empty(int(sizes_D.sum()) + len(texts), dtype)
        lengths_D = np.empty(len(texts), np.int64)
        count = self._functions[tokens.itemsize](
            self._rules, b"".join(texts), _pointer(sizes_D), ctypes.c_int64(len(texts)),
            ctypes.c_int64(end_token_id), _pointer(tokens), _pointer(lengths_D),
        )  # fmt: skip
        return None if count < 0 else (tokens[:count], lengths_D)


def plain_bpe(tokenizer: Tokenizer) -> PlainBPE | None:
    """The same tokenizer, faster; None if it is more than merges over the bytes of ASCII."""
    rules = json.loads(tokenizer.to_str())
    model = rules["model"]
    plain = (
        model["type"] == "BPE"
        and not (rules["normalizer"] or rules["pre_tokenizer"])
        and all(token["special"] for token in rules["added_tokens"])
        and all(model.get(name) in values for name, values in PLAIN.items())
        and all(token.isascii() for pair in model["merges"] for token in pair)
    )
    library = _library() if plain else None
    return library and PlainBPE(library, model)


@functools.cache
def _library() -> ctypes.CDLL | None:
    return load_compiled(
        SOURCE, "bpe.cpp could not be compiled, and `tokenizers`, three times slower, is used"
    )


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
