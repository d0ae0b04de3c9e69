"""Every committed card is one that the Hub would take. Run: .venv/bin/python -m pytest tests/test_cards.py"""

from pathlib import Path

import pytest
from huggingface_hub import DatasetCard

CARDS = sorted((Path(__file__).parents[1] / "data_cards").glob("*.md"))


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_a_card_has_a_header_and_says_how_it_was_made(path):
    card = DatasetCard.load(path)
    assert card.data.to_dict()["configs"] and "rewardkit" in card.data.tags
    assert all(part in card.text for part in ("## How it was made", "## How to load it", "## How to make it again", "## Limits"))
