"""Train tokenizers on a hash sample of the documents, and load them as sharding needs them."""

import functools
import heapq
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from data_prep.formats import detect_format
from data_prep.ids import SharedIds
from data_prep.progress import reading_progress, waiting
from data_prep.ranks import exclusive
from data_prep.readers import (
    DEFAULT_READ,
    Document,
    ReadCounts,
    ReadOptions,
    id_hash,
    read_documents,
)
from data_prep.requests import already_made, describe_sources
from data_prep.totals import nucleotide_share, reading_record
from data_prep.trainers import Algorithm, Kind, special_tokens, train
from s2t2_dist import artifacts
from s2t2_dist.data.shards import TOKENIZER_JSON, tokenizer_sha256
from s2t2_dist.data.spelling import token_texts
from s2t2_dist.errors import DataError

TOKENIZER_CONFIG = "tokenizer_config.json"
# Settings of a model with which a text has another segmentation each time.
SAMPLING = ("dropout", "alpha", "nbest_size")
# Characters of a text whose tokens are decoded again.
CHECKED_CHARACTERS = 100_000
# Characters. Training takes about 90 bytes of memory for each, so about 2 GB.
DEFAULT_SAMPLE = 20_000_000


def train_tokenizer(
    inputs: Sequence[Path],
    target: Path,
    vocab_size: int,
    sample: int = DEFAULT_SAMPLE,
    read: ReadOptions = DEFAULT_READ,
    kind: Kind = "bpe",
    algorithm: Algorithm = "bpe",
) -> bool:
    """Train a tokenizer and write it as a Hugging Face folder, sealed with a manifest.

    Args:
        inputs: FASTA files, or text files (.jsonl, .txt); not both.
        vocab_size: tokens in all, special tokens included.
        sample: train on at most so many characters: on the documents whose ids hash lowest.
        kind, algorithm: see `data_prep.trainers`; kind `bpe` trains no unigram model.

    Returns:
        False if `target` already is the result of the same inputs and options.

    Raises:
        DataError: bad input, or the data do not yield so many tokens.
        ArtifactError: `target` exists and was made from other inputs or options.
    """
    if (kind, algorithm) == ("bpe", "unigram"):
        raise DataError("--algorithm unigram needs SentencePiece; add --kind sentencepiece")
    is_protein(inputs)  # report wrong files before hashing gigabytes
    request = {"kind": "tokenizer", "vocab_size": vocab_size, "sample_characters": sample}
    request |= {"trainer": kind, "algorithm": algorithm, **read.request()}
    request["sources"] = describe_sources(inputs)
    if already_made(target, request):
        return False
    with exclusive(target):
        if already_made(target, request):  # by the process that held the lock
            return False
        _train(inputs, target, request, read)
    return True


def _train(inputs: Sequence[Path], target: Path, request: dict, read: ReadOptions) -> None:
    """Train the tokenizer of a request and publish it."""
    protein = is_protein(inputs)
    sample = read_sample(inputs, request["sample_characters"], read)
    texts = [document.text for document in sample.documents]
    with waiting(f"Training on {sum(map(len, texts)):,} characters"):
        tokenizer = train(
            texts, request["vocab_size"], protein, request["trainer"], request["algorithm"]
        )
    _check_round_trip(tokenizer, texts)
    record = {
        **request,
        **sample.reading,
        "trained_on": {"documents": len(texts), "characters": sum(map(len, texts))},
    }
    if protein:
        letters = np.frombuffer("".join(texts).encode(), np.uint8)
        record |= nucleotide_share(np.bincount(letters, minlength=256))
    with artifacts.sealed_directory(target, record) as directory:
        save_tokenizer(tokenizer, special_tokens(protein), directory)


class Sample(NamedTuple):
    """A sample of documents, and what a manifest says of all that were read for it."""

    documents: list[Document]
    reading: dict


def sample_documents(
    documents: Iterable[Document], characters: int, shared: SharedIds | None = None
) -> list[Document]:
    """The documents whose ids hash lowest, up to so many characters in all, in hash order.

    One pass; memory holds only the sample, and 16 bytes for each id. The result does not
    depend on the order of the documents (UniRef is sorted by length). It has at least one
    document, if there is any.

    Args:
        shared: counts the shared ids of all documents.

    Raises:
        DataError: many documents, of the sample or not, share their id.
    """
    shared = SharedIds() if shared is None else shared
    heap: list[tuple[int, Document]] = []
    total, limit = 0, 1 << 64
    for document in documents:
        shared.add(*document)
        key = id_hash(document.id, "sample")
        if key >= limit:
            continue
        heapq.heappush(heap, (-key, document))
        total += len(document.text)
        while total > characters and len(heap) > 1:
            dropped, last = heapq.heappop(heap)
            limit = -dropped
            total -= len(last.text)
    shared.require_few()
    return [document for _, document in sorted(heap, reverse=True)]


