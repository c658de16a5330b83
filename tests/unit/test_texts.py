"""Reading texts from real files and from a Hub of the tests' own, and tokenising them with the example's tokenizer."""

import copy
import gzip
import io
import itertools
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from examples.tiny_moe.data import MODEL
from sere_dist.calibration.texts import Conversation, read_texts, tokenise

SUFFIXES = [".parquet", ".jsonl", ".json", ".jsonl.gz", ".txt"]
BEGINNING = "In the beginning God created the heaven and the earth."
FORM = "And the earth was without form"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def parquet(column: list | pa.Array, name: str = "text", rows_a_group: int = 1000) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({name: column}), file, row_group_size=rows_a_group)
    return file.getvalue()


def json_lines(*rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def file_of(suffix: str, *texts: str) -> bytes:
    if suffix == ".parquet":
        return parquet(pa.array(texts, pa.string()))
    if suffix == ".txt":
        return "\n\n".join(texts).encode()
    lines = json_lines(*({"text": text} for text in texts))
    return gzip.compress(lines) if suffix.endswith(".gz") else lines


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_each_kind(tmp_path, suffix):
    texts = ["one\nof two lines", "zwei: äöü", "three"]
    assert list(read_texts(write(tmp_path / f"a{suffix}", file_of(suffix, *texts)))) == texts


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_is_read_in_order_with_its_folders(tmp_path, suffix):
    names = ["a", f"b{suffix}/0", f"b{suffix}/1", "c"]
    for name in reversed(names):
        write(tmp_path / f"{name}{suffix}", file_of(suffix, name, f"{name} too"))
    write(tmp_path / "README.md", b"not read")
    texts = [text for name in names for text in (name, f"{name} too")]
    assert list(read_texts(str(tmp_path))) == texts


def test_the_suffixes_of_json_lines_are_one_kind(tmp_path):
    for name in ("a.JSON", "b.jsonl.gz", "c.jsonl"):
        write(tmp_path / name, file_of(name[1:], name))
    assert list(read_texts(str(tmp_path))) == ["a.JSON", "b.jsonl.gz", "c.jsonl"]


def test_folders_without_one_kind(tmp_path):
    write(tmp_path / "table.csv", b"text\none\n")
    with pytest.raises(ValueError, match=r"--dataset .* holds no file that ends in one of \.parquet, .*\.txt"):
        read_texts(str(tmp_path))
    write(tmp_path / "a.txt", b"one")
    write(tmp_path / "b.jsonl", json_lines({"text": "two"}))
    with pytest.raises(ValueError, match=r"--dataset .* files of several kinds \(JSON lines, text\)"):
        read_texts(str(tmp_path))
    with pytest.raises(ValueError, match=r"--dataset .*table\.csv: the name of a file of texts ends in one of"):
        read_texts(str(tmp_path / "table.csv"))


@pytest.mark.parametrize(
    "dataset",
    [
        "/nowhere",
        "./texts",
        "../texts",
        "~/nowhere",
        "~no-such-user/texts",
        "a/b/texts",
        "texts.parquet",
        "a/b.jsonl.gz",
    ],
)
def test_a_mistyped_path_is_not_taken_for_a_name(dataset):
    with pytest.raises(ValueError, match=f"^--dataset {dataset}: no such file or folder$"):
        read_texts(dataset)


def test_a_readers_name_is_no_dataset(tmp_path, monkeypatch):
    write(tmp_path / "notes.txt", b"not asked for")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^--dataset text: no such file or folder$"):
        read_texts("text")


def test_paths_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "org" / "name" / "[1]*?.txt", b"one")
    for dataset in ("~/org/name", "org/name", "./org/name", "org/name/[1]*?.txt"):
        assert list(read_texts(dataset)) == ["one"]


@pytest.mark.parametrize("option", [{"subset": "sample"}, {"split": "test"}])
def test_options_of_datasets_by_name_are_refused_on_disk(tmp_path, option):
    with pytest.raises(ValueError, match="--subset and --split are for datasets by name: leave them out"):
        read_texts(write(tmp_path / "a.txt", b"one"), **option)


