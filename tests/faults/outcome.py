"""What a fault did."""

from dataclasses import dataclass, field


@dataclass
class Outcome:
    """What a fault did; `bad` is what should not be."""

    fault: str
    database: str
    calls: int = 0
    rows: int = 0
    refused: int = 0
    """Calls that the upstream never saw."""
    unknown: int = 0
    """Rows of calls whose end nobody told."""
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    inexact: list[str] = field(default_factory=list)
    overspent: list[str] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Nothing bad."""
    miscounted: int = 0
    """Tokens by which the counters differ from the rows."""
    left_open: int = 0
    held: int = 0
    slowest: float = 0.0
    """Seconds that a call took at most."""
    settling: float = 0.0
    """Seconds from the last call until nothing was open any more."""
    stopping: float = 0.0
    """Seconds from the order to end until all had ended."""
    seconds: float = 0.0

    @property
    def bad(self) -> list[str]:
        """What should not be, in words."""
        counted = {
            "miscounted": self.miscounted, "left open": self.left_open, "held": self.held
        }  # fmt: skip
        listed = {
            "lost": self.lost, "doubled": self.doubled, "inexact": self.inexact,
            "overspent": self.overspent, "untried": self.untried,
        }  # fmt: skip
        return [f"{what}: {n}" for what, n in counted.items() if n] + [
            f"{what}: {line}" for what, lines in listed.items() for line in lines
        ]

    def __str__(self) -> str:
        return (
            f"{self.fault:16} {self.database:8} {self.calls:6} {self.rows:6} {self.refused:7} "
            f"{self.unknown:7} {len(self.lost):5} {len(self.doubled):7} {len(self.inexact):7} "
            f"{self.miscounted:11} {len(self.overspent):9} {self.left_open:5} {self.held:5} "
            f"{self.slowest:7.1f} {self.settling:8.1f} {self.stopping:8.1f} {self.seconds:7.1f}"
        )


HEADER = (
    f"{'fault':16} {'database':8} {'calls':>6} {'rows':>6} {'refused':>7} {'unknown':>7} "
    f"{'lost':>5} {'doubled':>7} {'inexact':>7} {'miscounted':>11} {'overspent':>9} {'open':>5} "
    f"{'held':>5} {'slowest':>7} {'settling':>8} {'stopping':>8} {'seconds':>7}"
)
