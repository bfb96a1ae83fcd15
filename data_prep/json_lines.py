"""Parse JSON lines: each line is an object with a text; a bad line is told by its own fault."""

import json
import re

from data_prep.documents import Document, ReadCounts, ReadOptions, bad_record
from data_prep.ids import json_id
from data_prep.sources import Chunk
from s2t2_dist.errors import DataError

NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


def parse_jsonl(chunk: Chunk, options: ReadOptions, counts: ReadCounts) -> list[Document]:
    """The documents of a chunk; see `readers.parse_chunk`."""
    documents = []
    for number, line in enumerate(chunk.data.split(b"\n"), start=chunk.line):
        if not line.strip():
            continue
        try:
            document = _document(line, options)
        except ValueError as error:
            bad_record(chunk.path, number, str(error), options, counts)
            continue
        if document.text:
            documents.append(document)
        elif options.strict:
            raise DataError(
                f"{chunk.path} line {number}: the field {options.field!r} is empty; remove the "
                "line or drop --strict"
            )
        else:
            counts.empty += 1
    return documents


def _document(line: bytes, options: ReadOptions) -> Document:
    """The document of a line.

    Raises:
        ValueError: says what is wrong with it and what to do.
    """
    expected = f"expected a JSON object with the string field {options.field!r}, found "
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(expected + _fault(line, error)) from None
    if not isinstance(record, dict):
        raise ValueError(
            f"{expected}{_name(record)}; write one object per line"
            + " (`jq -c '.[]'` does it)" * isinstance(record, list)
        )
    if options.field not in record:
        fields = ", ".join(map(repr, list(record)[:9])) or "none"
        raise ValueError(f"{expected}the fields {fields}; name the one of the text with --field")
    text = record[options.field]
    text = "" if text is None else text
    if not isinstance(text, str):
        raise ValueError(
            f"{expected}{_name(text)} in that field; write text there, or name another field with "
            "--field"
        )
    try:
        identifier = json_id(record, options.id_field, text)
        (identifier + text).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(
            f"{expected}half of a surrogate pair ({ascii(half)[1:-1]}), which is no character; "
            "write the pair, or remove it"
        ) from None
    return Document(identifier, text)


def _fault(line: bytes, error: Exception) -> str:
    """What is wrong with a line that is not JSON."""
    if isinstance(error, RecursionError):
        return "JSON that is nested too deep; remove what is not the text"
    if isinstance(error, UnicodeDecodeError):
        place = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
        return f"a line that is not UTF-8 ({place}); convert the file to UTF-8"
    text = line.decode("utf-8", "replace").strip()
    if text in ("{", "[") or text.startswith(("[{", "[ {")):
        return "JSON over several lines; write one object per line (`jq -c` does it)"
    if not isinstance(error, json.JSONDecodeError):
        return f"JSON that cannot be read ({error}); correct the line"
    problem = f"{error.msg} at column {error.colno}"
    if error.msg == "Extra data":
        return f"more than one value in the line ({problem}); write one object per line"
    if error.pos >= len(text) or error.msg.startswith("Unterminated"):
        return f"a line that was cut off ({problem}); complete or remove it"
    if text.startswith("{'"):
        return f"single quotes ({problem}); write JSON, with double quotes"
    if re.match(r"[{\[\"]", text):
        return f"broken JSON ({problem}); correct the line"
    return f"no JSON: {text[:20]!r} ({problem}); correct or remove the line"


def _name(value: object) -> str:
    """What a JSON value is, in words."""
    return NAMES.get(type(value), f"the number {str(value)[:20]}")
