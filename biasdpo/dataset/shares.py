"""What annotators' choices have in common, and from where on it is worth a warning."""

from __future__ import annotations

import math
from dataclasses import dataclass

from biasdpo.dataset.rows import Row

BIASDPO_LONGER_SHARE = 0.835  # of BiasDPO's own 1,030 rows: the scale of this confound
LONGER_LIMIT = 0.6  # past which "pick the longer" is worth learning
LEFT_LIMITS = (0.4, 0.6)  # within which a habit of the eye does no harm
MIN_COUNT = 20  # of judgments or prompts, below which no share is worth a warning


@dataclass
class Shares:
    """Sums over judgments that prefer one completion, of one annotator or of all."""

    pairs: int = 0
    longer: float = 0.0
    placed: int = 0  # that say where the chosen one stood
    left: int = 0

    def count(self, row: Row, sign: int) -> None:
        lead = len(row["chosen"]) - len(row["rejected"])
        self.pairs += sign
        self.longer += sign if lead > 0 else sign / 2 if lead == 0 else 0
        left, chosen = row["meta"].get("left_side"), row["meta"].get("chosen_side")
        if left and chosen:
            self.placed += sign
            self.left += sign * (left == chosen)

    def merge(self, other: Shares) -> None:
        self.pairs += other.pairs
        self.longer += other.longer
        self.placed += other.placed
        self.left += other.left

    @property
    def longer_share(self) -> float | None:
        return self.longer / self.pairs if self.pairs else None

    @property
    def left_share(self) -> float | None:
        return self.left / self.placed if self.placed else None

    def warnings(self, who: str = "") -> list[str]:
        """One line for each share that is past its limit, beyond what chance explains (95 %)."""
        name = f"{who}: the" if who else "The"
        lines = []
        if self.pairs >= MIN_COUNT and wilson(self.longer, self.pairs)[0] > LONGER_LIMIT:
            share, scale = _percent(self.longer / self.pairs), _percent(BIASDPO_LONGER_SHARE)
            lines.append(
                f"{name} longer completion is chosen in {share} of {self.pairs:,} pairs (BiasDPO's own data set: {scale}), so a "
                "model can learn to write more; choose or edit for content: trim the chosen one"
            )
        low, high = wilson(self.left, self.placed) if self.placed >= MIN_COUNT else LEFT_LIMITS
        if low > LEFT_LIMITS[1] or high < LEFT_LIMITS[0]:
            share = _percent(self.left / self.placed)
            lines.append(
                f"{name} left completion is chosen in {share} of {self.placed:,} judgments, though sides are drawn at random: "
                "read both to the end before choosing"
            )
        return lines


def wilson(hits: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share: hits of n > 0. Wilson, 1927, without continuity correction."""
    z = 1.959964
    share, scale = hits / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
