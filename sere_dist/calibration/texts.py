"""Calibration texts: rows of a file, a folder or a dataset by name to texts, and texts to token ids.

A text is a string or a conversation. The model's own chat template makes a string of a conversation, so that the
experts see what they see in service.
"""

import glob
import itertools
import os
import pkgutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import datasets.packaged_modules
import jinja2
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from pydantic_core import from_json
from transformers import AutoTokenizer, PreTrainedTokenizerBase

KINDS = {
    ".parquet": "Parquet",
    ".jsonl": "JSON lines",
    ".jsonl.gz": "JSON lines",
    ".json": "JSON lines",
    ".txt": "text",
}
TOOLS = "tools"  # the column beside one of conversations that holds what their models may call
ROWS_A_BATCH = 1000
SHUFFLE_BUFFER = 10_000


class Conversation(NamedTuple):
    """Messages with a role and a content, and the tools that the model may call, as chat templates take them."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


Text = str | Conversation


def read_texts(
    dataset: str, *, subset: str | None = None, split: str = "train", column: str = "text", seed: int | None = None
) -> Iterator[Text]:
    """Returns the texts of a column, one after the other; an entry that is null is an empty text.

    The column holds strings, or conversations: lists of messages with a `role`. A column `tools` beside conversations
    holds a list of tools for each, or that as a string of JSON.

    `dataset` is a file, a folder of files of one kind (Parquet, JSON lines, or text with empty lines between texts), or
    else the name of a dataset for the `datasets` library; `subset` and `split` are for those by name. With a seed, the
    files and the texts within a window of 10,000 come in random order. Nothing is read before it is asked for, but for
    the schemas of Parquet files and what it takes to give the first text.

    Raises:
        ValueError: there is no such file, folder or dataset, it can't be read, or it has no such column of texts.
            What is wrong beyond the first text is raised where the reading gets there.
    """
    path, kind, columns = os.path.expanduser(dataset), None, [column]
    if os.path.exists(path):
        if subset is not None or split != "train":
            raise ValueError(f"--subset and --split are for datasets by name: leave them out, {path} is on disk")
        kind, files = _files(Path(path))
        if kind == "Parquet":
            columns = _columns(files, column)
        stream = _stream_files(kind, files, columns)
    elif os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1 or _kind(Path(path)):
        raise ValueError(f"--dataset {dataset}: no such file or folder")
    else:
        stream = _stream_by_name(dataset, subset, split)

    if seed is not None:
        stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    rows = _rows(stream, dataset)
    if kind == "JSON lines":
        rows = (_json_object(row["text"], dataset) for row in rows if row["text"].strip())
    elif kind == "text":
        # Where several empty lines part two texts, or one ends the file, the library leaves newlines at the texts.
        rows = ({"text": text} for row in rows if (text := row["text"].strip("\n")))
    texts = _texts(rows, dataset, column)
    return itertools.chain(list(itertools.islice(texts, 1)), texts)


def load_tokenizer(name: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Returns a model's tokenizer.

    Raises:
        ValueError: the model has none that transformers knows.
        OSError: it can't be fetched.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    if tokenizer is None:
        raise ValueError(f"--model {name} has no tokenizer that transformers knows")
    return tokenizer


def tokenise(
    texts: Iterator[Text],
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    max_length: int,
    *,
    min_length: int | None = None,
    max_tokens: int | None = None,
    distinct: bool = False,
) -> list[list[int]]:
    """Returns the token ids of the first texts that have `min_length` tokens, cut to `max_length`.

    Each text is tokenised on its own: a string with the tokenizer's default special tokens, a conversation with those
    of its chat template. Texts with fewer than `min_length` tokens (by default `max_length`) are left out, and if they
    shall be `distinct`, those that are cut to the ids of an earlier one. It ends at `num_samples` texts, or before the
    text that would take the sum of their lengths over `max_tokens`.

    Raises:
        ValueError: not one text is long enough, the first that is has more than `max_tokens` tokens, `min_length` is
            more than `max_length`, or the chat template does not take a conversation.
    """
    option = "--max-length" if min_length is None else "--min-length"
    min_length = max_length if min_length is None else min_length
    if min_length > max_length:
        raise ValueError(f"--min-length {min_length} is more than --max-length {max_length}, to which texts are cut")
    kept, known, total, longest, seen = [], set(), 0, 0, 0
    for text in texts:
        ids = _token_ids(tokenizer, text)
        seen, longest = seen + 1, max(longest, len(ids))
        if len(ids) < min_length:
            continue
        ids = ids[:max_length]
        if distinct and tuple(ids) in known:
            continue
        known.add(tuple(ids))
        total += len(ids)
        if max_tokens is not None and total > max_tokens:
            if not kept:
                raise ValueError(
                    f"--max-tokens {max_tokens} is less than the {len(ids)} tokens of the first usable text; "
                    "raise --max-tokens or lower --max-length"
                )
            break
        kept.append(ids)
        if len(kept) == num_samples:
            break
    if not kept:
        raise ValueError(
            f"no usable text: the longest of {seen} has {longest} tokens and {option} is {min_length}; "
            f"lower {option} or give longer texts"
        )
    return kept


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    if isinstance(text, str):
        return tokenizer(text)["input_ids"]
    try:
        rendered = tokenizer.apply_chat_template(text.messages, tools=text.tools, tokenize=False)
    except (ValueError, TypeError, jinja2.TemplateError) as error:
        raise ValueError(
            f"the model's chat template does not take a conversation of --column ({str(text.messages)[:80]}): {error}"
        ) from error
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]  # the template wrote the special tokens


def _kind(path: Path) -> str | None:
    return next((kind for suffix, kind in KINDS.items() if path.name.lower().endswith(suffix)), None)


def _files(path: Path) -> tuple[str, list[str]]:
    """Returns the kind of a file, or of all files of a folder, and the paths of the files."""
    suffixes = ", ".join(KINDS)
    if not path.is_dir():
        if not (kind := _kind(path)):
            raise ValueError(f"--dataset {path}: the name of a file of texts ends in one of {suffixes}")
        return kind, [str(path)]
    files = {str(file): kind for file in sorted(path.rglob("*")) if (kind := _kind(file)) and file.is_file()}
    kinds = sorted(set(files.values()))
    if not kinds:
        raise ValueError(f"--dataset {path}: the folder holds no file that ends in one of {suffixes}")
    if len(kinds) > 1:
        raise ValueError(
            f"--dataset {path}: the folder has files of several kinds ({', '.join(kinds)}); give one of one kind"
        )
    return kinds[0], list(files)


def _columns(files: list[str], column: str) -> list[str]:
    """Returns the columns to read of Parquet files: of conversations also that of their tools.

    Refuses, before any work, files that can't be read or do not have the column, as texts.
    """
    columns = [column, TOOLS]
    for file in files:
        with _readable(f"--dataset {file}: not readable as Parquet"):
            schema = pq.read_schema(file)
        if column not in schema.names:
            raise _no_column(column, file, schema.names)
        kind = schema.field(column).type
        if not (_holds_messages(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise _no_texts(column, file, str(kind))
        if not (_holds_messages(kind) and TOOLS in schema.names):
            columns = [column]
    return columns


def _holds_messages(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    of_messages = kind.value_type
    return pa.types.is_struct(of_messages) and of_messages.get_field_index("role") >= 0


def _stream_files(kind: str, files: list[str], columns: list[str]) -> datasets.IterableDataset:
    patterns = [glob.escape(file) for file in files]
    with _readable(f"--dataset {files[0]}: not readable"):
        if kind == "Parquet":
            return datasets.load_dataset(
                "parquet",
                data_files=patterns,
                split="train",
                streaming=True,
                columns=columns,
                # By default the rows of the first row group, which is a crash where there are none.
                batch_size=ROWS_A_BATCH,
                # By default all that was read of a file stays in memory until the file ends.
                fragment_scan_options=pads.ParquetFragmentScanOptions(pre_buffer=False),
            )
        # JSON is read as lines of text. The library's JSON builder refuses rows of differing keys, makes a string of a
        # number that comes after strings, and reads the whole file into memory when a line of it is damaged.
        return datasets.load_dataset(
            "text",
            data_files=patterns,
            split="train",
            streaming=True,
            sample_by="paragraph" if kind == "text" else "line",
            encoding="utf-8-sig",
        )


def _stream_by_name(name: str, subset: str | None, split: str) -> datasets.IterableDataset:
    # The library takes the name of one of its readers for a dataset: all files of the working directory.
    if name in {module.name for module in pkgutil.iter_modules(datasets.packaged_modules.__path__)}:
        raise ValueError(f"--dataset {name}: no such file or folder")
    options = f"--dataset {name} " + (f"--subset {subset}" if subset else "without --subset")
    with _readable(f"{options}: no such file or folder, and no such dataset by name that can be loaded"):
        splits = datasets.load_dataset(name, subset, streaming=True)
    if split not in splits:
        raise ValueError(f"--split {split}: the splits of {name} are {', '.join(map(str, splits))}")
    return splits[split]


@contextmanager
def _readable(what: str) -> Generator[None]:
    try:
        yield
    except Exception as error:  # the readers let through those of all their layers: Arrow, gzip, UTF-8, HTTP
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error


def _rows(stream: datasets.IterableDataset, dataset: str) -> Iterator[dict]:
    iterator = iter(stream)
    while True:
        with _readable(f"--dataset {dataset}: damaged or not readable"):
            row = next(iterator, None)
        if row is None:
            return
        yield row


def _json_object(line: str, dataset: str) -> dict:
    what = f"--dataset {dataset}: a line is not a JSON object ({line[:80]})"
    with _readable(what):
        row = from_json(line)
    if not isinstance(row, dict):
        raise ValueError(f"{what}; give JSON lines, one object a line")
    return row


def _texts(rows: Iterator[dict], dataset: str, column: str) -> Iterator[Text]:
    for row in rows:
        if column not in row:
            raise _no_column(column, dataset, row)
        value = row[column]
        if isinstance(value, list) and all(isinstance(each, dict) and "role" in each for each in value):
            yield Conversation(_without_nulls(value), _tools(row.get(TOOLS), dataset)) if value else ""
        elif isinstance(value, str | None):
            yield value or ""
        else:
            raise _no_texts(column, dataset, type(value).__name__)


def _tools(value: Any, dataset: str) -> list[Any] | None:
    """Returns the tools of a conversation."""
    if isinstance(value, str):
        with _readable(f"--dataset {dataset}: column {TOOLS} holds a string that is not JSON ({value[:80]})"):
            value = from_json(value) if value else None
    if not value:
        return None
    if not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise ValueError(f"--dataset {dataset}: column {TOOLS} must hold a list of tools for each conversation")
    return _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    """Returns the value less what is null in it: a table gives every message the keys of all, and templates ask which
    keys there are."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _no_column(column: str, dataset: str, columns: Iterable[str]) -> ValueError:
    return ValueError(f"--column {column}: {dataset} has no such column; it has {', '.join(columns)}")


def _no_texts(column: str, dataset: str, kind: str) -> ValueError:
    return ValueError(
        f"--column {column}: the column holds {kind} in {dataset}, not strings or lists of messages with a role; name "
        "one of texts or of conversations"
    )
