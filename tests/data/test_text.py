"""Documents out of files: every kind, every cut, every way of being bad."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from documents import sentences

from megallama.data.text import Reading, Record, cut, find_files, read

PLAIN = Reading()
DOCUMENTS = [*sentences(40), "two\nlines", "\u2028 odd break"]


def jsonl(documents: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, key: text}) + "\n" for n, text in enumerate(documents)).encode()


def records(path: Path | str, reading: Reading = PLAIN, slice_bytes: int = 1 << 20) -> list[Record]:
    groups = cut(find_files([str(path)]), reading, slice_bytes)
    return [record for group in groups for piece in group for record in read(piece, reading)]


def texts(*arguments, **options) -> list[str]:
    return [record.text for record in records(*arguments, **options) if record.text]


@pytest.mark.parametrize("slice_bytes", [1, 7, 100, 1000, 1 << 20])
@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n", b"\n\n \n"])
def test_every_cut_of_a_file_of_lines_gives_each_document_once(tmp_path: Path, slice_bytes: int, ending: bytes):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS).rstrip(b"\n") + ending)
    assert texts(tmp_path / "a.jsonl", slice_bytes=slice_bytes) == DOCUMENTS


def test_line_numbers_add_up_over_slices(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS) + b"\n\nbad\n")
    seen = 0
    for (piece,) in cut([str(tmp_path / "a.jsonl")], Reading(), 300):
        found = list(read(piece, Reading()))
        assert [record.line for record in found] == list(range(1, len(found) + 1))
        assert not found or found[-1].done == piece.size
        seen += len(found)
    assert seen == len(DOCUMENTS) + 3


def test_compressed_files(tmp_path: Path):
    zstandard = pytest.importorskip("zstandard")
    half = len(DOCUMENTS) // 2
    for name, compress in (("a.jsonl.gz", gzip.compress), ("b.jsonl.zst", zstandard.compress)):
        # Two members, as left by appending to a compressed file.
        (tmp_path / name).write_bytes(compress(jsonl(DOCUMENTS[:half])) + compress(jsonl(DOCUMENTS[half:])))
        assert texts(tmp_path / name, slice_bytes=10) == DOCUMENTS
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 3])
        with pytest.raises(ValueError, match=r"compressed data is damaged"):
            records(tmp_path / name)
        (tmp_path / name).write_bytes(b"this is not compressed")
        with pytest.raises(ValueError, match=r"compressed data is damaged"):
            records(tmp_path / name)


def test_parquet(tmp_path: Path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pyarrow.table({"text": [*DOCUMENTS, None], "title": [f"t{n}" for n in range(len(DOCUMENTS) + 1)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    groups = cut([str(tmp_path / "a.parquet")], Reading(), 1)
    assert len(groups) == 7  # row groups are shared out
    assert texts(tmp_path / "a.parquet", slice_bytes=1) == DOCUMENTS
    assert [r.problem for r in records(tmp_path / "a.parquet") if r.text is None] == [
        "key 'text' holds NoneType, not text"
    ]
    both = texts(tmp_path / "a.parquet", Reading(json_keys=("title", "text")))
    assert both == [f"t{n}\n\n{text}" for n, text in enumerate(DOCUMENTS)]
    with pytest.raises(ValueError, match="no column 'body'; it has 'text', 'title'"):
        records(tmp_path / "a.parquet", Reading(json_keys=("body",)))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no, not really")
    with pytest.raises(ValueError, match=r"b.parquet: no parquet file"):
        records(tmp_path / "b.parquet")


def test_plain_text_is_a_document_a_file_or_a_line(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\nthree")
    (tmp_path / "b.txt").write_bytes(b"")
    with gzip.open(tmp_path / "c.txt.gz", "wb") as file:
        file.write(b"four\nfive\n")
    assert texts(tmp_path) == ["one\r\ntwo\n\nthree", "four\nfive\n"]
    assert texts(tmp_path, Reading(split_lines=True), 2) == ["one", "two", "three", "four", "five"]


def test_folders_are_sorted_and_hold_only_known_kinds(tmp_path: Path):
    for name in ("b.jsonl", "a/z.txt", "a/b/c.json.gz", "image.png", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = ["a/b/c.json.gz", "a/z.txt", "b.jsonl"]
    assert find_files([str(tmp_path)]) == [str(tmp_path / name) for name in names]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no file of a known kind"):
        find_files([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match=r"image.png: unknown kind of file; known are \.jsonl"):
        find_files([str(tmp_path / "image.png")])
    with pytest.raises(ValueError, match="no such file or folder"):
        find_files([str(tmp_path / "gone.jsonl")])


def test_small_files_share_a_group(tmp_path: Path):
    for n in range(10):
        (tmp_path / f"{n}.txt").write_text("x" * 100)
    groups = cut(find_files([str(tmp_path)]), Reading(), 350)
    assert [len(group) for group in groups] == [3, 3, 3, 1]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "\\ud800"}', "not UTF-8"),
        (b'{"body": "a"}', "key 'text' is missing; found 'body'"),
        (b'{"text": ["a"]}', "key 'text' holds list"),
        (b'{"text": null}', "key 'text' holds NoneType"),
        (b'["a"]', "no JSON object but list"),
        (b"[" * 500 + b"]" * 500, "longer than the limit of 900 bytes"),
        (b'{"text": "' + b"a" * 5000 + b'"}', "longer than the limit of 900 bytes"),
    ],
)
def test_bad_lines_are_told_and_the_rest_is_read(tmp_path: Path, line: bytes, problem: str):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS[:2]) + line + b"\n" + jsonl(DOCUMENTS[2:4]))
    for slice_bytes in (10, 1 << 20):
        found = records(tmp_path / "a.jsonl", Reading(max_document_bytes=900), slice_bytes)
        assert [record.text for record in found if record.text is not None] == DOCUMENTS[:4]
        (bad,) = [record for record in found if record.text is None]
        assert problem in bad.problem and "\n" not in bad.problem
        assert bad.raw == (line + b"\n")[: len(bad.raw)] and bad.raw


def test_deep_nesting_is_bad_not_fatal(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b"[" * 200_000 + b"\n" + jsonl(["fine"]))
    bad, good = records(tmp_path / "a.jsonl")
    assert bad.text is None and bad.problem.startswith("not JSON") and good.text == "fine"


def test_an_overlong_plain_file_says_so(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x" * 1000)
    (bad,) = records(tmp_path / "a.txt", Reading(max_document_bytes=999))
    assert bad.text is None and "longer than the limit of 999 bytes" in bad.problem
