"""The Chromium that pages are looked at in: values, errors, requests, widths, pictures."""

from __future__ import annotations

from tests.helpers.browser import browser


def test_a_page_is_seen_with_its_errors_and_requests(tmp_path):
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(
        "<p style='width:900px' id=a>one</p><img src=missing.png>"
        "<script>console.error('said', 3); setTimeout(() => { throw new Error('thrown') })</script>"
    )
    with browser(width=400, dark=True) as tab:
        assert tab.open(page) < 20
        assert tab.evaluate("new Promise(done => setTimeout(() => done(a.textContent), 50))") == "one"
        assert tab.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is True
        assert tab.overflow() > 400
        assert any("said 3" in error for error in tab.errors)
        assert any("thrown" in error for error in tab.errors)
        assert tab.requests == [(tmp_path / "missing.png").as_uri()]
        tab.screenshot(picture)
        assert picture.read_bytes().startswith(b"\x89PNG")
        page.write_text("<p>calm</p>")
        tab.open(page)
        assert (tab.errors, tab.requests, tab.overflow()) == ([], [], 0)
