"""A fast BPE encoder (bpe.cpp) for the tokenizers that it reproduces token for token.

`tokenizers` spends four fifths of its time on strings and offsets that sharding does not use.
bpe.cpp covers tokenizers that consist of merges over single ASCII bytes and nothing else, such as
this project's protein tokenizers. All other tokenizers, and machines without a C++ compiler, use
`tokenizers`.
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
# Settings of a BPE model that can change its tokens, and the values with which they do not.
PLAIN = {
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False, None),
    "ignore_merges": (False, None),
}


class PlainBPE:
    """The merges of a tokenizer, ready to encode. `plain_bpe` makes it."""

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
        """Encode D texts, each followed by the end token.

        Args:
            dtype: of the token ids, uint16 or uint32.

        Returns:
            Token ids of all texts end to end, and the number of tokens of each text, (D,) int64;
            both include the end tokens. None if a text contains a byte that has no token.
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
    """The same tokenizer as a `PlainBPE`; None if it is not that plain or nothing compiles."""
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
        SOURCE, "bpe.cpp is not available; using `tokenizers`, which is three times slower"
    )


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
