"""Where a web API may send a tool on to."""

from __future__ import annotations

import pytest

from retrain.tools.base import ToolError
from retrain.tools.http import _Request


@pytest.mark.parametrize(
    ("address", "target", "followed"),
    [
        ("http://h/a", "https://h/a", True),
        ("http://h:80/a", "https://h:443/b", True),
        ("https://h/a", "//H/b", True),
        ("http://h:8080/a", "http://h:8080/b", True),
        ("http://h:8080/a", "https://h/a", False),
        ("http://h/a", "https://h:8443/a", False),
        ("https://h:8443/a", "https://h/a", False),
        ("https://h/a", "http://h/a", False),
        ("https://h/a", "//other/a", False),
        ("https://h/a", "https://user:pw@h/a", False),
        ("https://h/a", "https://h\\@other/a", False),
        ("https://h/a", "file:///etc/passwd", False),
    ],
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_where_redirects_may_lead(address: str, target: str, followed: bool, status: int) -> None:
    """With them go the headers and, of 307 and 308, the body."""
    request = _Request("POST", address, {"secret": 1})
    if not followed:
        with pytest.raises(ToolError, match="another host or port"):
            request.redirected(status, target, "search")
        return
    led = request.redirected(status, target, "search")
    kept = status in (307, 308)
    assert (led.method, led.body) == (("POST", {"secret": 1}) if kept else ("GET", None))
