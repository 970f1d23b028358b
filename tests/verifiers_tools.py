"""A tool server on verifiers' own class; its launcher runs this module."""

from __future__ import annotations

import verifiers.v1 as vf


class Shop(vf.Toolset[vf.SharedToolsetConfig]):
    @vf.tool
    def price(self, item: str) -> str:
        """What an item costs."""
        return f"{len(item)} euros"


if __name__ == "__main__":
    Shop.run()
