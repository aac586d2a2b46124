"""Parquet files of tokens: caches that others publish, and our own export, which comes back bit for bit."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from noise import META, Source, encode

from alitok_fast.data import cache_writer, validate_token_cache, write_token_cache
from alitok_fast.data.parquet import import_parquet
from alitok_fast.data.parquet_export import export_parquet
from alitok_fast.data.parquet_facts import ParquetColumns, TokenFacts
from alitok_fast.data.parquet_table import ParquetFile

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TOKENS = np.random.default_rng(0).integers(0, 50, (6, 2, 3))
LABELS = [2, 0, 1, 1, 0, 1]
FACTS = TokenFacts(codebook_size=50, image_size=4, num_tokens=3)


def nested(kind: object = None) -> pa.Array:
    return pa.array(TOKENS.tolist(), kind or pa.list_(pa.list_(pa.int64())))


def write(path: Path, tokens: object, labels: object = LABELS, rows: int = 2, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"tokens": tokens, "label": labels, **columns}), path, row_group_size=rows)
    return path


@pytest.fixture
def cache(tmp_path: Path):
    write_token_cache(tmp_path / "cache", Source(), encode, META, 1, workers=1)
    return validate_token_cache(tmp_path / "cache")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- files of others ------------------------------------------------------------------------------------------------

LAYOUTS = {
    "nested": (nested(), {}),
    "fixed": (nested(pa.list_(pa.list_(pa.uint16(), 3), 2)), {}),
    "large": (nested(pa.large_list(pa.large_list(pa.int32()))), {}),
    "flat": (pa.array(TOKENS.reshape(6, 6).tolist(), pa.list_(pa.int16())), {}),
    "flat fixed": (pa.array(TOKENS.reshape(6, 6).tolist(), pa.list_(pa.uint8(), 6)), {}),
    "crops": (pa.array(TOKENS.reshape(12, 3).tolist()), {"image": [f"img{i // 2}" for i in range(12)]}),
    "crops by number": (pa.array(TOKENS.reshape(12, 1, 3).tolist()), {"image": [9 - i // 2 for i in range(12)]}),
}


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_read(tmp_path: Path, layout: str, rows: int) -> None:
    tokens, more = LAYOUTS[layout]
    labels = np.repeat(LABELS, 2) if more else LABELS
    write(tmp_path / "data" / "a.parquet", tokens.slice(0, 5), labels[:5], rows, **{k: v[:5] for k, v in more.items()})
    write(tmp_path / "data" / "b.parquet", tokens.slice(5), labels[5:], rows, **{k: v[5:] for k, v in more.items()})
    columns = ParquetColumns(image="image") if more else None
    found = import_parquet([tmp_path / "data"], tmp_path / "out", columns, FACTS)
    assert found.tokens.dtype == np.uint16 and (found.tokens == TOKENS).all() and (found.labels == LABELS).all()
    meta = found.meta
    assert (meta.class_names, meta.source, meta.tokenizer, meta.shard) == (["0", "1", "2"], "data", "", None)
    assert sorted(os.listdir(tmp_path / "out")) == ["labels.npy", "meta.json", "tokens.npy"]


def test_columns_facts_and_class_names_are_taken(tmp_path: Path) -> None:
    table = pa.table({"codes": nested(), "y": pa.array(LABELS, pa.uint8()), "other": ["x"] * 6})
    pq.write_table(table, tmp_path / "x.parquet")
    facts = dataclasses.replace(FACTS, class_names=["a", "b", "c", "d"], tokenizer="abc", source="mine", num_crops=2)
    found = import_parquet([tmp_path / "x.parquet"], tmp_path / "out", ParquetColumns("codes", "y"), facts).meta
    assert (found.class_names, found.tokenizer, found.source) == (["a", "b", "c", "d"], "abc", "mine")


@pytest.mark.parametrize("shape", [(2730,), (10, 273), (273,), (2, 1057)])
def test_published_sizes_are_known_by_the_number_of_tokens(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tokens = pa.array(np.full((1, *shape), 4095).tolist())
    found = import_parquet([write(tmp_path / "x.parquet", tokens, [0])], tmp_path / "out").meta
    image_size = 512 if shape[-1] == 1057 else 256
    assert (found.image_size, found.codebook_size) == (image_size, 4096)
    assert found.num_tokens in (273, 1057) and found.num_crops * found.num_tokens == np.prod(shape)


def test_other_sizes_must_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", nested())
    for facts, message in (
        (TokenFacts(), "image_size: expected a number, since no published tokenizer makes 3 tokens of an image"),
        (TokenFacts(image_size=4), "codebook_size: expected a number, since no published tokenizer makes 3 tokens"),
        (TokenFacts(image_size=256, codebook_size=50, num_tokens=4), r"num_tokens: expected 4, got rows of \(2, 3\)"),
        (TokenFacts(image_size=256, codebook_size=50, num_crops=3), r"num_crops: expected 3, got rows of \(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            import_parquet([path], tmp_path / "out", None, facts)
    flat = write(tmp_path / "flat.parquet", LAYOUTS["flat"][0])
    with pytest.raises(ValueError, match=r"num_tokens: expected 4, got rows of \(6,\) tokens in 'tokens'"):
        import_parquet([flat], tmp_path / "out", None, TokenFacts(num_tokens=4))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="codebook_size: expected a whole number of at least 1, got 0"):
        TokenFacts(codebook_size=0)


def tokens_with(value: object, kind: object = None) -> pa.Array:
    rows = TOKENS.tolist()
    rows[3][1][2] = value
    return pa.array(rows, kind)


WRONG = {
    "range": (tokens_with(50), LABELS, "column 'tokens': expected 0 to 49, got 50 in row 1"),
    "negative": (tokens_with(-1), LABELS, "column 'tokens': expected 0 to 49, got -1 in row 1"),
    "huge": (tokens_with(2**64 - 1, pa.list_(pa.list_(pa.uint64()))), LABELS,
             "column 'tokens': expected 0 to 49, got 18446744073709551615 in row 1"),
    "missing": (tokens_with(None), LABELS, "column 'tokens': expected a value everywhere, got none in row 1"),
    "missing row": (pa.array([*TOKENS.tolist()[:3], None, *TOKENS.tolist()[4:]]), LABELS, "got none in row 1"),
    "missing crop": (pa.array([*TOKENS.tolist()[:3], [[1, 2, 3], None], *TOKENS.tolist()[4:]]), LABELS,
                     "column 'tokens': expected a value everywhere, got none in row 1"),
    "uneven": (pa.array([*TOKENS.tolist()[:3], [[1, 2, 3], [1, 2]], *TOKENS.tolist()[4:]]), LABELS,
               "column 'tokens': expected lists of 3, got 2 in row 1"),
    "crops": (pa.array([*TOKENS.tolist()[:3], [[1, 2, 3]], *TOKENS.tolist()[4:]]), LABELS,
              "column 'tokens': expected lists of 2, got 1 in row 1"),
    "shape": (pa.array([*TOKENS.tolist()[:2], *[[[1, 2, 3]]] * 4]), LABELS,
              r"column 'tokens': expected lists of \(2, 3\) as in the first row, got \(1, 3\) in row 0"),
    "floats": (pa.array((TOKENS / 2).tolist()), LABELS, "expected lists of whole numbers, .* got double 2 deep"),
    "scalars": (pa.array(range(6)), LABELS, "expected lists of whole numbers, .* got int64 0 deep"),
    "deep": (pa.array(TOKENS.reshape(6, 1, 2, 3).tolist()), LABELS, "expected lists of whole numbers, .* int64 3 deep"),
    "empty": (pa.array([[]] * 6, pa.list_(pa.int64())), LABELS,
              "column 'tokens': expected lists of tokens, got 0 in row 0"),
    "no label": (nested(), [2, 0, 1, None, 0, 2], "column 'label': expected a value everywhere, got none in row 1"),
    "label": (nested(), [2, 0, 1, -1, 0, 2], "column 'label': expected 0 to 2, got -1 in row 1"),
    "class": (nested(), [2, 0, 1, 3, 0, 2], "column 'label': expected 0 to 2, got 3 in row 1"),
    "name": (nested(), list("abcdef"), "column 'label': expected whole numbers, got string"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_by_place(tmp_path: Path, case: str) -> None:
    tokens, labels, message = WRONG[case]
    path = write(tmp_path / "x.parquet", tokens, labels)
    group = 0 if case in ("floats", "scalars", "deep", "empty", "name") else 1
    with pytest.raises(ValueError, match=f"x.parquet: row group {group}, .*{message}"):
        import_parquet([path], tmp_path / "out", None, dataclasses.replace(FACTS, class_names=["a", "b", "c"]))
    with pytest.raises(ValueError, match="expected a token cache"):
        validate_token_cache(tmp_path / "out")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([0, 0, 1, 1, 0, 0], [0] * 6,
         "'image': expected the rows of an image one after the other, got image 0 again in row 0"),
        ([0, 0, 1, 2, 2, 2], [0] * 6, "'image': expected 2 rows of each image, as of the first, got 1 of image 1"),
        ([0, 0, 1, 1, 2, 3], [0] * 6, "'image': expected 2 rows of each image, as of the first, got 1 of image 2"),
        ([0, 0, 1, 1, 2, 2], [0, 0, 1, 0, 2, 2], "'label': expected one label for image 1, got 1 and 0"),
        ([0, 0, 1, 1, 2, None], [0] * 6, "'image': expected a value everywhere, got none in row 1"),
        ([[0]] * 6, [0] * 6, "'image': expected numbers or text, got list"),
    ],
)  # fmt: skip
def test_rows_of_crops_are_checked(tmp_path: Path, images: list, labels: list, message: str) -> None:
    path = write(tmp_path / "x.parquet", pa.array(TOKENS[:3].reshape(6, 3).tolist()), labels, image=images)
    with pytest.raises(ValueError, match=f"x.parquet: row group ., column {message}"):
        import_parquet([path], tmp_path / "out", ParquetColumns(image="image"), FACTS)


def test_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", nested())
    for columns, message in (
        (ParquetColumns("codes"), "x.parquet: tokens_column: expected one of 'tokens', 'label', got 'codes'"),
        (ParquetColumns(label="y"), "x.parquet: label_column: expected one of 'tokens', 'label', got 'y'"),
        (ParquetColumns(image="id"), "x.parquet: image_column: expected one of 'tokens', 'label', got 'id'"),
    ):
        with pytest.raises(ValueError, match=message):
            import_parquet([path], tmp_path / "out", columns, FACTS)


def test_files_are_those_of_one_whole_split(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("train-00000-of-00003", "train-00002-of-00003", "val-00000-of-00001"):
        write(data / "sub" / f"{name}.parquet", nested())
    with pytest.raises(
        ValueError, match="expected the files of one split, got train, val in .*data; name one by a pattern"
    ):
        import_parquet([data], tmp_path / "out", None, FACTS)
    (data / "sub" / "val-00000-of-00001.parquet").rename(tmp_path / "else.parquet")
    with pytest.raises(ValueError, match="expected 3 files in .*data, got 2: train-00001-of-00003.parquet is missing"):
        import_parquet([data], tmp_path / "out", None, FACTS)
    assert len(import_parquet([data / "**" / "train-*.parquet"], tmp_path / "out", None, FACTS)) == 12
    with pytest.raises(
        ValueError, match=r"expected files or a folder with \*.parquet, got .*none, where there are none"
    ):
        import_parquet([tmp_path / "none"], tmp_path / "out2")
    with pytest.raises(ValueError, match="parquet: expected each file once, got .*00000-of-00003.parquet again"):
        import_parquet([data / "sub" / "train-00000-of-00003.parquet", data / "**" / "train-*"], tmp_path / "out2")


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "pages"])
def test_damaged_files_are_one_line(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "x.parquet", nested())
    raw = path.read_bytes()
    pages = raw[:4] + bytes(byte ^ 255 for byte in raw[4:200]) + raw[200:]
    path.write_bytes({"empty": b"", "text": b"hello " * 100, "cut": raw[:-20], "pages": pages}[damage])
    with pytest.raises(
        ValueError, match="x.parquet: (expected a parquet file, got|row group 0, column .*: expected data)"
    ):
        import_parquet([path], tmp_path / "out", None, FACTS)


def test_class_names_of_a_hugging_face_data_set_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"tokens": datasets.Array2D((2, 3), "int32"), "label": datasets.ClassLabel(names=["x", "y", "z"])}
    )
    data = datasets.Dataset.from_dict({"tokens": TOKENS.tolist(), "label": LABELS}, features)
    data.to_parquet(tmp_path / "x.parquet")
    found = import_parquet([tmp_path / "x.parquet"], tmp_path / "out", None, FACTS)
    assert found.meta.class_names == ["x", "y", "z"] and (found.tokens == TOKENS).all()


def test_an_interrupted_import_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_writer, "_BATCHES_PER_BLOCK", 1)
    tokens, more = LAYOUTS["crops"]
    arguments = ([write(tmp_path / "x.parquet", tokens, np.repeat(LABELS, 2), 3, **more)], tmp_path / "out")
    columns = ParquetColumns(image="image")

    def killed(groups):
        yield from groups[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_parquet(*arguments, columns, FACTS, progress=killed)
    with pytest.raises(ValueError, match="unfinished"):
        validate_token_cache(tmp_path / "out")
    with pytest.raises(ValueError, match="of other images or settings: codebook_size"):
        import_parquet(*arguments, columns, dataclasses.replace(FACTS, codebook_size=60))
    read: list = []
    real = ParquetFile.lists
    monkeypatch.setattr(ParquetFile, "lists", lambda *a: (read.append(a[1].number), real(*a))[1])
    assert (import_parquet(*arguments, columns, FACTS).tokens == TOKENS).all()
    assert read == [0, 2, 3]  # the first for its shape
    write(tmp_path / "x.parquet", tokens, np.repeat(LABELS[::-1], 2), 3, **more)
    with pytest.raises(ValueError, match="of other images or settings: data"):
        import_parquet(*arguments, columns, FACTS)


def test_missing_pyarrow_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache) -> None:
    path = write(tmp_path / "x.parquet", nested())
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for act in (lambda: import_parquet([path], tmp_path / "out"), lambda: export_parquet(cache, tmp_path / "out")):
        with pytest.raises(ImportError, match=r"parquet files need pyarrow: pip install .*\[parquet\]'"):
            act()


# --- our own export -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_an_export_comes_back_bit_for_bit(tmp_path: Path, cache, rows: int) -> None:
    files = export_parquet(cache, tmp_path / "exported", rows)
    assert [file.name for file in files][-1] == f"tokens-{len(files) - 1:05}-of-{-(-5 // rows):05}.parquet"
    found = import_parquet(files[::-1], tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "cache")
    assert found.fingerprint() == cache.fingerprint()


def test_a_shard_stays_one_and_columns_are_remembered(tmp_path: Path, cache) -> None:
    shard = dataclasses.replace(cache, meta=dataclasses.replace(META.of_shard(range(0, 5)), num_images=5))
    export_parquet(shard, tmp_path / "exported", columns=ParquetColumns("codes", "y"))
    assert import_parquet([tmp_path / "exported"], tmp_path / "back").meta == shard.meta


def test_large_codebooks_keep_their_numbers(tmp_path: Path, cache) -> None:
    meta = dataclasses.replace(META, codebook_size=1 << 20)
    large = dataclasses.replace(cache, tokens=cache.tokens.astype(np.int32) + (1 << 19), meta=meta)
    export_parquet(large, tmp_path / "exported")
    found = import_parquet([tmp_path / "exported"], tmp_path / "back")
    assert found.tokens.dtype == np.int32 and (found.tokens == large.tokens).all()


def test_exported_files_are_complete_and_of_one_cache(tmp_path: Path, cache) -> None:
    files = export_parquet(cache, tmp_path / "exported", 2)
    for some, message in (
        (files[:2], "parquet: expected 5 images, as .*00000-of-00003.parquet says, got 4"),
        (files[1:], "00001-of-00003.parquet: expected a file that begins with image 0, got 2"),
        (files[::2], "00002-of-00003.parquet: expected a file that begins with image 2, got 4"),
        ([*files, write(tmp_path / "x.parquet", nested())], "x.parquet: expected token cache metadata"),
    ):
        with pytest.raises(ValueError, match=message):
            import_parquet(some, tmp_path / "out")
    other = dataclasses.replace(cache, meta=dataclasses.replace(META, tokenizer="other"))
    (file,) = export_parquet(other, tmp_path / "other")
    with pytest.raises(ValueError, match="other.*parquet: expected a file of the same cache as .*: tokenizer"):
        import_parquet([*files, file], tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"codebook_size: expected 50, got 60 \(.*parquet holds the metadata of its cache"
    ):
        import_parquet(files, tmp_path / "out", None, TokenFacts(codebook_size=60))
    assert import_parquet(files, tmp_path / "out", None, TokenFacts(codebook_size=50)).meta == META


def test_files_of_others_are_kept(tmp_path: Path, cache) -> None:
    out = tmp_path / "out"
    mine = write(out / "mine.parquet", nested())
    with pytest.raises(ValueError, match="out: expected a folder without parquet files, got .*mine.parquet"):
        export_parquet(cache, out)
    export_parquet(cache, out, 1, force=True)
    export_parquet(cache, out, 5, force=True)
    assert sorted(os.listdir(out)) == ["mine.parquet", "tokens-00000-of-00001.parquet"] and mine.stat().st_size
    for options, message in (
        ({"rows_per_file": 0}, "rows_per_file: expected a whole number"),
        ({"columns": ParquetColumns(image="x")}, "columns: expected a name for the tokens and another"),
        ({"columns": ParquetColumns("x", "x")}, "columns: expected a name for the tokens and another"),
    ):
        with pytest.raises(ValueError, match=message):
            export_parquet(cache, tmp_path / "other", **options)


def test_others_can_read_the_export(tmp_path: Path, cache) -> None:
    datasets = pytest.importorskip("datasets")
    export_parquet(cache, tmp_path / "exported", 2)
    files = str(tmp_path / "exported" / "*.parquet")
    found = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "hf"))
    assert found.features["label"].names == ["a", "b"]
    assert (np.array(found["tokens"]) == cache.tokens).all() and list(found["label"]) == cache.labels.tolist()
    table = pq.read_table(tmp_path / "exported")
    assert table["tokens"].to_pylist() == cache.tokens.tolist()