def test_texts_are_parted_by_empty_lines(tmp_path):
    content = "\ufeff\n  one\nline\n\n\n\n\ntwo\n\n\n".encode()
    assert list(read_texts(write(tmp_path / "a.txt", content))) == ["  one\nline", "two"]
    assert list(read_texts(write(tmp_path / "b.txt", content.replace(b"\n", b"\r\n")))) == ["  one\nline", "two"]


def test_rows_of_json_lines_may_differ_in_other_keys(tmp_path):
    many = [{"text": "x" * 1000, "meta": None}] * 12_000  # more than the library reads at once
    content = json_lines(*many, {"text": "other", "meta": {"a": 1}}) + b"\n" + json_lines({"text": "last", "id": "7"})
    texts = list(read_texts(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + content)))
    assert len(texts) == 12_002 and texts[-2:] == ["other", "last"]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_another_column_and_its_nulls(tmp_path, suffix):
    body = ["one", None, "", "two"]
    content = parquet(body, "body") if suffix == ".parquet" else json_lines(*({"body": text, "n": 1} for text in body))
    path = write(tmp_path / f"a{suffix}", content)
    assert list(read_texts(path, column="body")) == ["one", "", "", "two"]
    with pytest.raises(ValueError, match=r"^--column text: .* has no such column; it has body"):
        read_texts(path)


def test_a_text_file_has_one_column(tmp_path):
    with pytest.raises(ValueError, match=r"^--column body: .* has no such column; it has text$"):
        read_texts(write(tmp_path / "a.txt", b"one"), column="body")


@pytest.mark.parametrize("values", [[1, 2], [["a"], ["b"]], [b"a"]])
def test_a_parquet_column_of_something_else(tmp_path, values):
    with pytest.raises(ValueError, match=r"^--column text: the column holds .*, not strings"):
        read_texts(write(tmp_path / "a.parquet", parquet(values)))


@pytest.mark.parametrize("value", [1, ["a"], {"a": "b"}, False])
def test_a_json_value_of_something_else(tmp_path, value):
    texts = read_texts(write(tmp_path / "a.jsonl", json_lines({"text": "one"}, {"text": value})))
    assert next(texts) == "one"
    with pytest.raises(ValueError, match=r"^--column text: the column holds .*, not strings"):
        next(texts)


def test_every_parquet_file_is_checked_before_any_is_read(tmp_path):
    write(tmp_path / "a.parquet", parquet(["one"]))
    pq.write_table(pa.table({"id": [7], "text": pa.array(["two"], pa.large_string())}), tmp_path / "b.parquet")
    assert list(read_texts(str(tmp_path))) == ["one", "two"]
    write(tmp_path / "c.parquet", parquet(["three"], "body"))
    with pytest.raises(ValueError, match=r"--column text: .*c\.parquet has no such column; it has body"):
        read_texts(str(tmp_path))
    write(tmp_path / "c.parquet", b"text\nhello\n")
    with pytest.raises(ValueError, match=r"--dataset .*c\.parquet: not readable as Parquet"):
        read_texts(str(tmp_path))


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_without_rows(tmp_path, monkeypatch, suffix, seed):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s after each shuffle of Parquet
    empty = write(tmp_path / f"a{suffix}", file_of(suffix))
    assert list(read_texts(empty, seed=seed)) == []
    write(tmp_path / f"b{suffix}", file_of(suffix, "one"))
    write(tmp_path / f"c{suffix}", file_of(suffix))
    assert list(read_texts(str(tmp_path), seed=seed)) == ["one"]


def damaged_parquet() -> bytes:
    content = bytearray(parquet([os.urandom(500).hex() for _ in range(20_000)]))
    content[-3_000_000:-2_900_000] = bytes(100_000)
    return bytes(content)


