"""Target tokens in tokens of the source: how the source tokenizer writes the text of each.

Shapes: V rows of the source model's embedding, U target tokens.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from s2t2_dist.data.shards import TOKENIZER_DIR, TOKENIZER_JSON, ShardReader
from s2t2_dist.data.spelling import byte_of_character, token_texts
from s2t2_dist.lm.tokenizer import read_tokenizer

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def target_texts(data: ShardReader) -> list[bytes]:
    """The bytes of text of each of the U target tokens; empty for special tokens."""
    folder = data.directory / TOKENIZER_DIR
    texts = token_texts(Tokenizer.from_file(str(folder / TOKENIZER_JSON)), folder)
    return [text if size else b"" for text, size in zip(texts, data.token_bytes, strict=True)]


def sub_tokens(
    source: Path, texts: list[bytes], vocab_size: int, characters: bool = False
) -> list[list[int]]:
    """The source ids of each text's tokens, in order; none where the source cannot write it.

    A text is read as if it followed other text: without the space that some tokenizers put before
    one. Bytes that are no character of their own are the source's byte tokens, if it has them.
    Unknown tokens and ids without a row are left out.

    Args:
        source: folder of the source tokenizer.
        vocab_size: V.
        characters: write each character by itself.

    Raises:
        DataError: transformers reads no tokenizer there.
    """
    left_out = {read_tokenizer(source).unk_token_id}
    content = json.loads((source / TOKENIZER_JSON).read_text(encoding="utf-8"))
    tokenizer, byte_ids = _inside_a_text(content), _byte_ids(content)
    model = content["model"]
    left_out |= {model.get("unk_id"), tokenizer.token_to_id(model.get("unk_token") or "")}

    def written(text: bytes) -> list[int]:
        try:
            decoded = text.decode()
        except UnicodeDecodeError:
            return [byte_ids[byte] for byte in text] if byte_ids.keys() >= set(text) else []
        parts = decoded if characters else [decoded] if decoded else []
        encoded = (tokenizer.encode(part, add_special_tokens=False).ids for part in parts)
        return [number for ids in encoded for number in ids]

    return [[i for i in written(text) if i not in left_out and i < vocab_size] for text in texts]


def special_tokens(source: Path, data: ShardReader, vocab_size: int) -> dict[int, int]:
    """The source id of a special target token: of the same role (end, padding), or spelling."""
    old = read_tokenizer(source)
    new = read_tokenizer(data.directory / TOKENIZER_DIR)
    known = _special(old)
    pairs = {number: known.get(token) for token, number in _special(new).items()}
    for role in ROLES:
        number, match = getattr(new, f"{role}_id"), getattr(old, f"{role}_id")
        if number is not None and match is not None:
            pairs[number] = match
    count = len(data.token_bytes)  # transformers may know tokens without a row
    return {
        number: i
        for number, i in pairs.items()
        if number < count and i is not None and i < vocab_size
    }


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def _inside_a_text(content: dict) -> Tokenizer:
    """A tokenizer.json's map from text to ids, without the space that it puts before a text."""
    content = {**content, "truncation": None, "padding": None, "post_processor": None}
    for key in ("normalizer", "pre_tokenizer"):
        content[key] = _without_prefix(content.get(key))
    model = content["model"]
    content["model"] = {**model, "dropout": None} if "dropout" in model else model
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True  # a token may spell a special token
    return tokenizer


def _without_prefix(part: dict | None) -> dict | None:
    """A normalizer or a pre-tokenizer that puts nothing before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    changes: dict = {}
    for key in ("normalizers", "pretokenizers"):
        if key in part:
            changes[key] = [kept for p in part[key] if (kept := _without_prefix(p))]
    if part["type"] == "Metaspace":
        changes["prepend_scheme"] = "never"
    if part["type"] == "ByteLevel":
        changes["add_prefix_space"] = False
    return part | changes


def _byte_ids(content: dict) -> dict[int, int]:
    """The id of each byte's token, if a tokenizer.json has them: byte-level, or `<0x41>`."""
    spelled = {f"<0x{byte:02X}>": byte for byte in range(256)}
    if '"ByteLevel"' in json.dumps(content.get("decoder")):
        spelled = byte_of_character()
    vocabulary = Tokenizer.from_str(json.dumps(content)).get_vocab()
    return {byte: vocabulary[token] for token, byte in spelled.items() if token in vocabulary}