def read_sample(inputs: Sequence[Path], characters: int, read: ReadOptions) -> Sample:
    """`sample_documents` of files; of a first document that is longer only so many characters."""
    counts, shared = ReadCounts(), SharedIds()
    with reading_progress("Sampling") as open_file:
        documents = read_documents(inputs, read, counts, open_file)
        sampled = sample_documents(documents, characters, shared)
    if len(sampled) == 1 and len(sampled[0].text) > characters:
        name, text = sampled[0]
        logging.getLogger(__name__).warning(
            "document %s has %s characters; the sample is its first %s",
            name, f"{len(text):,}", f"{characters:,}",
        )  # fmt: skip
        sampled = [Document(name, text[:characters])]
    return Sample(sampled, reading_record(counts, shared.found))


def save_tokenizer(tokenizer: Tokenizer, special: dict[str, str], directory: Path) -> None:
    """Write the two files that `AutoTokenizer.from_pretrained` needs."""
    artifacts.write_text(directory / TOKENIZER_JSON, tokenizer.to_str(pretty=True) + "\n")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    artifacts.write_json(directory / TOKENIZER_CONFIG, {**config, **special})


def is_protein(inputs: Sequence[Path]) -> bool:
    """Whether the inputs are FASTA files.

    Raises:
        DataError: only some of them are.
    """
    formats = {path: detect_format(path) == "fasta" for path in inputs}
    if len(set(formats.values())) > 1:
        raise DataError(
            f"{inputs[0]} and the other inputs mix FASTA and text; train one tokenizer for each"
        )
    return formats[inputs[0]]


def _check_round_trip(tokenizer: Tokenizer, texts: list[str]) -> None:
    tokenizer.encode_special_tokens = True  # a text may spell a special token; not saved
    for text in (text[:CHECKED_CHARACTERS] for text in texts[:100]):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text, "the tokenizer changes text"


@dataclass(frozen=True)
class LoadedTokenizer:
    """What sharding needs of a tokenizer.

    Attributes:
        sha256: see `tokenizer_sha256`.
        backend: without padding, truncation and sampling; the end token is special.
        token_texts: the bytes of text that each token id stands for; empty for special tokens.
        pad_token_id: the padding token, or the end token if there is none. Readers mask padding
            by length, never by id.
    """

    backend: Tokenizer
    sha256: str
    token_texts: list[bytes]
    eos_token_id: int
    pad_token_id: int

    @property
    def vocab_size(self) -> int:
        """The largest token id plus one."""
        return len(self.token_texts)


def load_tokenizer(directory: Path) -> LoadedTokenizer:
    """Read a Hugging Face tokenizer folder (`tokenizer.json` and `tokenizer_config.json`).

    Raises:
        DataError: a file is missing or invalid, there is no end token, or the decoder is not
            supported.
    """
    digest = tokenizer_sha256(directory)
    try:
        backend = Tokenizer.from_file(str(directory / TOKENIZER_JSON))
    except Exception as error:  # the library raises a bare Exception
        raise DataError(
            f"{directory / TOKENIZER_JSON} is not a tokenizer ({error}); copy the tokenizer again"
        ) from None
    special = {name: _special_token(directory, name) for name in ("eos_token", "pad_token")}
    return view_tokenizer(backend, special, directory, digest)


def view_tokenizer(
    backend: Tokenizer, special: dict, directory: Path = Path("the tokenizer"), digest: str = ""
) -> LoadedTokenizer:
    """What sharding needs of a tokenizer in memory.

    Args:
        special: spellings of `eos_token` and, if there is one, `pad_token`.
        directory: what errors call the tokenizer.
        digest: its `sha256`.

    Raises:
        DataError: there is no end token, or the decoder is not supported.
    """
    spelled = (special.get(name) for name in ("eos_token", "pad_token"))
    eos, pad = (token and backend.token_to_id(token) for token in spelled)
    if eos is None:
        raise DataError(
            f"{directory / TOKENIZER_CONFIG} names no eos_token of this tokenizer; set it to a "
            "special token of tokenizer.json"
        )
    # transformers takes the end token as special even where tokenizer.json does not say so.
    backend.add_special_tokens([special["eos_token"]])
    # A special token spelled out in a text is text, not the special token.
    backend.encode_special_tokens = True
    _only_map_text(backend, directory)
    texts = token_texts(backend, directory)
    texts[eos] = b""
    return LoadedTokenizer(backend, digest, texts, eos, eos if pad is None else pad)


def _only_map_text(backend: Tokenizer, directory: Path) -> None:
    """Switch off what a tokenizer.json may hold besides the map from a text to its tokens."""
    off = []
    if backend.padding is not None:
        off.append("padding")
        backend.no_padding()
    if backend.truncation is not None:
        off.append("truncation")
        backend.no_truncation()
    for name in SAMPLING:
        if getattr(backend.model, name, None):
            off.append(f"sampling ({name} {getattr(backend.model, name)})")
            setattr(backend.model, name, None)
    if off:
        _warn_once(
            f"{' and '.join(off)} of {directory / TOKENIZER_JSON}: switched off, because a text "
            "has one segmentation, and all of it is encoded"
        )


@functools.cache
def _warn_once(text: str) -> None:
    logging.getLogger(__name__).warning(text)


def _special_token(directory: Path, name: str) -> str | None:
    path = directory / TOKENIZER_CONFIG
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); copy the tokenizer again") from None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
