"""Train a tokenizer on texts: BPE by `tokenizers`, or BPE or unigram by SentencePiece.

- Proteins: an alphabet of 26 letters, no pre-tokenizer, a decoder that joins without spaces, and an
  unknown token, because a BPE model without one silently drops unknown characters.
- Text: byte-level, with GPT-2's pre-tokenizer.

SentencePiece learns from the same words, with its own handling of whitespace and Unicode switched
off. Its result is converted to a `tokenizers` model, so both libraries give the same kind of file.
"""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.readers import RARE_RESIDUES, RESIDUES
from s2t2_dist.errors import DataError

Kind = Literal["bpe", "sentencepiece"]
Algorithm = Literal["bpe", "unigram"]

# Characters. Longer tokens memorise repeats and boilerplate instead of the domain.
MAX_TOKEN_LENGTH = 32
# A pair seen once is noise, not a unit.
MIN_FREQUENCY = 2
# Tokens; the library reserves memory for all of them.
LARGEST_VOCABULARY = 1 << 20
# Characters. SentencePiece's BPE stores positions in a word in 16 bits.
LONGEST_WORD = 60_000
# Characters. A longer word or run of blanks is cut for `tokenizers`, whose merges take time that
# grows with its square.
WORD_PIECE = 1024
LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}|\s{{{LONGEST_WORD + 1},}}")

PROTEIN_SPECIAL = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
TEXT_SPECIAL = {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}


def train(
    texts: Sequence[str], vocab_size: int, protein: bool, kind: Kind, algorithm: Algorithm
) -> Tokenizer:
    """Train a tokenizer of exactly `vocab_size` tokens, special tokens included.

    Raises:
        DataError: the size is below the alphabet's, or the texts do not yield so many tokens.
    """
    require_vocabulary(vocab_size, protein)
    special, alphabet = special_tokens(protein), _alphabet(protein)
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token=special.get("unk_token")))
    else:
        tokenizer = Tokenizer(_sentencepiece(texts, vocab_size, special, alphabet, algorithm))
    if not protein:
        tokenizer.pre_tokenizer = _byte_level()
    tokenizer.decoder = decoders.Fuse() if protein else decoders.ByteLevel()
    if kind == "bpe":
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special.values()),
            initial_alphabet=alphabet,
            max_token_length=MAX_TOKEN_LENGTH,
            min_frequency=MIN_FREQUENCY,
            show_progress=False,
        )
        tokenizer.train_from_iterator(_cut_words(texts), trainer)
    else:
        tokenizer.add_special_tokens(list(special.values()))
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(
            f"the data yield only {tokenizer.get_vocab_size()} tokens, {vocab_size} were asked "
            "for; ask for fewer or give more data"
        )
    return tokenizer


def special_tokens(protein: bool) -> dict[str, str]:
    """Special tokens by name, in the order of their ids, which count from 0."""
    return PROTEIN_SPECIAL if protein else TEXT_SPECIAL


def _alphabet(protein: bool) -> list[str]:
    return list(RESIDUES + RARE_RESIDUES) if protein else sorted(_byte_level().alphabet())


def smallest_vocabulary(protein: bool) -> int:
    """Tokens of the alphabet and special tokens."""
    return len(special_tokens(protein)) + len(_alphabet(protein))


def require_vocabulary(size: int, protein: bool) -> None:
    """Raise a DataError for a vocabulary that no tokenizer can have."""
    smallest = smallest_vocabulary(protein)
    if size < smallest:
        raise DataError(
            f"a vocabulary of {size} is too small: the alphabet and the special tokens "
            f"are {smallest}; ask for at least as many"
        )
    if size > LARGEST_VOCABULARY:
        raise DataError(
            f"a vocabulary of {size} is too large; ask for at most {LARGEST_VOCABULARY:,}"
        )


def _byte_level() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _cut_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, each word of over LONGEST_WORD characters in pieces."""
    for text in texts:
        start = 0
        if len(text) > LONGEST_WORD:
            for match in LONG_WORD.finditer(text):
                for end in range(match.start() + WORD_PIECE, match.end(), WORD_PIECE):
                    yield text[start:end]
                    start = end
        yield text[start:]


def _words(texts: Sequence[str], protein: bool, alphabet: list[str]) -> Iterator[str]:
    """Yield SentencePiece's sentences: whole proteins, or words in the byte-level alphabet.

    The alphabet comes first, because SentencePiece drops a required character that it never sees.
    """
    yield "".join(alphabet)
    for text in texts:
        words = [text] if protein else [word for word, _ in _byte_level().pre_tokenize_str(text)]
        for word in words:
            yield from (word[i : i + LONGEST_WORD] for i in range(0, len(word), LONGEST_WORD))


def _sentencepiece(
    texts: Sequence[str],
    vocab_size: int,
    special: dict[str, str],
    alphabet: list[str],
    algorithm: Algorithm,
) -> models.Model:
    count = vocab_size - len(special) + 1  # SentencePiece counts its own unknown token
    pieces = _learn_pieces(texts, count, "unk_token" in special, alphabet, algorithm)
    first = list(special.values())
    if algorithm == "unigram":
        scored = [*((token, 0.0) for token in first), *pieces]
        unknown = first.index(special["unk_token"]) if "unk_token" in special else None
        return models.Unigram(scored, unknown, False)
    vocabulary = {token: i for i, token in enumerate([*first, *(piece for piece, _ in pieces)])}
    return models.BPE(vocabulary, _merges(pieces), unk_token=special.get("unk_token"))


def _learn_pieces(
    texts: Sequence[str], count: int, protein: bool, alphabet: list[str], algorithm: Algorithm
) -> list[tuple[str, float]]:
    """(piece, score) by id, without SentencePiece's own unknown token."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_words(texts, protein, alphabet),
            model_writer=model,
            model_type=algorithm,
            vocab_size=count,
            required_chars="".join(alphabet),
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_by_unicode_script=False,
            split_by_number=False,
            split_by_whitespace=False,
            max_sentencepiece_length=MAX_TOKEN_LENGTH,
            max_sentence_length=4 * LONGEST_WORD,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"SentencePiece cannot make {count} pieces of the data ({str(error).strip()[-150:]}); "
            "ask for fewer or give more data"
        ) from None
    learned = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [(learned.id_to_piece(i), learned.get_score(i)) for i in range(1, len(learned))]


def _merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """All pairs of pieces that join to a piece, best piece first.

    SentencePiece scores pieces, not pairs, so it joins any such pair.
    """
    known = {piece for piece, _ in pieces}
    by_score = sorted((piece for piece in pieces if len(piece[0]) > 1), key=lambda p: -p[1])
    return [
        (piece[:cut], piece[cut:])
        for piece, _ in by_score
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
