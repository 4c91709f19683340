"""The table of metrics in server/metrics/README.md."""

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[1] / "server/metrics/README.md"


@dataclass(frozen=True)
class Documented:
    type: str
    labels: tuple[str, ...]
    text: str


def documented() -> dict[str, Documented]:
    """By the name of the family: a counter's without `_total`."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) == 4:
            name, kind, labels, text = cells
            assert name not in found
            found[name] = Documented(kind, tuple(labels.replace(",", " ").split()), text)
    return found