def long_lines() -> bytes:
    return json_lines(*[{"text": "x" * 1000}] * 20_000)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("group.parquet", damaged_parquet),
        ("line.jsonl", lambda: long_lines() + b'{"text": "cut'),
        ("surrogate.jsonl", lambda: long_lines() + rb'{"text": "\ud800"}'),
        ("array.json", lambda: long_lines() + b'[{"text": "x"}]'),
        ("bytes.jsonl", lambda: long_lines() + b'{"text": "\xff"}'),
        ("cut.jsonl.gz", lambda: gzip.compress(long_lines())[:-9000]),
        ("bytes.txt", lambda: long_lines().replace(b"\n", b"\n\n") + b"\xff"),
    ],
)
def test_damage_is_noticed_where_it_is(tmp_path, name, content):
    texts = read_texts(write(tmp_path / name, content()))
    assert len(list(itertools.islice(texts, 1000))) == 1000
    with pytest.raises(ValueError, match=rf"^--dataset .*{name}: (damaged|a line is not a JSON object)"):
        list(texts)


@pytest.mark.parametrize(
    ("name", "content"),
    [("not.jsonl.gz", b'{"text": "one"}\n'), ("many_lines.json", b'{\n"text": "one"\n}'), ("number.json", b"5")],
)
def test_damage_at_the_start_is_noticed_at_once(tmp_path, name, content):
    with pytest.raises(ValueError, match=rf"^--dataset .*{name}: (damaged|a line is not a JSON object)"):
        read_texts(write(tmp_path / name, content))


def test_a_seed_gives_one_order(tmp_path):
    texts = [str(number) for number in range(3000)]
    path = write(tmp_path / "a.jsonl", file_of(".jsonl", *texts))
    shuffled = list(read_texts(path, seed=0))
    assert shuffled == list(read_texts(path, seed=0)) and sorted(shuffled) == sorted(texts)
    assert sum(int(text) > 1000 for text in shuffled[:500]) > 250, "the order is that of the file, or nearly"
    assert shuffled != list(read_texts(path, seed=1)) and list(read_texts(path)) == texts


