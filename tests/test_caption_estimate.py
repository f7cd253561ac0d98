"""The estimate: real sizes, each content once, answered ones left out, both ways of counting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from caption_server import KEY, Server, pictures
from PIL import Image

from tomjerry_utils import UserError, caption_estimate, captions, spending
from tomjerry_utils.caption_answers import request_tokens


def sized(folder: Path, **sizes: tuple[int, int]) -> Path:
    folder.mkdir()
    for name, (width, height) in sizes.items():
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_sizes_are_those_that_are_sent(tmp_path: Path) -> None:
    images = sized(tmp_path / "in", small=(64, 64), wide=(1600, 400), tall=(100, 900))
    found = caption_estimate.estimate(images, "gpt-4.1-mini")
    text = request_tokens(1, 1, prompt_version="v1", price=found.price) - spending.image_tokens(
        1, 1, found.price
    )
    # 64 × 64; 512 × 128; 57 × 512, in patches of 32 px.
    patches = sum(-(-count * 162 // 100) for count in (2 * 2, 16 * 4, 2 * 16))
    assert found.input_tokens == 3 * text + patches
    assert (found.asked, found.output_tokens, found.worst_output_tokens) == (3, 180, 900)
    assert found.usd == pytest.approx((found.input_tokens * 0.4 + 180 * 1.6) / 1e6)
    assert found.worst_usd == pytest.approx((found.input_tokens * 0.4 + 900 * 1.6) / 1e6)
    larger = caption_estimate.estimate(images, "gpt-4.1-mini", longest_side=1024)
    assert larger.input_tokens > found.input_tokens


def test_tiles_and_detail(tmp_path: Path) -> None:
    images = sized(tmp_path / "in", a=(1024, 1024))
    high = caption_estimate.estimate(images, "gpt-4o", longest_side=1024)
    low = caption_estimate.estimate(images, "gpt-4o", detail="low", longest_side=1024)
    assert high.input_tokens - low.input_tokens == 4 * 170
    assert "tiles of 512 px: 85 tokens and 170 a tile" in high.report()
    assert "patches of 32 px" in caption_estimate.estimate(images, "gpt-5.4").report()


def test_each_content_counts_once_and_broken_files_never(tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 3)
    (images / "copy.png").write_bytes((images / "00.png").read_bytes())
    (images / "torn.png").write_bytes(b"no picture")
    found = caption_estimate.estimate(images, "gpt-4o")
    assert (found.pictures, found.unique, found.unreadable, found.asked) == (5, 3, 1, 3)
    assert "5: 3 to ask about, 0 answered before, 1 with the same content" in found.report()
    assert "1 unreadable" in found.report()


def test_answered_pictures_are_left_out(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = pictures(tmp_path / "in", 4), tmp_path / "out"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    captions.caption_folder(images, out, base_url=server.url, model="gpt-4o", budget=1.0)
    monkeypatch.delenv("OPENAI_API_KEY")
    (images / "new.png").write_bytes((pictures(tmp_path / "more", 9) / "08.png").read_bytes())
    found = caption_estimate.estimate(images, "gpt-4o", out=out)
    assert (found.answered, found.asked) == (4, 1)
    assert caption_estimate.estimate(images, "gpt-4o", out=tmp_path / "other").asked == 5
    assert not (tmp_path / "other").exists()
    # Answers to another question do not help.
    for changes in ({"detail": "low"}, {"longest_side": 256}):
        assert caption_estimate.estimate(images, "gpt-4o", out=out, **changes).asked == 5
    assert caption_estimate.estimate(images, "gpt-4o-mini", out=out).asked == 5
    assert len(server.requests) == 4


def test_expected_and_worst_hold_what_a_run_costs(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(tmp_path / "in", 3)
    found = caption_estimate.estimate(images, "gpt-4o")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.tokens = (found.input_tokens // 3, 300)
    made = captions.caption_folder(
        images, tmp_path / "out", base_url=server.url, model="gpt-4o", budget=1.0
    )
    assert found.usd < made.usd <= found.worst_usd + 1e-12
    told = found.report()
    assert f"{found.usd:.4f} USD expected, {found.worst_usd:.4f} at worst" in told
    assert f"{found.usd / 2:.4f} USD expected, {found.worst_usd / 2:.4f} at worst" in told
    assert spending.PRICES_OF in told


def test_unknown_models_ask_for_a_price(tmp_path: Path) -> None:
    images = pictures(tmp_path / "in", 1)
    with pytest.raises(UserError, match="--price"):
        caption_estimate.estimate(images, "llava")
    given = caption_estimate.estimate(images, "llava", price=(1.0, 2.0))
    assert given.price.input == 1.0
    assert "as given" in given.report()
    with pytest.raises(UserError, match="no prompt"):
        caption_estimate.estimate(images, "gpt-4o", prompt_version="v0")
    with pytest.raises(UserError, match="no folder"):
        caption_estimate.estimate(tmp_path / "none", "gpt-4o")
