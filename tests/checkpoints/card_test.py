"""The model card: a front matter that parses, and the numbers of the results."""

import pytest
from huggingface_hub import ModelCard

from jaxmerge.checkpoints import card

RECORDS = [
    {"name": "sums", "source": "/home/me/models/sums", "fingerprint": "0123456789abcdef"},
    {"name": "words", "source": "gs://bucket/run/words/", "fingerprint": "fedcba9876543210"},
]


def entry(name: str, score: float) -> dict:
    return {
        "name": name,
        "test": {"adding": score, "spelling": score - 0.1},
        "test_objective": score - 0.05,
        "ci95": {
            "adding": [score - 0.01, score + 0.01],
            "spelling": [score - 0.2, score],
            "objective": [score - 0.07, score - 0.03],
        },
    }


@pytest.fixture
def findings():
    return {
        "command": "python -m jaxmerge.run --config=mine.py",
        "tasks": ["adding", "spelling"],
        "heldout_tasks": [],
        "objective": {
            "aggregate": "mean",
            "weights": {"adding": 0.5, "spelling": 0.5},
            "reference": {},
        },
        "bounds": {"adding": [0.0, 1.0], "spelling": [0.0, 1.0]},
        "warnings": [],
        "individuals": [entry("sums", 0.5), entry("words", 0.4)],
        "best": {
            **entry("search", 0.75),
            "weights": {"sums": 0.625, "words": 0.375},
            "vs": {"sums": {"delta": 0.25, "ci95": [0.2, 0.3], "p": 0.001}, "words": {}},
        },
    }


def test_the_card_of_a_search(findings):
    text = card.of_search(RECORDS, findings)
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["tags"] == ["merge", "jaxmerge"]
    assert "| sums | 0.625 | models/sums | 0123456789abcdef |" in text
    assert "| words | 0.375 | run/words | fedcba9876543210 |" in text
    assert "best single checkpoint (sums)" in text
    assert "| adding | 75.0 [74.0, 76.0] | 50.0 |" in text
    assert "| mean | 70.0 [68.0, 72.0] | 45.0 |" in text
    assert "+25.0 points [+20.0, +30.0]" in text
    assert text.rstrip().endswith("```\npython -m jaxmerge.run --config=mine.py\n```")
    assert "| task, % |" in text
    assert "Warnings" not in text
    assert "/home/me" not in text


def test_a_card_of_other_numbers_than_shares(findings):
    """Bits per byte and gains are no percentages; a share beside them still is, and says so."""
    findings["bounds"]["spelling"] = [None, 0.0]
    findings["objective"]["aggregate"] = "chebyshev"
    findings["warnings"] = ["adding: the examples are public"]
    text = card.of_search(RECORDS, findings)
    assert "| adding, % | 75.0 [74.0, 76.0] | 50.0 |" in text
    assert "| spelling | 0.650 [0.550, 0.750] | 0.400 |" in text
    assert "| chebyshev | 0.700 [0.680, 0.720] | 0.450 |" in text
    assert "Over the single checkpoint: +0.250 [+0.200, +0.300]." in text
    assert "- adding: the examples are public" in text
    assert "`chebyshev`: augmented Chebyshev distance" in text


def test_the_card_of_given_weights():
    text = card.of_weights(RECORDS, [1.5, -0.5], "")
    assert ModelCard(text).data.to_dict()["pipeline_tag"] == "text-generation"
    assert "| words | -0.5 |" in text
    assert "Scores" not in text
    assert "Command" not in text
