"""What the lines of a FASTA are: comments, titles, words or sequence."""

import re
import string
from collections.abc import Sequence

COMMENT = (b";", b"#")
# The headers of the PIR format: a title follows, and `*` ends the sequence.
PIR = re.compile(rb"(P1|F1|DL|DC|RL|RC|XX|N1|N3);")
# Letters. Tools that cut a line of a sequence into blocks make blocks of ten or more.
BLOCK = 10
# Of a file's records, in percent, that must have no line of words; and letters of a long sequence.
WITHOUT_WORDS = 90
NO_LETTERS = b" \t*-" + string.digits.encode()
UPPER = string.ascii_uppercase.encode()
LONG_SEQUENCE = re.compile(rb"[A-Za-z]{30}")


def has_title(header: bytes, lines: Sequence[bytes]) -> bool:
    """Whether the first of a record's stripped lines is a title, as in the PIR format."""
    return bool(PIR.match(header)) and b"".join(lines).endswith(b"*")


def looks_like_fasta(head: bytes) -> bool:
    """Whether the lines between headers are sequences, not prose that quotes with `>`.

    That is: nearly all records have no line of words, and what is not blank is letters in upper
    case for the most part, or has a long run of letters.

    Args:
        head: the beginning of a file, from a `>` on; line ends are `\\n`.
    """
    records, good, letters = head[1:].split(b"\n>"), 0, []
    for record in records:
        header, _, body = record.partition(b"\n")
        lines = [line.strip() for line in body.split(b"\n")]
        lines = lines[has_title(header, lines) :]
        lines = [line for line in lines if not line.startswith(COMMENT)]
        sequence = [line.translate(None, NO_LETTERS) for line in lines if not is_words(line)]
        good += len(sequence) == len(lines)
        letters += sequence
    text = b"".join(letters)
    upper = len(text) - len(text.translate(None, UPPER))
    is_sequence = 2 * upper > len(text) or LONG_SEQUENCE.search(b"\n".join(letters))
    return 100 * good >= WITHOUT_WORDS * len(records) and bool(is_sequence)


def is_words(line: bytes) -> bool:
    """Whether blanks part words: they do not part a line of upper case into equal blocks.

    The last block may be shorter, and numbers may count the residues of lower-case blocks too.
    """
    if b" " not in line and b"\t" not in line:
        return False
    groups = [group for group in line.replace(b"\t", b" ").split(b" ") if group]
    letters = [group for group in groups if not group.isdigit()]
    if len(letters) < 2:
        return False
    size, last = len(letters[0]), len(letters[-1])
    blocks = all(len(group) == size for group in letters[:-1])
    blocks = blocks and (last == size or (last < size and size >= BLOCK))
    return not (blocks and (len(letters) < len(groups) or line == line.upper()))
