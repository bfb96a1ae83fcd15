"""The bytes of text that each token of a data directory's tokenizer stands for."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from s2t2_dist.errors import DataError


def token_texts(backend: Tokenizer, directory: Path) -> list[bytes]:
    """The bytes of text that each token id stands for, from the token's spelling; special: none.

    Args:
        directory: what errors call the tokenizer.

    Raises:
        DataError: the decoder is not supported.
    """
    decoder = json.loads(backend.to_str())["decoder"] or {}
    if decoder.get("type") not in ("ByteLevel", "Fuse"):
        raise DataError(
            f"{directory} has the decoder {decoder.get('type')}, not ByteLevel or Fuse; use a "
            "byte-level BPE tokenizer or a protein tokenizer of `s2t2 tokenizer train`"
        )
    byte_of = byte_of_character() if decoder["type"] == "ByteLevel" else None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    texts = [b""] * (max(vocabulary.values()) + 1)
    added = backend.get_added_tokens_decoder()
    for token, index in vocabulary.items():
        if index in added:
            texts[index] = b"" if added[index].special else token.encode()
        elif byte_of and set(token) <= byte_of.keys():
            texts[index] = bytes(byte_of[character] for character in token)
        else:
            texts[index] = token.encode()
    return texts


def byte_of_character() -> dict[str, int]:
    """Byte by character of GPT-2's byte-level alphabet, where printable bytes are themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
