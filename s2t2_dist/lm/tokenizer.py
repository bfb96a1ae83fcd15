"""What a model's tokenizer must be, checked before a run's first step and again in its result."""

import itertools
import unicodedata
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from s2t2_dist.data.shards import TOKENIZER_JSON
from s2t2_dist.errors import DataError
from s2t2_dist.lm.architecture import one_line

SAMPLE_CHARACTERS = 2000


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, without code that the folder brings along.

    Raises:
        DataError: no tokenizer.json, or transformers cannot read it.
    """
    if not (folder / TOKENIZER_JSON).is_file():
        raise DataError(f"{folder / TOKENIZER_JSON} is missing")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library raises errors of many kinds
        raise DataError(f"{folder}: transformers reads no tokenizer ({one_line(error)})") from None


def check_end_and_padding(tokenizer: PreTrainedTokenizerBase) -> str:
    """An end token, and no padding token that is the same; returns what was found.

    Raises:
        DataError: otherwise.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no end-of-sequence token: generation would not stop")
    if pad == eos:
        raise DataError(
            f"padding and end of sequence are both token {eos}: a model finetuned further would "
            "never learn to stop (name another pad_token in tokenizer_config.json, or none)"
        )
    return "no padding token" if pad is None else f"pad {pad}, eos {eos}"


def check_round_trip(tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of the tokenizer's alphabet survives encoding and decoding; returns what was found.

    Raises:
        DataError: it does not, or no token is a single letter.
    """
    special = set(tokenizer.all_special_ids)
    ids = sorted(tokenizer.get_vocab().values())
    texts = (tokenizer.decode([i]) for i in ids if i not in special)
    letters = [text for text in texts if len(text) == 1 and text.isprintable() and text != "\ufffd"]
    # Every letter, then every second, every third and so on: new neighbours exercise the merges.
    sample = "".join("".join(letters[::step]) for step in range(1, 40))[:SAMPLE_CHARACTERS]
    sample = unicodedata.normalize("NFC", sample)  # neighbours may be one character by that
    if not sample:
        raise DataError("no token is a single letter")
    ids = tokenizer.encode(sample, add_special_tokens=False)
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if back != sample:
        pairs = zip(sample, back, strict=False)
        at = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        raise DataError(
            f"the tokenizer does not decode what it encodes: {sample[at : at + 20]!r} comes back "
            f"as {back[at : at + 20]!r}"
        )
    return f"{len(sample)} characters over {len(letters)} letters in {len(ids)} tokens"