HUB_CARD = b"""---
configs:
- config_name: one
  data_files:
  - {split: train, path: one/train.parquet}
  - {split: test, path: one/test.parquet}
- config_name: two
  data_files:
  - {split: train, path: two/train.parquet}
---
"""
HUB_FILES = {
    "README.md": HUB_CARD,
    "one/train.parquet": parquet(["of train", None]),
    "one/test.parquet": parquet(["of test"]),
    "two/train.parquet": parquet([7], "n"),
}
HUB_COMMIT = f"{7:040}"


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hugging Face Hub with the dataset org/name; there is no other."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/datasets/org/name/resolve/"):
            name = path.split("/", 6)[6]
            if name in HUB_FILES:
                self.answer(200, HUB_FILES[name], {"ETag": f'"{name}"'})
            else:
                self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
        elif path.startswith("/api/datasets/org/name/tree/"):
            folder = path.split("/", 7)[7]
            files = [name for name in HUB_FILES if name.startswith(f"{folder}/")]
            entries = [{"type": "file", "path": name, "size": len(HUB_FILES[name]), "oid": name} for name in files]
            self.answer(200, json.dumps(entries).encode())
        elif path.startswith("/api/datasets/org/name"):
            self.answer(200, json.dumps({"id": "org/name", "sha": HUB_COMMIT, "siblings": []}).encode())
        else:
            self.answer(404, headers={"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": HUB_COMMIT, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_arguments) -> None:
        pass


READ_EACH = """
import json, sys
from sere_dist.calibration.texts import read_texts
for options in json.loads(sys.argv[1]):
    try:
        print(json.dumps(list(read_texts(**options))))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


@pytest.mark.long
def test_datasets_by_name(tmp_path):
    asked = [
        ({"dataset": "org/name", "subset": "one"}, ["of train", ""]),
        ({"dataset": "org/name", "subset": "one", "split": "test"}, ["of test"]),
        ({"dataset": "org/name", "subset": "two"}, "--column text: org/name has no such column; it has n"),
        ({"dataset": "org/name", "subset": "two", "column": "n"}, "--column n: the column holds int in org/name"),
        ({"dataset": "org/name", "subset": "one", "split": "dev"}, "--split dev: the splits of org/name are train, te"),
        ({"dataset": "org/name", "subset": "three"}, "--subset three: .*not found. Available: ['one', 'two']"),
        ({"dataset": "org/name"}, "without --subset: .*available configs: ['one', 'two']"),
        ({"dataset": "org/other"}, "--dataset org/other .*doesn't exist on the Hub"),
        ({"dataset": "other"}, "--dataset other .*no such file or folder.*doesn't exist on the Hub"),
    ]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", READ_EACH, json.dumps([options for options, _ in asked])]
    done = subprocess.run(command, env=environment | {"NO_PROXY": "*"}, capture_output=True, text=True, timeout=120)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    for (options, expected), line in zip(asked, done.stdout.splitlines(), strict=True):
        answer = json.loads(line)
        if isinstance(expected, list):
            assert answer == expected, options
        else:
            assert all(part in answer for part in expected.split(".*")), (options, answer)


def test_a_hub_out_of_reach():
    with pytest.raises(ValueError, match=r"^--dataset org/name .*Couldn't reach 'org/name' on the Hub"):
        read_texts("org/name")


def test_texts_are_cut_and_short_ones_left_out(tokenizer):
    texts = ["too short", BEGINNING, "", FORM]
    ids = tokenise(iter(texts), tokenizer, num_samples=5, max_length=6)
    assert ids == [tokenizer(BEGINNING)["input_ids"][:6], tokenizer(FORM)["input_ids"][:6]]


def test_texts_from_a_length_up(tokenizer):
    texts = [FORM, "too short", BEGINNING, ""]
    whole = [tokenizer(text)["input_ids"] for text in texts]
    most, least = len(whole[2]) - 1, len(whole[0])
    assert tokenise(iter(texts), tokenizer, 5, most, min_length=least) == [whole[0], whole[2][:most]]
    assert tokenise(iter(texts), tokenizer, 5, most, min_length=least + 1) == [whole[2][:most]]


def test_texts_that_are_cut_to_the_same_are_one(tokenizer):
    texts = ["one two three four", "one two three five", "one two four", "one two four"]
    assert len(tokenise(iter(texts), tokenizer, 4, 3)) == 4
    distinct = tokenise(iter(texts), tokenizer, 4, 3, distinct=True)
    assert len(distinct) == len(set(map(tuple, distinct))) < 4
    assert tokenise(iter(texts), tokenizer, 1, 3, distinct=True) == distinct[:1]


def test_no_more_texts_are_drawn_than_needed(tokenizer):
    texts = iter([BEGINNING] * 5)
    assert len(tokenise(texts, tokenizer, 2, 6)) == 2
    assert len(list(texts)) == 3


@pytest.mark.parametrize(("max_tokens", "kept"), [(100, 3), (18, 3), (17, 2), (12, 2), (6, 1)])
def test_a_budget_of_tokens(tokenizer, max_tokens, kept):
    assert len(tokenise(iter([BEGINNING] * 3), tokenizer, 9, 6, max_tokens=max_tokens)) == kept


def test_it_ends_before_the_text_beyond_the_budget(tokenizer):
    long, short = tokenizer(BEGINNING)["input_ids"], tokenizer("And")["input_ids"]
    budget = len(long) + 2 * len(short)
    texts = iter([BEGINNING, "And", BEGINNING, "And"])
    assert tokenise(texts, tokenizer, 9, 99, min_length=1, max_tokens=budget) == [long, short]
    assert list(texts) == ["And"]


def test_no_text_is_usable(tokenizer, tmp_path):
    path = write(tmp_path / "short.parquet", parquet(["a few words", None, ""]))
    longest = len(tokenizer("a few words")["input_ids"])
    with pytest.raises(
        ValueError,
        match=f"^no usable text: the longest of 3 has {longest} tokens and --max-length is 128; "
        "lower --max-length or give longer texts$",
    ):
        tokenise(read_texts(path), tokenizer, 4, 128)
    with pytest.raises(ValueError, match=r"--min-length is 100; lower --min-length or give longer texts$"):
        tokenise(read_texts(path), tokenizer, 4, 128, min_length=100)
    with pytest.raises(ValueError, match="no usable text: the longest of 0 has 0 tokens"):
        tokenise(iter([]), tokenizer, 4, 128)


def test_lengths_that_contradict_each_other(tokenizer):
    with pytest.raises(ValueError, match="--max-tokens 5 is less than the 6 tokens of the first usable text; raise"):
        tokenise(iter([BEGINNING]), tokenizer, 4, 6, max_tokens=5)
    with pytest.raises(ValueError, match="--min-length 7 is more than --max-length 6"):
        tokenise(iter([BEGINNING]), tokenizer, 4, 6, min_length=7)


def test_the_consumers_errors_stay_its_own(tmp_path):
    def broken(_text: str) -> None:
        raise ValueError("the consumer's own")

    with pytest.raises(ValueError, match=r"^the consumer's own$"):
        tokenise(read_texts(write(tmp_path / "a.txt", b"one")), broken, 4, 6)


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "required": ["city"]}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ur"}}}
CHATS = [
    [{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": "I am."}],
    [
        {"role": "user", "content": "What is the weather in Ur?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
    ],
]
WITH_TOOLS = """{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for message in messages %}\
<{{ message.role }}>{{ message.content }}{% if message.tool_calls is defined %}\
{{ message.tool_calls | tojson }}{% endif %}{% endfor %}"""


@pytest.mark.parametrize("tools", [[None, TOOLS], ["", json.dumps(TOOLS)]], ids=["lists", "JSON"])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_conversations_and_their_tools(tmp_path, tokenizer, suffix, tools):
    """A table gives each message the keys of all; a template must not see those that are null."""
    path = tmp_path / f"chats{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"messages": [*CHATS, None], "tools": [*tools, None]}), path)
    else:
        rows = [{"messages": chat, "tools": own} for chat, own in zip(CHATS, tools, strict=True)]
        path.write_bytes(json_lines(*rows, {"messages": None}))
    chats = list(read_texts(str(path), column="messages"))
    assert chats == [Conversation(CHATS[0]), Conversation(CHATS[1], TOOLS), ""]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = WITH_TOOLS
    plain, called = tokenise(iter(chats), tokenizer, 2, 500, min_length=1)
    assert tokenizer.decode(plain) == "<user>Who is there?<assistant>I am."
    assert tokenizer.decode(called).startswith(f"<tools>{json.dumps(TOOLS)}</tools><user>What")
    assert tokenizer.decode(called).endswith(f"<assistant>{json.dumps([CALL])}<tool>sunny")


def test_a_conversation_is_what_the_served_model_sees(tokenizer):
    """The chat template writes the special tokens, so the tokenizer must not add them once more."""
    (ids,) = tokenise(iter([Conversation(CHATS[0])]), tokenizer, 1, 500, min_length=1)
    assert ids == tokenizer.apply_chat_template(CHATS[0])["input_ids"]


def test_conversations_that_can_not_be_used(tmp_path, tokenizer):
    without = copy.deepcopy(tokenizer)
    without.chat_template = None
    with pytest.raises(ValueError, match=r"chat template does not take a conversation .*no template"):
        tokenise(iter([Conversation(CHATS[0])]), without, 1, 8)
    without.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"chat template .*Who is there\?.*roles must alternate"):
        tokenise(iter([Conversation(CHATS[0])]), without, 1, 8)
    path = write(tmp_path / "a.jsonl", json_lines({"messages": CHATS[0], "tools": "weather"}))
    with pytest.raises(ValueError, match="column tools holds a string that is not JSON"):
        next(read_texts(path, column="messages"))
    path = write(tmp_path / "b.jsonl", json_lines({"messages": CHATS[0], "tools": {"name": "weather"}}))
    with pytest.raises(ValueError, match="column tools must hold a list of tools"):
        next(read_texts(path, column="messages"))
    path = write(tmp_path / "c.jsonl", json_lines({"messages": [{"from": "human", "value": "?"}]}))
    with pytest.raises(ValueError, match=r"holds list in .*, not strings or lists of messages with a role"):
        next(read_texts(path, column="messages"))
