"""The alignment study's table and figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alitok_fast.evaluation.intervals import t_quantile
from alitok_fast.studies.report import GUIDED, TRAIN_ACCURACY, by_row, table, value_of, write_report

JUDGE = {"real_images": 2000, "real_distance": 1.5, "test_accuracy": 0.905}


def result(row: str, seed: int = 0, accuracy: float = 0.25, distance: float = 4.0, paper=None) -> dict:
    generation = {
        "feature_distance": distance,
        "feature_distance_error": 0.5,
        "class_accuracy": 0.9,
        "class_accuracy_error": 0.01,
    }
    reconstruction = {"distance": 2.0, "distance_error": 0.1, "psnr": 24.0}
    return {
        "row": row,
        "title": row.title(),
        "paper": paper,
        "seed": seed,
        "tokens": 64,
        "train": {"accuracy": accuracy, "loss": 3.0},
        "test": {"accuracy": accuracy - 0.01, "loss": 3.1, "bits_per_image": 286.2},
        "reconstruction": {**reconstruction, "codebook_usage": 0.5, "codebook_perplexity": 100.0},
        "generation": {"guided": generation, "unguided": {**generation, "feature_distance": distance + 1}},
    }


def test_one_seed_has_the_interval_of_its_images():
    value = value_of(GUIDED, [result("a", distance=4.0)])
    assert value.mean == 4.0
    assert value.half == pytest.approx(1.96 * 0.5)
    assert value_of(TRAIN_ACCURACY, [result("a", accuracy=0.25)]) == (25.0, None)


def test_several_seeds_have_students_interval():
    value = value_of(TRAIN_ACCURACY, [result("a", 0, 0.2), result("a", 1, 0.3)])
    assert value.mean == pytest.approx(25.0)
    assert value.half == pytest.approx(100 * t_quantile(1) * 0.05)  # 0.1 / sqrt(2), its std, over sqrt(2)


def test_the_table_has_a_column_per_row_in_the_order_of_the_study():
    results = [result("late"), result("other"), result("early", paper=(5.4, None, 0.98))]
    text = table(by_row(results, ["early", "absent", "late"]), JUDGE)
    lines = text.splitlines()
    assert lines[0] == "|  | Early | Late | Other |"
    assert "| AR accuracy, training, % | 25.0 | 25.0 | 25.0 |" in lines
    assert "| distance of samples, guided | 4.00 +- 0.98 | 4.00 +- 0.98 | 4.00 +- 0.98 |" in lines
    assert "| *the paper's B: AR accuracy, training, %* | 5.4 |  |  |" in lines
    assert "| *the paper's B: gFID* |  |  |  |" in lines
    assert "2,000 training images have 1.50" in lines[-1]
    assert "90.5%" in lines[-1]
    assert "the paper" not in table(by_row([result("own")], []), JUDGE)


def test_the_report_is_written(tmp_path: Path):
    pytest.importorskip("matplotlib")
    files = write_report(tmp_path, [result("a"), result("b")], JUDGE, ["a", "b"])
    assert [file.name for file in files] == ["table.md", "results.json", "figure.png"]
    assert files[2].read_bytes().startswith(b"\x89PNG")
    assert json.loads(files[1].read_text()) == {"judge": JUDGE, "results": [result("a"), result("b")]}
